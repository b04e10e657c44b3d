"""The analyses of the variance of aggregated values, each against a second computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import sinklens as sl
from sinklens import metrics, statistics
from sinklens.prompts import from_tokens
from tests.planted import OUTLIER, PLUS, SUPER, planted_model
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

pytest.importorskip("transformer_lens.HookedTransformer")

GIVEN: dict[str, Any] = {"layer": 1, "super_neurons": [3, 7], "outlier_dims": [2, 5]}


def study_of(model: Any, n: int = 4, length: int = 24, **options: Any) -> sl.Study:
    return sl.Study(model, from_tokens(model, tiny_tokens(n, length)), given=GIVEN, **options)


PLANTED: dict[str, Any] = {"layer": 0, "super_neurons": [SUPER], "outlier_dims": [OUTLIER]}
NAMES = ("variance_decay",)


def run(name: str, study: sl.Study, **options: Any) -> Any:
    return sl.analysis.load_analysis(name).run(study, **options)


def coin_tosses(n: int = 48, length: int = 24) -> torch.Tensor:
    """Prompts of pluses and minuses, which block 0 of the planted model averages uniformly."""
    return torch.randint(0, 2, (n, length), generator=torch.Generator().manual_seed(1))


def planted_study(tokens: torch.Tensor, model: Any = None) -> sl.Study:
    model = planted_model() if model is None else model
    return sl.Study(model, from_tokens(model, tokens), given=PLANTED)


def attend_to_oneself(pattern: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
    return torch.eye(pattern.shape[-1]).expand_as(pattern).clone()


def numbers_of(findings: sl.Findings) -> list[float]:
    """Every number that was found, in order."""
    estimates = [findings.verdict.estimate, findings.verdict.control_estimate, *findings.numbers.values()]
    flat = [[e.value, e.low, e.high] if isinstance(e, sl.Estimate) else [float(e or 0)] for e in estimates]
    table = findings.table.select_dtypes("number").to_numpy().ravel().tolist()
    return [value for values in flat for value in values] + table


@pytest.mark.parametrize("name", NAMES)
def test_numbers_do_not_depend_on_the_batch_size(name, tiny_llama):
    together = run(name, study_of(tiny_llama))
    one_by_one = run(name, study_of(tiny_llama, memory_budget=1))
    np.testing.assert_allclose(numbers_of(one_by_one), numbers_of(together), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "olmo2"])
def test_every_family_is_measured_and_drawn(name, arch):
    result = sl.run_analysis(sl.analysis.load_analysis(name), study_of(tiny_model(arch)))
    assert result.findings.verdict.outcome != "not measurable"
    assert np.isfinite(numbers_of(result.findings)).all()
    assert result.figure is not None


@pytest.mark.parametrize("average", ["mean", "median"])
def test_resampled_variance_is_the_variance_of_the_drawn_prompts(average):
    x = torch.randn(6, 5, 2, 3, generator=torch.Generator().manual_seed(0)) + 3
    drawn = np.array([0, 2, 2, 5, 1, 2])
    expected = metrics.position_variance(x[drawn], average)
    torch.testing.assert_close(statistics.resampled_variance(x, average)(drawn), expected)
    assert (
        statistics.resampled_variance(x, average)(np.array([4] * 6)).tolist() == [0] * 5
    )  # exactly: not a ratio's noise


def test_a_variance_needs_two_prompts():
    for function in (metrics.position_variance, statistics.resampled_variance):
        with pytest.raises(sl.InputError, match="at least two prompts"):
            function(torch.randn(1, 5, 3))


def test_a_vectorized_bootstrap_draws_the_same_prompts():
    values = np.random.default_rng(0).normal(size=12)
    one = statistics.bootstrap_estimate(lambda drawn: values[drawn].mean(), 12, seed=3)
    many = statistics.bootstrap_estimate(lambda drawn: values[drawn].mean(-1), 12, seed=3, vectorized=True)
    assert (one.value, one.low, one.high) == pytest.approx((many.value, many.low, many.high))


def test_a_centred_interval_holds_a_value_that_repeated_prompts_pull_away():
    """The number of distinct prompts is lower in every draw: that shift says nothing about the number itself."""

    def distinct(drawn: np.ndarray) -> float:
        return float(len(set(drawn.tolist())))

    plain = statistics.bootstrap_estimate(distinct, 20, seed=0)
    centred = statistics.bootstrap_estimate(distinct, 20, seed=0, centred=True)
    assert plain.high < plain.value == 20
    assert centred.low < centred.value == 20 < centred.high
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low)


def test_the_sink_comes_first_and_the_others_keep_their_order(tiny_llama):
    study = study_of(tiny_llama)
    sinks = study.formation.sink_positions
    positions = study.sink_first(torch.arange(24).expand(4, 24))
    for row, sink in zip(positions.tolist(), sinks, strict=True):
        assert row == [sink, *(p for p in range(24) if p != sink)]
    assert any(sinks)  # else nothing moved


def test_blocks_are_the_onset_unless_named(tiny_llama):
    study = study_of(tiny_llama)
    assert study.blocks() == study.onset
    assert study.blocks((3, 0, 3)) == (0, 3)
    with pytest.raises(sl.InputError, match=r"0\.\.3"):
        study.blocks((4,))


def test_variance_decay_is_that_of_a_plain_run(tiny_llama):
    study = study_of(tiny_llama)
    findings = run("variance_decay", study, layers=(0, 2))
    for source, here in (("given prompts", study), ("random tokens", study.random)):
        _, cache = tiny_llama.run_with_cache(here.batch.tokens)
        logs, taus = [], []
        for layer in (0, 2):
            variance = cache["z", layer].numpy().reshape(4, 24, -1).var(0, ddof=1).mean(-1)
            logs.append(np.log(variance[0] / np.median(variance[1:])))
            taus.append(scipy.stats.kendalltau(np.arange(23), variance[1:])[0])
        ratio = findings.numbers[f"variance of the first token over later ones, aggregated, {source}"]
        tau = findings.numbers[f"Kendall's tau of variance with position, aggregated, {source}"]
        assert ratio.value == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)
        assert tau.value == pytest.approx(np.mean(taus), abs=1e-5)
        assert tau.low <= tau.value <= tau.high


def test_variance_of_averaged_coin_tosses_falls_with_their_number():
    """Under a uniform average of t + 1 tosses the variance is that of one, over t + 1."""
    findings = run("variance_decay", planted_study(coin_tosses(128)), layers=(0,))
    table = findings.table.set_index(["source", "values", "position"]).variance
    first = table["given prompts", "aggregated", 0]
    for position in (1, 3, 7, 15):
        assert table["given prompts", "aggregated", position] * (position + 1) / first == pytest.approx(1, rel=0.4)
        assert table["given prompts", "not aggregated", position] / first == pytest.approx(1, rel=0.05)
    assert findings.verdict.outcome == "holds"
    assert findings.verdict.p_value < 0.001
    assert findings.numbers["Kendall's tau of variance with position, aggregated, given prompts"].below(-0.8)


def test_variance_decay_takes_both_an_outlier_and_a_decay():
    tokens, model = coin_tosses(), planted_model()
    tokens[:, 0] = PLUS  # as a BOS would be: no variance at the first position
    same = run("variance_decay", planted_study(tokens, model), layers=(0,))
    assert same.verdict.outcome == "does not hold"
    assert same.verdict.estimate.value == pytest.approx(0, abs=1e-6)
    model.add_hook("blocks.0.attn.hook_pattern", attend_to_oneself, is_permanent=True)
    flat = run("variance_decay", planted_study(coin_tosses(), model), layers=(0,))
    assert flat.verdict.outcome == "does not hold"
    table = flat.table.pivot(index=["source", "position"], columns="values", values="variance")
    np.testing.assert_allclose(table["aggregated"], table["not aggregated"], rtol=1e-5)  # nothing was averaged
