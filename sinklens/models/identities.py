"""What a model computes, found by running it: the identities that stages, edits and analyses stand on.

A row of W_out is what its neuron adds to the residual stream, a norm's input is the residual stream, an attention
pattern is the softmax of its scores: true in a Llama, not in a Gemma-2 (a norm stands behind each sublayer), a Granite
(a multiplier does), an OLMo-2 (no norm stands in front), a model with an adapter that has not been merged. No list of
architectures is asked, which would be silent about the next one: each identity is measured on one forward pass, block
by block, and what fails is refused with the size of the failure.

============================  ==========================================================================================
attention_adds                hook_resid_pre + hook_attn_out = hook_resid_mid (in parallel blocks of both, = ..._post)
mlp_adds                      hook_resid_mid + hook_mlp_out = hook_resid_post
heads_write                   hook_z @ W_O + b_O = hook_attn_out
neurons_write                 hook_post @ W_out + b_out = hook_mlp_out
neurons_read                  the MLP reads the normed input through W_gate and W_in
norm_before_attention         ln1.hook_normalized = norm(hook_resid_pre)
norm_before_mlp               ln2.hook_normalized = norm(hook_resid_mid), of hook_resid_pre in parallel blocks
pattern_weighs_values         hook_z = hook_pattern @ hook_v, each value repeated for the queries that share it
pattern_is_softmax            hook_pattern = softmax(hook_attn_scores), over the keys that a query sees
pattern_sums_to_one           no part of a query's attention goes to no key (as to a learned sink logit)
dense_mlp                     hook_post has an activation for every row of W_out
============================  ==========================================================================================

Biases cancel: weights are held against deviations from the mean over tokens. The error is the largest norm of a
difference over the norm of the right-hand side, of any token.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import NotApplicableError
from sinklens.models.state import current_stamp, in_usual_state
from sinklens.models.view import (
    BlockWeights,
    Model,
    ModelShape,
    device_of,
    dtype_of,
    has_hook,
    hooked,
    model_id,
    model_shape,
    vocabulary_size,
    without_hooks,
)
from sinklens.sites import LN2_NORMALIZED, MLP_POST, PATTERN, ROT_K, ROT_Q, SITES, HookSite, unit_count

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error that rounding may make: activations are compared in float32, so a sublayer's output rounds once."""
N_TOKENS = 13
"""Tokens of the pass, in each of two prompts: a number that is hardly that of anything else in a model."""

Acts = Mapping[str, Tensor]
"""Activations of one block by what follows ``blocks.{layer}.`` in the name of their hook point."""
Sides = tuple[Tensor, Tensor]
"""What an identity says, and what the model has."""


@dataclass(frozen=True)
class Identity:
    """Something that a block computes, as an equation."""

    name: str
    """Its name."""
    formula: str
    """The equation."""
    means: str
    """What cannot be said where it does not hold."""
    hooks: tuple[str, ...]
    """Hook points that it is about."""
    results: tuple[str, ...]
    """Those of them on the side that is computed from the other."""
    sides: Callable[[Model, int, Acts], Sides]
    """``(model, block, activations) -> (left, right)``, ``[token, ...]``."""


