"""Stage 4, down-projection channeling: they write into a few residual dimensions."""

from __future__ import annotations

from torch import Generator, Tensor

from sinklens import edits, metrics
from sinklens.models.view import check_writes_directly
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import MLP_OUT
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, SPARED, Build, Experiment, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_dims, other_neurons


def _super_rows(setting: Setting, neurons: tuple[int, ...]) -> Tensor:
    check_writes_directly(setting.model, setting.formation.layer)
    return setting.weights.W_out.detach()[list(neurons)].float()


def _contribution(random_dims: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons, dims = setting.formation.neurons, setting.formation.dims
        if random_dims:
            dims = other_dims(setting, generator)
        edit = edits.NeuronContribution("outlier_dims", neurons, _super_rows(setting, neurons), dims)
        return setting.patch(direction, stage.site, stage.layers(setting), edit)

    return build


def _densify(random_neurons: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons = setting.formation.neurons
        if random_neurons:
            neurons = other_neurons(setting, generator)
        rows = _super_rows(setting, neurons)
        edit = edits.DensifyRows("densified", neurons, rows, edits.rotate_rows(rows, generator))
        return setting.patch(direction, stage.site, stage.layers(setting), setting.removal(direction, edit))

    return build


def _dominance_readout(setting: Setting, stage: Stage) -> Readout:
    return setting.readout(stage, lambda x, _layer: metrics.dominance_ratio(x))


DOWN_PROJECTION = Stage(
    name="down_projection",
    claim="Their heavy-tailed down-projections write that activation into a few residual dimensions.",
    site=MLP_OUT,
    layers=lambda setting: (setting.formation.layer,),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("outlier_dims", _contribution(False), ISOLATED),
        Experiment("outlier_dims", _contribution(True), NOTHING, control="other_dims", drawn=True),
        Experiment("densified", _densify(False), REMOVED, drawn=True),
        Experiment("densified", _densify(True), SPARED, control="random_neurons", drawn=True),
    ),
    readout=_dominance_readout,
)
