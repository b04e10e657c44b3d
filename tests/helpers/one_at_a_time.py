"""The slow way: one patch, one prompt, one full forward pass with ``run_with_hooks``, readouts from a full cache.

Nothing here packs, resumes, stops early, reduces on the way or keeps source activations: every forward pass starts
from the tokens of one prompt, and source activations come from TransformerLens's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sinklens.edits import AttendTo, Edit, OfSource, PerPrompt
from sinklens.interventions import Hooks, hooks_of
from sinklens.patches import Patch, Positions, Runs, Source
from sinklens.readouts.base import Readout, Rows


def _for_prompt(patch: Patch, prompt: int) -> Patch:
    """The patch for one prompt, which is prompt 0 of a batch of one; an edit that looks prompts up gets that one."""
    source = patch.source
    if source is not None and source.positions is not None:
        source = Source(source.run, Positions.of(source.positions).at(prompt))
    return replace(patch, positions=patch.where.at(prompt), source=source, edit=_edit_for(patch.edit, prompt))


def _edit_for(edit: Edit, prompt: int) -> Edit:
    if isinstance(edit, PerPrompt):
        return replace(edit, values={layer: x[prompt : prompt + 1] for layer, x in edit.values.items()})
    if isinstance(edit, AttendTo):
        return replace(edit, weights=edit.weights[prompt : prompt + 1])
    if isinstance(edit, OfSource):
        return replace(edit, edit=_edit_for(edit.edit, prompt))
    return edit


def cache_of(model: Any, tokens: Tensor, hooks: Hooks, names: set[str]) -> dict[str, Tensor]:
    """Activations of one full forward pass, read after the hooks have edited them."""
    cache: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        cache[name] = act.detach().clone()

    with torch.no_grad():
        keepers = [(name, partial(keep, name=name)) for name in sorted(names)]
        cache["logits"] = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *keepers])
    return cache


def read(cache: dict[str, Tensor], readout: Readout, prompt: int) -> float:
    """A readout of a cached forward pass of one prompt."""
    rows = [Rows(torch.tensor([prompt]), layer) for layer in readout.layers]
    acts = [cache[readout.site.at(layer)] for layer in readout.layers]
    stack = torch.stack([readout.reduce(act, row) for act, row in zip(acts, rows, strict=True)])
    return float(readout.combine(stack))


class OneAtATime:
    """Runs patches the slow way; keeps the caches of unpatched runs, as a notebook would."""

    def __init__(self, model: Any, tokens: Tensor, readouts: Sequence[Readout], runs: Runs) -> None:
        self.model, self.tokens, self.readouts, self.runs = model, tokens, readouts, runs
        self.names = {readout.site.at(layer) for readout in readouts for layer in readout.layers} - {"logits"}
        self.sources: dict[tuple, dict[str, Tensor]] = {}

    def __call__(self, patch: Patch, prompt: int) -> list[float]:
        """All readouts of one patch on one prompt."""
        hooks = self._roots(patch.run, prompt)
        for part in patch.parts:
            source = None if part.source is None else self._source(part, prompt)
            hooks += hooks_of(_for_prompt(part, prompt), source)
        cache = cache_of(self.model, self.tokens[prompt : prompt + 1], hooks, self.names)
        return [read(cache, readout, prompt) for readout in self.readouts]

    def _source(self, patch: Patch, prompt: int) -> dict[str, Tensor]:
        assert patch.source is not None
        names = {patch.site.at(layer) for layer in patch.layers}
        names |= {place.site.at(place.layer) for layer in patch.layers for place in patch.edit.reads_in(layer)}
        key = (patch.source.run, prompt, tuple(sorted(names)))
        if key not in self.sources:
            row = self.tokens[prompt : prompt + 1]
            self.sources[key] = cache_of(self.model, row, self._roots(patch.source.run, prompt), names)
        return self.sources[key]

    def _roots(self, run: str, prompt: int) -> Hooks:
        return [hook for root in self.runs[run] for hook in hooks_of(_for_prompt(root, prompt))]
