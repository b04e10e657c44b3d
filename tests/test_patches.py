"""The nouns of patching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens import edits, sites
from sinklens.edits import Transplant
from sinklens.errors import InputError
from sinklens.patches import Patch, Positions, Source
from sinklens.sites import RESID_PRE


def transplant(**changes: Any) -> Patch:
    given = {
        "site": sites.Z,
        "layers": (1,),
        "positions": (4,),
        "edit": edits.Transplant(),
        "source": Source("base", (2,)),
    }
    return Patch(**(given | changes))


def test_patch_ids_are_content_hashes():
    a, b = transplant(), transplant(label="another name")
    assert a.id == b.id
    assert a.id != transplant(layers=(2,)).id
    one, two = ({1: torch.full((4, 8), value)} for value in (1.0, 2.0))
    assert transplant(edit=edits.Constant("mean", one)).id != transplant(edit=edits.Constant("mean", two)).id


@pytest.mark.parametrize(
    "written", [(3, 5), [3, 5], range(3, 6, 2), torch.tensor([3, 5]), np.array([3, 5]), Positions.of((3, 5))]
)
def test_positions_are_kept_in_one_way(written: Any) -> None:
    """However they are written, a patch and its source hold the same frozen object, and have the same id."""
    usual = transplant(positions=(3, 5), source=Source("base", (3, 5)))
    patch = transplant(positions=written, source=Source("base", written))
    assert patch.positions == patch.where == patch.source_where == Positions.of((3, 5))
    assert patch.source == usual.source and patch.id == usual.id
    each = transplant(positions=((3, 5), (3, 5)), source=Source("base", written))
    assert each.positions != patch.positions and each.id != patch.id  # of two prompts, and not of any number


def test_positions_made_by_hand_are_plain_numbers() -> None:
    usual = Positions.of((3, 5))
    for rows in (((np.int64(3), np.int64(5)),), [[3, 5]], [np.array([3, 5])]):
        made = Positions(rows, shared=True)  # type: ignore[arg-type]
        assert made == usual and hash(made) == hash(usual) and repr(made) == repr(usual)
    for rows in ((), ((3,), (4,))):
        with pytest.raises(InputError, match=f"positions that all prompts share are one tuple, not {len(rows)}"):
            Positions(rows, shared=True)


@pytest.mark.parametrize(
    ("positions", "source", "fits"),
    [
        ((3, 5), (7, 8), True),
        ((3, 5), (7,), True),
        (((3, 5), (4,)), ((7,), (8,)), True),
        (((3, 5), (4,)), ((7, 8), (9,)), True),
        ((3,), (7, 8), False),
        ((3, 5, 6), (7, 8), False),
        (((3, 5), (4, 6)), ((7,), (8, 9)), False),  # one for all in one prompt, one for each in another
        (((3, 5), (4,)), (7, 8), False),
    ],
)
def test_source_positions_are_one_for_each_or_one_for_all(positions, source, fits):
    def patch() -> Patch:
        return Patch(RESID_PRE, (1,), positions, Transplant(), source=Source("other", source))

    if fits:
        assert patch().source_where == Positions.of(source)
        return
    with pytest.raises(InputError, match="one source position for each of the positions"):
        patch()
