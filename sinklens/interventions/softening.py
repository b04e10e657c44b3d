"""Softening: dimensions of the massive token's normalised state are scaled down where attention reads it.

From the formation block on (the massive-emergence layer of "A Single Layer to Explain Them All", ICML 2026), at the
sink token, in what leaves the norm before attention,

    x_d <- (1 - amount) x_d    for d among k = rate * d_model dimensions.

The released code takes the k largest ``|x_d|`` of that token in every block (``by="activation"``), with amount 1; the
paper chooses them by the weights of the block, by an equation that it does not print. Ours for ``by="weight"`` are the
dimensions to which the formation block's down-projection writes most, ``sum_n W_out[n, d]^2``. ``by="random"`` is the
control: as many dimensions, drawn. The rate is ours too (the code's default, 0, masks nothing); masking everything is
said to be catastrophic, and less to be best.

Pitfall: where the norm adds a bias behind its scale (LayerNorm), that bias is not attenuated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from sinklens import edits
from sinklens.errors import InputError
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.models.identities import block_weights, require
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_shape
from sinklens.patches import Patch, Where
from sinklens.records.integers import whole_numbers
from sinklens.records.ranges import Between, check_number
from sinklens.sites import LN1_NORMALIZED
from sinklens.statistics import generator

Selection = Literal["activation", "weight", "random"]
RATE = 0.1
"""Share of the dimensions, by default."""


@in_usual_state
def soften(
    model: Model,
    formation_block: int,
    positions: Where = (0,),
    *,
    layers: Sequence[int] | None = None,
    rate: float = RATE,
    amount: float = 1.0,
    by: Selection = "activation",
    seed: int = 0,
) -> Hooks:
    """Attenuate a share of the dimensions of some tokens in front of attention.

    Args:
        model: the model.
        formation_block: the block in which the massive activations emerge.
        positions: the tokens, each prompt's sink.
        layers: blocks in which they are softened; by default that one and all behind it, as in the released code.
        rate: share of the dimensions.
        amount: how much of them is taken away.
        by: which dimensions.
        seed: fixes those that are drawn.

    Raises:
        InputError: a rate that is no share, another way to choose.
        NotApplicableError: no norm stands before attention.
    """
    if by not in get_args(Selection):
        raise InputError(f"by {by!r}: choose {', '.join(get_args(Selection))}")
    check_number("rate", rate, Between(0, 1))
    shape = model_shape(model)
    blocks = tuple(range(formation_block, shape.n_layers)) if layers is None else whole_numbers(layers, "layers")
    require(model, "norm_before_attention", blocks)
    k, name = max(1, round(rate * shape.d_model)), f"softened/{by}"
    if by == "activation":
        weights = {layer: block_weights(model, layer).ln1_w.detach().float() for layer in blocks}
        edit = edits.Attenuate(name, amount, k=k, weights=weights)
    else:
        edit = edits.Attenuate(name, amount, dims=_dims(model, formation_block, k, by, seed))
    return hooks_of(Patch(LN1_NORMALIZED, blocks, positions, edit))


def _dims(model: Model, block: int, k: int, by: Selection, seed: int) -> tuple[int, ...]:
    if by == "random":
        drawn = torch.randperm(model_shape(model).d_model, generator=generator(seed, "softening"), device="cpu")
        return tuple(sorted(drawn[:k].tolist()))
    written = block_weights(model, block).W_out.detach().float().pow(2).sum(0)
    return tuple(sorted(written.topk(k).indices.tolist()))
