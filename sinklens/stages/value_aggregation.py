"""Stage 1, value aggregation: the aggregated value of a token that averages nothing is an outlier."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator

from sinklens import edits, readouts
from sinklens.errors import NotApplicableError
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import Z
from sinklens.stages.base import ISOLATED, NOTHING, Experiment, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT


def _moment_match(setting: Setting, stage: Stage, direction: Direction) -> edits.Rescale:
    layers = stage.layers(setting)
    run, _ = setting.pair.ends(direction)
    here = setting.pair.without if direction == "denoise" else setting.pair.with_sink
    if direction == "denoise":
        sinks = tuple((p,) for p in setting.formation.sink_positions)
        goal = setting.spread(replace(here, positions=None), stage.site, layers, sinks)
    else:
        goal = setting.spread(setting.pair.without, stage.site, layers)
    now = setting.spread(replace(here, run=run), stage.site, layers)
    mean = {layer: now[layer][0] for layer in layers}
    scale = {}
    for layer in layers:
        sigma = now[layer][1]
        # What does not vary over prompts has no deviation to rescale, nor has what varies by rounding alone: leave it.
        varies = (sigma > 1e-6 * sigma.mean()) & (sigma.mean() > 1e-5 * mean[layer].abs().mean())
        scale[layer] = torch.where(varies, goal[layer][1] / sigma.clamp_min(1e-30), 1.0)
    if all((factor == 1).all() for factor in scale.values()):
        raise NotApplicableError(
            "the aggregated value at the target does not vary over these prompts, which are the same up to there, so "
            "there are no moments to match: choose a target behind what the prompts share"
        )
    return edits.Rescale("moment_match", mean, scale)


def _moments(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(direction, stage.site, stage.layers(setting), _moment_match(setting, stage, direction))


def _same_norm(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    edit = edits.SameNormScaling(of=_moment_match(setting, stage, direction))
    return setting.patch(direction, stage.site, stage.layers(setting), edit)


def _value_readout(setting: Setting, stage: Stage) -> Readout:
    layers = stage.layers(setting)
    statistics = setting.ordinary_moments(stage.site, layers)
    return readouts.deviation(stage.name, stage.site, layers, setting.pair.target, setting.batch.n, statistics)


VALUE_AGGREGATION = Stage(
    name="value_aggregation",
    claim="The aggregated value of a token that averages nothing is a high-variance outlier.",
    site=Z,
    layers=lambda setting: setting.up_to_formation,
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("moment_match", _moments, ISOLATED),
        Experiment("moment_match", _same_norm, NOTHING, control="same_norm"),
    ),
    readout=_value_readout,
)
