"""One view of a model, whether it is a `HookedTransformer` or a `TransformerBridge`.

The two answer to the same hook names, but differ in what they call their parts, in which weights are there, and in
whether a forward pass can start in the middle. Everything above this room knows a model as the protocol `Model`, which
has only what is called on it, and asks here for the rest. The model's own attributes are looked at in this file alone,
and in `sinklens.models.hooked`, which takes a HookedTransformer apart for passes of our own. (The other files of this
room build models and set such attributes, compare two forms of a model part by part, or look inside Hugging Face's.)

Pitfalls that this module exists for, all checked by running:
- a bridge of TransformerLens 3.9 silently ignores an unknown hook name: `check_hook_name` raises instead;
- `stop_at_layer=n_layers` gives the residual on a HookedTransformer and the logits on a bridge: `forward` gives the
  residual;
- Gemma stores its norm weight as an offset from one: `block_weights` gives the multiplier that is applied.
"""

from __future__ import annotations

import difflib
import functools
import json
import numbers
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.errors import EngineError, InputError, NotApplicableError
from sinklens.records.fingerprint import fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Model(Protocol):
    """A HookedTransformer or a TransformerBridge: what is called on a model itself.

    A protocol, because neither class can be named here: importing them costs seconds, and the first is gone from
    TransformerLens 4. Hooks are pairs ``(name of a hook point, function of (tensor, hook))``.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A forward pass: logits ``[batch pos d_vocab]`` of tokens ``[batch pos]``."""
        ...

    def hooks(self, fwd_hooks: list[Any] = ...) -> AbstractContextManager[Any]:
        """Hooks that are on the model inside a ``with``."""
        ...

    def run_with_hooks(self, x: Tensor, /, *, fwd_hooks: list[Any] = ..., **options: Any) -> Any:
        """One forward pass with hooks."""
        ...

    def run_with_cache(self, x: Tensor, /, **options: Any) -> tuple[Any, Any]:
        """One forward pass: what it returns, and its activations by the names of their hook points."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """The sizes and the plan of a model, the same for both backends."""

    n_layers: int
    """Number of transformer blocks."""
    n_heads: int
    """Query heads per block."""
    n_kv_heads: int
    """Key and value heads per block; fewer than `n_heads` under grouped-query attention."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of one attention head."""
    d_mlp: int
    """Neurons per MLP; 0 where no block has a dense one (mixtures of experts, models of attention alone)."""
    d_vocab: int
    """Number of tokens in the embedding."""
    n_ctx: int
    """Longest sequence the model was built for."""
    gated: bool
    """Whether the MLP has a gate (SwiGLU and its kin)."""
    norm: Literal["rms", "layer"]
    """RMSNorm or LayerNorm."""
    norm_eps: float
    """The small constant that the norms add before the square root."""
    parallel: bool
    """Whether attention and MLP read the same residual and are added together."""
    rotary: bool
    """Whether positions enter through rotary embeddings."""


class BlockWeights:
    """The weights of one block that the chain reads; views of the model's own where it allows that.

    Every one is looked up when it is asked for, and one that the block does not have is a NotApplicableError: blocks
    with a mixture of experts have no W_out, those that norm what their sublayers write have no norm in front.
    """

    def __init__(self, model: Model, layer: int) -> None:
        self._model, self._layer = model, layer
        self._block = _inside(model).blocks[layer]

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """Gate projection; None in an MLP without a gate."""
        return getattr(self._mlp, "W_gate", None)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Up projection (the linear branch, where there is a gate)."""
        return self._mlp.W_in

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Down projection."""
        return self._mlp.W_out

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Attention output projection, by query head."""
        return self._block.attn.W_O

    @property
    def ln1_w(self) -> Float[Tensor, " d_model"]:
        """Multiplier that the norm before attention applies."""
        return _norm_multiplier(self._model, self._norm("ln1"))

    @property
    def ln2_w(self) -> Float[Tensor, " d_model"]:
        """Multiplier that the norm before the MLP applies; that of `ln1` where a parallel block has one for both."""
        return _norm_multiplier(self._model, self._norm("ln2" if hasattr(self._block, "ln2") else "ln1"))

    @property
    def _mlp(self) -> Any:
        mlp = getattr(self._block, "mlp", None)
        if not has_dense_mlp(self._model, self._layer):
            what = "no MLP" if mlp is None else "no dense MLP (it may be a mixture of experts)"
            raise NotApplicableError(f"{model_id(self._model)} has {what} in block {self._layer}")
        return mlp

    def _norm(self, name: str) -> Any:
        norm = getattr(self._block, name, None)
        if norm is None:
            raise NotApplicableError(f"{model_id(self._model)} has no {name} in block {self._layer}")
        return norm


# --- Which model it is, and what it can do ---------------------------------------------------------------------------


def is_bridge(model: Model) -> bool:
    """Whether `model` is a TransformerBridge (as opposed to a HookedTransformer)."""
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def is_decoder(model: Model) -> bool:
    """Whether `model` is a decoder that was trained with a variant of attention (`sinklens.models.decoder`)."""
    from sinklens.models.decoder import Decoder

    return isinstance(model, Decoder)


def backend_name(model: Model) -> Literal["HookedTransformer", "TransformerBridge", "Decoder"]:
    """Which of TransformerLens's two kinds of model it is, or the decoder of the pre-training lab."""
    return "TransformerBridge" if is_bridge(model) else "Decoder" if is_decoder(model) else "HookedTransformer"


