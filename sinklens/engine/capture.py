"""Capturing runs: what the engine needs of the unpatched runs before it can patch.

One pass over the prompts for each run collects the residual streams that patched rows resume from, the source
activations that edits transplant (only at the positions that are used), and the readouts of the run itself.

On a bridge, whose hooks cost more than its arithmetic, the packed pass does this too where it knows the model, and the
first prompt of every run is run through TransformerLens besides: what differs there is captured with hooks.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.hooks import Program, execute, readouts_in, root_ops
from sinklens.engine.memory import is_out_of_memory, release_cached
from sinklens.engine.packed import (
    TOLERANCE,
    DifferentModelError,
    PackedModel,
    check_reading,
    difference,
    execute_whole,
    found_different,
    packed_model,
    places_of,
    rounding_allowed,
    unknown_place,
)
from sinklens.engine.slow import say_slow
from sinklens.engine.sources import resolved
from sinklens.engine.store import ActivationStore, Want
from sinklens.engine.trust import read
from sinklens.engine.validation import check_edits
from sinklens.errors import EditError, InputError
from sinklens.metrics.sums import running_sum
from sinklens.models.identities import identities
from sinklens.models.state import foreign_hooks, in_usual_state
from sinklens.models.view import Model, can_resume, device_of
from sinklens.patches import Patch, Runs
from sinklens.prompts import check_ids
from sinklens.readouts.base import PositionReadout, Readout, Rows
from sinklens.sites import RESID_POST, HookSite

Places = Mapping[tuple[HookSite, int], tuple[int, ...] | None]
"""Activations to keep of a run, with their positions."""


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
        DifferentModelError: what is wanted is of the packed pass alone, which has not this model's numbers.
    """
    check_ids(model, tokens)
    wants = list(wants)
    runs, n_forwards = without_sources(model, tokens, runs, max_rows=max_rows)
    check_edits(model, [root for roots in runs.values() for root in roots])
    measured = identities(model)
    for site, layers in [*((r.site, r.layers) for r in readouts), *((want.site, (want.layer,)) for want in wants)]:
        measured.check_layout(site.template, layers)
    store = ActivationStore(tokens.shape[1], n_forwards=n_forwards)
    wanted: dict[str, Places] = {}
    for run in runs:
        wanted[run] = _merge([want for want in wants if want.run == run])
        store.kept.update({(run, site, layer): kept for (site, layer), kept in wanted[run].items()})
    read = [layer for readout in readouts for layer in readout.layers]
    # A pass over all runs at once costs hardly more than over one: few prompts leave a GPU idle.
    chosen = {run: tuple(roots) for run, roots in runs.items() if wanted[run] or readouts}
    last = max([layer for mine in wanted.values() for _, layer in mine] + read, default=-1)
    if last >= 0:
        asked = Asked(tokens, chosen, wanted, readouts, last + 1)
        packed = _packed(model, asked)
        passing = partial(execute, model) if packed is None else partial(execute_whole, packed)
        _Capture(model, passing, asked, store).run(max_rows)
    return store


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be captured."""

    tokens: Int[Tensor, "prompt pos"]
    """The prompts."""
    runs: Mapping[str, tuple[Patch, ...]]
    """Run name to its root patches."""
    wanted: Mapping[str, Places]
    """Run name to the activations that are kept of it."""
    readouts: Sequence[Readout]
    """What is read of every run."""
    stop_at: int
    """The block in front of which a pass stops."""


def without_sources(model: Model, tokens: Int[Tensor, "prompt pos"], runs: Runs, *, max_rows: int) -> tuple[Runs, int]:
    """The runs with roots that take from no other run any more, and the forward passes that this took.

    Raises:
        InputError: runs that take from each other in a circle, or from one that is not there; as :func:`capture_runs`.
    """
    return resolved(runs, len(tokens), partial(capture_runs, model, tokens, max_rows=max_rows))


def _packed(model: Model, asked: Asked) -> PackedModel | None:
    """The model taken apart, if this can be captured with the packed pass and that is the better way.

    It is tried on the first prompt of every run.
    """
    tokens = asked.tokens
    places = places_of(asked.readouts, asked.runs).union(*asked.wanted.values())
    if can_resume(model) or unknown_place(model, tokens.shape[1], places) is not None:
        return None
    packed = packed_model(model, tokens.shape[1])
    try:
        with rounding_allowed(packed, tokens[:1]):
            _check_packed(model, packed, replace(asked, tokens=tokens[:1]))
    except DifferentModelError as error:
        why = f"the fast pass differs on this model ({error})"
        say_slow(model, why)
        found_different(model, why)
        if any(site == packed.keys_site for site, _ in places):
            raise  # who wants what hooks do not see goes on without it
        return None
    return packed


def _check_packed(model: Model, packed: PackedModel, asked: Asked) -> None:
    """Make sure that both passes read the same of some prompts, and end with the same residual stream.

    Raises:
        DifferentModelError: they do not.
    """
    last = min(asked.stop_at, packed.n_layers) - 1
    asked = replace(asked, wanted={run: {(RESID_POST, last): None} for run in asked.runs})
    length = asked.tokens.shape[1]
    theirs, ours = ActivationStore(length), ActivationStore(length)
    for passing, store in ((partial(execute, model), theirs), (partial(execute_whole, packed), ours)):
        _Capture(model, passing, asked, store).run(len(asked.runs))
    for run in asked.runs:
        mine, expected = (store.tensor(run, RESID_POST, last).flatten(0, 1).float() for store in (ours, theirs))
        if not (error := difference(mine, expected, packed.dtype)) <= TOLERANCE[packed.dtype]:
            raise DifferentModelError(f"{RESID_POST.at(last)} is off by {error:.2g} of its size")
        for readout in asked.readouts:
            for layer in readout.layers:
                mine, expected = (store.readings[run, readout.name, layer] for store in (ours, theirs))
                check_reading(readout, mine, expected, packed.dtype)


class _Capture:
    """Passes over all rows, a row for every run and prompt, that put into a store what is asked for."""

    def __init__(
        self, model: Model, passing: Callable[..., dict[tuple[str, int], Tensor]], asked: Asked, store: ActivationStore
    ) -> None:
        self.model, self.passing, self.asked, self.store = model, passing, asked, store
        self.device = device_of(model)
        self.readings: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)

    def run(self, max_rows: int) -> None:
        """Capture all, ``max_rows`` rows at a time, or fewer where they do not fit."""
        n_prompts, begin = len(self.asked.tokens), 0
        rows = [(run, prompt) for run in self.asked.runs for prompt in range(n_prompts)]
        hooked = bool(foreign_hooks(self.model))
        if hooked:
            warn_of_split(n_prompts, max_rows)
        while begin < len(rows):
            chunk = rows[begin : begin + max_rows]
            if hooked:  # somebody's hook may act on a row by its number: it sees the prompts, all and in their order
                chunk = chunk[: n_prompts - begin % n_prompts]
            try:
                self._pass(chunk)
            except RuntimeError as error:
                if not is_out_of_memory(error) or max_rows == 1:
                    raise
                max_rows = max(1, max_rows // 2)
                release_cached(self.device)
                continue
            begin += len(chunk)
        self._join_readings()

    def _pass(self, chunk: Sequence[tuple[str, int]]) -> None:
        """One pass over some rows."""
        prompts = torch.tensor([prompt for _, prompt in chunk])
        spans = {run: slice(*_span(chunk, run)) for run in dict.fromkeys(run for run, _ in chunk)}
        program = self._program(chunk, prompts, spans)
        kept = self._keep(program, spans)
        readings = self.passing(self.asked.tokens[prompts].to(self.device), program, stop_at=self.asked.stop_at)
        self._check(program, chunk)
        for key, act in kept.items():
            self.store.parts[key].append(act)
        for (name, layer), value in readings.items():
            for run, span in spans.items():
                self.readings[run, name, layer].append(value[span].to(self.device))
        self.store.n_forwards += 1

    def _program(
        self, chunk: Sequence[tuple[str, int]], prompts: Int[Tensor, " row"], spans: Mapping[str, slice]
    ) -> Program:
        """The root edits of the runs, and what is read."""
        program = Program(
            prompts.to(self.device),
            readouts=[(_running(readout), layer) for readout, layer in readouts_in(self.asked.readouts, 0)],
            broken=torch.zeros(1, dtype=torch.int32, device=self.device),
        )
        for run, span in spans.items():
            pairs = [(row, chunk[row][1]) for row in range(span.start, span.stop)]
            for root in (part for patch in self.asked.runs[run] for part in patch.parts):
                layers = [layer for layer in root.layers if layer < self.asked.stop_at]
                program.ops += root_ops(root, pairs, layers, self.device)
        return program

    def _keep(self, program: Program, spans: Mapping[str, slice]) -> dict[tuple[str, HookSite, int], Tensor]:
        """Have the pass keep what is wanted; it is there when the pass is over."""
        kept: dict[tuple[str, HookSite, int], Tensor] = {}
        wanted = self.asked.wanted
        for site, layer in dict.fromkeys(key for run in spans for key in wanted[run]):
            keepers = [(run, span, wanted[run]) for run, span in spans.items() if (site, layer) in wanted[run]]
            program.captures[site, layer] = _keeper(kept, site, layer, keepers)
        return kept

    def _check(self, program: Program, chunk: Sequence[tuple[str, int]]) -> None:
        assert program.finite is not None and program.broken is not None
        if program.broken.any():
            runs = ", ".join(repr(run) for run in dict.fromkeys(run for run, _ in chunk))
            raise EditError(f"a root edit of the runs {runs} gives NaN")
        if not program.finite.all():
            run = chunk[int((~program.finite).nonzero()[0])][0]
            raise InputError(
                f"the model's activations are not finite by block {self.asked.stop_at - 1} (run {run!r}): "
                "check the weights, or use dtype='float32'"
            )

    def _join_readings(self) -> None:
        over_positions = {readout.name for readout in self.asked.readouts if isinstance(readout, PositionReadout)}
        for (run, name, layer), values in self.readings.items():
            found = torch.cat(values)
            if name in over_positions:
                self.store.before[run, name, layer] = found
                found = found[:, -1]
            self.store.readings[run, name, layer] = found


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


def _keeper(
    part: dict[tuple[str, HookSite, int], Tensor],
    site: HookSite,
    layer: int,
    keepers: Sequence[tuple[str, slice, Places]],
) -> Callable[[Tensor], None]:
    def keep(act: Tensor) -> None:
        canonical = site.to_canonical(act)
        for run, span, wanted in keepers:
            kept = wanted[site, layer]
            mine = canonical[span]
            part[run, site, layer] = mine.clone() if kept is None else mine[:, list(kept)]

    return keep
