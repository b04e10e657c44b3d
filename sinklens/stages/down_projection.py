"""Stage 4, down-projection channeling: they write into a few residual dimensions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from sinklens import edits, metrics
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import MLP_OUT, RESID_POST
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, SPARED, Build, Experiment, Need, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_dims, other_neurons
from sinklens.stages.replacements import Ends, Replace, norm_of, random_directions, replacement


def _super_rows(setting: Setting, neurons: tuple[int, ...]) -> Tensor:
    return setting.weights.W_out.detach()[list(neurons)].float()


def _contribution(random_dims: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons, dims = setting.neurons, setting.formation.dims
        if random_dims:
            dims = other_dims(setting, generator)
        edit = edits.NeuronContribution("outlier_dims", neurons, _super_rows(setting, neurons), dims)
        return setting.patch(direction, stage.site, stage.layers(setting), edit)

    return build


def _densify(random_neurons: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons = setting.neurons
        if random_neurons:
            neurons = other_neurons(setting, generator)
        rows = _super_rows(setting, neurons)
        edit = edits.DensifyRows("densified", neurons, rows, edits.rotate_rows(rows, generator))
        return setting.patch(direction, stage.site, stage.layers(setting), setting.removal(direction, edit))

    return build


def _spike_exchanged(random_dims: bool) -> Build:
    def build(setting: Setting, _stage: Stage, direction: Direction, generator: Generator) -> Patch:
        dims = other_dims(setting, generator) if random_dims else setting.formation.dims
        return setting.patch(direction, RESID_POST, _formation_block(setting), edits.Transplant(), units=dims)

    return build


def _spike(setting: Setting, ends: Ends, layer: int) -> Tensor:
    """What the run with the sink has more in the outlier dimensions of the residual stream, ``[prompt d_model]``."""
    change = ends.sink[layer] - ends.other[layer]
    return change * _marks(setting.formation.dims, change)


def _marks(dims: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros_like(like[0]).index_fill_(0, torch.tensor(dims, device=like.device), 1.0)


def _flipped(random_dims: bool) -> Replace:
    def flipped(setting: Setting, ends: Ends, layer: int, generator: Generator) -> Tensor:
        dims, x = other_dims(setting, generator) if random_dims else setting.formation.dims, ends.sink[layer]
        return x * (1 - 2 * _marks(dims, x))

    return flipped


def _elsewhere_in_the_stream(dense: bool) -> Replace:
    def moved(setting: Setting, ends: Ends, layer: int, generator: Generator) -> Tensor:
        spike, rest = _spike(setting, ends, layer), ends.sink[layer] - _spike(setting, ends, layer)
        if dense:
            return rest + norm_of(spike) * random_directions(spike, generator, one=True)
        moved = torch.zeros_like(spike)
        moved[:, list(other_dims(setting, generator))] = spike[:, list(setting.formation.dims)]
        return rest + moved

    return moved


def _formation_block(setting: Setting) -> tuple[int, ...]:
    return (setting.formation.layer,)


_replaced = partial(replacement, site=RESID_POST, layers=_formation_block)
SPIKE = (
    Experiment("spike_exchanged", _spike_exchanged(False), ISOLATED),
    Experiment("spike_exchanged", _spike_exchanged(True), NOTHING, control="other_dims", drawn=True),
    _replaced("spike_flipped", _flipped(False), REMOVED),
    _replaced("spike_flipped", _flipped(True), SPARED, control="other_dims", drawn=True),
    _replaced("dense_direction", _elsewhere_in_the_stream(True), REMOVED, drawn=True),
    # As much in as few dimensions, but others: if sparsity is what counts, that will do as well.
    _replaced("dense_direction", _elsewhere_in_the_stream(False), SPARED, control="spike_moved", drawn=True),
)
"""Experiments on the outlier dimensions of the residual stream that leaves the formation block."""


def _dominance_readout(setting: Setting, stage: Stage) -> Readout:
    return setting.readout(stage, lambda x, _layer: metrics.dominance_ratio(x))


WRITTEN = (Need("neurons_write"), Need("mlp_adds"))
"""Without these a row of W_out is not what its neuron adds to the residual stream."""

DOWN_PROJECTION = Stage(
    name="down_projection",
    claim="Their heavy-tailed down-projections write that activation into a few residual dimensions.",
    site=MLP_OUT,
    layers=lambda setting: (setting.formation.layer,),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("outlier_dims", _contribution(False), ISOLATED, needs=WRITTEN),
        Experiment("outlier_dims", _contribution(True), NOTHING, control="other_dims", drawn=True, needs=WRITTEN),
        Experiment("densified", _densify(False), REMOVED, drawn=True, needs=WRITTEN),
        Experiment("densified", _densify(True), SPARED, control="random_neurons", drawn=True, needs=WRITTEN),
        *SPIKE,
    ),
    readout=_dominance_readout,
)