def can_resume(model: Model) -> bool:
    """Whether `forward` can start from a cached residual without running the blocks before it (no bridge can)."""
    return not is_bridge(model)


def model_id(model: Model) -> str:
    """The model's name for people: what `load_model` was asked for, else the name in the model's own config."""
    return str(_inside(model).cfg.model_name)


def _inside(model: Model) -> Any:
    """The model without its protocol: here begins what is different from one backend to the other."""
    return model


# --- Sizes and weights -----------------------------------------------------------------------------------------------


def model_shape(model: Model) -> ModelShape:
    """The sizes and the plan of `model`."""
    cfg, blocks = _inside(model).cfg, _inside(model).blocks
    n_heads, d_head, d_model = _attention_sizes(model)
    dense = next((blocks[layer].mlp for layer in range(len(blocks)) if has_dense_mlp(model, layer)), None)
    return ModelShape(
        n_layers=len(blocks),
        n_heads=n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_model=d_model,
        d_head=d_head,
        # Read from the weight: a bridge's cfg.d_mlp is a guess for some architectures (OPT).
        d_mlp=0 if dense is None else dense.W_in.shape[1],
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        gated=getattr(dense, "W_gate", None) is not None,
        norm="rms" if str(cfg.normalization_type).startswith("RMS") else "layer",
        norm_eps=float(cfg.eps),
        parallel=_is_parallel(model),
        rotary=cfg.positional_embedding_type == "rotary",
    )


def _attention_sizes(model: Model) -> tuple[int, int, int]:
    """Query heads, their width, and that of the residual stream."""
    cfg = _inside(model).cfg
    try:
        n_heads, d_head, d_model = _inside(model).blocks[0].attn.W_O.shape  # a bridge's cfg is a guess for some
    except (AttributeError, ValueError, RuntimeError):  # latent attention, whose values have a width of their own
        return cfg.n_heads, cfg.d_head, cfg.d_model
    return n_heads, d_head, d_model


def has_dense_mlp(model: Model, layer: int) -> bool:
    """Whether block ``layer`` has one MLP for all tokens: no mixture of experts, and not attention alone."""
    W_in = getattr(getattr(_inside(model).blocks[layer], "mlp", None), "W_in", None)
    return isinstance(W_in, Tensor) and W_in.ndim == 2


def _is_parallel(model: Model) -> bool:
    if is_bridge(model):
        # The block's class decides what is computed; cfg.parallel_attn_mlp is only the architecture's default.
        return "Parallel" in type(_inside(model).blocks[0]).__name__
    return bool(_inside(model).cfg.parallel_attn_mlp)


def _norm_multiplier(model: Model, norm: Any) -> Float[Tensor, " d_model"]:
    weight = getattr(norm, "w", None) if not is_bridge(model) else getattr(norm.original_component, "weight", None)
    if weight is None:  # a norm without a scale (OLMo, or a folded one) multiplies by one
        some = _inside(model).blocks[0].attn.W_O
        return torch.ones(some.shape[2], dtype=some.dtype, device=some.device)
    # A HookedTransformer adds Gemma's one when it converts the weights; a bridge keeps the stored offset.
    return weight + 1 if is_bridge(model) and getattr(_inside(model).cfg, "rmsnorm_uses_offset", False) else weight


