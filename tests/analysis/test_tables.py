"""What analyses share: tables, what they need of a study, and the sink moved to the front."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from sinklens.analysis.preconditions import check_k, check_sink_varies
from sinklens.analysis.tables import base_reading, mean_and_range, patch_table
from sinklens.edits import Constant
from sinklens.errors import InputError, NotApplicableError
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts import Readout
from sinklens.sites import RESID_POST
from sinklens.study import Study
from tests.helpers.tiny import D_MODEL, tiny_model, tiny_tokens

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}


def study(tokens: torch.Tensor) -> Study:
    model = tiny_model("llama")
    return Study(model, from_tokens(model, tokens), given=dict(GIVEN))


def with_sinks(sinks: list[int], monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(Study, "sinks", property(lambda _study: torch.tensor(sinks)))
    return study(tiny_tokens(len(sinks), 6))


def test_every_row_of_a_patch_table_finds_its_prompt_in_the_base_run():
    here = study(tiny_tokens(3, 8))
    norm = Readout("norm", RESID_POST, (2,), lambda x, _rows: x.float().norm(dim=-1)[:, -1])
    patches = [Patch(RESID_POST, (1,), (position,), Constant()) for position in (5, 7)]
    result = here.run(patches, [norm])
    table = patch_table(result, [{"position": 5}, {"position": 7}], {"base": {"position": -1}})
    unpatched = base_reading(result, table, "norm")
    assert unpatched.tolist() == result.runs["base"]["norm"].tolist() * 3
    assert (table.norm[:3] == unpatched[:3]).all() and (table.norm[6:] != unpatched[6:]).all()


def test_what_a_patch_adds_is_over_its_own_run():
    here = study(tiny_tokens(3, 8))
    norm = Readout("norm", RESID_POST, (2,), lambda x, _rows: x.float().norm(dim=-1)[:, -1])
    patches = [Patch(RESID_POST, (1,), (7,), Constant(), run=run) for run in ("base", "other")]
    root = Patch(RESID_POST, (0,), (7,), Constant())
    result = here.run(patches, [norm], {"base": (), "other": (root,)})
    first, second = result.added(patches, "norm")
    assert torch.equal(first, result.values["norm"][0] - result.runs["base"]["norm"])
    assert torch.equal(second, result.values["norm"][1] - result.runs["other"]["norm"])
    assert not torch.equal(result.runs["base"]["norm"], result.runs["other"]["norm"])
    with pytest.raises(ValueError, match="shorter"):
        result.added(patches[:1], "norm")


def test_mean_and_range_of_a_table():
    table = pd.DataFrame({"who": ["b"] * 41 + ["a"], "value": [*range(41), 7.0], "other": "x"})
    expected = {"who": ["b", "a"], "mean": [20.0, 7.0], "low": [1.0, 7.0], "high": [39.0, 7.0]}
    pd.testing.assert_frame_equal(mean_and_range(table, ["who"]), pd.DataFrame(expected))


def test_the_sink_moves_to_the_front_of_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch):
    here = with_sinks([2, 0, 4], monkeypatch)
    x = torch.arange(6).expand(3, 6)
    assert here.sink_first(x).tolist() == [[2, 0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5], [4, 0, 1, 2, 3, 5]]
    rows = here.sink_first(x[:2, :, None], torch.tensor([2, 0]))
    assert rows.squeeze(-1).tolist() == [[4, 0, 1, 2, 3, 5], [2, 0, 1, 3, 4, 5]]


@pytest.mark.parametrize("k", [0, D_MODEL])
def test_more_than_the_largest_entries_are_needed(k: int):
    here = study(tiny_tokens(2, 8))
    check_k(here, D_MODEL - 1)
    with pytest.raises(InputError, match=f"k={k} must be in 1..{D_MODEL - 1}"):
        check_k(here, k)


@pytest.mark.parametrize(
    ("sinks", "same", "varies"), [([0, 0], False, True), ([0, 1], True, True), ([0, 0], True, False)]
)
def test_a_first_token_that_is_the_same_everywhere_does_not_vary(
    sinks: Any, same: bool, varies: bool, monkeypatch: Any
):
    here = with_sinks(sinks, monkeypatch)
    here.batch.tokens[:, 0] = torch.tensor([5, 5 if same else 6])
    if varies:
        check_sink_varies(here)
    else:
        with pytest.raises(NotApplicableError, match="the same in all prompts"):
            check_sink_varies(here)
