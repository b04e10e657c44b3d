"""``sinklens circuit``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.cli.common import (
    Backend,
    BackendOption,
    BlockOption,
    Bos,
    BosOption,
    CountOption,
    DatasetOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    EventOption,
    ForceOption,
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelOption,
    NeuronsOption,
    Pair,
    PromptsOption,
    SeedOption,
    budget,
    command_line,
    errors,
    fail,
    given_formation,
    load,
    progress,
    targets_of,
    write_pages,
)
from sinklens.records.ranges import MOST_REPEATS


def circuit(
    model: ModelOption = "smollm2",
    target: Annotated[
        str, typer.Option(help="Position that is made a sink, or `natural` for the one that the data has.")
    ] = "10",
    pair: Annotated[Pair, typer.Option(help="How the sink is made at the target.")] = Pair.block_aggregation,
    strength: Annotated[float, typer.Option(help="Lambda of amplify_variance.")] = 8.0,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the sink that the circuit is to keep.")] = 0.9,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Points between the runs for integrated gradients.")] = 5,
    sample: Annotated[int, typer.Option(min=0, help="Edges drawn at random that estimates are judged by.")] = 64,
    control_draws: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Random sets of edges.")] = 10,
    length: LengthOption = 64,
    n: CountOption = 8,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    readout_blocks: Annotated[int, typer.Option(min=1, help="Blocks after formation to measure attention in.")] = 4,
    min_gap: Annotated[float, typer.Option(help="Exclude prompts whose metric the pair moves by less.")] = 0.01,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/circuit"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the fewest edges between heads, MLPs and super neurons that keep the sink; verify and test them."""
    with errors():
        from sinklens.records.files import check_out

        (wanted, *more) = targets_of(target, length)
        if more:
            fail(f"--target {target}: a circuit is of one target; run the command for each")
        for name, value in (("--min-gap", min_gap), ("--share", share), ("--strength", strength)):
            if not math.isfinite(value):
                fail(f"{name} {value} must be a finite number")
        bytes_allowed, given = budget(memory_budget), given_formation(block, super_neurons, outlier_dims, event)
        check_out(out, force=force)
        with progress() as (step, rows):
            loaded, batch = load(
                step,
                model=model,
                device=device,
                dtype=dtype,
                backend=backend,
                prompts=prompts,
                dataset=dataset,
                n=n,
                length=length,
                bos=bos,
                seed=seed,
            )
            step("looking for the circuit")
            from sinklens.circuits.run import circuit as find_circuit
            from sinklens.formation import find_formation

            formation = find_formation(loaded, batch, memory_budget=bytes_allowed, **given) if given else None
            found = find_circuit(
                loaded,
                batch,
                target=wanted,
                pair=pair.value,
                strength=strength,
                formation=formation,
                share=share,
                steps=steps,
                sample=sample,
                control_draws=control_draws,
                readout_blocks=readout_blocks,
                min_gap=min_gap,
                seed=seed,
                memory_budget=bytes_allowed,
                progress=rows,
            )
        found.config["command"] = command_line()
        found.save(out, force=force)
        _print(found, out, as_json)
        write_pages([out], as_json)


def _print(found: Any, out: Path, as_json: bool) -> None:
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
