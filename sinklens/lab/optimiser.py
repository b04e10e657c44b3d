"""The optimiser: which parameters decay, and its state as tensors that a file can hold.

AdamW decays matrices: the embedding, an unembedding of its own, the projections of attention and MLP, and what a
variant says of its own (``Variant.decays``). Norms' weights, gains, biases, slots and learned tokens do not decay. Gu
et al. decay everything, which moves the sink: compare with that in mind.

Muon (``torch.optim.Muon``) updates the projections of attention and MLP, each head's matrix by itself, with updates as
large as AdamW's would be; AdamW has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sinklens.errors import InputError
from sinklens.lab.settings import Settings
from sinklens.models.decoder import Decoder

MATRICES = ("W_E", "own", "W_Q", "W_K", "W_V", "_W_K", "_W_V", "W_O", "W_gate", "W_in", "W_out")
"""Parameters that decay, by the last part of their names."""


def decaying(model: Decoder) -> list[str]:
    """Names of the parameters that decay."""
    names = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:  # what a variant moves by itself
            continue
        block, of_variant, _ = name.partition(".attn.variant.")
        if of_variant:
            if model.get_submodule(f"{block}.attn.variant").decays:
                names.append(name)
        elif name.rpartition(".")[2] in MATRICES:
            names.append(name)
    return names


class Optimiser:
    """AdamW, alone or with Muon, over the parameters of a model by their names."""

    def __init__(self, model: Decoder, settings: Settings) -> None:
        self.named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.decaying = decaying(model)
        self.by_muon = self._for_muon() if settings.optimiser == "muon" else []
        decay = [name for name in self.decaying if name not in self.by_muon]
        keep = [name for name in self.named if name not in self.decaying]
        self._order = [*decay, *keep]
        groups = [
            {"params": [self.named[name] for name in decay], "weight_decay": settings.weight_decay},
            {"params": [self.named[name] for name in keep], "weight_decay": 0.0},
        ]
        first = next(iter(self.named.values()))
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=first.is_cuda)
        self._parts = {name: self._matrices(name) for name in self.by_muon}
        self.muon = self._make_muon(settings) if self.by_muon else None

    def step(self, lr: float) -> None:
        """Update the weights, and forget the gradients."""
        for name, parts in self._parts.items():
            grad = self.named[name].grad
            assert grad is not None
            for part, own in zip(parts, grad if grad.ndim == 3 else [grad], strict=True):
                part.grad = own
        for optimiser in self._all():
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
        for weight in self.named.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Its state, by name."""
        found: dict[str, Tensor] = {}
        for name, weight in self._keyed():
            for key, value in self._state_of(weight).items():
                found[f"{name}/{key}"] = value.detach().cpu().contiguous()
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            by_name.setdefault(name, {})[part] = value
        for name, weight in self._keyed():
            there = {
                part: value.clone() if part == "step" else value.to(weight.device)
                for part, value in by_name[name].items()
            }
            if "step" in there and weight.is_cuda:
                there["step"] = there["step"].to(weight.device)
            self._owner(weight).state[weight] = there

    def _all(self) -> list[torch.optim.Optimizer]:
        return [self.adamw] if self.muon is None else [self.adamw, self.muon]

    def _keyed(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.named[name]) for name in self._order)
        for name, parts in self._parts.items():
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(parts))

    def _owner(self, weight: Tensor) -> torch.optim.Optimizer:
        return next(one for one in self._all() if any(weight is p for g in one.param_groups for p in g["params"]))

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        return self._owner(weight).state.get(weight, {})

    def _for_muon(self) -> list[str]:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"this torch ({torch.__version__}) has no Muon: install 2.9 or newer, or use adamw.")
        return [n for n in self.decaying if n.startswith("blocks.") and n.rpartition(".")[2] in MATRICES]

    def _matrices(self, name: str) -> list[nn.Parameter]:
        """The matrices of a parameter, in the same memory: one, or one a head."""
        weight = self.named[name].data
        return [nn.Parameter(part) for part in (weight if weight.ndim == 3 else [weight])]

    def _make_muon(self, settings: Settings) -> torch.optim.Optimizer:
        parts = [part for matrices in self._parts.values() for part in matrices]
        decay = settings.weight_decay
        return torch.optim.Muon(parts, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
