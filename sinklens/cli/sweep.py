"""``sinklens sweep`` and ``sinklens gather``."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklens.cli.common import (
    Backend,
    BackendOption,
    BlockOption,
    BosOption,
    CountOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelOption,
    NeuronsOption,
    Pair,
    PromptsOption,
    SeedOption,
    budget,
    errors,
    fail,
    given_formation,
    integers,
    load,
)
from sinklens.cli.display import sweep_display

if TYPE_CHECKING:
    from sinklens.sweeps import SweepResult

_RANGE = "such as 0-29 or 1-63:4 or 3,5,7-9"


def sweep(
    model: ModelOption = "smollm2",
    stages: Annotated[
        str, typer.Option(help="Stages of the chain, or sites: resid_pre, attn_out, mlp_out, z, q, k, v, mlp_post, ...")
    ] = "resid_pre,attn_out,mlp_out",
    layers: Annotated[str, typer.Option(help=f"Blocks, `all` or a range {_RANGE}.")] = "all",
    window: Annotated[int, typer.Option(help="Consecutive blocks that a patch edits, from each of the layers on.")] = 1,
    positions: Annotated[str, typer.Option(help="Token positions, `target`, `all` or a range.")] = "target",
    units: Annotated[
        str | None, typer.Option(help="`heads`, `neurons`, `dims`, `all` or a range: each by itself.")
    ] = None,
    edits: Annotated[str, typer.Option(help="transplant, zero, mean, resample.")] = "transplant",
    directions: Annotated[str | None, typer.Option(help="denoise, noise; both by default.")] = None,
    target: Annotated[str, typer.Option(help="Position that is made a sink, or `natural` for the data's own.")] = "10",
    pair: Annotated[Pair, typer.Option(help="How the sink is made at the target.")] = Pair.block_aggregation,
    strength: Annotated[float, typer.Option(help="Lambda of amplify_variance.")] = 8.0,
    pair_layers: Annotated[str | None, typer.Option(help="Blocks of that intervention, such as 0-2.")] = None,
    readouts: Annotated[
        str,
        typer.Option(
            help="attention_received, alpha, sink_rate, residual_norm, dominance, logit_diff, loss; several by commas."
        ),
    ] = "attention_received",
    readout_layers: Annotated[
        str, typer.Option(help="Blocks that are read: `formation` (the four after it), `last` (four), or a range.")
    ] = "formation",
    length: LengthOption = 64,
    n: CountOption = 8,
    prompts: PromptsOption = "passages",
    bos: BosOption = False,
    block: BlockOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    min_gap: Annotated[float, typer.Option(help="No effect where the pair moves a readout by less.")] = 0.01,
    method: Annotated[
        str,
        typer.Option(
            help="exact; attribution: estimated from gradients; screen: estimated, the strongest and a sample run too."
        ),
    ] = "exact",
    top: Annotated[int, typer.Option(min=1, help="For screen: how many of the strongest to run.")] = 200,
    sample: Annotated[int, typer.Option(min=3, help="For screen: how many to draw at random and run.")] = 200,
    engine: Annotated[
        str, typer.Option(help="Who runs the tasks: `local`, this process; `ray`, several, here or on a cluster.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(help="For ray: how many copies of the model run tasks.")] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="For ray: GPUs of each; below 1 several share one. By default --devices.")
    ] = None,
    threads_per_worker: Annotated[int | None, typer.Option(help="For ray: CPU threads of each; 1 by default.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="For ray: a cluster, `auto` or HOST:PORT; all its machines must see the folder --out."),
    ] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: run every N-th task only, from the I-th on.")] = None,
    task_size: Annotated[int | None, typer.Option(min=1, help="Patches in a task.")] = None,
    group_size: Annotated[int | None, typer.Option(min=1, help="Prompts whose runs are kept at once.")] = None,
    device: DeviceOption = "auto",
    devices: Annotated[int, typer.Option(min=1, help="GPUs that one model's blocks are spread over.")] = 1,
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; the same sweep is taken up there again.")] = Path(
        "runs/sweep"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier sweep has left there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Patch a whole grid: stage x layer x position x unit x edit x direction. Can be interrupted and taken up."""
    with errors():
        given = given_formation(block, super_neurons, outlier_dims)
        allowed = budget(memory_budget)
        part = None if shard is None else _shard(shard)
        if not (math.isfinite(min_gap) and min_gap >= 0):
            fail(f"--min-gap {min_gap} must be a finite number, 0 or more")
        wanted: dict[str, Any] = {
            "stages": _names("--stages", stages),
            "layers": layers,
            "window": window,
            "positions": positions,
            "units": units,
            "edits": _names("--edits", edits),
            "target": _target(target, length),
            "directions": None if directions is None else _names("--directions", directions),
            "pair": pair.value,
            "strength": strength,
            "pair_layers": None if pair_layers is None else integers("--pair-layers", pair_layers),
            "readouts": _names("--readouts", readouts),
            "readout_layers": readout_layers,
            "min_gap": min_gap,
            "method": method,
            "top": top,
            "sample": sample,
            "seed": seed,
            "task_size": task_size,
            "group_size": group_size,
        }
        ray = {
            "workers": workers,
            "gpus_per_worker": gpus_per_worker,
            "threads_per_worker": threads_per_worker,
            "ray_address": ray_address,
        }
        _check(wanted, length, out, force, method, engine, ray, part)
        began = time.monotonic()
        try:
            with sweep_display() as display:
                where = (model, device, dtype, backend, prompts, n, length, bos, seed, devices)
                loaded, batch = load(display.step, *where)
                import sinklens

                if given:
                    display.step("finding the formation block")
                    wanted["formation"] = sinklens.find_formation(loaded, batch, memory_budget=allowed, **given)
                display.step("planning")
                spec = {"model": model, "dtype": dtype.value, "backend": backend.value, "devices": devices}
                result = sinklens.sweep(
                    loaded,
                    batch,
                    **wanted,
                    engine=engine,
                    **ray,
                    out=out,
                    shard=part,
                    force=force,
                    memory_budget=allowed,
                    progress=display.rows,
                    planned=display.planned,
                    model_spec=spec,
                )
        except KeyboardInterrupt as error:
            told = str(error).partition(";")[0] or "interrupted"
            typer.echo(f"sinklens: {told}; run the same command again to go on", err=True)
            raise typer.Exit(130) from None
        _print(result, out, part, time.monotonic() - began, as_json)


