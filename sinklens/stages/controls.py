"""The experiments that every stage can use, and what their controls take in the place of what the claim names."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator

from sinklens import edits
from sinklens.pairs.ablations import EditLike, read_edit
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.stages.base import ISOLATED, NOTHING, Build, Experiment, Setting, Stage


def _elsewhere(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    positions = other_positions(setting, generator)
    layers = stage.layers(setting)
    edit = edits.Transplant()
    patch = setting.patch(direction, stage.site, layers, edit, units=stage.units(setting), positions=positions)
    # The pair may not reach other positions by this block at all: then there is nothing to exchange, and no effect.
    return replace(patch, allow_unchanged=True)


def edited(edit: EditLike) -> Build:
    """What an :class:`Experiment` is built by that puts ``edit`` on the stage's own units at the target.

    An edit that is drawn (``resample``) is another one in every draw of the experiment.

    Args:
        edit: an edit, or the name of one, such as ``"mean"`` (:data:`sinklens.pairs.EDITS`).

    Raises:
        InputError: an unknown name.
    """
    wanted = read_edit(edit)

    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        layers = stage.layers(setting)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        made = setting.edit(direction, wanted, stage.site, layers, seed=seed)
        return setting.patch(direction, stage.site, layers, made, units=stage.units(setting))

    return build


def other_positions(setting: Setting, generator: Generator) -> tuple[tuple[int, ...], ...]:
    """An ordinary position of every prompt, after the target where there is one: earlier ones cannot differ."""
    marks = setting.pair.ordinary.clone()
    target = setting.pair.target.single(setting.batch.n)
    later = marks * (torch.arange(marks.shape[1]) > target[:, None])
    later[torch.arange(len(later)), setting.pair.reference.single(setting.batch.n)] = 0
    marks = torch.where(later.sum(-1, keepdim=True) > 0, later, marks)
    return tuple((p,) for p in torch.multinomial(marks, 1, generator=generator).flatten().tolist())


TRANSPLANT = Experiment("transplant", edited(edits.Transplant()), ISOLATED)
"""Exchange the stage's activation at the target with the other run's."""


ELSEWHERE = Experiment("transplant", _elsewhere, NOTHING, control="other_position")
"""The same exchange at an ordinary position, another one in every prompt."""


def other_neurons(setting: Setting, generator: Generator) -> tuple[int, ...]:
    """As many neurons of the formation block as there are super neurons, drawn from the others."""
    return setting.study.draw_neurons(generator)


def other_dims(setting: Setting, generator: Generator) -> tuple[int, ...]:
    """As many residual dimensions as there are outlier dimensions, drawn from the others."""
    return setting.study.draw_dims(generator)
