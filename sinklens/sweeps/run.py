"""``sinklens.sweep``: the full grid of patches, streamed to disk and taken up again after any interruption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinklens.edits import Edit
from sinklens.engine.run import Progress
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.view import Model
from sinklens.pairs.pair import PairKind
from sinklens.prompts import PromptBatch
from sinklens.readouts.named import ReadoutLike
from sinklens.records.ranges import Range
from sinklens.study import provenance
from sinklens.sweeps.local import Interrupted, run_local
from sinklens.sweeps.places import Place
from sinklens.sweeps.plan import ModelSpec, Plan, check_same
from sinklens.sweeps.planning import choices_of, new_record, plan_from
from sinklens.sweeps.ray.cluster import cluster_of
from sinklens.sweeps.ray.crew import run_ray
from sinklens.sweeps.request import Answers, Request, check_request
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.screening import verify
from sinklens.sweeps.shards import FolderShards, MemoryShards
from sinklens.sweeps.store import FolderSink, MemorySink

logger = logging.getLogger(__name__)

Engine = Callable[..., None]
ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}
"""Who runs the pending tasks: ``(model, plan, sink, pending, *, memory_budget, max_rows, progress)``, ``ray`` on a
``cluster``."""
METHODS = ("exact", "attribution", "screen")
"""How effects are found: by running every patch; estimated from gradients (:mod:`sinklens.attribution`); or estimated,
with the strongest and a random sample of all run exactly (:mod:`sinklens.sweeps.screening`)."""
MOST_ROWS = 50_000_000
"""Rows that a sweep without a folder may have: they stay in memory."""


def sweep(
    model: Model,
    batch: PromptBatch,
    *,
    stages: Place | Sequence[Place] = ("resid_pre", "attn_out", "mlp_out"),
    layers: Range = "all",
    window: int = 1,
    positions: Range = "target",
    units: Range | None = None,
    edits: str | Edit | Sequence[str | Edit] = ("transplant",),
    directions: str | Sequence[str] | None = None,
    target: int | str = 10,
    pair: PairKind = "block_aggregation",
    strength: float = 8.0,
    pair_layers: Sequence[int] | None = None,
    formation: Formation | None = None,
    readouts: ReadoutLike | Sequence[ReadoutLike] = ("attention_received",),
    readout_layers: Range = "formation",
    answers: Answers | None = None,
    eps: float = 0.3,
    min_gap: float = 0.01,
    method: str = "exact",
    top: int = 200,
    sample: int = 200,
    engine: str = "local",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    threads_per_worker: int | None = None,
    ray_address: str | None = None,
    out: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    force: bool = False,
    task_size: int | None = None,
    group_size: int | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    planned: Callable[[Plan, Sequence[int]], None] | None = None,
    model_spec: ModelSpec | None = None,
) -> SweepResult:
    """Patch every cell of the grid stage x layer x position x unit x edit x direction on every prompt.

    Stages, edits, directions and readouts are lists, or names in a text with commas. A range is ``0-29``, ``1-63:4``,
    ``3,5,7-9``, ``all``, or a sequence of ints. An effect counts from the run that is patched: 0 is that run, 1 the
    other one of the pair (see :mod:`sinklens.chain.result`).

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        stages: stages of the chain or sites (see :data:`sinklens.sweeps.places.SITES`), by name or themselves.
        layers: blocks; the first ones, of windows of several.
        window: consecutive blocks that a patch edits.
        positions: token positions, ``all``, or ``target``: the sink's position in every prompt.
        units: ``heads``, ``neurons``, ``dims`` or several of them: each unit of the sites that have such units by
            itself; ``all``: of every site; numbers: these, of every site. ``None``: whole activations, or all the units
            of a stage that has some of its own (the super neurons) at once.
        edits: ``transplant``, ``zero``, ``mean``, ``resample`` (see :mod:`sinklens.pairs.ablations`), or edits.
        directions: ``denoise``, ``noise``; all that the pair has by default (the natural sink can only be noised).
        target: position that is made a sink, or ``natural`` for the sink that the data has.
        pair: how the sink is made at ``target``: ``block_aggregation`` or ``amplify_variance``.
        strength: lambda of ``amplify_variance``.
        pair_layers: blocks of that intervention.
        formation: where the sink forms; found if not given.
        readouts: names (see :mod:`sinklens.readouts.named`), readouts, or functions ``(logits, rows) -> [row]``.
        readout_layers: ``formation``: the four blocks after the formation block; ``last``: the model's last four; or a
            range.
        answers: for ``logit_diff``, answer and alternative of every prompt; by default the clean model's most probable
            next token and the second.
        eps: threshold of ``sink_rate``.
        min_gap: effects are NaN where the pair's runs differ by less: an absolute difference for shares of attention,
            for other readouts that part of the larger value.
        method: ``exact``; ``attribution`` for estimates from gradients, which take some passes for the whole grid; or
            ``screen``: estimates, and the patches that look strongest on the first readout and a random sample run
            exactly (see :attr:`SweepResult.verified`).
        top: for ``screen``, how many of the strongest.
        sample: for ``screen``, how many drawn at random from all.
        engine: ``local``: this process; ``ray``: several, here or on a cluster (``pip install 'sinklens[ray]'``).
        workers: for ``ray``, how many copies of the model run tasks at the same time.
        gpus_per_worker: for ``ray``, GPUs of each; below 1 several share one. By default as many as the model is on.
        threads_per_worker: for ``ray``, CPU threads of each worker; 1 by default.
        ray_address: of a Ray cluster that is there, such as ``auto`` or ``HOST:6379``, all machines of which must see
            the folder ``out``; by default, workers are processes of this machine.
        out: folder for the results, where a sweep with the same choices is taken up again; ``None``: memory.
        shard: ``(i, n)``: run every n-th task from the i-th on (1 to n), so that n processes share the work.
        force: replace what an earlier sweep has left in ``out``.
        task_size: patches in a task, the unit of work that is written at once.
        group_size: prompts whose runs are kept at once.
        seed: fixes every draw.
        memory_budget: bytes that the activations of one forward pass may take.
        max_rows: rows per forward pass, in place of the memory budget.
        progress: called with (rows done, rows in all), rows being patches times prompts.
        planned: called with the plan and the numbers of the pending tasks before anything is run.
        model_spec: for ``ray``, arguments of :func:`sinklens.load_model` that give this model (without the device), or
            a function that returns it; by default, workers are sent this one.

    Raises:
        InputError: an argument that does not fit model and prompts; ``out`` holds another sweep or cannot be written.
        NoSinkError: the model has no sink on these prompts.
        EngineError: a patch's activations are not finite.
        KeyboardInterrupt: by Ctrl-C, when running tasks are finished; call again with the same ``out`` to go on.
    """
    request = Request(
        listed(stages),
        layers,
        window,
        positions,
        units,
        listed(edits),
        None if directions is None else listed(directions),
        target,
        pair,
        strength,
        None if pair_layers is None else tuple(pair_layers),
        formation,
        listed(readouts),
        readout_layers,
        answers,
        eps,
        min_gap,
        method,
        top,
        sample,
        seed,
        task_size,
        group_size,
    )
    check_request(request, batch.length)
    check_how(method, engine, shard)
    options: dict[str, Any] = {"memory_budget": memory_budget, "max_rows": max_rows, "progress": progress}
    cluster = cluster_of(engine, workers, gpus_per_worker, threads_per_worker, ray_address, folder=out is not None)
    if cluster is not None:
        options["cluster"] = cluster
    sink = MemorySink() if out is None else FolderSink(out)
    if isinstance(sink, FolderSink):
        sink.check_writable(force=force)
    record = _record(sink, request, model, batch, memory_budget, force)
    plan = plan_from(record, request, model, batch, memory_budget, model_spec)
    _check_size(plan, out)
    pending = pending_tasks(plan, sink.finished(), shard)
    if planned is not None:
        planned(plan, pending)
    try:
        if pending:
            ENGINES[engine](model, plan, sink, pending, **options)
    except Interrupted as error:
        how = "call it again with the same out to go on" if out is not None else "without out, nothing of it is kept"
        raise Interrupted(f"{error}; {how}") from None
    shards = MemoryShards(sink.tables) if isinstance(sink, MemorySink) else FolderShards(sink.folder)
    result = SweepResult(record, shards, None if isinstance(sink, MemorySink) else sink.folder)
    if method != "screen" or result.missing:
        return result
    if sink.verified() is None:
        sink.write_verified(verify(model, plan, result, memory_budget=memory_budget, max_rows=max_rows))
    return replace(result, exact_rows=sink.verified())


def listed(given: Any) -> tuple[Any, ...]:
    """A list of names or things; one alone, or names in a text with commas, will do."""
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(",") if name.strip())
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def check_how(method: str, engine: str, shard: tuple[int, int] | None) -> None:
    """Refuse an unknown method, engine or shard.

    Raises:
        InputError: with what there is.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r}: choose {', '.join(METHODS)}")
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r}: choose {', '.join(ENGINES)}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise InputError(f"shard {shard[0]}/{shard[1]}: write I/N with I in 1-N, such as 1/4")


