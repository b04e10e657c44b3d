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

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.sites import MLP_POST, RESID_PRE, HookSite

Gathered = Float[Tensor, "pair unit *rest"]


@dataclass(frozen=True, eq=False)
class EditSite:
    """What an edit may know about the places that it is applied to."""

    layer: int
    """Block index."""
    prompts: Int[Tensor, " pair"]
    """Index of the prompt that each pair comes from."""
    positions: Int[Tensor, " pair"]
    """Token position of each pair."""
    units: Int[Tensor, "pair unit"] | None = None
    """Selected unit indices, or ``None`` for the whole axis."""
    live: Mapping[str, Gathered] = field(default_factory=dict)
    """Activations of this forward pass at the sites in ``Edit.reads`` (keys are site templates)."""
    source_live: Mapping[str, Gathered] = field(default_factory=dict)
    """The source run's activations at the sites in ``Edit.reads``."""


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class: a name, the other sites it must see, and a call."""

    name: str
    """Short name, used in tables."""

    @property
    def reads(self) -> tuple[HookSite, ...]:
        """Sites of the same block, earlier in the forward pass, whose activations the edit needs."""
        return ()

    @property
    def uses_source(self) -> bool:
        """Whether the edit needs the activation of a source run."""
        return False

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        """The edited activation, of the shape of ``x``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 over the class and all parameters, tensors by value: equal edits have equal fingerprints."""
        digest = hashlib.sha256(type(self).__qualname__.encode())
        for item in fields(self):
            _update(digest, getattr(self, item.name))
        return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Edit):
        digest.update(value.fingerprint().encode())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(repr(key).encode())
            _update(digest, value[key])
    else:
        digest.update(repr(value).encode())


def select(full: Float[Tensor, "unit *rest"], like: Gathered, units: Int[Tensor, "pair unit"] | None) -> Tensor:
    """Per-unit parameters broadcast to the pairs of ``like``, on its device and in its dtype."""
    full = full.to(like)
    return full.unsqueeze(0) if units is None else full[units]


def need(source: Gathered | None, edit: Edit) -> Gathered:
    """``source``, or a ``ValueError`` that names the edit which cannot do without."""
    if source is None:
        raise ValueError(f"the edit {edit.name!r} needs a source run: give the patch source=Source(...)")
    return source


@dataclass(frozen=True, eq=False)
class Transplant(Edit):
    """Replace the activation with the source run's."""

    name: str = "transplant"

    @property
    def uses_source(self) -> bool:
        return True

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        return need(source, self)


@dataclass(frozen=True, eq=False)
class Constant(Edit):
    """Replace the activation with a constant: zero by default, a mean when ``values`` is given."""

    name: str = "zero"
    values: Mapping[int, Float[Tensor, "unit *rest"]] | None = None
    """Per block, the constant for every unit of the site; ``None`` is zero."""

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        if self.values is None:
            return torch.zeros_like(x)
        return select(self.values[at.layer], x, at.units).expand_as(x)


@dataclass(frozen=True, eq=False)
class PerPrompt(Edit):
    """Replace the activation with a value of each prompt's own: resample ablation."""

    name: str = "resample"
    values: Mapping[int, Float[Tensor, "prompt unit *rest"]] = field(default_factory=dict)
    """Per block, the new value of every unit for every prompt."""

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        full = self.values[at.layer].to(x)[at.prompts.to(x.device)]
        return full if at.units is None else full.gather(1, at.units)


@dataclass(frozen=True, eq=False)
class Rescale(Edit):
    """Rescale the deviation from a mean: ``mean + scale * (x - mean)``.

    With a scalar scale this is variance amplification; with ``scale = sigma_target / sigma`` per dimension it matches
    second moments and leaves the mean alone.
    """

    name: str = "rescale"
    mean: Mapping[int, Float[Tensor, "unit *rest"]] = field(default_factory=dict)
    """Per block, the mean that is left in place."""
    scale: Mapping[int, Float[Tensor, "..."]] = field(default_factory=dict)
    """Per block, the factor on the deviation; broadcasts against the mean."""

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        mean = select(self.mean[at.layer], x, at.units)
        full_scale = self.scale[at.layer].to(x).expand(self.mean[at.layer].shape)
        return mean + select(full_scale, x, at.units) * (x - mean)


