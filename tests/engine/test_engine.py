"""The engine against the slow way, and what it must refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import edits, readouts, sites, stages
from sinklens.chain.run import _trials
from sinklens.chain.scoring import SINK
from sinklens.engine.packed import PackedJob
from sinklens.engine.packed.blocks import PackedPass
from sinklens.engine.run import run_patches
from sinklens.errors import EngineError, InputError
from sinklens.formation import find_formation
from sinklens.patches import Patch, Source
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.stages.base import Setting
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.settings import LENGTH, TARGET, N, setting_for, tokens_for
from tests.helpers.tiny import each_once, slow_but, tiny_model

MODELS = each_once(
    {
        "llama": ("llama", "auto"),  # gated, RMSNorm, rotary, grouped-query
        "llama_bridge": ("llama", "bridge"),
        "gpt2": ("gpt2", "auto"),  # plain MLP, LayerNorm, learned positions
        "gpt2_bridge": ("gpt2", "bridge"),
        "gpt_neox": ("gpt_neox", "auto"),  # parallel blocks
    }
)


QUICK = ("llama", "gpt2")


@pytest.fixture(scope="module", params=slow_but(*QUICK, of=MODELS))
def tiny(request: pytest.FixtureRequest) -> Any:
    return tiny_model(*MODELS[request.param])


@pytest.fixture(scope="module")
def anchored(tiny: Any) -> tuple[Setting, list[Patch]]:
    """The usual pair of a model, and every patch of the chain on it."""
    setting = setting_for(tiny)
    return setting, [replace(trial.patch, allow_unchanged=True) for trial in _trials(setting, stages.CHAIN, 1)[0]]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def measured(setting: Setting) -> list[Readout]:
    metric = readouts.attention_received(SINK, setting.readout_layers, setting.pair.target, setting.batch.n)
    return [metric, *(stage.readout(setting, stage) for stage in stages.CHAIN)]


def hooks_left(model: Any) -> int:
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values())


def transplant(**changes: Any) -> Patch:
    given = {
        "site": sites.Z,
        "layers": (1,),
        "positions": (TARGET,),
        "edit": edits.Transplant(),
        "source": Source("base", (2,)),
    }
    return Patch(**(given | changes))


def received(layers: tuple[int, ...] = (2, 3)) -> Readout:
    return readouts.attention_received(SINK, layers, (TARGET,), N)


KINDS = {
    "block_aggregation": tuple(MODELS),
    "amplify_variance": ("llama", "gpt2_bridge"),
    "natural": ("gpt2", "llama_bridge"),
}
PAIRS = [
    pytest.param(name, kind, marks=() if name in QUICK and kind != "amplify_variance" else pytest.mark.slow)
    for kind, names in KINDS.items()
    for name in names
    if name in MODELS
]
"""A pair of one kind on every model, of the others on two."""


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize(("tiny", "kind"), PAIRS, indirect=["tiny"])
def test_every_stage_equals_one_patch_at_a_time(tiny, kind):
    """All stages, edits, controls and directions: packed and resumed against run_with_hooks, within 1e-5."""
    setting = setting_for(tiny, kind)
    trials, _ = _trials(setting, stages.CHAIN, 1)
    wanted = measured(setting)
    patches = [replace(trial.patch, allow_unchanged=True) for trial in trials]
    result = run_patches(tiny, setting.batch, patches, wanted, runs=setting.pair.runs, max_rows=64)
    slow = OneAtATime(tiny, setting.batch.tokens, wanted, setting.pair.runs)
    for index, trial in enumerate(trials):
        prompt = (index + index // N) % N  # one a patch, in turn: what is slow here is the slow way
        for readout, expected in zip(wanted, slow(trial.patch, prompt), strict=True):
            found = float(result.values[readout.name][index, prompt])
            edit = trial.experiment
            label = (trial.stage.name, edit.edit, edit.control, trial.direction, prompt, readout.name)
            # Of what is large three times that: a ratio of small spreads rescales it, and kernels sum otherwise.
            assert found == pytest.approx(expected, abs=1e-5, rel=3e-5), label


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("max_rows", [1, 3, 7, 1000])
def test_order_and_batch_size_do_not_matter(tiny, anchored, max_rows):
    setting, every = anchored
    patches = every[:: 7 if max_rows < 10 else 1]
    wanted = measured(setting)
    expected = run_patches(tiny, setting.batch, patches, wanted, runs=setting.pair.runs, max_rows=64)
    order = list(range(len(patches)))
    random.Random(max_rows).shuffle(order)
    shuffled = [patches[i] for i in order]
    found = run_patches(tiny, setting.batch, shuffled, wanted, runs=setting.pair.runs, max_rows=max_rows)
    for name, values in found.values.items():
        torch.testing.assert_close(values, expected.values[name][order], atol=1e-5, rtol=1e-5)


@pytest.mark.backend
def test_putting_an_activation_back_changes_nothing(tiny):
    """Self-restore: the run's own readouts, up to rounding."""
    tokens = tokens_for(tiny)
    for site in (sites.Z, sites.ATTN_OUT, sites.MLP_OUT, sites.MLP_POST, sites.K, sites.V, sites.LN1_NORMALIZED):
        patch = transplant(site=site, source=Source("base"), allow_unchanged=True)
        result = run_patches(tiny, tokens, [patch], [received()], max_rows=N)
        # A few units in the last place of float32: two forward passes may round in different orders.
        torch.testing.assert_close(result.values[SINK][0], result.runs["base"][SINK], atol=1e-6, rtol=0)


