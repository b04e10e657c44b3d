"""``sinklens chain``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.cli.common import (
    TOO_FEW,
    Backend,
    BackendOption,
    BlockOption,
    BosOption,
    CountOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
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
    target_of,
    write_report,
)
from sinklens.records.ranges import MOST_REPEATS, integers


def chain(
    model: ModelOption = "smollm2",
    target: Annotated[str, typer.Option(help="Position that is made a sink, or `natural` for the data's own.")] = "10",
    pair: Annotated[Pair, typer.Option(help="How the sink is made at the target.")] = Pair.block_aggregation,
    metric: Annotated[
        str, typer.Option(help="What is measured of the sink: attention_received, alpha, sink_rate, logit_diff, ...")
    ] = "attention_received",
    strength: Annotated[float, typer.Option(help="Lambda of amplify_variance.")] = 8.0,
    pair_layers: Annotated[
        str | None, typer.Option(help="Blocks of that intervention, such as `0-2` or `0,3`; see the documentation.")
    ] = None,
    length: LengthOption = 64,
    n: CountOption = 16,
    prompts: PromptsOption = "passages",
    bos: BosOption = False,
    block: BlockOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    readout_blocks: Annotated[int, typer.Option(min=1, help="Blocks after formation to measure attention in.")] = 4,
    control_draws: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Repetitions of random draws.")] = 3,
    min_gap: Annotated[float, typer.Option(help="Exclude prompts whose metric the pair moves by less.")] = 0.01,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/chain"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of the attention-sink chain, with controls and intervals."""
    with errors():
        from sinklens.records.files import check_out

        wanted = target_of(target, length)
        if n < 2:
            fail(TOO_FEW.format(f"--n is {n}"))
        for name, value, least in (("--min-gap", min_gap, 0.0), ("--strength", strength, -math.inf)):
            if not (math.isfinite(value) and value >= least):
                fail(f"{name} {value} must be a finite number" + (f", {least} or more" if least == 0 else ""))
        bytes_allowed = budget(memory_budget)
        given = given_formation(block, super_neurons, outlier_dims)
        blocks = None if pair_layers is None else integers("--pair-layers", pair_layers)
        check_out(out, force=force)
        with progress() as (step, rows):
            loaded, batch = load(
                step,
                model=model,
                device=device,
                dtype=dtype,
                backend=backend,
                prompts=prompts,
                n=n,
                length=length,
                bos=bos,
                seed=seed,
            )
            if batch.n < 2:
                fail(TOO_FEW.format(f"only {batch.n} in {batch.source} has {length} tokens or more"))
            from sinklens.chain.run import run_chain
            from sinklens.formation import find_formation

            step("scoring the chain")
            formation = find_formation(loaded, batch, memory_budget=bytes_allowed, **given) if given else None
            result = run_chain(
                loaded,
                batch,
                formation=formation,
                target=wanted,
                pair=pair.value,
                metric=metric,
                strength=strength,
                pair_layers=blocks,
                readout_blocks=readout_blocks,
                control_draws=control_draws,
                min_gap=min_gap,
                seed=seed,
                progress=rows,
                memory_budget=bytes_allowed,
            )
            result.config["command"] = command_line()
            result.save(out, force=force)
            step("writing the report")
            page = write_report(out)
        _print_chain(result, out, page, as_json)


def _print_chain(result: Any, out: Path, page: Path | None, as_json: bool) -> None:
    from sinklens.cli.tables import chain_footer, chain_table, console

    if as_json:
        sys.stdout.write((out / "chain.json").read_text(encoding="utf-8") + "\n")
        return
    screen = console()
    screen.print(chain_table(result))
    for line in chain_footer(result):
        screen.print(line, markup=False)
    screen.print(f"Results: {out}" + (f"; report: {page}" if page else ""), markup=False, soft_wrap=True)
