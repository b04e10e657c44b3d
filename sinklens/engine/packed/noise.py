"""Does rounding alone part the packed pass from the model? A trial in 16 bits, block by block.

Behind a few blocks of sharp attention two right passes in bfloat16 read different numbers, so that a reading says
little about either. Within one block rounding has no time to grow. Each block is given the residual stream that the
model gives it, and computed in float32 and, several times, in the model's dtype: with either way of attention, and with
an input that is moved by a rounding. How far those are from float32 is what the dtype does there; the model's own
activations may be a few times as far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.packed.blocks import PackedPass
from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.points import SCORES
from sinklens.engine.packed.watch import Watch, as_tokens
from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.engine.packed.whole import whole_rows
from sinklens.models.identities import activations
from sinklens.models.view import Model, device_of
from sinklens.sites import HookSite

TIMES = 2.0
"""How many times as far from float32 as the packed pass in 16 bits the model may be."""
ROUNDINGS = 4
"""And how many roundings of one number besides."""
QUANTILES, OF_NOISE = (0.5, 0.75, 0.9), (0.65, 0.9, 0.97)
"""Of the tokens, ordered by their difference: a wrong part moves most of them, an unlucky rounding few. Those of the
model are held against somewhat higher ones of rounding, which strikes other tokens every time."""
NUDGES = 2
"""How many inputs moved by a rounding are tried: which keys a sharp pattern falls on hangs on a few roundings."""
MOST_TOKENS = 512
"""Of a prompt, how many the trial takes: all activations of all blocks are kept."""


class Exact(PackedModel):
    """A model taken apart, in float32: a block at a time, so that no second copy of the model is made."""

    def __init__(self, packed: PackedModel) -> None:
        super().__init__(packed.model, packed.length)
        self.packed, self.dtype = packed, torch.float32

    def block(self, layer: int) -> PackedBlock:
        """See :meth:`PackedModel.block`; nothing is kept."""
        return _in_float32(self.packed.block(layer))

    @property
    def keys_site(self) -> HookSite:
        """See :attr:`PackedModel.keys_site`."""
        return self.packed.keys_site


def _in_float32(part: Any) -> Any:
    """Weights, norms and projections in float32; a module that runs as a whole computes in its own dtype."""
    if isinstance(part, Tensor):
        return part.float() if part.is_floating_point() else part
    if isinstance(part, tuple):
        return tuple(map(_in_float32, part))
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = {item.name: _in_float32(getattr(part, item.name)) for item in fields(part)}
    if isinstance(part, Norm):
        changed["dtype"] = torch.float32
    if isinstance(part, PackedBlock):
        for name in ("whole_mlp", "q_norm", "k_norm"):
            changed[name] = _through(getattr(part, name), part.out.W.dtype)
    return replace(part, **changed)


def _through(function: Any, dtype: torch.dtype) -> Any:
    return None if function is None else lambda x: function(x.to(dtype)).float()


@torch.no_grad()
def differs(model: Model, packed: PackedModel, tokens: Int[Tensor, "row pos"]) -> str | None:
    """Where the packed pass is another than the model's on some prompts; None where only rounding parts them."""
    tokens = tokens[:, :MOST_TOKENS].to(device_of(model))
    held = activations(model, tokens)
    layout = whole_rows(torch.arange(len(tokens), device=tokens.device), tokens.shape[1])
    for layer in range(packed.n_layers):
        acts = {name: act for (block, name), act in held.items() if block == layer}
        if (why := trial(packed, layout, layer, acts)[0]) is not None:
            return why
    return None


def trial(packed: PackedModel, layout: Layout, layer: int, acts: Mapping[str, Tensor]) -> tuple[str | None, set[str]]:
    """The first hook point of a block at which more than rounding parts the packed pass from the model (None without
    any), and those at which nothing more does.

    Args:
        packed: the model taken apart.
        layout: whole prompts.
        layer: the block.
        acts: what the model has there, ``[prompt, pos, ...]`` by the names of the block's hook points.
    """
    x, same = acts["hook_resid_pre"].flatten(0, 1), set[str]()
    true = _of_block(Exact(packed), layout, layer, x, explicit=True)
    rounded = [_of_block(packed, layout, layer, x, explicit) for explicit in (False, True)]
    rounded += [_of_block(packed, layout, layer, _nudged(x, packed.dtype, seed), True) for seed in range(NUDGES)]
    for name, theirs in acts.items():
        if name not in true or name == "hook_resid_pre":
            continue
        exact, shown = as_tokens(true[name], theirs, name)
        ours = [as_tokens(each[name], theirs, name)[0] for each in rounded if name in each]
        noise = torch.stack([_spread(each, exact, OF_NOISE) for each in ours]).amax(0)
        off = _spread(shown, exact, QUANTILES)
        if (off <= TIMES * noise + ROUNDINGS * torch.finfo(packed.dtype).eps).all():
            same.add(f"blocks.{layer}.{name}")
        elif f"blocks.{{layer}}.{name}" != SCORES:  # some bridges show others than those they take the softmax of
            there, made = float(off[-1]), float(noise[-1])
            return f"blocks.{layer}.{name} is off by {there:.2g} of its size, and rounding makes {made:.2g}", same
    return None, same | {f"blocks.{layer}.hook_resid_pre"}


def _of_block(packed: PackedModel, layout: Layout, layer: int, x: Tensor, explicit: bool) -> Mapping[str, Tensor]:
    watch = Watch(packed.n_layers, explicit)
    PackedPass(packed, layout, watch).one_block(x.to(packed.dtype), layer)  # type: ignore[arg-type]
    return watch.seen


def _nudged(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """An input that may as well have been rounded to ``dtype`` otherwise: entries moved by up to half of their eps."""
    moved = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device) - 0.5
    return x * (1 + moved * torch.finfo(dtype).eps)


def _spread(
    found: Float[Tensor, "token *rest"], exact: Float[Tensor, "token *rest"], quantiles: tuple[float, ...]
) -> Float[Tensor, " measure"]:
    """Quantiles over tokens of their relative difference, and its root mean square."""
    off, size = ((x.flatten(1)).norm(dim=-1) for x in (found - exact, exact))
    each = off / size.clamp_min(1e-12)
    return torch.cat([each.quantile(each.new_tensor(quantiles)), each.pow(2).mean().sqrt()[None]])
