"""``sinklens all``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.cli.inputs import EventInputs, with_inputs
from sinklens.cli.mistakes import errors, fail
from sinklens.cli.options import JsonOption, LossOption
from sinklens.cli.values import check_enough
from sinklens.records.ranges import names, shown

MITIGATIONS = "mitigations"
"""What `--with` calls them, and their folder."""


@with_inputs()
def everything(
    *,
    target: Annotated[int, typer.Option(help="Position that the chain makes a sink.")] = 10,
    loss: LossOption = False,
    only: Annotated[str | None, typer.Option(help="Only these parts, such as `formation,onset`.")] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Further analyses (other-sinks, circuits), mitigations, or a .py file with an analysis; repeatable.",
        ),
    ] = None,
    inputs: EventInputs,
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run's is taken up again.")] = Path(
        "runs/all"
    ),
    as_json: JsonOption = False,
) -> None:
    """Find the formation, score the chain, run every analysis, write the report; can be interrupted and taken up."""
    with errors():
        from sinklens.pairs import PairChoice

        PairChoice(target).check(inputs.length)
        check_enough(inputs.n)
        given = inputs.given()
        if inputs.every_event and inputs.replicate is not None:
            fail("give --event all or --replicate, one of the two")
        chosen = () if only is None else names("--only", only)
        analyses, mitigated = _own(with_ or [])
        if mitigated and (inputs.every_event or inputs.replicate is not None):
            fail("--with mitigations goes with one event and one set of prompts: leave out --event all or --replicate")
        memory_budget = inputs.bytes_allowed()
        from sinklens.cli.of_all import run_everything

        run_everything(
            inputs,
            out,
            given=given,
            memory_budget=memory_budget,
            options={"target": target, "loss": loss, "only": chosen, "analyses": analyses},
            mitigations=out / MITIGATIONS if mitigated else None,
            as_json=as_json,
        )


def _own(given: list[str]) -> tuple[list[Any], bool]:
    """The analyses of groups and of files, read before anything is loaded; and whether there are mitigations."""
    if not given:
        return [], False
    from sinklens.analysis.discovery import list_analyses, list_groups
    from sinklens.analysis.run import load_analysis
    from sinklens.analysis.suite import CHAIN, FORMATION, further

    groups, names = list_groups(), []
    # A file may have a comma in its name.
    listed = (name for each in given for name in ([each] if os.path.isfile(each) else each.split(",")))
    words = dict.fromkeys(listed)
    for word in words:
        if word == MITIGATIONS:
            continue
        if word not in groups and not word.endswith(".py"):
            known = ", ".join([*groups, MITIGATIONS])
            fail(f"--with {shown(word)} must be a group ({known}), or a .py file with an analysis")
        names += list(list_analyses(group=word)) if word in groups else [word]
    analyses = [load_analysis(name) for name in names]
    return list(further(analyses, [FORMATION, CHAIN, *list_analyses(), MITIGATIONS]).values()), MITIGATIONS in words
