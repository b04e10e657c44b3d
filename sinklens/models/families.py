"""Small random models of the architecture families that sinklens knows, built from transformers' configs, offline.

They answer one question: what runs on which architecture. Their weights are random, so their numbers mean nothing;
they are scaled so that attention and MLPs do something, and their sizes differ from one another wherever the
architecture allows, so that an edit on a wrong axis fails loudly.

A family is one entry of :data:`FAMILIES`. With it come the table of what runs on it, `sinklens models --capabilities`,
and the tests of loading and of agreement with Hugging Face.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinklens.models.state import in_usual_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_HEAD, D_MLP, D_VOCAB, N_CTX = 4, 4, 2, 32, 8, 48, 101, 64

_MODERN: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_KV = {key: value for key, value in _MODERN.items() if key != "num_key_value_heads"}
_GPT: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "n_embd": D_MODEL,
    "n_inner": D_MLP,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """An architecture family."""

    title: str
    """What people call it."""
    architecture: str
    """Prefix of its classes in transformers."""
    sizes: dict[str, Any]
    """Arguments of its config."""
    head: str = "ForCausalLM"
    """What follows the prefix in the name of its model class."""
    hooked: bool = True
    """Whether TransformerLens 3.9 has a HookedTransformer for any model of it; a bridge is needed otherwise."""
    offset_norms: bool = False
    """Whether norm weights are stored minus one."""
    transposed: bool = False
    """Whether linear weights are stored as [in, out]."""
    in_table: bool = True
    """Whether the README's table has a column for it."""
    config: str = ""
    """Name of its config class, where that does not follow from the prefix."""


_HEADS: dict[str, Any] = {"head_dim": D_HEAD}
_WINDOW: dict[str, Any] = {"sliding_window": 12}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_OPT: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "word_embed_proj_dim": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "ffn_dim": D_MLP,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
}
_FALCON: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "ffn_hidden_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": N_HEADS,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


FAMILIES: dict[str, Family] = {
    # Gated MLP, RMSNorm, rotary, grouped-query attention.
    "llama": Family("Llama", "Llama", _MODERN),  # Llama-2, Llama-3
    "qwen2": Family("Qwen2", "Qwen2", _MODERN),  # Qwen2.5, with biases on q, k, v
    "qwen3": Family("Qwen3", "Qwen3", _MODERN | {"head_dim": D_HEAD}),  # with norms on q, k
    "mistral": Family("Mistral", "Mistral", _MODERN),
    "gemma2": Family("Gemma-2", "Gemma2", _MODERN | {"head_dim": D_HEAD}, hooked=False, offset_norms=True),
    # LayerNorm, plain MLP.
    "gpt2": Family("GPT-2", "GPT2", _GPT, "LMHeadModel", transposed=True),  # learned positions
    "gpt_neox": Family("GPT-NeoX, Pythia", "GPTNeoX", _NO_KV),  # parallel blocks, a norm each
    "gptj": Family("GPT-J", "GPTJ", _GPT | {"rotary_dim": 4}, in_table=False),  # parallel blocks, one norm for both
    "phi": Family("Phi", "Phi", _NO_KV, hooked=False, in_table=False),  # parallel blocks, one norm for both
    # Others.
    "phi3": Family("Phi-3", "Phi3", _MODERN),  # Phi-4, with fused projections
    "olmo": Family("OLMo", "Olmo", _MODERN, hooked=False),  # LayerNorm without weights
    "olmo2": Family("OLMo-2", "Olmo2", _MODERN, hooked=False),  # norms after attention and MLP
    # Rotary embeddings scaled for a long context, slow frequencies only.
    "llama3": Family("Llama-3.1", "Llama", _MODERN | {"rope_parameters": _LLAMA3}, in_table=False),
    # Windows in some blocks; norms before and behind.
    "gemma": Family("Gemma", "Gemma", _MODERN | _HEADS, hooked=False, offset_norms=True, in_table=False),
    "gemma3": Family(
        "Gemma-3",
        "Gemma3",
        _MODERN | _HEADS | _WINDOW,
        hooked=False,
        offset_norms=True,
        in_table=False,
        config="Gemma3TextConfig",
    ),
    "olmo3": Family("OLMo-3", "Olmo3", _MODERN | _WINDOW, in_table=False),
    # LayerNorm before or behind, learned positions or slopes, parallel blocks.
    "opt": Family("OPT", "OPT", _OPT, in_table=False),
    "opt_post": Family(
        "OPT-350m",
        "OPT",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        hooked=False,
        in_table=False,
    ),
    "falcon": Family("Falcon", "Falcon", _FALCON, hooked=False, in_table=False),
    "mpt": Family(
        "MPT",
        "Mpt",
        {"vocab_size": D_VOCAB, "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS, "max_seq_len": N_CTX},
        hooked=False,
        in_table=False,
    ),
    "bloom": Family(
        "BLOOM",
        "Bloom",
        {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS},
        in_table=False,
    ),
    "stablelm": Family("StableLM", "StableLm", _MODERN, hooked=False, in_table=False),
    "cohere": Family("Cohere", "Cohere", _MODERN | {"logit_scale": 1.0}, hooked=False, in_table=False),
    # What is added to the residual is scaled; some blocks without positions.
    "granite": Family(
        "Granite",
        "Granite",
        _MODERN | {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
        hooked=False,
        in_table=False,
    ),
    "smollm3": Family("SmolLM3", "SmolLM3", _MODERN, hooked=False, in_table=False),
    # Mixtures of experts; compressed keys and values; learned sinks.
    "mixtral": Family("Mixtral", "Mixtral", _MODERN | {"num_local_experts": 4}, in_table=False),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "Qwen3Moe",
        _MODERN | _HEADS | _EXPERTS | {"num_experts": 4},
        hooked=False,
        in_table=False,
    ),
    "olmoe": Family("OLMoE", "Olmoe", _MODERN | {"num_experts": 4, "num_experts_per_tok": 2}, in_table=False),
    "deepseek_v2": Family(
        "DeepSeek-V2",
        "DeepseekV2",
        _MODERN | _LATENT | _EXPERTS | {"q_lora_rank": None, "topk_method": "greedy"},
        hooked=False,
        in_table=False,
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3", "DeepseekV3", _MODERN | _LATENT | _EXPERTS | {"q_lora_rank": 16}, hooked=False, in_table=False
    ),
    "gpt_oss": Family(
        "gpt-oss",
        "GptOss",
        _MODERN | _HEADS | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
        in_table=False,
    ),
}


@in_usual_state
def random_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random Hugging Face model in eval mode; the same seed gives the same weights.

    Args:
        family: a key of :data:`FAMILIES`.
        seed: fixes the weights.
        overrides: arguments of the config in place of the family's.
    """
    import transformers

    chosen = FAMILIES[family]
    config = getattr(transformers, chosen.config or f"{chosen.architecture}Config")(**(chosen.sizes | overrides))
    model_class = getattr(transformers, chosen.architecture + chosen.head)
    config._attn_implementation = "eager"
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_scale = name.endswith("weight") and not chosen.offset_norms
                parameter.copy_(noise.mul(0.2) + (1.0 if is_scale else 0.0))
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.copy_(noise)
            else:
                # Twice the variance-preserving scale, for attention that is sharper than uniform.
                fan_in = parameter.shape[0 if chosen.transposed else -1]
                parameter.copy_(noise * 2 / fan_in**0.5)
    return model.eval()