@dataclass(frozen=True)
class Identities:
    """How far each identity is from holding in each block of a model."""

    model: str
    """The model's name."""
    tolerance: float
    """The largest error that is still rounding."""
    errors: Mapping[str, tuple[float, ...]]
    """Name of the identity to its relative error in every block; infinite where the block lacks what it is about."""
    missing: Mapping[tuple[str, int], str]
    """What a block lacks, by identity and block."""
    fired: frozenset[str]
    """Hook points, of those that are looked at, that the model computes: not all that it has a name for."""
    odd: Mapping[str, str]
    """What is wrong with the layout of an activation, by hook point: its axes or sizes are not those of its site."""

    def holds(self, name: str, layers: Sequence[int] | None = None) -> bool:
        """Whether an identity holds in some blocks (in all by default)."""
        errors = self.errors[name]
        return all(errors[layer] <= self.tolerance for layer in (range(len(errors)) if layers is None else layers))

    def check_layout(self, template: str, layers: Sequence[int]) -> None:
        """Make sure that an activation has the axes and sizes that its site says.

        Raises:
            NotApplicableError: it does not.
        """
        for name in (template.format(layer=layer) for layer in layers):
            if name in self.odd:
                raise NotApplicableError(f"{self.model}: {name} {self.odd[name]}")

    def check_computed(self, template: str, layers: Sequence[int]) -> None:
        """Make sure that the model computes a hook point (``blocks.{layer}.hook_mlp_out``) in some blocks, as laid out.

        Raises:
            NotApplicableError: it does not.
        """
        looked_at = template.removeprefix("blocks.{layer}.") in HOOKS
        names = [template.format(layer=layer) for layer in layers] if looked_at else []
        if silent := [name for name in names if name not in self.fired]:
            raise NotApplicableError(f"{self.model} does not compute {silent[0]}")
        self.check_layout(template, layers)

    def require(self, name: str, layers: Sequence[int]) -> None:
        """Make sure that an identity holds in some blocks.

        Raises:
            NotApplicableError: it does not; the message has the size of the failure and what follows from it.
        """
        bad = [layer for layer in layers if not self.holds(name, (layer,))]
        if not bad:
            return
        identity, layer = IDENTITIES[name], max(bad, key=lambda layer: self.errors[name][layer])
        why = self.missing.get((name, layer))
        if why is None:
            off = f"off by {self.errors[name][layer]:.2g} of its size in block {layer}"
            why = f"{self.model} does not have {identity.formula} ({off})"
        raise NotApplicableError(f"{why}: {identity.means}")


def identities(model: Model) -> Identities:
    """What holds in ``model``, measured when it is first asked and again after its weights have changed."""
    stamp = current_stamp(model)
    if model not in _MEASURED or _MEASURED[model][0] != stamp:
        _MEASURED[model] = (stamp, _measure(model))
    return _MEASURED[model][1]


_MEASURED: weakref.WeakKeyDictionary[Model, tuple[object, Identities]] = weakref.WeakKeyDictionary()


def require(model: Model, name: str, layers: Sequence[int]) -> None:
    """Make sure that an identity holds in some blocks of ``model`` (see :meth:`Identities.require`).

    Raises:
        NotApplicableError: it does not.
    """
    identities(model).require(name, layers)


def block_weights(model: Model, layer: int) -> BlockWeights:
    """The weights of block ``layer``, of which each is looked up when it is asked for.

    Raises:
        NotApplicableError: what attention or MLP writes is not what is added to the residual stream (a norm stands
            behind the sum), so that no weight says what the block does to it.
    """
    measured = identities(model)
    measured.require("attention_adds", (layer,))
    if f"blocks.{layer}.hook_mlp_out" in measured.fired:
        measured.require("mlp_adds", (layer,))
    return BlockWeights(model, layer)


def check_writes_directly(model: Model, layer: int) -> None:
    """Make sure that what an MLP's neurons write is what is added to the residual stream.

    Raises:
        NotApplicableError: a norm, a multiplier or an adapter stands between the two.
    """
    measured = identities(model)
    measured.require("neurons_write", (layer,))
    measured.require("mlp_adds", (layer,))


def is_unnormalised(model: Model) -> bool:
    """Whether some block's attention weights neither sum to one nor are a softmax of which a part goes to no key.

    Their shares are of a row's sum (:func:`sinklens.metrics.normalised_rows`).
    """
    measured = identities(model)
    layers = range(len(measured.errors["pattern_is_softmax"]))
    names = ("pattern_is_softmax", "pattern_sums_to_one")
    return any(
        not any(measured.holds(name, (layer,)) or (name, layer) in measured.missing for name in names)
        for layer in layers
    )


# --- The measurement -------------------------------------------------------------------------------------------------


@in_usual_state
def _measure(model: Model) -> Identities:
    n_layers = model_shape(model).n_layers
    errors: dict[str, list[float]] = {name: [] for name in IDENTITIES}
    missing: dict[tuple[str, int], str] = {}
    held = activations(model)
    fired = frozenset(f"blocks.{layer}.{name}" for layer, name in held)
    layout = {place: _oddity(model_shape(model), place[1], act) for place, act in held.items()}
    odd = {f"blocks.{layer}.{name}": why for (layer, name), why in layout.items() if why}
    held = {place: by_token(act, place[1]) for place, act in held.items() if not layout[place]}
    for layer in range(n_layers):
        acts = {name: act for name in HOOKS if (act := held.pop((layer, name), None)) is not None}
        for name, identity in IDENTITIES.items():
            try:
                error = error_of(*identity.sides(model, layer, acts))
            except LacksError as lack:
                missing[name, layer] = f"{model_id(model)} does not compute {lack} in block {layer}"
                error = float("inf")
            except NotApplicableError as lack:  # a weight that the block does not have
                missing[name, layer], error = str(lack), float("inf")
            errors[name].append(error)
    tolerance = TOLERANCE.get(dtype_of(model), 2e-2)
    return Identities(
        model_id(model), tolerance, {name: tuple(found) for name, found in errors.items()}, missing, fired, odd
    )


