"""From patched readouts to scores: effects per prompt, the chain matrix, and the identities that must be exactly 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from sinklens.chain.result import LOSS_CHANGE, SCORE_KEYS, is_transplant, summarise
from sinklens.edits import Transplant
from sinklens.engine.run import PatchResult
from sinklens.errors import EngineError, NoSinkError
from sinklens.pairs.effects import effect, gaps
from sinklens.pairs.pair import Direction, SinkPair
from sinklens.patches import Patch
from sinklens.records.text import pretty
from sinklens.stages import Experiment, Stage

SINK = "sink"
"""Name of the metric's readout."""
ORDINARY = "ordinary"
"""Name of the same at ordinary positions, which the natural sink is compared with."""
LOSS = "loss"
"""Name of the loss as a readout and as a column: mean cross entropy of the next token over a prompt, nats."""
IDENTITY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far from exactly 1 the identities may be, by dtype: rounding, in units of the effect."""

READOUT_GAP = 0.1
"""A stage's readout is left out of the chain matrix in prompts where the pair moves it by less than this share of the
mean: there is nothing there to divide by."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One patch of the chain: an experiment of a stage, in a direction, one draw."""

    stage: Stage
    """The stage."""
    experiment: Experiment
    """The experiment."""
    direction: Direction
    """Denoise or noise."""
    draw: int
    """Number of the random draw."""
    patch: Patch
    """What is run."""


@dataclass(frozen=True)
class Gap:
    """The least difference of the metric between a pair's runs that an effect is divided by."""

    metric: str
    """Name of the metric."""
    is_share: bool
    """Whether it lies between 0 and 1."""
    least: float
    """The least difference: itself of a share, else as a part of the larger of the two values."""

    def between(self, start: np.ndarray, end: np.ndarray | float) -> np.ndarray:
        """The least difference for every prompt, between the metric's values in the two runs."""
        return gaps([self.is_share], start[None], np.broadcast_to(end, start.shape)[None], self.least)[0]


