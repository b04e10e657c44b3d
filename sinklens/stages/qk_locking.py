"""Stage 6, QK locking: the key meets the principal direction of the queries."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Generator, Tensor

from sinklens import edits, metrics
from sinklens.errors import NotApplicableError
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from sinklens.sites import K, Q, V
from sinklens.stages.base import NOTHING, REMOVED, SPARED, Build, Experiment, Setting, Stage
from sinklens.stages.controls import TRANSPLANT
from sinklens.stages.replacements import Ends, mean_of, replacement


def query_directions(setting: Setting, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Per block, for every key head ``[kv_head d_head]``, the principal direction of the queries that meet it.

    Activation queries before rotary embedding, of ordinary positions in the run without the sink; the query heads that
    share a key head are pooled; the sign makes the product with the mean query positive.
    """
    groups = setting.shape.n_heads // setting.shape.n_kv_heads
    found = {}
    for layer in layers:
        queries = setting.ordinary(Q, layer, layers)
        by_key_head = rearrange(queries, "place (kv_head group) d_head -> kv_head (place group) d_head", group=groups)
        found[layer] = torch.stack([metrics.principal_direction(head) for head in by_key_head])
    return found


def _drop_direction(random_direction: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        layers = stage.layers(setting)
        if random_direction:
            size = (setting.shape.n_kv_heads, setting.shape.d_head)
            drawn = {layer: torch.randn(size, generator=generator) for layer in layers}
            directions = {layer: x / x.norm(dim=-1, keepdim=True) for layer, x in drawn.items()}
        else:
            directions = query_directions(setting, layers)
        edit = edits.RemoveDirection("query_direction_removed", directions)
        return setting.patch(direction, stage.site, layers, setting.removal(direction, edit))

    return build


def _value_instead(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(direction, V, stage.layers(setting), edits.Transplant())


def _random_key(_setting: Setting, ends: Ends, layer: int, generator: Generator) -> Tensor:
    key = mean_of(ends.sink, layer)
    drawn = torch.randn(key.shape[1:], generator=generator).to(key)
    return (drawn / drawn.norm(dim=-1, keepdim=True) * key.norm(dim=-1, keepdim=True)).expand_as(key)


def _natural_key(setting: Setting, ends: Ends, layer: int, _generator: Generator) -> Tensor:
    if setting.pair.is_natural:
        raise NotApplicableError("the natural sink's own key is what is there already")
    sinks = Source(setting.pair.without.run, setting.study.sink)
    return mean_of(setting.at(sinks, K, QK_LOCKING.layers(setting)), layer).expand_as(ends.sink[layer])


CONSTANT = (
    # Every prompt gets the same key: if keys are locked, which prompt it comes from does not count.
    replacement("constant_key", lambda _, ends, layer, __: mean_of(ends.sink, layer), SPARED, varies=True),
    replacement("constant_key", _random_key, REMOVED, control="random_key", drawn=True),
    replacement("constant_key", lambda _, ends, layer, __: mean_of(ends.other, layer), REMOVED, control="ordinary_key"),
    replacement("constant_key", lambda _, ends, layer, __: torch.zeros_like(ends.sink[layer]), REMOVED, control="zero"),
    replacement("natural_key", _natural_key, SPARED),
    replacement("natural_key", _random_key, REMOVED, control="random_key", drawn=True),
)
"""One key for all prompts: with the sink, without, of the same norm in a random direction per head, zero, and that of
the sink which the data has."""


def _locking_readout(setting: Setting, stage: Stage) -> Readout:
    directions = query_directions(setting, stage.layers(setting))
    return setting.readout(
        stage,
        lambda x, layer: metrics.cosine(x, directions[layer].to(x.device)).mean(-1),
        layers=setting.readout_layers,
    )


QK_LOCKING = Stage(
    name="qk_locking",
    claim="The token's key is then locked to the principal direction of the queries.",
    site=K,
    layers=lambda setting: setting.through_readout,
    experiments=(
        TRANSPLANT,
        Experiment("transplant", _value_instead, NOTHING, control="value"),
        Experiment("query_direction_removed", _drop_direction(False), REMOVED),
        Experiment("query_direction_removed", _drop_direction(True), SPARED, control="random_direction", drawn=True),
        *CONSTANT,
    ),
    readout=_locking_readout,
)
