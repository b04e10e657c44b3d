"""Stage 4, down-projection channeling: they write into a few residual dimensions."""

from __future__ import annotations

from torch import Generator, Tensor

from sinklens import edits, metrics
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import MLP_OUT
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, SPARED, Build, Experiment, Need, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_dims, other_neurons


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
    ),
    readout=_dominance_readout,
)
