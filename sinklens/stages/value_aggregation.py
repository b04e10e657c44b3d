"""Stage 1, value aggregation: the aggregated value of a token that averages nothing is an outlier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from sinklens import edits, readouts
from sinklens.errors import NotApplicableError
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import PATTERN, Z
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, SPARED, Build, Experiment, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT
from sinklens.stages.replacements import Ends, mean_of, norm_of, random_directions, replacement, sized


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


def _deviation_exchanged(_setting: Setting, ends: Ends, layer: int, _generator: Generator) -> Tensor:
    return mean_of(ends.here, layer) + ends.there[layer] - mean_of(ends.there, layer)


def _mean_exchanged(_setting: Setting, ends: Ends, layer: int, _generator: Generator) -> Tensor:
    return mean_of(ends.there, layer) + ends.here[layer] - mean_of(ends.here, layer)


def _random_write(_setting: Setting, ends: Ends, layer: int, generator: Generator) -> Tensor:
    x = ends.sink[layer]
    return norm_of(x) * random_directions(x, generator)


REPLACED = (
    # The deviation is what varies, and the mean all the rest: the claim is about the one and not about the other.
    *sized("deviation_exchanged", _deviation_exchanged, ISOLATED, takes_away=False, varies=True),
    *sized("mean_exchanged", _mean_exchanged, NOTHING, takes_away=False),
    *sized("no_variance", lambda _, ends, layer, __: mean_of(ends.sink, layer), REMOVED, takes_away=True, varies=True),
    replacement(
        "no_variance",
        lambda _, ends, layer, __: ends.sink[layer].roll(1, 0),
        SPARED,
        control="other_prompt",
        varies=True,
    ),
    # What is written in place of the outlier: nothing, something random of its norm, what attention ordinarily writes.
    *sized("no_write", lambda _, ends, layer, __: torch.zeros_like(ends.sink[layer]), REMOVED, takes_away=True),
    *sized("random_write", _random_write, REMOVED, takes_away=True),
    *sized("ordinary_write", lambda _, ends, layer, __: mean_of(ends.other, layer), REMOVED, takes_away=True),
)
"""Experiments that replace the aggregated value, with their controls."""


def _attending(name: str, weights: Callable[[Setting, Generator], Tensor]) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        edit = edits.AttendTo(name, weights(setting, generator))
        # In the run without the sink the target may attend just so.
        return replace(setting.patch(direction, PATTERN, stage.layers(setting), edit), allow_unchanged=True)

    return build


def _earlier(setting: Setting) -> Tensor:
    """Marks the tokens ``[prompt, key]`` before the target.

    Raises:
        NotApplicableError: there are none.
    """
    target = setting.pair.target.single(setting.batch.n)
    if (target == 0).any():
        raise NotApplicableError("the first token has no earlier ones to attend to")
    return (torch.arange(setting.batch.length) < target[:, None]).float()


def _one_source(setting: Setting, generator: Generator) -> Tensor:
    """One earlier token for every prompt, not the sink where there is another."""
    marks = _earlier(setting)
    others = marks.scatter(1, setting.study.sinks[:, None], 0.0)
    marks = torch.where(others.sum(-1, keepdim=True) > 0, others, marks)
    drawn = torch.multinomial(marks, 1, generator=generator)
    return torch.zeros_like(marks).scatter(1, drawn, 1.0)


def _all_but_itself(setting: Setting, ends: Ends, layer: int, _generator: Generator) -> Tensor:
    """What attention ordinarily is at the target, without the token itself."""
    earlier = ends.other[layer] * _earlier(setting)[:, None].to(ends.other[layer])
    return earlier / earlier.sum(-1, keepdim=True)


def _all_sources(setting: Setting, _generator: Generator) -> Tensor:
    """All tokens up to the target, evenly."""
    marks = _earlier(setting).scatter(1, setting.pair.target.single(setting.batch.n)[:, None], 1.0)
    return marks / marks.sum(-1, keepdim=True)


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
        *REPLACED,
        # A value of another token is as little averaged as the token's own.
        Experiment("one_source", _attending("one_source", _one_source), SPARED),
        replacement("one_source", _all_but_itself, REMOVED, control="all_but_itself", site=PATTERN),
        Experiment("one_source", _attending("all_sources", _all_sources), REMOVED, control="all_sources"),
    ),
    readout=_value_readout,
)
