"""One model twice, with equal weights: as Hugging Face has it, for the peers, and as a HookedTransformer.

Large shapes are built on the device itself, from a config and a seed, in the dtype that they run in: nothing passes
through the CPU, and no more than the two copies of the weights is ever allocated. Time does not depend on the weights'
values, so random ones serve.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sinklens.errors import EngineError, InputError
from sinklens.models.load import _quiet_loading, find_device
from tests.benchmark.flops import Sizes

_CONTEXT = 2048
"""Longest prompt: every block of a HookedTransformer holds a mask and rotary tables of this many rows."""

_SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
CONFIGS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
    "smollm2": _SMOLLM2,
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
"""Shapes by name. ``smollm2`` has its published weights unless random ones are asked for, the others random ones."""


@dataclass(frozen=True, eq=False)
class Models:
    """The same model for every library."""

    name: str
    """The shape's name."""
    weights: str
    """``published`` or ``random``."""
    hf: LlamaForCausalLM
    """As Hugging Face has it, with attention by scaled_dot_product_attention, its fastest."""
    hooked: Any
    """As a HookedTransformer."""

    @property
    def sizes(self) -> Sizes:
        """The sizes that FLOPs follow from."""
        return sizes_of(self.hf.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The format of the weights."""
        return self.hf.lm_head.weight.dtype


def sizes_of(config: Any) -> Sizes:
    """The sizes in a LlamaConfig."""
    return Sizes(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
    )


def known(name: str) -> tuple[Sizes, int]:
    """The sizes of a shape, and its longest prompt.

    Raises:
        InputError: a name that is not known.
    """
    if name not in CONFIGS:
        raise InputError(f"--model {name!r} is not known: choose one of {', '.join(CONFIGS)}")
    return sizes_of(CONFIGS[name]), min(CONFIGS[name].max_position_embeddings, _CONTEXT)


def load_models(
    name: str, device: str | torch.device, dtype: torch.dtype, *, published: bool = True, seed: int = 0
) -> Models:
    """Both forms of a shape, on the device, with equal logits.

    Raises:
        InputError: a name or a device that is not known.
        EngineError: the two forms disagree.
    """
    known(name)
    device = find_device(device)
    use_published = published and name == "smollm2"
    # Published weights are compared before they are rounded: rounding moves a model with outlier dimensions by more
    # than a wrong conversion might.
    exact = torch.float32 if use_published else dtype
    hf = _published(device) if use_published else random_weights(CONFIGS[name], device, exact, seed)
    hf.set_attn_implementation("sdpa")
    models = Models(name, "published" if use_published else "random", hf, hooked_twin(hf))
    check_twins(models)
    if exact != dtype:
        _round(hf, dtype)
        models = replace(models, hooked=hooked_twin(hf))
    return models


def _round(hf: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Parameters only, not buffers: rotary frequencies in bfloat16 would shift positions."""
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)


def _published(device: torch.device) -> LlamaForCausalLM:
    from sinklens.models import smollm2 as _smollm2

    with _quiet_loading():
        model, _ = _smollm2.load()
    assert isinstance(model, LlamaForCausalLM)
    return model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]  (stubs take no device)


@torch.no_grad()
def random_weights(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """Normal weights of standard deviation 0.02 (larger in small models, so that attention is not uniform)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _round(model, dtype)
    model = model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # to_empty left its frequencies undefined
    generator = torch.Generator(device).manual_seed(seed)
    scale = max(0.02, 1.28 / config.hidden_size**0.5)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, scale, generator=generator)
    return model.eval().requires_grad_(False)


def _rope_theta(config: Any) -> float:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rotary embeddings of the kind {rope['rope_type']!r} are not set up here")
    return rope["rope_theta"]


@torch.no_grad()
def hooked_twin(hf: LlamaForCausalLM) -> Any:
    """A HookedTransformer with a copy of the weights, made on the device that they are on."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # pyright: ignore[reportPrivateImportUsage]

    c, sizes = hf.config, sizes_of(hf.config)
    cfg = HookedTransformerConfig(
        n_layers=sizes.n_layers,
        d_model=sizes.d_model,
        d_head=sizes.d_head,
        n_heads=sizes.n_heads,
        d_mlp=sizes.d_mlp,
        n_ctx=min(c.max_position_embeddings, _CONTEXT),
        eps=c.rms_norm_eps,
        d_vocab=sizes.d_vocab,
        act_fn=c.hidden_act,
        # As TransformerLens itself does: grouped-query attention only where heads are in fact grouped.
        n_key_value_heads=None if sizes.n_kv_heads == sizes.n_heads else sizes.n_kv_heads,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=sizes.d_head,
        rotary_base=_rope_theta(c),
        final_rms=True,
        gated_mlp=True,
        device=str(hf.lm_head.weight.device),
        dtype=hf.lm_head.weight.dtype,
        init_weights=False,
        default_prepend_bos=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=True)
    weights = convert_llama_weights(hf, cfg)
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise EngineError(f"TransformerLens has other weights: {sorted(weights.keys() ^ parameters.keys())[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def check_twins(models: Models) -> None:
    """Refuse two forms whose logits differ.

    Raises:
        EngineError: with the difference, in standard deviations of the logits.
    """
    tokens = torch.arange(3, 19, device=models.device)[None]
    theirs = models.hf(tokens, use_cache=False).logits.float()
    ours = models.hooked(tokens, return_type="logits").float()
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    if not difference <= (1e-2 if models.dtype == torch.float32 else 0.5):  # written so that NaN fails too
        raise EngineError(
            f"the two forms of {models.name} differ by {difference:.2g} standard deviations of the logits"
        )
