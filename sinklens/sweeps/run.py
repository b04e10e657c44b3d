"""``sinklens.sweep``: the full grid of patches, streamed to disk and taken up again after any interruption."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa

from sinklens.edits import Edit
from sinklens.engine.given import check_count
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.metrics.sink import EPS
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.pairs import InducedKind
from sinklens.pairs.ablations import EditLike
from sinklens.pairs.choice import STRENGTH, Target
from sinklens.prompts import PromptBatch, check_batch
from sinklens.readouts.named import READOUTS, ReadoutLike
from sinklens.records.explained import explained
from sinklens.records.progress import Progress, progress_of
from sinklens.records.ranges import SEEDS, Between, Range, check_arguments
from sinklens.sweeps.companions import Companions
from sinklens.sweeps.execution import Execution, Planned
from sinklens.sweeps.keeping import check_kept
from sinklens.sweeps.local import Interrupted, run_local
from sinklens.sweeps.places import Place
from sinklens.sweeps.plan import ModelSpec, Plan
from sinklens.sweeps.planning import Planner
from sinklens.sweeps.ray.cluster import Cluster
from sinklens.sweeps.ray.crew import run_ray
from sinklens.sweeps.reading import FolderShards, MemoryShards
from sinklens.sweeps.request import Answers, Request
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.screening import verify
from sinklens.sweeps.seal import Damage, read_sealed
from sinklens.sweeps.store import FolderSink, MemorySink, Sink

logger = logging.getLogger(__name__)

Engine = Callable[..., None]
ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}
"""Who runs the pending tasks: ``(model, plan, sink, pending, *, memory_budget, max_rows, progress)``, ``ray`` on a
``cluster``."""
MOST_ROWS = 50_000_000
"""Rows that a sweep without a folder may have: they stay in memory."""


@explained
def sweep(
    model: Model,
    batch: PromptBatch,
    *,
    stages: Annotated[
        Place | Sequence[Place],
        "Stages of the chain, or sites: resid_pre, attn_out, mlp_out, z, q, k, v, mlp_post, ...",
    ] = ("resid_pre", "attn_out", "mlp_out"),
    layers: Annotated[Range, "Blocks, `all` or a range such as 0-29 or 1-63:4 or 3,5,7-9."] = "all",
    window: Annotated[int, "Consecutive blocks that a patch edits, from each of the layers on."] = 1,
    positions: Annotated[
        Range, "Token positions, `target` (the sink's, in every prompt), `all` or a range."
    ] = "target",
    units: Annotated[
        Range | None,
        "Each by itself: `heads`, `neurons`, `dims` of the sites that have such, `all` of every site, or a range. "
        "By default whole activations, or all a stage's own units (the super neurons) at once.",
    ] = None,
    edits: Annotated[
        EditLike | Sequence[EditLike],
        "transplant, zero, mean, resample, sink_mean, deviation_exchanged, mean_exchanged.",
    ] = ("transplant",),
    companions: Annotated[
        Companions,
        "PLACE:EDIT[:LAYERS[:UNITS]], such as super_neurons:zero or z:transplant:12:3: an edit that is held fixed "
        "in every patched row, at the target; several with spaces between.",
    ] = (),
    directions: Annotated[
        str | Sequence[str] | None, "denoise, noise; both by default (the natural sink can only be noised)."
    ] = None,
    target: Annotated[Target, "Position that is made a sink, or `natural` for the data's own."] = 10,
    pair: Annotated[InducedKind, "How the sink is made at the target."] = "block_aggregation",
    strength: Annotated[float, "Lambda of amplify_variance."] = STRENGTH,
    pair_layers: Annotated[Sequence[int] | None, "Blocks of that intervention, such as 0-2."] = None,
    formation: Annotated[Formation | None, "Where the sink forms; found if not given."] = None,
    readouts: Annotated[
        ReadoutLike | Sequence[ReadoutLike],
        f"{', '.join(READOUTS)}; several by commas.",
    ] = ("attention_received",),
    readout_layers: Annotated[
        Range, "Blocks that are read: `formation` (the four after it), `last` (four), or a range."
    ] = "formation",
    answers: Annotated[
        Answers | None,
        "For logit_diff: answer and alternative of every prompt; by default the model's two most probable tokens.",
    ] = None,
    eps: Annotated[float, "Threshold of sink_rate."] = EPS,
    min_gap: Annotated[
        float,
        "No effect where the pair moves a readout by less: an absolute difference for shares of attention, for other "
        "readouts that part of the larger value.",
        Between(0),
    ] = 0.01,
    method: Annotated[
        str, "exact; attribution: estimated from gradients; screen: estimated, the strongest and a sample run too."
    ] = "exact",
    top: Annotated[int, "For screen: how many of the strongest to run.", Between(1)] = 200,
    sample: Annotated[int, "For screen: how many to draw at random and run.", Between(3)] = 200,
    engine: Annotated[
        str, "Who runs the tasks: `local`, this process; `ray`, several, here or on a cluster."
    ] = "local",
    workers: Annotated[int | None, "For ray: how many copies of the model run tasks."] = None,
    gpus_per_worker: Annotated[
        float | None, "For ray: GPUs of each; below 1 several share one. By default as many as the model is on."
    ] = None,
    threads_per_worker: Annotated[int | None, "For ray: CPU threads of each; 1 by default."] = None,
    ray_address: Annotated[
        str | None, "For ray: a cluster, `auto` or HOST:PORT; all its machines must see the folder `out`."
    ] = None,
    out: Annotated[
        str | Path | None, "Folder for the results; the same sweep is taken up there again. `None`: memory."
    ] = None,
    shard: Annotated[tuple[int, int] | None, "I/N: run every N-th task only, from the I-th on."] = None,
    force: Annotated[bool, "Replace what an earlier sweep has left there."] = False,
    task_size: Annotated[int | None, "Patches in a task, which is written at once.", Between(1)] = None,
    group_size: Annotated[int | None, "Prompts whose runs are kept at once.", Between(1)] = None,
    seed: Annotated[int, "Fixes every random draw.", SEEDS] = 0,
    memory_budget: Annotated[int | None, "Bytes that the activations of one forward pass may take."] = None,
    max_rows: Annotated[int | None, "Rows per forward pass, in place of the memory budget.", Between(1)] = None,
    progress: Annotated[
        Progress | bool | None,
        "Called with (rows done, rows in all), patches times prompts; True or False for a line or none. By default a "
        "line in terminals and notebooks.",
    ] = None,
    planned: Annotated[Planned | None, "Called with the plan and the pending tasks before anything is run."] = None,
    model_spec: Annotated[
        ModelSpec | None,
        "For ray: arguments of load_model that give this model (without the device), or a function that returns it; "
        "by default workers are sent this one.",
    ] = None,
) -> SweepResult:
    """Patch every cell of the grid stage x layer x position x unit x edit x direction on every prompt.

    Every argument that can be written as text is an option of ``sinklens sweep``. Stages, edits, directions and
    readouts are names (in a text with commas, or a list), or things themselves: a :class:`~sinklens.Stage` or
    :class:`~sinklens.HookSite`, an :class:`~sinklens.Edit`, a :class:`~sinklens.Readout` or a function of logits, or of
    logits and rows, that gives one number a row. A range is ``0-29``, ``1-63:4``, ``3,5,7-9``, ``all``, or a sequence
    of ints. An effect counts from the run that is patched: 0 is that run, 1 the other one of the pair (see
    :mod:`sinklens.chain.result`); with companions, what they do counts too.

    Raises:
        InputError: an argument that does not fit model and prompts; ``out`` holds another sweep or cannot be written.
        NoSinkError: the model has no sink on these prompts.
        EngineError: a patch's activations are not finite.
        Interrupted: (a KeyboardInterrupt) by Ctrl-C, when running tasks are finished; its ``result`` has these. Call
            again with the same ``out`` to go on. A second Ctrl-C is heard at once.
    """
    arguments = locals()
    # Whether numbers are within their limits is said in words of their own.
    check_arguments(sweep, arguments, limits=False)
    request = Request.of(arguments)
    with progress_of(progress, "sweep") as told:
        arguments["progress"] = told
        if planned is None and told is not None and told is not progress:
            arguments["planned"] = _say_if_nothing_is_left
        return run_sweep(model, batch, request, Execution.of(arguments))


def _say_if_nothing_is_left(_plan: Plan, pending: Sequence[int]) -> None:
    if not pending:
        sys.stderr.write("nothing was run: all of this sweep that is to be run here had been finished\n")


@in_usual_state
def run_sweep(model: Model, batch: PromptBatch, request: Request, execution: Execution) -> SweepResult:
    """:func:`sinklens.sweep`, of arguments that were read."""
    check_batch(model, batch)
    for edit in (*request.edits, *(companion.edit for companion in request.companions)):
        if isinstance(edit, Edit):
            check_count(edit, batch.n)
    check_kept(model, request, execution)
    cluster, sink = prepare(execution)
    plan, record = Planner(model, batch, request, execution).begin(sink)
    _check_size(plan, execution)
    pending = pending_tasks(plan, _sound(plan, sink, execution.shard), execution.shard)
    if execution.planned is not None:
        execution.planned(plan, pending)
    options: dict[str, Any] = {**execution.limits, "progress": execution.progress}
    if cluster is not None:
        options["cluster"] = cluster
    stopped = _run_tasks(ENGINES[execution.engine], model, plan, sink, pending, options)
    folder = None if isinstance(sink, MemorySink) else sink.folder
    shards = MemoryShards(sink.tables) if isinstance(sink, MemorySink) else FolderShards(sink.folder)
    result = SweepResult(record, shards, folder)
    if stopped is None and request.method == "screen" and not result.missing:
        result, stopped = _with_exact(model, plan, result, sink, execution)
    if stopped is not None:
        raise _told(stopped, result)
    return result


def _run_tasks(
    engine: Engine, model: Model, plan: Plan, sink: Sink, pending: Sequence[int], options: Mapping[str, Any]
) -> str | None:
    """Run them; what is to be said if that was stopped by Ctrl-C.

    It is said later, outside of this ``except``: an exception that is kept would keep the worker and its copies of
    weights and activations.
    """
    try:
        if pending:
            engine(model, plan, sink, pending, **options)
    except Interrupted as error:
        return str(error)
    return None


def _with_exact(
    model: Model, plan: Plan, result: SweepResult, sink: MemorySink | FolderSink, execution: Execution
) -> tuple[SweepResult, str | None]:
    """A screened sweep's result with its exact rows; or as it is, and what is to be said if Ctrl-C stopped them."""
    try:
        if _verified(sink) is None:
            sink.write_verified(verify(model, plan, result, **execution.limits))
    except KeyboardInterrupt:
        return result, "interrupted: all estimates are there, and no exact rows"
    return replace(result, exact_rows=sink.verified()), None


