"""Where the sink forms: its position, the formation blocks, the super neurons, the dimensions that they write.

Everything is found in the data; nothing is assumed about the model or the first token.

* The *sink position* of a prompt is the position that receives most attention from later queries, over all blocks and
  heads, among positions that enough later queries see.
* A *formation block* makes the sink token's residual norm jump against the other tokens': with
  ``r_l = |h_l[sink]| / median_j |h_l[j]|``, block l is one when ``r_after >= min_ratio`` and
  ``r_after / r_before >= min_jump``. The block to explain is the one with the largest growth ``r_after - r_before``.
* A *formation step* is a run of formation blocks, one after another. A model may make its sink in several, each for the
  blocks behind it; ``event`` says which one to explain, by the block of it with the largest growth.
* *Super neurons* (of that block) have outlying norms of both their W_gate and W_up columns (robust z of each, the
  smaller one counts) and fire selectively: their mean magnitude on the sink token is ``selectivity`` times what they
  reach on other tokens (95th percentile). A plain MLP has no gate, so W_in alone is asked.
* *Outlier dimensions* are the residual dimensions in which the super neurons' joint contribution on the sink token
  outlies that in all others (robust z of its magnitude); where a norm stands behind the MLP, so that a neuron's own
  contribution cannot be told, all that the MLP adds takes its place.

The thresholds are choices, not facts of nature: each is an argument, and what was measured is returned with the
verdict.
"""

from sinklens.formation.find import check_given, explained, find_formation
from sinklens.formation.result import (
    Formation,
    FormationEvent,
    FormationStep,
    OutlierDim,
    SuperNeuron,
    formation_from_json,
    formation_to_json,
)

__all__ = [
    "Formation",
    "FormationEvent",
    "FormationStep",
    "OutlierDim",
    "SuperNeuron",
    "check_given",
    "explained",
    "find_formation",
    "formation_from_json",
    "formation_to_json",
]
