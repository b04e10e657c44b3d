"""What is measured while a model is trained, on held-out rows that are always the same.

For every block, over N = 64 rows of T = 64 tokens (fewer where rows are shorter), at position 0 and, where it is
another, at the *highest*: the position among the first T / 2 with the largest alpha (later ones have few queries left).

``loss``
    mean cross-entropy of held-out rows at full length, nats a token
``alpha``
    mean attention that a position receives from the queries at it and after it (Gu et al.), mean over rows and heads;
    positions 0 to 3 and the highest
``sink_rate``
    Sink^0.3: share of (row, head) with alpha above 0.3, by block; without a block, over all of them
``share``
    mean attention from later queries alone, the position's own left out
``missing_mass``
    1 - the mean sum of a row of attention; before all else a row is divided by the sum of its magnitudes
``entropy``
    of attention, in nats, mean over queries from the second on
``norm``, ``dominance``, ``top1_over_median``, ``kurtosis``; each also ``..._others``
    of the residual stream behind the block, at the position; the same, mean over all other positions
``effective_rank``
    of a row's residual stream [T, d_model], mean over rows
``value_norm_ratio``
    norm of the position's value over the mean of the others', all heads together
``z_variance``
    variance over rows of what W_O reads, mean over its dimensions, at positions 0, 1, 2, 4, ...
``super_neuron``, ``super_neuron_others``
    largest activation of a neuron at the position, mean over rows; the same neuron's largest elsewhere

Where data begin with BOS that is position 0, which then has no variance over rows: each of its activations is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sinklens.metrics import (
    alpha,
    attention_entropy,
    attention_received,
    dominance_ratio,
    effective_rank,
    excess_kurtosis,
    normalised_rows,
    position_variance,
    sink_rate,
    top1_over_median,
    vector_norm,
)
from sinklens.models.decoder import Decoder
from sinklens.models.view import model_shape

LENGTH, ROWS = 64, 64
"""T and N."""
FIRST = 4
"""First positions whose alpha is kept."""
COLUMNS = ("step", "tokens", "measure", "layer", "position", "value")
SITES = ("attn.hook_pattern", "attn.hook_v", "attn.hook_z", "mlp.hook_post", "hook_resid_post")


@dataclass(frozen=True)
class Measure:
    """One number."""

    measure: str
    """What was measured."""
    value: float
    """How much."""
    layer: int | None = None
    """Block, where it is one's."""
    position: int | None = None
    """Position, where it is one's."""


def watch_steps(steps: int, points: int = 40) -> tuple[int, ...]:
    """About ``points`` steps from 0 to ``steps``, closer together at the beginning."""
    return tuple(sorted({0, steps, *np.unique(np.geomspace(1, steps, points).round().astype(int)).tolist()}))


def row_loss(logits: Float[Tensor, "row pos d_vocab"], rows: Int[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the tokens after those that the logits are of: of all tokens but the first."""
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Decoder, rows: Int[Tensor, "row token"], at_once: int = 16) -> float:
    """Mean loss of rows of inputs and one token more, in nats a token."""
    parts = [row_loss(model(part[:, :-1]), part).double() * len(part) for part in rows.split(at_once)]
    return float(torch.stack(parts).sum() / len(rows))


@torch.no_grad()
def measured(model: Decoder, rows: Int[Tensor, "row token"]) -> list[Measure]:
    """Everything but the loss, of a model in eval mode, on rows of inputs and one token more."""
    tokens = rows[:ROWS, :-1][:, :LENGTH]
    layers = range(model_shape(model).n_layers)
    names = {f"blocks.{layer}.{site}" for layer in layers for site in SITES}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names, return_type=None)
    seen = {key: cache[key].float() for key in names}
    alphas = [alpha(normalised_rows(seen[f"blocks.{layer}.attn.hook_pattern"])[0]) for layer in layers]
    half = max(1, tokens.shape[1] // 2)
    highest = int(torch.stack(alphas).mean((0, 1, 2))[:half].argmax())
    found = list(_sinks(torch.stack(alphas), highest))
    for layer in layers:
        at = {site: seen[f"blocks.{layer}.{site}"] for site in SITES}
        found += _attention(layer, at, sorted({0, highest}))
        found += _residual(layer, at, sorted({0, highest}))
    return found


def _sinks(alphas: Float[Tensor, "layer row head key"], highest: int) -> Iterator[Measure]:
    yield Measure("highest", float(highest))
    for position in sorted({*range(min(FIRST, alphas.shape[-1])), highest}):
        yield Measure("sink_rate", float(sink_rate(alphas)[position]), position=position)
        for layer, of_layer in enumerate(alphas):
            yield Measure("alpha", float(of_layer.mean((0, 1))[position]), layer, position)
            yield Measure("sink_rate", float(sink_rate(of_layer)[position]), layer, position)


def _attention(layer: int, at: dict[str, Tensor], positions: list[int]) -> Iterator[Measure]:
    pattern, total = normalised_rows(at["attn.hook_pattern"])
    yield Measure("missing_mass", float(1 - total.mean()), layer)
    yield Measure("entropy", float(attention_entropy(pattern.abs())[..., 1:].mean()), layer)
    received = attention_received(pattern).mean((0, 1))
    norms = vector_norm(at["attn.hook_v"].flatten(2)).mean(0)
    for position in positions:
        others = torch.arange(len(norms)) != position
        yield Measure("share", float(received[position]), layer, position)
        yield Measure("value_norm_ratio", float(norms[position] / norms[others].mean()), layer, position)
    variance = position_variance(at["attn.hook_z"]) if len(pattern) > 1 else None
    for position in (0, *(2**i for i in range(12))):
        if variance is not None and position < len(variance):
            yield Measure("z_variance", float(variance[position]), layer, position)


def _residual(layer: int, at: dict[str, Tensor], positions: list[int]) -> Iterator[Measure]:
    resid, post = at["hook_resid_post"], at["mlp.hook_post"]
    yield Measure("effective_rank", float(effective_rank(resid).mean()), layer)
    kinds = {
        "norm": vector_norm,
        "dominance": dominance_ratio,
        "top1_over_median": top1_over_median,
        "kurtosis": excess_kurtosis,
    }
    for position in positions:
        others = torch.arange(resid.shape[1]) != position
        for name, function in kinds.items():
            values = function(resid).mean(0)
            yield Measure(name, float(values[position]), layer, position)
            yield Measure(f"{name}_others", float(values[others].mean()), layer, position)
        neuron = int(post[:, position].mean(0).abs().argmax())
        yield Measure("super_neuron", float(post[:, position, neuron].mean().abs()), layer, position)
        most = post[:, others, neuron].abs().amax(1).mean()
        yield Measure("super_neuron_others", float(most), layer, position)


def as_table(step: int, tokens: int, loss: float, found: list[Measure]) -> pd.DataFrame:
    """Measures as rows of ``watch.parquet``."""
    rows = [(step, tokens, one.measure, one.layer, one.position, one.value) for one in [Measure("loss", loss), *found]]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"layer": "Int64", "position": "Int64", "value": "float64"})
