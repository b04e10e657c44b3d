"""Whatever state a caller leaves process and model in: the right numbers, and everything as it was afterwards.

The right numbers are those of ``run_with_hooks``, in eval mode, with usual defaults and nothing left on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sinklens as sl
from sinklens import edits, readouts, sites
from sinklens.attribution import estimate
from sinklens.attribution.estimation import Attributor
from sinklens.engine.run import PatchResult, PatchRunner, run_patches
from sinklens.errors import InputError
from sinklens.formation import Formation, OutlierDim, SuperNeuron
from sinklens.models.families import random_model
from sinklens.models.state import foreign_hooks, foreign_part, snapshot, usual_state
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from tests.helpers.modules import Doubled, Halved
from tests.helpers.tiny import hooks_left, tiny_model, tiny_tokens

pytestmark = pytest.mark.slow

N, LENGTH, AT = 3, 12, 5
TOKENS = tiny_tokens(N, LENGTH)
RUNS = {"base": (), "other": (Patch(sites.PATTERN, (0, 1), (AT,), edits.AttendSelf(), run="other"),)}
PATCHES = [
    Patch(sites.RESID_PRE, (1,), (AT,), edits.Constant()),
    Patch(sites.Z, (2,), (AT,), edits.Transplant(), source=Source("other")),
    Patch(sites.K, (2,), (AT,), edits.Transplant(), units=(1,), source=Source("other")),
]
BOTH = pytest.mark.parametrize("backend", ["hooked", "bridge"])


def measured() -> list[Readout]:
    return [
        readouts.attention_received("received", (3,), (AT,), N),
        Readout("norm", sites.RESID_POST, (2, 3), lambda act, rows: act[:, AT].float().norm(dim=-1)),  # noqa: ARG005
    ]


def run(model: Any, **options: Any) -> PatchResult:
    return run_patches(model, TOKENS, PATCHES, measured(), runs=RUNS, **options)


def numbers(result: PatchResult) -> np.ndarray:
    runs = [result.runs[run][name].numpy()[None] for run in RUNS for name in result.values]
    return np.concatenate([*(value.numpy() for value in result.values.values()), *runs])


def estimates(model: Any) -> np.ndarray:
    found = estimate(model, TOKENS, PATCHES, measured(), runs=RUNS, qk_fix=False)
    return torch.stack(list(found.changes.values())).numpy()


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        assert get() == value
        put(before)


def default_dtype(dtype: torch.dtype) -> Any:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def precision(name: str) -> Any:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


def new_precision(name: str) -> Any:
    place = torch.backends.cuda.matmul
    if not hasattr(place, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    return setting(lambda: place.fp32_precision, lambda value: setattr(place, "fp32_precision", value), name)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "coarse products": lambda: precision("medium"),
    "tf32, in the new words": lambda: new_precision("tf32"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


@cache
def in_the_usual_state(backend: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A model, its numbers and its estimates; what a test changes in it is put back."""
    model = tiny_model("llama", backend)
    return model, numbers(run(model)), estimates(model)


@BOTH
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name: str, backend: Any) -> None:
    model, want, grads = in_the_usual_state(backend)
    assert np.abs(grads).max() > 0.01
    with SURROUNDINGS[name]():
        result = run(model)
        assert np.array_equal(numbers(result), want)
        assert np.array_equal(estimates(model), grads)
        runner = PatchRunner(model, TOKENS, measured(), runs=RUNS)
    assert np.array_equal(numbers(runner.run(PATCHES)), want)  # made inside, used outside
    assert result.stats.path == "packed"


def scores(model: Any) -> tuple[Any, Any]:
    batch = sl.prompts.random_tokens(model, 3, 16, seed=1)
    formation = Formation(1, (0,) * 3, (SuperNeuron(3, None, 0.0, 0.0, 0.0),), (OutlierDim(2, 0.0, 0.0),))
    chain = sl.run_chain(model, batch, target=5, formation=formation, min_gap=1e-4, control_draws=1)
    return batch.tokens, chain.scores.effect.to_numpy()


