"""One view of a model, whether it is a `HookedTransformer` or a `TransformerBridge`.

The two answer to the same hook names, but differ in what they call their parts, in which weights are there, and in
whether a forward pass can start in the middle. Everything above this module asks here and never looks at the model's
own attributes.

Pitfalls that this module exists for, all checked by running:
- a bridge of TransformerLens 3.9 silently ignores an unknown hook name: `check_hook_name` raises instead;
- `stop_at_layer=n_layers` gives the residual on a HookedTransformer and the logits on a bridge: `forward` gives the
  residual;
- Gemma stores its norm weight as an offset from one: `block_weights` gives the multiplier that is applied.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.errors import EngineError, NotApplicableError

# A HookedTransformer or a TransformerBridge. Neither name can be written here: importing them costs seconds, and the
# first is gone from TransformerLens 4.
Model: TypeAlias = Any

# These normalise each sub-block's output instead of its input, so there is no norm in front of it to read.
_POST_NORM = frozenset({"Olmo2ForCausalLM", "Olmo3ForCausalLM"})


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
    """Neurons per MLP."""
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


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block that the chain reads; views of the model's own where it allows that."""

    W_gate: Float[Tensor, "d_model d_mlp"] | None
    """Gate projection; None in an MLP without a gate."""
    W_in: Float[Tensor, "d_model d_mlp"]
    """Up projection (the linear branch, where there is a gate)."""
    W_out: Float[Tensor, "d_mlp d_model"]
    """Down projection."""
    W_O: Float[Tensor, "head d_head d_model"]
    """Attention output projection, by query head."""
    ln1_w: Float[Tensor, " d_model"]
    """Multiplier that the norm before attention applies."""
    ln2_w: Float[Tensor, " d_model"]
    """Multiplier that the norm before the MLP applies; that of `ln1` where a parallel block has one norm for both."""


def is_bridge(model: Model) -> bool:
    """Whether `model` is a TransformerBridge (as opposed to a HookedTransformer)."""
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def model_id(model: Model) -> str:
    """The model's name for people: what `load_model` was asked for, else the name in the model's own config."""
    return str(model.cfg.model_name)


def model_shape(model: Model) -> ModelShape:
    """The sizes and the plan of `model`.

    Raises:
        InputError: the model has no dense MLP in its first block (mixture of experts).
    """
    cfg = model.cfg
    W_in, W_O = _dense_mlp(model, 0), model.blocks[0].attn.W_O
    return ModelShape(
        n_layers=len(model.blocks),
        n_heads=W_O.shape[0],
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_model=W_in.shape[0],
        d_head=W_O.shape[1],
        d_mlp=W_in.shape[1],  # read from the weight: a bridge's cfg.d_mlp is a guess for some architectures (OPT)
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        gated=getattr(model.blocks[0].mlp, "W_gate", None) is not None,
        norm="rms" if str(cfg.normalization_type).startswith("RMS") else "layer",
        norm_eps=float(cfg.eps),
        parallel=_is_parallel(model),
        rotary=cfg.positional_embedding_type == "rotary",
    )


def block_weights(model: Model, layer: int) -> BlockWeights:
    """The weights of block `layer` that the chain reads.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        layer: index of the block.

    Raises:
        InputError: the block has a mixture of experts, or no norm in front of attention and MLP.
    """
    block = model.blocks[layer]
    W_in = _dense_mlp(model, layer)
    if _architecture(model) in _POST_NORM or getattr(block, "ln1", None) is None:
        raise NotApplicableError(
            f"{model_id(model)} normalises after attention and MLP, not before; sinklens needs a norm in front."
        )
    ln1_w = _norm_multiplier(model, block.ln1)
    ln2 = getattr(block, "ln2", None)
    return BlockWeights(
        W_gate=getattr(block.mlp, "W_gate", None),
        W_in=W_in,
        W_out=block.mlp.W_out,
        W_O=block.attn.W_O,
        ln1_w=ln1_w,
        ln2_w=ln1_w if ln2 is None else _norm_multiplier(model, ln2),
    )


def check_writes_directly(model: Model, layer: int) -> None:
    """Make sure that what an MLP's neurons write is what is added to the residual stream.

    Raises:
        InputError: a norm stands between the two (Gemma-2), so that a row of W_out is not what its neuron adds.
    """
    block = model.blocks[layer]
    if getattr(block, "ln2_post", None) is not None or _architecture(model) in _POST_NORM:
        raise NotApplicableError(
            f"{model_id(model)} normalises what its MLPs write before adding it, so a neuron's contribution to the "
            "residual stream cannot be read off W_out."
        )


def has_hook(model: Model, name: str) -> bool:
    """Whether `name` is a hook point of `model`, under its own name or an alias."""
    return name in model.hook_dict


def check_hook_name(model: Model, name: str) -> None:
    """Make sure that `name` is a hook point of `model`.

    Raises:
        EngineError: it is not; the message names the closest ones that are.
    """
    if has_hook(model, name):
        return
    close = difflib.get_close_matches(name, model.hook_dict, n=3)
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
    raise EngineError(f"{model_id(model)} has no hook point {name!r}{hint}")


def supports_resume(model: Model) -> bool:
    """Whether `forward` can start from a cached residual without running the blocks before it (no bridge can)."""
    return not is_bridge(model)


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
    n_layers = len(model.blocks)
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


def weight_digest(model: Model) -> str:
    """SHA-256 over every parameter's name, shape, dtype and bytes, in the order of the names.

    Parameters are streamed one at a time, so the digest needs no second copy of the model. The two backends name their
    parameters differently, so the same weights have one digest on each.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _architecture(model: Model) -> str | None:
    return getattr(model.cfg, "architecture", None) or getattr(model.cfg, "original_architecture", None)


def _is_parallel(model: Model) -> bool:
    if is_bridge(model):
        # The block's class decides what is computed; cfg.parallel_attn_mlp is only the architecture's default.
        return "Parallel" in type(model.blocks[0]).__name__
    return bool(model.cfg.parallel_attn_mlp)


def _dense_mlp(model: Model, layer: int) -> Float[Tensor, "d_model d_mlp"]:
    W_in = getattr(model.blocks[layer].mlp, "W_in", None)
    if not isinstance(W_in, Tensor) or W_in.ndim != 2:
        raise NotApplicableError(
            f"{model_id(model)} has no dense MLP in block {layer}; mixtures of experts are not supported."
        )
    return W_in


def _norm_multiplier(model: Model, norm: Any) -> Float[Tensor, " d_model"]:
    weight = getattr(norm, "w", None) if not is_bridge(model) else getattr(norm.original_component, "weight", None)
    if weight is None:  # a norm without a scale (OLMo, or a folded one) multiplies by one
        some = model.blocks[0].mlp.W_in
        return torch.ones(some.shape[0], dtype=some.dtype, device=some.device)
    # A HookedTransformer adds Gemma's one when it converts the weights; a bridge keeps the stored offset.
    return weight + 1 if is_bridge(model) and getattr(model.cfg, "rmsnorm_uses_offset", False) else weight


def _bridge_final_residual(model: Model, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The residual after the last block, which no `stop_at_layer` of a bridge returns."""
    seen: list[Tensor] = []
    point = model.hook_dict[f"blocks.{len(model.blocks) - 1}.hook_resid_post"]
    # A plain forward hook, registered last: it sees what the caller's own hooks made of the value, and it never
    # disturbs the model's list of hooks, which the caller may be using.
    handle = point.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(tokens, return_type=None)
    finally:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def device_of(model: Model) -> torch.device:
    """The device that the model's weights are on."""
    return next(model.parameters()).device
