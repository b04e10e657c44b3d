"""Checks of what the engine is asked to do, before any of it is done.

A block, position or unit that does not exist would raise in the middle of a forward pass, or on a GPU bring the process
down; here each is one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.view import Model, ModelShape, device_of, model_shape
from sinklens.patches import Patch, Runs, positions_of
from sinklens.readouts.base import Readout
from sinklens.sites import LOGITS


def validate(
    model: Model,
    tokens: Tensor,
    patches: Sequence[Patch],
    readouts: Sequence[Readout],
    runs: Runs,
) -> None:
    """Refuse places, names and runs that do not exist.

    Raises:
        InputError: with what is wrong, and which patch or readout it is in.
    """
    shape, (n_prompts, length) = model_shape(model), tokens.shape
    if device_of(model).type == "mps":
        raise InputError("PyTorch's MPS backend gives silently wrong results here: use --device cpu or cuda")
    if length > shape.n_ctx:
        raise InputError(f"prompts of {length} tokens are longer than the model's context of {shape.n_ctx}")
    names = [readout.name for readout in readouts]
    if len(set(names)) != len(names):
        raise InputError(f"readout names must differ, got {names}")
    for readout in readouts:
        top = shape.n_layers + (readout.site == LOGITS)
        if not readout.layers or not all(0 <= layer < top for layer in readout.layers):
            raise InputError(
                f"readout {readout.name!r} asks for blocks {readout.layers} of a {shape.n_layers}-block model"
            )
    for run, roots in runs.items():
        for root in roots:
            if root.source is not None:
                raise InputError(f"root patches cannot have a source run, but one in {run!r} has: {root.describe()}")
            _validate_patch(root, shape, n_prompts, length)
    seen: set[tuple] = set()  # a sweep repeats few places in thousands of patches
    for patch in patches:
        places = (patch.site, patch.layers, patch.positions, patch.units, patch.source and patch.source.positions)
        if places not in seen:
            _validate_patch(patch, shape, n_prompts, length)
            seen.add(places)
        if patch.run not in runs or (patch.source is not None and patch.source.run not in runs):
            unknown = min({patch.run, *([patch.source.run] if patch.source else [])} - set(runs))
            raise InputError(f"unknown run {unknown!r} in patch {patch.describe()}; the runs are {sorted(runs)}")


def _validate_patch(patch: Patch, shape: ModelShape, n_prompts: int, length: int) -> None:
    n_layers = shape.n_layers
    if not patch.layers or not all(0 <= layer < n_layers for layer in patch.layers):
        raise InputError(f"blocks {patch.layers} are not all in 0..{n_layers - 1}: {patch.describe()}")
    if len(set(patch.layers)) != len(patch.layers):
        raise InputError(f"blocks {patch.layers} repeat: {patch.describe()}")
    for places in (patch.positions, patch.source.positions if patch.source else None):
        if places is None:
            continue
        if places and isinstance(places[0], tuple) and len(places) != n_prompts:
            raise InputError(f"positions are given for {len(places)} prompts, but there are {n_prompts}")
        shared = not places or not isinstance(places[0], tuple)
        for prompt in range(1 if shared else n_prompts):
            mine = positions_of(places, prompt)
            if not mine or not all(0 <= p < length for p in mine):
                raise InputError(f"positions {mine} are not all in 0..{length - 1}: {patch.describe()}")
    if patch.units is not None:
        sizes = {"head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_mlp": shape.d_mlp, "d_model": shape.d_model}
        name = patch.site.unit_name
        if name is None:
            raise InputError(f"{patch.site.template} has no units to select: {patch.describe()}")
        if not patch.units or not all(0 <= unit < sizes[name] for unit in patch.units):
            raise InputError(f"units {patch.units} are not all in 0..{sizes[name] - 1} ({name}): {patch.describe()}")