def _names(option: str, text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        fail(f"{option} is empty: name at least one")
    return found


def _target(text: str, length: int) -> int | str:
    if text == "natural":
        return text
    try:
        target = int(text)
    except ValueError:
        fail(f"--target {text!r} must be a position such as 10, or natural")
    if not 0 < target < length - 1:
        fail(f"--target {target} must be in 1..{length - 2}: with --length {length} it needs earlier and later tokens")
    return target


def _shard(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit()):
        fail(f"--shard {text!r} must be I/N, such as 1/4")
    return int(first), int(of)


def _check(
    wanted: dict[str, Any],
    length: int,
    out: Path,
    force: bool,
    method: str,
    engine: str,
    ray: dict[str, Any],
    shard: Any,
) -> None:
    """All that can be said before the model is loaded."""
    from sinklens.sweeps.ray.cluster import cluster_of
    from sinklens.sweeps.request import Request, check_request
    from sinklens.sweeps.run import check_how
    from sinklens.sweeps.store import FolderSink

    check_request(Request(**wanted), length)
    check_how(method, engine, shard)
    cluster_of(engine, **ray)
    FolderSink(out).check_writable(force=force)


def _print(result: SweepResult, out: Path, shard: Any, seconds: float, as_json: bool) -> None:
    from sinklens.cli.tables import console

    if as_json:
        from sinklens.records.plain import to_plain

        data = {**result.record, "overview": result.overview().to_dict("records"), "folder": str(out)}
        print(json.dumps(to_plain(data), indent=1, ensure_ascii=False))  # noqa: T201  (the command's output)
        return
    screen = console()
    missing = result.missing
    if missing:
        whose = "other shards" if shard else "other processes"
        line = f"{len(missing):,} of {len(result.task_ids()):,} tasks are left to {whose}; results so far: {out}"
        screen.print(line, markup=False, soft_wrap=True)
        return
    from sinklens.cli.tables_sweep import judged_table, overview_table, strongest_table, verified_table

    screen.print(overview_table(result))
    screen.print(strongest_table(result))
    if odd := result.n_nonfinite():
        line = f"{odd:,} rows have no value: the patched run's activations or readout were not finite there"
        screen.print(line, markup=False, soft_wrap=True)
    verified = result.verified
    if verified is not None:
        screen.print(verified_table(verified))
        screen.print(judged_table(result.judged()))
    screen.print(f"{len(result):,} rows in {seconds:.1f} s. Results: {out}", markup=False, soft_wrap=True)
