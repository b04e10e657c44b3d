"""Edits of one mechanism of the chain: attention to oneself, down-projections, what the norm sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from sinklens.edits.base import Edit, EditSite, Gathered, Read, SourceEdit, Table, among_kept, need
from sinklens.edits.general import Rescale
from sinklens.errors import InputError
from sinklens.sites import MLP_POST, RESID_PRE, HookSite

MeanAxis: TypeAlias = Literal["prompts", "positions", "global"]
"""What the mean that amplification leaves in place is taken over."""


def amplification(
    z: Mapping[int, Float[Tensor, "prompt pos head d_head"]],
    position: int,
    strength: float,
    axis: MeanAxis = "prompts",
) -> Rescale:
    """Variance amplification of the aggregated value: ``mu + strength * (z - mu)``, for use at ``position``.

    Args:
        z: ``hook_z`` of every block to edit, in the run that mu is taken from.
        position: the token that will be edited.
        strength: the factor lambda.
        axis: mu is the mean over the prompts at ``position``, over the positions of each prompt (its own mu), or over
            all prompts and positions.

    Raises:
        InputError: another axis, a strength that is no finite number, or a position that ``z`` does not have.
    """
    check_amplification(strength, axis)
    for layer, values in z.items():
        if not 0 <= position < values.shape[1]:
            raise InputError(f"position {position} is not in 0..{values.shape[1] - 1}, which block {layer}'s z has")
    mean = {layer: _mean(values.detach().float(), position, axis) for layer, values in z.items()}
    return Rescale(
        "amplify_variance",
        mean,
        {layer: torch.tensor(float(strength), dtype=torch.float32, device="cpu") for layer in z},
    )


def check_amplification(strength: float, axis: str) -> None:
    """Make sure that :func:`amplification` can be asked for so.

    Raises:
        InputError: another axis, or a strength that is no finite number.
    """
    if axis not in get_args(MeanAxis):
        raise InputError(f"axis {axis!r}: choose {', '.join(get_args(MeanAxis))}")
    if not math.isfinite(strength):
        raise InputError(f"strength {strength} must be a finite number")


def _mean(z: Tensor, position: int, axis: MeanAxis) -> Tensor:
    if axis == "prompts":
        return z[:, position].mean(0)
    return z.mean(1) if axis == "positions" else z.mean((0, 1))


@dataclass(frozen=True, eq=False)
class AttendSelf(Edit):
    """Make a query attend to itself alone: its row of ``hook_pattern`` becomes one-hot.

    Equal to masking every earlier key with minus infinity before the softmax.
    """

    name: str = "block_aggregation"

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        own = torch.nn.functional.one_hot(at.positions, x.shape[-1]).to(x)
        return own[:, None, :].expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class AttendTo(Edit):
    """Make a query attend as it is told: its row of ``hook_pattern`` becomes the given weights, in every head."""

    name: str = "attend_to"
    weights: Float[Tensor, "prompt key"] = field(default_factory=lambda: torch.zeros(0, 0))
    """For every prompt, the weights of all keys."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.weights, ("prompt", "key"), behind=0),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        own = self.weights.to(x)[at.prompts.to(x.device)]
        return own[:, None, :].expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class MaskKeys(Edit):
    """Make a query do without some keys: their weights become zero, and the rest are scaled up to sum to one.

    Equal to masking those keys with minus infinity before the softmax. A query that keeps no key is an error.
    """

    name: str = "keys_masked"
    keep: Bool[Tensor, "prompt query key"] = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.bool))
    """For every prompt (or one for all) and query, the keys that it keeps."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.keep[0] if len(self.keep) == 1 else self.keep, ("prompt", "query", "key"), True, 0),)

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return ("pattern_is_softmax",)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        keep = self.keep.to(x.device)
        prompts = at.prompts.to(x.device) if len(keep) > 1 else torch.zeros_like(at.prompts, device=x.device)
        return among_kept(x, keep[prompts, at.positions.to(x.device)][:, None])


def contribution(post: Float[Tensor, "pair d_mlp"], neurons: tuple[int, ...], rows: Tensor) -> Tensor:
    """What ``neurons`` write, ``[pair, d_model]``: their activations times their rows ``[neuron, d_model]``."""
    return post[:, list(neurons)].to(rows.dtype) @ rows


@dataclass(frozen=True, eq=False)
class NeuronContribution(SourceEdit):
    """Carry over from the source only what some neurons write into some residual dimensions.

    ``x_D + (a_source - a) @ W_out[neurons][:, D]`` for the dimensions ``D``, all else as it was. The activations
    ``a`` are read live at ``mlp.hook_post``.
    """

    name: str = "outlier_dims"
    neurons: tuple[int, ...] = ()
    """Neurons whose contribution is exchanged."""
    rows: Float[Tensor, "neuron d_model"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Their rows of W_out."""
    dims: tuple[int, ...] = ()
    """Residual dimensions it is restricted to."""
    site: HookSite = MLP_POST
    """Where the neurons' activations are read."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        return (self.site,)

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return ("neurons_write", "mlp_adds")

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        need(source, self)
        rows = self.rows.to(x)
        keep = torch.zeros(rows.shape[-1], dtype=x.dtype, device=x.device)
        keep[list(self.dims)] = 1
        new = contribution(at.read_source(self.site), self.neurons, rows)
        return x + (new - contribution(at.read(self.site), self.neurons, rows)) * keep


@dataclass(frozen=True, eq=False)
class DensifyRows(Edit):
    """Rotate the W_out rows of some neurons, keeping their norms: ``x + a @ (rotated - rows)``.

    Written on ``hook_mlp_out``, so that the weights stay as they are and every row of a batch can have its own.
    """

    name: str = "densified"
    neurons: tuple[int, ...] = ()
    """Neurons whose down-projection is densified."""
    rows: Float[Tensor, "neuron d_model"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Their rows of W_out."""
    rotated: Float[Tensor, "neuron d_model"] = field(default_factory=lambda: torch.zeros(0, 0))
    """The rows that take their place: same norms, spread over all dimensions."""
    site: HookSite = MLP_POST
    """Where the neurons' activations are read."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        return (self.site,)

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return ("neurons_write", "mlp_adds")

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        delta = self.rotated.to(x) - self.rows.to(x)
        return x + contribution(at.read(self.site), self.neurons, delta)


@dataclass(frozen=True, eq=False)
class DropDimsBeforeNorm(Edit):
    """What the norm would have given had some residual dimensions been zero, edited in at ``hook_normalized``.

    ``denominator_only=True`` keeps the dimensions in the numerator and removes them only from the RMS (or standard
    deviation): it undoes the *filtering* while the outlier itself stays.
    """

    name: str = "dims_removed"
    dims: tuple[int, ...] = ()
    """Residual dimensions that are zeroed in the norm's input."""
    eps: float = 1e-5
    """The norm's epsilon."""
    centred: bool = False
    """True for LayerNorm, which subtracts the mean over dimensions first."""
    denominator_only: bool = False
    """Leave the numerator as it is."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        return (RESID_PRE,)

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return ("norm_before_attention",)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        resid = at.read(RESID_PRE).to(x.dtype)
        dropped = resid.clone()
        dropped[:, list(self.dims)] = 0
        numerator = resid if self.denominator_only else dropped
        if self.centred:
            dropped = dropped - dropped.mean(-1, keepdim=True)
            numerator = numerator - numerator.mean(-1, keepdim=True)
        return numerator / (dropped.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
