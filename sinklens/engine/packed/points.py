"""Edits and readouts on packed activations, ``[token, unit, ...]``; attention rows are ``[token, head, key]``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.edits import Edit, EditSite
from sinklens.engine.hooks import has_moved
from sinklens.engine.packed.layout import Layout
from sinklens.errors import EngineError
from sinklens.readouts.base import PositionReadout, Readout, Rows, Tokens
from sinklens.sites import LOGITS, RESID_POST, HookSite

SCORES, PATTERN = "blocks.{layer}.attn.hook_attn_scores", "blocks.{layer}.attn.hook_pattern"
SITES = (
    "blocks.{layer}.hook_resid_pre",
    "blocks.{layer}.ln1.hook_normalized",
    "blocks.{layer}.attn.hook_q",
    "blocks.{layer}.attn.hook_k",
    "blocks.{layer}.attn.hook_v",
    "blocks.{layer}.attn.hook_rot_q",
    "blocks.{layer}.attn.hook_rot_k",
    SCORES,
    PATTERN,
    "blocks.{layer}.attn.hook_z",
    "blocks.{layer}.hook_attn_out",
    "blocks.{layer}.hook_resid_mid",
    "blocks.{layer}.ln2.hook_normalized",
    "blocks.{layer}.mlp.hook_pre",
    "blocks.{layer}.mlp.hook_pre_linear",
    "blocks.{layer}.mlp.hook_post",
    "blocks.{layer}.hook_mlp_out",
    "blocks.{layer}.hook_resid_post",
)
"""Hook points that the packed pass has, in the order in which a block comes to them."""


def is_known(site: HookSite) -> bool:
    """Whether the packed pass can edit and read ``site``."""
    if site == LOGITS:
        return True
    axes = ("batch", "head", "query", "key") if site.template in (SCORES, PATTERN) else None
    if axes is not None:
        return site.axes == axes
    return site.template in SITES and site.pos_axis == 1 and site.unit_axis in (2, None)


@dataclass(frozen=True, eq=False)
class PackedOp:
    """One edit in one block, at packed tokens."""

    site: HookSite
    """Where."""
    layer: int
    """Block."""
    edit: Edit
    """What."""
    tokens: Int[Tensor, " pair"]
    """Packed index of every place."""
    prompts: Int[Tensor, " pair"]
    """Its prompt."""
    positions: Int[Tensor, " pair"]
    """Its position."""
    units: Int[Tensor, "pair unit"] | None = None
    """Units that are edited."""
    owners: Int[Tensor, " pair"] | None = None
    """Patch of every place, for the check that it changed something; None for root edits."""
    source_run: str | None = None
    """Run that the source activation comes from."""
    source_positions: Int[Tensor, " pair"] | None = None
    """Positions in that run."""

    def on(self, device: torch.device) -> PackedOp:
        """The same with its indices on ``device``; the owners stay where they are counted."""
        if self.tokens.device == device:
            return self
        names = ("tokens", "prompts", "positions", "units", "source_positions")
        return replace(self, **{name: value.to(device) for name in names if (value := getattr(self, name)) is not None})


@dataclass(eq=False)
class _Point:
    ops: list[PackedOp] = field(default_factory=list)
    reads: list[PackedOp] = field(default_factory=list)
    readouts: list[Readout] = field(default_factory=list)


SourceOf = Callable[[PackedOp, HookSite], Tensor]
"""``(edit, site) -> [pair, unit, ...]``: the source run's activation at the edit's source places."""
Captured = Callable[[HookSite, int], Tensor]
"""``(site, block) -> [context, pos, unit, ...]``: the unpatched runs' activations."""


