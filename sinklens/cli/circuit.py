"""``sinklens circuit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklens.cli.choices import Pair
from sinklens.cli.command import command_line
from sinklens.cli.display import progress
from sinklens.cli.inputs import Inputs, with_inputs
from sinklens.cli.mistakes import errors, fail
from sinklens.cli.options import (
    ForceOption,
    JsonOption,
    MinGapOption,
    OutOption,
    PairOption,
    ReadoutBlocksOption,
    StrengthOption,
)
from sinklens.cli.pages import write_pages
from sinklens.cli.values import check_finite, targets_of
from sinklens.records.ranges import MOST_REPEATS

if TYPE_CHECKING:
    from sinklens.circuits.result import Circuit


@with_inputs(n=8, without=("replicate",))
def circuit(
    *,
    target: Annotated[
        str, typer.Option(help="Position that is made a sink, or `natural` for the one that the data has.")
    ] = "10",
    pair: PairOption = Pair.block_aggregation,
    strength: StrengthOption = 8.0,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the sink that the circuit is to keep.")] = 0.9,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Points between the runs for integrated gradients.")] = 5,
    sample: Annotated[int, typer.Option(min=0, help="Edges drawn at random that estimates are judged by.")] = 64,
    control_draws: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Random sets of edges.")] = 10,
    readout_blocks: ReadoutBlocksOption = 4,
    min_gap: MinGapOption = 0.01,
    inputs: Inputs,
    out: OutOption = Path("runs/circuit"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the fewest edges between heads, MLPs and super neurons that keep the sink; verify and test them."""
    with errors():
        from sinklens.records.files import check_out

        (wanted, *more) = targets_of(target, inputs.length)
        if more:
            fail(f"--target {target}: a circuit is of one target; run the command for each")
        for option, value in (("--min-gap", min_gap), ("--share", share), ("--strength", strength)):
            check_finite(option, value)
        options = {
            "target": wanted,
            "pair": pair.value,
            "strength": strength,
            "share": share,
            "steps": steps,
            "sample": sample,
            "control_draws": control_draws,
            "readout_blocks": readout_blocks,
            "min_gap": min_gap,
            "seed": inputs.seed,
            "memory_budget": inputs.bytes_allowed(),
        }
        given = inputs.given()
        check_out(out, force=force)
        found = _find(inputs, given, options)
        found.save(out, force=force)
        _print(found, out, as_json)
        write_pages([out], as_json)


def _find(inputs: Inputs, given: dict[str, Any], options: dict[str, Any]) -> Circuit:
    """Load what is named, and find the circuit; ``given`` is what the user says of the formation."""
    with progress() as (step, rows):
        model, batch = inputs.load(step)
        step("looking for the circuit")
        from sinklens.circuits.run import circuit as find_circuit
        from sinklens.formation import find_formation

        memory = options["memory_budget"]
        formation = find_formation(model, batch, memory_budget=memory, **given) if given else None
        found = find_circuit(model, batch, formation=formation, progress=rows, **options)
    found.config["command"] = command_line()
    return found


def _print(found: Circuit, out: Path, as_json: bool) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console
    from sinklens.cli.tables_circuit import circuit_footer, circuit_table

    if as_json:
        sys.stdout.write((out / "circuit.json").read_text(encoding="utf-8") + "\n")
        return
    screen = console()
    show(screen, circuit_table(found))
    for line in circuit_footer(found):
        screen.print(line, markup=False)