# --- Hook points -----------------------------------------------------------------------------------------------------


_POINTS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""The hook points of models that a call is at work with, by name, once they have been asked for."""


def _hook_points(model: Model) -> Mapping[str, Any]:
    """The hook points by their names and aliases.

    A bridge makes the table anew whenever it is asked for it, in time that grows with the square of the blocks.
    """
    if (kept := _POINTS.get(model)) is None:
        return _inside(model).hook_dict
    if not kept:
        kept.update(_inside(model).hook_dict)
    return kept


def _has_hook_points(model: Any) -> bool:
    """Whether it has any, without making a bridge's table of them."""
    return "hook_dict" in vars(model) or hasattr(type(model), "hook_dict")


@contextmanager
def hook_points_kept(model: Model) -> Iterator[None]:
    """Inside, the names of the model's hook points are looked up once: for a call, in which it does not change."""
    _POINTS[model] = {}
    try:
        yield
    finally:
        _POINTS.pop(model, None)


def has_hook(model: Model, name: str) -> bool:
    """Whether `name` is a hook point of `model`, under its own name or an alias."""
    return name in _hook_points(model)


def check_hook_name(model: Model, name: str) -> None:
    """Make sure that `name` is a hook point of `model`.

    Raises:
        EngineError: it is not; the message names the closest ones that are.
    """
    if has_hook(model, name):
        return
    close = difflib.get_close_matches(name, _hook_points(model), n=3)
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
    raise EngineError(f"{model_id(model)} has no hook point {name!r}{hint}")