def probe_tokens(model: Model) -> Int[Tensor, "prompt pos"]:
    """The tokens that models are probed with."""
    ids = torch.arange(7, 7 + 2 * N_TOKENS * 3, 3, device=device_of(model))
    return ids.remainder(vocabulary_size(model)).view(2, N_TOKENS)


@contextmanager
def probing(model: Model, hooks: Sequence[tuple[str, Callable[[Tensor, object], Tensor | None]]]) -> Iterator[None]:
    """The model with these hooks alone and without warnings; to be called in its usual state."""
    with without_hooks(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hooked(model, hooks):
            yield


def keeper(held: dict[str, Tensor], name: str) -> Callable[[Tensor, object], None]:
    """A hook that keeps an activation in float32."""

    def hook(act: Tensor, hook: object) -> None:  # noqa: ARG001
        held[name] = act.detach().float()

    return hook


def by_token(act: Tensor, name: str) -> Tensor:
    """``[token, ...]``; attention keeps its axes, ``[prompt, head, query, key]``."""
    return act if "query" in _AXES[name] else act.flatten(0, 1)


def _oddity(shape: ModelShape, name: str, act: Tensor) -> str:
    """What is not as the axes of the hook point's site say; empty where all is."""
    site = HookSite(name, _AXES[name])
    sizes = {"batch": 2, "pos": N_TOKENS, "query": N_TOKENS, "key": N_TOKENS, site.unit_name: unit_count(site, shape)}
    wanted = [sizes.get(axis) for axis in site.axes]
    if act.ndim == len(wanted) and all(size in (None, n) for size, n in zip(wanted, act.shape, strict=True)):
        return ""
    axes = ", ".join(axis if size is None else f"{size} {axis}" for axis, size in zip(site.axes, wanted, strict=True))
    return f"is of shape {list(act.shape)} for 2 prompts of {N_TOKENS} tokens, and not [{axes}]"


def activations(model: Model, tokens: Int[Tensor, "row pos"] | None = None) -> dict[tuple[int, str], Tensor]:
    """Activations of one pass by block and hook, in float32; over the tokens that models are probed with by default."""
    held: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(model_shape(model).n_layers)}
    hooks = [
        (f"blocks.{layer}.{name}", keeper(acts, name))
        for layer, acts in held.items()
        for name in HOOKS
        if has_hook(model, f"blocks.{layer}.{name}")
    ]
    with probing(model, hooks):
        model(probe_tokens(model) if tokens is None else tokens, return_type=None)
    return {(layer, name): act for layer, acts in held.items() for name, act in acts.items()}


class LacksError(Exception):
    """A block does not have what an identity is about."""


def _act(acts: Acts, *names: str) -> list[Tensor]:
    for name in names:
        if name not in acts:
            raise LacksError(name)
    return [acts[name] for name in names]


def error_of(left: Tensor, right: Tensor) -> float:
    """The largest relative difference of any token."""
    if left.shape != right.shape:
        return float("inf")
    left = left.to(right.device)
    off, size = ((x.reshape(len(x), -1)).norm(dim=-1) for x in (left - right, right))
    found = (off / size.clamp_min(1e-12)).max().item()
    return found if found == found else float("inf")


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _but_for_rounding(model: Model, left: Tensor, right: Tensor) -> Sides:
    """Both sides less what is the same for all tokens, as a bias is; what rounding may do is let be.

    The whole is rounded, what is the same included, and that may be many times as large as the rest, or all there is.
    """
    difference, rest = _centred(left) - _centred(right), _centred(right)
    roundings = 0.5 if dtype_of(model).itemsize < 4 else 16  # in half precision the sums themselves are float32
    rounding = roundings * torch.finfo(dtype_of(model)).eps * right.norm(dim=-1, keepdim=True)
    size = difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rest + difference * (1 - rounding / size).clamp_min(0), rest


