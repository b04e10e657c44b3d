"""Attribution patching against exact patches, finite differences and its own identities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens import edits, readouts, sites
from sinklens.attribution import Attributor, attribution_map, estimate, grad_drop
from sinklens.attribution.screening import KINDS, choose, rank_correlations
from sinklens.engine.run import run_patches
from sinklens.errors import EngineError, InputError, NotApplicableError
from sinklens.models.load import load_model
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from tests.helpers.one_at_a_time import OneAtATime, cache_of
from tests.helpers.tiny import hooks_left, on_both, slow_but, tiny_hf, tiny_model


@dataclass(frozen=True, eq=False)
class Times(edits.Edit):
    """An edit that gradients pass through."""

    factor: float = 1

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        return self.factor * x


N, LENGTH, TARGET, SINK = 3, 12, 4, "sink"
SITES = {
    "resid_pre": sites.RESID_PRE,
    "ln1_normalized": sites.LN1_NORMALIZED,
    "attn_out": sites.ATTN_OUT,
    "mlp_out": sites.MLP_OUT,
    "z": sites.Z,
    "q": sites.Q,
    "k": sites.K,
    "v": sites.V,
    "mlp_post": sites.MLP_POST,
}
RUNS = {
    "base": (),
    "anchored": (Patch(sites.PATTERN, (0, 1), (TARGET,), edits.AttendSelf(), run="anchored"),),
    "amplified": (Patch(sites.Z, (0, 1), (TARGET, 7), Times("double", 2), run="amplified"),),
}


@pytest.fixture(scope="module", params=slow_but("llama", "gpt2", of=("llama", "gpt2", "gpt_neox", "qwen3")))
def tiny(request: pytest.FixtureRequest) -> Any:
    """Grouped-query attention; learned positions and biases; parallel blocks; norms of queries and keys."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def double(tiny: Any) -> Iterator[Any]:
    """The same model in float64, for differences of nearly equal numbers."""
    tiny.double().cfg.dtype = torch.float64  # norms return this precision
    yield tiny
    tiny.float().cfg.dtype = torch.float32


def tokens_for(model: Any) -> Tensor:
    return torch.randint(3, model.cfg.d_vocab, (N, LENGTH), generator=torch.Generator().manual_seed(1))


def received(layers: tuple[int, ...] = (2, 3), name: str = SINK) -> Readout:
    return readouts.attention_received(name, layers, (TARGET,), N)


def smooth(layers: tuple[int, ...] = (2, 3)) -> Readout:
    """Attention received by the target, in the precision of the model."""
    return Readout("smooth", sites.PATTERN, layers, lambda act, _rows: act[:, :, TARGET + 1 :, TARGET].mean((1, 2)))


def transplant(site: sites.HookSite, layers: tuple[int, ...] = (1,), **options: Any) -> Patch:
    given: dict[str, Any] = {"positions": (TARGET,), "edit": edits.Transplant(), "source": Source("anchored")}
    return Patch(site=site, layers=layers, **(given | options))


def changes(model: Any, patches: Sequence[Patch], readout: Readout, **options: Any) -> Tensor:
    return estimate(model, tokens_for(model), patches, [readout], runs=RUNS, **options).changes[readout.name].cpu()


def exact(model: Any, patches: list[Patch], readout: Readout) -> Tensor:
    allowed = [replace(patch, allow_unchanged=True) for patch in patches]
    found = run_patches(model, tokens_for(model), allowed, [readout], runs=RUNS)
    own = torch.stack([found.runs[patch.run][readout.name] for patch in patches])
    return found.values[readout.name] - own


