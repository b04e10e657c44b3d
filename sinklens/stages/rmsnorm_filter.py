"""Stage 5, RMSNorm as a directional filter: the outlier dimensions dominate what attention sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator

from sinklens import edits, metrics
from sinklens.edits.draws import others
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import LN1_NORMALIZED
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, SPARED, Build, Experiment, Need, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_dims
from sinklens.stages.replacements import mean_of, replacement


def _drop_dims(denominator_only: bool, random_dims: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        dims = setting.formation.dims
        if random_dims:
            dims = other_dims(setting, generator)
        name = "denominator_only" if denominator_only else "dims_removed"
        shape = setting.shape
        edit = edits.DropDimsBeforeNorm(name, dims, shape.norm_eps, shape.norm == "layer", denominator_only)
        return setting.patch(direction, stage.site, stage.layers(setting), setting.removal(direction, edit))

    return build


def largest_dims(setting: Setting, layers: Sequence[int], m: int) -> dict[int, tuple[int, ...]]:
    """Per block, the ``m`` dimensions that are largest in the sink's input as attention sees it: behind the norm's
    weight, mean magnitude over prompts.
    """
    found = {}
    for layer, x in setting.at(setting.pair.with_sink, LN1_NORMALIZED, layers).items():
        size = (x * setting.study.weights(layer).ln1_w.detach().to(x)).abs().mean(0)
        found[layer] = tuple(size.topk(min(m, len(size))).indices.tolist())
    return found


def only_dims(name: str, dims: Mapping[int, tuple[int, ...]], d_model: int) -> edits.Masked:
    """An edit that exchanges some dimensions alone, in every block its own."""
    masks = {
        layer: torch.zeros(d_model).index_fill_(0, torch.tensor(chosen, dtype=torch.long), 1.0)
        for layer, chosen in dims.items()
    }
    return edits.Masked(name, masks)


def _largest(random_dims: bool) -> Build:
    """As many of the largest dimensions as there are outlier dimensions."""

    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        layers, d_model = stage.layers(setting), setting.shape.d_model
        dims = largest_dims(setting, layers, len(setting.formation.dims))
        if random_dims:
            dims = {layer: others(d_model, top, generator, len(top)) for layer, top in dims.items()}
        return setting.patch(direction, stage.site, layers, only_dims("largest_dims", dims, d_model))

    return build


CONSTANT = (
    replacement("constant_input", lambda _, ends, layer, __: mean_of(ends.sink, layer), SPARED, varies=True),
    replacement(
        "constant_input", lambda _, ends, layer, __: mean_of(ends.other, layer), REMOVED, control="ordinary_input"
    ),
)
"""The same input in every prompt: the mean over prompts with the sink, and as a control the one without."""


def _energy_readout(setting: Setting, stage: Stage) -> Readout:
    dims = setting.formation.dims
    return setting.readout(stage, lambda x, _layer: metrics.energy_share(x, dims), layers=setting.readout_layers)


RMSNORM_FILTER = Stage(
    name="rmsnorm_filter",
    claim="With one dominating dimension the norm turns the token's input into nearly a constant vector.",
    site=LN1_NORMALIZED,
    layers=lambda setting: setting.through_readout,
    needs=(Need("norm_before_attention"),),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("dims_removed", _drop_dims(False, False), REMOVED),
        Experiment("dims_removed", _drop_dims(False, True), SPARED, control="other_dims", drawn=True),
        Experiment("denominator_only", _drop_dims(True, False), REMOVED),
        Experiment("denominator_only", _drop_dims(True, True), SPARED, control="other_dims", drawn=True),
        *CONSTANT,
        Experiment("largest_dims", _largest(False), ISOLATED),
        Experiment("largest_dims", _largest(True), NOTHING, control="other_dims", drawn=True),
    ),
    readout=_energy_readout,
)
