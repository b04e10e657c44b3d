"""Edits and readouts on packed activations, ``[token, unit, ...]``; attention rows are ``[token, head, key]``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.engine.apply import Op, SourceOf, apply_edit, not_computed
from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.queries import Piece
from sinklens.engine.trust import read
from sinklens.readouts.base import PositionReadout, Readout, Rows, Tokens
from sinklens.sites import LOGITS, RESID_POST, HookSite, K

SCORES, PATTERN = "blocks.{layer}.attn.hook_attn_scores", "blocks.{layer}.attn.hook_pattern"
KEYS = HookSite("blocks.{layer}.attn.keys", K.axes)
"""The keys as attention uses them: no hook point of a model, and the same place in all of them."""
SITES = (
    "blocks.{layer}.hook_resid_pre",
    "blocks.{layer}.ln1.hook_normalized",
    "blocks.{layer}.attn.hook_q",
    "blocks.{layer}.attn.hook_k",
    "blocks.{layer}.attn.hook_v",
    "blocks.{layer}.attn.hook_rot_q",
    "blocks.{layer}.attn.hook_rot_k",
    KEYS.template,
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
"""Hook points that the packed pass has (and :data:`KEYS`), in the order in which a block comes to them."""


def is_known(site: HookSite) -> bool:
    """Whether the packed pass can edit and read ``site``."""
    if site == LOGITS:
        return True
    axes = ("batch", "head", "query", "key") if site.template in (SCORES, PATTERN) else None
    if axes is not None:
        return site.axes == axes
    return site.template in SITES and site.pos_axis == 1 and site.unit_axis in (2, None)


def wants_whole_pattern(readout: Readout) -> bool:
    """Whether a readout is given the scores or the pattern of whole prompts at once."""
    return readout.site.template in (SCORES, PATTERN) and not isinstance(readout, PositionReadout)


@dataclass(eq=False)
class Point:
    """What happens at one hook point of one block."""

    ops: list[Op] = field(default_factory=list)
    """Edits, in their order."""
    reads: list[tuple[Op, str]] = field(default_factory=list)
    """Edits that read here, and what they call it."""
    readouts: list[Readout] = field(default_factory=list)
    """Readouts."""
    capture: Callable[[Tensor], None] | None = None
    """Given the edited activation of all positions, as its site lays it out; copies what it keeps."""


Captured = Callable[[HookSite, int], Tensor]
"""``(site, block) -> [context, pos, unit, ...]``: the unpatched runs' activations."""


