"""Analyses of what comes after formation: dominance, the norm, the queries and keys, the effective rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens import edits, sites
from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.errors import InputError
from sinklens.formation import Formation, OutlierDim, SuperNeuron
from sinklens.models.families import D_HEAD, N_KV_HEADS
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.planted import MINUS, OUTLIER, PLUS, SMALL_PLUS, SUPER, planted_model
from tests.helpers.tiny import tiny_model, tiny_tokens

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}
FIRST = 3  # a token whose embedding some tests change


def run(name: str, study: Study, **options: Any) -> AnalysisResult:
    return run_analysis(load_analysis(name), study, **options)


def estimates(result: AnalysisResult) -> tuple[Estimate, Estimate]:
    verdict = result.findings.verdict
    assert verdict.estimate is not None and verdict.control_estimate is not None
    return verdict.estimate, verdict.control_estimate


def number(result: AnalysisResult, name: str) -> float:
    value = result.findings.numbers[name]
    return value.value if isinstance(value, Estimate) else value


def tiny_study(arch: str = "llama", **changes: Any) -> Study:
    model = tiny_model(arch)
    return Study(model, from_tokens(model, tiny_tokens(4, 24)), given=GIVEN, **changes)


def first_is_sink(model: Any, n: int = 4) -> Study:
    """Prompts that begin with one and the same token, told to be their sink."""
    tokens = tiny_tokens(n, 24)
    tokens[tokens == FIRST] = FIRST + 1
    tokens[:, 0] = FIRST
    study = Study(model, from_tokens(model, tokens))
    study.formation = Formation(1, (0,) * n, (SuperNeuron(3, None, 0, 0, 0),), (OutlierDim(5, 0, 0),))
    return study


def planted() -> Any:
    pytest.importorskip("transformer_lens.HookedTransformer")
    return planted_model()


def planted_study(model: Any, **changes: Any) -> Study:
    """Every prompt's first token is its sink: it fires neuron 0, and no later average does."""
    starts = [[PLUS, MINUS, PLUS, MINUS], [SMALL_PLUS, MINUS, PLUS, MINUS], [PLUS, MINUS, MINUS, PLUS]]
    tokens = torch.tensor([start * 4 for start in starts])
    given = {"layer": 0, "super_neurons": (SUPER,), "outlier_dims": (OUTLIER,)}
    return Study(model, from_tokens(model, tokens), given=given, **changes)


# --- dominance --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_huge_dimension_dominates_the_sink():
    model = tiny_model("llama")
    without = run("dominance", first_is_sink(model))
    with torch.no_grad():
        model.embed.W_E[FIRST, 5] = 10_000.0
    result = run("dominance", first_is_sink(model), weighted=False)
    assert (
        without.findings.verdict.parts[0].outcome == "does not hold"
        and result.findings.verdict.parts[0].outcome == "holds"
    )
    ratio, ordinary = estimates(result)
    assert ratio.value == pytest.approx(32, rel=0.05)  # nearly all in one of 32 dimensions
    assert ordinary.value == pytest.approx(estimates(without)[1].value, rel=0.2)  # the others are as they were
    assert number(result, "energy share of the k largest, sink, after the norm (k = 5)") == pytest.approx(1, abs=1e-3)
    assert number(result, "massive activations, sink, before the norm") == 1
    assert number(result, "massive activations, ordinary, before the norm") == 0