def test_a_linear_readout_of_a_linear_path_is_estimated_exactly(tiny):
    """Whatever the edit is: the residual after the last block, read by a fixed vector."""
    weight = torch.randn(LENGTH, tiny.cfg.d_model, generator=torch.Generator().manual_seed(0))
    linear = Readout("linear", sites.RESID_POST, (3,), lambda act, _rows: (act * weight).sum((1, 2)))
    mean = {3: torch.randn(tiny.cfg.d_model, generator=torch.Generator().manual_seed(2))}
    own = {3: torch.randn(N, tiny.cfg.d_model, generator=torch.Generator().manual_seed(3))}
    at = {"site": sites.RESID_POST, "layers": (3,)}
    patches = [
        transplant(**at),
        transplant(**at, positions=(2, 5, 9), source=Source("anchored", (1, 9, 4))),
        transplant(**at, positions=((1,), (4,), (6,)), source=Source("base", ((3,), (2,), (0,)))),
        transplant(**at, units=(3, 17), run="anchored", source=Source("base")),
        transplant(**at, edit=edits.Constant(), source=None, units=(5,)),
        transplant(**at, edit=edits.Constant("mean", mean), source=None, positions=(0, 11)),
        transplant(**at, edit=edits.PerPrompt("resample", own), source=None, units=(1, 2, 30)),
        transplant(site=sites.MLP_OUT, layers=(3,), source=Source("amplified")),
    ]
    expected = exact(tiny, patches, linear)
    assert (expected.abs() > 0.1).any(-1).all()
    torch.testing.assert_close(changes(tiny, patches, linear), expected, atol=1e-4, rtol=1e-5)  # of sums near 100


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("run", ["anchored", "amplified"])
def test_the_gradient_is_the_slope_of_small_steps(double, name, run):
    """A small share of the patch, run the slow way, changes the readout by that share of the estimate."""
    source = Source("anchored" if run != "anchored" else "base")
    own = {"run": run, "source": source, "positions": (TARGET, 6), "layers": (0, 2)}
    head_or_all = [transplant(SITES[name], **own), transplant(SITES[name], **own, units=(1,))]
    found = changes(double, head_or_all, smooth(), qk_fix=False)
    slow = OneAtATime(double, tokens_for(double), [smooth()], RUNS)
    step = 1e-3
    for index, patch in enumerate(head_or_all):
        for prompt in ((0, 2), (1,))[index]:
            up, down = (slow(replace(patch, edit=share(s)), prompt)[0] for s in (step, -step))
            assert float(found[index, prompt]) == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-7)
    assert found.abs().max() > 1e-5


def share(step: float) -> edits.Edit:
    return edits.Function("share", lambda x, source: x + step * (source - x))


@pytest.mark.parametrize("name", ["q", "k"])
def test_the_softmax_is_exact_with_the_fix_and_not_without(tiny, name):
    """The readout sees one block's pattern, so nothing after the softmax is approximated."""
    site, block = SITES[name], received((2,))
    own: dict[str, Any] = {"layers": (2,), "source": Source("anchored")}
    patches = [
        transplant(site, **own, positions=(7,)),
        transplant(site, **own, positions=(TARGET, 6, 9)),  # keys that share rows of the softmax
        transplant(site, **own, positions=(7,), units=(1,)),
        transplant(site, **own, positions=(TARGET, 8), units=(1, 0)),
        transplant(site, (2,), source=Source("base", (0, 1)), positions=(TARGET, 8), run="anchored"),
        transplant(site, (2,), source=None, edit=edits.Constant(), positions=(TARGET, 9)),
        transplant(site, **own, positions=((5,), (4, 6), (7, 8, 9))),
    ]
    expected = exact(tiny, patches, block)
    torch.testing.assert_close(changes(tiny, patches, block), expected, atol=1e-6, rtol=1e-5)
    plain = changes(tiny, patches, block, qk_fix=False)
    assert ((plain - expected).abs().amax(-1) > 0.01 * expected.abs().amax(-1)).all()
    assert expected.abs().max() > 0.01


