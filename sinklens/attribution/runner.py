"""Estimates in the shape of the engine's results, so that what runs patches can estimate them instead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.attribution.estimation import Attributor
from sinklens.engine.run import EngineStats, PatchResult, PatchRunner, Progress
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.patches import CLEAN, Patch, Runs
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout


class AttributionRunner:
    """In place of a :class:`sinklens.engine.PatchRunner`: values are the run's own plus the estimated change.

    The arguments are the same. Runs are measured, not estimated.
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
    ) -> None:
        limits: dict[str, Any] = {"memory_budget": memory_budget, "max_rows": max_rows}
        self.model = model
        self._exact = PatchRunner(model, prompts, readouts, runs=runs, **limits)
        self._attributor = Attributor(model, prompts, readouts, runs=runs, **limits)

    @in_usual_state
    def run(self, patches: Sequence[Patch], progress: Progress | None = None) -> PatchResult:
        """The estimated readouts of every patch on every prompt.

        Raises:
            InputError: a readout without a gradient.
            EngineError: a gradient that is missing or not finite.
        """
        began = time.perf_counter()
        found = self._attributor.estimate(patches)
        values = {name: change.cpu() for name, change in found.changes.items()}
        runs = self._exact.run_values
        names = list(runs)
        which = torch.tensor([names.index(patch.run) for patch in patches], dtype=torch.long)
        for name, value in values.items():
            value += torch.stack([runs[run][name] for run in names])[which]
        stats = EngineStats(
            n_patches=len(patches),
            n_rows=next(iter(values.values())).numel(),
            n_forwards=found.n_forwards,
            seconds=time.perf_counter() - began,
            path="attribution",
        )
        if progress is not None:
            progress(stats.n_rows, stats.n_rows)
        return PatchResult(values, runs, stats)