@pytest.mark.slow
def test_a_norm_s_weight_can_undo_dominance():
    """Before the norm the sink is dominated, after it no more: then the claim, which is about both, does not hold."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.embed.W_E[FIRST, 5] = 10_000.0
        for block in model.blocks:
            block.ln1.w[5] = 0.0
    study = first_is_sink(model)
    plain, weighted = run("dominance", study, weighted=False), run("dominance", study)
    before = "dominance ratio of the sink over an ordinary position's, before the norm"
    assert number(plain, before) == number(weighted, before) > 5
    assert (
        plain.findings.verdict.parts[0].outcome == "holds"
        and weighted.findings.verdict.parts[0].outcome == "does not hold"
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_dominance_against_numpy(arch):
    study = tiny_study(arch)
    table = run("dominance", study).findings.table
    _, cache = study.model.run_with_cache(study.batch.tokens)
    ratios = (
        table[table.quantity == "dominance ratio"].set_index(["norm", "token", "layer", "prompt"])["value"].to_dict()
    )
    for layer in range(4):
        pre = cache["resid_pre", layer].detach().numpy()
        normalised = cache[f"blocks.{layer}.ln1.hook_normalized"] * study.weights(layer).ln1_w
        for stage, x in {"before": pre, "after": normalised.detach().numpy()}.items():
            expected = np.abs(x).max(-1) / np.abs(x).mean(-1)
            for prompt, (sink, ordinary) in enumerate(zip(study.sinks, study.ordinary.numpy(), strict=True)):
                assert ratios[stage, "sink", layer, prompt] == pytest.approx(expected[prompt, sink], rel=1e-4)
                mean = expected[prompt][ordinary].mean()
                assert ratios[stage, "ordinary", layer, prompt] == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
def test_rmsnorm_alone_leaves_the_ratio_as_it_was_and_centring_does_not():
    rms, layer_norm = (run("dominance", tiny_study(arch), weighted=False).findings.table for arch in ("llama", "gpt2"))
    for table, same in ((rms, True), (layer_norm, False)):
        ratio = table[table.quantity == "dominance ratio"].pivot_table("value", ["token", "layer", "prompt"], "norm")
        assert np.allclose(ratio["before"], ratio["after"], rtol=1e-4) == same
    with pytest.raises(InputError, match="k=32"):
        run("dominance", tiny_study(), k=32)


# --- rmsnorm_filter ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_planted_sink_is_a_constant_and_its_outlier_is_all_that_attention_needs():
    result = run("rmsnorm_filter", planted_study(planted()))
    share, control = estimates(result)
    assert share.value == pytest.approx(1, abs=1e-4)
    # Without the outlier the key is zero, as all keys are: attention is uniform, 1 / (i + 1) of each later query.
    uniform = np.mean([1 / (i + 1) for i in range(1, 16)])
    assert control.value == pytest.approx(uniform, rel=1e-4)
    assert number(result, "share of the attention left: nothing") == pytest.approx(uniform, rel=1e-4)
    assert number(result, "share of the attention left: ordinary input") == pytest.approx(uniform, rel=1e-4)
    assert number(result, "share of the attention left: all but outliers") == pytest.approx(uniform, rel=1e-4)
    assert number(result, "share of the attention left: outliers, key alone") == pytest.approx(1, abs=1e-4)
    assert number(result, "cosine between the normalised inputs of different prompts' sinks") > 0.999
    assert number(result, "the outlier dimensions' share of the energy") > 0.999
    assert result.findings.verdict.parts[0].outcome == "holds"


@pytest.mark.slow
def test_a_sink_by_what_it_lacks_needs_no_outlier():
    """The key reads the constant, and repels: the sink has least of it, because its norm divides it away."""
    model = planted()
    with torch.no_grad():
        model.blocks[1].attn.W_K.zero_()
        model.blocks[1].attn.W_K[0, 3, 0] = -8.0
    result = run("rmsnorm_filter", planted_study(model))
    share, control = estimates(result)
    assert share.value == pytest.approx(1, abs=1e-3)
    assert number(result, "share of the attention left: nothing") == pytest.approx(1, abs=1e-3)
    assert number(result, "share of the attention left: ordinary input") < 0.5
    assert control.value > 0.5 and result.findings.verdict.parts[0].outcome == "does not hold"


@pytest.mark.slow
def test_sinks_that_differ_between_prompts_are_no_constant():
    """The outlier's sign follows the token: half of the pairs are opposite."""
    study = planted_study(planted())
    model: Any = study.model
    with torch.no_grad():
        model.blocks[0].mlp.W_out[SUPER, 5] = 100.0
        model.embed.W_E[SMALL_PLUS, 6] = 1.0
        model.blocks[0].mlp.W_in[6, SUPER] = -40.0  # a negative linear branch for this token alone
    study.formation = Formation(0, (0, 0, 0), (SuperNeuron(SUPER, None, 0, 0, 0),), (OutlierDim(OUTLIER, 0, 0),))
    result = run("rmsnorm_filter", study)
    # Pairs that differ up to the sink are those with the second prompt, whose outlier has the other sign.
    cosine = number(result, "cosine between the normalised inputs of different prompts' sinks")
    assert cosine == pytest.approx(-1, abs=0.01)
    assert result.findings.verdict.part("nearly constant").outcome == "does not hold"