def test_a_row_never_touches_another(llama):
    """The same patch gives the same numbers, but for the order of a sum, whatever the other rows of its batch do."""
    tokens = tokens_for(llama)
    quiet, loud = transplant(), transplant(edit=edits.Constant(), source=None, layers=(1, 2), positions=(1, 5, 7))
    alone = run_patches(llama, tokens, [quiet, quiet], [received()], max_rows=2 * N)
    beside = run_patches(llama, tokens, [quiet, loud], [received()], max_rows=2 * N)
    torch.testing.assert_close(alone.values[SINK][0], beside.values[SINK][0], rtol=1e-6, atol=1e-8)
    assert (beside.values[SINK][1] - beside.values[SINK][0]).abs().min() > 1e-3


def test_a_patch_leaves_its_run_s_other_prompts_and_readouts_alone(llama):
    """A readout before the first edited block is exactly the run's own; one after it moves."""
    tokens = tokens_for(llama)
    early, late = received((0, 1)), replace(received((3,)), name="late")
    result = run_patches(llama, tokens, [transplant(layers=(2,))], [early, late])
    assert torch.equal(result.values[SINK][0], result.runs["base"][SINK])
    assert not torch.equal(result.values["late"][0], result.runs["base"]["late"])


def test_logits_can_be_read(llama):
    tokens = tokens_for(llama)
    last = Readout("logit", sites.LOGITS, (llama.cfg.n_layers,), lambda act, _rows: act[:, -1, 7].float())
    patch = transplant(edit=edits.Constant(), source=None)

    def zero(z: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        z = z.clone()
        z[:, TARGET] = 0
        return z

    result = run_patches(llama, tokens, [patch], [last])
    with torch.no_grad():
        expected = llama.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])[:, -1, 7]
    torch.testing.assert_close(result.values["logit"][0].float(), expected, atol=1e-5, rtol=1e-5)


def test_an_edit_that_changes_nothing_raises(llama):
    with pytest.raises(EngineError, match="changed nothing.*hook_z"):
        run_patches(llama, tokens_for(llama), [transplant(source=Source("base"))], [received()])


@pytest.mark.backend
def test_a_hook_that_does_not_exist_raises(tiny):
    site = sites.HookSite("blocks.{layer}.attn.hook_nothing", ("batch", "pos", "d_model"))
    with pytest.raises(EngineError, match="hook_nothing"):
        run_patches(tiny, tokens_for(tiny), [transplant(site=site, source=None, edit=edits.Constant())], [received()])


@pytest.mark.backend
def test_a_hook_that_never_fires_raises(tiny):
    """hook_result exists, but is not computed unless a flag is set; HookedTransformer does not say so by itself."""
    if "blocks.1.attn.hook_result" not in tiny.hook_dict:
        pytest.skip("this backend has no such hook point")
    site = sites.HookSite("blocks.{layer}.attn.hook_result", ("batch", "pos", "head", "d_model"))
    with pytest.raises((EngineError, ValueError), match="never fired|use_attn_result"):
        run_patches(tiny, tokens_for(tiny), [transplant(site=site, source=None, edit=edits.Constant())], [received()])


def test_an_edit_cannot_read_what_comes_later(llama):
    edit = edits.DensifyRows("late", (1,), torch.ones(1, 32), torch.zeros(1, 32))
    with pytest.raises(EngineError, match="reads blocks.1.mlp.hook_post"):
        run_patches(llama, tokens_for(llama), [transplant(site=sites.ATTN_OUT, edit=edit, source=None)], [received()])


def test_an_edit_that_needs_a_source_says_so(llama):
    with pytest.raises((EngineError, ValueError), match="source"):
        run_patches(llama, tokens_for(llama), [transplant(source=None)], [received()])


def test_readouts_that_are_not_finite_raise(llama):
    patch = transplant(edit=edits.Constant("nan", {1: torch.full((4, 8), torch.nan)}), source=None)
    with pytest.raises(EngineError, match="not finite"):
        run_patches(llama, tokens_for(llama), [patch], [received()])


