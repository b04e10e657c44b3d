"""The whole benchmark: cases one after the other, each checked, timed, printed and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.benchmark.cases import Case
from tests.benchmark.flops import matmul_ceiling
from tests.benchmark.measure import Limits, best_rows, check, make_peers, measure
from tests.benchmark.peers import Peer
from tests.benchmark.record import Record, printed
from tests.benchmark.shapes import Models, load_models
from tests.benchmark.workload import grid, make_workload

Step = Callable[[str], object]


def run_benchmark(
    models: Models,
    cases: Sequence[Case],
    names: Sequence[str],
    limits: Limits,
    out: Path,
    *,
    settings: dict[str, Any],
    screen: Console,
    time_limit: float = float("inf"),
    step: Step = str,
) -> Record:
    """Measure every case; results are written to ``out`` after each.

    Args:
        models: what to run on.
        cases: the sweeps.
        names: the peers.
        limits: how long to measure.
        out: folder for the results.
        settings: options and command line, for the record.
        screen: where tables are printed.
        time_limit: seconds after which no further case is started.
        step: told what is being done.

    Raises:
        EngineError: sinklens's own numbers are wrong.
    """
    began = time.perf_counter()
    peers, left_out = make_peers(names, models)
    step("measuring a matrix product")
    record = Record(models, matmul_ceiling(models.device, models.dtype), settings)
    record.know(peers)
    if models.dtype != torch.float32:
        step("comparing numbers in float32")
        peers, more = _exact_on_tiny(peers, models.device)
        left_out |= more
    _leave_out(record, left_out, screen)
    rows: dict[tuple, dict[str, tuple[int, float]]] = {}
    for case in cases:
        if time.perf_counter() - began > time_limit:
            screen.print(f"the time limit of {time_limit:g} s is over: {case.axis} {case.value} and later are left out")
            break
        peers = _one_case(record, case, peers, limits, rows, screen, step)
        record.write(out)
    if record.rows:
        record.write_figure(out)
    return record


def _exact_on_tiny(peers: list[Peer], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """The peers whose code gives equal numbers in float32 on a small model, and why others are left out."""
    tiny = load_models("tiny", device, torch.float32)
    last = tiny.sizes.n_layers - 2
    work = make_workload(160, grid(range(last + 1), range(32)), 32, (last,), tiny.sizes.d_vocab)
    same, left_out = make_peers([peer.name for peer in peers], tiny)
    left_out |= check(same, work, tiny)[1]
    return [peer for peer in peers if peer.name not in left_out], left_out


def _one_case(
    record: Record,
    case: Case,
    peers: Sequence[Peer],
    limits: Limits,
    tuned: dict[tuple, dict[str, tuple[int, float]]],
    screen: Console,
    step: Step,
) -> list[Peer]:
    """Check, tune and time the peers; gives those that stay."""
    work, models = case.work, record.models
    step(f"{case.axis} {case.value}: comparing numbers")
    errors, refused = check(peers, work, models)
    _leave_out(record, refused, screen)
    peers = [peer for peer in peers if peer.name not in refused]
    # The best batch size follows from the length and the depth, and grows with the number of patches up to a limit.
    key = (work.length, work.readouts, case.n_blocks, min(work.n_patches, 1024))
    known = tuned.setdefault(key, {})
    for peer in peers:
        if peer.name not in known:
            step(f"{case.axis} {case.value}: batch size of {peer.name}")
            known[peer.name] = best_rows(peer, work, models.device, limits.seconds)

    def told(name: str) -> None:
        step(f"{case.axis} {case.value}: timing {name}")

    timings = measure(peers, work, models, limits, rows=known, errors=errors, step=told)
    screen.print(printed(record.add(case, timings), case))
    return peers


def _leave_out(record: Record, reasons: dict[str, str], screen: Console) -> None:
    for name, reason in reasons.items():
        record.left_out[name] = reason
        screen.print(f"{name} is left out: {reason}", markup=False)
