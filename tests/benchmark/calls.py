"""What a user waits for: whole calls and the whole command, and where their time goes.

    python -m tests.benchmark.calls --device cuda --python .venv/bin/python --python .venv-tl4/bin/python

Every measurement is a process of its own. Those of different interpreters (transformer-lens 3.9 and 4.3, say) take
turns, so that what else the machine does falls on both. ``command`` times `sinklens chain` from its start to its end;
``calls`` times load_model, run_chain and sl.sweep in one process, each for the first time and again. Timers around the
functions in PHASES split a time; of a phase inside another only the inner one counts.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

PHASES: dict[str, tuple[str, ...]] = {
    "load": ("sinklens.models.load:load_model",),
    "capture": ("sinklens.engine.capture:capture_runs",),
    "patches": ("sinklens.engine.run:PatchRunner._batches",),
    "statistics": ("sinklens.chain.result:summarise", "sinklens.statistics:bootstrap_interval"),
    "digest": ("sinklens.models.digest:weight_digest",),
    "saving": ("sinklens.chain.result:ChainResult.save",),
    "report": ("sinklens.pages.page:report",),
}
"""Phase to the functions whose time it is."""
START, REST = "start and imports", "the rest"
STARTED = "SINKLENS_BENCHMARK_STARTED"
TOTAL = "total"

Times = dict[str, float]
"""Phase to seconds."""


class Clock:
    """Time by phase: the innermost phase that is under way gets it."""

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self.synchronize = synchronize
        self.seconds: Times = defaultdict(float)
        self._phases, self._since = [REST], time.perf_counter()

    def _turn(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within counts for ``name``."""
        self._turn()
        self._phases.append(name)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    @contextmanager
    def whole(self) -> Iterator[Times]:
        """The times of what is done within, filled when it is over."""
        self._turn()
        self.seconds.clear()
        found: Times = {}
        yield found
        self._turn()
        found |= {TOTAL: sum(self.seconds.values()), **self.seconds}


def watch(clock: Clock) -> None:
    """Put a timer around every function in PHASES, wherever it has been imported to."""
    for phase, places in PHASES.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            function = getattr(owner, name)
            timed = _timed(clock, phase, function)
            setattr(owner, name, timed)
            for each in [module for title, module in sys.modules.items() if title.split(".")[0] == "sinklens"]:
                for attribute, value in list(vars(each).items()):
                    if value is function:
                        setattr(each, attribute, timed)


