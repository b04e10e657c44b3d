"""A TransformerBridge taken apart: what its blocks compute with, read from the Hugging Face modules that it wraps.

What is found here is a proposal: the parts that a bridge has under TransformerLens's names are taken for what they are
called. Nothing is believed of an architecture's name. Who computes with the parts (the packed pass) proves first, block
by block, that every activation comes out as the bridge's own; a part of another kind is refused and named
(:class:`sinklens.models.parts.UnknownPartError`). What depends on the length of the prompts, that is which keys a query
sees and the rotary tables of each block, is taken from what the model hands to its attention in a pass of that length.

Nothing is copied: a weight here is a view of the model's own tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.models.hooked import Rotary
from sinklens.models.parts import (
    BridgeAttention,
    BridgeBlock,
    BridgeNorm,
    Function,
    Given,
    Linear,
    MLPParts,
    UnknownPartError,
)
from sinklens.models.view import Model, device_of


def embedded(model: Model, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters the first block."""
    return model(tokens, return_type=None, stop_at_layer=0)


def given_to_attention(model: Model, length: int) -> list[Given]:
    """What every block's attention is given for prompts of ``length`` tokens, seen in a pass over one.

    Raises:
        UnknownPartError: attention is not called with a mask and rotary tables by name.
    """
    found: dict[int, Given] = {}
    handles = []
    for layer, block in enumerate(_inside(model).blocks):
        if not hasattr(block, "attn"):
            raise UnknownPartError(f"no attention in block {layer}")

        def keep(module: Any, args: Any, options: dict[str, Any], layer: int = layer) -> None:  # noqa: ARG001
            turns = options.get("position_embeddings")
            found[layer] = Given(options.get("attention_mask"), turns if isinstance(turns, tuple) else None)

        handles.append(block.attn.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(torch.zeros(1, length, dtype=torch.long, device=device_of(model)), return_type=None)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < len(handles):
        raise UnknownPartError("attention that is not called")
    return [found[layer] for layer in range(len(handles))]


def block_parts(model: Model, layer: int, length: int, given: Given) -> BridgeBlock:
    """The parts of block ``layer``, with what its attention is given for prompts of ``length`` tokens.

    Raises:
        UnknownPartError: it has a part of another kind.
    """
    block = _inside(model).blocks[layer]
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        raise UnknownPartError(f"no MLP in block {layer}")
    return BridgeBlock(
        **_norms(block),
        attention=_attention(block.attn, layer, length, given),
        mlp_parts=_mlp(mlp),
        whole_mlp=lambda x: _first(mlp(x[None]))[0],
        added=float(getattr(block, "residual_contribution_scale", 1.0)),
    )


def final_norm(model: Model) -> BridgeNorm:
    """The norm in front of the unembedding.

    Raises:
        UnknownPartError: there is none, or it is of another kind.
    """
    norm = _norm(getattr(_inside(model), "ln_final", None))
    if norm is None or hasattr(_inside(model), "project_out"):
        raise UnknownPartError("what stands in front of the unembedding")
    return norm


def unembedding(model: Model) -> tuple[Linear, Function]:
    """The unembedding, and what is done to its logits.

    Raises:
        UnknownPartError: it is of another kind.
    """
    config = _inside(model).original_model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def finished(logits: Tensor) -> Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return _linear(_inside(model).unembed, "the unembedding"), finished


def _norms(block: Any) -> dict[str, BridgeNorm | None]:
    """The block's norms; one that its output is read behind stands behind attention or MLP whatever it is called."""
    norms = {name: _norm(getattr(block, name, None)) for name in ("ln1", "ln1_post", "ln2", "ln2_post")}
    for name, written in (("ln1", "hook_attn_out"), ("ln2", "hook_mlp_out")):
        if block.hook_aliases.get(written) == f"{name}.hook_out":
            norms |= {name: None, f"{name}_post": norms[name]}
    return norms


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _linear(bridge: Any, what: str) -> Linear:
    from transformers.pytorch_utils import Conv1D

    module = getattr(bridge, "original_component", None)
    if type(module) is Conv1D:
        return Linear(module.weight, module.bias)
    if isinstance(module, torch.nn.Linear):
        return Linear(module.weight.T, module.bias)
    raise UnknownPartError(f"{what}: {type(module).__name__}")


def _norm(bridge: Any) -> BridgeNorm | None:
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    if bridge is None:
        return None
    module = getattr(bridge, "original_component", None)
    sizes = (
        getattr(module, "eps", None),
        getattr(module, "variance_epsilon", None),
        getattr(bridge.config, "eps", None),
    )
    eps = next((size for size in sizes if size is not None), None)
    if not isinstance(bridge, NormalizationBridge) or module is None or not isinstance(eps, float):
        raise UnknownPartError(f"the norm {type(module).__name__}")
    weight, rms = getattr(module, "weight", None), bridge.uses_rms_norm
    if weight is not None and rms and getattr(bridge.config, "rmsnorm_uses_offset", False):
        weight = weight.float() + 1  # as Gemma adds it, in float32
    return BridgeNorm("rms" if rms else "layer", eps, weight, None if rms else getattr(module, "bias", None))


def _attention(attn: Any, layer: int, length: int, given: Given) -> BridgeAttention:
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
    from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    module = attn.original_component
    known = isinstance(attn, PositionEmbeddingsAttentionBridge | JointQKVAttentionBridge)
    if not known and type(attn) is not AttentionBridge:
        raise UnknownPartError(f"attention of the kind {type(attn).__name__}")
    _check_plain(attn, module)
    q, k, v, o = (_linear(getattr(attn, name, None), f"attention's projection {name}") for name in "qkvo")
    return BridgeAttention(
        q,
        k,
        v,
        o,
        _head_norm(attn, "q_norm"),
        _head_norm(attn, "k_norm"),
        scale=1 / _scaling(attn, module, layer),
        cap=float(getattr(module, "attn_logit_softcapping", None) or 0),
        sinks=getattr(module, "sinks", None),
        rotary=_rotary(attn, module, given.turns),
        seen=_seen(given.mask, length),
        masked=-torch.inf if attn.compatibility_mode else torch.finfo(_dtype(attn)).min,
    )


def _dtype(attn: Any) -> torch.dtype:
    return attn.o.original_component.weight.dtype


_UNKNOWN = ("gated_q_proj", "qk_norm_after_rope", "use_split_qkv_input", "use_attn_in", "use_attn_result")
# Flags of a bridge under which attention is computed in another way.


def _check_plain(attn: Any, module: Any) -> None:
    """Refuse attention that does more than is known here.

    Raises:
        UnknownPartError: it does.
    """
    flag = next((name for name in _UNKNOWN if getattr(attn.config, name, False)), None)
    config = getattr(module, "config", None)
    turns = getattr(config, "rope_parameters", None)
    odd = {
        "an output gate": "gate" in attn._modules,
        "scaled keys": getattr(module, "key_multiplier", None) is not None,
        "clipped queries, keys and values": getattr(config, "clip_qkv", None) is not None,
        "queries that are scaled by their position": isinstance(turns, dict) and turns.get("llama_4_scaling_beta"),
    }
    if found := flag or next((what for what, here in odd.items() if here), None):
        raise UnknownPartError(found)


def _scaling(attn: Any, module: Any, layer: int) -> float:
    """What scores are multiplied by."""
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    width = float(attn.config.d_head) ** -0.5
    if isinstance(attn, PositionEmbeddingsAttentionBridge):
        return float(getattr(module, "scaling", width))
    return width / (layer + 1 if getattr(attn.config, "scale_attn_by_inverse_layer_idx", False) else 1)


def _head_norm(attn: Any, name: str) -> Function | None:
    """The norm of queries or keys: of each head, or of all heads together where its weight has that size."""
    norm = getattr(getattr(attn, name, None), "original_component", None)
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.ndim == 1 and weight.shape[0] != attn.config.d_head:
        return lambda x: norm(x.flatten(1)).view(x.shape)
    return norm


def _rotary(attn: Any, module: Any, turns: tuple[Tensor, Tensor] | None) -> Rotary | None:
    own = getattr(module, "embed_positions", None)
    if isinstance(own, Tensor) and own.ndim == 2:  # GPT-J's: sines, then cosines
        sin, cos = (half.repeat_interleave(2, 1).to(_dtype(attn)) for half in own.chunk(2, 1))
        return Rotary(cos, sin, adjacent=True)
    if turns is None or not getattr(module, "use_rope", True):
        return None
    cos, sin = turns[0][0], turns[1][0]
    if cos.ndim != 2:
        raise UnknownPartError("rotary tables of another shape")
    in_place = getattr(attn.config, "rotary_interleaved_cos_sin", False)
    adjacent = in_place or bool(getattr(attn.config, "rotary_adjacent_pairs", False))
    if adjacent and not in_place:
        cos, sin = (table[:, : table.shape[1] // 2].repeat_interleave(2, 1) for table in (cos, sin))
    elif not adjacent and cos.shape[1] * 2 == attn.config.d_head and getattr(module, "sinks", None) is not None:
        cos, sin = (torch.cat([table, table], 1) for table in (cos, sin))  # gpt-oss has each half once
    return Rotary(cos, sin, adjacent)


def _seen(mask: Tensor | None, length: int) -> Bool[Tensor, "pos pos"] | None:
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[0] != 1 or mask.shape[1] != 1 or mask.shape[2:] != (length, length):
        raise UnknownPartError(f"a mask of shape {list(mask.shape)}")
    mask = mask[0, 0]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise UnknownPartError("something that is added to attention scores")
    plain = torch.ones_like(seen).tril()
    if (seen & ~plain).any() or not seen.diagonal().all():
        raise UnknownPartError("attention that is not causal")
    return None if torch.equal(seen, plain) else seen


def _mlp(mlp: Any) -> MLPParts | None:
    """The MLP's parts, if it is made of projections around an activation function."""
    from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
    from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge

    if not isinstance(mlp, MLPBridge):
        return None
    module = mlp.original_component
    names = ("act_fn", "activation_fn", "act", "activation")
    act: Any = next((value for name in names if callable(value := getattr(module, name, None))), None)
    if act is None or getattr(mlp, "_use_processed_weights", False):
        return None
    try:
        gate = _linear(mlp.gate, "the gate") if isinstance(mlp, GatedMLPBridge) else None
        return MLPParts(gate, _linear(getattr(mlp, "in", None), "the MLP"), _linear(mlp.out, "the MLP"), act)
    except UnknownPartError:
        return None


def _inside(model: Model) -> Any:
    """The model without its protocol."""
    return model