@pytest.fixture(scope="module")
def usual_scores(tiny_llama: Any) -> tuple[Any, Any]:
    return scores(tiny_llama)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_words_are_made_alike_in_all_surroundings(name: str, tiny_llama: Any, usual_scores: tuple[Any, Any]) -> None:
    """Prompts, a formation, a chain: what draws and what allocates."""
    tokens, want = usual_scores
    with SURROUNDINGS[name]():
        again, got = scores(tiny_llama)
    assert torch.equal(tokens, again) and np.array_equal(got, want, equal_nan=True)


def test_a_model_that_is_loaded_in_other_surroundings_is_the_same() -> None:
    want = numbers(run(tiny_model("llama")))
    for name in ("float64 by default", "bfloat16 by default", "inference mode"):
        for backend in ("hooked", "bridge"):
            with SURROUNDINGS[name]():
                model = tiny_model("llama", backend)  # pyright: ignore[reportArgumentType]
            assert np.allclose(numbers(run(model)), want, atol=1e-5), (name, backend)
            assert np.abs(estimates(model)).max() > 0.01, (name, backend)


@BOTH
def test_weights_that_were_made_in_inference_mode_pass_gradients_on(backend: Any) -> None:
    model, want = tiny_model("llama", backend), estimates(tiny_model("llama", backend))
    with torch.inference_mode():
        for module in list(model.modules()):
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.clone(), requires_grad=False)
    held = [id(p) for p in model.parameters()]
    assert any(p.is_inference() for p in model.parameters())
    assert np.allclose(estimates(model), want, atol=1e-6)
    assert [id(p) for p in model.parameters()] == held


def with_dropout(arch: str = "gpt2") -> Any:
    return sl.load_model(random_model(arch, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), backend="bridge")


def test_training_mode_is_put_aside_and_put_back() -> None:
    model = with_dropout()
    want, grads = numbers(run(model)), estimates(model)
    model.train()
    some = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    some[0].eval()
    before = [module.training for module in model.modules()]
    assert any(before) and not all(before)
    assert np.array_equal(numbers(run(model)), want) and np.array_equal(estimates(model), grads)
    batch = sl.prompts.from_tokens(model, TOKENS)
    sl.Study(model, batch).measure(measured())
    assert [module.training for module in model.modules()] == before

    def stop(act: Tensor, rows: Any) -> Tensor:  # noqa: ARG001
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_patches(model, TOKENS, PATCHES, [Readout("stop", sites.RESID_POST, (3,), stop)], runs=RUNS)
    assert [module.training for module in model.modules()] == before and not hooks_left(model)


def test_grouped_heads_are_grouped_whatever_is_left_on(tiny_llama: Any) -> None:
    model = tiny_llama
    want = numbers(run(model))
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for flag in (*flags, "ungroup_grouped_query_attention"):
        before = getattr(model.cfg, flag)
        setattr(model.cfg, flag, True)
        try:
            assert np.allclose(numbers(run(model)), want, atol=1e-5), flag
            assert np.allclose(estimates(model), estimates(tiny_model("llama")), atol=1e-5), flag
            assert getattr(model.cfg, flag) is True
        finally:
            setattr(model.cfg, flag, before)