class Points:
    """All that a pass does besides the model's own computation."""

    def __init__(
        self,
        layout: Layout,
        ops: Sequence[Op],
        readouts: Sequence[tuple[Readout, int]],
        *,
        captured: Captured,
        source_of: SourceOf | None,
        changed: Int[Tensor, " patch"] | None,
        n_layers: int,
        captures: Mapping[tuple[HookSite, int], Callable[[Tensor], None]] | None = None,
        broken: Int[Tensor, " patch"] | None = None,
    ) -> None:
        self.layout, self.captured, self.source_of, self.changed = layout, captured, source_of, changed
        self.n_layers, self.broken = n_layers, broken
        self.readings: dict[tuple[str, int], Tensor] = {}
        self._live: dict[tuple[int, str], tuple[Bool[Tensor, " pair"] | None, Tensor]] = {}
        self._at: dict[tuple[str, int], Point] = defaultdict(Point)
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._queries: dict[tuple, Tensor] = {}
        self._terms: dict[tuple[str, int], list[list[Tensor]]] = defaultdict(list)
        for op in ops:
            for place in op.edit.reads_in(op.layer):
                if (place.layer, SITES.index(place.site.template)) >= (op.layer, SITES.index(op.site.template)):
                    raise not_computed(op, place.site.at(place.layer))
                self._at[place.site.template, place.layer].reads.append((op, place.key))
            self._at[op.site.template, op.layer].ops.append(op)
        for readout, layer in readouts:
            self._at[readout.site.template, layer].readouts.append(readout)
        for (site, layer), capture in (captures or {}).items():
            self._at[site.template, layer].capture = partial(self._capture, site, capture)

    def asked(self, template: str, layer: int) -> bool:
        """Whether anything happens there."""
        return (template, layer) in self._at

    def queries(self, layer: int, q: Float[Tensor, "token head d_head"]) -> Int[Tensor, " token"] | None:
        """Packed tokens, in order, whose scores or pattern anything looks at; None where somebody wants all at once."""
        self.layout = self.layout.on(q.device)
        points = [self._at[name, layer] for name in (SCORES, PATTERN) if self.asked(name, layer)]
        readouts = [readout for point in points for readout in point.readouts]
        captured = any(point.capture is not None or point.reads for point in points)
        if captured or any(map(wants_whole_pattern, readouts)):
            return None
        ops = [op for point in points for op in point.ops]
        key = (tuple(map(id, ops)), tuple(readout.name for readout in readouts), len(q), q.device)
        if key not in self._queries:
            looked_at = torch.zeros(len(q), dtype=torch.bool, device=q.device)
            for readout in readouts:
                assert isinstance(readout, PositionReadout)
                looked_at[self._under_way(readout, layer)[0]] = True
            for op in ops:
                looked_at[op.on(looked_at.device).address[0]] = True
            self._queries[key] = looked_at.nonzero().flatten()
        return self._queries[key]

    def edits_attention(self, layer: int) -> bool:
        """Whether scores or pattern of a block are edited."""
        return any(self.asked(name, layer) and self._at[name, layer].ops for name in (SCORES, PATTERN))

    def visit_queries(self, template: str, layer: int, act: Float[Tensor, "token head key"], piece: Piece) -> Tensor:
        """:meth:`visit` of some of the queries that anything looks at; pieces come in order."""
        if not self.asked(template, layer):
            return act
        point = self._at[template, layer]
        self.layout = self.layout.on(act.device)
        for op in point.ops:
            live, op = self._reads(op), op.on(act.device)
            where, mine = _inside(op.address[0], piece.tokens)
            if not piece.whole:
                live = {key: read[mine] for key, read in live.items()}
                where, op = where[mine], op.only(mine, where[mine])
            apply_edit(act, replace(op, address=(where,)), live, self.source_of, self.changed, self.broken)
        for i, readout in enumerate(point.readouts):
            assert isinstance(readout, PositionReadout)
            chosen, weight = self._under_way(readout, layer)
            where, mine = _inside(chosen, piece.tokens)
            if not piece.whole:
                chosen, weight, where = chosen[mine], weight[mine], where[mine]
            terms = self._terms[template, layer]
            if len(terms) <= i:
                terms.append([])
            terms[i].append(self._weighted_terms(readout, layer, act[where], chosen, weight))
            if piece.last:
                whole = torch.cat(terms[i])
                self.readings[readout.name, layer] = self._row_sums(whole, self._under_way(readout, layer)[0], layer)
        return act

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
            apply_edit(act, op, self._reads(op), self.source_of, self.changed, self.broken)
        for op, key in point.reads:
            (tokens,) = op.on(act.device).address
            if op.layer == layer or len(act) == len(self.layout.row):  # all rows are under way
                self._live[id(op), key] = (None, act[tokens])
            else:
                here = tokens < len(act)  # rows that come in later have this from their run
                self._live[id(op), key] = (here, act[tokens[here]])
        if point.capture is not None:
            point.capture(act)
        for readout in point.readouts:
            self.readings[readout.name, layer] = self._read(readout, layer, act)
        return act

    def _capture(self, site: HookSite, keep: Callable[[Tensor], None], act: Tensor) -> None:
        keep(site.from_canonical(act.view(-1, self.layout.length, *act.shape[1:])))

    def logits(self, x: Float[Tensor, "token d_model"], unembed: Callable[[Tensor], Tensor]) -> None:
        """Read the logits; only tokens that count are unembedded."""
        self.layout = self.layout.on(x.device)
        for readout in self._at[LOGITS.template, self.n_layers].readouts:
            if isinstance(readout, PositionReadout):
                value = self._sum(readout, self.n_layers, lambda chosen: unembed(x if chosen is None else x[chosen]))
            else:
                full = self._whole(RESID_POST, self.n_layers - 1, x)
                logits = unembed(full.flatten(0, 1)).view(*full.shape[:2], -1)
                value = self._reduced(readout, self.n_layers, logits)
            self.readings[readout.name, self.n_layers] = value

    def _reads(self, op: Op) -> dict[str, Tensor]:
        """What the edit reads: as this pass has computed it, and the run's own for rows that were not under way yet."""
        live = {}
        for place in op.edit.reads_in(op.layer):
            if (id(op), place.key) not in self._live:  # the pass begins behind it
                live[place.key] = self._of_run(op, place.site, place.layer)
                continue
            here, act = self._live[id(op), place.key]
            if here is not None:
                of_run = self._of_run(op, place.site, place.layer).to(act.device)
                of_run[here], act = act, of_run
            live[place.key] = act
        return live

    def _of_run(self, op: Op, site: HookSite, layer: int) -> Tensor:
        """The unpatched run's activation at the op's places."""
        (tokens,), held = op.address, self.captured(site, layer)
        contexts = self.layout.contexts[self.layout.row[tokens.to(self.layout.device)]]
        return held[contexts.to(held.device), op.positions.to(held.device)]

    def _read(self, readout: Readout, layer: int, act: Tensor) -> Tensor:
        if isinstance(readout, PositionReadout):
            return self._sum(readout, layer, lambda chosen: act if chosen is None else act[chosen])
        full = self._whole(readout.site, layer, act)
        return self._reduced(readout, layer, readout.site.from_canonical(full))

    def _reduced(self, readout: Readout, layer: int, full: Tensor) -> Tensor:
        prompts = self.layout.prompts[: len(full)]
        value = read(readout, layer, full, lambda act, rows: readout.reduce(act, Rows(prompts[rows], layer)))
        # A view of the activation would change with it.
        return value.clone() if value.untyped_storage().data_ptr() == full.untyped_storage().data_ptr() else value

    def _whole(self, site: HookSite, layer: int, act: Tensor) -> Float[Tensor, "row pos *unit"]:
        """The activation at all positions: the unpatched run's, with the packed tokens in their places."""
        n = self.layout.n_rows(layer)
        if not self.layout.padded:
            return act.view(n, self.layout.length, *act.shape[1:])
        full = self.captured(site, layer)[self.layout.contexts[:n]]
        full[self.layout.row[: len(act)], self.layout.position[: len(act)]] = act
        return full

    def _sum(self, readout: PositionReadout, layer: int, take: Callable[[Tensor | None], Tensor]) -> Tensor:
        """The readout's sum over the packed positions of every row that is under way."""
        chosen, weight = self._under_way(readout, layer)
        act = take(None if len(chosen) == self.layout.n_tokens(layer) else chosen)
        return self._row_sums(self._weighted_terms(readout, layer, act, chosen, weight), chosen, layer)

    def _weighted_terms(
        self, readout: PositionReadout, layer: int, act: Tensor, chosen: Tensor, weight: Tensor
    ) -> Tensor:
        """The readout's terms at some packed tokens, ``[token, ...]``."""
        prompt, position = self.layout.prompt[chosen], self.layout.position[chosen]
        found = read(
            readout, layer, act, lambda act, some: readout.at(act, Tokens(prompt[some], position[some], layer))
        )
        return found.float() * weight.view(-1, *[1] * (found.ndim - 1))

    def _row_sums(self, terms: Float[Tensor, "token *rest"], tokens: Tensor, layer: int) -> Float[Tensor, "row *rest"]:
        n_rows = self.layout.n_rows(layer)
        counts = torch.bincount(self.layout.row[tokens], minlength=n_rows)
        # Not index_add_: on a GPU its order of summation differs from run to run.
        flat = terms.reshape(len(terms), terms.shape[1:].numel())  # of no tokens, too
        return torch.segment_reduce(flat, "sum", lengths=counts, unsafe=True, initial=0).view(n_rows, *terms.shape[1:])

    def _under_way(self, readout: PositionReadout, layer: int) -> tuple[Tensor, Tensor]:
        """The packed tokens of rows under way that count, in order, and their weights."""
        chosen, weight = self._weighted(readout)
        if (n_tokens := self.layout.n_tokens(layer)) < len(self.layout.row):
            under_way = chosen < n_tokens
            chosen, weight = chosen[under_way], weight[under_way]
        return chosen, weight

    def _weighted(self, readout: PositionReadout) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
        """The packed tokens that count, and their weights."""
        if readout.name not in self._chosen:
            weights = readout.weigh(self.layout.length).to(self.layout.device)
            mine = weights[self.layout.prompt, self.layout.position]
            chosen = mine.nonzero().flatten()
            self._chosen[readout.name] = (chosen, mine[chosen])
        chosen, weight = self._chosen[readout.name]
        return chosen.to(self.layout.device), weight.to(self.layout.device)


def _inside(
    places: Int[Tensor, " place"], tokens: Int[Tensor, " token"]
) -> tuple[Int[Tensor, " place"], Bool[Tensor, " place"]]:
    """Where each place lies among some tokens, which are in order, and whether it does."""
    where = torch.searchsorted(tokens, places.contiguous()).clamp(max=len(tokens) - 1)
    return where, tokens[where] == places


def reach(readouts: Sequence[Readout], n_prompts: int, length: int) -> Int[Tensor, " prompt"]:
    """One past the last position of every prompt that any readout looks at: what lies behind cannot matter."""
    counts: Bool[Tensor, "prompt pos"] = torch.zeros(n_prompts, length, dtype=torch.bool)
    for readout in readouts:
        if not isinstance(readout, PositionReadout):
            return torch.full((n_prompts,), length)
        counts |= readout.weigh(length).cpu() != 0
    places = torch.arange(1, length + 1)
    return (counts * places).amax(-1)
