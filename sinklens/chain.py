"""The main job: per-stage causal-effect scores of the attention-sink chain.

For the metric M (attention received by the target from later queries, averaged over heads, over the blocks just after
formation) and every prompt i,

* denoise (is the stage sufficient?): ``effect_i = (M_patched - M_base) / (M_anchored - M_base)``,
* noise (is it necessary?): ``effect_i = (M_anchored - M_patched) / (M_anchored - M_base)``.

Effects are per prompt, aggregated last, never clipped. Two identities are asserted in every run, because nothing that
is
printed can be trusted if they fail: the transplant of the aggregated value must carry exactly all of the effect of an
induced pair, and every stage's transplant must move its own readout by exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch

from sinklens import readouts
from sinklens.capture import Want, capture_runs
from sinklens.checks import pair_checks
from sinklens.engine import PatchResult, Progress, run_patches
from sinklens.errors import EngineError, InputError, NoSinkError
from sinklens.formation import Formation, find_formation
from sinklens.memory import row_budget
from sinklens.models import Model, model_shape
from sinklens.pairs import Direction, PairKind, SinkPair, check_target, induced_pair, natural_pair
from sinklens.patches import Patch
from sinklens.prompts import PromptBatch
from sinklens.provenance import provenance
from sinklens.results import SCORE_KEYS, ChainResult, effect, summarise
from sinklens.setting import Setting
from sinklens.sites import PATTERN
from sinklens.stages import CHAIN, Experiment, Stage
from sinklens.statistics import generator

SINK = "sink"
"""Name of the metric's readout."""
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


