"""Experiments that put something computed in the place of an activation, prompt by prompt.

What is put there is made of the activation at the target in both runs of the pair. The control of each is a change of
equal size in a random direction, drawn for every prompt: it says how much of an effect is due to the activation having
been moved at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from sinklens import edits
from sinklens.errors import NotApplicableError
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.sites import HookSite
from sinklens.stages.base import NOTHING, SPARED, Experiment, Prediction, Setting, Stage, Vectors


@dataclass(frozen=True, eq=False)
class Ends:
    """An activation at the target in the two runs of a pair, each captured when it is asked for."""

    setting: Setting
    """The pair and the prompts."""
    direction: Direction
    """Which of the two is patched."""
    site: HookSite
    """Where."""
    layers: tuple[int, ...]
    """In which blocks."""

    @cached_property
    def sink(self) -> Vectors:
        """In the run with the sink."""
        return self.setting.at(self.setting.pair.with_sink, self.site, self.layers)

    @cached_property
    def other(self) -> Vectors:
        """In the run without; of the natural sink, at an ordinary position."""
        return self.setting.at(self.setting.pair.without, self.site, self.layers)

    @property
    def here(self) -> Vectors:
        """In the run that is patched."""
        return self.other if self.direction == "denoise" else self.sink

    @property
    def there(self) -> Vectors:
        """In the run that it would become."""
        return self.sink if self.direction == "denoise" else self.other


Replace = Callable[[Setting, Ends, int, Generator], Tensor]
"""``(setting, ends, block, generator) -> [prompt, unit, ...]``: what is put in the place of the activation."""


def mean_of(vectors: Vectors, layer: int) -> Tensor:
    """The mean over prompts, for each of them."""
    return vectors[layer].mean(0, keepdim=True).expand_as(vectors[layer])


def norm_of(x: Tensor) -> Tensor:
    """The norm of each prompt's activation over all units, to be multiplied with one."""
    return x.flatten(1).norm(dim=-1).view(-1, *[1] * (x.ndim - 1))


def random_directions(like: Tensor, generator: Generator, *, one: bool = False) -> Tensor:
    """Random vectors of norm 1 in the shape of ``like``: of every prompt its own, or ``one`` for all."""
    drawn = torch.randn((1, *like.shape[1:]) if one else like.shape, generator=generator, dtype=torch.float32)
    return (drawn / norm_of(drawn)).to(like).expand_as(like)


def replacement(
    name: str,
    replace: Replace,
    predicted: Prediction,
    control: str = "",
    *,
    drawn: bool = False,
    varies: bool = False,
    site: HookSite | None = None,
    layers: Callable[[Setting], tuple[int, ...]] | None = None,
) -> Experiment:
    """An experiment that replaces the activation at the target.

    Args:
        name: name of the edit.
        replace: what is put in the activation's place.
        predicted: what the stage's claim says of it.
        control: what it is a control by, if it is one.
        drawn: whether ``replace`` draws.
        varies: whether it is about what varies over prompts, and says nothing where nothing does.
        site: where, in place of the stage's own site.
        layers: in which blocks, in place of the stage's own.
    """

    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        found = Ends(setting, direction, site or stage.site, (layers or stage.layers)(setting))
        if varies:
            _check_varies(name, setting)
        return _patch(name, found, {layer: replace(setting, found, layer, generator) for layer in found.layers})

    return Experiment(name, build, predicted, control, drawn)


def sized(
    name: str,
    replace: Replace,
    predicted: Prediction,
    *,
    takes_away: bool,
    drawn: bool = False,
    varies: bool = False,
) -> tuple[Experiment, Experiment]:
    """A :func:`replacement`, and its control: a change of equal size in a random direction.

    ``takes_away`` says whether it is the activation with the sink that is changed, in whichever run: then its control
    should neither lose nor restore anything. Else something is carried over, and the control carries nothing.
    """

    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        found, values = Ends(setting, direction, stage.site, stage.layers(setting)), {}
        if varies:
            _check_varies(name, setting)
        for layer, x in (found.sink if takes_away else found.here).items():
            size = norm_of(replace(setting, found, layer, generator) - x)
            values[layer] = x + size * random_directions(x, generator)
        return _patch(name, found, values)

    beside = SPARED if takes_away else NOTHING
    control = Experiment(name, build, beside, control="random_change")
    return replacement(name, replace, predicted, drawn=drawn, varies=varies), control


def _check_varies(name: str, setting: Setting) -> None:
    if not setting.study.varies_at(setting.pair.target.single(setting.batch.n)):
        raise NotApplicableError(
            f"{name} cannot be tried: all prompts are the same up to the target (behind one BOS, say), so "
            "nothing there varies over prompts"
        )


def _patch(name: str, found: Ends, values: Vectors) -> Patch:
    # Where the two runs do not differ in what is exchanged, the effect of exchanging it is 0.
    patch = found.setting.patch(found.direction, found.site, found.layers, edits.PerPrompt(name, values))
    return dataclasses.replace(patch, allow_unchanged=True)
