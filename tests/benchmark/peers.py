"""How sinklens and TransformerLens run the sweep.

A peer takes a workload and gives the readout of every patch. Its time is that of :meth:`Peer.run`, from tokens to
numbers on the CPU, captures of the source run included; what :meth:`Peer.prepare` does is not counted.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sinklens import readouts, sites
from sinklens.edits import Edit, EditSite, Transplant
from sinklens.engine.run import run_patches
from sinklens.patches import Patch, Source
from tests.benchmark.shapes import Models
from tests.benchmark.workload import Workload

Values = Float[Tensor, "cell prompt"]

ROWS = {"cuda": (64, 256, 1024), "cpu": (8, 32, 128)}
"""Batch sizes worth trying, by device."""


class Peer(ABC):
    """A library, and a way to run the sweep with it; made from the :class:`tests.benchmark.shapes.Models`."""

    name: ClassVar[str]
    """What tables call it."""
    package: ClassVar[str]
    """The distribution whose version counts."""
    note: ClassVar[str]
    """How it is used, in one line."""
    whole: ClassVar[bool] = False
    """Whether all patches share a cost, so that a part of them would take more than its share of the time."""
    rows: tuple[int, ...]
    """Batch sizes worth trying, small ones first; none where there is nothing to choose, or the library chooses."""

    def prepare(self, work: Workload) -> None:  # noqa: B027, ARG002  (most have nothing to prepare)
        """What is not counted."""

    @abstractmethod
    def run(self, work: Workload, rows: int) -> Values:
        """The readout under every patch, on the CPU, with ``rows`` rows at once; 0 where there is no choice."""


def attention_received(pattern: Float[Tensor, "row head query key"], target: int) -> Float[Tensor, " row"]:
    """Attention that ``target`` receives from later queries, averaged over these and over heads."""
    return pattern[:, :, target + 1 :, target].float().mean((1, 2))


class _TransformerLens(Peer):
    """What both ways to patch with TransformerLens share: the source run's cache, and prompts in batches."""

    package: ClassVar[str] = "transformer-lens"
    rows = ()
    n_prompts: ClassVar[int] = 64
    """Prompts in a forward pass, at most."""

    def __init__(self, models: Models) -> None:
        self.model = models.hooked
        self.sources: dict[int, Any] = {}
        self.prepared: Workload | None = None

    @override
    def prepare(self, work: Workload) -> None:
        names = [sites.RESID_PRE.at(layer) for layer in work.layers]
        self.sources = {}
        for begin in range(0, work.n_prompts, self.n_prompts):
            tokens = work.corrupt[begin : begin + self.n_prompts].to(self.model.cfg.device)
            with torch.no_grad():
                _, self.sources[begin] = self.model.run_with_cache(tokens, names_filter=names, return_type=None)
        self.prepared = work

    def _batches(self, work: Workload) -> Iterator[tuple[int, Int[Tensor, "prompt pos"], Any]]:
        if self.prepared is not work:
            self.prepare(work)
        for begin, source in self.sources.items():
            yield begin, work.clean[begin : begin + self.n_prompts].to(self.model.cfg.device), source


class GenericActivationPatch(_TransformerLens):
    """``transformer_lens.patching.generic_activation_patch``, as its users call it.

    The metric is given logits, so the pattern is kept by a permanent hook. All prompts of a batch are patched at once,
    which the function allows; per prompt values come from the hook too, because the metric is one number a call.
    """

    name: ClassVar[str] = "transformer_lens"
    note: ClassVar[str] = "patching.generic_activation_patch, layer_pos_patch_setter, permanent hook on the pattern"

    @override
    def run(self, work: Workload, rows: int) -> Values:  # noqa: ARG002
        from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

        values = torch.zeros(len(work.cells), work.n_prompts)
        index = pd.DataFrame(list(work.cells), columns=["layer", "pos"])
        for begin, tokens, source in self._batches(work):
            kept: list[Tensor] = []
            found: list[Tensor] = []

            def keep(pattern: Tensor, hook: object, kept: list[Tensor] = kept) -> None:  # noqa: ARG001
                kept.append(attention_received(pattern, work.target))

            def metric(_logits: Tensor, kept: list[Tensor] = kept, found: list[Tensor] = found) -> Tensor:
                found.append(torch.stack(kept).mean(0))
                kept.clear()
                return found[-1].mean()

            with torch.no_grad(), _permanent(self.model, work.readouts, keep), _silent():
                generic_activation_patch(
                    self.model, tokens, source, metric, layer_pos_patch_setter, "resid_pre", index_df=index
                )
            values[:, begin : begin + len(tokens)] = torch.stack(found).cpu()
        return values.double()