def test_the_same_first_token_says_nothing_of_constancy():
    result = run("rmsnorm_filter", first_is_sink(tiny_model("llama")))
    assert (
        result.findings.verdict.outcome == "not measurable"
        and "same up to their sink" in result.findings.verdict.reason
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "olmo"])
def test_what_is_kept_against_a_hook_of_one_s_own(arch):
    study = tiny_study(arch)
    table = run("rmsnorm_filter", study, draws=1, blocks=1).findings.table
    sinks, n = study.sinks, torch.arange(study.batch.n)

    def received(pattern: torch.Tensor) -> np.ndarray:
        means = [pattern[i, :, sink + 1 :, sink].mean() for i, sink in enumerate(sinks.tolist())]
        return torch.stack(means).detach().numpy()

    seen: dict[str, torch.Tensor] = {}

    def keep(x: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        x = x.clone()
        old = x[n, sinks]
        new = torch.zeros_like(old)
        new[:, [2, 5]] = old[:, [2, 5]]
        x[n, sinks] = new * (old.norm(dim=-1) / new.norm(dim=-1))[:, None]
        return x

    def look(pattern: torch.Tensor, hook: object) -> None:  # noqa: ARG001
        seen["pattern"] = pattern

    patterns = []
    for hooks in ([], [("blocks.2.ln1.hook_normalized", keep)]):
        study.model.run_with_hooks(study.batch.tokens, fwd_hooks=[*hooks, ("blocks.2.attn.hook_pattern", look)])
        patterns.append(received(seen["pattern"]))
    mine = table[(table.quantity == "share of the attention left") & (table.kept == "outlier dimensions")]
    assert mine["value"].tolist() == pytest.approx(patterns[1] / patterns[0], rel=1e-3)


@pytest.mark.slow
def test_a_norm_without_a_weight_can_be_edited():
    """OLMo's on a bridge: what is put back as it was leaves everything as it was, and double of it does not."""
    study = tiny_study("olmo")
    clean = study.activations(sites.RESID_POST, [3])[3]
    for factor, same in ((1.0, True), (2.0, False)):
        edit = edits.Rescale("scaled", {2: torch.zeros(32)}, {2: torch.tensor(factor)})
        patch = Patch(sites.LN1_NORMALIZED, (2,), tuple(range(24)), edit, allow_unchanged=True)
        assert torch.allclose(clean, study.activations(sites.RESID_POST, [3], [patch])[3], atol=1e-3) == same


# --- qk_locking -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_planted_key_lies_on_the_queries():
    result = run("qk_locking", planted_study(planted()))
    aligned, control = estimates(result)
    assert aligned.value == pytest.approx(1, abs=1e-5) and control.value == 0  # an ordinary key is the zero vector
    assert number(result, "positive share of the sink's scores in these heads") == 1
    assert number(result, "positive share of an ordinary key's scores in these heads") == 0
    assert result.findings.verdict.parts[0].outcome == "holds"


@pytest.mark.slow
def test_a_key_that_is_opposite_or_across_is_not_aligned():
    for entry, expected in (((0, OUTLIER, 0), -1.0), ((0, OUTLIER, 1), 0.0)):
        model = planted()
        with torch.no_grad():
            model.blocks[1].attn.W_K.zero_()
            model.blocks[1].attn.W_K[entry] = -8.0
        study = planted_study(model)
        study.formation = Formation(0, (0, 0, 0), (SuperNeuron(SUPER, None, 0, 0, 0),), (OutlierDim(OUTLIER, 0, 0),))
        result = run("qk_locking", study)
        assert estimates(result)[0].value == pytest.approx(expected, abs=1e-5)
        assert result.findings.verdict.parts[0].outcome == "does not hold"
        unsigned = run("qk_locking", study, sign="absolute")
        assert estimates(unsigned)[0].value == pytest.approx(abs(expected), abs=1e-5)
        # Aligned but for the sign is aligned; its scores are negative all the same.
        aligned, positive = (unsigned.findings.verdict.part(name).outcome for name in ("all blocks", "positive scores"))
        assert (aligned, positive) == (("holds", "does not hold") if expected else ("does not hold", "not measurable"))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["head", "group"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("arch", "rope"),
    [
        ("llama", "before"),
        pytest.param("llama", "after", marks=pytest.mark.slow),
        pytest.param("gpt2", "before", marks=pytest.mark.slow),
    ],
)
def test_alignment_against_numpy(arch, rope, pool, centred):
    study = tiny_study(arch)
    table = run("qk_locking", study, pool=pool, rope=rope, centred=centred, blocks=1).findings.table
    found = table[table.token == "sink"].set_index(["quantity", "prompt", "head"])["value"].to_dict()
    names = ("hook_q", "hook_k") if rope == "before" else ("hook_rot_q", "hook_rot_k")
    _, cache = study.model.run_with_cache(study.batch.tokens)
    q, k = (cache[f"blocks.2.attn.{name}"].detach().double().numpy() for name in names)
    assert k.shape[2] == (N_KV_HEADS if arch == "llama" else q.shape[2])
    per_key = q.shape[2] // k.shape[2]
    later = [q[i, sink + 1 :] for i, sink in enumerate(study.sinks.tolist())]
    for head in range(q.shape[2]):
        mine = head // per_key
        pooled = [head] if pool == "head" else list(range(mine * per_key, (mine + 1) * per_key))
        queries = np.concatenate([x[:, pooled].reshape(-1, D_HEAD) for x in later])
        direction = np.linalg.svd(queries - queries.mean(0) * centred)[2][0]
        direction *= np.sign(direction @ queries.mean(0))
        for prompt, sink in enumerate(study.sinks.tolist()):
            key = k[prompt, sink, mine]
            cosine = key @ direction / np.linalg.norm(key)
            assert found["alignment", prompt, head] == pytest.approx(cosine, abs=1e-4)
            share = (later[prompt][:, head] @ key > 0).mean()
            assert found["positive share", prompt, head] == pytest.approx(share, abs=1e-6)
            attention = cache["blocks.2.attn.hook_pattern"][prompt, head, sink + 1 :, sink].mean()
            assert found["attention received", prompt, head] == pytest.approx(float(attention), abs=1e-5)


def test_rotated_queries_need_a_rotary_embedding():
    verdict = run("qk_locking", tiny_study("gpt2"), rope="after").findings.verdict
    assert verdict.outcome == "not measurable" and "rotary" in verdict.reason


# --- effective_rank ---------------------------------------------------------------------------------------------


def of_full_rank() -> Any:
    """The planted model, with something of its own at every position after the first, where nothing else is."""
    model = planted()
    with torch.no_grad():
        model.pos_embed.W_pos[1:, 5:] = 2 * torch.randn(63, 3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.slow
def test_the_planted_collapse_is_the_sink_s_alone():
    result = run("effective_rank", planted_study(of_full_rank()))
    ratio, without = estimates(result)
    assert result.findings.verdict.parts[0].outcome == "holds"
    assert number(result, "effective rank leaving the formation block, all tokens") == pytest.approx(1, abs=0.1)
    assert ratio.value < 0.5 < 0.9 < without.value
    assert "the sink token's norm alone" in result.findings.verdict.control


@pytest.mark.slow
def test_without_an_outlier_nothing_collapses():
    model = of_full_rank()
    study = planted_study(model)
    sinks = study.formation
    with torch.no_grad():
        model.blocks[0].mlp.W_out[SUPER] = 0
    silent = planted_study(model)
    silent.formation = sinks
    result = run("effective_rank", silent)
    assert result.findings.verdict.parts[0].outcome == "does not hold"
    assert estimates(result)[0].value == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_a_collapse_of_all_tokens_is_told_apart():
    """Block 1 of the tiny model writes one direction, with a size of its own, into every token."""
    study = tiny_study()
    model: Any = study.model
    with torch.no_grad():
        W_out = model.blocks[1].mlp.W_out
        W_out.copy_(1000 * torch.outer(torch.ones(len(W_out)), W_out[0] / W_out[0].norm()))
    result = run("effective_rank", study)
    assert result.findings.verdict.parts[0].outcome == "holds"
    assert "the other tokens collapse as well" in result.findings.verdict.control


@pytest.mark.slow
def test_ranks_against_numpy():
    study = tiny_study()
    table = run("effective_rank", study, lengths=(9, 24)).findings.table
    found = table.set_index(["layer", "prompt", "length", "tokens"])["effective_rank"].to_dict()
    _, cache = study.model.run_with_cache(study.batch.tokens)
    depths = [cache["resid_pre", layer] for layer in range(4)] + [cache["resid_post", 3]]

    def rank(x: np.ndarray) -> float:
        share = np.linalg.svd(x, compute_uv=False)
        share = share / share.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    for depth, stack in enumerate(depths):
        for prompt, sink in enumerate(study.sinks.tolist()):
            x = stack[prompt].detach().double().numpy()
            for length in (9, 24):
                assert found[depth, prompt, length, "all tokens"] == pytest.approx(rank(x[:length]), rel=1e-4)
                rest = np.delete(x, sink, 0)[: length - 1]
                assert found[depth, prompt, length, "without the sink token"] == pytest.approx(rank(rest), rel=1e-4)


# --- all ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dominance", {"weighted": False, "k": 2, "blocks": 1}),
        ("rmsnorm_filter", {"draws": 2, "blocks": 1}),
        ("qk_locking", {"rope": "after", "pool": "group", "centred": True, "sign": "absolute"}),
        ("effective_rank", {"lengths": (7, 24)}),
    ],
)
def test_the_batch_size_is_of_no_account(name, options):
    one, all_at_once = run(name, tiny_study(memory_budget=1), **options), run(name, tiny_study(), **options)
    assert tiny_study(memory_budget=1).max_rows == 1 < tiny_study().max_rows
    a, b = one.findings.table, all_at_once.findings.table
    for column in a.columns:
        if a[column].dtype.kind == "f":
            assert a[column].to_numpy() == pytest.approx(b[column].to_numpy(), rel=1e-4, abs=1e-5)
        else:
            assert a[column].tolist() == b[column].tolist()
    assert one.findings.verdict.outcome == all_at_once.findings.verdict.outcome
