"""Tiny random models for tests: seeded, no tokenizer, and scaled so that attention and MLPs do something.

The sizes differ from one another wherever the architecture allows, so that an edit on a wrong axis fails loudly.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers as tf

from sinklens.models import load_model

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

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # Gated MLP, RMSNorm, rotary, grouped-query attention.
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, _MODERN),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, _MODERN),  # with biases on q, k, v
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, _MODERN | {"head_dim": D_HEAD}),  # with norms on q, k
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, _MODERN),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, _MODERN),  # with fused projections
    # LayerNorm, plain MLP.
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, _GPT),  # learned positions
    "gpt_neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, _NO_KV),  # parallel blocks, a norm each
    "gptj": (tf.GPTJConfig, tf.GPTJForCausalLM, _GPT | {"rotary_dim": 4}),  # parallel blocks, one norm for both
    # Architectures that TransformerLens 3.9 converts by name only, or not at all: a bridge is needed.
    "phi": (tf.PhiConfig, tf.PhiForCausalLM, _NO_KV),  # parallel blocks, one norm for both
    "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, _MODERN | {"head_dim": D_HEAD}),  # norm weights stored minus one
    "olmo": (tf.OlmoConfig, tf.OlmoForCausalLM, _MODERN),  # LayerNorm without weights
    "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM, _MODERN),  # norms after attention and MLP
}
HOOKED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "gptj")
BRIDGE_ONLY = ("phi", "gemma2", "olmo", "olmo2")


def tiny_hf(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> tf.PreTrainedModel:
    """A tiny random Hugging Face model in eval mode; the same seed gives the same weights."""
    config_class, model_class, sizes = ARCHITECTURES[arch]
    config = config_class(**(sizes | overrides))
    config._attn_implementation = "eager"
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_scale = name.endswith("weight") and arch != "gemma2"
                parameter.copy_(noise.mul(0.2) + (1.0 if is_scale else 0.0))
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.copy_(noise)
            else:
                # Twice the variance-preserving scale, for attention that is sharper than uniform.
                fan_in = parameter.shape[0] if arch == "gpt2" else parameter.shape[1]  # GPT-2 stores [in, out]
                parameter.copy_(noise * 2 / fan_in**0.5)
    return model.eval()


def tiny_model(
    arch: str = "llama", backend: Literal["auto", "hooked", "bridge"] = "auto", *, seed: int = 0, **overrides: Any
) -> Any:
    """The same tiny model behind either backend."""
    return load_model(tiny_hf(arch, seed=seed, **overrides), backend=backend, device="cpu")


def tiny_tokens(batch: int = 3, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch pos], special ones excluded."""
    return torch.randint(3, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hooks_left(model: Any) -> list[str]:
    """Names of the hook points that still carry a hook, of TransformerLens' kind or of torch's."""
    return [
        name
        for name, point in model.hook_dict.items()
        if point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks
    ]
