"""What runs on which model: found by running it, not by claiming it.

Every stage of the chain and every analysis is run on a few prompts. For an architecture family that is a small random
model, with a formation block, super neurons and outlier dimensions that are named, because a random model has no sink
to find. For a model of one's own it is the model itself.

    python -m sinklens.analysis.capabilities > sinklens/models/README.md    # the table of all families
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinklens import prompts
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.chain.run import run_chain
from sinklens.errors import EngineError, InputError, NoSinkError, NotApplicableError
from sinklens.models.families import FAMILIES, random_model
from sinklens.models.load import load_model
from sinklens.models.view import Model, backend_name, model_id, tokenizer_of, vocabulary_size
from sinklens.stages import CHAIN, Stage
from sinklens.study import Study

SHOWN = tuple(key for key, family in FAMILIES.items() if family.in_table)
"""The families of the table in ``sinklens/models/README.md``."""

HEAD = """# What runs on what

Models are HookedTransformer (transformer-lens 3.9) or TransformerBridge (3.9 and 4.3), with weights as published. Every
stage and every analysis was run on a small random model of each family, and this page was written by

```
python -m sinklens.analysis.capabilities > sinklens/models/README.md
```

`sinklens models --capabilities M` does the same for any model.
"""

MIN_GAP = 1e-4
"""Least difference of the metric between a pair's runs: small, because what is asked is only whether it runs."""


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
    """One for every stage and analysis."""


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
            return Capabilities(title, "", tuple(Capability(name, False, str(error)) for name in parts()))
    else:
        title = model_id(model)
        batch = prompts.random_tokens(model, 4, 24) if tokenizer_of(model) is None else None
        study = Study(model, batch or prompts.natural(model, 4, 32))
    found = [_stage(study, stage) for stage in CHAIN] + [_analysis(study, name) for name in list_analyses()]
    return Capabilities(title, backend_name(study.model), tuple(found))


def parts() -> list[str]:
    """What is tried, in order."""
    return [f"stage: {stage.name}" for stage in CHAIN] + list(list_analyses())


def _random_study(family: str) -> Study:
    model = load_model(random_model(family), device="cpu")
    tokens = torch.randint(3, vocabulary_size(model), (4, 24), generator=torch.Generator().manual_seed(0))
    given = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}
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
    # A random model's pair moves the metric by next to nothing: enough to see whether everything runs.
    options = {"min_gap": MIN_GAP} if "min_gap" in analysis.options else {}
    try:
        verdict = run_analysis(analysis, study, **options).findings.verdict
    except (InputError, EngineError) as error:
        return Capability(name, False, f"failed: {error}")
    runs = verdict.outcome != "not measurable" or verdict.estimate is not None
    return Capability(name, runs, verdict.reason)


def page(found: Sequence[Capabilities]) -> str:
    """``sinklens/models/README.md``: the table, and how it was made."""
    return f"{HEAD}\n{markdown(found)}"


def markdown(found: Sequence[Capabilities]) -> str:
    """A table with a column for every model, and the reasons below it."""
    reasons: list[str] = []

    def cell(item: Capability) -> str:
        if not item.reason:
            return "yes" if item.runs else "no"
        if item.reason not in reasons:
            reasons.append(item.reason)
        return f"{'yes' if item.runs else 'no'} [{reasons.index(item.reason) + 1}]"

    lines = ["| | " + " | ".join(one.title for one in found) + " |", "|---|" + "---|" * len(found)]
    backends = [one.backend.removeprefix("Transformer").removesuffix("Transformer") or "–" for one in found]
    lines.append("| loads as | " + " | ".join(backends) + " |")
    for number, part in enumerate(parts()):
        lines.append(f"| {part} | " + " | ".join(cell(one.found[number]) for one in found) + " |")
    lines += ["", *(f"[{number}] {reason}  " for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the table of what runs on which architecture.")
    parser.add_argument("families", nargs="*", default=SHOWN, metavar="FAMILY", help=f"some of {', '.join(SHOWN)}")
    print(page([capabilities(family) for family in parser.parse_args().families]))  # noqa: T201
