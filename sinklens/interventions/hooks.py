"""Ready-made causal hooks, for ``model.run_with_hooks(tokens, fwd_hooks=...)`` and ``with model.hooks(...)``.

Every function returns a list of ``(hook point name, function)`` pairs; the functions are plain ``(tensor, hook)`` hooks
that return new tensors, and they work on ``HookedTransformer`` and on ``TransformerBridge``::

    with model.hooks(sl.interventions.block_aggregation(position=10, layers=range(12))):
        logits = model(tokens)

They are built from the same edits as the engine's patches. Use them for single runs and exploration, and
:func:`sinklens.run_patches` for sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens import edits
from sinklens.edits.mechanism import check_amplification
from sinklens.engine.apply import Op, apply_edit, gather
from sinklens.engine.places import group_of, pairs_of
from sinklens.errors import InputError
from sinklens.models.identities import block_weights, check_writes_directly
from sinklens.models.view import Model, model_shape
from sinklens.patches import Patch
from sinklens.records.integers import whole_number, whole_numbers
from sinklens.sites import ATTN_OUT, MLP_OUT, MLP_POST, PATTERN, RESID_POST, HookSite, K, V, Z

Hook = Callable[[Tensor, Any], Tensor | None]
Hooks = list[tuple[str, Hook]]
Mode = Literal["zero", "mean", "resample"]


def hooks_of(patch: Patch, source: Mapping[str, Tensor] | None = None) -> Hooks:
    """The hooks that apply ``patch`` to every row of whatever batch is run.

    Args:
        patch: the patch; its ``run`` is ignored. Empty ``positions`` mean all of them.
        source: for edits that use one, hook-point name to the source activation ``[batch, pos, ...]``, as in a
            TransformerLens cache.

    Raises:
        InputError: no units where some are to be chosen, or a negative block, position or unit. From the hooks: a
            position, unit or prompt that the run, or the source, does not have.
    """
    for part in patch.parts:
        if part.units == ():
            raise InputError("choose at least one neuron, dimension or head")
        positions = tuple(position for row in part.where.rows for position in row)
        for name, numbers in (("blocks", part.layers), ("positions", positions), ("units", part.units or ())):
            if any(number < 0 for number in numbers):
                raise InputError(f"{name} count from 0, but {tuple(numbers)} has a negative one")
    writers: Hooks = []
    readers: Hooks = []
    for part in patch.parts:
        for layer in part.layers:
            live: dict[str, Tensor] = {}
            writers.append((part.site.at(layer), _writer(part, layer, live, source)))
            for place in part.edit.reads_in(layer):
                readers.append((place.site.at(place.layer), _reader(place.key, live)))
    # What is read at a hook point is read as edited: there a reader stands behind the writers.
    edited = {name for name, _ in writers}
    early = [(name, hook) for name, hook in readers if name not in edited]
    late = [(name, hook) for name, hook in readers if name in edited]
    return [*early, *writers, *late]


def _one(value: int, what: str) -> tuple[int]:
    return (whole_number(value, what),)


def _op(patch: Patch, layer: int, act: Tensor) -> Op:
    """The edit at the patch's positions of every row of ``act``; no positions mean all of them."""
    length = act.shape[patch.site.pos_axis]
    _check_places(patch, act)
    placed = patch if any(patch.where.rows) else replace(patch, positions=tuple(range(length)))
    group = group_of(placed, act.device)
    rows = torch.arange(len(act), device=act.device)
    pairs = pairs_of(group, torch.zeros_like(rows), rows)
    return Op(
        patch.site,
        layer,
        patch.edit,
        (pairs.of, pairs.positions),
        pairs.of,
        pairs.positions,
        pairs.units,
        source_positions=pairs.source_positions,
    )


