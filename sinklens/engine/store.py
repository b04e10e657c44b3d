"""What was captured of runs: activations at some places, and readings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.apply import gather
from sinklens.errors import EngineError
from sinklens.sites import HookSite


@dataclass(frozen=True)
class Want:
    """An activation to keep from a run."""

    run: str
    """Run name."""
    site: HookSite
    """Where."""
    layer: int
    """Block."""
    positions: tuple[int, ...] | None = None
    """Positions to keep, for every prompt; ``None``: all."""

    @property
    def key(self) -> tuple[str, HookSite, int]:
        """Which activation, wherever."""
        return self.run, self.site, self.layer


@dataclass(eq=False)
class ActivationStore:
    """Activations and readings of runs, on the model's device."""

    length: int
    """Tokens in a prompt."""
    kept: dict[tuple[str, HookSite, int], tuple[int, ...] | None] = field(default_factory=dict)
    """Positions kept of each activation."""
    parts: dict[tuple[str, HookSite, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Activations ``[prompt, kept pos, unit, ...]``, in batches of prompts."""
    readings: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """``(run, readout, block) -> [prompt, ...]``."""
    before: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """The same of readouts over positions, ``[prompt, pos + 1, ...]``: the sum over all positions before each."""
    n_forwards: int = 0
    """Forward passes that this took."""
    _lookups: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, run: str, site: HookSite, layer: int) -> Float[Tensor, "prompt pos *rest"]:
        """The whole kept activation, laid out as ``[prompt, pos, unit, ...]``."""
        key = (run, site, layer)
        parts = self.parts[key]
        if len(parts) > 1:
            self.parts[key] = parts = [torch.cat(parts)]
        return parts[0]

    def gather(
        self, run: str, site: HookSite, layer: int, prompts: Tensor, positions: Tensor, units: Tensor | None = None
    ) -> Float[Tensor, "pair unit *rest"]:
        """The activation of ``run`` at (prompt, position) pairs.

        Raises:
            EngineError: when it was not captured there.
        """
        key = (run, site, layer)
        if key not in self.kept:
            raise EngineError(f"{site.at(layer)} was not captured in the run {run!r}")
        kept, held = self.kept[key], self.tensor(run, site, layer)
        device, there = positions.device, held.device  # blocks of one model may lie on several
        prompts, positions = prompts.to(there), positions.to(there)
        if kept is not None:
            positions = self._lookup(kept, there)[positions]
        return gather(held, (prompts, positions), None if units is None else units.to(there)).to(device)

    def _lookup(self, kept: tuple[int, ...], device: torch.device) -> Int[Tensor, " pos"]:
        """Position to its index among the kept ones."""
        if (kept, device) not in self._lookups:
            lookup = torch.full(
                (self.length,), self.length, device="cpu"
            )  # out of range: not kept must not pass for the last one
            lookup[list(kept)] = torch.arange(len(kept), device="cpu")
            self._lookups[kept, device] = lookup.to(device)
        return self._lookups[kept, device]

    def missing(self, wants: Iterable[Want]) -> list[Want]:
        """What has to be captured so that all of ``wants`` is here: an activation anew, with the positions it has."""
        wants = list(wants)
        lacking = {want.key for want in wants if not self._covers(want)}
        kept = [Want(*key, self.kept[key]) for key in lacking if key in self.kept]
        return [*kept, *(want for want in wants if want.key in lacking)]

    def _covers(self, want: Want) -> bool:
        if want.key not in self.kept:
            return False
        kept = self.kept[want.key]
        return kept is None or (want.positions is not None and set(want.positions) <= set(kept))

    def update(self, newer: ActivationStore) -> None:
        """Take over what ``newer`` holds."""
        for mine, theirs in (
            (self.kept, newer.kept),
            (self.parts, newer.parts),
            (self.readings, newer.readings),
            (self.before, newer.before),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        self.n_forwards += newer.n_forwards

    def forget(self) -> None:
        """Let go of all activations; readings stay."""
        self.kept.clear()
        self.parts.clear()

    @property
    def n_bytes(self) -> int:
        """Bytes of all activations."""
        return sum(part.numel() * part.element_size() for parts in self.parts.values() for part in parts)

    def joined(self, runs: Sequence[str], site: HookSite, layer: int) -> Float[Tensor, "context pos *rest"]:
        """The activation of several runs, one after another; each run's own becomes a view of it."""
        if len(runs) == 1:
            return self.tensor(runs[0], site, layer)
        parts = [self.tensor(run, site, layer) for run in runs]
        whole = torch.cat(parts)
        for run, part in zip(runs, whole.split([len(part) for part in parts]), strict=True):
            self.parts[run, site, layer] = [part]
        return whole

    def at(self, run: str, site: HookSite, layer: int, positions: Int[Tensor, " prompt"]) -> Tensor:
        """The activation at one position of every prompt, ``[prompt, unit, ...]``."""
        positions = positions.to(self.tensor(run, site, layer).device)
        return self.gather(run, site, layer, torch.arange(len(positions), device=positions.device), positions)
