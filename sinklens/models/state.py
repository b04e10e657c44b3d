"""The state of the process and of the model: numbers are computed in one, whatever a caller has left behind.

A notebook may have changed the default dtype or device, entered autocast, inference mode or TF32, left the model in
training mode or with ungrouped key heads. :func:`usual_state` puts all of that as it is in a fresh process for the
length of a call, and back as it was afterwards, also after an exception; nested calls change nothing. Two threads take
turns on one model.

What a caller *means* to have on the model counts: hooks of TransformerLens and of torch, replaced and parametrised
modules. :func:`foreign_hooks` and :func:`foreign_part` say what there is, and :func:`snapshot` whether it, or a weight,
has changed between two calls.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.replaced import is_of_libraries, replaced_code
from sinklens.models.view import Model, hook_points_kept, is_bridge, is_decoder, named_modules_of, weights_stamp
from sinklens.variants import Variant, variant_kind

P = ParamSpec("P")
R = TypeVar("R")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Modules that TransformerLens itself makes use of.
_PLAIN = (torch.nn.ModuleList, torch.nn.Identity)
# Where those come from that a decoder of ours is made of.
_OURS = "sinklens.models.decoder"
# Where more of those come from that a bridge is made of.
_IN_BRIDGES = ("torch.nn.modules.", "sinklens.models.backends")


# --- One state for all numbers ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Turn:
    """Who is at work with a model."""

    lock: threading.RLock = field(default_factory=threading.RLock)  # type: ignore[valid-type]
    """Held by the thread that is."""
    depth: int = 0
    """Calls inside one another."""
    passing: bool = False
    """Whether a forward pass with hooks is under way."""
    known: dict[Callable[[Any], Any], Any] = field(default_factory=dict)
    """What has been looked up in this call (:func:`_once_a_call`)."""


_TURNS: weakref.WeakKeyDictionary[Any, _Turn] = weakref.WeakKeyDictionary()
_GUARD = threading.RLock()


def _turn(model: object) -> _Turn:
    with _GUARD:
        return _TURNS.setdefault(model, _Turn())


@contextmanager
def usual_state(model: object = None, *, gradients: bool = False) -> Iterator[None]:
    """Inside, everything is as in a fresh process: default dtype float32 and device cpu, IEEE float32 products, no
    autocast, no inference mode; ``model`` in evaluation mode, with its key heads grouped.

    Args:
        model: what is computed with, if it is a model.
        gradients: leave it to the caller whether gradients are recorded; otherwise none are.

    Raises:
        InputError: the model's key heads are ungrouped and somebody's hooks count on that.
    """
    with ExitStack() as stack:
        if isinstance(model, torch.nn.Module):
            turn = _turn(model)
            stack.enter_context(turn.lock)
            if turn.depth == 0:
                stack.enter_context(_usual_model(model))
                stack.enter_context(hook_points_kept(model))  # type: ignore[arg-type]
            turn.depth += 1
            stack.callback(_leave, turn)
        stack.enter_context(_PROCESS.pinned())
        recorded = gradients and torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(recorded))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _leave(turn: _Turn) -> None:
    turn.depth -= 1
    if turn.depth == 0:
        turn.known.clear()


def _once_a_call(look_up: Callable[[Any], R], model: Model) -> R:
    """What ``look_up`` finds of a model, looked for once in a call, in which a model does not change."""
    turn = _turn(model)
    if turn.depth == 0:
        return look_up(model)
    if look_up not in turn.known:
        turn.known[look_up] = look_up(model)
    return turn.known[look_up]


def current_stamp(model: Model) -> Any:
    """:func:`sinklens.models.view.weights_stamp`, looked up once in a call: it walks through all modules."""
    return _once_a_call(weights_stamp, model)


def in_usual_state(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run in :func:`usual_state` of its first argument: a model, or a thing with a ``model``."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        first = args[0] if args else options.get("model")
        model = first if isinstance(first, torch.nn.Module) else getattr(first, "model", None)
        with usual_state(model):
            return function(*args, **options)

    return run


@contextmanager
def one_pass(model: object) -> Iterator[None]:
    """A forward pass with hooks of ours: there can be but one of a model.

    Raises:
        InputError: an edit, a readout or a hook has called sinklens on the model that it is called from.
    """
    turn = _turn(model)
    if turn.passing:
        raise InputError(
            "an edit, readout or hook runs the model that it is called from: compute what it needs before, and give it "
            "the numbers"
        )
    turn.passing = True
    try:
        yield
    finally:
        turn.passing = False


@contextmanager
def without_inference(model: object) -> Iterator[None]:
    """Copies in place of weights and buffers that were made in inference mode, through which no gradient is passed."""
    copies: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for module in modules_of(model):
            held: Any
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or not tensor.is_inference():
                        continue
                    if id(tensor) not in copies:
                        plain = tensor.clone()
                        frozen = isinstance(tensor, torch.nn.Parameter)
                        copies[id(tensor)] = torch.nn.Parameter(plain, requires_grad=False) if frozen else plain
                    stack.callback(held.__setitem__, name, tensor)
                    held[name] = copies[id(tensor)]
        yield


class _Process:
    """Settings of the whole process, which all threads share: the first call in pins them, the last one out restores
    them.
    """

    def __init__(self) -> None:
        self.n, self.stack = 0, ExitStack()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        with _GUARD:
            self.n += 1
            if self.n == 1:
                self._pin()
        try:
            yield
        finally:
            with _GUARD:
                self.n -= 1
                if self.n == 0:
                    self.stack.close()

    def _pin(self) -> None:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            self.stack.callback(torch.set_default_dtype, dtype)
        _pin_products(self.stack)


_PROCESS = _Process()


def _pin_products(stack: ExitStack) -> None:
    """Products of float32 in float32, not in TF32 or bfloat16; in the words (old or new) that the caller has used."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set in the new words: the old ones must not be used any more
        of_cpu: Any = torch.backends.mkldnn
        for place in (torch.backends, torch.backends.cuda.matmul, getattr(of_cpu, "matmul", None)):
            if (value := getattr(place, "fp32_precision", "ieee")) not in ("ieee", "none"):
                setattr(place, "fp32_precision", "ieee")  # noqa: B010
                stack.callback(setattr, place, "fp32_precision", value)
        return
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)


