"""Hook sites: where in a block something is read or edited, with the names of the axes there.

A site is a hook-point name template, such as ``blocks.{layer}.attn.hook_z``, and the axis names of the
activation that passes through it. Code asks for an axis by its name and never counts positions in a shape, so an
edit cannot mistake a key/value head for a query head. The names are TransformerLens's classic ones; they resolve on
``HookedTransformer`` and on ``TransformerBridge`` alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sinklens.records.registry import enter

POSITION_AXES = ("pos", "query")
"""Axis names that run over token positions at which an edit can be placed."""

UNIT_AXES = ("head", "kv_head", "d_mlp", "d_model")
"""Axis names that a patch can select units along, in the order in which they are preferred."""


@dataclass(frozen=True)
class HookSite:
    """A place in every block that activations can be read from and written to."""

    template: str
    """Hook-point name with ``{layer}`` where the block index goes."""
    axes: tuple[str, ...]
    """Axis names of the activation, in order; the first is ``batch``."""

    def at(self, layer: int) -> str:
        """The hook-point name in block ``layer``."""
        return self.template.format(layer=layer)

    @property
    def pos_axis(self) -> int:
        """Index of the axis over positions (``pos``; ``query`` for attention scores and patterns)."""
        return next(i for i, axis in enumerate(self.axes) if axis in POSITION_AXES)

    @property
    def unit_axis(self) -> int | None:
        """Index of the axis over units (heads, else neurons or dimensions); ``None`` when the site has none."""
        return next((self.axes.index(name) for name in UNIT_AXES if name in self.axes), None)

    @property
    def unit_name(self) -> str | None:
        """Name of the axis over units."""
        return None if self.unit_axis is None else self.axes[self.unit_axis]

    def to_canonical(self, act: Tensor) -> Tensor:
        """A view of ``act`` as ``[batch, pos, unit, ...]`` (``[batch, pos, ...]`` where the site has no units)."""
        if self.unit_axis is None:
            return act.movedim(self.pos_axis, 1)
        return act.movedim((self.pos_axis, self.unit_axis), (1, 2))

    def from_canonical(self, act: Tensor) -> Tensor:
        """The inverse of :meth:`to_canonical`."""
        if self.unit_axis is None:
            return act.movedim(1, self.pos_axis)
        return act.movedim((1, 2), (self.pos_axis, self.unit_axis))


RESID_PRE = HookSite("blocks.{layer}.hook_resid_pre", ("batch", "pos", "d_model"))
RESID_MID = HookSite("blocks.{layer}.hook_resid_mid", ("batch", "pos", "d_model"))
RESID_POST = HookSite("blocks.{layer}.hook_resid_post", ("batch", "pos", "d_model"))
ATTN_OUT = HookSite("blocks.{layer}.hook_attn_out", ("batch", "pos", "d_model"))
MLP_OUT = HookSite("blocks.{layer}.hook_mlp_out", ("batch", "pos", "d_model"))
LN1_NORMALIZED = HookSite("blocks.{layer}.ln1.hook_normalized", ("batch", "pos", "d_model"))
LN2_NORMALIZED = HookSite("blocks.{layer}.ln2.hook_normalized", ("batch", "pos", "d_model"))
Q = HookSite("blocks.{layer}.attn.hook_q", ("batch", "pos", "head", "d_head"))
K = HookSite("blocks.{layer}.attn.hook_k", ("batch", "pos", "kv_head", "d_head"))
ROT_Q = HookSite("blocks.{layer}.attn.hook_rot_q", Q.axes)
ROT_K = HookSite("blocks.{layer}.attn.hook_rot_k", K.axes)
V = HookSite("blocks.{layer}.attn.hook_v", ("batch", "pos", "kv_head", "d_head"))
PATTERN = HookSite("blocks.{layer}.attn.hook_pattern", ("batch", "head", "query", "key"))
Z = HookSite("blocks.{layer}.attn.hook_z", ("batch", "pos", "head", "d_head"))
MLP_POST = HookSite("blocks.{layer}.mlp.hook_post", ("batch", "pos", "d_mlp"))
LOGITS = HookSite("logits", ("batch", "pos", "d_vocab"))
"""Not a hook point: the model's output. A readout there makes the engine run to the end."""


SITES: dict[str, HookSite] = {
    "resid_pre": RESID_PRE,
    "resid_mid": RESID_MID,
    "resid_post": RESID_POST,
    "attn_out": ATTN_OUT,
    "mlp_out": MLP_OUT,
    "ln1_normalized": LN1_NORMALIZED,
    "q": Q,
    "k": K,
    "v": V,
    "pattern": PATTERN,
    "z": Z,
    "mlp_post": MLP_POST,
}
"""Sites by short name."""
KIND = "a site"
"""What the registry calls them."""

UNIT_KINDS = {"heads": ("head", "kv_head"), "neurons": ("d_mlp",), "dims": ("d_model",)}
"""What units are called, and the axes that they are along."""


def register_site(name: str, site: HookSite) -> HookSite:
    """Make a site known by a short name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
    return enter(SITES, KIND, name, site)


def site_name(site: HookSite) -> str:
    """Short name of a site; its template where it has none."""
    return next((name for name, known in SITES.items() if known == site), site.template)


class UnitSizes(Protocol):
    """Sizes of a model's unit axes, as :class:`sinklens.models.ModelShape` has them."""

    @property
    def n_heads(self) -> int: ...  # noqa: D102
    @property
    def n_kv_heads(self) -> int: ...  # noqa: D102
    @property
    def d_mlp(self) -> int: ...  # noqa: D102
    @property
    def d_model(self) -> int: ...  # noqa: D102


def unit_count(site: HookSite, shape: UnitSizes) -> int | None:
    """How many units a site has in a model of this shape; ``None`` where it has no units."""
    sizes = {"head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_mlp": shape.d_mlp, "d_model": shape.d_model}
    return None if site.unit_name is None else sizes[site.unit_name]
