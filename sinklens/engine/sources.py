"""Runs whose root patches take from other runs: what they take is captured first, and brought along by the edit.

A run with the root ``Patch(RESID_PRE, (3,), (5,), Transplant(), source=Source("base"), run="mixed")`` is defined by
what another run has there. Before anything is run, :func:`resolved` puts the runs in the order in which they take from
each other, captures each source at the positions that are used, and hands on roots that need no source any more: an
:class:`OfRun` with the values. All that runs (the packed pass, TransformerLens, gradients) sees those alone.

Pitfall: the values are of one model and one list of prompts. Where either changes they are captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sinklens.edits import Edit, EditSite
from sinklens.edits.base import Gathered, Table, WrappingEdit, units_of_each
from sinklens.engine.places import NOWHERE, group_of
from sinklens.engine.store import ActivationStore, Want
from sinklens.errors import InputError
from sinklens.patches import Patch, Runs, Source
from sinklens.sites import HookSite

Capture = Callable[[Runs, Sequence[Want]], ActivationStore]
"""``(runs, what is wanted of them) -> captured``; these runs take from none."""


@dataclass(frozen=True, eq=False)
class OfRun(WrappingEdit):
    """Another edit, which brings along what it takes from a source run."""

    edit: Edit
    """The edit."""
    site: HookSite
    """Where it is applied."""
    values: Mapping[int, Float[Tensor, "prompt place unit *rest"]]
    """Per block, the source run's activation at the source position of every place."""
    places: Int[Tensor, "prompt pos"]
    """Which place a position is; where it is none, one that is not there."""
    reads_of_source: Mapping[int, Mapping[str, tuple[HookSite, Tensor]]] = field(default_factory=dict)
    """Per block, what :attr:`reads` are in the source run: where, and ``[prompt, place, unit, ...]``."""

    @property
    @override
    def inner(self) -> Edit:
        return self.edit

    @property
    @override
    def uses_source(self) -> bool:
        return False

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.values, ("prompt", "place")), *self.edit.tables)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        found = self.reads_of_source.get(at.layer, {})
        live = {key: self._of(act, at, site == self.site).to(x.device) for key, (site, act) in found.items()}
        own = self._of(self.values[at.layer], at, True)
        return self.edit(x, own.to(x), replace(at, source_live=live))

    def _of(self, act: Float[Tensor, "prompt place unit *rest"], at: EditSite, selected: bool) -> Gathered:
        """Every pair's own; of its selected units where they are the units of this activation."""
        there, prompts = act.device, at.prompts.to(act.device)
        own = act[prompts, self.places.to(there)[prompts, at.positions.to(there)]]
        if not selected or at.units is None:
            return own
        return units_of_each(own, replace(at, units=at.units.to(there)))


def parts_of_roots(roots: Sequence[Patch]) -> Iterator[tuple[Patch, Source | None]]:
    """All parts of root patches, with the source that each takes from."""
    for part in (part for root in roots for part in root.parts):
        yield part, part.source if part.edit.uses_source else None


def check_sources(runs: Runs) -> None:
    """Make sure of what root patches take from other runs.

    Raises:
        InputError: an edit that takes from a run, and none is named; a run that is not there; runs in a circle.
    """
    for name, roots in runs.items():
        for part, _ in parts_of_roots(roots):
            if part.source is None and part.edit.uses_source:
                raise InputError(
                    f"a root patch of the run {name!r} takes from another run, but none is named: give it "
                    f"source=Source(...): {part.describe()}"
                )
            if part.source is not None and part.source.run not in runs:
                raise InputError(
                    f"unknown run {part.source.run!r} in a root patch of the run {name!r}; the runs are {sorted(runs)}"
                )
    ordered(runs)


def ordered(runs: Runs) -> list[str]:
    """The runs, each behind those that its root patches take from.

    Raises:
        InputError: runs that take from each other in a circle.
    """
    found: dict[str, None] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " takes from ".join(map(repr, (*above[above.index(name) :], name)))
            raise InputError(f"runs cannot take from each other in a circle: {circle}")
        if name not in found:
            for _, source in parts_of_roots(runs[name]):
                if source is not None:
                    add(source.run, (*above, name))
            found[name] = None

    for name in runs:
        add(name, ())
    return list(found)


def resolved(runs: Runs, n_prompts: int, capture: Capture) -> tuple[Runs, int]:
    """The same runs with roots that take from none (the very same where none does), and the forward passes it took.

    Args:
        runs: the runs.
        n_prompts: how many prompts there are.
        capture: captures what is needed of the runs that are taken from.

    Raises:
        InputError: as :func:`check_sources` does; non-finite activations of a source run.
    """
    check_sources(runs)
    wants: dict[str, list[Want]] = {}
    for roots in runs.values():
        for part, source in parts_of_roots(roots):
            if source is not None:
                wants.setdefault(source.run, []).extend(_wants(part, source, n_prompts))
    if not wants:
        return runs, 0
    stores: dict[str, ActivationStore] = {}
    found: dict[str, tuple[Patch, ...]] = {}
    for name in ordered(runs):
        found[name] = tuple(_with_values(root, stores, n_prompts) for root in runs[name])
        if name in wants:
            stores[name] = capture({name: found[name]}, wants[name])
    return {name: found[name] for name in runs}, sum(store.n_forwards for store in stores.values())


def _wants(part: Patch, source: Source, n_prompts: int) -> list[Want]:
    used = tuple(sorted({p for prompt in range(n_prompts) for p in part.source_where.at(prompt)}))
    return [Want(source.run, site, layer, used) for site, layer in _places(part)]


def _places(part: Patch) -> list[tuple[HookSite, int]]:
    """Where the source run's activations are needed."""
    read = [(place.site, place.layer) for layer in part.layers for place in part.edit.reads_in(layer)]
    return [*((part.site, layer) for layer in part.layers), *read]


def _with_values(root: Patch, stores: Mapping[str, ActivationStore], n_prompts: int) -> Patch:
    first, *rest = [
        part if source is None else _of_run(part, source.run, stores[source.run], n_prompts)
        for part, source in parts_of_roots([root])
    ]
    return replace(first, also=tuple(rest))


def _of_run(part: Patch, run: str, store: ActivationStore, n_prompts: int) -> Patch:
    group = group_of(part)
    positions = group.positions[0].expand(n_prompts, -1)
    sources = group.source_positions[0].expand(n_prompts, -1)
    sources = torch.where(sources == NOWHERE, sources[:, :1], sources)  # there are no such places: any will do
    n_places = positions.shape[1]
    places = torch.full((n_prompts, store.length), n_places, device="cpu")
    row, place = (positions != NOWHERE).nonzero(as_tuple=True)
    places[row, positions[row, place]] = place
    prompts = torch.arange(n_prompts, device="cpu").repeat_interleave(n_places)

    def taken(site: HookSite, layer: int) -> Tensor:
        there = store.tensor(run, site, layer).device
        act = store.gather(run, site, layer, prompts.to(there), sources.flatten().to(there))
        return act.view(n_prompts, n_places, *act.shape[1:])

    values = {layer: taken(part.site, layer) for layer in part.layers}
    read = {
        layer: {place.key: (place.site, taken(place.site, place.layer)) for place in part.edit.reads_in(layer)}
        for layer in part.layers
    }
    device = next(iter(values.values())).device
    edit = OfRun(part.edit.name, part.edit, part.site, values, places.to(device), read)
    return replace(part, edit=edit, source=None, label=part.describe())