def test_ungrouped_heads_under_somebody_s_hooks_are_refused() -> None:
    model = tiny_model("llama")
    model.set_ungroup_grouped_query_attention(True)
    with model.hooks([("blocks.1.attn.hook_k", lambda act, hook: act)]), pytest.raises(InputError, match="ungrouped"):  # noqa: ARG005
        run(model)
    assert model.cfg.ungroup_grouped_query_attention and not hooks_left(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_after_loading(dtype: torch.dtype) -> None:
    """``.half()`` leaves the config as it was; the numbers are those of a model that was loaded so."""
    model: Any = nn.Module.to(tiny_model("llama"), dtype)
    batch, name = sl.prompts.from_tokens(model, TOKENS), str(dtype).removeprefix("torch.")
    loaded = torch.float32 if dtype == torch.float64 else dtype  # what it can be loaded in
    want = numbers(run(sl.load_model(random_model("llama"), dtype=loaded, device="cpu")))
    result = run(model)
    assert result.stats.path == "packed", name
    assert np.allclose(numbers(result), want, rtol=0.05, atol=0.02)
    assert model.cfg.dtype == torch.float32 and batch.n == N


# --- Hooks and modules of the caller's ------------------------------------------------------------------------------


def bend(act: Tensor) -> Tensor:
    """Acts on the second row alone, as a clamp of what is massive in one prompt does."""
    act = act.clone()
    act[1:2] = act[1:2] + torch.sin(act[1:2].float()).to(act)
    return act


def on_output(_module: nn.Module, _args: Any, out: Any) -> Any:
    return (bend(out[0]), *out[1:]) if isinstance(out, tuple) else bend(out)


def on_input(_module: nn.Module, args: tuple) -> tuple:
    return (bend(args[0]), *args[1:]) if args and args[0].is_floating_point() else args


def on_everything(module: nn.Module, _args: Any, out: Any) -> Any:
    return bend(out) if "MLP" in type(module).__name__ and isinstance(out, Tensor) else None


PLACES: dict[str, Callable[[Any], Any]] = {
    "forward hook of an MLP": lambda m: m.blocks[2].mlp.register_forward_hook(on_output),
    "forward hook of a block": lambda m: m.blocks[1].register_forward_hook(on_output),
    "forward pre-hook of a norm": lambda m: m.blocks[2].ln1.register_forward_pre_hook(on_input),
    "forward hook of a hook point": lambda m: m.blocks[2].hook_mlp_out.register_forward_hook(on_output),
    "forward hook of all modules": lambda m: nn.modules.module.register_module_forward_hook(on_everything),  # noqa: ARG005
    "permanent hook where rows resume": lambda m: Permanent(m, "blocks.1.hook_resid_pre"),
    "permanent hook": lambda m: Permanent(m, "blocks.2.mlp.hook_post"),
}


class Permanent:
    """A TransformerLens hook that stays."""

    def __init__(self, model: Any, name: str) -> None:
        self.point = model.hook_dict[name]
        self.point.add_hook(lambda act, hook: bend(act), is_permanent=True)  # noqa: ARG005

    def remove(self) -> None:
        self.point.remove_hooks("fwd", including_permanent=True)


def one_by_one(model: Any) -> np.ndarray:
    """Every patch on all prompts with plain hooks, in the order of :func:`numbers`."""
    from sinklens.interventions import hooks_of

    cells = []
    for patch in PATCHES:
        source = patch_source(model) if patch.source else None
        cells.append(read_out(model, hooks_of(patch, source)))
    roots = [hook for root in RUNS["other"] for hook in hooks_of(root)]
    runs = [read_out(model, []), read_out(model, roots)]
    return np.concatenate([*np.moveaxis(np.array(cells), 1, 0), *(value[None] for run in runs for value in run)])


def patch_source(model: Any) -> dict[str, Tensor]:
    from sinklens.interventions import hooks_of

    held: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        held[name] = act.detach().clone()

    names = {patch.site.at(layer) for patch in PATCHES for layer in patch.layers}
    keepers = [(name, lambda act, hook, name=name: keep(act, hook, name)) for name in names]
    roots = [hook for root in RUNS["other"] for hook in hooks_of(root)]
    with torch.no_grad(), model.hooks([*roots, *keepers]):
        model(TOKENS, return_type=None)
    return held


def read_out(model: Any, hooks: list) -> np.ndarray:
    found: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, layer: int, readout: Readout) -> Any:
        def hook(act: Tensor, hook: Any) -> None:  # noqa: ARG001
            found[name, layer] = readout.reduce(act.detach().clone(), readouts.Rows(torch.arange(N), layer))

        return hook

    asked = [(r.site.at(layer), keep(r.name, layer, r)) for r in measured() for layer in r.layers]
    with torch.no_grad(), model.hooks([*hooks, *asked]):
        model(TOKENS, return_type=None)
    return np.array([r.combine(torch.stack([found[r.name, at] for at in r.layers])).numpy() for r in measured()])


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_the_caller_count_on_every_row(place: str, backend: Any) -> None:
    if backend == "bridge" and "permanent" in place:
        pytest.skip("a bridge has no permanent hooks of its own points in all versions")
    model, plain, _ = in_the_usual_state(backend)
    handle = PLACES[place](model)
    try:
        want = one_by_one(model)
        result, again = run(model), run(model, max_rows=N)
        assert result.stats.path == "model"
        assert np.allclose(numbers(result), want, rtol=1e-4, atol=1e-5)
        assert np.allclose(numbers(again), want, rtol=1e-4, atol=1e-5)
        assert not np.allclose(want, plain, rtol=1e-4, atol=1e-4)
        assert foreign_hooks(model)
    finally:
        handle.remove()
    assert np.array_equal(numbers(run(model)), plain)


