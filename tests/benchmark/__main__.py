"""Patching sweeps side by side: sinklens, TransformerLens, nnsight and pyvene on the same model, in one process.

    python -m tests.benchmark --model smollm2 --length 64 --patches 64,256,1024 --out runs/benchmark

Every peer transplants resid_pre of a source run (the same tokens in another order) into the clean run, one (block,
position) cell at a time, and reads the attention that position 0 receives from later queries in the last block but one.
Numbers are compared before anything is timed; see tests.benchmark for how each library is used. nnsight and pyvene
are left out, with a sentence, where they are not installed.
"""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.command import Commands
from sinklens.cli.display import progress
from sinklens.cli.mistakes import errors
from sinklens.records.ranges import integers


class Format(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, cls=Commands)


@app.command()
def benchmark(
    model: Annotated[str, typer.Option(help="smollm2, llama-2-7b, llama-3-8b or tiny.")] = "smollm2",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[Format, typer.Option(help="Format of the weights.")] = Format.fp32,
    peers: Annotated[
        str, typer.Option(help="Which libraries, in order.")
    ] = "transformer_lens,run_with_hooks,nnsight,pyvene,sinklens",
    patches: Annotated[str, typer.Option(help="Numbers of patches.")] = "64,256,1024,4096,16384",
    length: Annotated[int, typer.Option(help="Tokens in a prompt.")] = 128,
    lengths: Annotated[str, typer.Option(help="Also vary the length, such as 32,128,512,1024.")] = "",
    blocks: Annotated[str, typer.Option(help="Also vary the patched blocks, such as 1,8,16: the last ones.")] = "",
    chain: Annotated[
        bool, typer.Option("--chain", help="Also patches up to the formation block, read in the four after it.")
    ] = False,
    formation: Annotated[int, typer.Option(help="That formation block.")] = 1,
    count: Annotated[int, typer.Option(help="Patches where their number does not vary.")] = 1024,
    readout: Annotated[int | None, typer.Option(help="Block to read; the last but one by default.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="smollm2's shape without its weights.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every peer.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="About the longest a timed run may take.")] = 2.0,
    time_limit: Annotated[float, typer.Option(help="Start no further case after so many seconds.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Fixes weights, prompts and cells.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for table, JSON and figure; files there are replaced.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Time the same patching sweep with sinklens and its peers."""
    with errors(), progress() as (step, _):
        plan_numbers = {"patches": patches, "lengths": lengths, "blocks": blocks}
        numbers = {name: integers(f"--{name}", text) if text else () for name, text in plan_numbers.items()}
        step("loading the model")
        import torch

        from sinklens.cli.tables import console
        from tests.benchmark import cases, measure, run, shapes

        plan = cases.Plan(
            **numbers,
            length=length,
            chain=chain,
            formation=formation,
            count=count,
            readout=readout,
            seed=seed,
        )
        formats = {Format.fp32: torch.float32, Format.bf16: torch.bfloat16}
        todo = cases.make_cases(plan, model, *shapes.known(model))
        names = measure.peer_names(peers)
        loaded = shapes.load_models(model, device, formats[dtype], published=not random_weights, seed=seed)
        settings = {"command": shlex.join(["python", *sys.argv]), "repeats": repeats, "seconds": seconds, "seed": seed}
        limits = measure.Limits(repeats, seconds)
        run.run_benchmark(
            loaded,
            todo,
            names,
            limits,
            out,
            settings=settings,
            screen=console(),
            time_limit=time_limit,
            step=step,
        )
        typer.echo(f"Results: {out}")


if __name__ == "__main__":
    app()
