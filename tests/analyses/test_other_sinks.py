"""The analyses of other sinks: against hooks and Hugging Face by hand, and what they promise as a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

import sinklens as sl
from sinklens import statistics
from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import list_analyses, list_groups
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.tiny import BACKENDS, N_LAYERS, hooks_left, tiny_hf, tiny_model, tiny_tokens

GROUP = "other-sinks"
NAMES = tuple(list_analyses(group=GROUP))
GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}
OPTIONS: dict[str, dict[str, Any]] = {
    "massive_activations": {"absolute": 0.1, "relative": 3.0},
    "value_drain": {"min_gap": 1e-6},
    "no_op": {"eps": 0.05},
    "streaming": {"window": 4, "first": (0, 1, 2)},
}
"""A random model has no massive activations, and hardly a sink."""
SINK, N, LENGTH = 0, 4, 20
AFTER = range(2, N_LAYERS)
"""The blocks behind formation."""


def study(backend: Any = "auto", **changes: Any) -> Study:
    """A random model, of which it is said that the first token is the sink."""
    model = tiny_model("llama", backend)
    found = Study(model, from_tokens(model, tiny_tokens(N, LENGTH)), given=dict(GIVEN), **changes)
    found.formation = replace(found.formation, sink_positions=(SINK,) * N)
    return found


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics.bootstrap_estimate, "__defaults__", (50,))
        yield


@pytest.fixture(scope="module")
def here() -> Study:
    return study()


@pytest.fixture(scope="module")
def results(here: Study) -> dict[str, AnalysisResult]:
    return {name: run_analysis(load_analysis(name), here, **OPTIONS.get(name, {})) for name in NAMES}


def functions(name: str) -> dict[str, Any]:
    """What the file of an analysis defines."""
    found = load_analysis(name)
    return (found.code or found.run).__globals__  # type: ignore[union-attr]


def losses(model: Any, tokens: Tensor, hooks: list[Any], first: int = 0) -> Tensor:
    """Mean cross entropy of every prompt from a position on, by plain hooks."""
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return each[:, first:].mean(-1)


def unseen(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    """Scores without the sink as a key of later queries."""
    act = act.clone()
    act[:, :, 1:, SINK] = -torch.inf
    return act


# -- As a group -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_they_run_when_they_are_asked_for() -> None:
    assert GROUP in list_groups()
    assert {"no_op", "streaming", "gradient_sinks", "value_drain"} <= set(NAMES)
    assert not set(NAMES) & set(list_analyses())
    assert set(NAMES) < set(list_analyses(alone=True))


@pytest.mark.slow
def test_the_command_takes_a_group_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    from sinklens.cli import app
    from sinklens.cli.all import _own

    assert [analysis.name for analysis in _own([GROUP])[0]] == list(NAMES)
    told = CliRunner().invoke(app, ["all", "--with", "mice", "--out", str(tmp_path / "x")])
    assert told.exit_code == 2 and GROUP in told.output
    told = CliRunner().invoke(app, ["all", "--with", "circuits,mine.py", "--out", str(tmp_path / "x")])
    assert told.exit_code == 2 and "there is no file mine.py: check the path" in told.output


@pytest.mark.backend
@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_is_complete(results: dict[str, AnalysisResult], name: str, tmp_path: Path) -> None:
    result = results[name]
    verdict = result.findings.verdict
    assert verdict.outcome in ("holds", "holds in part", "does not hold", "undecided"), verdict.reason
    assert verdict.estimate is not None and np.isfinite(verdict.estimate.value)
    for part in verdict.parts:
        assert part.sentence.endswith(".") and (part.reason or part.rule.startswith("holds when")), part.name
    assert verdict.claim.endswith(".") and verdict.control and result.findings.caption.endswith(".")
    assert len(result.findings.table) and result.figure is not None and result.figure["data"]
    again = AnalysisResult.load(result.save(tmp_path / name))
    assert again.findings.verdict.outcome == verdict.outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_numbers_do_not_depend_on_the_batch_size(results: dict[str, AnalysisResult], name: str) -> None:
    alone = run_analysis(load_analysis(name), study(rows=3), **OPTIONS.get(name, {}))
    for one, other in zip(results[name].findings.verdict.parts, alone.findings.verdict.parts, strict=True):
        assert one.outcome == other.outcome
        if one.estimate is not None and other.estimate is not None:
            assert one.estimate.value == pytest.approx(other.estimate.value, rel=1e-3, abs=1e-4)


def test_no_hook_is_left(here: Study, results: dict[str, AnalysisResult]) -> None:
    assert results and hooks_left(here.model) == []


# -- Each by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_op_by_hand(here: Study, results: dict[str, AnalysisResult]) -> None:
    """The value's norm from a cache; the cost of a value of zero over that of no sink to look at, by plain hooks."""
    model, tokens = here.model, here.batch.tokens
    _, cache = model.run_with_cache(tokens)
    norm = cache["blocks.2.attn.hook_v"].norm(dim=-1)  # [prompt pos kv_head]
    ratio = norm[:, SINK] / norm[:, 1 : LENGTH - LENGTH // 4].mean(1)
    found = functions("no_op")["heads"](here, (2,))
    assert_close(found[1][0], ratio.repeat_interleave(found[1].shape[-1] // ratio.shape[-1], -1))

    def no_value(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return act.index_fill(1, torch.tensor([SINK]), 0)

    base = losses(model, tokens, [])
    place = losses(model, tokens, [(f"blocks.{b}.attn.hook_attn_scores", unseen) for b in AFTER]) - base
    zero = losses(model, tokens, [(f"blocks.{b}.attn.hook_v", no_value) for b in AFTER]) - base
    estimate = results["no_op"].findings.verdict.part("place alone").estimate
    assert estimate is not None and estimate.value == pytest.approx(float(zero.mean() / place.mean()), rel=1e-2)


def test_implicit_bias_by_hand(here: Study, results: dict[str, AnalysisResult]) -> None:
    """Keys and values of the sink from the other prompts' mean, set by plain hooks."""
    model, tokens = here.model, here.batch.tokens
    _, cache = model.run_with_cache(tokens)

    def others(act: Tensor, hook: Any) -> Tensor:
        own = cache[hook.name][:, SINK]
        act = act.clone()
        for prompt in range(N):
            act[prompt, SINK] = own[[p for p in range(N) if p != prompt]].mean(0)
        return act

    hooks = [(f"blocks.{b}.attn.hook_{name}", others) for b in AFTER for name in "kv"]
    added = float((losses(model, tokens, hooks) - losses(model, tokens, [])).mean())
    estimate = results["implicit_bias"].findings.verdict.part("in its place").estimate
    assert estimate is not None and estimate.value == pytest.approx(added, abs=2e-6)


@pytest.mark.slow
def test_overmixing_by_hand(here: Study) -> None:
    """Two prompts that differ in a token, without the sink as a key, through the model's own scores."""
    file, position = functions("overmixing"), 5
    other = file["exchanged"](here, position)
    moved = other.batch.tokens != here.batch.tokens
    assert bool((moved.sum(-1) <= 1).all()) and bool(moved[:, position].any())
    arm = file["patches"](here, (2,), (position,))[file["WITHOUT"]]
    found = file["spread"](here, (position,), (other,), (1, 2), arm)[0, -1]
    with here.model.hooks([("blocks.2.attn.hook_attn_scores", unseen)]):
        states = [here.model.run_with_cache(s.batch.tokens)[1]["blocks.2.hook_resid_post"] for s in (here, other)]
    expected = ((states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1))[:, position + 1 :].mean(-1)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_sinks_against_autograd_on_the_hugging_face_model(backend: Any) -> None:
    """R_GS, Bloat, Compress and Change of every block, from gradients that torch keeps of the other implementation."""
    hf: Any = tiny_hf("llama")
    tokens, kept = tiny_tokens(N, LENGTH), {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple) else out
            x.retain_grad()
            kept[name] = x

        return hook

    handles = [hf.model.embed_tokens.register_forward_hook(keep("resid0"))]
    for i, layer in enumerate(hf.model.layers):
        handles.append(layer.input_layernorm.register_forward_hook(keep(f"norm{i}")))
        handles.append(layer.self_attn.register_forward_hook(keep(f"attn{i}")))
        handles.append(layer.register_forward_hook(keep(f"resid{i + 1}")))
    with torch.enable_grad():
        logits = hf(tokens).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    here = study(backend)
    file = functions("gradient_sinks")
    flow = file["gradients"](here, range(N_LAYERS), 3)
    for i in range(N_LAYERS):
        g2, g1, total = (kept[name].grad for name in (f"norm{i}", f"attn{i}", f"resid{i}"))
        norm = g2.norm(dim=-1)
        assert_close(flow["R_GS", "sink"][i], norm[:, 0] / norm[:, 1:].mean(-1), rtol=1e-3, atol=1e-4)
        change = total[:, 0].norm(dim=-1) / g1[:, 0].norm(dim=-1)
        assert_close(flow["Change", "sink"][i], change, rtol=1e-3, atol=1e-4)
        assert_close(flow["Bloat", "sink"][i], norm[:, 0] / g1[:, 0].norm(dim=-1), rtol=1e-3, atol=1e-4)
        compress = (total - g1)[:, 0].norm(dim=-1) / norm[:, 0]
        assert_close(flow["Compress", "sink"][i], compress, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_values_of_other_axes_are_refused() -> None:
    """Latent attention has its heads where positions are elsewhere: an index would pick something all the same."""
    model = tiny_model("deepseek_v3", "bridge")
    here = Study(model, from_tokens(model, tiny_tokens(N, LENGTH)), given={"layer": 1, "outlier_dims": (2, 5)})
    for name in ("gradient_sinks", "implicit_bias", "no_op"):
        verdict = run_analysis(load_analysis(name), here).findings.verdict
        assert verdict.outcome == "not measurable" and "attn.hook" in verdict.reason


@pytest.mark.slow
def test_a_gradient_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    file = functions("gradient_sinks")

    def broken(*_args: Any, **_options: Any) -> Any:
        raise sl.EngineError("there is no gradient of this")

    monkeypatch.setitem(file, "trace_run", broken)
    with pytest.raises(sl.NotApplicableError, match="no gradients"):
        file["gradients"](study(), range(N_LAYERS), 4)


@pytest.mark.slow
def test_which_token_is_put_where(here: Study, results: dict[str, AnalysisResult]) -> None:
    file, tokens = functions("position"), here.batch.tokens
    kinds = file["prompts"](here, 7)
    assert torch.equal(kinds[file["EXCHANGED"]][:, 7], tokens[:, 0])
    assert torch.equal(kinds[file["EXCHANGED"]][:, 0], tokens[:, 7])
    assert torch.equal(kinds[file["OTHER_FIRST"]][:, 1:], tokens[:, 1:])
    assert bool((kinds[file["REPEATED"]] == tokens[:, 7:8]).all())
    # A model that knows positions by rotation alone cannot tell the tokens of such a prompt apart.
    like = results["position"].findings.verdict.part("repeated").estimate
    assert like is not None and like.value == pytest.approx(1, abs=1e-4)


def test_what_is_kept_of_a_window() -> None:
    seen = functions("streaming")["seen"](6, 2, torch.tensor([[0], [1]]))
    rows = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in seen[0]] == rows
    assert seen[1, 4].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert not seen[1, 0, 1], "no key is seen before it is there"


@pytest.mark.slow
def test_streaming_against_hugging_face_with_a_mask(here: Study) -> None:
    """The same windows as a mask of four axes; and those of the eviction of the package."""
    file, tokens = functions("streaming"), here.batch.tokens
    hf: Any = tiny_hf("llama", attn_implementation="eager")
    added, note = file["losses"](here, 4, (0, 1, 2), 10, 8)
    assert not note
    for kept in (0, 1, 2):
        seen = file["seen"](LENGTH, 4, torch.arange(kept).expand(N, -1))[:, None]
        expected = []
        for mask in (torch.ones(N, 1, LENGTH, LENGTH, dtype=torch.bool).tril(), seen):
            additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            logits = hf(tokens, attention_mask=additive).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            expected.append(each[:, 8:].mean(-1))
        assert_close(added[file["KEPT"], kept].float(), (expected[1] - expected[0]).detach(), atol=1e-5, rtol=1e-3)
        hooks = sl.interventions.evict(here.model, 4, kept)
        evicted = losses(here.model, tokens, hooks, 8) - losses(here.model, tokens, [], 8)
        assert_close(added[file["KEPT"], kept].float(), evicted, atol=1e-5, rtol=1e-3)


def test_a_head_switches_by_hand() -> None:
    switches = functions("active_dormant")["switches"]
    one, other = torch.tensor([[0.9, 0.9, 0.35, 0.1]]), torch.tensor([[0.1, 0.8, 0.25, 0.2]])
    assert switches(one, other, 0.3).tolist() == [[True, False, False, False]]


def test_silenced_heads_by_hand(here: Study) -> None:
    file = functions("active_dormant")
    again = file["copied"](here).batch.tokens
    assert torch.equal(again[:, LENGTH // 2 :], here.batch.tokens[:, : LENGTH // 2])
    added = file["loss_added"](here, [[(1, 0), (2, 1), (2, 3)]])[0]
    hooks = [*sl.interventions.ablate_heads(1, (0,)), *sl.interventions.ablate_heads(2, (1, 3))]
    tokens, half = here.batch.tokens, LENGTH // 2
    expected = losses(here.model, tokens, hooks, half) - losses(here.model, tokens, [], half)
    assert_close(added.float(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_massive_activations_by_hand(here: Study, results: dict[str, AnalysisResult]) -> None:
    """Counts from a cache, and the loss with every entry beyond the data's bound at zero in the other prompts."""
    file, model = functions("massive_activations"), here.model
    count = file["counts"](here, here.sinks, 0.1, 3.0)
    _, cache = model.run_with_cache(here.batch.tokens)
    x = cache["blocks.1.hook_resid_post"].abs()
    there = (x > 0.1) & (x > 3 * x.flatten(1).quantile(0.5, dim=1)[:, None, None])
    assert_close(count[1].sum(-1), there.flatten(1).sum(-1).float())
    assert_close(count[1, :, 0], there[:, SINK].sum(-1).float())
    data, judged = here.batch.subset([0, 2]), here.batch.tokens[1::2]
    found = sl.interventions.find_massive(model, data, absolute=0.1, relative=3.0)
    hooks = sl.interventions.massive_activations(found, "zero")
    expected = float((losses(model, judged, hooks) - losses(model, judged, [])).mean())
    zero = results["massive_activations"].findings.verdict.part("zero breaks").estimate
    assert zero is not None and zero.value == pytest.approx(expected, abs=1e-5)


def test_secondary_sinks_of_hidden_states_by_hand(here: Study) -> None:
    """Position 6 points where the sink points behind blocks 1 and 2, position 9 behind 2 alone, and 3 the other way."""
    file = functions("secondary_sinks")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, N, LENGTH, 64, generator=generator)
    size = torch.tensor([500.0, 600.0])[:, None, None]
    states[1:, :, SINK] *= size / states[1:, :, SINK].norm(dim=-1, keepdim=True)
    states[1:, :, 6] = 0.1 * states[1:, :, SINK]
    states[2, :, 9] = 3 * states[2, :, SINK]
    states[1:, 0, 3] = -states[1:, 0, SINK]
    held, lifetime = file["alike_to"](here, states, here.sinks)
    assert lifetime[1].nonzero().flatten().tolist() == [6, 9]
    assert lifetime[0, [3, 6, 9]].tolist() == [2, 2, 1]
    assert held[0].sum() == 0 and held[1:, :, SINK].sum() == 0
    found = file["one_each"](held, lifetime, 2)
    assert found.positions.tolist() == [3, 6, 6, 6] and found.blocks.tolist() == [1] * N
    assert file["levels"](found) == {"(block 1, 2 blocks)": N}
    assert file["in_one_range"](here, states).sum(0)[1].nonzero().flatten().tolist() == [6, 9]


@pytest.mark.slow
def test_an_exchanged_write_by_hand(here: Study) -> None:
    """What the MLP writes at one token times a factor, by a plain hook."""
    file, model, tokens = functions("secondary_sinks"), here.model, here.batch.tokens
    positions = torch.tensor([4, 5, 6, 7])
    found = file["SecondarySinks"](torch.arange(N), positions, torch.full((N,), 1), torch.full((N,), 1))
    lost = file["lost"](here, found, 1, sl.sites.MLP_OUT, 0.25)

    def quarter(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        act = act.clone()
        act[range(N), positions] *= 0.25
        return act

    def received(hooks: list[Any]) -> tuple[Tensor, Tensor]:
        with model.hooks(hooks):
            pattern = model.run_with_cache(tokens)[1]["blocks.2.attn.hook_pattern"].mean(1)
        later = torch.ones(LENGTH, LENGTH).tril(-1)
        each = (pattern * later).sum(1) / later.sum(0)
        usual = [[k for k in range(1, LENGTH - LENGTH // 4) if k != p] for p in positions.tolist()]
        return each[range(N), positions], torch.stack([each[i, k].mean() for i, k in enumerate(usual)])

    (before, usual), (after, _) = received([]), received([("blocks.1.hook_mlp_out", quarter)])
    assert_close(lost.float(), (before - after) / (before - usual), atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_the_small_value_is_no_link_of_the_planted_sink() -> None:
    """Its key alone makes the planted sink: the value moves nothing, and the key all."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    from tests.helpers.planted import OUTLIER, SUPER, planted_model, prompts

    model = planted_model()
    batch = from_tokens(model, prompts(16))
    stage = functions("value_drain")["STAGE"]
    formation = sl.find_formation(model, batch, layer=0, super_neurons=[SUPER], outlier_dims=[OUTLIER])
    result = sl.run_chain(model, batch, target=5, stages=(stage,), formation=formation, readout_blocks=1)
    scores = result.scores.set_index(["edit", "control", "direction"]).effect
    for direction in ("denoise", "noise"):
        assert scores["transplant", "", direction] == pytest.approx(0, abs=1e-5)
        assert scores["small_norm", "", direction] == pytest.approx(0, abs=1e-5)
        assert scores["transplant", "key", direction] == pytest.approx(1, abs=1e-3)


# -- On the real model ------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_what_was_published_of_other_models_is_seen_on_smollm2(smollm2: Any) -> None:
    """Zero breaks and the mean does not; constants in the sink's place do no harm; gradients pile up on it."""
    here = Study(smollm2, sl.prompts.natural(smollm2, 6, 48))
    value: dict[str, float] = {}
    for name in ("massive_activations", "implicit_bias", "position"):
        for part in run_analysis(load_analysis(name), here).findings.verdict.parts:
            assert part.estimate is not None, part.reason
            value[part.name] = part.estimate.value
    # Intervals of so few prompts may reach over a threshold: the values do not.
    assert value["zero breaks"] > 5 and abs(value["mean does not"]) < 0.1 and value["on the sink"] == 1
    assert value["key"] > 0.99 and value["value"] > 0.95 and abs(value["in its place"]) < 0.05
    assert value["first"] == value["whichever it is"] == 1 and value["repeated"] == pytest.approx(1, abs=1e-3)
