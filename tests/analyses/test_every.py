"""What every analysis promises: complete verdicts, tidy tables, figures, and numbers that depend on nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_string_dtype

from sinklens import statistics
from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.prompts import from_tokens
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.tiny import hooks_left, tiny_model, tiny_tokens

NAMES = tuple(list_analyses())
PAPER = {
    "onset",
    "variance_decay",
    "mask_intervention",
    "variance_amplification",
    "w_o_alignment",
    "super_neurons",
    "selective_activation",
    "down_projection",
    "dominance",
    "rmsnorm_filter",
    "qk_locking",
    "head_imbalance",
    "effective_rank",
    "output_gate",
    "settle_it",
}
GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}


def study(**changes: Any) -> Study:
    model = tiny_model("llama")
    return Study(model, from_tokens(model, tiny_tokens(5, 24)), given=dict(GIVEN), **changes)


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Intervals are compared with those of the same draws, however many these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics.bootstrap_estimate, "__defaults__", (100,))
        yield


@pytest.fixture(scope="module")
def shared() -> tuple[Study, dict[str, AnalysisResult]]:
    """Every analysis on one study, one after the other."""
    here = study()
    return here, {name: run_analysis(load_analysis(name), here) for name in NAMES}


def numbers(result: AnalysisResult) -> dict[str, float]:
    """Every number of a result that is no column of its table, by name."""
    verdict = result.findings.verdict
    named = {"estimate": verdict.estimate, "control": verdict.control_estimate, **result.findings.numbers}
    flat = {}
    for name, value in named.items():
        if isinstance(value, Estimate):
            flat |= {f"{name}/{part}": getattr(value, part) for part in ("value", "low", "high", "n")}
        elif value is not None:
            flat[name] = float(value)
    return flat


def same(one: AnalysisResult, other: AnalysisResult, tolerance: float = 1e-4) -> None:
    assert one.findings.verdict.outcome == other.findings.verdict.outcome
    first, second = numbers(one), numbers(other)
    assert list(first) == list(second)
    for name, value in first.items():
        assert value == pytest.approx(second[name], rel=tolerance, abs=tolerance, nan_ok=True), name
    pd.testing.assert_frame_equal(
        one.findings.table.reset_index(drop=True),
        other.findings.table.reset_index(drop=True),
        rtol=tolerance,
        atol=tolerance,
    )


def test_every_experiment_of_the_paper_is_there():
    assert set(NAMES) >= PAPER


@pytest.mark.backend
@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_is_complete(shared, name):
    result = shared[1][name]
    verdict = result.findings.verdict
    assert verdict.outcome in ("holds", "holds in part", "does not hold", "undecided"), verdict.reason
    assert verdict.parts[0].outcome != "not measurable" and verdict.parts[0].estimate == verdict.estimate
    for part in verdict.parts:
        assert part.sentence.endswith(".") and (part.reason or part.rule.startswith("holds when")), part.name
    assert verdict.claim.endswith(".") and verdict.statistic and verdict.control
    assert verdict.rule.startswith("holds when")
    assert verdict.estimate is not None and np.isfinite(verdict.estimate.value)
    assert result.findings.caption.endswith(".")
    assert result.name == name and result.title and (result.paper or name not in PAPER or name == "settle_it")


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("onset", ["6 tokens", "12 tokens"]),
        ("effective_rank", ["6 tokens", "12 tokens"]),
        ("mask_intervention", ["12 tokens", "token 10", "token 20"]),
        ("variance_amplification", ["token 10", "token 20"]),
    ],
)
def test_what_is_measured_at_several_tokens_or_lengths_is_judged_at_each(shared, name, places):
    detail = shared[1][name].findings.verdict.parts[0].detail
    assert all(re.search(rf"\b{place}\b", detail) for place in places), detail


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_tidy(shared, name):
    table = shared[1][name].findings.table
    assert len(table) > 0 and table.columns.is_unique
    for column in table:
        kind = table[column]
        assert is_numeric_dtype(kind) or is_bool_dtype(kind) or is_string_dtype(kind), column
    assert not table.isna().all(axis=0).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_shows_something_and_names_its_axes(shared, name):
    figure = shared[1][name].figure
    assert figure is not None and figure["data"]
    titles = [axis.get("title", {}).get("text") for key, axis in figure["layout"].items() if key[1:].startswith("axis")]
    notes = [note.get("text", "") for note in figure["layout"].get("annotations", [])]
    assert any(titles) or any(notes)
    assert len(str(figure)) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded(shared, name, tmp_path):
    result = shared[1][name]
    again = AnalysisResult.load(result.save(tmp_path / name))
    same(result, again, 1e-12)
    assert again.figure == result.figure and again.config == result.config


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_numbers_depend_neither_on_the_batch_size_nor_on_what_ran_before(shared, name):
    alone = run_analysis(load_analysis(name), study(rows=3))  # fewer than the prompts, and no divisor of them
    same(shared[1][name], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_seed_is_all_that_is_random(shared, name):
    """Global random state is neither read nor changed."""
    import torch

    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002  (the global state is what is asked about)
    before = torch.random.get_rng_state()
    again = run_analysis(load_analysis(name), shared[0])
    assert torch.equal(before, torch.random.get_rng_state())
    same(shared[1][name], again, 1e-12)


def test_no_hook_is_left(shared):
    assert hooks_left(shared[0].model) == []
