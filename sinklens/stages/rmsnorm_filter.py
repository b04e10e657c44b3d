"""Stage 5, RMSNorm as a directional filter: the outlier dimensions dominate what attention sees."""

from __future__ import annotations

from torch import Generator

from sinklens import edits, metrics
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import LN1_NORMALIZED
from sinklens.stages.base import REMOVED, SPARED, Build, Experiment, Need, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_dims


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


def _energy_readout(setting: Setting, stage: Stage) -> Readout:
    dims = setting.formation.dims
    return setting.readout(stage, lambda x, _layer: metrics.energy_share(x, dims), layers=setting.readout_layers)


RMSNORM_FILTER = Stage(
    name="rmsnorm_filter",
    claim="With one dominating dimension the norm turns the token's input into nearly a constant vector.",
    site=LN1_NORMALIZED,
    layers=lambda setting: setting.after_formation,
    needs=(Need("norm_before_attention"),),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("dims_removed", _drop_dims(False, False), REMOVED),
        Experiment("dims_removed", _drop_dims(False, True), SPARED, control="other_dims", drawn=True),
        Experiment("denominator_only", _drop_dims(True, False), REMOVED),
        Experiment("denominator_only", _drop_dims(True, True), SPARED, control="other_dims", drawn=True),
    ),
    readout=_energy_readout,
)
