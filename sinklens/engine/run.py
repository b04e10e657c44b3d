"""The engine: many patches in one forward pass.

Each *row* of a batch is one patch on one prompt; every row carries its own edit and no row sees another. A row starts
from the cached residual stream at the earliest block and position that its patch edits, and stops after the last block
that a readout needs (:mod:`sinklens.engine.packed`). Readouts are reduced on the device inside the forward pass, and
only numbers are kept. The result is what ``model.run_with_hooks`` gives with one patch at a time, in any order and
for any batch size. Models that the packed pass does not know run through TransformerLens
(:mod:`sinklens.engine.plain`), more slowly.

Pitfalls that the engine takes care of: a hook name that does not exist is silently ignored by some backends, a hook may
never fire, an edit may change nothing: each is an error here. A readout that lies before what a patch edits cannot be
moved by it (the forward pass is causal in depth and in position), so its value is the run's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.engine.capture import capture_runs, without_sources
from sinklens.engine.given import check_own_values, check_readouts, check_runs, listed
from sinklens.engine.memory import (
    check_limits,
    is_out_of_memory,
    pattern_budget,
    peak_bytes,
    release_cached,
    row_budget,
)
from sinklens.engine.pace import Pace
from sinklens.engine.packed import (
    DifferentModelError,
    PackedJob,
    PackedModel,
    found_different,
    packed_model,
    unpackable,
    wants_whole_pattern,
)
from sinklens.engine.plain import PlainJob, plain_wants
from sinklens.engine.residual import as_written
from sinklens.engine.slow import say_slow
from sinklens.engine.store import ActivationStore, Want
from sinklens.engine.trust import checked_combined
from sinklens.engine.validation import validate
from sinklens.errors import EditError, EngineError, InputError
from sinklens.models.state import Snapshot, in_usual_state, snapshot, usual_state
from sinklens.models.view import Model, check_hook_name, check_model, device_of
from sinklens.patches import CLEAN, Patch, Runs
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.records.summaries import ROWS, html, some, summary
from sinklens.sites import LOGITS

Progress = Callable[[int, int], None]
"""``(rows done, rows in all)``, called after every forward pass."""


@dataclass
class EngineStats:
    """What a call of :func:`run_patches` cost."""

    n_patches: int = 0
    """Patches that were run."""
    n_rows: int = 0
    """Patch-prompt pairs that were run."""
    n_forwards: int = 0
    """Forward passes, those that capture the runs included."""
    max_rows: int = 0
    """Rows in the largest batch allowed at the end."""
    n_halvings: int = 0
    """How often a batch did not fit and was halved."""
    seconds: float = 0.0
    """Wall-clock time, runs included."""
    peak_bytes: int | None = None
    """Peak memory: allocated on the GPU, or resident in the whole process on a CPU (where that can be asked)."""
    path: str = "packed"
    """``packed`` for sinklens's own forward pass, ``model`` for TransformerLens's."""
    reason: str = ""
    """What the packed pass does not know, where TransformerLens's was run."""


@dataclass(frozen=True, eq=False)
class PatchResult:
    """Readouts of every patch on every prompt, and of the runs themselves."""

    values: Mapping[str, Float[Tensor, "patch prompt"]]
    """Readout name to its values, on the CPU, float64."""
    runs: Mapping[str, Mapping[str, Float[Tensor, " prompt"]]]
    """Run name to readout name to the unpatched run's values."""
    stats: EngineStats
    """What it cost."""

    def added(self, patches: Sequence[Patch], readout: str) -> Float[Tensor, "patch prompt"]:
        """What every patch adds to a readout: its value under the patch, less that of the patch's own run without it.

        Args:
            patches: the patches, in the order in which they were run.
            readout: name of the readout, in whose units the answer is.

        Raises:
            ValueError: there are more patches or fewer than were run.
        """
        runs = [self.runs[patch.run][readout] for patch in patches]
        return torch.stack([value - run for value, run in zip(self.values[readout], runs, strict=True)])

    def __repr__(self) -> str:
        shape = next((tuple(values.shape) for values in self.values.values()), (0, 0))
        return summary(self, f"{shape[0]:,} patches x {shape[1]:,} prompts", f"readouts {some(self.values)}")

    def _repr_html_(self) -> str:
        """Means over prompts, the runs before the patches."""
        rows = [{"patch": f"run {run}", **_means(values)} for run, values in self.runs.items()]
        n_patches = max((len(values) for values in self.values.values()), default=0)
        shown = range(min(n_patches, ROWS))
        rows += [{"patch": str(i), **_means({k: v[i] for k, v in self.values.items()})} for i in shown]
        return html(f"{self!r}, means over prompts", rows)