@pytest.mark.backend
def test_nan_weights_are_the_user_s_mistake():
    model = tiny_model("llama")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2)[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        run_patches(model, tokens_for(model), [transplant()], [received()])


class Boom(Exception):
    pass


def boom(*_: object) -> Tensor:
    raise Boom


@pytest.mark.backend
@pytest.mark.parametrize("where", ["edit", "readout"])
def test_the_model_is_clean_after_an_exception(tiny, where):
    class Broken(edits.Edit):
        __call__ = boom  # type: ignore[assignment]

    edit = Broken("broken") if where == "edit" else edits.Constant()
    readout = replace(received(), at=boom) if where == "readout" else received()
    before = hooks_left(tiny)
    with pytest.raises(Boom):
        run_patches(tiny, tokens_for(tiny), [transplant(edit=edit, source=None)], [readout])
    assert hooks_left(tiny) == before == 0


def test_batches_are_halved_when_memory_runs_out(llama, monkeypatch):
    tokens = tokens_for(llama)
    patches = [transplant(positions=(p,), source=Source("base", (0,))) for p in range(1, 8)]
    expected = run_patches(llama, tokens, patches, [received()])
    real = PackedJob.forward

    def scarce(self: PackedJob, begin: int, end: int) -> None:
        if end - begin > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, begin, end)

    monkeypatch.setattr(PackedJob, "forward", scarce)
    found = run_patches(llama, tokens, patches, [received()], max_rows=21)
    assert found.stats.n_halvings == 2
    assert found.stats.max_rows == 5
    torch.testing.assert_close(found.values[SINK], expected.values[SINK], atol=1e-6, rtol=1e-5)


def test_one_row_that_does_not_fit_is_an_error(llama, monkeypatch):
    def nothing_fits(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PackedJob, "forward", nothing_fits)
    with pytest.raises(EngineError, match="not even one prompt fits"):
        run_patches(llama, tokens_for(llama), [transplant()], [received()], max_rows=4)
    assert hooks_left(llama) == 0


def test_a_small_memory_budget_makes_small_batches(llama):
    patches = [transplant(positions=(p,), source=Source("base", (0,))) for p in range(1, 8)]
    small = run_patches(llama, tokens_for(llama), patches, [received()], memory_budget=100_000)
    large = run_patches(llama, tokens_for(llama), patches, [received()])
    assert small.stats.n_forwards > large.stats.n_forwards
    torch.testing.assert_close(small.values[SINK], large.values[SINK], atol=1e-6, rtol=1e-5)


def test_work_is_resumed_and_stopped_early(llama, monkeypatch):
    """A patch in block 2 that is read in block 2 runs block 2 alone."""
    blocks: list[tuple[int, int]] = []
    real = PackedPass._attention

    def spy(self: PackedPass, x: Tensor, layer: int, stop: int) -> Any:
        blocks.append((layer, len(x)))
        return real(self, x, layer, stop)

    monkeypatch.setattr(PackedPass, "_attention", spy)
    run_patches(llama, tokens_for(llama), [transplant(layers=(2,), site=sites.K)], [received((2,))])
    check = LENGTH + LENGTH // 2  # the first prompt, unpatched, whole and from the middle
    assert blocks == [(2, check + N * (LENGTH - TARGET))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (4,)}, "not all in 0..3"),
        ({"layers": ()}, "not all in 0..3"),
        ({"layers": (1, 1)}, "repeat"),
        ({"positions": (LENGTH,)}, "not all in 0..11"),
        ({"positions": (-1,)}, "not all in 0..11"),
        ({"positions": ((1,), (2,))}, "given for 2 prompts"),
        ({"units": (-1,)}, "not all in 0..3"),
        ({"units": (99,)}, "not all in 0..3"),
        ({"run": "other"}, "unknown run 'other'"),
        ({"source": Source("other")}, "unknown run 'other'"),
    ],
)
def test_places_that_do_not_exist_are_refused(llama, changes, message):
    with pytest.raises(InputError, match=message):
        run_patches(llama, tokens_for(llama), [transplant(**changes)], [received()])
    assert hooks_left(llama) == 0


@pytest.mark.parametrize("bad", [101, -1])
def test_tokens_beyond_the_embedding(llama, bad):
    ids = torch.randint(3, 101, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[1, 3] = bad
    batch = PromptBatch(ids, tuple(tuple(map(str, row)) for row in ids.tolist()), "mine")
    for prompts in (batch, ids, ids.int()):
        with pytest.raises(InputError, match="must lie in 0..100"):
            run_patches(llama, prompts, [], [received()])
    with pytest.raises(InputError, match="must lie in 0..100"):
        find_formation(llama, batch)
    with pytest.raises(InputError, match="not torch.float32"):
        run_patches(llama, ids.float(), [], [received()])