class RunWithHooks(_TransformerLens):
    """One ``run_with_hooks`` for each cell, stopped after the last readout block: the definition of every number."""

    name: ClassVar[str] = "run_with_hooks"
    note: ClassVar[str] = "model.run_with_hooks for each patch, stopped after the readout block, no logits"

    @override
    def run(self, work: Workload, rows: int) -> Values:  # noqa: ARG002
        values = torch.zeros(len(work.cells), work.n_prompts)
        for begin, tokens, source in self._batches(work):
            found = [self._one(tokens, source, cell, work) for cell in work.cells]
            values[:, begin : begin + len(tokens)] = torch.stack(found).cpu()
        return values.double()

    def clean(self, work: Workload) -> Float[Tensor, " prompt"]:
        """The readout without any patch."""
        return torch.cat([self._one(tokens, None, None, work) for _, tokens, _ in self._batches(work)]).double().cpu()

    def _one(self, tokens: Tensor, source: Any, cell: tuple[int, int] | None, work: Workload) -> Tensor:
        kept: list[Tensor] = []

        def read(pattern: Tensor, hook: object) -> None:  # noqa: ARG001
            kept.append(attention_received(pattern, work.target))

        hooks: list[tuple[str, Any]] = [(sites.PATTERN.at(block), read) for block in work.readouts]
        if cell is not None:
            layer, position = cell
            name = sites.RESID_PRE.at(layer)

            def patch(resid: Tensor, hook: object) -> Tensor:  # noqa: ARG001
                new = resid.clone()
                new[:, position] = source[name][:, position]
                return new

            hooks.append((name, patch))
        with torch.no_grad():
            self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=max(work.readouts) + 1)
        return torch.stack(kept).mean(0)


@dataclass(frozen=True, eq=False)
class OtherTokens(Edit):
    """Replace what enters the first block with other tokens' embeddings: a run on other prompts."""

    embeddings: Float[Tensor, "prompt pos d_model"]
    """Of the other tokens."""

    @override
    def __call__(self, x: Tensor, source: Tensor | None, at: EditSite) -> Tensor:  # noqa: ARG002
        return self.embeddings[at.prompts, at.positions]


class Sinklens(Peer):
    """:func:`sinklens.run_patches`; the source run is the clean one with the other prompt's embeddings put in."""

    name: ClassVar[str] = "sinklens"
    package: ClassVar[str] = "sinklens"
    whole: ClassVar[bool] = True
    note: ClassVar[str] = "run_patches, all patches in one call, capture of both runs included"

    rows = ()

    def __init__(self, models: Models) -> None:
        self.model = models.hooked

    @override
    def run(self, work: Workload, rows: int) -> Values:
        everywhere = tuple(range(work.length))
        with torch.no_grad():
            embeddings = self.model.embed(work.corrupt.to(self.model.cfg.device))
        corrupt = Patch(sites.RESID_PRE, (0,), everywhere, OtherTokens("other_tokens", embeddings), run="corrupt")
        edit, source = Transplant(), Source("corrupt")
        patches = [
            Patch(sites.RESID_PRE, (layer,), (position,), edit, source=source, allow_unchanged=True)
            for layer, position in work.cells
        ]
        received = readouts.attention_received("received", work.readouts, (work.target,), work.n_prompts)
        runs = {"base": (), "corrupt": (corrupt,)}
        result = run_patches(self.model, work.clean, patches, [received], runs=runs, max_rows=rows or None)
        return result.values["received"]


@contextlib.contextmanager
def _permanent(model: Any, blocks: tuple[int, ...], hook: Any) -> Iterator[None]:
    for block in blocks:
        model.add_perma_hook(sites.PATTERN.at(block), hook)
    try:
        yield
    finally:
        model.reset_hooks(including_permanent=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bar, which would be drawn once for every patch."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
