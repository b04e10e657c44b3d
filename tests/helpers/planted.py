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
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2,
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
        first, second = model.blocks[0], model.blocks[1]
        first.attn.W_V[0, 1, 0] = 0.5
        first.attn.W_O[0, 0, 0] = 1.0
        first.mlp.W_gate[0, SUPER], first.mlp.W_gate[3, SUPER], first.mlp.W_in[0, SUPER] = 10.0, -5.0, 10.0
        first.mlp.W_out[SUPER] = 0.01
        first.mlp.W_out[SUPER, OUTLIER] = 100.0
        for other in range(1, D_MLP):
            first.mlp.W_gate[3, other] = 0.5 + 0.05 * other
            first.mlp.W_in[0, other], first.mlp.W_in[3, other] = 0.5 + 0.03 * other, 0.2
            first.mlp.W_out[other, 4] = 0.1
        if symmetric:
            mirrored = first.mlp
            mirrored.W_gate[:, MIRROR] = mirrored.W_gate[:, SUPER]
            mirrored.W_gate[0, MIRROR], mirrored.W_in[:, MIRROR] = -10.0, -mirrored.W_in[:, SUPER]
            mirrored.W_out[MIRROR] = mirrored.W_out[SUPER]
        second.attn.W_Q[0, 3, 0] = 4.0
        second.attn.W_K[0, OUTLIER, 0] = 8.0
        second.attn.W_V[0, 1, 1] = 1.0
        second.attn.W_V[0, 0, 0] = 1.0
        second.attn.W_O[0, 1, 5] = 1.0
    return model.eval()


def prompts(length: int = 16) -> torch.Tensor:
    """Two prompts, ``[2, length]``; position 5 is a plus in both, and neither fires there when it averages.

    The first starts with a minus and has no sink of its own; the second starts with a plus, so position 0 is one.
    """
    alternating = [MINUS, PLUS] * (length // 2)
    own_sink = [PLUS, MINUS, PLUS, MINUS, PLUS, SMALL_PLUS] + [MINUS, PLUS] * (length // 2)
    return torch.tensor([alternating[:length], own_sink[:length]])
