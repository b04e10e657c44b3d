"""The chain's main quantities, written a second time: Hugging Face transformers and plain torch hooks.

Nothing of sinklens or TransformerLens is used here, and where there is a choice another route is taken: a token is
made to attend only to itself through the additive attention mask, not by editing the pattern; patched runs start at
the tokens, one patch at a time; activations are swapped at the inputs and outputs of the linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Z = ("self_attn.o_proj", "input")
"""The aggregated values of all heads, side by side."""
POST = ("mlp.down_proj", "input")
"""The activations of the MLP's neurons."""
KEY = ("self_attn.k_proj", "output")
"""The keys of all key heads, side by side, before the rotary embedding."""
RESID_PRE, RESID_POST = ("", "input"), ("", "output")
ATTN_OUT, MLP_OUT = ("self_attn", "output"), ("mlp", "output")

Place = tuple[str, str]
"""A module of a block, by its name in the block, and which end of it."""
RECORDED: tuple[Place, ...] = (Z, POST, KEY, RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT)


@dataclass
class Recording:
    """What one forward pass did."""

    attention: list[Tensor] = field(default_factory=list)
    """Of every block, `[prompt head query key]`."""
    seen: dict[tuple[Place, int], Tensor] = field(default_factory=dict)
    """At every place of every block, `[prompt pos dim]`."""


@dataclass(frozen=True)
class Swap:
    """What another run had at a position takes the place of what is there."""

    place: Place
    blocks: Sequence[int]
    position: int
    source: Recording
    columns: Sequence[int] | None = None
    """Of the last axis; all of them by default."""


@torch.no_grad()
def forward(
    model: Any,
    tokens: Tensor,
    *,
    alone: tuple[int, Sequence[int]] | None = None,
    swaps: Sequence[Swap] = (),
    n_blocks: int | None = None,
) -> Recording:
    """Run a `LlamaForCausalLM` with hooks that are gone afterwards.

    `alone` is a position that may attend only to itself, and the blocks in which that is so. `n_blocks` saves the time
    of the blocks after the first so many.
    """
    found = Recording()
    config, layers = model.model.config, model.model.layers[:n_blocks]
    with ExitStack() as stack:
        stack.callback(setattr, config, "num_hidden_layers", config.num_hidden_layers)
        config.num_hidden_layers = len(layers)
        if alone is not None:
            position, blocks = alone
            for block in blocks:
                hook = _only_itself(position)
                handle = layers[block].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for swap in swaps:
            for block in swap.blocks:
                new = swap.source.seen[swap.place, block]
                stack.callback(_at(layers[block], swap.place, _put(swap.position, swap.columns, new)))
        for place in RECORDED:
            for block, layer in enumerate(layers):
                stack.callback(_at(layer, place, _keep(found, place, block)))
        out = model.model(input_ids=tokens, use_cache=False, output_attentions=True)
    found.attention = list(out.attentions)
    assert len(found.attention) == len(layers)
    return found


def received(attention: Tensor, position: int) -> Tensor:
    """`[prompt head]`: mean attention that the position receives from the queries after it."""
    return attention[:, :, position + 1 :, position].mean(-1)


def metric(run: Recording, position: int, blocks: Sequence[int]) -> Tensor:
    """`[prompt]`: attention received, averaged over heads and blocks."""
    return torch.stack([received(run.attention[block], position).mean(-1) for block in blocks]).double().mean(0)


def _only_itself(position: int) -> Any:
    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        if mask is None or mask.ndim != 4 or not mask.is_floating_point():
            raise AssertionError("this route needs the additive mask that eager attention gets")
        mask = mask.clone()
        mask[:, :, position, :] = -torch.inf
        mask[:, :, position, position] = 0
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _put(position: int, columns: Sequence[int] | None, source: Tensor) -> Any:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        if columns is None:
            x[:, position] = source[:, position]
        else:
            for column in columns:
                x[:, position, column] = source[:, position, column]
        return x

    return change


def _keep(found: Recording, place: Place, block: int) -> Any:
    def change(x: Tensor) -> None:
        found.seen[place, block] = x

    return change


def _at(layer: Any, place: Place, change: Any) -> Any:
    """Hook `change` to a place; returns what removes it again. None from `change` leaves the tensor as it is."""
    name, end = place
    module = layer.get_submodule(name)

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # An attention or a block gets its input by name from some versions of transformers.
        x = args[0] if args else kwargs["hidden_states"]
        new = change(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_module: Any, _args: Any, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if end == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True).remove
    return module.register_forward_hook(after).remove
