"""Estimates against the exact edges that they are the first order of."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.circuits.estimates import Estimator
from sinklens.circuits.exact import exact_edges
from tests.helpers.circuits import made_for
from tests.helpers.tiny import slow_but, tiny_model


def estimator_of(made):
    verifier = made.verifier(made.setting.pair.with_sink.run)
    return Estimator(made.measure, made.graph, verifier.rewiring, made.with_sink, made.without)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")))
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_eap_is_the_slope_of_the_exact_edges(family, direction) -> None:
    """A hundredth of the change does a hundredth of the estimate: gradients through two forward passes and their norms
    against differences of a third.
    """
    made = made_for(tiny_model(family))
    numbers = list(range(0, len(made.graph.edges), 7))
    edges = [made.graph.edges[i] for i in numbers]
    small = 0.03
    up = exact_edges(made.measure, made.graph, made.parts, edges, made.change * small, direction)
    down = exact_edges(made.measure, made.graph, made.parts, edges, made.change * -small, direction)
    slope, estimate = (up - down) / (2 * small), estimator_of(made).eap(direction)[numbers]
    assert np.corrcoef(slope.ravel(), estimate.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(estimate, slope, atol=0.03 * np.abs(slope).max())


@pytest.mark.slow
def test_on_the_way_between_the_runs_the_ends_are_theirs(tiny_llama) -> None:
    """Many points average the gradients that single ones have; at the ends they are those of the runs."""
    made = made_for(tiny_llama)
    estimator = estimator_of(made)
    before, after = estimator.eap("denoise"), estimator.eap("noise")
    gap = np.abs(before).max()
    near = [estimator._effects([point], "denoise") for point in (1e-4, 1 - 1e-4)]
    assert np.abs(near[0] - before).max() < 0.02 * gap
    np.testing.assert_allclose(near[1], after, atol=0.02 * gap)
    halves = (estimator._effects([0.25], "denoise") + estimator._effects([0.75], "denoise")) / 2
    np.testing.assert_allclose(estimator.eap_ig("denoise", 2), halves, atol=1e-5)


@pytest.mark.slow
def test_integrated_gradients_of_the_natural_sink_are_finite() -> None:
    made = made_for(tiny_model("llama"), "natural")
    found = estimator_of(made).eap_ig("noise", 3)
    assert found.shape == (len(made.graph.edges), made.setting.batch.n)
    assert np.isfinite(found).any(0).any() and np.nanmax(np.abs(found)) > 1e-3