@contextmanager
def _usual_model(model: torch.nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules_of(model):
            if module.training:
                # Not .eval(), which would also change the modules below: each is put back as it was.
                module.__dict__["training"] = False
                stack.callback(module.__dict__.__setitem__, "training", True)
        cfg = getattr(model, "cfg", None)
        if cfg is not None and hasattr(cfg, "n_devices"):
            for name, value in _usual_config(model, cfg).items():
                stack.callback(setattr, cfg, name, getattr(cfg, name))
                setattr(cfg, name, value)
        yield


def _usual_config(model: torch.nn.Module, cfg: Any) -> dict[str, object]:
    """What a config should say: where the weights are, and in which dtype, since somebody may have moved or cast them
    without telling it; and key heads in groups.
    """
    usual: dict[str, object] = {}
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or is_bridge(model):  # type: ignore[arg-type]
        return usual
    if cfg.dtype != weight.dtype:
        usual["dtype"] = weight.dtype
    if cfg.n_devices == 1 and cfg.device is not None and torch.device(cfg.device).type != weight.device.type:
        usual["device"] = str(weight.device)
    if getattr(cfg, "ungroup_grouped_query_attention", False) and cfg.n_key_value_heads is not None:
        if foreign_hooks(model):  # type: ignore[arg-type]
            raise InputError(
                "the model has ungrouped key heads (set_ungroup_grouped_query_attention) and hooks that may count on "
                "them, while key heads are grouped here: take the hooks off, or group the heads"
            )
        usual["ungroup_grouped_query_attention"] = False
    return usual


# --- What somebody has on the model ----------------------------------------------------------------------------------


def modules_of(model: object) -> list[torch.nn.Module]:
    """All modules that a forward pass can come by; those that a bridge wraps, too."""
    return [module for _, module in named_modules_of(model)]  # type: ignore[arg-type]


def foreign_hooks(model: Model) -> tuple[object, ...]:
    """Somebody's hooks on the model at the moment: TransformerLens's, torch's on any module, torch's on all modules."""
    return _hooks_on(model, "fwd_hooks", _HOOKS, _is_wiring, _is_theirs)


def backward_hooks(model: Model) -> tuple[object, ...]:
    """Somebody's hooks on the gradients: TransformerLens's, torch's on any module, torch's on all modules."""
    return _hooks_on(model, "bwd_hooks", _BACKWARD_HOOKS)


def _hooks_on(
    model: Model,
    listed: str,
    kinds: Sequence[str],
    wiring: Callable[[object], bool] = lambda _: False,
    theirs: Callable[[object], bool] = lambda _: False,
) -> tuple[object, ...]:
    """Hooks of some kinds: those that hook points list, torch's on modules, torch's on all modules.

    Left out are those that TransformerLens lists as its ``wiring``, and those on modules that are ``theirs``.
    """
    found: list[object] = []
    for module in modules_of(model):
        found += [handle for handle in getattr(module, listed, ()) if not wiring(handle)]
        for kind in kinds:
            found += [hook for hook in getattr(module, kind).values() if not theirs(hook)]
    for kind in kinds:
        found += list(getattr(torch.nn.modules.module, f"_global{kind}").values())
    return tuple(found)


def _is_theirs(hook: object) -> bool:
    """Whether the libraries have put a hook there themselves (a TransformerLens hook is listed as such besides)."""
    return is_of_libraries(getattr(hook, "__module__", None))


def check_bare(model: Model, where: str, instead: str) -> None:
    """Make sure that a model's weights and config are all that its numbers follow from.

    Args:
        model: the model.
        where: what knows these alone, such as ``a folder (out)``.
        instead: what can be done where there is more.

    Raises:
        InputError: there are hooks on the model, or a part or a function of it is not as it was loaded.
    """
    if foreign_hooks(model):
        raise InputError(
            f"there are hooks on the model, and {where} knows nothing of them: call model.reset_hooks() or leave the "
            f"with of model.hooks first, or {instead}"
        )
    part = foreign_part(model)
    if part is None and (replaced := replaced_code(model)):
        part = f"another function in place of its own ({replaced[0][0]})"
    if part is not None:
        raise InputError(f"the model has {part}, and {where} knows nothing of it but its weights: {instead}")


def _is_wiring(handle: Any) -> bool:
    """Whether a hook on a hook point is one with which TransformerLens has put a bridge together."""
    return bool(getattr(handle, "is_permanent", False)) and _is_theirs(getattr(handle, "user_hook", None))


def foreign_part(model: Model) -> str | None:
    """What of a model is not as TransformerLens made it, so that its weights alone do not say what it computes: a
    module in place of another, a parametrised one, one with a forward of its own; None where there is none.

    A bridge is made of modules of Hugging Face and of torch, with forwards that TransformerLens has put on some.
    """
    bridge = is_bridge(model)
    own = is_decoder(model)
    for name, module in named_modules_of(model):
        kind = type(module)
        if getattr(module, "parametrizations", None):
            return f"a parametrised module ({name})"
        forward = vars(module).get("forward")
        if forward is not None and not (bridge and _is_theirs(forward)):
            return f"a module with another forward ({name})"
        plain = kind in _PLAIN or (own and (kind.__module__.startswith(_OURS) or _of_variant(model, name, module)))
        plain = plain or (bridge and kind.__module__.startswith(_IN_BRIDGES))
        if not is_of_libraries(kind.__module__) and not plain:
            return f"a module of another kind ({name or 'the model'}: {kind.__name__})"
    return None


def _of_variant(model: Any, name: str, module: torch.nn.Module) -> bool:
    """Whether a module of a decoder is the variant that its config names, or one of torch's inside of that."""
    if not isinstance(module, Variant):
        return ".variant." in name and type(module).__module__.startswith("torch.nn.modules.")
    return type(module) is variant_kind(model.cfg.variant) and module.options() == model.cfg.variant_options


Snapshot = tuple[Any, ...]
"""What a model's numbers follow from, to be compared with another one: by ``==``."""


def snapshot(model: Model) -> Snapshot:
    """The weights (by what an in-place change leaves behind, and by a sum that changes with any of them), the modules
    with their buffers and settings, the config, somebody's hooks, and the flags.

    It reads every weight once: a twentieth of a second for 135M parameters on one core.
    """
    assert isinstance(model, torch.nn.Module)
    return (
        *_structure(model),
        _sums([weight.detach() for weight in model.parameters()]),
        tuple(id(hook) for hook in foreign_hooks(model)),  # type: ignore[arg-type]
    )


def current_structure(model: Model) -> Snapshot:
    """Of :func:`snapshot` what costs no look at the weights: which tensors, modules, settings and flags there are.

    It is looked up once in a call.
    """
    return _once_a_call(_structure, model)


def _structure(model: torch.nn.Module) -> Snapshot:
    cfg, modules = getattr(model, "cfg", None), modules_of(model)
    return (
        weights_stamp(model),  # type: ignore[arg-type]
        tuple((id(module), type(module), id(vars(module).get("forward"))) for module in modules),
        tuple(_settings(module) for module in modules),
        tuple((name, value) for name, value in vars(cfg).items() if isinstance(value, (bool, int, float, str)))
        if cfg is not None
        else (),
    )


def _settings(module: torch.nn.Module) -> tuple[Any, ...]:
    """What a module computes with besides weights: its buffers, and its plain attributes and functions."""
    plain = [
        (name, value if isinstance(value, (bool, int, float, str)) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
        if isinstance(value, (bool, int, float, str)) or callable(value)
    ]
    held = [buffer for buffer in module._buffers.values() if buffer is not None]
    return (*plain, *((b.data_ptr(), 0 if b.is_inference() else b._version, tuple(b.shape)) for b in held))


def _sums(weights: Sequence[Tensor]) -> tuple[float, ...]:
    """A sum over each weight in which every entry has another factor, so that entries that change places count.

    ``.data.mul_(2)`` and NumPy views leave no other trace.
    """
    factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    sums = []
    for weight in weights:
        if weight.device.type == "meta" or not weight.is_floating_point() or not weight.numel():
            continue
        table = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight[None]
        key, longest = (weight.device, weight.dtype), max(table.shape)
        if key not in factors or len(factors[key]) < longest:
            factors[key] = torch.linspace(0.5, 1.5, longest, device="cpu").cos().to(weight)
        rows = table @ factors[key][: table.shape[1]]
        sums.append((rows.float() * factors[key][: table.shape[0]].float()).sum())
    together = torch.stack([value.to(sums[0].device) for value in sums]) if sums else torch.zeros(0)
    return tuple(together.tolist())