def _timed(clock: Clock, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(phase):
            return function(*args, **kwargs)

    return timed


def command(model: str, device: str, n: int, length: int) -> dict[str, Times]:
    """The times of `sinklens chain`, report and all, in this process."""
    import torch

    from sinklens.cli import app

    clock = Clock(torch.cuda.synchronize if device.startswith("cuda") else lambda: None)
    watch(clock)
    arguments = ["chain", "--model", model, "--device", device, "--n", str(n), "--length", str(length)]
    with tempfile.TemporaryDirectory() as folder, clock.whole() as times:
        before = time.time() - float(os.environ[STARTED])
        try:
            app([*arguments, "--target", "10", "--out", str(Path(folder) / "run")], standalone_mode=False)
        except SystemExit as error:
            if error.code:
                raise
    return {"sinklens chain": {**times, START: before, TOTAL: times[TOTAL] + before}}


def calls(model: str, device: str, n: int, length: int) -> dict[str, Times]:
    """The times of load_model, run_chain and sl.sweep in this process, the first time and again."""
    import torch

    import sinklens as sl

    clock, found = Clock(torch.cuda.synchronize if device.startswith("cuda") else lambda: None), {}
    source, dtype = _given(model, device)
    watch(clock)
    with clock.whole() as found["load_model"]:
        loaded = sl.load_model(source, device=device, dtype=dtype)
    if loaded.tokenizer is None:
        batch = sl.prompts.random_tokens(loaded, n=n, length=length, seed=0)
    else:
        batch = sl.prompts.natural(loaded, n=n, length=length)
    shape = sl.models.model_shape(loaded)
    # Random weights make no sink: some block and neuron are named, and that there is none is said when all has run.
    given = {} if model == "smollm2" else {"layer": 1, "super_neurons": [7], "outlier_dims": [3]}
    formation = sl.Study(loaded, batch, given=given).formation if given else None
    unsunk = suppress(sl.errors.NoSinkError) if given else nullcontext()
    for again in ("", ", again"):
        with clock.whole() as found[f"run_chain{again}"], unsunk:
            sl.run_chain(loaded, batch, target=10, formation=formation)
        with clock.whole() as found[f"sl.sweep{again}"]:
            blocks, positions = range(min(6, shape.n_layers - 2)), range(min(36, length))
            sl.sweep(loaded, batch, stages="resid_pre", layers=blocks, positions=positions, formation=formation)
    return found


def _given(model: str, device: str) -> tuple[Any, str]:
    """The default model by name; of a shape an object with random weights in bfloat16, on the device."""
    if model == "smollm2":
        return model, "float32"
    import torch

    from tests.benchmark.shapes import CONFIGS, random_weights

    return random_weights(CONFIGS[model], torch.device(device), torch.bfloat16, 0), "bfloat16"


MEASURED = {"command": command, "calls": calls}


def main(
    model: Annotated[str, typer.Option(help="smollm2, or a shape of tests.benchmark.shapes.")] = "smollm2",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    what: Annotated[str, typer.Option(help="command, calls, or both.")] = "command,calls",
    python: Annotated[list[str] | None, typer.Option(help="Interpreters to compare; this one by default.")] = None,
    n: Annotated[int, typer.Option(help="Prompts.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each kind; medians are given.")] = 3,
    out: Annotated[Path | None, typer.Option(help="File for all times, as JSON.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time whole calls, and the whole command, and split their time."""
    if child:
        found = MEASURED[child](model, device, n, length)
        sys.stderr.write("\n" + json.dumps({"times": found, "versions": _versions()}) + "\n")
        return
    runs: dict[str, list[dict[str, Times]]] = defaultdict(list)
    for _ in range(repeats):
        for interpreter in python or [sys.executable]:
            for kind in what.split(","):
                arguments = ["--model", model, "--device", device, "--n", str(n), "--length", str(length)]
                told = _run([interpreter, "-m", "tests.benchmark.calls", "--child", kind, *arguments])
                runs[f"transformer-lens {told['versions']['transformer-lens']}"].append(told["times"])
    medians = {name: _medians(found) for name, found in runs.items()}
    if out is not None:
        out.write_text(json.dumps({"medians": medians, "runs": runs}, indent=1))
    typer.echo(table(medians))


def _run(words: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        words, env={**os.environ, STARTED: str(time.time())}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise typer.BadParameter(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stderr.strip().splitlines()[-1])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformer-lens", "torch", "transformers")}


def _medians(runs: list[dict[str, Times]]) -> dict[str, Times]:
    """By call and phase; a call that some processes do not make is of the others."""
    calls = dict.fromkeys(call for run in runs for call in run)
    return {call: _median([run[call] for run in runs if call in run]) for call in calls}


def _median(times: list[Times]) -> Times:
    phases = dict.fromkeys(phase for each in times for phase in each)
    return {phase: statistics.median(each.get(phase, 0.0) for each in times) for phase in phases}


def table(medians: dict[str, dict[str, Times]]) -> str:
    """Seconds by call, version and phase, in Markdown."""
    phases = [TOTAL, START, *PHASES, REST]
    lines = [f"| | | {' | '.join(phases)} |", "|---" * (len(phases) + 2) + "|"]
    for call in dict.fromkeys(call for found in medians.values() for call in found):
        for name, found in medians.items():
            cells = [f"{found[call][phase]:.3g}" if found[call].get(phase) else "" for phase in phases]
            lines.append(f"| {call} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
