"""The nouns of patching."""

from __future__ import annotations

from typing import Any

import torch

from sinklens import edits, sites
from sinklens.patches import Patch, Source


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
