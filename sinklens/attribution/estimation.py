r"""Attribution patching (Nanda 2023): the effect of every patch from one gradient.

For a patch that replaces x, in the run that it is applied in, by x' (whatever its edit makes of x and the source):

    M(x') - M(x)  ~  sum over the patched entries of (x' - x) . dM/dx,   x and dM/dx of the unpatched run.

One forward pass of each run and one backward pass for each readout estimate all patches at once; where queries or keys
are patched the softmax is recomputed exactly (:mod:`sinklens.attribution.qk`). A patch of several blocks or places is
the sum of its parts.

Pitfalls: it is the first order of an effect that is rarely small. Behind a normalisation, and where the patch turns
a sink on or off, it can have the wrong size or sign; direct and indirect effects that cancel are missed
(:func:`grad_drop` finds these). It screens: a sweep runs what it finds exactly (``verify=``); never
report an estimate as the effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.attribution.passes import Estimation, Needs
from sinklens.attribution.trace import Trace, without
from sinklens.edits import Edit, Transplant
from sinklens.engine.given import check_own_values, check_readouts, check_runs, listed
from sinklens.engine.places import group_parts, parts_of
from sinklens.errors import InputError
from sinklens.models.state import Snapshot, in_usual_state, snapshot, usual_state
from sinklens.models.view import Model, check_model
from sinklens.patches import CLEAN, Patch, Runs, Source
from sinklens.prompts import PromptBatch, check_ids
from sinklens.readouts.base import Readout
from sinklens.sites import HookSite, unit_count


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated changes of readouts."""

    changes: Mapping[str, Float[Tensor, "patch prompt"]]
    """Readout name to the estimate of ``M_patched - M_run``, on the model's device, float64."""
    runs: Mapping[str, Mapping[str, Float[Tensor, " prompt"]]]
    """Run name to readout name to the unpatched run's values, exact, for every run that is patched."""
    n_forwards: int
    """Forward passes that this took."""
    n_backwards: int
    """Backward passes that this took."""


@in_usual_state
def estimate(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    patches: Sequence[Patch],
    readouts: Sequence[Readout],
    *,
    runs: Runs = CLEAN,
    qk_fix: bool = True,
    memory_budget: int | None = None,
    max_rows: int | None = None,
) -> Attribution:
    """Estimate what every patch changes each readout by, on every prompt.

    Args:
        model: the model, of either backend.
        prompts: equal-length prompts, ``[prompt pos]``.
        patches: any sequence, also one that builds its patches when they are asked for.
        readouts: what to estimate; ``reduce`` and ``combine`` must pass gradients on.
        runs: root patches of every run, as for :func:`sinklens.run_patches`.
        qk_fix: recompute the softmax for patches of queries and keys; False: plain attribution patching.
        memory_budget: bytes that one pass's activations may take (as for the engine by default).
        max_rows: prompts for one pass, in place of the memory budget.

    Raises:
        InputError: a place, run or readout that does not exist, or a readout without a gradient.
        NotApplicableError: the model's attention cannot be recomputed for the QK fix.
        EngineError: a hook that does not exist or never fired, a gradient that is not finite.
    """
    patches = listed(patches, Patch, "patches")
    job = _job(model, prompts, readouts, runs, qk_fix)
    check_own_values(patches, runs, len(job.tokens))
    return _collect(job, job.passes(job.needs(patches), memory_budget, max_rows), patches)


