"""The same on disjoint sets of prompts, in Python."""

from __future__ import annotations

import pandas as pd
import pytest

import sinklens as sl
from sinklens.analysis.base import AnalysisResult, Findings, verdict
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.prompts import from_tokens
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.tiny import tiny_model, tiny_tokens


def study(n: int = 7) -> Study:
    model = tiny_model("llama")
    return Study(model, from_tokens(model, tiny_tokens(n, 16)), given={"layer": 1})


def test_every_set_is_a_study_of_its_own() -> None:
    whole = study()
    seen = sl.replicate(whole, 3, lambda each: each, n=2)
    assert list(seen) == ["set-1", "set-2", "set-3"]
    tokens = [row for each in seen.values() for row in each.batch.tokens.tolist()]
    assert tokens == whole.batch.tokens[:6].tolist()
    assert all(each.given == whole.given and each.given is not whole.given for each in seen.values())
    with pytest.raises(InputError, match="2 disjoint sets of 4 prompts need 8"):
        sl.replicate(whole, 2, lambda each: each, n=4)


def result(outcome: bool, value: float) -> AnalysisResult:
    said = verdict("So.", "it", Estimate(value), "none", None, "1", holds=outcome)
    return AnalysisResult("onset", "Onset", "", Findings(said, pd.DataFrame()), None, {}, {}, 0.0)


def test_verdicts_of_analyses_are_compared() -> None:
    runs: dict[str, list[ChainResult | AnalysisResult]] = {
        "set-1": [result(True, 0.9)], "set-2": [result(False, 0.4)], "set-3": [result(True, 0.8)]
    }  # fmt: skip
    (row,) = sl.verdict_agreement(runs).to_dict("records")
    assert (row["part"], row["verdict"], row["n_same"], row["n_runs"]) == ("onset", "holds", 2, 3)
    assert row["spread"] == pytest.approx(0.5)