def run_chain(
    model: Model,
    batch: PromptBatch,
    *,
    target: int | str = 10,
    pair: PairKind = "block_aggregation",
    strength: float = 8.0,
    pair_layers: Sequence[int] | None = None,
    stages: Sequence[Stage] = CHAIN,
    formation: Formation | None = None,
    readout_blocks: int = 4,
    control_draws: int = 3,
    min_gap: float = 0.01,
    seed: int = 0,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> ChainResult:
    """Score every stage of the chain on ``batch``.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        target: position that is made a sink, or ``"natural"`` for the sink that the data has.
        pair: how the sink is made at ``target``: ``block_aggregation`` or ``amplify_variance``.
        strength: lambda of ``amplify_variance``.
        pair_layers: blocks of that intervention (see :func:`~sinklens.pairs.induced_pair` for the default).
        stages: stages to score, the six of the chain by default.
        formation: where the sink forms; found if not given.
        readout_blocks: in how many blocks after the formation block attention is measured.
        control_draws: repetitions of everything that is drawn at random, averaged for each prompt.
        min_gap: least difference of the metric between the pair's runs; prompts with less are excluded.
        seed: fixes every draw and the bootstrap.
        memory_budget: bytes for one forward pass's activations.
        max_rows: rows for one forward pass, in place of the budget.
        progress: called with (rows done, rows in all).

    Raises:
        NoSinkError: the model has no sink on these prompts, or the pair makes none in any prompt.
        InputError: a target or option that does not fit the model and prompts.
        EngineError: an identity failed, or a patch did nothing: the numbers would not be trustworthy.
    """
    if control_draws < 1 or readout_blocks < 1:
        raise InputError("control_draws and readout_blocks must be at least 1")
    if not stages:
        raise InputError("give at least one stage")
    if isinstance(target, int):
        check_target(batch, target)  # before any work
    elif target != "natural":
        raise InputError(f"target {target!r} must be a position, or natural")
    formation = formation or find_formation(model, batch, memory_budget=memory_budget)
    rows = max_rows or row_budget(model, batch.length, memory_budget)
    layers = None if pair_layers is None else tuple(pair_layers)
    sinks = _pair(model, batch, formation, target, pair, layers, strength, seed, rows)
    setting = Setting(model, batch, formation, sinks, _readout_layers(model, formation, readout_blocks), rows)
    trials = _trials(setting, stages, control_draws, seed)
    metric = readouts.attention_received(SINK, setting.readout_layers, sinks.target, batch.n)
    measured = [metric, *(stage.readout(setting, stage) for stage in stages), *_baseline(setting)]
    result = run_patches(
        model, batch, [trial.patch for trial in trials], measured, runs=sinks.runs,
        memory_budget=memory_budget, max_rows=max_rows, progress=progress,
    )  # fmt: skip
    effects = _effects(trials, result, sinks, SINK, min_gap)
    _check_pair(effects, result, sinks, min_gap)
    matrix = _matrix(trials, result, sinks, stages, min_gap)
    _check_identities(effects, matrix, sinks, next(model.parameters()).dtype)
    config = {
        "target": target, "pair": sinks.kind, "strength": strength if pair == "amplify_variance" else None,
        "pair_layers": list(_root_layers(sinks)), "stages": [stage.name for stage in stages],
        "claims": {stage.name: stage.claim for stage in stages},
        "readout_layers": list(setting.readout_layers), "control_draws": control_draws, "min_gap": min_gap,
        "seed": seed, "n_prompts": batch.n, "length": batch.length, "prompts": batch.source,
        "n_skipped": batch.n_skipped,
    }  # fmt: skip
    return ChainResult(
        scores=_scores(effects, trials, seed),
        effects=effects,
        matrix=_summarise_matrix(matrix, seed),
        checks=pair_checks(setting),
        formation=formation,
        runs=_run_values(result),
        config=config,
        provenance=provenance(model, batch),
        engine=asdict(result.stats),
        tokens=[list(batch.labels[0])],
        attention=_attention(setting),
    )


def _pair(model, batch, formation, target, kind, layers, strength, seed, rows) -> SinkPair:  # noqa: ANN001
    if target == "natural":
        return natural_pair(batch, formation, seed)
    return induced_pair(
        model, batch, formation, target, kind=kind, layers=layers, strength=strength, seed=seed, max_rows=rows
    )


def _root_layers(pair: SinkPair) -> tuple[int, ...]:
    return tuple(sorted({layer for roots in pair.runs.values() for root in roots for layer in root.layers}))


def _readout_layers(model: Model, formation: Formation, blocks: int) -> tuple[int, ...]:
    n_layers = model_shape(model).n_layers
    first = formation.layer + 1
    if first >= n_layers:
        raise InputError(f"block {formation.layer} is the model's last: no later block attends to the sink it forms")
    return tuple(range(first, min(first + blocks, n_layers)))


def _trials(setting: Setting, stages: Sequence[Stage], draws: int, seed: int) -> list[Trial]:
    trials = []
    for stage in stages:
        for experiment in stage.experiments:
            for direction in setting.pair.directions:
                for draw in range(draws if experiment.drawn else 1):
                    # Seeded by name, so that a score does not depend on which other stages run.
                    name = f"{stage.name}/{experiment.edit}/{experiment.control}/{draw}"
                    patch = experiment.build(setting, stage, direction, generator(seed, name))
                    trials.append(Trial(stage, experiment, direction, draw, patch))
    return trials


def _baseline(setting: Setting) -> list:
    """For the natural sink: the same metric at ordinary positions takes the place of a run without a sink."""
    if setting.pair.kind != "natural":
        return []
    return [readouts.attention_ordinary("ordinary", setting.readout_layers, setting.pair.ordinary)]


def _ends(result: PatchResult, pair: SinkPair, readout: str, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
    """The metric's values per prompt in the run that is patched, and in the run that it would become."""
    with_sink = result.runs[pair.with_sink.run][readout].numpy()
    if pair.kind == "natural":
        return with_sink, result.runs[pair.with_sink.run]["ordinary"].numpy()
    without = result.runs[pair.without.run][readout].numpy()
    return (without, with_sink) if direction == "denoise" else (with_sink, without)


def _effects(
    trials: Sequence[Trial], result: PatchResult, pair: SinkPair, readout: str, min_gap: float
) -> pd.DataFrame:
    frames = []
    for index, trial in enumerate(trials):
        start, end = _ends(result, pair, readout, trial.direction)
        patched = result.values[readout][index].numpy()
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
                    "effect": effect(patched, start, end, min_gap),
                    "patched": patched,
                    "start": start,
                    "end": end,
                    "patch_id": trial.patch.id,
                    "units": [None if units is None else list(units)] * len(patched),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _check_pair(effects: pd.DataFrame, result: PatchResult, pair: SinkPair, min_gap: float) -> None:
    if effects.effect.notna().any():
        return
    start, end = _ends(result, pair, SINK, pair.directions[-1])
    raise NoSinkError(
        f"there is no sink to explain at the target: attention received is {start.mean():.4f} with and "
        f"{end.mean():.4f} without it (mean over prompts), and no prompt differs by {min_gap} or more"
    )


def _scores(effects: pd.DataFrame, trials: Sequence[Trial], seed: int) -> pd.DataFrame:
    scores = summarise(effects, SCORE_KEYS, seed)
    by_key: dict[tuple, list[Trial]] = {}
    for trial in trials:
        key = (trial.stage.name, trial.experiment.edit, trial.direction, trial.experiment.control)
        by_key.setdefault(key, []).append(trial)
    mine = [by_key[tuple(key)] for key in scores[SCORE_KEYS].itertuples(index=False)]
    scores["predicted"] = [m[0].experiment.predicted[m[0].direction == "noise"] for m in mine]
    scores["layers"] = [list(m[0].patch.layers) for m in mine]
    # Units that differ between draws are in the effects table, not here.
    scores["units"] = [list(m[0].patch.units) if len(m) == 1 and m[0].patch.units else None for m in mine]
    scores["draws"] = [len(m) for m in mine]
    return scores


def _matrix(
    trials: Sequence[Trial], result: PatchResult, pair: SinkPair, stages: Sequence[Stage], min_gap: float
) -> pd.DataFrame:
    """Effects of every stage's transplant on every stage's readout, per prompt."""
    chosen = [(i, t) for i, t in enumerate(trials) if t.experiment.edit == "transplant" and not t.experiment.control]
    frames = []
    for index, trial in chosen:
        for readout in [stage.name for stage in stages] + [SINK]:
            patched = result.values[readout][index].numpy()
            if pair.kind == "natural" and readout != SINK:
                # There is no run without the sink at this position: report the change relative to the sink's own value.
                start, end = result.runs[pair.with_sink.run][readout].numpy(), 0.0
            else:
                start, end = _ends(result, pair, readout, trial.direction)
            gap = min_gap if readout == SINK else READOUT_GAP * float(np.abs(end - start).mean())
            frames.append(
                pd.DataFrame(
                    {
                        "stage": trial.stage.name,
                        "direction": trial.direction,
                        "readout": readout,
                        "prompt": np.arange(len(patched)),
                        "effect": effect(patched, start, end, gap),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _summarise_matrix(matrix: pd.DataFrame, seed: int) -> pd.DataFrame:
    return matrix if matrix.empty else summarise(matrix, ["stage", "direction", "readout"], seed)


def _check_identities(effects: pd.DataFrame, matrix: pd.DataFrame, pair: SinkPair, dtype: torch.dtype) -> None:
    """Assert what must be exactly 1, up to rounding.

    Raises:
        EngineError: when it is not.
    """
    if pair.kind == "natural":
        return
    tolerance = IDENTITY_TOLERANCE[dtype]
    root = effects[(effects.stage == "value_aggregation") & (effects.edit == "transplant") & (effects.control == "")]
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


def _run_values(result: PatchResult) -> dict[str, dict[str, list[float]]]:
    return {run: {name: value.tolist() for name, value in found.items()} for run, found in result.runs.items()}


def _attention(setting: Setting) -> dict[str, torch.Tensor]:
    """Attention of the formation block's successor on the first prompt, in every run."""
    layer = setting.formation.layer + 1
    wants = [Want(run, PATTERN, layer) for run in setting.pair.runs]
    tokens = setting.batch.tokens[:1]
    runs = setting.pair.runs
    store = capture_runs(setting.model, tokens, runs, wants, max_rows=setting.max_rows)
    return {run: PATTERN.from_canonical(store.tensor(run, PATTERN, layer)).half().cpu() for run in runs}
