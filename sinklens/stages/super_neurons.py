"""Stage 3, super neurons: a few neurons of the formation block fire for that token alone."""

from __future__ import annotations

import torch
from torch import Generator

from sinklens import edits
from sinklens.edits.draws import others
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import MLP_POST
from sinklens.stages.base import NOTHING, REMOVED, SPARED, Build, Experiment, Need, Setting, Stage
from sinklens.stages.controls import TRANSPLANT, other_neurons


def _other_neurons(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    units = other_neurons(setting, generator)
    return setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), units=units)


def _all_the_others(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    units = others(setting.shape.d_mlp, setting.neurons, generator)
    return setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), units=units)


def _ablation_edit(setting: Setting, mode: str, generator: Generator) -> edits.Edit:
    layer = setting.formation.layer
    if mode == "zero":
        return edits.Constant("zero")
    values = setting.ordinary(MLP_POST, layer, (layer,))
    if mode == "mean":
        return edits.Constant("mean", {layer: values.mean(0)})
    drawn = torch.randint(len(values), (setting.batch.n,), generator=generator)
    return edits.PerPrompt("resample", {layer: values[drawn.to(values.device)]})


def _ablate(mode: str, random_units: bool = False) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons = setting.neurons
        if random_units:
            neurons = other_neurons(setting, generator)
        edit = setting.removal(direction, _ablation_edit(setting, mode, generator), within=neurons)
        units = neurons if direction == "noise" else None
        return setting.patch(direction, stage.site, stage.layers(setting), edit, units=units)

    return build


def _neuron_readout(setting: Setting, stage: Stage) -> Readout:
    neurons = list(setting.neurons)
    return setting.readout(stage, lambda x, _layer: x[:, neurons].float().abs().mean(-1))


SUPER_NEURONS = Stage(
    name="super_neurons",
    claim="A few neurons of the formation block fire massively for that token alone.",
    site=MLP_POST,
    layers=lambda setting: (setting.formation.layer,),
    units=lambda setting: setting.neurons,
    needs=(Need("dense_mlp"),),
    experiments=(
        TRANSPLANT,
        Experiment("transplant", _other_neurons, NOTHING, control="random_neurons", drawn=True),
        Experiment("transplant", _all_the_others, NOTHING, control="all_the_others"),
        *(
            item
            for mode in ("zero", "mean", "resample")
            for item in (
                Experiment(mode, _ablate(mode), REMOVED, drawn=mode == "resample"),
                Experiment(mode, _ablate(mode, True), SPARED, control="random_neurons", drawn=True),
            )
        ),
    ),
    readout=_neuron_readout,
)
