"""The edits of a sweep by name, and what the ablations put in place of an activation.

==========  ===================================================================================================
transplant  the activation of the pair's other run at the same place (natural sink: at an ordinary position)
zero        nothing
mean        per block and unit, the mean over all ordinary positions of all prompts, in the run without the sink
resample    the activation at one ordinary position of one prompt, both drawn for each prompt with the seed
==========  ===================================================================================================

Ablations are applied in the run that the direction patches: noised, the run with the sink.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.edits import Constant, Edit, PerPrompt
from sinklens.engine.capture import Want, capture_runs
from sinklens.errors import InputError
from sinklens.models.view import Model, model_shape
from sinklens.pairs.pair import SinkPair
from sinklens.pairs.subset import roots_for_prompts
from sinklens.prompts import PromptBatch
from sinklens.sites import HookSite
from sinklens.statistics import generator

NAMES = ("transplant", "zero", "mean", "resample")
"""Edits by name."""

_CHUNK_BYTES = 1 << 28
"""Activations kept at once while means are taken."""


def check_edit(edit: str | Edit) -> None:
    """Make sure that an edit exists.

    Raises:
        InputError: an unknown name, or neither name nor edit.
    """
    if not isinstance(edit, Edit) and edit not in NAMES:
        raise InputError(f"edit {edit!r} is not known: choose from {', '.join(NAMES)}, or give an Edit")


def ablation(
    name: str,
    model: Model,
    batch: PromptBatch,
    pair: SinkPair,
    site: HookSite,
    layers: Sequence[int],
    seed: int,
    max_rows: int,
) -> Edit:
    """The edit ``mean`` or ``resample`` of a site, in some blocks, on all prompts."""
    donors = draw_places(pair.ordinary, generator(seed, "sweep/resample"))
    per_block = batch.length * model_shape(model).d_model * 4 * max(1, len(layers))
    step = max(1, min(max_rows, _CHUNK_BYTES // per_block))
    sums: dict[int, Tensor] = {}
    drawn: dict[int, Tensor] = {}
    for first in range(0, batch.n, step):
        marks = pair.ordinary[first : first + step].bool()
        run = pair.without.run
        roots = roots_for_prompts(pair.runs[run], first)
        wants = [Want(run, site, layer) for layer in layers]
        store = capture_runs(model, batch.tokens[first : first + step], {run: roots}, wants, max_rows=max_rows)
        mine = (donors[:, 0] >= first) & (donors[:, 0] < first + step)
        for layer in layers:
            x = store.tensor(run, site, layer)
            here = x[marks.to(x.device)].double().sum(0)
            sums[layer] = sums[layer] + here if layer in sums else here
            if layer not in drawn:
                drawn[layer] = x.new_zeros(batch.n, *x.shape[2:])
            drawn[layer][mine.to(x.device)] = x[donors[mine, 0] - first, donors[mine, 1]]
    if name == "mean":
        count = pair.ordinary.sum().item()
        return Constant("mean", {layer: (total / count).float() for layer, total in sums.items()})
    return PerPrompt("resample", drawn)


def draw_places(ordinary: Tensor, drawn: torch.Generator) -> Int[Tensor, "prompt 2"]:
    """For every prompt, the (prompt, position) of one of all ordinary positions."""
    places = ordinary.nonzero()
    return places[torch.randint(len(places), (len(ordinary),), generator=drawn)]