def ends(result: PatchResult, pair: SinkPair, readout: str, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
    """The metric's values per prompt in the run that is patched, and in the run that it would become."""
    with_sink = result.runs[pair.with_sink.run][readout].numpy()
    if pair.is_natural:
        return with_sink, result.runs[pair.with_sink.run][ORDINARY].numpy()
    without = result.runs[pair.without.run][readout].numpy()
    return (without, with_sink) if direction == "denoise" else (with_sink, without)


def effects(trials: Sequence[Trial], result: PatchResult, pair: SinkPair, gap: Gap) -> pd.DataFrame:
    """Per trial and prompt: the effect, and the values of the metric that it is made of; with the loss, if it was read,
    and its change from the run that was patched.
    """
    frames = []
    losses = _losses(trials, result)
    for index, trial in enumerate(trials):
        start, end = ends(result, pair, SINK, trial.direction)
        patched = result.values[SINK][index].numpy()
        units = trial.patch.units
        frames.append(
            pd.DataFrame(
                {
                    "stage": trial.stage.name,
                    "edit": trial.experiment.edit,
                    "direction": trial.direction,
                    "control": trial.experiment.control,
                    "draw": trial.draw,
                    "prompt": np.arange(len(patched)),
                    "effect": effect(patched, start, end, gap.between(start, end)),
                    "patched": patched,
                    "start": start,
                    "end": end,
                    **{name: values[index] for name, values in losses.items()},
                    "patch_id": trial.patch.id,
                    "units": [None if units is None else list(units)] * len(patched),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _losses(trials: Sequence[Trial], result: PatchResult) -> dict[str, np.ndarray]:
    if LOSS not in result.values:
        return {}
    change = result.added([trial.patch for trial in trials], LOSS)
    return {LOSS: result.values[LOSS].numpy(), LOSS_CHANGE: change.numpy()}


def check_pair(effects: pd.DataFrame, result: PatchResult, pair: SinkPair, gap: Gap) -> None:
    """Make sure that the pair makes a sink in some prompt.

    Raises:
        NoSinkError: it does in none.
    """
    if effects.effect.notna().any():
        return
    start, end = ends(result, pair, SINK, pair.directions[-1])
    raise NoSinkError(
        f"there is no sink to explain at the target: {pretty(gap.metric)} is {start.mean():.4f} with and "
        f"{end.mean():.4f} without it (mean over prompts), and no prompt differs by {gap.least} or more"
        + ("" if gap.is_share else " of its value")
    )


def scores(
    effects: pd.DataFrame, trials: Sequence[Trial], seed: int, groups: Sequence[str] | None = None
) -> pd.DataFrame:
    """One row per stage, edit, direction and control; ``groups`` are the texts that the prompts are of."""
    scores = summarise(effects, SCORE_KEYS, seed, groups)
    by_key: dict[tuple, list[Trial]] = {}
    for trial in trials:
        key = (trial.stage.name, trial.experiment.edit, trial.direction, trial.experiment.control)
        by_key.setdefault(key, []).append(trial)
    mine = [by_key[tuple(key)] for key in scores[SCORE_KEYS].itertuples(index=False)]
    scores["predicted"] = [m[0].experiment.predicted.of(m[0].direction) for m in mine]
    scores["strength"] = [float(np.mean([trial.patch.edit.strength for trial in m])) for m in mine]
    scores["layers"] = [list(m[0].patch.layers) for m in mine]
    # Units that differ between draws are in the effects table, not here.
    scores["units"] = [list(m[0].patch.units) if len(m) == 1 and m[0].patch.units else None for m in mine]
    scores["draws"] = [len(m) for m in mine]
    return scores


def matrix(
    trials: Sequence[Trial], result: PatchResult, pair: SinkPair, stages: Sequence[Stage], gap: Gap
) -> pd.DataFrame:
    """Effects of every stage's transplant on every stage's readout, per prompt."""
    chosen = [(i, t) for i, t in enumerate(trials) if t.experiment.kind == "transplant" and not t.experiment.control]
    frames = []
    for index, trial in chosen:
        for readout in [stage.name for stage in stages] + [SINK]:
            patched = result.values[readout][index].numpy()
            if pair.is_natural and readout != SINK:
                # There is no run without the sink at this position: report the change relative to the sink's own value.
                start, end = result.runs[pair.with_sink.run][readout].numpy(), 0.0
            else:
                start, end = ends(result, pair, readout, trial.direction)
            least = gap.between(start, end) if readout == SINK else READOUT_GAP * float(np.abs(end - start).mean())
            frames.append(
                pd.DataFrame(
                    {
                        "stage": trial.stage.name,
                        "direction": trial.direction,
                        "readout": readout,
                        "prompt": np.arange(len(patched)),
                        "effect": effect(patched, start, end, least),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def summarise_matrix(matrix: pd.DataFrame, seed: int, groups: Sequence[str] | None = None) -> pd.DataFrame:
    """Means over prompts with their intervals, for every edited stage, direction and readout."""
    return matrix if matrix.empty else summarise(matrix, ["stage", "direction", "readout"], seed, groups)


def check_identities(
    effects: pd.DataFrame, matrix: pd.DataFrame, pair: SinkPair, trials: Sequence[Trial], dtype: torch.dtype
) -> None:
    """Assert what must be exactly 1, up to rounding.

    Raises:
        EngineError: when it is not.
    """
    if pair.is_natural:
        return
    tolerance = IDENTITY_TOLERANCE[dtype]
    roots = {trial.stage.name for trial in trials if _is_root(trial, pair)}
    root = effects[effects.stage.isin(roots) & is_transplant(effects)]
    own = matrix[matrix.stage == matrix.readout] if len(matrix) else matrix
    for name, values in (("the transplant of the aggregated value", root), ("a stage's transplant", own)):
        off = (values.effect - 1).abs().max() if len(values) else 0.0
        if off > tolerance:
            worst = values.loc[(values.effect - 1).abs().idxmax()]
            raise EngineError(
                f"identity check failed: {name} must have an effect of exactly 1, but {worst.stage} "
                f"({worst.direction}) gave {worst.effect:.6f} in prompt {worst.prompt}; "
                "the scores of this run cannot be trusted"
            )


def _is_root(trial: Trial, pair: SinkPair) -> bool:
    """Whether a trial exchanges all that the pair's intervention has made, where it has made it."""
    patch, experiment = trial.patch, trial.experiment
    exchanged = experiment.kind == "transplant" and not experiment.control and isinstance(patch.edit, Transplant)
    everything = patch.site == pair.root_site and patch.units is None and patch.where == pair.target
    return exchanged and everything and set(pair.root_layers) <= set(patch.layers)
