"""A three-block model whose circuit is known, edge by edge, with a decoy of every kind.

Residual dimensions: 0 what head 0.0 writes, 1 sign of the token, 2 outlier, 3 the constant 1, 4 junk, 5 what head 0.1
writes (a decoy), 6 the other outlier, 7 what MLP 0 writes, 8-11 unused. In twelve dimensions a vector of squared length
``l`` leaves the norm multiplied by ``(12 / l) ** 0.5``.

Block 0: attention is uniform, the value of heads 0 and 1 is the token's sign, so they write the mean sign so far, and a
token that attends to itself alone its own. Neuron 0 fires where dimension 0 exceeds half of the constant and writes
dimension 7; nothing reads what head 0.1 writes but the norms.
Block 1: neurons 0 (the super neuron) and 1 fire where dimension 7 exceeds half of the constant, and write dimensions 2
and 6; neurons 2 and 3 fire for everyone, and write junk.
Block 2: every query is the constant; head 2.0 has dimension 2 as its key, head 2.1 dimension 6, head 2.2 nothing (a
decoy). Scores are 15 and more where these are written, else 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sinklens.formation import find_formation
from sinklens.pairs.pair import induced_pair
from sinklens.prompts import from_tokens
from sinklens.stages.base import Setting
from sinklens.study import Study

D_MODEL, D_MLP, LENGTH, TARGET = 12, 4, 12, 5
PLUS, MINUS = 0, 1
EDGES = {
    "head 0.0 > mlp 0 in": 1.0,
    "mlp 0 > super 1 gate": 0.5,
    "mlp 0 > mlp 1 in": 0.5,
    "super 1 > head 2.0 k": 0.5,
    "mlp 1 > head 2.1 k": 0.5,
}
"""The circuit, and what each edge alone does to the sink, in both directions; all others do nothing."""


def planted_circuit() -> Any:
    """The model, a HookedTransformer in float32."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=D_MODEL,
        n_heads=3,
        d_head=2,
        d_mlp=D_MLP,
        n_ctx=32,
        d_vocab=2,
        act_fn="relu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=1e-12,
        positional_embedding_type="standard",
        attn_scale=1.0,
        use_attn_scale=False,
        model_name="planted circuit",
        device="cpu",
        seed=0,
    )
    model: Any = HookedTransformer(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln1.w", "ln2.w", "ln_final.w")) else 0.0)
        for token, sign in ((PLUS, 1.0), (MINUS, -1.0)):
            model.embed.W_E[token, 1], model.embed.W_E[token, 3] = sign, 1.0
        first, second, third = model.blocks
        for head, dim in ((0, 0), (1, 5)):
            first.attn.W_V[head, 1, 0] = 6**-0.5  # of a token of squared length 2
            first.attn.W_O[head, 0, dim] = 1.0
        _fires(first.mlp, 0, 0, 7, 1 / 15)
        _fires(second.mlp, 0, 7, 2, 10 / 12)
        _fires(second.mlp, 1, 7, 6, 10 / 12)
        for decoy in (2, 3):
            second.mlp.W_gate[3, decoy], second.mlp.W_gate[0, decoy] = 0.5, 0.1
            second.mlp.W_in[3, decoy], second.mlp.W_out[decoy, 4] = 0.2, 0.1
        for head, dim in ((0, 2), (1, 6)):
            third.attn.W_Q[head, 3, 0], third.attn.W_K[head, dim, 0] = 1.0, 2.6
    return model.eval()


def _fires(mlp: Any, neuron: int, dim: int, to: int, written: float) -> None:
    mlp.W_gate[dim, neuron], mlp.W_gate[3, neuron], mlp.W_in[3, neuron] = 10.0, -5.0, 1.0
    mlp.W_out[neuron, to] = written


def planted_prompts() -> torch.Tensor:
    """Three prompts in which no token fires by itself: among the first six, position 5 is a plus and signs balance."""
    begin = [[MINUS, PLUS] * 3, [MINUS, MINUS, PLUS, PLUS, MINUS, PLUS], [MINUS, PLUS, PLUS, MINUS, MINUS, PLUS]]
    return torch.tensor([row + [MINUS, PLUS] * ((LENGTH - 6) // 2) for row in begin])


def planted_formation(model: Any) -> Any:
    """Its formation: block and neuron are given, and positions that are no sink before it is made."""
    batch = from_tokens(model, planted_prompts())
    found = find_formation(model, batch, layer=1, super_neurons=[0], outlier_dims=[2])
    return batch, replace(found, sink_positions=(0,) * batch.n)


def planted_setting(model: Any) -> Setting:
    """The sink that attending to itself alone makes at :data:`TARGET`."""
    batch, formation = planted_formation(model)
    return Setting(Study.of(model, batch, formation), induced_pair(model, batch, formation, TARGET), (2,))
