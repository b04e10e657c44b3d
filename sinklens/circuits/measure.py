"""Effects on the sink: the metric of many patches, as shares of what the pair does to it, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sinklens.chain.scoring import ORDINARY, SINK, Gap, ends
from sinklens.engine.run import PatchResult, PatchRunner
from sinklens.errors import InputError, NoSinkError
from sinklens.pairs.choice import Direction
from sinklens.pairs.effects import MIN_GAP, effect
from sinklens.patches import Patch
from sinklens.readouts.base import PositionReadout, Readout
from sinklens.readouts.named import NamedReadout
from sinklens.sites import PATTERN
from sinklens.stages.base import Setting
from sinklens.statistics import N_RESAMPLES, drawn_prompts

Effects = Float[np.ndarray, "thing prompt"]
CHUNK = 2048
"""Rows of effects whose resampled means are held at once."""


@dataclass(eq=False)
class Measure:
    """What runs patches and says what they do to the sink of a setting."""

    setting: Setting
    """The runs with and without the sink."""
    metric: NamedReadout
    """What is measured of it."""
    min_gap: float = MIN_GAP
    """Least difference between the pair's runs; prompts with less are excluded."""
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    """Patches, rows and seconds by what they were run for."""

    def __post_init__(self) -> None:
        self.readouts = _readouts(self.setting, self.metric)
        self.runner: PatchRunner = self.setting.study.runner(self.readouts, self.setting.pair.runs)
        self.gap = Gap(self.metric.name, self.metric.is_share, self.min_gap)
        self.runs = {
            run: {name: x.numpy() for name, x in found.items()} for run, found in self.runner.run_values.items()
        }
        start, end = self.ends(self.setting.pair.directions[-1])
        if not np.isfinite(self.as_effects(start, start, end)).any():
            raise NoSinkError(
                f"there is no sink to explain at the target: {self.metric.name} is {start.mean():.4f} with and "
                f"{end.mean():.4f} without it (mean over prompts), and no prompt differs by {self.min_gap} or more"
            )

    def ends(self, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
        """The metric of every prompt in the run that is patched, and in the run that it would become."""
        held = PatchResult({}, self._as_tensors, None)  # type: ignore[arg-type]
        return ends(held, self.setting.pair, SINK, direction)

    @property
    def _as_tensors(self) -> Any:
        return {run: {name: torch.from_numpy(x) for name, x in found.items()} for run, found in self.runs.items()}

    def effects(self, patches: Sequence[Patch], direction: Direction, what: str) -> Effects:
        """The effect of every patch on every prompt: 1 where it does all that the pair does, 0 where nothing."""
        start, end = self.ends(direction)
        return self.as_effects(self.values(patches, what), start, end)

    def shares(self, patches: Sequence[Patch], what: str) -> Effects:
        """How much of the sink is left under every patch: 1 as in the run with it, 0 as in the one without."""
        return self.as_shares(self.values(patches, what))

    def as_shares(self, values: Effects) -> Effects:
        """The same of values of the metric."""
        with_sink, without = self.ends("noise")
        return self.as_effects(values, without, with_sink)

    def values(self, patches: Sequence[Patch], what: str) -> Effects:
        """The metric under every patch; the cost is noted under ``what``."""
        if not patches:
            return np.zeros((0, self.setting.batch.n))
        result = self.runner.run(patches, self.setting.study.progress)
        cost = self.cost.setdefault(what, {"patches": 0, "rows": 0, "seconds": 0.0})
        stats = result.stats
        for name, more in (("patches", stats.n_patches), ("rows", stats.n_rows), ("seconds", stats.seconds)):
            cost[name] += more
        return result.values[SINK].numpy()

    def as_effects(self, values: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How far values of the metric are from ``start`` to ``end``; NaN in prompts that are excluded."""
        return effect(values, start, end, self.gap.between(start, end))

    def means(self, effects: Effects) -> list[dict[str, float]]:
        """Mean over prompts with its interval, for every row: ``effect``, ``ci_low``, ``ci_high``, ``n``,
        ``n_excluded``.
        """
        study = self.setting.study
        there = np.isfinite(effects).all(0)
        found, groups = effects[:, there], study.groups_of(np.nonzero(there)[0].tolist())
        low, high = intervals(found, study.seed, groups)
        n, n_excluded = int(there.sum()), int((~there).sum())
        middle = found.mean(1) if n else np.full(len(found), np.nan)
        return [
            {"effect": float(m), "ci_low": float(a), "ci_high": float(b), "n": n, "n_excluded": n_excluded}
            for m, a, b in zip(middle, low, high, strict=True)
        ]


def intervals(values: Effects, seed: int, groups: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of the means over prompts of many rows, with the same resamples for all."""
    nothing = np.full(len(values), np.nan)
    drawn = drawn_prompts(values.shape[1], seed, N_RESAMPLES, groups) if values.shape[1] else None
    if drawn is None:
        return nothing, nothing.copy()
    times = np.concatenate([(rows[:, :, None] == np.arange(values.shape[1])).mean(1) for rows in drawn])
    ends = [
        np.percentile(values[first : first + CHUNK] @ times.T, [2.5, 97.5], axis=1)
        for first in range(0, len(values), CHUNK)
    ]
    low, high = np.concatenate(ends, axis=1) if ends else (nothing, nothing)
    return low, high


def _readouts(setting: Setting, metric: NamedReadout) -> list[Readout]:
    """The metric at the target; for the natural sink also at ordinary positions, in place of a run without it.

    Raises:
        InputError: it is not of attention, or has no value at ordinary positions where one is needed.
    """
    pair = setting.pair
    context = setting.study.context(pair.target, setting.readout_layers, pair.ordinary)
    sink = metric.of(SINK, context)
    if sink.site != PATTERN:
        raise InputError(f"a circuit is found for what is measured of attention (alpha, say), not for {metric.name!r}")
    own = pair.target.single(setting.batch.n)
    weights = (
        sink.weigh(setting.batch.length).expand(setting.batch.n, -1) if isinstance(sink, PositionReadout) else None
    )
    if weights is None or weights[torch.arange(len(own), device="cpu"), own].any():
        raise InputError(
            f"a circuit is found for what the sink receives from later queries: {metric.name!r} counts its own as well"
        )
    if not pair.is_natural:
        return [sink]
    if metric.baseline is None:
        raise InputError(f"metric {metric.name!r} has no value at ordinary positions: give a target that is a position")
    return [sink, metric.baseline(ORDINARY, context)]
