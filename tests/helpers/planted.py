"""A two-block model with a planted super neuron, whose every score can be worked out on paper.

Residual dimensions: 0 aggregated value, 1 sign of the token, 2 outlier, 3 the constant 1, 4 junk, 5-7 unused.

Block 0: attention is uniform over the causal context (no queries, no keys), the value is the token's sign after
RMSNorm, and W_O writes it into dimension 0: a token that averages gets nearly 0, one that attends to itself alone its
own sign. Neuron 0 fires when dimension 0 exceeds half of the constant, and writes 100 times its activation into
dimension 2 (and a little everywhere). The other neurons fire for everyone, more with dimension 0, and write into
dimension 4 only.

Block 1: every query is the constant, the key is dimension 2 after RMSNorm, so scores are 0 for ordinary tokens and
over 60 for one on which neuron 0 fired: attention to it is 1 up to e^-60.
"""

from __future__ import annotations

from typing import Any

import torch

D_MODEL, D_MLP, D_HEAD = 8, 12, 2
SUPER, MIRROR, OUTLIER = 0, 1, 2
PLUS, MINUS, SMALL_PLUS = 0, 1, 2
SIGNS = {PLUS: 1.0, MINUS: -1.0, SMALL_PLUS: 0.9}


def value(token: int) -> float:
    """The value of a token in block 0: half its sign, over the RMS of (sign, 1) in eight dimensions."""
    sign = SIGNS[token]
    return 0.5 * sign / ((sign * sign + 1) / D_MODEL) ** 0.5


def planted_model(*, symmetric: bool = False) -> Any:
    """The model, a HookedTransformer in float32.

    ``symmetric``: neuron 1 does for a negative dimension 0 what neuron 0 does for a positive one. Then it is how far
    the value deviates that makes a sink, and not its mean.
    """
    model = _empty(2)
    with torch.no_grad():
        first, second = model.blocks
        _averages(first)
        _fires(first, SUPER, OUTLIER, 1.0, 100.0)
        first.mlp.W_out[SUPER, [d for d in range(D_MODEL) if d != OUTLIER]] = 0.01
        if symmetric:
            mirrored = first.mlp
            mirrored.W_gate[:, MIRROR] = mirrored.W_gate[:, SUPER]
            mirrored.W_gate[0, MIRROR], mirrored.W_in[:, MIRROR] = -10.0, -mirrored.W_in[:, SUPER]
            mirrored.W_out[MIRROR] = mirrored.W_out[SUPER]
        _attends(second, OUTLIER)
        second.attn.W_V[0, 1, 1] = 1.0
        second.attn.W_V[0, 0, 0] = 1.0
        second.attn.W_O[0, 1, 5] = 1.0
    return model.eval()


SECOND, SECOND_OUTLIER = 1, 5
"""Super neuron of the second event, and the dimension that it writes."""


def planted_twice() -> Any:
    """A model of four blocks whose sink is made in two events, in blocks 0 and 2, neither by way of the other.

    Blocks 0 and 1 are as in :func:`planted_model` (but attention in block 1 writes nothing): the first event makes the
    sink that blocks 1 and 2 attend to. Neuron 1 of block 2 fires as neuron 0 of block 0 did, whatever has become of the
    outlier, and writes into dimension 5, which alone the keys of block 3 read.
    """
    model = _empty(4)
    with torch.no_grad():
        _averages(model.blocks[0])
        _fires(model.blocks[0], SUPER, OUTLIER, 1.0, 100.0)
        _attends(model.blocks[1], OUTLIER)
        _attends(model.blocks[2], OUTLIER)
        # The norm in front has the first outlier in its denominator, some 5,000: so much more takes it to be seen.
        _fires(model.blocks[2], SECOND, SECOND_OUTLIER, 100.0, 1e8)
        _attends(model.blocks[3], SECOND_OUTLIER)
    return model.eval()


def _empty(n_layers: int) -> Any:
    """Embeddings alone: every other weight is zero, every scale of a norm one."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=D_MODEL,
        n_heads=1,
        d_head=D_HEAD,
        d_mlp=D_MLP,
        n_ctx=64,
        d_vocab=3,
        act_fn="relu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=1e-12,
        positional_embedding_type="standard",
        attn_scale=1.0,
        use_attn_scale=False,
        model_name="planted",
        device="cpu",
        seed=0,
    )
    model: Any = HookedTransformer(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln1.w") or name.endswith("ln2.w") or name == "ln_final.w" else 0.0)
        for token, sign in SIGNS.items():
            model.embed.W_E[token, 1], model.embed.W_E[token, 3] = sign, 1.0
    return model


def _averages(block: Any) -> None:
    """Uniform attention writes half the mean sign into dimension 0."""
    block.attn.W_V[0, 1, 0] = 0.5
    block.attn.W_O[0, 0, 0] = 1.0


def _fires(block: Any, neuron: int, dim: int, scale: float, written: float) -> None:
    """A super neuron for tokens with more than half of the constant in dimension 0; the others fire for everyone."""
    block.mlp.W_gate[0, neuron], block.mlp.W_gate[3, neuron] = 10.0 * scale, -5.0 * scale
    block.mlp.W_in[0, neuron] = 10.0 * scale
    block.mlp.W_out[neuron, dim] = written
    for other in set(range(D_MLP)) - {neuron}:
        block.mlp.W_gate[3, other] = 0.5 + 0.05 * other
        block.mlp.W_in[0, other], block.mlp.W_in[3, other] = 0.5 + 0.03 * other, 0.2
        block.mlp.W_out[other, 4] = 0.1


def _attends(block: Any, dim: int) -> None:
    """Every query is the constant, the key ``dim``."""
    block.attn.W_Q[0, 3, 0] = 4.0
    block.attn.W_K[0, dim, 0] = 8.0


def prompts(length: int = 16) -> torch.Tensor:
    """Two prompts, ``[2, length]``; position 5 is a plus in both, and neither fires there when it averages.

    The first starts with a minus and has no sink of its own; the second starts with a plus, so position 0 is one.
    """
    alternating = [MINUS, PLUS] * (length // 2)
    own_sink = [PLUS, MINUS, PLUS, MINUS, PLUS, SMALL_PLUS] + [MINUS, PLUS] * (length // 2)
    return torch.tensor([alternating[:length], own_sink[:length]])
