"""The proof that a bridge's blocks, taken apart, are the bridge's: every activation of every block, on one pass.

What is read off the modules of a bridge is a proposal (:mod:`sinklens.models.bridged`). Before it is used, each block
is given the residual stream that the bridge gives it, and everything that the packed pass computes from there must be
what the bridge has at that hook point. An MLP that is not as its parts say is run by the model's own module instead;
anything else that differs is a part that is not known, and is named.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sinklens.engine.packed.blocks import PackedPass
from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.noise import trial
from sinklens.engine.packed.of_bridge import BridgedModel
from sinklens.engine.packed.points import SCORES
from sinklens.engine.packed.watch import Watch, as_tokens
from sinklens.engine.packed.whole import whole_rows
from sinklens.models.identities import activations, error_of, identities, probe_tokens
from sinklens.models.parts import UnknownPartError
from sinklens.models.state import Snapshot, current_structure
from sinklens.models.view import Model

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
"""The largest difference (:func:`difference`) that rounding may make within one block; it is looked at in float32."""
_ODD_CALL = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What a part says that is called in another way than the model does."""
EMBEDDED, LOGITS = "the embedding", "the logits"


@dataclass(frozen=True)
class Proof:
    """What was found of a bridge."""

    why_not: str | None
    """What is not known about it; None where all is."""
    whole: frozenset[int] = frozenset()
    """Blocks whose MLP has to be run by the model's own module."""
    proven: frozenset[str] = frozenset()
    """Hook points at which the activations are the bridge's own."""


_PROVEN: weakref.WeakKeyDictionary[Model, tuple[Snapshot, Proof]] = weakref.WeakKeyDictionary()


def proof(model: Model) -> Proof:
    """The proof, made when it is first asked for and again after anything of the model has changed."""
    structure = current_structure(model)
    if model not in _PROVEN or _PROVEN[model][0] != structure:
        _PROVEN[model] = (structure, prove(model))
    return _PROVEN[model][1]


def prove(model: Model) -> Proof:
    """The proof, made anew."""
    try:
        return _prove(model)
    except UnknownPartError as error:
        return Proof(str(error))
    except _ODD_CALL as error:
        return Proof(f"a part that is called in another way ({' '.join(str(error).split())[:200]})")


@torch.no_grad()
def _prove(model: Model) -> Proof:
    tokens = probe_tokens(model)
    packed, odd = BridgedModel(model, tokens.shape[1]), identities(model).odd
    held = {
        (layer, name): act for (layer, name), act in activations(model).items() if f"blocks.{layer}.{name}" not in odd
    }
    ends = [(layer, name) for layer in range(packed.n_layers) for name in ("hook_resid_pre", "hook_resid_post")]
    if (lacking := next((place for place in ends if place not in held), None)) is not None:
        raise UnknownPartError(f"a model without blocks.{lacking[0]}.{lacking[1]}")
    _hold(EMBEDDED, packed.embedded(tokens).flatten(0, 1), held[0, "hook_resid_pre"].flatten(0, 1), packed.dtype)
    whole, proven = set[int](), set[str]()
    for layer in range(packed.n_layers):
        acts = {name: act for (block, name), act in held.items() if block == layer}
        if layer and not torch.equal(acts["hook_resid_pre"], held[layer - 1, "hook_resid_post"]):
            raise UnknownPartError(f"something between the blocks {layer - 1} and {layer}")
        off, seen = _differs(packed, layer, acts)
        if off is not None and packed.block(layer).mlp_parts is not None:
            whole.add(layer)
            packed, why = BridgedModel(model, tokens.shape[1], frozenset(whole)), off
            try:
                off, seen = _differs(packed, layer, acts)
            except _ODD_CALL as error:
                raise UnknownPartError(why) from error
        if off is not None:
            raise UnknownPartError(off)
        proven |= seen
    last = held[packed.n_layers - 1, "hook_resid_post"].flatten(0, 1).to(packed.dtype)
    expected = model(tokens, return_type="logits").flatten(0, 1).float()
    _hold(LOGITS, packed.logits(last), expected, packed.dtype)
    return Proof(None, frozenset(whole), frozenset(proven))


def difference(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """The largest relative difference of any token, what is NaN in both aside.

    In half precision rounding alone may move single tokens far, where attention is sharp: there it is their average.
    """
    both = mine.isnan() & theirs.isnan()
    mine, theirs = mine.float().masked_fill(both, 0), theirs.float().masked_fill(both, 0)
    if dtype.itemsize >= 4 or mine.shape != theirs.shape:
        return error_of(mine, theirs)
    off, size = ((x.reshape(len(x), -1)).norm(dim=-1) for x in (mine - theirs, theirs))
    return float((off / size.clamp_min(1e-12)).mean())


def _hold(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if not (error := difference(found, expected, dtype)) <= TOLERANCE[dtype]:
        raise UnknownPartError(f"{what}, which would be off by {error:.2g} of its size")


def _differs(packed: BridgedModel, layer: int, acts: Mapping[str, Tensor]) -> tuple[str | None, set[str]]:
    """The first hook point of a block at which the packed pass has not what the bridge has (None without any), and
    those at which it has.
    """
    x, same = acts["hook_resid_pre"], set[str]()
    if not packed.parallel and "hook_resid_mid" not in acts:
        return f"no residual stream in the middle of block {layer}", same
    layout = whole_rows(torch.arange(len(x), device=x.device), x.shape[1])
    found = _compared(packed, layout, layer, acts)
    if found[0] is not None and packed.dtype.itemsize <= 2:
        return trial(packed, layout, layer, acts)  # which knows what rounding does to this block
    return found


def _compared(
    packed: BridgedModel, layout: Layout, layer: int, acts: Mapping[str, Tensor]
) -> tuple[str | None, set[str]]:
    """:func:`_differs` by what rounding ordinarily makes."""
    x, same = acts["hook_resid_pre"], set[str]()
    for watch in (Watch(packed.n_layers, explicit=False), Watch(packed.n_layers, explicit=True)):
        PackedPass(packed, layout, watch).one_block(x.flatten(0, 1).to(packed.dtype), layer)  # type: ignore[arg-type]
        for name, found in watch.seen.items():
            if name not in acts:
                continue  # which cannot be read or edited
            mine, theirs = as_tokens(found, acts[name], name)
            if not (error := difference(mine, theirs, packed.dtype)) <= TOLERANCE[packed.dtype]:
                if f"blocks.{{layer}}.{name}" == SCORES:
                    continue  # some bridges show other scores than those that they take the softmax of
                return f"blocks.{layer}.{name}, which would be off by {error:.2g} of its size", same
            same.add(f"blocks.{layer}.{name}")
    return None, same