def _means(values: Mapping[str, Float[Tensor, " prompt"]]) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in values.items()}


def run_patches(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    patches: Sequence[Patch],
    readouts: Sequence[Readout],
    *,
    runs: Runs = CLEAN,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> PatchResult:
    """Run every patch on every prompt and reduce each readout to one number per patch and prompt.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        prompts: equal-length prompts, ``[prompt pos]``.
        patches: the interventions; each names the run that it is applied in and its source run.
        readouts: what to measure in every patched row, and in the runs themselves.
        runs: root patches of every run; ``{"base": ()}`` by default. A root may take from another run (its ``source``).
        memory_budget: bytes that the activations of one forward pass may take (256 MiB on a CPU, half of what is free
            on a GPU by default).
        max_rows: rows per forward pass, in place of the memory budget.
        progress: called with (rows done, rows in all).

    Raises:
        InputError: a block, position or unit that the model or the prompts do not have; non-finite activations of a
            run; a limit that is no number of bytes or rows.
        EngineError: a hook that does not exist or never fired, an edit that changed nothing, a readout that is not
            finite, one row that does not fit in memory.
    """
    limits: dict[str, Any] = {"memory_budget": memory_budget, "max_rows": max_rows}
    patches = listed(patches, Patch, "patches")
    runner = PatchRunner(model, prompts, readouts, runs=runs, **limits, once=True)
    check_own_values(patches, runs, len(runner.tokens))
    return runner.run(patches, progress)


class PatchRunner:
    """:func:`run_patches` for many calls: what it captured of the unpatched runs is kept from one to the next.

    Where the model's weights, modules or hooks have changed since the last call, the runs are captured anew.

    Args:
        model: as in :func:`run_patches`.
        prompts: likewise.
        readouts: likewise.
        runs: likewise.
        memory_budget: likewise.
        max_rows: likewise.
        keep: bytes of captured activations that are kept; more than that are dropped when other ones are needed.
        allow_nonfinite: give NaN for a patch under which activations or a readout are not finite, instead of raising:
            one such cell must not end a sweep of millions.
        once: there will be one call, so that nothing has to be remembered of the model.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptBatch | Int[Tensor, "prompt pos"],
        readouts: Sequence[Readout],
        *,
        runs: Runs = CLEAN,
        memory_budget: int | None = None,
        max_rows: int | None = None,
        keep: int = 1 << 31,
        allow_nonfinite: bool = False,
        once: bool = False,
    ) -> None:
        check_model(model)
        check_runs(runs)
        self.model, self.readouts, self.given, self.keep = model, check_readouts(readouts), runs, keep
        with usual_state(model):
            self._prepare(prompts, memory_budget, max_rows)
        self.allow_nonfinite, self.once = allow_nonfinite, once
        self._runs: Runs | None = None
        self._resolving = 0
        self._store: ActivationStore | None = None
        self._packed: PackedModel | None = None
        self._checked, self._unpacked = False, ""
        self._seen: Snapshot | None = None

    def _prepare(
        self, prompts: PromptBatch | Int[Tensor, "prompt pos"], memory_budget: int | None, max_rows: int | None
    ) -> None:
        check_limits(memory_budget, max_rows)
        model = self.model
        self.tokens = prompts.tokens if isinstance(prompts, PromptBatch) else prompts
        self.device = device_of(model)
        validate(model, self.tokens, (), self.readouts, self.given)
        self.tokens = self.tokens.long()
        for readout in self.readouts:
            if readout.site != LOGITS:
                check_hook_name(model, readout.site.at(readout.layers[0]))
        logits = any(readout.site == LOGITS for readout in self.readouts)
        self.pattern_bytes = pattern_budget(model, memory_budget)
        # TransformerLens computes the pattern of whole prompts; the packed pass where a readout wants it whole.
        self.whole_rows = max_rows or row_budget(model, self.tokens.shape[1], memory_budget, logits)
        limit = self.whole_rows
        if max_rows is None and not any(map(wants_whole_pattern, self.readouts)):
            limit = row_budget(model, self.tokens.shape[1], memory_budget, logits, pattern=False)
        # On a CPU the default budget is what was measured to be best; sizes found on the way would change the rounding.
        self.pace = Pace(limit, measured=max_rows is None and self.device.type == "cuda")

    def _refresh(self) -> None:
        """Let go of what was captured if the model is another since: its weights, its modules, hooks on it."""
        if self.once:
            return
        now = snapshot(self.model)
        if self._seen is not None and now != self._seen:
            self._runs, self._store, self._packed, self._checked = None, None, None, False
            self.device = device_of(self.model)
        self._seen = now

    @property
    def runs(self) -> Runs:
        """The runs with roots that take from no other run any more: what these take is captured once."""
        if self._runs is None:
            self._runs, self._resolving = without_sources(self.model, self.tokens, self.given, max_rows=self.whole_rows)
        return self._runs

    @property
    @in_usual_state
    def run_values(self) -> Mapping[str, Mapping[str, Float[Tensor, " prompt"]]]:
        """Run name to readout name to the unpatched run's values, on the CPU, float64."""
        self._refresh()
        return self._read_runs()

    def _read_runs(self) -> dict[str, dict[str, Tensor]]:
        store = self._captured([])
        values = {run: {r.name: _of_run(store, run, r).double().cpu() for r in self.readouts} for run in self.runs}
        for run, readings in values.items():
            for name, value in readings.items():
                if not torch.isfinite(value).all():
                    raise InputError(
                        f"readout {name!r} is not finite in the run {run!r}: check the model's weights and dtype"
                    )
        return values

    def run(self, patches: Sequence[Patch], progress: Progress | None = None) -> PatchResult:
        """Readouts of every patch on every prompt; see :func:`run_patches` for what is raised."""
        began = time.perf_counter()
        with usual_state(self.model):
            self._refresh()
            patches = as_written(self.model, patches, self.readouts, self.runs)
            validate(self.model, self.tokens, patches, (), self.runs)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            stats = EngineStats(
                n_patches=len(patches), n_rows=len(patches) * len(self.tokens), max_rows=self.pace.limit
            )
            captured = self._store.n_forwards if self._store is not None else 0
            job: PackedJob | PlainJob | None = None
            try:
                job = self._packed_job(patches)
                if job is not None:
                    self._batches(job, stats, progress)
                    self._checked = self._checked or not job.unchecked
            except DifferentModelError as error:
                self._give_up_packing(error)
                job, captured = None, 0
            if job is None:
                stats.path, stats.reason, stats.n_forwards = "model", self._unpacked, 0
                say_slow(self.model, self._unpacked)
                job = self._plain_job(patches)
                self._batches(job, stats, progress)
            stats.n_forwards += self._captured([]).n_forwards - captured
            values, runs = self._values(job, patches), self._read_runs()
            stats.seconds = time.perf_counter() - began
            stats.peak_bytes = peak_bytes(self.device)
            return PatchResult(values, runs, stats)

    def _give_up_packing(self, error: DifferentModelError) -> None:
        """Do without the packed pass, which has not this model's numbers: the runs may have been captured with it."""
        self._unpacked = f"the fast pass differs on this model ({error})"
        found_different(self.model, self._unpacked)
        self._runs, self._packed, self._store, self._checked = None, None, None, True

    def _values(self, job: PackedJob | PlainJob, patches: Sequence[Patch]) -> dict[str, Tensor]:
        """What a finished job has read, if it can be trusted."""
        values = {readout.name: job.out[i].double().cpu() for i, readout in enumerate(self.readouts)}
        _check_changed(job)
        if self.allow_nonfinite:
            return {name: _only_finite(value, job.finite.cpu()) for name, value in values.items()}
        _check_finite(job, patches, values)
        return values

    def _packed_job(self, patches: Sequence[Patch]) -> PackedJob | None:
        if self._checked and self._packed is None:
            return None
        why = unpackable(self.model, self.tokens.shape[1], self.readouts, self.runs, patches)
        if why is not None:
            self._unpacked = why
            return None
        for name in dict.fromkeys(part.site.at(part.start) for patch in patches for part in patch.parts):
            check_hook_name(self.model, name)
        if self._packed is None:
            self._packed = packed_model(self.model, self.tokens.shape[1])
        job = PackedJob(
            self._packed,
            self.tokens,
            patches,
            self.readouts,
            self.runs,
            self.device,
            unchecked=not self._checked,
            pattern_bytes=self.pattern_bytes,
        )
        job.attach(self._captured(job.wants()), self._out(patches))
        return job

    def _plain_job(self, patches: Sequence[Patch]) -> PlainJob:
        store = self._captured(plain_wants(self.model, patches, self.runs, len(self.tokens)))
        return PlainJob(self.model, self.tokens, patches, self.readouts, self.runs, store, self._out(patches))

    def _captured(self, wants: Sequence[Want]) -> ActivationStore:
        """The runs' activations and readings, captured where they are not yet."""
        if self._store is None:
            self._store = capture_runs(
                self.model, self.tokens, self.runs, wants, self.readouts, max_rows=self.whole_rows
            )
            self._store.n_forwards += self._resolving
            return self._store
        missing = self._store.missing(wants)
        if missing and self._store.n_bytes > self.keep:
            self._store.forget()
            missing = wants
        if missing:
            self._store.update(capture_runs(self.model, self.tokens, self.runs, missing, max_rows=self.whole_rows))
        return self._store

    def _out(self, patches: Sequence[Patch]) -> Float[Tensor, "readout patch prompt"]:
        """Room for the results, holding what an unpatched run reads."""
        store = self._captured([])
        names = list(self.runs)
        run = torch.tensor([names.index(patch.run) for patch in patches], dtype=torch.long, device="cpu")
        rows = [torch.stack([_of_run(store, name, readout).float() for name in names]) for readout in self.readouts]
        return torch.stack(rows)[:, run.to(self.device)]

    def _batches(self, job: PackedJob | PlainJob, stats: EngineStats, progress: Progress | None) -> None:
        """Run all rows, as many at a time as fit; on out-of-memory the batch is halved."""
        begin, skipped = 0, stats.n_rows - len(job.rows)
        while begin < len(job.rows):
            most = self.pace.rows if isinstance(job, PackedJob) else min(self.pace.rows, self.whole_rows)
            end = job.end(begin, most)
            timed, began = self.pace.measuring, time.perf_counter()
            try:
                job.forward(begin, end)
                if timed:
                    torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(end - begin, error)
            else:
                if timed:
                    self.pace.record(end - begin, job.work(begin, end), time.perf_counter() - began)
                stats.n_forwards += 1
                begin = end
                if progress is not None:
                    progress(skipped + begin, stats.n_rows)
                continue
            stats.n_halvings += 1
            release_cached(self.device)  # not above: the traceback still held the batch's tensors
        if progress is not None and not len(job.rows):
            progress(stats.n_rows, stats.n_rows)
        stats.max_rows = self.pace.rows

    def _shrink(self, rows: int, error: RuntimeError) -> None:
        """A batch of ``rows`` did not fit: the next ones are to be half as large."""
        if rows == 1:
            raise EngineError(
                "not even one prompt fits in memory: use shorter prompts, a smaller dtype or another device"
            ) from error
        self.pace.halve(rows)


def _of_run(store: ActivationStore, run: str, readout: Readout) -> Tensor:
    return checked_combined(
        readout, torch.stack([store.readings[run, readout.name, layer] for layer in readout.layers])
    )


def _only_finite(value: Float[Tensor, "patch prompt"], finite: Bool[Tensor, " patch"]) -> Tensor:
    return value.masked_fill(~(torch.isfinite(value) & finite[:, None]), torch.nan)


def _check_changed(job: PackedJob | PlainJob) -> None:
    still = (job.ran & (job.changed == 0).cpu()).nonzero().flatten().tolist()
    idle = [job.parts[number].edit for number in still if not job.parts[number].edit.allow_unchanged]
    if idle:
        raise EditError(
            f"{len(idle)} patch(es) changed nothing, the first is: {idle[0].describe()}. "
            "The activation already had that value; set allow_unchanged=True where that is meant"
        )


def _check_finite(job: PackedJob | PlainJob, patches: Sequence[Patch], values: Mapping[str, Tensor]) -> None:
    """Refuse numbers that do not mean anything."""
    bad = (~job.finite).nonzero().flatten().tolist()
    if bad:
        raise EditError(
            f"the activations are not finite under {len(bad)} patch(es), the first is: {patches[bad[0]].describe()}"
        )
    for name, value in values.items():
        bad = (~torch.isfinite(value)).any(-1).nonzero().flatten().tolist()
        if bad:
            raise EditError(f"readout {name!r} is not finite under {len(bad)} patch(es): {patches[bad[0]].describe()}")
