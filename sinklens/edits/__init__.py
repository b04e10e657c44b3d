"""Edits: pure functions from the activation at some positions to a new one.

An edit receives ``x``, the activation gathered at the (row, position) pairs that it applies to, as a tensor
``[pair, unit, ...]`` (the unit axis is the whole axis when the patch selects no units), the activation ``source`` of
another run at the matching places (or ``None``), and an :class:`EditSite` that says which block, prompts and
units these are. It returns a tensor of the shape of ``x`` and changes nothing in place. Because an edit sees pairs
and not a batch, one edit serves a single ``run_with_hooks`` call and a packed batch of a thousand patches alike.

There are two families, and the score they give is read differently:

* *isolating* edits carry only the named mechanism over from the source (:class:`Subspace`,
  :class:`NeuronContribution`): the claim predicts an effect of 1;
* *removing* edits take the mechanism away from an activation (:class:`Constant`, :class:`PermuteWithin`,
  :class:`DensifyRows`, :class:`DropDimsBeforeNorm`, :class:`RemoveDirection`): applied to the run that has the sink
  the claim predicts that the sink goes; wrapped in :class:`OfSource`, they ask whether the activation still
  carries the sink into a run without one.
"""

from sinklens.edits.base import Edit, EditSite, Read, SourceEdit
from sinklens.edits.draws import random_orthonormal, random_permutations, rotate_rows
from sinklens.edits.general import (
    DIRECTION_ONLY,
    NORM_ONLY,
    Constant,
    Function,
    Interpolate,
    Masked,
    OfSource,
    OutsideSubspace,
    PermuteWithin,
    PerPosition,
    PerPrompt,
    RemoveDirection,
    Rescale,
    SameNormScaling,
    Subspace,
    Transplant,
    WrittenBy,
    resized,
)
from sinklens.edits.mechanism import (
    AttendSelf,
    AttendTo,
    DensifyRows,
    DropDimsBeforeNorm,
    MaskKeys,
    MeanAxis,
    NeuronContribution,
    amplification,
)
from sinklens.edits.mitigation import Attenuate, KeepKeys, RemoveSubspace, ReplaceMassive

__all__ = [
    "AttendSelf",
    "AttendTo",
    "Attenuate",
    "Constant",
    "DIRECTION_ONLY",
    "DensifyRows",
    "DropDimsBeforeNorm",
    "Edit",
    "EditSite",
    "Function",
    "Interpolate",
    "MaskKeys",
    "KeepKeys",
    "Masked",
    "MeanAxis",
    "NORM_ONLY",
    "NeuronContribution",
    "OfSource",
    "OutsideSubspace",
    "PerPosition",
    "PerPrompt",
    "PermuteWithin",
    "Read",
    "RemoveDirection",
    "RemoveSubspace",
    "ReplaceMassive",
    "Rescale",
    "SameNormScaling",
    "SourceEdit",
    "Subspace",
    "Transplant",
    "WrittenBy",
    "amplification",
    "random_orthonormal",
    "random_permutations",
    "resized",
    "rotate_rows",
]
