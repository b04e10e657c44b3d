"""Is it the cause? Chosen experiments of a stage as a part of an analysis's verdict.

A correlation cannot tell a cause, and neither can an edit that changes several things at once. So a cause is asked of
an edit that changes what the claim names and nothing else, beside one that changes the rest: the first must do what the
claim predicts, and the second must not. Effects are the chain's (:mod:`sinklens.chain.run`), on the sink that the
prompts have or on one that is made at a token; the rule looks at the mean with its interval, and median and share of
prompts stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sinklens.chain.result import ChainResult
from sinklens.chain.rules import Part, unmeasured
from sinklens.chain.run import score_chain
from sinklens.chain.stage_verdicts import cause_part
from sinklens.errors import EditError, InputError, NoSinkError, NotApplicableError
from sinklens.pairs import PairChoice
from sinklens.pairs.choice import Target
from sinklens.stages import Stage
from sinklens.study import Study

PROMPTS, DRAWS = 16, 2
"""Prompts that a cause is asked on, and repetitions of what is drawn: enough to tell one half, and cheap."""
INDUCED = (10, 5, 20)
"""Where a sink is made: the first of these positions that fits the prompts."""


def cause(
    study: Study,
    stage: Stage,
    edit: str,
    control: str | Sequence[str],
    *,
    name: str = "cause",
    sentence: str = "",
    target: Target | PairChoice | None = "natural",
    prompts: int = PROMPTS,
    draws: int = DRAWS,
) -> Part:
    """A part that says whether a stage's edit does what the claim predicts, and what stands beside it too.

    Args:
        study: model and prompts.
        stage: a stage of which ``edit`` and ``control`` are experiments.
        edit: the edit that changes what the claim names and nothing else.
        control: what changes the rest: controls of the edit, or other edits of the stage, by name.
        name: short name of the part.
        sentence: the sentence that it judges; the stage's claim by default.
        target: ``natural`` for the sink that the prompts have, a position where one is made, None for a position
            that fits the prompts, or how exactly it is made.
        prompts: how many prompts to ask it on, the first ones.
        draws: repetitions of what is drawn at random.

    Raises:
        InputError: the stage has no such experiment.
        EngineError: an identity failed.
    """
    controls = (control,) if isinstance(control, str) else tuple(control)
    experiments = tuple(e for e in stage.experiments if _is_of(e.edit, e.control, edit, controls))
    chosen = replace(stage, experiments=experiments)
    missing = {edit, *controls} - {e.control or e.edit for e in experiments}
    if missing:
        raise InputError(f"stage {stage.name} has no experiment {', '.join(sorted(missing))}: give one that it has")
    try:
        result = scored(study, chosen, target, prompts, draws)
    except (NoSinkError, NotApplicableError) as error:
        return unmeasured("cause", name, sentence or stage.claim, str(error))
    except EditError as error:  # in this model there is nothing where the edit acts
        return unmeasured("cause", name, sentence or stage.claim, f"the experiment changes nothing here: {error}")
    return cause_part(result, stage.name, edit, controls, name=name, sentence=sentence or stage.claim)


def scored(
    study: Study, stage: Stage, target: Target | PairChoice | None, prompts: int = PROMPTS, draws: int = DRAWS
) -> ChainResult:
    """The scores of a stage on a study's first prompts; what was scored already is taken from the study.

    Raises:
        NoSinkError: the pair makes no sink.
        NotApplicableError: the model has not what the experiments need, or no position fits.
    """
    names = tuple((e.edit, e.control) for e in stage.experiments)
    formation = study.formation
    choice = target if isinstance(target, PairChoice) else PairChoice(induced(study) if target is None else target)
    found = (formation.layer, formation.neurons, formation.dims, formation.sink_positions)
    key = (stage.name, names, choice, prompts, draws, study.seed, found)
    if key not in study.scored:
        few = study.first(prompts)
        study.scored[key] = score_chain(few, choice, stages=(stage,), control_draws=draws, scores_only=True)
    return study.scored[key]


def induced(study: Study) -> int:
    """The position that a sink is made at.

    Raises:
        NotApplicableError: none fits the prompts.
    """
    for position in INDUCED:
        try:
            return study.targets((position,))[0]
        except InputError:
            continue
    raise NotApplicableError(f"no sink can be made at a position of {', '.join(map(str, INDUCED))} in these prompts")


def _is_of(edit: str, control: str, wanted: str, beside: Sequence[str]) -> bool:
    if edit == wanted:
        return not control or control in beside
    return not control and edit in beside