def _told(stopped: str, result: SweepResult) -> Interrupted:
    """The exception for the user, who finds what is finished on it."""
    folder = result.folder is not None
    kept = "call it again with the same out to go on" if folder else "what is finished is this exception's result"
    error = Interrupted(f"{stopped}; {kept}")
    error.result = result
    return error


def prepare(execution: Execution) -> tuple[Cluster | None, MemorySink | FolderSink]:
    """What the tasks run on and where the rows go; all that can be said of these before the model is there.

    Raises:
        InputError: an unknown engine, options that do not fit it, or a folder that cannot be used.
    """
    if execution.engine not in ENGINES:
        raise InputError(f"engine {execution.engine!r}: choose {', '.join(ENGINES)}")
    return execution.cluster(), execution.sink()


def pending_tasks(plan: Plan, finished: set[str], shard: tuple[int, int] | None = None) -> list[int]:
    """Numbers of the tasks that are left to this shard."""
    first, step = (0, 1) if shard is None else (shard[0] - 1, shard[1])
    return [index for index in range(first, len(plan.tasks), step) if plan.task_id(index) not in finished]


def _sound(plan: Plan, sink: MemorySink | FolderSink, shard: tuple[int, int] | None) -> set[str]:
    """Names of the tasks of this shard that are done and as they were written; of others it is said."""
    finished = sink.finished()
    if isinstance(sink, MemorySink) or not finished:
        return finished
    damaged = {}
    for index in pending_tasks(plan, set(), shard):
        task = plan.task_id(index)
        if task in finished:
            try:
                read_sealed(sink.path(task), task)
            except Damage as damage:
                damaged[task] = str(damage)
    if damaged:
        first, why = next(iter(damaged.items()))
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        logger.warning("%s%s in %s is damaged (%s) and run again", first, more, sink.folder, why)
    return finished - set(damaged)


def _verified(sink: MemorySink | FolderSink) -> pa.Table | None:
    """The exact rows of a screened sweep, if they are there and as they were written; if not, that is said."""
    try:
        return sink.verified()
    except InputError as error:
        logger.warning("%s; it is run again now", error)
        return None


def _check_size(plan: Plan, execution: Execution) -> None:
    rows = plan.grid.n_patches * plan.batch.n * len(plan.choices.readouts)
    if execution.out is None and rows > MOST_ROWS:
        raise InputError(f"the table would have {rows:,} rows: give out, a folder for them")