class Points:
    """All that a pass does besides the model's own computation."""

    def __init__(
        self,
        layout: Layout,
        ops: Sequence[PackedOp],
        readouts: Sequence[tuple[Readout, int]],
        *,
        captured: Captured,
        source_of: SourceOf,
        changed: Int[Tensor, " patch"],
        n_layers: int,
    ) -> None:
        self.layout, self.captured, self.source_of, self.changed = layout, captured, source_of, changed
        self.n_layers = n_layers
        self.readings: dict[tuple[str, int], Tensor] = {}
        self._live: dict[tuple[int, str], Tensor] = {}
        self._at: dict[tuple[str, int], _Point] = defaultdict(_Point)
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for op in ops:
            for site in op.edit.reads:
                if SITES.index(site.template) >= SITES.index(op.site.template):
                    raise EngineError(
                        f"the edit {op.edit.name!r} at {op.site.at(op.layer)} reads {site.at(op.layer)}, which the "
                        "model has not computed by then: edits can only read earlier sites of the same block"
                    )
                self._at[site.template, op.layer].reads.append(op)
            self._at[op.site.template, op.layer].ops.append(op)
        for readout, layer in readouts:
            self._at[readout.site.template, layer].readouts.append(readout)

    def asked(self, template: str, layer: int) -> bool:
        """Whether anything happens there."""
        return (template, layer) in self._at

    def edited(self, template: str, layer: int) -> bool:
        """Whether something is written there."""
        return self.asked(template, layer) and bool(self._at[template, layer].ops)

    def last(self, layer: int) -> int:
        """Index in :data:`SITES` of the last point of a block at which anything happens, -1 without any."""
        return max((i for i, name in enumerate(SITES) if self.asked(name, layer)), default=-1)

    def visit(self, template: str, layer: int, act: Tensor) -> Tensor:
        """Edit ``act`` in place (it must be the pass's own), then read it."""
        if not self.asked(template, layer):
            return act
        point = self._at[template, layer]
        self.layout = self.layout.on(act.device)
        for op in point.ops:
            self._edit(act, op)
        for op in point.reads:
            self._live[id(op), template] = act[op.tokens.to(act.device)]
        for readout in point.readouts:
            self.readings[readout.name, layer] = self._read(readout, layer, act)
        return act

    def logits(self, x: Float[Tensor, "token d_model"], unembed: Callable[[Tensor], Tensor]) -> None:
        """Read the logits; only tokens that count are unembedded."""
        self.layout = self.layout.on(x.device)
        for readout in self._at[LOGITS.template, self.n_layers].readouts:
            if isinstance(readout, PositionReadout):
                read = self._sum(readout, self.n_layers, lambda chosen: unembed(x if chosen is None else x[chosen]))
            else:
                full = self._whole(RESID_POST, self.n_layers - 1, x)
                logits = unembed(full.flatten(0, 1)).view(*full.shape[:2], -1)
                read = readout.reduce(logits, Rows(self.layout.prompts[: len(full)], self.n_layers))
            self.readings[readout.name, self.n_layers] = read

    def _edit(self, act: Tensor, op: PackedOp) -> None:
        here = op.on(act.device)
        index = (here.tokens,) if here.units is None else (here.tokens[:, None], here.units)
        old = act[index]
        reads = {site.template: self._live[id(op), site.template] for site in op.edit.reads}
        source, source_reads = None, {}
        if op.edit.uses_source:
            source = self.source_of(here, op.site)
            source_reads = {site.template: self.source_of(here, site) for site in op.edit.reads}
        at = EditSite(op.layer, here.prompts, here.positions, here.units, reads, source_reads)
        new = op.edit(old, source, at)
        if new.shape != old.shape:
            raise EngineError(f"the edit {op.edit.name!r} returned shape {tuple(new.shape)} for {tuple(old.shape)}")
        new = new.to(old.dtype)
        if op.owners is not None:
            moved = has_moved(old, new)
            self.changed.index_add_(0, op.owners, moved.to(self.changed))
        act[index] = new

    def _read(self, readout: Readout, layer: int, act: Tensor) -> Tensor:
        if isinstance(readout, PositionReadout):
            return self._sum(readout, layer, lambda chosen: act if chosen is None else act[chosen])
        full = self._whole(readout.site, layer, act)
        return readout.reduce(readout.site.from_canonical(full), Rows(self.layout.prompts[: len(full)], layer))

    def _whole(self, site: HookSite, layer: int, act: Tensor) -> Float[Tensor, "row pos *unit"]:
        """The activation at all positions: the unpatched run's, with the packed tokens in their places."""
        n = self.layout.n_rows(layer)
        full = self.captured(site, layer)[self.layout.contexts[:n]]
        full[self.layout.row[: len(act)], self.layout.position[: len(act)]] = act
        return full

    def _sum(self, readout: PositionReadout, layer: int, take: Callable[[Tensor | None], Tensor]) -> Tensor:
        """The readout's sum over the packed positions of every row that is under way."""
        layout, n_rows, n_tokens = self.layout, self.layout.n_rows(layer), self.layout.n_tokens(layer)
        chosen, weight = self._weighted(readout)
        if n_tokens < len(layout.row):
            under_way = chosen < n_tokens
            chosen, weight = chosen[under_way], weight[under_way]
        every = len(chosen) == n_tokens
        act = take(None if every else chosen)
        found = readout.at(act, Tokens(layout.prompt[chosen], layout.position[chosen], layer))
        found = found.float() * weight.view(-1, *[1] * (found.ndim - 1))
        counts = torch.bincount(layout.row[chosen], minlength=n_rows)
        # Not index_add_: on a GPU its order of summation differs from run to run.
        flat = found.reshape(len(found), found.shape[1:].numel())  # of no tokens, too
        return torch.segment_reduce(flat, "sum", lengths=counts, unsafe=True, initial=0).view(n_rows, *found.shape[1:])

    def _weighted(self, readout: PositionReadout) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
        """The packed tokens that count, and their weights."""
        if readout.name not in self._chosen:
            weights = readout.weigh(self.layout.length).to(self.layout.device)
            mine = weights[self.layout.prompt, self.layout.position]
            chosen = mine.nonzero().flatten()
            self._chosen[readout.name] = (chosen, mine[chosen])
        chosen, weight = self._chosen[readout.name]
        return chosen.to(self.layout.device), weight.to(self.layout.device)


def reach(readouts: Sequence[Readout], n_prompts: int, length: int) -> Int[Tensor, " prompt"]:
    """One past the last position of every prompt that any readout looks at: what lies behind cannot matter."""
    counts: Bool[Tensor, "prompt pos"] = torch.zeros(n_prompts, length, dtype=torch.bool)
    for readout in readouts:
        if not isinstance(readout, PositionReadout):
            return torch.full((n_prompts,), length)
        counts |= readout.weigh(length).cpu() != 0
    places = torch.arange(1, length + 1)
    return (counts * places).amax(-1)
