"""What a stage is, and the experiments that every stage can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator

from sinklens import edits
from sinklens.errors import InputError
from sinklens.pairs import Direction
from sinklens.patches import Patch, Readout, per_prompt_index
from sinklens.setting import Setting
from sinklens.sites import HookSite

Build = Callable[[Setting, "Stage", Direction, Generator], Patch]
Prediction = tuple[float, float]

ISOLATED: Prediction = (1.0, 1.0)
"""Effects (denoise, noise) that the claim predicts when only the mechanism is carried over."""
REMOVED: Prediction = (0.0, 1.0)
"""And when only the mechanism is taken away."""
NOTHING: Prediction = (0.0, 0.0)
"""Control of an isolating edit: what is carried over is beside the point."""
SPARED: Prediction = (1.0, 0.0)
"""Control of a removing edit: what is taken away is beside the point."""


@dataclass(frozen=True)
class Experiment:
    """One edit of a stage, or a control of one."""

    edit: str
    """Name of the edit."""
    build: Build
    """``(setting, stage, direction, generator) -> Patch``."""
    predicted: Prediction
    """(denoise, noise) effect if the claim holds."""
    control: str = ""
    """What it is a control by; empty for the effect itself."""
    drawn: bool = False
    """Whether it has a random draw, and is repeated over several."""


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    """Short name."""
    claim: str
    """The claim, in one sentence."""
    site: HookSite
    """Where the effect passes."""
    layers: Callable[[Setting], tuple[int, ...]]
    """In which blocks."""
    experiments: tuple[Experiment, ...]
    """Transplant, mechanism edits and controls."""
    readout: Callable[[Setting, Stage], Readout]
    """How far the stage has gone, as one number for every prompt."""
    units: Callable[[Setting], tuple[int, ...] | None] = lambda _setting: None
    """Which units of the site; ``None``: all."""


STAGES: dict[str, Stage] = {}
"""Stages by name, for the command line; :func:`sinklens.run_chain` takes stages themselves and needs no registry."""


def register(stage: Stage) -> Stage:
    """Make ``stage`` known by its name.

    Raises:
        ValueError: when another stage has that name.
    """
    if stage.name in STAGES and STAGES[stage.name] is not stage:
        raise ValueError(f"a stage named {stage.name!r} is already registered")
    STAGES[stage.name] = stage
    return stage


def _transplant(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), units=stage.units(setting))


def _elsewhere(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    positions = other_positions(setting, generator)
    layers = stage.layers(setting)
    edit = edits.Transplant()
    patch = setting.patch(direction, stage.site, layers, edit, units=stage.units(setting), positions=positions)
    # The pair may not reach other positions by this block at all: then there is nothing to exchange, and no effect.
    return replace(patch, allow_unchanged=True)


def other_positions(setting: Setting, generator: Generator) -> tuple[tuple[int, ...], ...]:
    """An ordinary position of every prompt, after the target where there is one: earlier ones cannot differ."""
    marks = setting.pair.ordinary.clone()
    target = per_prompt_index(setting.pair.target, setting.batch.n)
    later = marks * (torch.arange(marks.shape[1]) > target[:, None])
    later[torch.arange(len(later)), per_prompt_index(setting.pair.reference, setting.batch.n)] = 0
    marks = torch.where(later.sum(-1, keepdim=True) > 0, later, marks)
    return tuple((p,) for p in torch.multinomial(marks, 1, generator=generator).flatten().tolist())


TRANSPLANT = Experiment("transplant", _transplant, ISOLATED)
"""Exchange the stage's activation at the target with the other run's."""
ELSEWHERE = Experiment("transplant", _elsewhere, NOTHING, control="other_position")
"""The same exchange at an ordinary position, another one in every prompt."""


def others(n: int, chosen: tuple[int, ...], generator: Generator, size: int | None = None) -> tuple[int, ...]:
    """Indices below ``n`` that are not ``chosen``: all, or ``size`` of them drawn at random.

    Raises:
        InputError: when there are not as many.
    """
    left = torch.tensor([i for i in range(n) if i not in set(chosen)])
    if size is None:
        return tuple(left.tolist())
    if size > len(left):
        raise InputError(f"a control of {size} other units was asked for, but only {len(left)} of {n} are left")
    return tuple(sorted(left[torch.randperm(len(left), generator=generator)[:size]].tolist()))


def other_neurons(setting: Setting, generator: Generator) -> tuple[int, ...]:
    """As many neurons of the formation block as there are super neurons, drawn from the others."""
    neurons = setting.formation.neurons
    return others(setting.shape.d_mlp, neurons, generator, len(neurons))


def other_dims(setting: Setting, generator: Generator) -> tuple[int, ...]:
    """As many residual dimensions as there are outlier dimensions, drawn from the others."""
    dims = setting.formation.dims
    return others(setting.shape.d_model, dims, generator, len(dims))
