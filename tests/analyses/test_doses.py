"""Dose-response curves on the planted model, where every threshold is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from tests.helpers.planted import OUTLIER, SUPER, planted_model, prompts, value

pytest.importorskip("transformer_lens.HookedTransformer")
TARGET, LENGTH = 5, 16
DOSES = sl.analysis.load_analysis("doses")


@pytest.fixture(scope="module")
def study() -> sl.Study:
    model = planted_model()
    batch = sl.prompts.from_tokens(model, prompts(LENGTH))
    formation = sl.find_formation(model, batch, layer=0, super_neurons=[SUPER], outlier_dims=[OUTLIER])
    return sl.Study.of(model, batch, replace(formation, sink_positions=(0, 0)))


@pytest.fixture(scope="module")
def result(study: sl.Study) -> sl.AnalysisResult:
    return sl.run_analysis(DOSES, study, target=TARGET)


def curve(result: sl.AnalysisResult, name: str) -> dict[float, list[float]]:
    rows: Any = result.findings.table[result.findings.table.curve == name]
    return {dose: found.sort_values("prompt").effect.tolist() for dose, found in rows.groupby("dose")}


def values() -> tuple[np.ndarray, np.ndarray]:
    """Aggregated values at the target in the base run and in the anchored one."""
    tokens = prompts(LENGTH)
    base = [np.mean([value(int(token)) for token in row[: TARGET + 1]]) for row in tokens]
    return np.array(base), np.array([value(int(row[TARGET])) for row in tokens])


def test_the_way_crosses_where_the_neuron_fires(result: sl.AnalysisResult) -> None:
    base, anchored = values()
    for way, found in curve(result, "value_aggregation").items():
        fires = base + way * (anchored - base) > 0.5
        np.testing.assert_allclose(found, fires.astype(float), atol=2e-3, err_msg=str(way))


def test_the_deviation_has_the_factor_of_the_sink(result: sl.AnalysisResult) -> None:
    """The natural factor is the ratio of standard deviations, of which only dimension 0 varies."""
    base, _ = values()
    first = np.array([value(int(row[0])) for row in prompts(LENGTH)])
    natural = np.std(first) / np.std(base)
    assert result.findings.numbers["deviation: natural dose"] == pytest.approx(natural, rel=1e-5)
    for factor, found in curve(result, "deviation").items():
        fires = base.mean() + factor * (base - base.mean()) > 0.5
        np.testing.assert_allclose(found, fires.astype(float), atol=2e-3, err_msg=str(factor))
    assert result.findings.verdict.outcome in ("does not hold", "undecided")


def test_where_half_is_reached(result: sl.AnalysisResult) -> None:
    """Means are 0, 1/2 and 1 at a quarter, a half and three quarters of the way; a spike of any size fires."""
    numbers: Any = result.findings.numbers
    assert numbers["value_aggregation: dose of half the effect"].value == pytest.approx(0.5, abs=1e-2)
    assert numbers["spike: dose of half the effect"].value == pytest.approx(0.05, abs=1e-3)
    assert curve(result, "spike")[0.0] == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.slow
def test_no_dose_where_nothing_varies(study: sl.Study) -> None:
    """Prompts that begin alike: the sink's value has no deviation, and its natural factor is not known."""
    tokens = prompts(LENGTH)
    tokens[:, 0] = tokens[1, 0]
    batch = sl.prompts.from_tokens(study.model, tokens)
    same = sl.Study.of(study.model, batch, replace(study.formation, sink_positions=(0, 0)))
    found = sl.run_analysis(DOSES, same, target=TARGET)
    assert found.findings.verdict.outcome == "not measurable"
    assert "deviation" not in set(found.findings.table.curve)
    assert {"spike", "value_aggregation"} <= set(found.findings.table.curve)


@pytest.mark.slow
def test_it_is_drawn(result: sl.AnalysisResult) -> None:
    pytest.importorskip("plotly")
    figure: Any = DOSES.draw(result.findings)
    assert len(figure.data) == result.findings.table.curve.nunique()