def test_the_fix_sees_a_saturated_softmax(llama):
    """Attention of 1 to one key has no gradient; the fix knows what another query would look at."""
    runs = RUNS | {"saturated": (Patch(sites.Q, (2,), tuple(range(LENGTH)), Times("sharp", 20), run="saturated"),)}
    patch = transplant(sites.Q, (2,), positions=(9,), run="saturated", source=Source("base"))
    tokens, block = tokens_for(llama), received((2,))
    result = run_patches(llama, tokens, [patch], [block], runs=runs)
    expected = result.values[SINK] - result.runs["saturated"][SINK]
    fixed = estimate(llama, tokens, [patch], [block], runs=runs).changes[SINK]
    plain = estimate(llama, tokens, [patch], [block], runs=runs, qk_fix=False).changes[SINK]
    torch.testing.assert_close(fixed, expected, atol=2e-6, rtol=1e-4)
    assert plain.abs().max() < expected.abs().max() / 100


def test_a_query_whose_row_a_root_edit_overwrites_does_nothing(tiny):
    """In the anchored run the target attends to itself, whatever its query is: exactly 0, as when it is run."""
    patch = transplant(sites.Q, (1,), run="anchored", source=Source("base", (7,)))
    block = received((1, 2, 3))
    assert exact(tiny, [patch], block).abs().max() < 1e-7
    assert torch.equal(changes(tiny, [patch], block), torch.zeros(1, N, dtype=torch.float64))
    assert changes(tiny, [replace(patch, run="base", source=Source("anchored", (7,)))], block).abs().min() > 0


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("fix", [True, False])
def test_a_map_holds_every_unit_s_patch(tiny, name, fix):
    """Its entries are the estimates of single units, its sum over units that of the whole activation."""
    site, layers = SITES[name], (1, 2, 3)
    readout = received((1, 2))
    found = attribution_map(
        tiny, tokens_for(tiny), site, layers, readout, source=Source("anchored"), runs=RUNS, qk_fix=fix
    )
    places = [(i, layer, pos) for i, layer in enumerate(layers) for pos in range(0, LENGTH, 3)]
    whole = changes(tiny, [transplant(site, (layer,), positions=(p,)) for _, layer, p in places], readout, qk_fix=fix)
    single = [transplant(site, (layer,), positions=(p,), units=(1,)) for _, layer, p in places]
    each = changes(tiny, single, readout, qk_fix=fix)
    for row, (i, _, pos) in enumerate(places):
        torch.testing.assert_close(found[i, :, pos].sum(-1), whole[row], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(found[i, :, pos, 1], each[row], atol=1e-9, rtol=1e-6)
    assert torch.equal(found[2], torch.zeros_like(found[2]))  # block 3 is past what is read
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("name", SITES)
def test_no_difference_is_exactly_no_change(tiny, name):
    patches = [transplant(SITES[name], (0, 1), positions=(TARGET, 7), source=Source(run), run=run) for run in RUNS]
    assert torch.equal(changes(tiny, patches, received()), torch.zeros(len(patches), N, dtype=torch.float64))


def test_several_blocks_and_places_add(tiny):
    """First order: a patch is the sum of its parts (but keys of one patch share a softmax)."""
    for site in (sites.RESID_PRE, sites.Z, sites.Q, sites.MLP_POST):
        parts = [transplant(site, (layer,), positions=(p,)) for layer in (0, 2) for p in (TARGET, 7)]
        together = changes(tiny, [transplant(site, (0, 2), positions=(TARGET, 7))], received())
        torch.testing.assert_close(changes(tiny, parts, received()).sum(0, keepdim=True), together)


@pytest.mark.slow
def test_batches_and_order_do_not_matter(tiny):
    patches = [
        transplant(site, (layer,), positions=places, run=run, source=Source(other))
        for site in SITES.values()
        for layer in (0, 2)
        for places in ((TARGET,), (2, 9), ((1,), (5,), (3,)))
        for run, other in (("base", "anchored"), ("anchored", "base"))
    ]
    all_at_once = changes(tiny, patches, received(), max_rows=N)
    torch.testing.assert_close(changes(tiny, patches, received(), max_rows=1), all_at_once, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(changes(tiny, patches[::-1], received()).flip(0), all_at_once, atol=1e-7, rtol=1e-4)


def test_many_readouts_share_a_pass(llama):
    """Residual norm, logits and attention; a readout before the patch does not move at all."""
    norm = Readout("norm", sites.RESID_POST, (3,), lambda act, _rows: act[:, TARGET].norm(dim=-1))
    logit = Readout("logit", sites.LOGITS, (4,), lambda act, _rows: act[:, -1, 7] - act[:, -1, 9])
    wanted = [received(), norm, logit, received((0, 1), "early")]
    patches = [transplant(sites.RESID_PRE, (2,)), transplant(sites.MLP_POST, (2,), units=(3, 4))]
    together = estimate(llama, tokens_for(llama), patches, wanted, runs=RUNS)
    assert (together.n_forwards, together.n_backwards) == (2, 4)
    for readout in wanted:
        alone = changes(llama, patches, readout)
        torch.testing.assert_close(together.changes[readout.name], alone, atol=1e-6, rtol=1e-5)
        own = run_patches(llama, tokens_for(llama), [], [readout], runs=RUNS).runs["base"][readout.name]
        torch.testing.assert_close(together.runs["base"][readout.name].double(), own, atol=1e-5, rtol=1e-5)
    assert not together.changes["early"].any()
    assert all(together.changes[name].abs().min() > 0 for name in (SINK, "norm", "logit"))


def state_of(model: Any) -> tuple:
    parameters = list(model.named_parameters())
    return (
        hooks_left(model),
        [n for n, p in parameters if p.requires_grad],
        [n for n, p in parameters if p.grad is not None],
    )


def test_the_model_is_left_as_it_was(tiny):
    """Also after an exception, and where some parameters are frozen."""
    tiny.W_E.requires_grad_(False)
    before = state_of(tiny)
    assert before[1]
    assert "embed.W_E" not in before[1]
    changes(tiny, [transplant(sites.RESID_PRE)], received())
    assert state_of(tiny) == before
    flat = Readout("flat", sites.PATTERN, (2,), lambda act, _rows: (act.mean((1, 2, 3)) > 0.5).float())
    with pytest.raises(InputError, match="'flat' has no gradient"):
        changes(tiny, [transplant(sites.RESID_PRE)], flat)
    late = replace(received(), name="late", combine=lambda stack: (stack.mean(0) > 0.5).float())
    with pytest.raises(InputError, match="'late' has no gradient"):
        changes(tiny, [transplant(sites.RESID_PRE)], late)
    nowhere = sites.HookSite("blocks.{layer}.hook_nothing", ("batch", "pos", "d_model"))
    with pytest.raises(EngineError, match="hook_nothing"):
        changes(tiny, [transplant(nowhere)], received())
    assert state_of(tiny) == before
    tiny.W_E.requires_grad_(True)


def test_gradients_are_taken_where_the_caller_switched_them_off(llama):
    expected = changes(llama, [transplant(sites.Z)], received())
    with torch.no_grad():
        assert torch.equal(changes(llama, [transplant(sites.Z)], received()), expected)
    assert expected.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"positions": (LENGTH,)}, "positions"),
        ({"positions": ((1,), (2,))}, "2 prompts"),
        ({"units": (99,)}, "units"),
        ({"layers": (9,)}, "blocks"),
        ({"source": Source("nobody")}, "unknown run"),
    ],
)
def test_what_does_not_exist_is_refused(llama, options, match):
    patches = [transplant(sites.RESID_PRE), transplant(sites.RESID_PRE, **options)]
    with pytest.raises(InputError, match=match):
        changes(llama, patches, received())


