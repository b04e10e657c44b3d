"""The engine: many patches in one forward pass.

Each *row* of a batch is one patch on one prompt. Rows start from the cached residual stream at the earliest block that
their patch edits, run together, and stop after the last block that a readout needs; every row carries its own edit and
no row sees another. Readouts are reduced on the device inside the forward pass, and only numbers are kept. The result
is what ``model.run_with_hooks`` gives with one patch at a time, in any order and for any batch size.

Pitfalls that the engine takes care of: a hook name that does not exist is silently ignored by some backends, a hook may
never fire, an edit may change nothing: each is an error here. A readout that lies before a patch's first block cannot
be moved by it (the forward pass is causal in depth), so its value is the run's own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.capture import ActivationStore, Want, capture_runs, place_patch
from sinklens.errors import EngineError, InputError
from sinklens.forward import Op, Placement, Program, execute, readouts_in
from sinklens.memory import device_of, is_out_of_memory, peak_bytes, release_cached, row_budget
from sinklens.models import Model, supports_resume
from sinklens.patches import CLEAN, Patch, Readout, Runs, positions_of
from sinklens.prompts import PromptBatch
from sinklens.sites import LOGITS, RESID_PRE, HookSite
from sinklens.validation import validate

Progress = Callable[[int, int], None]
"""``(rows done, rows in all)``, called after every forward pass."""

Row = tuple[int, int]
"""``(patch index, prompt index)``."""


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


@dataclass(frozen=True, eq=False)
class PatchResult:
    """Readouts of every patch on every prompt, and of the runs themselves."""

    values: Mapping[str, Float[Tensor, "patch prompt"]]
    """Readout name to its values, on the CPU, float64."""
    runs: Mapping[str, Mapping[str, Float[Tensor, " prompt"]]]
    """Run name to readout name to the unpatched run's values."""
    stats: EngineStats
    """What it cost."""


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
        model: a ``HookedTransformer`` or ``TransformerBridge``; on a bridge rows start from the tokens.
        prompts: equal-length prompts, ``[prompt pos]``.
        patches: the interventions; each names the run that it is applied in and its source run.
        readouts: what to measure in every patched row, and in the runs themselves.
        runs: root patches of every run; ``{"base": ()}`` by default.
        memory_budget: bytes that the activations of one forward pass may take (256 MiB on a CPU, half of what is free
            on a GPU by default).
        max_rows: rows per forward pass, in place of the memory budget.
        progress: called with (rows done, rows in all).

    Raises:
        InputError: a block, position or unit that the model or the prompts do not have; non-finite activations of a
            run.
        EngineError: a hook that does not exist or never fired, an edit that changed nothing, a readout that is not
            finite, one row that does not fit in memory.
    """
    began = time.perf_counter()
    tokens = prompts.tokens if isinstance(prompts, PromptBatch) else prompts
    device = device_of(model)
    validate(model, tokens, patches, readouts, runs)
    wants_logits = any(readout.site == LOGITS for readout in readouts)
    if max_rows is None:
        max_rows = row_budget(model, tokens.shape[1], memory_budget, wants_logits)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wants = _wants(patches, len(tokens), supports_resume(model))
    store = capture_runs(model, tokens, runs, wants, readouts, max_rows=max_rows)
    job = _Job(model, tokens, patches, readouts, runs, store, max_rows, device)
    job.run(progress)
    stats = job.stats
    stats.seconds = time.perf_counter() - began
    stats.peak_bytes = peak_bytes(device)
    values = {readout.name: job.values[i] for i, readout in enumerate(readouts)}
    run_values = {run: {r.name: _combine_run(store, run, r).double().cpu() for r in readouts} for run in runs}
    _check_readings(values, run_values, patches)
    return PatchResult(values, run_values, stats)


class _Job:
    """The state of one call: batches of rows, from the earliest start block to the latest."""

    def __init__(self, model, tokens, patches, readouts, runs, store, max_rows, device) -> None:  # noqa: ANN001
        self.model, self.tokens, self.patches, self.readouts = model, tokens, patches, readouts
        self.runs, self.store, self.device = runs, store, device
        self.resume = supports_resume(model)
        self.out = torch.full((len(readouts), len(patches), len(tokens)), torch.nan, device=device)
        self.changed = torch.zeros(len(patches), dtype=torch.bool, device=device)
        self.finite = torch.ones(len(patches), dtype=torch.bool, device=device)
        self.stats = EngineStats(
            n_patches=len(patches),
            n_rows=len(patches) * len(tokens),
            n_forwards=store.n_forwards,
            max_rows=max_rows,
        )
        self.values: Tensor = torch.empty(0)

    def run(self, progress: Progress | None) -> None:
        done = 0
        for start, rows in sorted(self._by_start().items()):
            begin = 0
            while begin < len(rows):
                chunk = rows[begin : begin + self.stats.max_rows]
                if not self._try(start, chunk):
                    continue
                begin += len(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, self.stats.n_rows)
        self.values = self.out.double().cpu()
        self._check_finite()
        self._check_changed()

    def _by_start(self) -> dict[int, list[Row]]:
        groups: dict[int, list[Row]] = defaultdict(list)
        for index, patch in enumerate(self.patches):
            groups[patch.start] += [(index, prompt) for prompt in range(len(self.tokens))]
        return groups

    def _try(self, start: int, chunk: list[Row]) -> bool:
        """Run one batch; on out-of-memory halve the batch size and report False."""
        try:
            self._forward(start, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(chunk) == 1:
                raise EngineError(
                    "not even one prompt fits in memory: use shorter prompts, a smaller dtype or another device"
                ) from error
            self.stats.max_rows = max(1, len(chunk) // 2)
            self.stats.n_halvings += 1
        else:
            self.stats.n_forwards += 1
            return True
        release_cached(self.device)
        return False

    def _forward(self, start: int, chunk: list[Row]) -> None:
        prompts = torch.tensor([prompt for _, prompt in chunk], device=self.device)
        owners = torch.tensor([index for index, _ in chunk], device=self.device)
        first = start if self.resume else 0
        program = Program(
            prompts,
            ops=_ops(self.patches, self.runs, chunk, first, self.device),
            readouts=readouts_in(self.readouts, start),
            source_of=self._source_of,
            changed=self.changed,
        )
        last = max([start] + [layer for _, layer in program.readouts])
        program.ops = [op for op in program.ops if op.layer <= last]
        x = self._residual(first, chunk) if self.resume else self.tokens.to(self.device)[prompts]
        execute(self.model, x, program, start_at=first, stop_at=last + 1)
        assert program.finite is not None
        self.finite[owners[~program.finite]] = False
        for i, readout in enumerate(self.readouts):
            parts = [self._reading(program, readout, layer, start, chunk) for layer in readout.layers]
            self.out[i, owners, prompts] = readout.combine(torch.stack(parts)).to(self.out)

    def _residual(self, start: int, chunk: list[Row]) -> Tensor:
        """The cached residual stream entering block ``start``, one row for each (patch, prompt)."""
        parts = []
        for run, rows in _segments(self.patches, chunk):
            parts.append(self.store.tensor(run, RESID_PRE, start)[[prompt for _, prompt in rows]])
        return torch.cat(parts)

    def _reading(self, program: Program, readout: Readout, layer: int, start: int, chunk: list[Row]) -> Tensor:
        if layer >= start:
            return program.readings[readout.name, layer]
        # Nothing before the first edited block can have moved: the run's own reading is exact.
        parts = []
        for run, rows in _segments(self.patches, chunk):
            parts.append(self.store.readings[run, readout.name, layer][[prompt for _, prompt in rows]])
        return torch.cat(parts)

    def _source_of(self, site: HookSite, layer: int, place: Placement) -> Tensor:
        if place.source_run is None or place.source_positions is None:
            raise EngineError(f"the edit {place.edit.name!r} needs a source run: give the patch source=Source(...)")
        units = place.units if site == place.site else None
        return self.store.gather(place.source_run, site, layer, place.prompts, place.source_positions, units)

    def _check_finite(self) -> None:
        bad = (~self.finite).nonzero().flatten().tolist()
        if bad:
            raise EngineError(
                f"the activations are not finite under {len(bad)} patch(es), the first is: "
                f"{self.patches[bad[0]].describe()}"
            )

    def _check_changed(self) -> None:
        changed = self.changed.cpu()
        idle = [p for p, moved in zip(self.patches, changed, strict=True) if not moved and not p.allow_unchanged]
        if idle:
            raise EngineError(
                f"{len(idle)} patch(es) changed nothing, the first is: {idle[0].describe()}. "
                "The activation already had that value; set allow_unchanged=True where that is meant"
            )


def _segments(patches: Sequence[Patch], chunk: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Consecutive rows of the same run, in order."""
    segments: list[tuple[str, list[Row]]] = []
    for row in chunk:
        run = patches[row[0]].run
        if not segments or segments[-1][0] != run:
            segments.append((run, []))
        segments[-1][1].append(row)
    return segments