def pending_tasks(plan: Plan, finished: set[str], shard: tuple[int, int] | None = None) -> list[int]:
    """Numbers of the tasks that are left to this shard."""
    first, step = (0, 1) if shard is None else (shard[0] - 1, shard[1])
    return [index for index in range(first, len(plan.tasks), step) if plan.task_id(index) not in finished]


def _record(
    sink: MemorySink | FolderSink,
    request: Request,
    model: Model,
    batch: PromptBatch,
    memory_budget: int | None,
    force: bool,
) -> dict[str, Any]:
    """The sweep's record: the one that is there, if it is of the same sweep; else a new one."""
    origin = provenance(model, batch)
    choices = choices_of(request, model, batch, origin)
    there = None if force else sink.record()
    if there is None:
        new = new_record(request, choices, model, batch, origin, memory_budget)
        if force and isinstance(sink, FolderSink):
            sink.clear()  # not before it is known that the new sweep can be
        there = sink.create(new)
    else:
        _compare_versions(there["provenance"]["versions"], origin["versions"])
    # How the grid is cut is taken from the folder where the caller does not say.
    cut = {name: there["tasks"][name] for name in ("task_size", "group_size") if getattr(request, name) is None}
    check_same(there["choices"], {**choices, **cut}, getattr(sink, "folder", "memory"))
    return there


def _compare_versions(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Say so when other versions of the packages go on with a sweep: its numbers may differ in the last digits."""
    differ = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if differ:
        logger.warning("this sweep was begun with other versions: %s", "; ".join(differ))


def _check_size(plan: Plan, out: object) -> None:
    rows = plan.grid.n_patches * plan.batch.n * len(plan.readouts)
    if out is None and rows > MOST_ROWS:
        raise InputError(f"the table would have {rows:,} rows: give out, a folder for them")
