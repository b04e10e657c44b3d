"""``sinklens mitigate``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklens.cli.command import command_line
from sinklens.cli.display import progress
from sinklens.cli.inputs import Inputs, with_inputs
from sinklens.cli.mistakes import errors, fail
from sinklens.cli.options import ForceOption, JsonOption, OutOption
from sinklens.cli.pages import write_pages
from sinklens.cli.remarks import note
from sinklens.records.ranges import names

if TYPE_CHECKING:
    from sinklens.mitigation.result import MitigationResult
    from sinklens.study import Study


@with_inputs(
    length=128,
    without=("block", "event", "super_neurons", "outlier_dims", "replicate", "memory_budget"),
)
def mitigate(
    *,
    what: Annotated[
        str | None,
        typer.Option(help="Mitigations, such as `softening,bias`, or `all`; seven that need no search by default."),
    ] = None,
    fit: Annotated[
        int | None, typer.Option(min=1, help="Prompts to fit on, which are not measured; a quarter by default.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Recent keys that eviction keeps; a quarter of the length by default.")
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate under each; 0 for none.")] = 24,
    inputs: Inputs,
    out: OutOption = Path("runs/mitigate"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take the sink away without training, in several ways, and measure what each costs and what quantisation gains."""
    with errors():
        from sinklens.records.files import check_out

        chosen = _chosen(what)
        check_out(out, force=force)
        with progress() as (step, rows):
            model, batch = inputs.load(step)
            from sinklens.mitigation.run import mitigate as run

            options = {"fit": fit, "window": window, "generate": generate, "seed": inputs.seed}
            result = run(model, batch, chosen, progress=rows, step=step, **options)
        result.config["command"] = command_line()
        result.save(out, force=force)
        _print(result, out, as_json)
        write_pages([out], as_json)


def _chosen(what: str | None) -> tuple[str, ...]:
    """``--what`` as names of mitigations."""
    from sinklens.mitigation.known import DEFAULT, MITIGATIONS

    chosen = DEFAULT if what is None else tuple(MITIGATIONS) if what == "all" else names("--what", what)
    unknown = [name for name in chosen if name not in MITIGATIONS]
    if unknown:
        fail(f"--what {unknown[0]!r} is not known: choose from {', '.join(MITIGATIONS)}")
    return chosen


def mitigate_into(out: Path, study: Study, step: Callable[[str], None], rows: Callable[[int, int], None]) -> str:
    """Mitigations of a study's model and prompts in a folder; those are kept that it has of the same ones already.

    Returns:
        Why there are none; empty where there are.
    """
    from sinklens.errors import InputError, NoSinkError, NotApplicableError
    from sinklens.mitigation.result import MitigationResult
    from sinklens.mitigation.run import mitigate as run

    of = {"seed": study.seed, "all_prompts": study.batch.digest()}  # what is measured is a part of them
    model = {**study.provenance, "prompts_digest": None}
    try:
        earlier = MitigationResult.load(out)
        if earlier.provenance | {"prompts_digest": None} == model and of.items() <= earlier.config.items():
            return ""
    except InputError:
        pass  # there are none, or they are damaged
    try:
        result = run(study.model, study.batch, seed=study.seed, progress=rows, step=step)
    except (NoSinkError, NotApplicableError) as error:
        return str(error)
    result.config.update(of, command=command_line())
    result.save(out, force=True)
    return ""


def _print(result: MitigationResult, out: Path, as_json: bool) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console
    from sinklens.cli.tables_mitigate import mitigation_table

    if as_json:
        sys.stdout.write((out / "mitigation.json").read_text(encoding="utf-8") + "\n")
    else:
        show(console(), mitigation_table(result))
    for name, reason in result.left_out.items():
        note(f"{name} is left out: {reason}")
