"""The main job: per-stage causal-effect scores of the attention-sink chain.

For the metric M (attention received by the target from later queries, averaged over heads, over the blocks just after
formation) and every prompt i,

* denoise (is the stage sufficient?): ``effect_i = (M_patched - M_base) / (M_anchored - M_base)``,
* noise (is it necessary?): ``effect_i = (M_anchored - M_patched) / (M_anchored - M_base)``.

Effects are per prompt, aggregated last, never clipped. Two identities are asserted in every run, because nothing that
is printed can be trusted if they fail: the transplant of the aggregated value must carry exactly all of the effect of
an induced pair, and every stage's transplant must move its own readout by exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from sinklens.chain import scoring
from sinklens.chain.checks import pair_checks
from sinklens.chain.first_prompt import first_prompt
from sinklens.chain.result import METRIC, ChainResult
from sinklens.chain.scoring import SINK, Trial
from sinklens.engine.residual import as_written
from sinklens.engine.run import PatchResult
from sinklens.engine.validation import check_edits
from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation
from sinklens.formation.find import given_event
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, dtype_of
from sinklens.pairs import InducedKind, PairChoice
from sinklens.pairs.choice import STRENGTH, Target
from sinklens.pairs.effects import MIN_GAP
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.readouts.named import NamedReadout
from sinklens.records.integers import whole_numbers
from sinklens.records.progress import Progress, progress_of
from sinklens.records.ranges import MOST_REPEATS, Between, check_number, check_seed
from sinklens.stages import CHAIN, Stage, stages_of
from sinklens.stages.base import Setting
from sinklens.study import Study


@in_usual_state
def run_chain(
    model: Model,
    batch: PromptBatch,
    *,
    target: Target = 10,
    pair: InducedKind = "block_aggregation",
    strength: float = STRENGTH,
    pair_layers: Sequence[int] | None = None,
    stages: Sequence[Stage | str] = CHAIN,
    formation: Formation | None = None,
    event: int | None = None,
    metric: str | NamedReadout = METRIC,
    readout_blocks: int = READOUT_BLOCKS,
    control_draws: int = 3,
    min_gap: float = MIN_GAP,
    loss: bool = False,
    seed: int = 0,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | bool | None = None,
) -> ChainResult:
    """Score every stage of the chain on ``batch``.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        target: position that is made a sink, or ``"natural"`` for the sink that the data has.
        pair: how the sink is made at ``target``: ``block_aggregation`` or ``amplify_variance``.
        strength: lambda of ``amplify_variance``.
        pair_layers: blocks of that intervention (see :func:`sinklens.induced_pair` for the default).
        stages: stages to score, themselves or by name; the six of the chain by default.
        formation: where the sink forms; found if not given.
        event: number of the formation event to explain, in place of ``formation`` (see
            :attr:`sinklens.Formation.steps`); the one with the largest growth by default.
        metric: what is measured of the sink, by name (:data:`sinklens.readouts.named.READOUTS`) or as a
            :class:`~sinklens.readouts.named.NamedReadout`.
        readout_blocks: in how many blocks after the formation block it is measured.
        control_draws: repetitions of everything that is drawn at random, averaged for each prompt.
        min_gap: least difference of the metric between the pair's runs; prompts with less are excluded.
        loss: also read what every edit does to the loss (mean cross entropy of the next token, nats), with its control
            beside it. Every patched row then runs to the last block and the unembedding: about 4 times as long on
            SmolLM2, 4 prompts of 32 tokens.
        seed: fixes every draw and the bootstrap.
        memory_budget: bytes for one forward pass's activations.
        max_rows: rows for one forward pass, in place of the budget.
        progress: called with (rows done, rows in all); ``True`` or ``False``: a line that says it, or none; by default
            one in terminals and notebooks.

    Raises:
        NoSinkError: the model has no sink on these prompts, or the pair makes none in any prompt.
        InputError: a target or option that does not fit the model and prompts.
        EngineError: an identity failed, or a patch did nothing: the numbers would not be trustworthy.
    """
    layers = None if pair_layers is None else whole_numbers(pair_layers, "block")
    choice = PairChoice(target, pair, strength=strength, layers=layers)
    given = given_event(event, formation)
    options: dict[str, Any] = {
        "given": given,
        "seed": seed,
        "memory_budget": memory_budget,
        "rows": max_rows,
    }
    with progress_of(progress, "chain") as told:
        return score_chain(
            Study.of(model, batch, formation, **options, progress=told),
            choice,
            stages=stages,
            metric=metric,
            readout_blocks=readout_blocks,
            control_draws=control_draws,
            min_gap=min_gap,
            loss=loss,
        )


@in_usual_state
def score_chain(
    study: Study,
    choice: PairChoice,
    *,
    stages: Sequence[Stage | str] = CHAIN,
    metric: str | NamedReadout = METRIC,
    readout_blocks: int = READOUT_BLOCKS,
    control_draws: int = 3,
    min_gap: float = MIN_GAP,
    loss: bool = False,
    scores_only: bool = False,
    views: bool = True,
) -> ChainResult:
    """:func:`run_chain` where model, prompts and what is known of them are in a study; it raises the same.

    ``scores_only`` leaves out what else there is to see of a chain (matrix, checks, views, provenance) and the passes
    that it takes; without ``views``, the checks of what else the pair changes and the first prompt's views alone.
    """
    views = views and not scores_only
    _check(choice, study, readout_blocks, control_draws, min_gap)
    chosen, named = stages_of(stages), study.named_readout(metric)
    seed, model, batch = study.seed, study.model, study.batch
    setting = Setting.of(study, choice, readout_blocks)
    pair = setting.pair

    trials, skipped = _trials(setting, chosen, control_draws)
    scored = [stage for stage in chosen if any(trial.stage is stage for trial in trials)]
    own = {} if scores_only else _own_readouts(setting, scored, skipped)
    readouts = [*_metric(setting, named), *own.values(), *([study.readout(scoring.LOSS)] if loss else [])]
    result = study.runner(readouts, pair.runs).run([trial.patch for trial in trials], study.progress)
    gap = scoring.Gap(named.name, named.is_share, min_gap)
    effects = scoring.effects(trials, result, pair, gap)
    scoring.check_pair(effects, result, pair, gap)
    read = [stage for stage in scored if stage.name in own]
    matrix = scoring.matrix(trials, result, pair, read, gap)
    scoring.check_identities(effects, matrix, pair, trials, dtype_of(model))
    return ChainResult(
        scores=scoring.scores(effects, trials, seed, batch.groups),
        effects=effects,
        matrix=scoring.summarise_matrix(matrix, seed, batch.groups),
        checks=pair_checks(setting) if views else pd.DataFrame(),
        formation=study.formation,
        runs=_run_values(result),
        config={
            **_config(choice, setting, scored, named),
            **{"control_draws": control_draws, "min_gap": min_gap, "not_applicable": skipped},
            **({"loss": True} if loss else {}),
        },
        provenance={} if scores_only else study.provenance,
        engine=asdict(result.stats),
        tokens=[list(batch.labels[0])],
        **(first_prompt(setting) if views else {}),
    )


def _check(
    choice: PairChoice,
    study: Study,
    readout_blocks: int,
    control_draws: int,
    min_gap: float,
) -> None:
    """Refuse what is wrong before any work."""
    choice.check(study.batch.length)
    check_seed(study.seed)
    check_number("control_draws", control_draws, Between(1, MOST_REPEATS), whole=True)
    check_number("readout_blocks", readout_blocks, Between(1), whole=True)
    check_number("min_gap", min_gap, Between(0))


def _config(choice: PairChoice, setting: Setting, stages: Sequence[Stage], metric: NamedReadout) -> dict[str, Any]:
    """What was chosen, as the record has it."""
    batch = setting.batch
    return {
        **choice.record(),
        "pair_layers": list(setting.pair.root_layers),
        "stages": [stage.name for stage in stages],
        "claims": {stage.name: stage.claim for stage in stages},
        "readout_layers": list(setting.readout_layers),
        "seed": setting.study.seed,
        **batch.record(),
        **({} if metric.name == METRIC else {"metric": metric.name}),
    }


def _metric(setting: Setting, metric: NamedReadout) -> list[Readout]:
    """What is measured of the sink; with the natural one also at ordinary positions, in place of a run without it.

    Raises:
        InputError: a quantity that has no value at ordinary positions, where one is needed.
    """
    pair = setting.pair
    context = setting.study.context(pair.target, setting.readout_layers, pair.ordinary)
    if not pair.is_natural:
        return [metric.of(SINK, context)]
    ordinary = metric.ordinary(scoring.ORDINARY, context)
    if ordinary is None:
        raise InputError(f"metric {metric.name!r} has no value at ordinary positions: give a target that is a position")
    return [metric.of(SINK, context), ordinary]


def _own_readouts(setting: Setting, stages: Sequence[Stage], skipped: dict[str, str]) -> dict[str, Readout]:
    """Every stage's own readout by the stage's name; why one is left out that the model does not allow is noted."""
    readouts = {}
    for stage in stages:
        try:
            readouts[stage.name] = stage.readout(setting, stage)
        except NotApplicableError as error:
            skipped[f"{stage.name}/readout"] = str(error)
    return readouts


def _trials(setting: Setting, stages: Sequence[Stage], draws: int) -> tuple[list[Trial], dict[str, str]]:
    """Every experiment's patches; and why those are left out that the model does not allow."""
    trials: list[Trial] = []
    skipped: dict[str, str] = {}
    for stage in stages:
        for experiment in stage.experiments:
            for direction in setting.pair.directions:
                for draw in range(draws if experiment.drawn else 1):
                    # Seeded by name, so that a score does not depend on which other stages run.
                    name = f"{stage.name}/{experiment.edit}/{experiment.control}/{draw}"
                    try:
                        stage.check(setting, experiment)
                        patch = experiment.build(setting, stage, direction, setting.study.generator(name))
                        check_edits(setting.model, as_written(setting.model, [patch], (), setting.pair.runs))
                    except NotApplicableError as error:
                        skipped[f"{stage.name}/{experiment.edit}"] = str(error)
                        continue
                    trials.append(Trial(stage, experiment, direction, draw, patch))
    if not trials and skipped:
        raise NotApplicableError(next(iter(skipped.values())))
    return trials, skipped


def _run_values(result: PatchResult) -> dict[str, dict[str, list[float]]]:
    return {run: {name: value.tolist() for name, value in found.items()} for run, found in result.runs.items()}