def test_hooks_of_the_caller_see_fewer_prompts_only_with_a_word() -> None:
    model = tiny_model("llama")
    handle = model.blocks[2].mlp.register_forward_hook(on_output)
    with pytest.warns(UserWarning, match="hooks on the model see 2 of the 3 prompts"):
        run(model, max_rows=2)
    handle.remove()


def replace_mlp(model: Any) -> None:
    model.blocks[2].mlp = Halved(model.blocks[2].mlp)


def parametrise(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.blocks[2].mlp, "W_out", Doubled())


def other_forward(model: Any) -> None:
    mlp = model.blocks[2].mlp
    real = mlp.forward
    mlp.forward = lambda x: 0.5 * real(x)


@pytest.mark.parametrize("change", [replace_mlp, parametrise, other_forward])
def test_replaced_and_parametrised_modules_count(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    runner = PatchRunner(model, TOKENS, measured(), runs=RUNS)
    plain = numbers(runner.run(PATCHES))
    assert foreign_part(model) is None
    change(model)
    assert foreign_part(model) is not None
    want = one_by_one(model)
    for result in (run(model), runner.run(PATCHES)):
        assert result.stats.path == "model"
        assert np.allclose(numbers(result), want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(want, plain, rtol=1e-3)


# --- Two calls, two threads -----------------------------------------------------------------------------------------


def scale_data(model: Any) -> None:
    model.blocks[1].mlp.W_out.data.mul_(3)


def one_entry(model: Any) -> None:
    model.blocks[1].mlp.W_out.data[3, 5] += 2


def through_numpy(model: Any) -> None:
    model.blocks[0].attn.W_Q.detach().numpy()[...] *= 0.5


def swap_heads(model: Any) -> None:
    weight = model.blocks[0].attn.W_Q.data
    weight.copy_(weight.flip(0))


def step(model: Any) -> None:
    weight = model.blocks[2].attn.W_O
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def load_other(model: Any) -> None:
    model.load_state_dict(tiny_model("llama", "hooked", seed=7).state_dict())


def new_tensor(model: Any) -> None:
    model.blocks[1].mlp.W_in = nn.Parameter(model.blocks[1].mlp.W_in.detach() * 2)


CHANGES = (scale_data, one_entry, through_numpy, swap_heads, step, load_other, new_tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_two_calls_are_seen(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and change in (through_numpy,):
        pytest.skip("NumPy has no bfloat16")
    model = sl.load_model(random_model("llama"), dtype=dtype, device="cpu")
    runner = PatchRunner(model, TOKENS, measured(), runs=RUNS)
    tracer = Attributor(model, TOKENS, measured(), runs=RUNS, qk_fix=False)
    before = numbers(runner.run(PATCHES))
    tracer.estimate(PATCHES)
    change(model)
    assert not np.array_equal(numbers(run(model)), before)
    values = runner.run_values["base"]["norm"]
    assert np.array_equal(numbers(runner.run(PATCHES)), numbers(run(model)))
    assert torch.equal(values, run(model).runs["base"]["norm"])
    traced = torch.stack(list(tracer.estimate(PATCHES).changes.values())).numpy()
    assert np.array_equal(traced, estimates(model))


def test_nothing_is_captured_anew_while_nothing_changes(tiny_llama: Any) -> None:
    runner = PatchRunner(tiny_llama, TOKENS, measured(), runs=RUNS)
    first, second = runner.run(PATCHES), runner.run(PATCHES)
    assert second.stats.n_forwards < first.stats.n_forwards
    assert snapshot(tiny_llama) == snapshot(tiny_llama)


def test_two_threads_take_turns_on_one_model() -> None:
    models = [tiny_model("llama"), tiny_model("llama", "bridge")]
    want = [numbers(run(model)) for model in models]
    torch.set_default_dtype(torch.float64)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                if not np.array_equal(numbers(run(models[number])), want[number]):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 0, 1, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert wrong == [] and not any(hooks_left(model) for model in models)


@BOTH
def test_a_readout_that_runs_its_own_model_is_refused(backend: Any) -> None:
    model = tiny_model("llama", backend)

    def reduce(act: Tensor, rows: Any) -> Tensor:  # noqa: ARG001
        return run(model).values["norm"][0]

    with pytest.raises(InputError, match="runs the model that it is called from"):
        run_patches(model, TOKENS, PATCHES, [Readout("inner", sites.RESID_POST, (3,), reduce)], runs=RUNS)
    assert not hooks_left(model)


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, InputError])
def test_an_exception_in_an_edit_leaves_nothing_behind(error: type[BaseException], backend: Any) -> None:
    model = tiny_model("llama", backend)
    want = numbers(run(model))

    def fail(x: Tensor, source: Tensor) -> Tensor:  # noqa: ARG001
        raise error

    bad = Patch(sites.Z, (1,), (AT,), edits.Function("bad", fail), source=Source("base"))
    model.blocks[1].train()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(error):
            run_patches(model, TOKENS, [bad], measured(), runs=RUNS)
        with pytest.raises(error):
            estimate(model, TOKENS, [bad], measured(), runs=RUNS)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.blocks[1].training and not hooks_left(model)
    assert all(p.requires_grad for p in model.parameters()) or backend == "bridge"
    assert np.array_equal(numbers(run(model)), want)


def test_the_usual_state_is_left_in_the_order_of_entering(tiny_llama: Any) -> None:
    with ExitStack() as stack:
        stack.enter_context(default_dtype(torch.float64))
        stack.enter_context(torch.inference_mode())
        with usual_state(tiny_llama), usual_state(tiny_llama):
            assert torch.get_default_dtype() == torch.float32
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() and torch.get_default_dtype() == torch.float64
    assert torch.is_grad_enabled()
    with usual_state(tiny_llama, gradients=True):
        assert torch.is_grad_enabled()


def other_activation(model: Any) -> None:
    for block in model.blocks:
        block.mlp.act_fn = torch.relu


def other_scale(model: Any) -> None:
    for block in model.blocks:
        block.attn.attn_scale *= 3


def other_rotation(model: Any) -> None:
    for block in model.blocks:
        block.attn.rotary_sin.mul_(-1)


def other_scale_inside(model: Any) -> None:
    for module in model.original_model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 3


@pytest.mark.parametrize(
    ("backend", "change"),
    [
        ("hooked", other_activation),
        ("hooked", other_scale),
        ("hooked", other_rotation),
        ("bridge", other_scale_inside),
    ],
)
def test_a_runner_sees_what_is_no_parameter(backend: Any, change: Callable[[Any], None]) -> None:
    """Settings and buffers that change between two calls: runs and rows are those of a new runner."""
    model = tiny_model("llama", backend)
    runner = PatchRunner(model, TOKENS, measured(), runs=RUNS)
    before = runner.run(PATCHES)
    assert torch.equal(runner.run(PATCHES).values["norm"], before.values["norm"])
    change(model)
    after, fresh = runner.run(PATCHES), run(model)
    assert not torch.allclose(after.values["norm"], before.values["norm"], rtol=1e-3)
    for name in ("received", "norm"):
        assert torch.equal(after.values[name], fresh.values[name])
        assert torch.equal(after.runs["base"][name], fresh.runs["base"][name])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_flags_that_take_a_hook_point_take_its_stage_alone(backend: Any) -> None:
    """With split inputs of queries, keys and values nothing passes through the one normed input."""
    model = tiny_model("llama", backend)
    batch, formation = (
        sl.prompts.from_tokens(model, TOKENS),
        Formation(1, (0,) * N, tuple(SuperNeuron(i, None, 0.0, 0.0, 0.0) for i in (3, 7)), (OutlierDim(2, 0.0, 0.0),)),
    )
    options: dict[str, Any] = {"target": AT, "formation": formation, "min_gap": 1e-6, "control_draws": 1}
    plain = sl.run_chain(model, batch, **options)
    model.set_use_split_qkv_input(True)
    flagged = sl.run_chain(model, batch, **options)
    keys = ["stage", "edit", "control", "direction"]
    kept = plain.scores[plain.scores.stage != "rmsnorm_filter"].set_index(keys).effect
    assert {key.partition("/")[0] for key in flagged.config["not_applicable"]} == {"rmsnorm_filter"}
    np.testing.assert_allclose(flagged.scores.set_index(keys).effect.loc[kept.index], kept, atol=1e-4)
    assert model.cfg.use_split_qkv_input