class Attributor:
    """Estimates many lists of patches on the same prompts; what it traced of the runs is kept between calls.

    It traces anew when the model has changed since.

    It holds the activations and gradients of the sites that it was last asked for, in all blocks, for all prompts; the
    arguments are those of :func:`estimate`.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptBatch | Int[Tensor, "prompt pos"],
        readouts: Sequence[Readout],
        *,
        runs: Runs = CLEAN,
        qk_fix: bool = True,
        memory_budget: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        self.model = model
        with usual_state(model):
            self._job = _job(model, prompts, readouts, runs, qk_fix)
        self._limits = (memory_budget, max_rows)
        self._seen: Snapshot | None = None
        self._needs: Needs | None = None
        self._held: list[tuple[Tensor, dict[str, Trace]]] = []

    @in_usual_state
    def estimate(self, patches: Sequence[Patch]) -> Attribution:
        """As :func:`estimate`; the passes counted are those of all calls so far."""
        job, needs = self._job, self._job.needs(patches)
        before, self._seen = self._seen, snapshot(self.model)
        if self._needs is None or not self._needs.cover(needs) or before != self._seen:
            self._held.clear()  # must go before the next is traced
            job.readings.clear()
            self._needs = needs.in_all_blocks(job.last_block)
            self._held = list(job.passes(self._needs, *self._limits))
        return _collect(job, self._held, patches)


@in_usual_state
def grad_drop(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    patches: Sequence[Patch],
    readouts: Sequence[Readout],
    *,
    runs: Runs = CLEAN,
    qk_fix: bool = True,
    memory_budget: int | None = None,
    max_rows: int | None = None,
) -> Attribution:
    """Sizes of effects that do not cancel (GradDrop, Kramar et al. 2024): a patch's estimate is made once for every
    block, with no gradient through what that block's attention and MLP write, and the mean of the absolute values is
    taken over blocks.

    A direct and an indirect effect that cancel in the one gradient no longer do when a block on one of the two ways is
    left out. These are sizes for ranking, 0 or more, and no estimates of a change. Arguments and errors are those of
    :func:`estimate`; it takes as many backward passes more as there are blocks up to the last that is read.
    """
    patches = listed(patches, Patch, "patches")
    job = _job(model, prompts, readouts, runs, qk_fix, drop_blocks=True)
    check_own_values(patches, runs, len(job.tokens))
    found = _collect(job, job.passes(job.needs(patches), memory_budget, max_rows), patches)
    sizes = {
        readout.name: torch.stack([found.changes[without(readout.name, drop)] for drop in job.drops]).abs().mean(0)
        for readout in readouts
    }
    return replace(found, changes=sizes)


def _job(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    readouts: Sequence[Readout],
    runs: Runs,
    qk_fix: bool,
    drop_blocks: bool = False,
) -> Estimation:
    check_model(model)
    check_runs(runs)
    readouts = check_readouts(readouts)
    tokens = prompts.tokens if isinstance(prompts, PromptBatch) else prompts
    check_ids(model, tokens)
    return Estimation(model, tokens.long(), readouts, runs, qk_fix, drop_blocks)


def _collect(
    job: Estimation, passes: Iterable[tuple[Tensor, dict[str, Trace]]], patches: Sequence[Patch]
) -> Attribution:
    out = torch.zeros(len(job.names), len(patches), len(job.tokens), dtype=torch.float64, device=job.device)
    for rows, traces in passes:
        for groups in job.slabs(patches):
            for group in groups:
                job.add(group, rows, traces, out)
    return Attribution(
        changes=dict(zip(job.names, out, strict=True)),
        runs={run: {name: torch.cat(parts) for name, parts in found.items()} for run, found in job.readings.items()},
        n_forwards=job.n_forwards,
        n_backwards=job.n_backwards,
    )


@in_usual_state
def attribution_map(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    site: HookSite,
    layers: Sequence[int],
    readout: Readout,
    *,
    edit: Edit | None = None,
    source: Source | None = None,
    run: str = "base",
    runs: Runs = CLEAN,
    qk_fix: bool = True,
    memory_budget: int | None = None,
    max_rows: int | None = None,
) -> Float[Tensor, "layer prompt pos unit"]:
    """The estimate for every unit at every position of a site, each patched alone.

    Args:
        model: as in :func:`estimate`.
        prompts: as in :func:`estimate`.
        site: where.
        layers: blocks.
        readout: what to estimate.
        edit: the edit; a transplant by default.
        source: where its source comes from: the same position of that run, or the one position of each prompt.
        run: the run that is patched.
        runs: as in :func:`estimate`.
        qk_fix: as in :func:`estimate`.
        memory_budget: as in :func:`estimate`.
        max_rows: as in :func:`estimate`.

    Returns:
        Estimated changes, on the model's device, float64. The sum over units is the estimate for the whole activation,
        where the edit is one that acts on every unit by itself.
    """
    edit = Transplant() if edit is None else edit
    job = _job(model, prompts, [readout], runs, qk_fix)
    tokens, length = job.tokens, job.tokens.shape[1]
    everywhere = [Patch(site, (layer,), (pos,), edit, None, run, source) for layer in layers for pos in range(length)]
    groups = group_parts(parts_of(everywhere), job.device, by_run=True)  # one for every block, in their order
    n_units = unit_count(site, job.shape)
    if n_units is None:
        raise InputError(f"{site.template} has no units to select")
    out = torch.zeros(len(layers), *tokens.shape, n_units, dtype=torch.float64, device=job.device)
    for batch, traces in job.passes(job.needs(everywhere), memory_budget, max_rows):
        for i, group in enumerate(groups):
            if layers[i] > job.last:
                continue  # nothing there can move the readout
            for patches, rows, change in job.changes(group, layers[i], batch, traces):
                out[i, batch[rows], patches % length] = change[0]
    return out
