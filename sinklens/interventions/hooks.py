"""Ready-made causal hooks, for ``model.run_with_hooks(tokens, fwd_hooks=...)`` and ``with model.hooks(...)``.

Every function returns a list of ``(hook point name, function)`` pairs; the functions are plain ``(tensor, hook)`` hooks
that return new tensors, and they work on ``HookedTransformer`` and on ``TransformerBridge``::

    with model.hooks(sl.interventions.block_aggregation(position=10, layers=range(12))):
        logits = model(tokens)

They are built from the same edits as the engine's patches. Use them for single runs, exploration and
generation (positions count from the prompt's first token, with a key-value cache too), and :func:`sinklens.run_patches`
for sweeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens import edits
from sinklens.edits.mechanism import check_amplification
from sinklens.errors import InputError
from sinklens.interventions.cached import Span
from sinklens.interventions.patched import Hooks, first_of, hooks_of, seers, with_patch
from sinklens.models.identities import block_weights, check_writes_directly
from sinklens.models.view import Model, model_shape
from sinklens.patches import Patch
from sinklens.records.integers import whole_number, whole_numbers
from sinklens.sites import ATTN_OUT, MLP_OUT, MLP_POST, PATTERN, RESID_POST, HookSite, K, V, Z

Mode = Literal["zero", "mean", "resample"]


def _one(value: int, what: str) -> tuple[int]:
    return (whole_number(value, what),)


def block_aggregation(position: int, layers: Sequence[int]) -> Hooks:
    """Let the token at ``position`` attend only to itself in ``layers``: nothing is averaged into its value."""
    return hooks_of(Patch(PATTERN, whole_numbers(layers, "layers"), _one(position, "position"), edits.AttendSelf()))


def amplify_variance(
    position: int,
    layers: Sequence[int],
    strength: float,
    mean: Mapping[int, Float[Tensor, "head d_head"]] | None = None,
    *,
    axis: edits.MeanAxis = "prompts",
    norm_only: bool = False,
) -> Hooks:
    """Amplify the deviation of the aggregated value: ``z' = mu + strength * (z - mu)`` at ``position``.

    Args:
        position: token position.
        layers: blocks.
        strength: the factor lambda; 1 changes nothing.
        mean: mu for every block, ``[head d_head]`` (or ``[prompt head d_head]``); by default it is taken over ``axis``
            in the run that is being edited. A sink pair takes the clean run's, which is not the same once an earlier
            block has been edited.
        axis: mu is the mean over the prompts of the batch at that position (needs at least two), over the positions of
            each prompt, or over both.
        norm_only: the control: scale ``z`` uniformly to the norm that the amplified one has.

    Raises:
        InputError: when the mean is to be taken over a batch of one prompt; another axis; no finite strength; a block
            without a mean.
    """
    check_amplification(strength, axis)
    at, blocks = _one(position, "position"), whole_numbers(layers, "layers")
    if mean is not None and not set(blocks) <= set(mean):
        raise InputError(f"mean has no block {min(set(blocks) - set(mean))}: give one for every block of {blocks}")

    def edit_for(layer: int, act: Tensor, index: int) -> edits.Edit:
        amplified = edits.amplification({layer: act}, index, strength, axis)
        if mean is not None:
            amplified = replace(amplified, mean={layer: mean[layer]})
        return edits.SameNormScaling(of=amplified) if norm_only else amplified

    def hooks_for(layer: int) -> Hooks:
        span = Span(f"amplify_variance at {Z.at(layer)}")

        def amplify(act: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            first = first_of(span, Z, act)
            _check_mean(mean is None, axis, len(act), first)
            if at[0] < first:
                return None
            return with_patch(Patch(Z, (layer,), at, edit_for(layer, act, at[0] - first)), layer, act, first, {}, None)

        return [*seers(Z, layer, span), (Z.at(layer), amplify)]

    return [hook for layer in blocks for hook in hooks_for(layer)]


def _check_mean(own: bool, axis: edits.MeanAxis, n_prompts: int, first: int) -> None:
    """Refuse a mean, over the run that is being edited, which this pass does not have."""
    if own and axis == "prompts" and n_prompts < 2:
        raise InputError("the mean over prompts needs at least two: pass more prompts, or a mean")
    if own and axis != "prompts" and first > 0:
        raise InputError(
            f"the mean over {axis} changes with every token that is generated: pass a mean, or leave the cache off "
            "(use_past_kv_cache=False)"
        )


def _ablation(layer: int, mode: Mode, values: Tensor | None) -> edits.Edit:
    if mode == "zero" and values is None:
        return edits.Constant()
    if mode == "zero":
        raise InputError("zero ablation takes no values: leave them out, or choose mean or resample")
    if mode not in ("mean", "resample"):
        raise InputError(f"unknown mode {mode!r}: zero, mean or resample")
    if values is None:
        raise InputError(f"{mode} ablation needs values: the mean [unit ...], or one value for each prompt")
    if mode == "mean":
        return edits.Constant("mean", {layer: values})
    return edits.PerPrompt("resample", {layer: values})


def ablate_neurons(
    layer: int,
    neurons: Sequence[int],
    positions: Sequence[int] = (),
    mode: Mode = "zero",
    values: Float[Tensor, "... d_mlp"] | None = None,
) -> Hooks:
    """Ablate MLP neurons of a block at ``positions`` (all by default).

    ``values`` is ``[d_mlp]`` for ``mode="mean"``, ``[prompt d_mlp]`` for ``"resample"``.
    """
    edit = _ablation(layer, mode, values)
    return hooks_of(Patch(MLP_POST, _one(layer, "layer"), positions, edit, whole_numbers(neurons, "neurons")))


def ablate_dims(
    layer: int,
    dims: Sequence[int],
    positions: Sequence[int] = (),
    mode: Mode = "zero",
    values: Float[Tensor, "... d_model"] | None = None,
    site: HookSite = RESID_POST,
) -> Hooks:
    """Ablate dimensions of the residual stream after a block (or at another ``site`` that is ``d_model`` wide)."""
    edit = _ablation(layer, mode, values)
    return hooks_of(Patch(site, _one(layer, "layer"), positions, edit, whole_numbers(dims, "dims")))


def ablate_heads(
    layer: int,
    heads: Sequence[int],
    positions: Sequence[int] = (),
    mode: Mode = "zero",
    values: Float[Tensor, "... head d_head"] | None = None,
) -> Hooks:
    """Ablate the outputs (``hook_z``) of attention heads at ``positions`` (all by default)."""
    edit = _ablation(layer, mode, values)
    return hooks_of(Patch(Z, _one(layer, "layer"), positions, edit, whole_numbers(heads, "heads")))


def densify_down_projection(
    model: Model, layer: int, neurons: Sequence[int], positions: Sequence[int] = (), seed: int = 0
) -> Hooks:
    """Let ``neurons`` write with randomly rotated rows of W_out: same norms, spread over all dimensions.

    Raises:
        NotApplicableError: a row of W_out is not what its neuron adds to the residual stream.
        InputError: a neuron that the block does not have, or one that is given twice.
    """
    check_writes_directly(model, layer)
    W_out, chosen = block_weights(model, layer).W_out.detach(), whole_numbers(neurons, "neurons")
    if len(set(chosen)) != len(chosen) or not all(0 <= neuron < len(W_out) for neuron in chosen):
        raise InputError(f"neurons {chosen} must be different ones in 0..{len(W_out) - 1}")
    rows = W_out[list(chosen)].float()
    rotated = edits.rotate_rows(rows, torch.Generator().manual_seed(seed))
    edit = edits.DensifyRows("densified", chosen, rows, rotated)
    return hooks_of(Patch(MLP_OUT, _one(layer, "layer"), positions, edit))


def permute_z(model: Model, position: int, layers: Sequence[int], seed: int = 0) -> Hooks:
    """Permute the aggregated value within each head at ``position``: the same variance, misaligned with W_O."""
    shape = model_shape(model)
    order = edits.random_permutations(shape.n_heads, shape.d_head, torch.Generator().manual_seed(seed))
    return hooks_of(
        Patch(Z, whole_numbers(layers, "layers"), _one(position, "position"), edits.PermuteWithin("permuted_z", order))
    )


def transplant(
    site: HookSite,
    source: Mapping[str, Tensor],
    position: int,
    layers: Sequence[int],
    units: Sequence[int] | None = None,
) -> Hooks:
    """Put another run's activations at ``position`` in the place of this run's.

    ``source`` maps hook-point names to activations of the same prompts, such as a TransformerLens cache.
    """
    chosen = None if units is None else whole_numbers(units, "units")
    return hooks_of(
        Patch(site, whole_numbers(layers, "layers"), _one(position, "position"), edits.Transplant(), chosen), source
    )


def transplant_keys(source: Mapping[str, Tensor], position: int, layers: Sequence[int]) -> Hooks:
    """Transplant the keys (before rotary embedding) of one position."""
    return transplant(K, source, position, layers)


def transplant_values(source: Mapping[str, Tensor], position: int, layers: Sequence[int]) -> Hooks:
    """Transplant the values of one position."""
    return transplant(V, source, position, layers)


def transplant_attention_output(source: Mapping[str, Tensor], position: int, layers: Sequence[int]) -> Hooks:
    """Transplant what attention adds to the residual stream at one position."""
    return transplant(ATTN_OUT, source, position, layers)
