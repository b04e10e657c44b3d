"""Massive activations set to zero, to their mean over data, or clamped.

A massive activation of a hidden state is ``|x| > 100`` and ``|x| > 1000 median |x|``; it is replaced once, in the
residual stream behind the block where such entries first appear, at whatever token has them, and every later block
goes on from that (Sun et al., COLM 2024, whose mean is over 100 sequences). *Zero* breaks Llama-2-7B and *mean* does
not, which says that their values work as constant biases.

Our choices: a run other than the data's is judged by the data's median (a hook sees one token at a time when a model
generates); the mean is one for each dimension, over the massive entries of the data; *clamp* cuts them to the largest
magnitude among the entries of the data that are not massive. The control replaces, at the same tokens, as many entries
of median size. Pitfall: small models may have a sink and no entry beyond these bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens import edits, metrics
from sinklens.engine.capture import capture_runs
from sinklens.engine.memory import row_budget
from sinklens.engine.store import Want
from sinklens.errors import InputError, NotApplicableError
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_id, model_shape
from sinklens.patches import CLEAN, Patch
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.records.text import number
from sinklens.sites import RESID_POST

MassiveMode = Literal["zero", "mean", "clamp"]


@dataclass(frozen=True, eq=False)
class Massive:
    """The massive activations of a model, where they first appear, as some prompts show them."""

    layer: int
    """The block that they first appear behind."""
    dims: tuple[int, ...]
    """Dimensions that hold them, those of the most prompts first."""
    mean: Float[Tensor, " dim"]
    """Their mean over the data, for each of the dimensions."""
    limit: float
    """The magnitude beyond which an entry of these dimensions is massive."""
    ordinary: float
    """The largest magnitude among all other entries."""
    median_dims: tuple[int, ...]
    """As many dimensions whose entries, at the same tokens, are of median size."""
    median_mean: Float[Tensor, " dim"]
    """Their mean over the data at these tokens."""
    share: float
    """Share of the prompts that have some."""
    tokens: tuple[tuple[int, int], ...]
    """Prompt and position of every token that has some."""


@in_usual_state
def find_massive(
    model: Model,
    batch: PromptBatch,
    *,
    layer: int | None = None,
    absolute: float = 100.0,
    relative: float = 1000.0,
) -> Massive:
    """Massive activations on some prompts: the first block behind which half of the prompts have one.

    Args:
        model: the model.
        batch: the data.
        layer: the block, in place of the first.
        absolute: the magnitude to exceed.
        relative: how many times the median magnitude of its prompt's hidden state to exceed.

    Raises:
        NotApplicableError: no entry is beyond both bounds.
        InputError: there is no such block.
    """
    n_layers, rows = model_shape(model).n_layers, row_budget(model, batch.length, None)
    if layer is not None and not 0 <= layer < n_layers:
        raise InputError(f"block {layer} is not in 0..{n_layers - 1}")

    def bounds(x: Tensor) -> Bool[Tensor, "prompt pos d_model"]:
        return metrics.massive_activations(x, absolute, relative)

    if layer is None:
        every = tuple(range(n_layers))
        seen = Readout("massive", RESID_POST, every, lambda x, _: torch.stack(_top(x, bounds(x)), -1))
        store = capture_runs(model, batch.tokens, CLEAN, [], [seen], max_rows=rows)
        table = torch.stack([store.readings["base", "massive", block].cpu() for block in every])
        layer = _first_with(model, table, absolute, relative)
    store = capture_runs(model, batch.tokens, CLEAN, [Want("base", RESID_POST, layer)], max_rows=rows)
    x = store.tensor("base", RESID_POST, layer).float()
    there = bounds(x)
    if not there.any():
        raise NotApplicableError(f"{model_id(model)} has no massive activations behind block {layer}: name another")
    return _described(layer, x, there, absolute, relative)


def _top(x: Tensor, massive: Tensor) -> list[Float[Tensor, " row"]]:
    """Whether a prompt has massive activations, its largest magnitude, and that over the median."""
    flat = x.float().abs().flatten(1)
    largest = flat.amax(1)
    return [massive.flatten(1).any(1).float(), largest, largest / flat.median(1).values]


def _first_with(model: Model, table: Float[Tensor, "layer prompt 3"], absolute: float, relative: float) -> int:
    there = (table[..., 0].mean(1) >= 0.5).nonzero().flatten()
    if len(there):
        return int(there[0])
    best = int(table[..., 2].mean(1).argmax())
    largest, ratio = table[best, :, 1:].mean(0).tolist()
    raise NotApplicableError(
        f"{model_id(model)} has no massive activations (entries beyond {absolute:g} and {relative:g} times the median, "
        f"in half of the prompts): the largest are behind block {best}, {number(largest)} and {number(ratio)} times "
        "the median; set lower bounds for these"
    )


def _described(layer: int, x: Tensor, there: Tensor, absolute: float, relative: float) -> Massive:
    times = there.any(1).sum(0)
    dims = [int(dim) for dim in times.argsort(descending=True, stable=True)[: int((times > 0).sum())]]
    tokens = there.any(-1)
    median = x.abs().flatten(1).median(1).values
    at_tokens = x[tokens]
    far = (at_tokens.abs().mean(0) - median.mean()).abs()
    far[dims] = torch.inf
    control = far.argsort(stable=True)[: len(dims)].tolist()
    mean = torch.stack([x[..., dim][there[..., dim]].mean() for dim in dims])
    return Massive(
        layer=layer,
        dims=tuple(dims),
        mean=mean,
        limit=max(absolute, relative * float(median.mean())),
        ordinary=float(x.abs().masked_fill(there, 0).max()),
        median_dims=tuple(control),
        median_mean=at_tokens[:, control].mean(0),
        share=float(there.flatten(1).any(1).float().mean()),
        tokens=tuple((prompt, position) for prompt, position in tokens.nonzero().tolist()),
    )


def massive_patch(
    found: Massive, mode: MassiveMode = "mean", *, control: bool = False, length: int = 0, run: str = "base"
) -> Patch:
    """What :func:`massive_activations` does, as a patch for the engine.

    Args:
        found: which they are.
        mode: as there.
        control: as there.
        length: tokens in a prompt, which the engine has to be told; for plain hooks there is no need to.
        run: the run that is patched.

    Raises:
        InputError: another mode.
    """
    if mode not in get_args(MassiveMode):
        raise InputError(f"mode {mode!r}: choose {', '.join(get_args(MassiveMode))}")
    values = {"zero": None, "mean": found.median_mean if control else found.mean, "clamp": None}[mode]
    edit = edits.ReplaceMassive(
        f"massive_{mode}" + ("/median_sized" if control else ""),
        found.dims,
        found.limit,
        values,
        found.ordinary if mode == "clamp" else None,
        found.median_dims if control else (),
    )
    return Patch(RESID_POST, (found.layer,), tuple(range(length)), edit, run=run)


def massive_activations(found: Massive, mode: MassiveMode = "mean", *, control: bool = False) -> Hooks:
    """Replace massive activations where they first appear.

    Args:
        found: which they are, from :func:`find_massive`.
        mode: ``zero``, ``mean`` (over the data) or ``clamp`` (to the largest magnitude of other entries).
        control: at the same tokens, as many entries of median size instead; ``clamp`` leaves these as they are.

    Raises:
        InputError: another mode.
    """
    return hooks_of(massive_patch(found, mode, control=control))
