"""Capturing runs: what the engine needs of the unpatched runs before it can patch.

One pass over the prompts for each run collects the residual streams that patched rows resume from, the source
activations that edits transplant (only at the positions that are used), and the readouts of the run itself.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.apply import gather
from sinklens.engine.hooks import Program, execute, readouts_in, root_ops
from sinklens.engine.memory import is_out_of_memory, release_cached
from sinklens.engine.trust import read
from sinklens.engine.validation import check_edits
from sinklens.errors import EditError, EngineError, InputError
from sinklens.metrics.sums import running_sum
from sinklens.models.identities import identities
from sinklens.models.state import foreign_hooks, in_usual_state
from sinklens.models.view import Model, device_of
from sinklens.patches import Runs
from sinklens.prompts import check_ids
from sinklens.readouts.base import PositionReadout, Readout, Rows
from sinklens.sites import HookSite


@dataclass(frozen=True)
class Want:
    """An activation to keep from a run."""

    run: str
    """Run name."""
    site: HookSite
    """Where."""
    layer: int
    """Block."""
    positions: tuple[int, ...] | None = None
    """Positions to keep, for every prompt; ``None``: all."""

    @property
    def key(self) -> tuple[str, HookSite, int]:
        """Which activation, wherever."""
        return self.run, self.site, self.layer


@dataclass(eq=False)
class ActivationStore:
    """Activations and readings of runs, on the model's device."""

    length: int
    """Tokens in a prompt."""
    kept: dict[tuple[str, HookSite, int], tuple[int, ...] | None] = field(default_factory=dict)
    """Positions kept of each activation."""
    parts: dict[tuple[str, HookSite, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Activations ``[prompt, kept pos, unit, ...]``, in batches of prompts."""
    readings: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """``(run, readout, block) -> [prompt, ...]``."""
    before: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """The same of readouts over positions, ``[prompt, pos + 1, ...]``: the sum over all positions before each."""
    n_forwards: int = 0
    """Forward passes that this took."""
    _lookups: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, run: str, site: HookSite, layer: int) -> Float[Tensor, "prompt pos *rest"]:
        """The whole kept activation, laid out as ``[prompt, pos, unit, ...]``."""
        key = (run, site, layer)
        parts = self.parts[key]
        if len(parts) > 1:
            self.parts[key] = parts = [torch.cat(parts)]
        return parts[0]

    def gather(
        self, run: str, site: HookSite, layer: int, prompts: Tensor, positions: Tensor, units: Tensor | None = None
    ) -> Float[Tensor, "pair unit *rest"]:
        """The activation of ``run`` at (prompt, position) pairs.

        Raises:
            EngineError: when it was not captured there.
        """
        key = (run, site, layer)
        if key not in self.kept:
            raise EngineError(f"{site.at(layer)} was not captured in the run {run!r}")
        kept, held = self.kept[key], self.tensor(run, site, layer)
        device, there = positions.device, held.device  # blocks of one model may lie on several
        prompts, positions = prompts.to(there), positions.to(there)
        if kept is not None:
            positions = self._lookup(kept, there)[positions]
        return gather(held, (prompts, positions), None if units is None else units.to(there)).to(device)

    def _lookup(self, kept: tuple[int, ...], device: torch.device) -> Int[Tensor, " pos"]:
        """Position to its index among the kept ones."""
        if (kept, device) not in self._lookups:
            lookup = torch.full(
                (self.length,), self.length, device="cpu"
            )  # out of range: not kept must not pass for the last one
            lookup[list(kept)] = torch.arange(len(kept), device="cpu")
            self._lookups[kept, device] = lookup.to(device)
        return self._lookups[kept, device]

    def missing(self, wants: Iterable[Want]) -> list[Want]:
        """What has to be captured so that all of ``wants`` is here: an activation anew, with the positions it has."""
        wants = list(wants)
        lacking = {want.key for want in wants if not self._covers(want)}
        kept = [Want(*key, self.kept[key]) for key in lacking if key in self.kept]
        return [*kept, *(want for want in wants if want.key in lacking)]

    def _covers(self, want: Want) -> bool:
        if want.key not in self.kept:
            return False
        kept = self.kept[want.key]
        return kept is None or (want.positions is not None and set(want.positions) <= set(kept))

    def update(self, newer: ActivationStore) -> None:
        """Take over what ``newer`` holds."""
        for mine, theirs in (
            (self.kept, newer.kept),
            (self.parts, newer.parts),
            (self.readings, newer.readings),
            (self.before, newer.before),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        self.n_forwards += newer.n_forwards

    def forget(self) -> None:
        """Let go of all activations; readings stay."""
        self.kept.clear()
        self.parts.clear()

    @property
    def n_bytes(self) -> int:
        """Bytes of all activations."""
        return sum(part.numel() * part.element_size() for parts in self.parts.values() for part in parts)

    def joined(self, runs: Sequence[str], site: HookSite, layer: int) -> Float[Tensor, "context pos *rest"]:
        """The activation of several runs, one after another; each run's own becomes a view of it."""
        if len(runs) == 1:
            return self.tensor(runs[0], site, layer)
        parts = [self.tensor(run, site, layer) for run in runs]
        whole = torch.cat(parts)
        for run, part in zip(runs, whole.split([len(part) for part in parts]), strict=True):
            self.parts[run, site, layer] = [part]
        return whole

    def at(self, run: str, site: HookSite, layer: int, positions: Int[Tensor, " prompt"]) -> Tensor:
        """The activation at one position of every prompt, ``[prompt, unit, ...]``."""
        positions = positions.to(self.tensor(run, site, layer).device)
        return self.gather(run, site, layer, torch.arange(len(positions), device=positions.device), positions)


@in_usual_state
def capture_runs(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    runs: Runs,
    wants: Iterable[Want],
    readouts: Sequence[Readout] = (),
    *,
    max_rows: int,
) -> ActivationStore:
    """Run every run once over the prompts and keep what is wanted, with the run's own readouts.

    Raises:
        InputError: when an activation that is kept is not finite, or the vocabulary does not have the tokens.
        NotApplicableError: when a root edit would have no effect, or an activation has other axes than its site says.
        EngineError: when a hook does not exist or never fires.
    """
    check_ids(model, tokens)
    wants = list(wants)
    check_edits(model, [root for roots in runs.values() for root in roots])
    measured = identities(model)
    for site, layers in [*((r.site, r.layers) for r in readouts), *((want.site, (want.layer,)) for want in wants)]:
        measured.check_layout(site.template, layers)
    store = ActivationStore(tokens.shape[1])
    wanted: dict[str, dict[tuple[HookSite, int], tuple[int, ...] | None]] = {}
    for run in runs:
        wanted[run] = _merge([want for want in wants if want.run == run])
        store.kept.update({(run, site, layer): kept for (site, layer), kept in wanted[run].items()})
    read = [layer for readout in readouts for layer in readout.layers]
    # A pass over all runs at once costs hardly more than over one: few prompts leave a GPU idle.
    chosen = {run: tuple(roots) for run, roots in runs.items() if wanted[run] or readouts}
    last = max([layer for mine in wanted.values() for _, layer in mine] + read, default=-1)
    if last >= 0:
        _capture(model, tokens, chosen, wanted, readouts, last + 1, store, max_rows)
    return store


def _capture(model, tokens, runs, wanted, readouts, stop_at, store, max_rows) -> None:  # noqa: ANN001
    device = device_of(model)
    collected: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    rows = [(run, prompt) for run in runs for prompt in range(len(tokens))]
    begin, hooked = 0, bool(foreign_hooks(model))
    if hooked:
        warn_of_split(len(tokens), max_rows)
    while begin < len(rows):
        chunk = rows[begin : begin + max_rows]
        if hooked:  # somebody's hook may act on a row by its number: it sees the prompts, all and in their order
            chunk = chunk[: len(tokens) - begin % len(tokens)]
        prompts = torch.tensor([prompt for _, prompt in chunk])
        spans = {run: slice(*_span(chunk, run)) for run in dict.fromkeys(run for run, _ in chunk)}
        program = Program(
            prompts.to(device),
            readouts=[(_running(r), layer) for r, layer in readouts_in(readouts, 0)],
            broken=torch.zeros(1, dtype=torch.int32, device=device),
        )
        for run, span in spans.items():
            pairs = [(row, chunk[row][1]) for row in range(span.start, span.stop)]
            for root in (part for patch in runs[run] for part in patch.parts):
                program.ops += root_ops(root, pairs, [layer for layer in root.layers if layer < stop_at], device)
        part: dict = {}
        for site, layer in dict.fromkeys(key for run in spans for key in wanted[run]):
            keepers = [(run, span, wanted[run]) for run, span in spans.items() if (site, layer) in wanted[run]]
            program.captures[site.at(layer)] = _keeper(part, site, layer, keepers)
        try:
            readings = execute(model, tokens[prompts].to(device), program, stop_at=stop_at)
        except RuntimeError as error:
            if not is_out_of_memory(error) or max_rows == 1:
                raise
            max_rows = max(1, max_rows // 2)
            release_cached(device)
            continue
        assert program.finite is not None and program.broken is not None
        if program.broken.any():
            raise EditError(f"a root edit of the runs {', '.join(map(repr, spans))} gives NaN")
        if not program.finite.all():
            run = chunk[int((~program.finite).nonzero()[0])][0]
            raise InputError(
                f"the model's activations are not finite by block {stop_at - 1} (run {run!r}): "
                "check the weights, or use --dtype float32"
            )
        for key, act in part.items():
            store.parts[key].append(act)
        for (name, layer), value in readings.items():
            for run, span in spans.items():
                collected[run, name, layer].append(value[span].to(device))
        store.n_forwards += 1
        begin += len(chunk)
    over_positions = {readout.name for readout in readouts if isinstance(readout, PositionReadout)}
    for (run, name, layer), values in collected.items():
        found = torch.cat(values)
        if name in over_positions:
            store.before[run, name, layer] = found
            found = found[:, -1]
        store.readings[run, name, layer] = found


def warn_of_split(n_prompts: int, max_rows: int) -> None:
    """Say that hooks on the model do not see all prompts in one batch."""
    if max_rows < n_prompts:
        warnings.warn(
            f"hooks on the model see {max_rows} of the {n_prompts} prompts at a time: one that acts on a row by its "
            "number acts on other prompts than in a batch of them all (give a larger max_rows or memory_budget)",
            stacklevel=2,
        )


def _span(chunk: Sequence[tuple[str, int]], run: str) -> tuple[int, int]:
    """First and one past the last row of ``run``; the rows of a run stand together."""
    rows = [row for row, (name, _) in enumerate(chunk) if name == run]
    return rows[0], rows[-1] + 1


def _running(readout: Readout) -> Readout:
    """For a readout over positions, its sums over the positions before each, and over all of them at the end."""
    if not isinstance(readout, PositionReadout):
        return readout

    def sums(act: Tensor, rows: Rows) -> Tensor:
        sums = running_sum(readout.terms(readout.site.to_canonical(act), rows), 1)
        return torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        return read(readout, rows.layer, act, lambda act, some: sums(act, Rows(rows.prompts[some], rows.layer)))

    return Readout(readout.name, readout.site, readout.layers, reduce)


def _merge(wants: Sequence[Want]) -> dict[tuple[HookSite, int], tuple[int, ...] | None]:
    merged: dict[tuple[HookSite, int], tuple[int, ...] | None] = {}
    for want in wants:
        key = (want.site, want.layer)
        before = merged.get(key, ())
        both = None if want.positions is None or before is None else tuple(sorted({*before, *want.positions}))
        merged[key] = both
    return merged


def _keeper(part: dict, site: HookSite, layer: int, keepers: Sequence[tuple[str, slice, Mapping]]):  # noqa: ANN202
    def keep(act: Tensor) -> None:
        canonical = site.to_canonical(act)
        for run, span, wanted in keepers:
            kept = wanted[site, layer]
            mine = canonical[span]
            part[run, site, layer] = mine.clone() if kept is None else mine[:, list(kept)]

    return keep
