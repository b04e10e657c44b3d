"""Where an edit goes: whether a write at a hook point takes effect, and all of it.

A hook point can show an activation that the model does not use (a pattern that was computed again for the eye), or
pass an edit on to one of its readers only. Every patch there would have no effect, or a part of it, and no word would
be said. So each hook point that is written to is tried once a model and kind of block: the activation is replaced in
one block; every identity that holds without the edit and starts from that hook point
(:mod:`sinklens.models.identities`) must still hold, and where there is none what follows must change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinklens.errors import NotApplicableError
from sinklens.models.identities import (
    HOOKS,
    IDENTITIES,
    Identities,
    Identity,
    LacksError,
    by_token,
    error_of,
    identities,
    keeper,
    probe_tokens,
    probing,
)
from sinklens.models.state import current_stamp, in_usual_state
from sinklens.models.view import Model, forward, has_hook, model_id

_TRIED: weakref.WeakKeyDictionary[Model, tuple[object, dict[tuple[int, str], str]]] = weakref.WeakKeyDictionary()
"""Stamp of the weights; first block of a kind and hook to what is wrong with an edit there."""


@in_usual_state
def check_writable(model: Model, template: str, layers: Sequence[int]) -> None:
    """Make sure that an edit at a hook point (``blocks.{layer}.attn.hook_pattern``) takes effect in some blocks.

    Raises:
        NotApplicableError: it does not, or reaches only a part of what reads the activation.
    """
    name, measured, stamp = template.removeprefix("blocks.{layer}."), identities(model), current_stamp(model)
    if name not in HOOKS:
        return
    measured.check_layout(template, layers)
    if model not in _TRIED or _TRIED[model][0] != stamp:
        _TRIED[model] = (stamp, {})
    tried = _TRIED[model][1]
    for first in {_first_of_kind(measured, layer) for layer in layers}:
        if f"blocks.{first}.{name}" not in measured.fired:
            continue  # the engine says that it never fires
        if (first, name) not in tried:
            tried[first, name] = _what_is_wrong(model, measured, first, name)
        if tried[first, name]:
            raise NotApplicableError(f"{model_id(model)}: an edit at blocks.{first}.{name} {tried[first, name]}")


def _first_of_kind(measured: Identities, layer: int) -> int:
    """The first block that computes the same hook points."""

    def computed(block: int) -> frozenset[str]:
        return frozenset(name for name in HOOKS if f"blocks.{block}.{name}" in measured.fired)

    return next(block for block in range(layer + 1) if computed(block) == computed(layer))


def _what_is_wrong(model: Model, measured: Identities, layer: int, name: str) -> str:
    """Why an edit there is not what it says; empty where it is."""
    beside = _BESIDE.get(name, ())
    edited, as_it_was = _pass(model, layer, (name, *beside)), _pass(model, layer, beside)
    aside = (name, *beside, *SHOWN)
    ignored = all(torch.equal(act, edited[key]) for key, act in as_it_was.items() if key not in aside)
    seen = False
    for identity in IDENTITIES.values():
        if name not in identity.hooks or name in identity.results or not measured.holds(identity.name, (layer,)):
            continue
        error = _error(model, layer, identity, edited)
        if error > measured.tolerance:
            effect = "has no effect" if ignored else "reaches only a part of what follows"
            return f"{effect} ({identity.formula} is off by {error:.2g} of its size then)"
        # Whether the equation is about this activation at all, in this block.
        seen = seen or _error(model, layer, identity, {**edited, name: as_it_was[name]}) > measured.tolerance
    if ignored and not seen:
        return "has no effect: the model does not go on with what a hook returns there"
    return ""


def _error(model: Model, layer: int, identity: Identity, acts: dict[str, Tensor]) -> float:
    by_name = {key: by_token(act, key) for key, act in acts.items() if key != OUTPUT}
    try:
        return error_of(*identity.sides(model, layer, by_name))
    except (LacksError, NotApplicableError):
        return 0.0


def _pass(model: Model, layer: int, edited: tuple[str, ...]) -> dict[str, Tensor]:
    """Activations of a block, those ``edited`` as they are then, and the residual stream behind it."""
    acts: dict[str, Tensor] = {}

    def editor(name: str) -> Callable[[Tensor, object], Tensor]:
        def edit(act: Tensor, hook: object) -> Tensor:
            new = _another(act, name)
            keeper(acts, name)(new, hook)
            return new

        return edit

    names = [name for name in HOOKS if has_hook(model, f"blocks.{layer}.{name}")]
    hooks = [(f"blocks.{layer}.{name}", editor(name) if name in edited else keeper(acts, name)) for name in names]
    with probing(model, hooks):
        acts[OUTPUT] = forward(model, probe_tokens(model), stop_at=layer + 1)
    return acts


def _another(act: Tensor, name: str) -> Tensor:
    """Another activation of the same kind and size, the same at every call."""
    if name == "attn.hook_pattern":
        return torch.eye(act.shape[-1], dtype=act.dtype, device=act.device).expand_as(act).clone()
    noise = torch.randn(act.shape, generator=torch.Generator().manual_seed(len(name)), device="cpu").to(act)
    if name == "attn.hook_attn_scores":
        return act + noise  # what is masked stays so
    return noise * act.float().std().clamp_min(0.1).to(act)


OUTPUT = "output"
"""The residual stream behind the block."""
SHOWN = ("attn.hook_attn_scores", "attn.hook_pattern")
"""What a model may compute again to show it: that it differs says nothing."""
_BESIDE = {
    "attn.hook_q": ("attn.hook_k", "attn.hook_v"),
    "attn.hook_k": ("attn.hook_q", "attn.hook_v"),
    "attn.hook_rot_q": ("attn.hook_rot_k", "attn.hook_v"),
    "attn.hook_rot_k": ("attn.hook_rot_q", "attn.hook_v"),
    "attn.hook_attn_scores": ("attn.hook_v",),
    "attn.hook_pattern": ("attn.hook_v",),
    "mlp.hook_pre": ("mlp.hook_pre_linear",),
    "mlp.hook_pre_linear": ("mlp.hook_pre",),
}
"""What is made random beside an edit, so that weights of zero do not hide it: a key is seen by queries alone."""