@pytest.mark.slow
def test_a_bridge_gives_the_same_estimates(llama):
    """Those of queries and keys with the fix and without; a bridge's norm passes no gradient on there."""
    bridge = tiny_model("llama", "bridge")
    passed_on = [site for site in SITES.values() if site != sites.LN1_NORMALIZED]
    patches = [transplant(site, (layer,)) for site in passed_on for layer in (0, 2)]
    for fix in (True, False):
        expected = changes(llama, patches, received(), qk_fix=fix)
        torch.testing.assert_close(changes(bridge, patches, received(), qk_fix=fix), expected, atol=1e-6, rtol=1e-3)
    sizes = [
        grad_drop(model, tokens_for(llama), patches, [received()], runs=RUNS, qk_fix=False).changes[SINK]
        for model in (llama, bridge)
    ]
    torch.testing.assert_close(sizes[1], sizes[0], atol=1e-6, rtol=1e-3)
    assert not hooks_left(bridge)


MEETING = (
    *("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi", "phi3", "olmo", "llama3", "gemma", "gemma3"),
    *("falcon", "stablelm", "cohere", "granite", "smollm3", "mixtral", "qwen3_moe"),
)
"""Families whose bridges' queries and keys meet in the usual way."""
OTHERWISE = ("gemma2", "olmo2", "olmo3", "olmoe", "mpt", "bloom", "gpt_oss")
"""And those of which it is another: caps, norms over all heads, biases by position, attention to nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("family", on_both("llama", "qwen3", "gpt2", "gpt_neox", "cohere", of=MEETING))
def test_the_softmax_is_exact_on_a_bridge(family):
    """Rotations of all or some dimensions, in halves or of neighbours; norms; learned positions; biases."""
    bridge, block = tiny_model(family, "bridge"), received((2,))
    own: dict[str, Any] = {"layers": (2,), "source": Source("anchored")}
    patches = [
        patch
        for site in (sites.Q, sites.K)
        for patch in (
            transplant(site, **own, positions=(7,), units=(0,)),
            transplant(site, **own, positions=(TARGET, 6, 9)),
            transplant(site, (2,), source=Source("base", (0, 1)), positions=(TARGET, 8), run="anchored"),
            transplant(site, (2,), source=None, edit=edits.Constant(), positions=(TARGET, 9)),
        )
    ]
    expected = exact(bridge, patches, block)
    assert (expected.abs().amax(-1) > 1e-6).all()
    torch.testing.assert_close(changes(bridge, patches, block), expected, atol=2e-7, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", on_both("gemma2", "olmo2", "bloom", of=OTHERWISE))
def test_attention_of_another_kind_is_refused_with_what_can_be_done(family):
    """From a sweep, the command line and these functions; a cap also where it does nothing in the run."""
    bridge = tiny_model(family, "bridge")
    for site in (sites.Q, sites.K):
        with pytest.raises(NotApplicableError, match=r'method="exact"\); .*qk_fix=False'):
            changes(bridge, [transplant(site)], received())
        assert changes(bridge, [transplant(site)], received(), qk_fix=False).abs().max() > 0


def test_rows_know_their_prompts(llama):
    """A readout of each prompt's own position, prompts in passes of one."""
    own = Readout(
        "own", sites.RESID_POST, (3,), lambda act, rows: act[torch.arange(len(act)), rows.prompts + 5].sum(-1)
    )
    patches = [transplant(sites.RESID_POST, (3,), positions=((5,), (6,), (7,)), edit=edits.Constant(), source=None)]
    result = changes(llama, patches, own, max_rows=1)
    torch.testing.assert_close(result, exact(llama, patches, own), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_attributor_traces_a_site_once(llama):
    """The same numbers as one call each; new passes for a new site or run, and for nothing else."""
    keeper = Attributor(llama, tokens_for(llama), [received()], runs=RUNS, max_rows=2)
    for site, passes in ((sites.RESID_PRE, 4), (sites.Q, 8)):  # two runs, two passes each
        for layer in range(4):
            patches = [transplant(site, (layer,), positions=(p,)) for p in range(LENGTH)]
            found = keeper.estimate(patches)
            torch.testing.assert_close(found.changes[SINK], changes(llama, patches, received()), atol=1e-7, rtol=1e-5)
            assert (found.n_forwards, found.n_backwards) == (passes, passes // 2)
            assert found.runs["base"][SINK].shape == (N,)
    back = keeper.estimate([transplant(sites.Q, (1,), run="anchored", source=Source("base"))])
    assert back.n_forwards == 12
    assert set(back.runs) == {"anchored"}


NEURONS = [transplant(sites.MLP_POST, (1,), units=(unit,)) for unit in range(48)]


def test_the_largest_estimates_are_run_and_a_random_sample():
    """The same seed draws the same; one of the top may be drawn, and is run once."""
    estimates = torch.randn(48, N, generator=torch.Generator().manual_seed(5))
    found, again, other = (choose(estimates, 6, 10, seed) for seed in (1, 1, 2))
    assert found.top.tolist() == estimates.mean(-1).abs().argsort(descending=True)[:6].tolist()
    assert len({*found.sample.tolist()}) == 10
    assert found.sample.tolist() == again.sample.tolist() != other.sample.tolist()
    assert found.verified.tolist() == sorted({*found.top.tolist(), *found.sample.tolist()})
    kinds = [KINDS[kind] for kind in found.kinds(torch.arange(48))]
    assert {i for i, kind in enumerate(kinds) if kind == "top"} == {*found.top.tolist()}
    assert {i for i, kind in enumerate(kinds) if kind == "sample"} == {*found.sample.tolist()} - {*found.top.tolist()}
    assert found.sampled(torch.arange(48)).nonzero()[0].tolist() == found.sample.tolist()


def test_estimates_are_judged_by_rank():
    """By the formulas, of values without ties; what is reversed ranks in reverse, and its sizes as before."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=12), generator.normal(size=12)
    found = rank_correlations(x, y, seed=1)
    assert found["spearman"].value == pytest.approx(ranked(x, y))
    assert found["spearman_size"].value == pytest.approx(ranked(abs(x), abs(y)))
    concordant = np.sign(np.subtract.outer(x, x) * np.subtract.outer(y, y)).sum()
    assert found["kendall"].value == pytest.approx(concordant / (12 * 11))
    assert found["spearman"].low <= found["spearman"].value <= found["spearman"].high
    assert found["spearman"].n == 12
    assert rank_correlations(x, y, seed=1) == found
    reversed_ = rank_correlations(-x, x, seed=0)
    assert reversed_["spearman"].value == pytest.approx(-1)
    assert reversed_["spearman_size"].value == pytest.approx(1)


def ranked(x: Any, y: Any) -> float:
    """Spearman's correlation, of values without ties, by its formula."""
    squared = (x.argsort().argsort() - y.argsort().argsort()) ** 2.0
    return 1 - 6 * squared.sum() / (len(x) * (len(x) ** 2 - 1))


class Lazy(Sequence):
    """Patches that are built when they are asked for, with an edit that is new each time."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < 48:
            raise IndexError(index)
        return transplant(sites.MLP_POST, (1,), units=(index,), edit=edits.Transplant())


def test_a_lazy_grid_is_estimated_like_a_list(llama):
    torch.testing.assert_close(changes(llama, Lazy(), received()), changes(llama, NEURONS, received()))


def test_a_list_may_change_between_calls(llama):
    keeper = Attributor(llama, tokens_for(llama), [received()], runs=RUNS)
    patches = [NEURONS[3]]
    first = keeper.estimate(patches).changes[SINK]
    patches[0] = NEURONS[4]
    assert not torch.equal(keeper.estimate(patches).changes[SINK], first)


@pytest.mark.slow
def test_half_precision_gives_nearly_the_same_ranks(llama):
    """With the fix as well: a pattern in bfloat16 is recognised."""
    half = load_model(tiny_hf("llama"), device="cpu", dtype="bfloat16")
    patches = [transplant(site, (1,), positions=(p,)) for site in SITES.values() for p in (TARGET, 7, 9)]
    x, y = (changes(model, patches, received()).mean(-1).numpy() for model in (llama, half))
    assert ranked(x, y) > 0.9
    assert not np.array_equal(x, y)


def held(model: Any, block: int) -> Any:
    """Root edits that put back what a block wrote in the clean run, so that no effect goes through it."""
    found = cache_of(model, tokens_for(model), [], {s.at(block) for s in (sites.ATTN_OUT, sites.MLP_OUT)})
    return tuple(
        Patch(s, (block,), tuple(range(LENGTH)), Held("held", found[s.at(block)]), run="base")
        for s in (sites.ATTN_OUT, sites.MLP_OUT)
    )


def test_dropped_blocks_are_blocks_whose_output_is_held(tiny):
    """GradDrop against a model in which one block after another always writes the same."""
    readout = Readout("end", sites.RESID_POST, (3,), lambda act, _rows: act[:, TARGET + 2].norm(dim=-1))
    patches = [
        transplant(site, (1,), positions=(p,), edit=edits.Constant(), source=None)
        for site in (sites.RESID_PRE, sites.Z, sites.MLP_POST, sites.K)
        for p in (TARGET, TARGET + 2)
    ]
    tokens, parts = tokens_for(tiny), []
    for block in range(4):
        runs = {"base": held(tiny, block)}
        parts.append(estimate(tiny, tokens, patches, [readout], runs=runs).changes["end"].abs())
    found = grad_drop(tiny, tokens, patches, [readout])
    torch.testing.assert_close(found.changes["end"], torch.stack(parts).mean(0), atol=1e-5, rtol=1e-3)
    assert (found.n_forwards, found.n_backwards) == (1, 5)
    assert hooks_left(tiny) == []


def test_effects_that_cancel_are_seen_by_dropping_blocks(llama):
    """A change at right angles to the gradient has no first-order effect; its direct and indirect parts are not 0."""
    tokens = tokens_for(llama)
    readout = Readout("end", sites.RESID_POST, (3,), lambda act, _rows: act[:, TARGET].norm(dim=-1))
    unit = [transplant(sites.RESID_PRE, (1,), units=(i,), edit=Plus("plus", 1.0), source=None) for i in range(32)]
    slope = estimate(llama, tokens, unit, [readout]).changes["end"][:, 0]
    step = torch.zeros(32, dtype=torch.float64)
    step[0], step[1] = slope[1], -slope[0]
    patch = transplant(sites.RESID_PRE, (1,), edit=Plus("plus", step.float()), source=None)
    scale = float((step * slope).abs().sum())
    assert abs(float(estimate(llama, tokens, [patch], [readout]).changes["end"][0, 0])) < 1e-5 * scale
    assert float(grad_drop(llama, tokens, [patch], [readout]).changes["end"][0, 0]) > 1e-2 * scale


@dataclass(frozen=True, eq=False)
class Held(edits.Edit):
    """Puts a whole activation back."""

    what: Any = None

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        return self.what[at.prompts, at.positions]


@dataclass(frozen=True, eq=False)
class Plus(edits.Edit):
    """Adds something."""

    what: Any = 0

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        return x + self.what


@pytest.mark.slow
def test_somebody_s_hooks_on_gradients_are_refused(llama):
    """They would change estimates, which stand for exact effects that they do not change."""
    tokens, wanted = tokens_for(llama), [received()]
    patches = [Patch(sites.RESID_PRE, (1,), (TARGET,), edits.Constant())]
    exactly = run_patches(llama, tokens, patches, wanted).values[SINK]

    def refused() -> None:
        for estimates in (estimate, grad_drop):
            with pytest.raises(InputError, match="backward hooks"):
                estimates(llama, tokens, patches, wanted)
        assert torch.equal(run_patches(llama, tokens, patches, wanted).values[SINK], exactly)

    with llama.hooks(bwd_hooks=[("blocks.2.hook_resid_pre", lambda grad, hook: (0 * grad,))]):  # noqa: ARG005
        refused()
    everywhere = torch.nn.modules.module
    for register in (
        llama.unembed.register_full_backward_hook,
        llama.unembed.register_full_backward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            refused()
        finally:
            handle.remove()
    assert estimate(llama, tokens, patches, wanted).changes[SINK].abs().max() > 0