def _ops(patches: Sequence[Patch], runs: Runs, chunk: Sequence[Row], first: int, device: torch.device) -> list[Op]:
    """All edits of a batch from block ``first`` on: root edits of each row's run, then the row's own patch."""
    by_run: dict[str, list[tuple[int, int]]] = defaultdict(list)
    by_patch: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, (index, prompt) in enumerate(chunk):
        by_run[patches[index].run].append((row, prompt))
        by_patch[index].append((row, prompt))
    ops = []
    for run, pairs in by_run.items():
        for root in runs[run]:
            place = place_patch(root, pairs, -1, device)
            ops += [Op(place, layer) for layer in root.layers if layer >= first]
    groups: dict[tuple, list[Placement]] = defaultdict(list)
    for index, pairs in by_patch.items():
        patch = patches[index]
        size = None if patch.units is None else len(patch.units)
        key = (patch.site, patch.layers, id(patch.edit), size, patch.source.run if patch.source else None)
        groups[key].append(place_patch(patch, pairs, index, device))
    for (_, layers, *_), places in groups.items():
        merged = _merge(places)
        ops += [Op(merged, layer) for layer in layers]
    return ops


def _merge(places: Sequence[Placement]) -> Placement:
    """Placements of the same edit on the same site as one, so that a sweep's edits run as one kernel."""
    if len(places) == 1:
        return places[0]
    joined = {
        name: torch.cat([getattr(place, name) for place in places])
        for name in ("rows", "prompts", "positions", "owners", "source_positions", "units")
        if getattr(places[0], name) is not None
    }
    return replace(places[0], **joined)