def _attention_adds(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    if "hook_resid_mid" in acts:
        pre, out, mid = _act(acts, "hook_resid_pre", "hook_attn_out", "hook_resid_mid")
        return pre + out, mid
    pre, out, post = _act(acts, "hook_resid_pre", "hook_attn_out", "hook_resid_post")
    return pre + out + acts.get("hook_mlp_out", torch.zeros_like(pre)), post


def _mlp_adds(model: Model, layer: int, acts: Acts) -> Sides:
    if "hook_resid_mid" not in acts:
        _act(acts, "hook_mlp_out")
        return _attention_adds(model, layer, acts)
    mid, out, post = _act(acts, "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    return mid + out, post


def _heads_write(model: Model, layer: int, acts: Acts) -> Sides:
    z, out = _act(acts, "attn.hook_z", "hook_attn_out")
    W_O = BlockWeights(model, layer).W_O.detach().float()
    if z.shape[1:] != W_O.shape[:2]:
        raise LacksError(f"a hook_z of the shape of W_O ({tuple(z.shape[1:])}, {tuple(W_O.shape[:2])})")
    return _but_for_rounding(model, (z.flatten(1).to(W_O.device) @ W_O.flatten(0, 1)).to(out.device), out)


def _neurons_write(model: Model, layer: int, acts: Acts) -> Sides:
    W_out = BlockWeights(model, layer).W_out.detach().float()  # refuses a mixture of experts
    post, out = _act(acts, "mlp.hook_post", "hook_mlp_out")
    return _but_for_rounding(model, (post.to(W_out.device) @ W_out).to(out.device), out)


def _neurons_read(model: Model, layer: int, acts: Acts) -> Sides:
    weights = BlockWeights(model, layer)
    W_in, W_gate = weights.W_in.detach().float(), weights.W_gate
    normed = "ln2.hook_normalized" if "ln2.hook_normalized" in acts else "ln1.hook_normalized"
    x, pre = _act(acts, normed, "mlp.hook_pre")
    x = (x * weights.ln2_w.detach().float().to(x.device)).to(W_in.device)
    if W_gate is None:
        return _but_for_rounding(model, (x @ W_in).to(pre.device), pre)
    (linear,) = _act(acts, "mlp.hook_pre_linear")
    left = torch.cat([x @ W_gate.detach().float(), x @ W_in], -1)
    return _but_for_rounding(model, left.to(pre.device), torch.cat([pre, linear.to(pre.device)], -1))


def _normed(model: Model, x: Tensor) -> Tensor:
    shape = model_shape(model)
    x = x - x.mean(-1, keepdim=True) if shape.norm == "layer" else x
    return x / (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt()


def _norm_before_attention(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    pre, normalized = _act(acts, "hook_resid_pre", "ln1.hook_normalized")
    return _normed(model, pre), normalized


def _norm_before_mlp(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    into = "hook_resid_mid" if "hook_resid_mid" in acts else "hook_resid_pre"
    normed = "ln2.hook_normalized" if "ln2.hook_normalized" in acts else "ln1.hook_normalized"
    x, normalized = _act(acts, into, normed)
    return _normed(model, x), normalized


def _pattern_is_softmax(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    scores, pattern = _act(acts, "attn.hook_attn_scores", "attn.hook_pattern")
    # Masked here and not by the scores: some bridges mask behind the hook point.
    seen = scores.masked_fill(pattern == 0, -torch.inf)
    return seen.softmax(-1).nan_to_num(), pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-12)


def _pattern_weighs_values(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    pattern, v, z = _act(acts, "attn.hook_pattern", "attn.hook_v", "attn.hook_z")
    v = v.view(-1, N_TOKENS, *v.shape[1:])
    if pattern.shape[1] % v.shape[2]:
        raise LacksError("as many values as keys")
    values = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values.to(pattern.device))
    return mixed.flatten(0, 1), z.to(mixed.device)


def _pattern_sums_to_one(model: Model, layer: int, acts: Acts) -> Sides:  # noqa: ARG001
    (pattern,) = _act(acts, "attn.hook_pattern")
    total = pattern.sum(-1)
    return total, torch.ones_like(total)


def _dense_mlp(model: Model, layer: int, acts: Acts) -> Sides:
    W_out = BlockWeights(model, layer).W_out
    (post,) = _act(acts, "mlp.hook_post")
    return torch.tensor([float(post.shape[-1])]), torch.tensor([float(len(W_out))])


_RESIDUAL = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
IDENTITIES: dict[str, Identity] = {
    identity.name: identity
    for identity in (
        Identity(
            "attention_adds",
            "hook_resid_pre + hook_attn_out = hook_resid_mid",
            "what its attention writes is not what is added to the residual stream",
            _RESIDUAL,
            ("hook_resid_mid", "hook_resid_post"),
            _attention_adds,
        ),
        Identity(
            "mlp_adds",
            "hook_resid_mid + hook_mlp_out = hook_resid_post",
            "what its MLPs write is not what is added to the residual stream",
            _RESIDUAL,
            ("hook_resid_post",),
            _mlp_adds,
        ),
        Identity(
            "heads_write",
            "hook_z @ W_O + b_O = hook_attn_out",
            "what a head adds to the residual stream cannot be read off W_O",
            ("attn.hook_z", "hook_attn_out"),
            ("hook_attn_out",),
            _heads_write,
        ),
        Identity(
            "neurons_write",
            "hook_post @ W_out + b_out = hook_mlp_out",
            "a neuron's contribution to the residual stream cannot be read off W_out",
            ("mlp.hook_post", "hook_mlp_out"),
            ("hook_mlp_out",),
            _neurons_write,
        ),
        Identity(
            "neurons_read",
            "hook_pre = ln2.hook_normalized * w @ W_gate (or W_in) + b",
            "what a neuron reads cannot be read off W_gate and W_in",
            ("ln1.hook_normalized", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_pre_linear"),
            ("mlp.hook_pre", "mlp.hook_pre_linear"),
            _neurons_read,
        ),
        Identity(
            "norm_before_attention",
            "ln1.hook_normalized = norm(hook_resid_pre)",
            "no norm stands between the residual stream and attention",
            ("hook_resid_pre", "ln1.hook_normalized"),
            ("ln1.hook_normalized",),
            _norm_before_attention,
        ),
        Identity(
            "norm_before_mlp",
            "ln2.hook_normalized = norm(hook_resid_mid)",
            "no norm stands between the residual stream and the MLP",
            ("hook_resid_mid", "hook_resid_pre", "ln1.hook_normalized", "ln2.hook_normalized"),
            ("ln1.hook_normalized", "ln2.hook_normalized"),
            _norm_before_mlp,
        ),
        Identity(
            "pattern_is_softmax",
            "hook_pattern = softmax(hook_attn_scores)",
            "its attention weights are not the softmax of its scores",
            ("attn.hook_attn_scores", "attn.hook_pattern"),
            ("attn.hook_pattern",),
            _pattern_is_softmax,
        ),
        Identity(
            "pattern_weighs_values",
            "hook_z = hook_pattern @ hook_v",
            "its attention pattern is not what its values are weighed with",
            ("attn.hook_pattern", "attn.hook_v", "attn.hook_z"),
            ("attn.hook_z",),
            _pattern_weighs_values,
        ),
        Identity(
            "pattern_sums_to_one",
            "hook_pattern.sum(-1) = 1",
            "a part of the attention goes to no key",
            ("attn.hook_pattern",),
            ("attn.hook_pattern",),
            _pattern_sums_to_one,
        ),
        Identity(
            "dense_mlp",
            "one hook_post for every row of W_out",
            "there are no neurons that all tokens share",
            ("mlp.hook_post",),
            ("mlp.hook_post",),
            _dense_mlp,
        ),
    )
}
_AXES: dict[str, tuple[str, ...]] = {
    **{
        site.template.removeprefix("blocks.{layer}."): site.axes
        for site in (*SITES.values(), ROT_Q, ROT_K, LN2_NORMALIZED)
    },
    "attn.hook_attn_scores": PATTERN.axes,
    "mlp.hook_pre": MLP_POST.axes,
    "mlp.hook_pre_linear": MLP_POST.axes,
}
"""The axes of every hook point that is looked at."""
_OTHERS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k")
HOOKS = tuple(dict.fromkeys([*(hook for identity in IDENTITIES.values() for hook in identity.hooks), *_OTHERS]))
"""What is looked at in every block."""