def _check_places(patch: Patch, act: Tensor) -> None:
    """Refuse places that ``act`` does not have, in which an index would raise, or bring a GPU down."""
    length, what = act.shape[patch.site.pos_axis], f"the edit {patch.edit.name!r} at {patch.site.template}"
    if not patch.where.shared and len(patch.where.rows) != len(act):
        raise InputError(f"{what} has positions for {len(patch.where.rows)} prompts, but the batch has {len(act)}")
    beyond = [position for row in patch.where.rows for position in row if position >= length]
    if beyond:
        raise InputError(f"{what} is for position {beyond[0]}, but the run has positions 0..{length - 1}")
    if patch.units is None:
        return
    if patch.site.unit_name is None:
        raise InputError(f"{patch.site.template} has no units to choose: leave them out")
    size = patch.site.to_canonical(act).shape[2]
    if not all(unit < size for unit in patch.units):
        raise InputError(f"{what} is for unit {max(patch.units)}, but there are {size} ({patch.site.unit_name})")


def _check_values(patch: Patch, layer: int, act: Tensor) -> None:
    """Refuse values of another size than the activation's, which would be broadcast or picked from wrongly."""
    edit = patch.edit
    if not isinstance(edit, edits.Constant | edits.PerPrompt) or edit.values is None:
        return
    values, shape = tuple(edit.values[layer].shape), tuple(patch.site.to_canonical(act).shape[2:])
    wanted = shape if isinstance(edit, edits.Constant) else (len(act), *shape)
    if values != wanted:
        raise InputError(f"the edit {edit.name!r} at {patch.site.at(layer)} needs values {wanted}, but got {values}")


def _check_source(op: Op, name: str, source: Mapping[str, Tensor], pos_axis: int) -> None:
    """Refuse a source run without the hook point, the prompts or the positions that are asked of it."""
    if name not in source:
        raise InputError(f"the source run has no {name!r}, which the edit {op.edit.name!r} takes: cache it there")
    assert op.source_positions is not None
    n_prompts, length = len(source[name]), source[name].shape[pos_axis]
    prompts, positions = int(op.prompts.max()) + 1, int(op.source_positions.max()) + 1
    if prompts > n_prompts or positions > length:
        raise InputError(
            f"the edit {op.edit.name!r} needs {prompts} prompts and {positions} positions of {name!r}, but the source "
            f"run has {n_prompts} and {length}: run both on the same prompts"
        )


def _reader(key: str, live: dict[str, Tensor]) -> Hook:
    def read(act: Tensor, hook: Any) -> None:  # noqa: ARG001
        live[key] = act

    return read


def _writer(patch: Patch, layer: int, live: dict[str, Tensor], source: Mapping[str, Tensor] | None) -> Hook:
    def source_of(op: Op, site: HookSite, block: int) -> Tensor:
        if source is None:
            raise InputError(f"the edit {op.edit.name!r} needs the source run's activations")
        assert op.source_positions is not None
        name, units = site.at(block), op.units if site == op.site else None
        _check_source(op, name, source, site.pos_axis)
        return gather(site.to_canonical(source[name]), (op.prompts, op.source_positions), units)

    def write(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        _check_values(patch, layer, act)
        op, edited = _op(patch, layer, act), act.clone()
        places = patch.edit.reads_in(layer)
        reads = {place.key: gather(place.site.to_canonical(live[place.key]), op.address, None) for place in places}
        apply_edit(patch.site.to_canonical(edited), op, reads, source_of, None)
        return edited

    return write


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

    def edit_for(layer: int, act: Tensor) -> edits.Edit:
        amplified = edits.amplification({layer: act}, at[0], strength, axis)
        if mean is not None:
            amplified = replace(amplified, mean={layer: mean[layer]})
        return edits.SameNormScaling(of=amplified) if norm_only else amplified

    def hook_for(layer: int) -> Hook:
        def amplify(act: Tensor, hook: Any) -> Tensor | None:
            if mean is None and axis == "prompts" and len(act) < 2:
                raise InputError("the mean over prompts needs at least two: pass more prompts, or a mean")
            patch = Patch(Z, (layer,), at, edit_for(layer, act))
            return hooks_of(patch)[0][1](act, hook)

        return amplify

    return [(Z.at(layer), hook_for(layer)) for layer in blocks]


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