@dataclass(frozen=True, eq=False)
class SameNormScaling(Edit):
    """The norm-only control of another edit: scale ``x`` uniformly to the norm which that edit would give it."""

    name: str = "same_norm"
    of: Edit = field(default_factory=lambda: Constant())
    """The edit whose output norm is copied."""

    @property
    def reads(self) -> tuple[HookSite, ...]:
        return self.of.reads

    @property
    def uses_source(self) -> bool:
        return self.of.uses_source

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        target = self.of(x, source, at).flatten(1).norm(dim=-1)
        norm = x.flatten(1).norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        return x * (target / norm).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Subspace(Edit):
    """Transplant only the component in the span of an orthonormal basis: ``x + (source - x) B B^T``."""

    name: str = "subspace"
    basis: Float[Tensor, "d_model rank"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Orthonormal columns."""

    @property
    def uses_source(self) -> bool:
        return True

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        basis = self.basis.to(x)
        return x + (need(source, self) - x) @ basis @ basis.T


@dataclass(frozen=True, eq=False)
class PermuteWithin(Edit):
    """Permute the entries of every unit's vector (for ``hook_z``: within each head).

    The per-position variance and the norm stay exactly the same, the alignment with what reads the vector is
    destroyed; permuting the activation is the same as permuting the rows of the matrix that reads it.
    """

    name: str = "permuted"
    permutation: Int[Tensor, "unit d_head"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """For every unit, a permutation of its entries."""

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        order = self.permutation.to(x.device)
        order = order.unsqueeze(0).expand(len(x), -1, -1) if at.units is None else order[at.units]
        return x.gather(-1, order)


def contribution(post: Float[Tensor, "pair d_mlp"], neurons: tuple[int, ...], rows: Tensor) -> Tensor:
    """What ``neurons`` write, ``[pair, d_model]``: their activations times their rows ``[neuron, d_model]``."""
    return post[:, list(neurons)].to(rows.dtype) @ rows


@dataclass(frozen=True, eq=False)
class NeuronContribution(Edit):
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
    def reads(self) -> tuple[HookSite, ...]:
        return (self.site,)

    @property
    def uses_source(self) -> bool:
        return True

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        need(source, self)
        rows = self.rows.to(x)
        keep = torch.zeros(rows.shape[-1], dtype=x.dtype, device=x.device)
        keep[list(self.dims)] = 1
        key = self.site.template
        new = contribution(at.source_live[key], self.neurons, rows)
        return x + (new - contribution(at.live[key], self.neurons, rows)) * keep


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
    def reads(self) -> tuple[HookSite, ...]:
        return (self.site,)

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        delta = self.rotated.to(x) - self.rows.to(x)
        return x + contribution(at.live[self.site.template], self.neurons, delta)


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
    def reads(self) -> tuple[HookSite, ...]:
        return (RESID_PRE,)

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        resid = at.live[RESID_PRE.template].to(x.dtype)
        dropped = resid.clone()
        dropped[:, list(self.dims)] = 0
        numerator = resid if self.denominator_only else dropped
        if self.centred:
            dropped = dropped - dropped.mean(-1, keepdim=True)
            numerator = numerator - numerator.mean(-1, keepdim=True)
        return numerator / (dropped.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True, eq=False)
class RemoveDirection(Edit):
    """Remove the component along a unit direction: ``x - (x . u) u``, one direction per block and unit."""

    name: str = "direction_removed"
    directions: Mapping[int, Float[Tensor, "unit d_head"]] = field(default_factory=dict)
    """Per block, a unit vector for every unit."""

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        u = select(self.directions[at.layer], x, at.units)
        return x - (x * u).sum(-1, keepdim=True) * u


@dataclass(frozen=True, eq=False)
class AttendSelf(Edit):
    """Make a query attend to itself alone: its row of ``hook_pattern`` becomes one-hot.

    Equal to masking every earlier key with minus infinity before the softmax.
    """

    name: str = "block_aggregation"

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        own = torch.nn.functional.one_hot(at.positions, x.shape[-1]).to(x)
        return own[:, None, :].expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class OfSource(Edit):
    """Apply another edit to the source's activation and transplant the result."""

    name: str = "of_source"
    edit: Edit = field(default_factory=lambda: Constant())
    """The edit that is applied to the source run's activation."""
    background: tuple[int, ...] | None = None
    """Units that the inner edit applies to while all units are transplanted; ``None``: all of them."""

    @property
    def reads(self) -> tuple[HookSite, ...]:
        return self.edit.reads

    @property
    def uses_source(self) -> bool:
        return True

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        source = need(source, self)
        at = replace(at, live=at.source_live)
        if self.background is None:
            return self.edit(source, source, at)
        units = torch.tensor(self.background, device=source.device)
        inner = source[:, units]
        out = source.clone()
        out[:, units] = self.edit(inner, inner, replace(at, units=units.expand(len(source), -1)))
        return out


def random_orthonormal(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "d rank"]:
    """Orthonormal columns of a Gaussian matrix: a uniformly random subspace of R^d, on the CPU, in float32."""
    return torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q


def rotate_rows(rows: Float[Tensor, "neuron d_model"], generator: torch.Generator) -> Float[Tensor, "neuron d_model"]:
    """``rows`` after one random rotation of R^d: norms and mutual angles kept, sparsity gone."""
    d = rows.shape[-1]
    return (rows.detach().cpu().float() @ random_orthonormal(d, d, generator)).to(rows)


def random_permutations(n: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """``n`` independent random permutations of ``size`` entries."""
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(n)])
