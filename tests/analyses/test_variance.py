"""The analyses of the variance of aggregated values, each against a second computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import sinklens as sl
from sinklens import metrics, statistics
from sinklens.formation import FormationEvent
from sinklens.prompts import from_tokens
from tests.helpers.planted import OUTLIER, PLUS, SUPER, planted_model
from tests.helpers.tiny import ARCHITECTURES, slow_but, tiny_model, tiny_tokens

pytest.importorskip("transformer_lens.HookedTransformer")

GIVEN: dict[str, Any] = {"layer": 1, "super_neurons": [3, 7], "outlier_dims": [2, 5]}


def study_of(model: Any, n: int = 4, length: int = 24, **options: Any) -> sl.Study:
    return sl.Study(model, from_tokens(model, tiny_tokens(n, length)), given=GIVEN, **options)


PLANTED: dict[str, Any] = {"layer": 0, "super_neurons": [SUPER], "outlier_dims": [OUTLIER]}
NAMES = ("variance_decay", "w_o_alignment", "head_imbalance", "output_gate")


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


@pytest.mark.slow
@pytest.mark.parametrize("arch", slow_but("llama", "gpt2", of=(arch for arch in ARCHITECTURES if arch != "olmo2")))
def test_every_family_is_measured_and_drawn(arch, monkeypatch):
    monkeypatch.setattr(statistics.bootstrap_estimate, "__defaults__", (20,))  # intervals are not asked for here
    study = study_of(tiny_model(arch))
    for name in NAMES:
        result = sl.run_analysis(sl.analysis.load_analysis(name), study)
        if (arch, name) == ("gemma2", "w_o_alignment"):  # a norm stands behind attention
            assert "cannot be read off W_O" in result.findings.verdict.reason
            continue
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


def test_the_interval_of_a_correlation_holds_it_though_repeated_prompts_weaken_it():
    """The share of distinct prompts is lower in every draw: that shift says nothing about the number itself."""

    def weakened(drawn: np.ndarray) -> float:
        return -0.95 * len(set(drawn.tolist())) / len(drawn)

    plain = statistics.bootstrap_estimate(weakened, 20, seed=0)
    shifted = statistics.bootstrap_estimate(weakened, 20, seed=0, correlation=True)
    assert plain.low > plain.value == pytest.approx(-0.95)
    assert -1 < shifted.low < shifted.value == plain.value < shifted.high < -0.9
    width = np.arctanh(plain.high) - np.arctanh(plain.low)
    assert np.arctanh(shifted.high) - np.arctanh(shifted.low) == pytest.approx(width)


def test_draws_that_tie_with_the_statistic_count_whatever_their_rounding():
    draws = [0.1, 0.3, np.float32(0.1) + np.float32(0.2), 0.30001]  # the sum is 0.3 but for 1e-8
    assert statistics.permutation_p(0.3, draws) == pytest.approx(4 / 5)
    assert statistics.permutation_p(float(draws[2]), draws) == pytest.approx(4 / 5)
    assert statistics.permutation_p(0.3, draws, "less") == pytest.approx(4 / 5)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_variance_of_averaged_coin_tosses_falls_with_their_number():
    """Under a uniform average of t + 1 tosses the variance is that of one, over t + 1."""
    findings = run("variance_decay", planted_study(coin_tosses(128)), layers=(0,))
    table = findings.table.set_index(["source", "quantity", "position"]).value
    first = table["given prompts", "aggregated", 0]
    for position in (1, 3, 7, 15):
        assert table["given prompts", "aggregated", position] * (position + 1) / first == pytest.approx(1, rel=0.4)
        assert table["given prompts", "not aggregated", position] / first == pytest.approx(1, rel=0.05)
    assert findings.verdict.parts[0].outcome == "holds"
    assert findings.verdict.p_value < 0.001
    assert findings.numbers["Kendall's tau of variance with position, aggregated, given prompts"].below(-0.8)


@pytest.mark.slow
def test_variance_decay_says_what_the_same_rule_finds_on_half_of_the_tokens():
    """The model is causal: what it does on the first half does not depend on the second."""
    model, tokens = planted_model(), coin_tosses(length=24)
    analysis: Any = sl.analysis.load_analysis("variance_decay")
    decay = analysis.run.__globals__["decay"]
    draws = torch.rand(50, 23, generator=torch.Generator().manual_seed(0))
    whole, half = planted_study(tokens, model), planted_study(tokens[:, :12], model)
    acts = {study: study.activations(sl.sites.Z, (0,)) for study in (whole, half)}
    first, alone = (decay(study, acts[study], "mean", draws[:, :11]) for study in (whole, half))
    assert first.ratio == alone.ratio and first.p_value == alone.p_value
    torch.testing.assert_close(first.variance, alone.variance)
    assert first.ratio != decay(whole, acts[whole], "mean", draws).ratio
    parts = [analysis.run(planted_study(tokens[:, :length], model)).verdict.parts[0] for length in (24, 6)]
    # With fewer than two later positions there is no order.
    assert [part.detail for part in parts] == ["on the first 12 tokens alone: holds", ""]


@pytest.mark.slow
def test_variance_decay_takes_both_an_outlier_and_a_decay():
    tokens, model = coin_tosses(), planted_model()
    tokens[:, 0] = PLUS  # as a BOS would be: no variance at the first position
    same = sl.run_analysis(sl.analysis.load_analysis("variance_decay"), planted_study(tokens, model), layers=(0,))
    assert same.findings.verdict.outcome == "not measurable"
    assert "the same in all prompts" in same.findings.verdict.reason
    model.add_hook("blocks.0.attn.hook_pattern", attend_to_oneself, is_permanent=True)
    flat = run("variance_decay", planted_study(coin_tosses(), model), layers=(0,))
    assert flat.verdict.parts[0].outcome == "does not hold"
    table = flat.table.pivot(index=["source", "position"], columns="quantity", values="value")
    np.testing.assert_allclose(table["aggregated"], table["not aggregated"], rtol=1e-5)  # nothing was averaged


@pytest.mark.slow
def test_w_o_alignment_is_that_of_a_plain_run(tiny_llama):
    study = study_of(tiny_llama)
    findings = run("w_o_alignment", study, layers=(1, 3))
    _, cache = tiny_llama.run_with_cache(study.batch.tokens)
    sinks, taus, highest = study.formation.sink_positions, [], []
    for layer in (1, 3):
        z, out = cache["z", layer].numpy(), cache["attn_out", layer].numpy()
        variance = np.stack([z[i, p].ravel() for i, p in enumerate(sinks)]).var(0)
        weights = np.abs(tiny_llama.W_O[layer].detach().numpy().reshape(-1, 32))
        taus += [scipy.stats.kendalltau(variance, column)[0] for column in weights.T]
        others = np.stack([np.delete(out[i], p, axis=0) for i, p in enumerate(sinks)]).var(0, ddof=1).mean(-1)
        at_sink = np.stack([out[i, p] for i, p in enumerate(sinks)]).var(0, ddof=1).mean()
        highest.append(at_sink > others.max())
        ratio = findings.numbers[f"variance after W_O over the median in block {layer}"]
        assert ratio == pytest.approx(at_sink / np.median(others), rel=1e-4)
    assert findings.verdict.estimate.value == pytest.approx(np.mean(taus), abs=1e-5)
    found = findings.table.query("quantity == 'tau' and token == 'sink'").sort_values(["layer", "index"]).value
    np.testing.assert_allclose(found, taus, atol=1e-5)
    share = findings.numbers["share of blocks in which the sink has the highest variance after W_O"]
    assert share.value == np.mean(highest)


def aligned_study(sign: int) -> sl.Study:
    """Values have a scale of their own in every dimension; W_O weighs dimensions in that order, or in the opposite."""
    model = tiny_model("llama")
    scale = torch.linspace(0.1, 2, 32).view(4, 8)[[0, 2]].repeat_interleave(2, 0)
    order = scale if sign > 0 else 2.1 - scale
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.copy_(order[..., None] ** 3 * block.attn.W_O.sign())
    for layer in range(4):
        model.add_hook(f"blocks.{layer}.attn.hook_z", scaled_values(scale), is_permanent=True)
    return sl.Study(model, from_tokens(model, tiny_tokens(24, 16)), given=GIVEN)


def scaled_values(scale: torch.Tensor) -> Any:
    """Puts noise of these scales in the place of the values, four times as large at the first token."""

    def hook(z: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        first = torch.where(torch.arange(z.shape[1]) == 0, 4.0, 1.0)
        return noise * scale * first[:, None, None]

    return hook


@pytest.mark.slow
def test_w_o_alignment_holds_where_w_o_weighs_what_varies_and_not_where_it_weighs_the_rest(monkeypatch):
    # Where attention goes does not matter here: the sink is the first token by decree.
    monkeypatch.setattr(sl.Study, "sinks", property(lambda study: torch.zeros(study.batch.n, dtype=torch.long)))
    aligned, opposed = run("w_o_alignment", aligned_study(1)), run("w_o_alignment", aligned_study(-1))
    assert aligned.verdict.parts[0].outcome == "holds"
    assert aligned.verdict.estimate.value > 0.6
    assert aligned.numbers["share of blocks in which the sink has the highest variance after W_O"].value == 1
    assert opposed.verdict.parts[0].outcome == "does not hold"
    assert opposed.verdict.estimate.value < -0.6
    assert abs(opposed.verdict.control_estimate.value) < 0.05
    signed = run("w_o_alignment", aligned_study(1), weights="signed")
    assert signed.verdict.parts[0].outcome == "does not hold"
    assert abs(signed.verdict.estimate.value) < 0.2


def test_w_o_alignment_cannot_be_asked_of_a_token_that_is_always_the_same():
    tokens = coin_tosses(4, 16)
    tokens[:, 0] = PLUS
    result = sl.run_analysis(sl.analysis.load_analysis("w_o_alignment"), planted_study(tokens))
    assert result.findings.verdict.outcome == "not measurable"
    assert "the same in all prompts" in result.findings.verdict.reason


@pytest.mark.slow
def test_w_o_alignment_draws_at_least_one_of_each(tiny_llama):
    assert len(run("w_o_alignment", study_of(tiny_llama), outputs=5).table.query("token == 'sink'")) == 10
    for option in ("outputs", "permutations"):
        with pytest.raises(sl.InputError, match="at least 1"):
            run("w_o_alignment", study_of(tiny_llama), **{option: 0})


def test_permuted_variances_stay_together_where_heads_share_values(tiny_llama):
    permuted = sl.analysis.load_analysis("w_o_alignment").run.__globals__["permuted"]
    shared = torch.arange(16.0).view(2, 1, 8) + torch.tensor([0, 0.25]).view(1, 2, 1)  # [kv_head, group, d_head]
    (found,) = permuted([shared.flatten()[None]], 50, study_of(tiny_llama))
    found = found.view(50, 2, 2, 8)
    torch.testing.assert_close(found[:, :, 1], found[:, :, 0] + 0.25)
    assert (found.flatten(1).sort().values == shared.flatten().sort().values).all()
    assert len(found.unique(dim=0)) == 50


@pytest.mark.slow
def test_head_imbalance_is_that_of_a_plain_run(tiny_llama):
    study = study_of(tiny_llama)
    findings = run("head_imbalance", study)
    _, cache = tiny_llama.run_with_cache(study.batch.tokens)
    taus = []
    for layer in range(4):
        pattern, z = cache["pattern", layer].numpy(), cache["z", layer].numpy()
        entropy = -(pattern * np.log(np.where(pattern > 0, pattern, 1))).sum(-1)[:, :, 1:].mean((0, 2))
        variance = z[:, 1:].var(0, ddof=1).mean((0, 2))
        taus.append(scipy.stats.kendalltau(entropy, variance)[0])
        table = findings.table[findings.table.layer == layer]
        np.testing.assert_allclose(table.entropy, entropy, rtol=1e-4)
        np.testing.assert_allclose(table.variance, variance, rtol=1e-4)
    assert findings.verdict.estimate.value == pytest.approx(np.mean(taus[:2]), abs=1e-6)
    assert findings.numbers["tau after formation"].value == pytest.approx(np.mean(taus[2:]), abs=1e-6)
    assert findings.numbers["tau in all blocks"].value == pytest.approx(np.mean(taus), abs=1e-6)


@pytest.mark.slow
def test_heads_after_formation_are_those_before_the_next_event(tiny_llama):
    """Blocks 0 and 2 as two events: of the first, block 1 alone is behind it and before the next."""
    study = study_of(tiny_llama)
    events = tuple(FormationEvent(block, 1.0, 10.0, 1.0, 10.0, 1.0, 1.0) for block in (0, 2))
    study.formation = replace(study.formation, layer=0, events=events)
    findings = run("head_imbalance", study, span="after_formation")
    rows = findings.table[findings.table.layer == 1]
    tau = scipy.stats.kendalltau(rows.entropy, rows.variance)[0]
    assert findings.verdict.estimate.value == pytest.approx(tau, abs=1e-6)
    named = findings.table.groupby("layer").blocks.first().tolist()
    assert named == ["up to formation", "after formation", "after the next event", "after the next event"]


def sharpened(scales: tuple[float, float]) -> sl.Study:
    """Heads attend from uniformly to themselves alone; both value heads have the same noise, of these scales."""

    def pattern_hook(pattern: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        length = pattern.shape[-1]
        uniform = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
        share = torch.linspace(0, 1, pattern.shape[1])[:, None, None]
        return (share * torch.eye(length) + (1 - share) * uniform).expand_as(pattern).clone()

    def value_hook(v: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        noise = torch.randn(*v.shape[:2], 1, v.shape[3], generator=torch.Generator().manual_seed(0))
        return noise * torch.tensor(scales)[:, None]

    study = study_of(tiny_model("llama"), n=16)
    model: Any = study.model
    for layer in range(4):
        model.add_hook(f"blocks.{layer}.attn.hook_pattern", pattern_hook, is_permanent=True)
        model.add_hook(f"blocks.{layer}.attn.hook_v", value_hook, is_permanent=True)
    return study


@pytest.mark.slow
def test_heads_that_average_less_vary_more_unless_their_values_vary_less():
    before = "tau up to formation with the variance of the values before averaging"
    alike = run("head_imbalance", sharpened((1.0, 1.0)))
    assert alike.verdict.parts[0].outcome == "holds"
    assert alike.verdict.estimate.value == pytest.approx(-1)
    assert np.isnan(alike.numbers[before].value)  # all values are alike: the order is made by averaging
    # Of six pairs of heads, the two that share values stay in order, and the four others are turned round.
    turned = run("head_imbalance", sharpened((100.0, 1.0)))
    assert turned.verdict.parts[0].outcome == "does not hold"
    assert turned.verdict.estimate.value == pytest.approx(2 / 6)
    assert turned.numbers[before].above(0)


def test_one_head_has_no_imbalance():
    result = sl.run_analysis(sl.analysis.load_analysis("head_imbalance"), planted_study(coin_tosses(4, 16)))
    assert result.findings.verdict.outcome == "not measurable"
    assert "one head" in result.findings.verdict.reason


@pytest.mark.slow
def test_output_gate_is_that_of_a_plain_run(tiny_llama):
    study = study_of(tiny_llama)
    findings = run("output_gate", study, scale=2.0, bias=-0.5)
    gate = sl.analysis.load_analysis("output_gate").run.__globals__["projections"](study)
    assert study.onset == (0, 1)

    def hook_for(layer: int) -> Any:
        inputs = {}

        def read(x: torch.Tensor, hook: object) -> None:  # noqa: ARG001
            inputs["x"] = x

        def write(z: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
            return z * torch.sigmoid(2 * (inputs["x"] @ gate[layer]).view(z.shape) - 0.5)

        return [(f"blocks.{layer}.ln1.hook_normalized", read), (f"blocks.{layer}.attn.hook_z", write)]

    sinks = study.formation.sink_positions
    ratios = {}
    for name, hooks in (("no gate", []), ("sigmoid gate", hook_for(0) + hook_for(1))):
        with tiny_llama.hooks(fwd_hooks=hooks):
            _, cache = tiny_llama.run_with_cache(study.batch.tokens)
        logs = []
        for layer in (0, 1):
            z = cache["z", layer].numpy().reshape(4, 24, -1)
            at_sink = np.stack([z[i, p] for i, p in enumerate(sinks)]).var(0, ddof=1).mean()
            others = np.stack([np.delete(z[i], p, axis=0) for i, p in enumerate(sinks)]).var(0, ddof=1).mean(-1)
            logs.append(np.log(at_sink / np.median(others)))
        ratios[name] = np.exp(np.mean(logs))
        found = findings.numbers[f"variance of the sink over the median of others, {name}"].value
        assert found == pytest.approx(ratios[name], rel=1e-4)
        fired = np.mean([np.abs(cache["post", 1][i, p, [3, 7]].numpy()) for i, p in enumerate(sinks)])
        assert findings.numbers[f"magnitude of the super neurons at the sink, {name}"].value == pytest.approx(
            fired, rel=1e-4
        )
        seen = [cache["pattern", layer][i, :, p + 1 :, p].mean() for layer in (2, 3) for i, p in enumerate(sinks)]
        attention = findings.numbers[f"attention to the sink after formation, {name}"].value
        assert attention == pytest.approx(float(np.mean(seen)), rel=1e-4)
    assert findings.verdict.estimate.value == pytest.approx(ratios["sigmoid gate"] / ratios["no gate"], rel=1e-4)
    assert ratios["sigmoid gate"] != pytest.approx(ratios["no gate"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["input", "value"])
def test_a_constant_gate_leaves_the_ratio_of_its_block_exactly(tiny_llama, gate):
    study = sl.Study(tiny_llama, from_tokens(tiny_llama, tiny_tokens(6, 24)), given=GIVEN | {"layer": 0})
    assert study.onset == (0,)
    findings = run("output_gate", study, gate=gate, bias=1.0)
    control = findings.verdict.control_estimate
    assert (control.value, control.low, control.high) == pytest.approx((1, 1, 1), abs=1e-5)
    assert findings.verdict.estimate.value != pytest.approx(1, abs=1e-3)
    alone = findings.numbers["the same factor in the first block, where a constant gate's is 1"]
    assert alone == findings.verdict.estimate
    assert findings.numbers["attention to the sink after formation, constant gate"].value != pytest.approx(
        findings.numbers["attention to the sink after formation, no gate"].value, abs=1e-4
    )
    # Without a scale the sigmoid gate is a constant too, and the claim falls.
    still = run("output_gate", study, gate=gate, scale=0.0)
    assert still.verdict.estimate.value == pytest.approx(1, abs=1e-5)
    assert still.verdict.parts[0].outcome == "does not hold"


@pytest.mark.slow
def test_a_gate_that_adds_noise_where_there_is_little_lessens_the_ratio(monkeypatch):
    """Values with a large mean that all prompts share: a gate that depends on the prompt makes the mean vary."""
    monkeypatch.setattr(sl.Study, "sinks", property(lambda study: torch.zeros(study.batch.n, dtype=torch.long)))
    outcomes = {}
    for mean in (0.0, 3.0):
        model = tiny_model("llama")
        model.add_hook("blocks.0.attn.hook_z", values_about(mean), is_permanent=True)
        study = sl.Study(model, from_tokens(model, tiny_tokens(24, 16)), given=GIVEN | {"layer": 0})
        outcomes[mean] = run("output_gate", study).verdict
    assert outcomes[3.0].parts[0].outcome == "holds"
    assert outcomes[3.0].estimate.value < 0.5
    assert outcomes[0.0].parts[0].outcome in ("does not hold", "undecided")  # it reaches over the threshold or not
    assert outcomes[0.0].estimate.value == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_a_gate_on_a_token_that_rarely_varies_is_measured_and_on_one_that_never_does_is_not(monkeypatch, tiny_llama):
    monkeypatch.setattr(sl.Study, "sinks", property(lambda study: torch.zeros(study.batch.n, dtype=torch.long)))
    tokens = tiny_tokens(4, 24)
    tokens[:3, 0] = 1  # many draws hold only prompts that begin alike
    analysis = sl.analysis.load_analysis("output_gate")
    rarely = sl.run_analysis(analysis, sl.Study(tiny_llama, from_tokens(tiny_llama, tokens), given=GIVEN))
    assert rarely.findings.verdict.outcome != "not measurable"
    assert np.isfinite(numbers_of(rarely.findings)).all()
    tokens[:, 0] = 1
    never = sl.run_analysis(analysis, sl.Study(tiny_llama, from_tokens(tiny_llama, tokens), given=GIVEN))
    assert never.findings.verdict.outcome == "not measurable"
    assert "the same in all prompts" in never.findings.verdict.reason


def values_about(mean: float) -> Any:
    def hook(z: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        return mean + noise * torch.where(torch.arange(z.shape[1]) == 0, 4.0, 1.0)[:, None, None]

    return hook
