"""What runs on which model: found by running it, not by claiming it.

Every stage of the chain and every analysis is run on a few prompts. For an architecture family that is a small random
model, with a formation block, super neurons and outlier dimensions that are named, because a random model has no sink
to find. For a model of one's own it is the model itself.

    make capabilities    # writes sinklens/models/README.md, with transformer-lens 3.9 and 4.3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sinklens import prompts
from sinklens.analysis.discovery import list_analyses, list_groups
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.chain.run import run_chain
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.models.families import FAMILIES, random_model
from sinklens.models.identities import identities
from sinklens.models.load import load_model
from sinklens.models.view import Model, backend_name, model_id, tokenizer_of, vocabulary_size
from sinklens.stages import CHAIN, Stage
from sinklens.study import Study

MIN_GAP = 1e-4
"""Least difference of the metric between a pair's runs: small, because what is asked is only whether it runs."""
SMALL: dict[str, float] = {"min_gap": MIN_GAP, "eps": 0.0, "absolute": 0.0, "relative": 2.0}
"""Thresholds of analyses, by the names of their options: a random model has next to no sink, and nothing massive."""


@dataclass(frozen=True)
class Capability:
    """Whether a stage or an analysis runs on a model."""

    part: str
    """``stage: NAME`` or the analysis's name."""
    runs: bool
    """Whether it gave numbers."""
    reason: str = ""
    """Why it did not, or which of its experiments did not."""


@dataclass(frozen=True)
class Capabilities:
    """What runs on one model."""

    title: str
    """The model or the family."""
    backend: str
    """HookedTransformer or TransformerBridge; empty when it cannot be loaded."""
    found: tuple[Capability, ...]
    """One for every stage and analysis, those in groups last."""


def capabilities(model: Model | str) -> Capabilities:
    """Run every stage and every analysis on a few prompts.

    Args:
        model: a key of :data:`sinklens.models.families.FAMILIES`, for a small random model of that family, or a model.
    """
    if isinstance(model, str):
        title = FAMILIES[model].title
        try:
            study = _random_study(model)
        except InputError as error:
            none = (Capability(name, False, str(error)) for name in (*parts(), *grouped()))
            return Capabilities(title, "", tuple(none))
    else:
        title = model_id(model)
        batch = prompts.random_tokens(model, 4, 24) if tokenizer_of(model) is None else None
        study = Study(model, batch or prompts.natural(model, 4, 32))
    names = [*list_analyses(), *grouped()]
    found = [_stage(study, stage) for stage in CHAIN] + [_analysis(study, name) for name in names]
    return Capabilities(title, backend_name(study.model), tuple(found))


def parts() -> list[str]:
    """What is tried, in order: stages, and the analyses that run with all others."""
    return [f"stage: {stage.name}" for stage in CHAIN] + list(list_analyses())


def grouped() -> list[str]:
    """What is tried besides: the analyses that run when their group is asked for."""
    return [name for group in list_groups() for name in list_analyses(group=group)]


def _random_study(family: str) -> Study:
    model = load_model(random_model(family), device="cpu")
    tokens = torch.randint(3, vocabulary_size(model), (4, 24), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"layer": 1, "outlier_dims": (2, 5)}
    if identities(model).holds("dense_mlp", (1,)):
        given["super_neurons"] = (3, 7)
    return Study(model, prompts.from_tokens(model, tokens), given=given)


def _stage(study: Study, stage: Stage) -> Capability:
    name = f"stage: {stage.name}"
    try:
        result = run_chain(
            study.model, study.batch, formation=study.formation, stages=(stage,), control_draws=1, min_gap=MIN_GAP
        )
    except (NotApplicableError, NoSinkError) as error:
        return Capability(name, False, str(error))
    by_reason: dict[str, list[str]] = {}
    for key, why in result.config["not_applicable"].items():
        by_reason.setdefault(why, []).append(key.partition("/")[2])
    return Capability(name, True, "; ".join(f"without {', '.join(edits)}: {why}" for why, edits in by_reason.items()))


def _analysis(study: Study, name: str) -> Capability:
    analysis = load_analysis(name)
    options = {option: value for option, value in SMALL.items() if option in analysis.options}
    try:
        verdict = run_analysis(analysis, study, **options).findings.verdict
    except Exception as error:  # noqa: BLE001 -- a fault of ours: the table shows it, and the tests refuse the table
        return Capability(name, False, f"failed: {type(error).__name__}: {error}")
    runs = verdict.outcome != "not measurable" or verdict.estimate is not None
    return Capability(name, runs, verdict.reason)
