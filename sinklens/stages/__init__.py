"""The six stages of the proposed chain, and what a stage is.

A :class:`Stage` is a claim about *where* the effect passes: a site, blocks, units, and a readout that says how far it
has gone. Each :class:`Experiment` tests it: a *transplant* (does the stage carry the effect?), *mechanism* edits (by
what the claim names?), and for each a *control* of equal size that should do nothing of the kind. ``predicted`` is what
the claim says the effects are (a :class:`Prediction`). Isolating edits carry over only the mechanism: 1 and 1. Removing
edits take the mechanism away: putting what is left into the base run should not restore the sink (0), and taking it out
of the anchored run should remove it (1); for their controls it is the other way round.

The weight counterfactuals (permuted z, rotated W_out rows) are written as activation edits: no weight is touched.
"""

from __future__ import annotations

from sinklens.edits.draws import others
from sinklens.stages.base import (
    ISOLATED,
    NOTHING,
    REMOVED,
    SPARED,
    STAGES,
    Experiment,
    Need,
    Prediction,
    Setting,
    Stage,
    at_formation,
    experiment_kind,
    register,
    stages_of,
)
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, edited, other_dims, other_neurons, other_positions
from sinklens.stages.down_projection import DOWN_PROJECTION
from sinklens.stages.links import EARLY_MLPS, READING
from sinklens.stages.qk_locking import QK_LOCKING
from sinklens.stages.rmsnorm_filter import RMSNORM_FILTER, largest_dims, only_dims
from sinklens.stages.super_neurons import SUPER_NEURONS
from sinklens.stages.value_aggregation import VALUE_AGGREGATION
from sinklens.stages.w_o_alignment import W_O_ALIGNMENT, reading_subspace

CHAIN: tuple[Stage, ...] = tuple(
    register(stage)
    for stage in (VALUE_AGGREGATION, W_O_ALIGNMENT, SUPER_NEURONS, DOWN_PROJECTION, RMSNORM_FILTER, QK_LOCKING)
)
"""The six stages, in order."""
LINKED: tuple[Stage, ...] = (*CHAIN[:2], register(EARLY_MLPS), register(READING), *CHAIN[2:])
"""The same with two more between W_O and the super neurons: what carries the one's output to the others."""

__all__ = [
    "CHAIN",
    "DOWN_PROJECTION",
    "EARLY_MLPS",
    "ELSEWHERE",
    "Experiment",
    "ISOLATED",
    "LINKED",
    "NOTHING",
    "Need",
    "Prediction",
    "QK_LOCKING",
    "STAGES",
    "READING",
    "REMOVED",
    "RMSNORM_FILTER",
    "SPARED",
    "SUPER_NEURONS",
    "Setting",
    "Stage",
    "TRANSPLANT",
    "VALUE_AGGREGATION",
    "W_O_ALIGNMENT",
    "at_formation",
    "edited",
    "experiment_kind",
    "largest_dims",
    "only_dims",
    "reading_subspace",
    "other_dims",
    "other_neurons",
    "other_positions",
    "others",
    "register",
    "stages_of",
]