@contextmanager
def hooked(model: Model, hooks: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Hooks on hook points inside a ``with``, as by ``model.hooks(fwd_hooks=...)``.

    That of a bridge makes its table of hook points anew, in TransformerLens 3.9 for each of the hooks.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        hooks: names of hook points, and the function ``(activation, hook)`` there.

    Raises:
        EngineError: a name is no hook point of a bridge.
        ValueError: a setting of a bridge keeps a hook point from being computed.
    """
    inside = _inside(model)
    if not is_bridge(model) or inside.compatibility_mode:  # there a hook is called under several names
        with model.hooks(fwd_hooks=list(hooks)):
            yield
        return
    added: list[tuple[Any, Any]] = []
    inside.context_level += 1
    try:
        for name, function in hooks:
            check_hook_name(model, name)
            point = _hook_points(model)[name]
            if (switch := inside._gated_hook_reason(point.name or name)) is not None:
                raise ValueError(f"{model_id(model)} does not compute {name}: call set_{switch}(True) first")
            point.add_hook(function, level=inside.context_level)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [one for one in point.fwd_hooks if one is not handle]
        inside.context_level -= 1


@contextmanager
def without_hooks(model: Model) -> Iterator[None]:
    """The hooks that somebody has on the hook points taken off inside a ``with``, and put back behind it."""
    points = [point for point in set(_hook_points(model).values()) if point._forward_hooks]
    held = [(point, point._forward_hooks) for point in points]
    for point in points:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in held:
            point._forward_hooks = hooks


# --- Running it ------------------------------------------------------------------------------------------------------


@overload
def forward(
    model: Model, x: Tensor, *, start_at: int = 0, stop_at: int, return_type: Literal["logits"] | None = None
) -> Tensor: ...
@overload
def forward(
    model: Model, x: Tensor, *, start_at: int = 0, stop_at: None = None, return_type: Literal["logits"]
) -> Tensor: ...
@overload
def forward(model: Model, x: Tensor, *, start_at: int = 0, stop_at: None = None, return_type: None = None) -> None: ...
@overload
def forward(
    model: Model,
    x: Tensor,
    *,
    start_at: int = 0,
    stop_at: int | None = None,
    return_type: Literal["logits"] | None = None,
) -> Tensor | None: ...
def forward(
    model: Model,
    x: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    *,
    start_at: int = 0,
    stop_at: int | None = None,
    return_type: Literal["logits"] | None = None,
) -> Tensor | None:
    """Run part of the model: blocks `start_at` up to, not including, `stop_at`.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        x: tokens [batch pos]; or the residual [batch pos d_model] that enters block `start_at`.
        start_at: first block to run.
        stop_at: block to stop in front of; None runs to the end.
        return_type: what to return when the pass runs to the end: the logits, or nothing (which skips the unembedding).

    Returns:
        The residual [batch pos d_model] in front of block `stop_at`; without `stop_at`, the logits [batch pos d_vocab]
        or None.

    Raises:
        EngineError: `x` does not fit `start_at`, the block range is empty or outside the model, or a bridge was given a
            residual.
    """
    n_layers = len(_inside(model).blocks)
    from_tokens = not x.is_floating_point()
    if not 0 <= start_at < n_layers or (stop_at is not None and not start_at < stop_at <= n_layers):
        raise EngineError(f"cannot run blocks {start_at} to {stop_at} of a model with {n_layers} blocks.")
    if from_tokens and start_at > 0:
        raise EngineError(f"starting at block {start_at} takes the residual [batch pos d_model], not tokens.")
    if not is_bridge(model):
        start = None if from_tokens else start_at
        return model(x, return_type=return_type, start_at_layer=start, stop_at_layer=stop_at)
    if not from_tokens:
        raise EngineError("a TransformerBridge cannot start from a residual; give it tokens and start_at=0.")
    if stop_at == n_layers:
        return _bridge_final_residual(model, x)
    if stop_at is None:
        return model(x, return_type=return_type)
    return model(x, return_type=return_type, stop_at_layer=stop_at)


def _bridge_final_residual(model: Model, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The residual after the last block, which no `stop_at_layer` of a bridge returns."""
    seen: list[Tensor] = []
    last = len(_inside(model).blocks) - 1
    point = _hook_points(model)[f"blocks.{last}.hook_resid_post"]
    # A plain forward hook, registered last: it sees what the caller's own hooks made of the value, and it never
    # disturbs the model's list of hooks, which the caller may be using.
    handle = point.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(tokens, return_type=None)
    finally:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


# --- Parameters and where they are -----------------------------------------------------------------------------------


def weights_stamp(model: Model) -> tuple[tuple[int, ...], ...]:
    """Changes when a parameter is replaced, moved or written to, a flag is set, or a torch hook put on a module.

    Of writes those count that autograd sees; hooks on hook points do not.
    """
    marks = [tuple(int(value) for value in vars(_inside(model).cfg).values() if isinstance(value, bool))]
    for module in _inside(model).modules():
        weights = [weight for weight in module._parameters.values() if weight is not None]
        marks += [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        if not hasattr(module, "fwd_hooks"):
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            marks += [(id(hook),) for hook in hooks]
    return tuple(marks)


def parameters_of(model: Model) -> Iterator[torch.nn.Parameter]:
    """The model's parameters, one after the other."""
    yield from _inside(model).parameters()


def named_parameters_of(model: Model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The model's parameters and their names, which differ from one backend to the other."""
    yield from _inside(model).named_parameters()


def named_modules_of(model: Model) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules that a forward pass can come by and their names, each once; those that a bridge wraps, too."""
    inside, seen = _inside(model), set()
    wrapped = vars(inside).get("original_model")
    for whole in (inside, wrapped) if isinstance(wrapped, torch.nn.Module) else (inside,):
        for name, module in whole.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module


def held_tensors_of(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The tensors that modules compute with beside parameters, and their names: rotary tables, masks."""
    for name, module in named_modules_of(model):
        plain = {key: item for key, item in vars(module).items() if not key.startswith("_") and key != _MADE_LATER}
        for key, item in {**plain, **module._buffers}.items():
            if isinstance(item, Tensor):
                yield f"{name}.{key}", item


_MADE_LATER = "alibi"
"""A tensor that TransformerLens makes of the config, in the first forward pass that needs it."""


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of the model's weights."""
    return next(parameters_of(model)).dtype


def check_model(model: object) -> None:
    """Make sure that something is a model of TransformerLens, and not inside a wrapper.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the model must be a loaded one (load_model), not of type {type(model).__name__}")
    if "_orig_mod" in model._modules or not (hasattr(model, "cfg") and _has_hook_points(model)):
        raise InputError(
            f"the model must be a HookedTransformer or a TransformerBridge, not a {type(model).__name__}: load_model "
            "makes one of a Hugging Face model, and takes it out of the wrappers of torch.compile and DataParallel"
        )


def device_of(model: Model) -> torch.device:
    """The device that the model's weights are on; the first one where they are spread over several."""
    return next(parameters_of(model)).device


def devices_of(model: Model) -> set[torch.device]:
    """All devices that the model's weights are on."""
    return {parameter.device for parameter in parameters_of(model)}


def moved_to(model: Model, device: torch.device | str) -> Model:
    """The same model, moved to ``device``."""
    return _inside(model).to(device)


def bytes_of(model: Model) -> int:
    """Bytes that the model's parameters and buffers take."""
    inside = _inside(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*inside.parameters(), *inside.buffers()))


def damaged_weight(model: Model) -> str | None:
    """Name of the first parameter that holds NaN or infinite values; None where all are finite."""
    for name, weight in _inside(model).named_parameters():
        if not weight.isfinite().all():
            return name.replace("._original_component", "")  # a bridge's wrapping
    return None


# What a config says of a model's name, its place and its loading, and not of what it computes.
_ASIDE = (
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "device",
    "n_devices",
    "model_name",
    "tokenizer_name",
    "seed",
    "init_weights",
    "checkpoint_index",
    "checkpoint_label_type",
    "checkpoint_value",
    "default_prepend_bos",
    "tokenizer_prepends_bos",
    "n_params",
    "architectures",
    "original_architecture",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "from_checkpoint",
    "use_attn_result",
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "ungroup_grouped_query_attention",
)


def config_text(model: Model) -> str:
    """What of the config decides what is computed, as JSON, in the order of the names."""
    inside = _inside(model)
    config = inside.original_model.config.to_dict() if is_bridge(model) else vars(inside.cfg)
    return json.dumps(_plain(config), sort_keys=True)


def settings_text(model: Model) -> str:
    """What modules are and what they keep of the config, which somebody may have changed since: their classes, scales
    of attention, epsilons of norms, windows, activation functions; as JSON, in the order of the names.
    """
    found: dict[str, Any] = {}
    for name, module in named_modules_of(model):
        found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        for key, value in vars(module).items():
            if key.startswith("_") or key in _ASIDE or key in _PASSING:
                continue
            if isinstance(value, numbers.Real):
                found[f"{name}.{key}"] = float(value)
            elif value is None or isinstance(value, str):
                found[f"{name}.{key}"] = value
            elif isinstance(value, (list, tuple)) and all(isinstance(each, (numbers.Real, str)) for each in value):
                found[f"{name}.{key}"] = [str(each) for each in value]
            elif isinstance(value, (FunctionType, BuiltinFunctionType, functools.partial)):
                found[f"{name}.{key}"] = fingerprint_of(value)
    return json.dumps(found, sort_keys=True)


_PASSING = {"training", "is_caching", "context_level", "gradient_checkpointing", "max_seq_len_cached", "name_or_path"}
"""Attributes of modules that passes and training leave behind, or that say where a model is from."""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items() if key not in _ASIDE}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


# --- Text ------------------------------------------------------------------------------------------------------------


def vocabulary_size(model: Model) -> int:
    """How many token ids the model's embedding has; no weight is looked at."""
    return _inside(model).cfg.d_vocab


def context_length(model: Model) -> int | None:
    """The most tokens that the model reads at once; None where nothing limits them."""
    return _inside(model).cfg.n_ctx or None


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where it has none, and only token tensors work."""
    return getattr(model, "tokenizer", None)


def bos_token(model: Model) -> int | None:
    """Id of the tokenizer's own beginning-of-sequence token; None where there is no such token or no tokenizer.

    TransformerLens, and so loading here, puts the end-of-text (or unknown) token in the place of one that a tokenizer
    does not have; what the tokenizer was made with still tells.
    """
    tokenizer = tokenizer_of(model)
    bos = getattr(tokenizer, "bos_token_id", None)
    stand_ins = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "unk_token_id", None))
    own = getattr(tokenizer, "init_kwargs", {"bos_token": True}).get("bos_token")
    return bos if bos not in stand_ins or own else None


def prepends_bos(model: Model) -> bool:
    """Whether the tokenizer, left to itself, puts a beginning-of-sequence token in front of a text."""
    return bool(getattr(_inside(model).cfg, "tokenizer_prepends_bos", False))


def generation_of(model: Model) -> Callable[..., Tensor] | None:
    """The model's own generation, with a key-value cache; None where it has none, as a decoder of the lab."""
    return None if is_decoder(model) else getattr(model, "generate", None)