def _wants(patches: Sequence[Patch], n_prompts: int, resume: bool) -> list[Want]:
    """What the patches need of the runs: residuals to resume from, and source activations where they are used."""
    wants: dict[Want, None] = {}
    for patch in patches:
        if resume:
            wants[Want(patch.run, RESID_PRE, patch.start)] = None
        if patch.source is None or not patch.edit.uses_source:
            continue
        where = patch.positions if patch.source.positions is None else patch.source.positions
        used = {p for prompt in range(n_prompts) for p in positions_of(where, prompt)}
        for site in (patch.site, *patch.edit.reads):
            for layer in patch.layers:
                wants[Want(patch.source.run, site, layer, tuple(sorted(used)))] = None
    return list(wants)


def _combine_run(store: ActivationStore, run: str, readout: Readout) -> Tensor:
    return readout.combine(torch.stack([store.readings[run, readout.name, layer] for layer in readout.layers]))


def _check_readings(values: Mapping[str, Tensor], runs: Mapping, patches: Sequence[Patch]) -> None:
    for run, readings in runs.items():
        for name, value in readings.items():
            if not torch.isfinite(value).all():
                raise InputError(
                    f"readout {name!r} is not finite in the run {run!r}: check the model's weights and dtype"
                )
    for name, value in values.items():
        bad = (~torch.isfinite(value)).any(-1).nonzero().flatten().tolist()
        if bad:
            raise EngineError(
                f"readout {name!r} is not finite under {len(bad)} patch(es): {patches[bad[0]].describe()}"
            )
