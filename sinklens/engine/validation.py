"""Checks of what the engine is asked to do, before any of it is done.

A block, position or unit that does not exist would raise in the middle of a forward pass, or on a GPU bring the process
down; here each is one sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from sinklens.engine.given import check_values
from sinklens.engine.sources import check_sources
from sinklens.errors import InputError
from sinklens.models.identities import identities
from sinklens.models.view import Model, ModelShape, device_of, model_shape
from sinklens.models.writes import check_writable
from sinklens.patches import Patch, Runs
from sinklens.prompts import check_ids
from sinklens.readouts.base import Readout
from sinklens.sites import LOGITS, unit_count


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
    check_ids(model, tokens)
    shape, (n_prompts, length) = model_shape(model), tokens.shape
    if device_of(model).type == "mps":
        raise InputError("PyTorch's MPS backend gives silently wrong results here: use device='cpu' or device='cuda'")
    if length > shape.n_ctx:
        raise InputError(f"prompts of {length} tokens are longer than the model's context of {shape.n_ctx}")
    _validate_readouts(model, readouts, shape)
    sizes = {"prompt": n_prompts, "pos": length, "query": length, "key": length}
    sizes |= {"head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_mlp": shape.d_mlp, "d_model": shape.d_model}
    check_sources(runs)
    for part in (part for roots in runs.values() for root in roots for part in root.parts):
        _validate_patch(part, shape, n_prompts, length)
        _validate_values(part, sizes)
    seen: set[tuple] = set()  # a sweep repeats few places, and edits, in thousands of patches
    for patch in patches:
        for part in patch.parts:
            places = (part.site, part.layers, part.positions, part.units, part.source and part.source.positions)
            if places not in seen:
                _validate_patch(part, shape, n_prompts, length)
                seen.add(places)
            if (id(part.edit), *places) not in seen:
                _validate_values(part, sizes)
                seen.add((id(part.edit), *places))
            _validate_runs(part, patch, runs)
    # Behind the places: these ask for blocks that are there.
    check_edits(model, [*patches, *(root for roots in runs.values() for root in roots)])


def _validate_readouts(model: Model, readouts: Sequence[Readout], shape: ModelShape) -> None:
    names = [readout.name for readout in readouts]
    if len(set(names)) != len(names):
        raise InputError(f"readout names must differ, got {names}")
    for readout in readouts:
        top = shape.n_layers + (readout.site == LOGITS)
        if not readout.layers or not all(0 <= layer < top for layer in readout.layers):
            raise InputError(
                f"readout {readout.name!r} asks for blocks {readout.layers} of a {shape.n_layers}-block model"
            )
    measured = identities(model)
    for readout in readouts:
        measured.check_layout(readout.site.template, readout.layers)


def _validate_values(part: Patch, sizes: Mapping[str, int]) -> None:
    """What an edit brings along fits the activations that it changes."""
    for layer in part.layers:
        check_values(part, layer, sizes, more_prompts=True)


def _validate_runs(part: Patch, patch: Patch, runs: Runs) -> None:
    if part.run not in runs or (part.source is not None and part.source.run not in runs):
        unknown = min({part.run, *([part.source.run] if part.source else [])} - set(runs))
        raise InputError(f"unknown run {unknown!r} in patch {part.describe()}; the runs are {sorted(runs)}")
    if part.run != patch.run:
        raise InputError(
            f"a patch and those that go with it are in one run, but {part.describe()} is in {part.run!r} and "
            f"not in {patch.run!r}"
        )


def _validate_patch(patch: Patch, shape: ModelShape, n_prompts: int, length: int) -> None:
    n_layers = shape.n_layers
    if not patch.layers or not all(0 <= layer < n_layers for layer in patch.layers):
        raise InputError(f"blocks {patch.layers} are not all in 0..{n_layers - 1}: {patch.describe()}")
    if len(set(patch.layers)) != len(patch.layers):
        raise InputError(f"blocks {patch.layers} repeat: {patch.describe()}")
    for where in (patch.where, patch.source_where):
        if not where.shared and len(where.rows) != n_prompts:
            raise InputError(f"positions are given for {len(where.rows)} prompts, but there are {n_prompts}")
        for positions in where.rows:
            if not positions:
                raise InputError(f"there is a prompt without positions: {patch.describe()}")
            if not all(0 <= p < length for p in positions):
                raise InputError(f"positions {positions} are not all in 0..{length - 1}: {patch.describe()}")
    if any(len(set(positions)) != len(positions) for positions in patch.where.rows):
        raise InputError(f"positions {patch.where} repeat: {patch.describe()}")
    _validate_reads(patch)
    if patch.units is not None:
        size = unit_count(patch.site, shape)
        if size is None:
            raise InputError(f"{patch.site.template} has no units to select: {patch.describe()}")
        name = patch.site.unit_name
        if not patch.units:
            raise InputError(f"no units are given; leave units out for all {size} ({name}): {patch.describe()}")
        if len(set(patch.units)) != len(patch.units):
            raise InputError(f"units {patch.units} repeat: {patch.describe()}")
        if not all(0 <= unit < size for unit in patch.units):
            raise InputError(f"units {patch.units} are not all in 0..{size - 1} ({name}): {patch.describe()}")


def check_edits(model: Model, patches: Sequence[Patch]) -> None:
    """Make sure that edits take effect where these patches are, and are what they say they are.

    Raises:
        NotApplicableError: the model goes on without what is written there, or does not compute what an edit needs.
    """
    written: dict[str, set[int]] = defaultdict(set)
    needing: dict[tuple[int, tuple[int, ...]], Patch] = {}
    for part in (part for patch in patches for part in patch.parts):
        written[part.site.template].update(part.layers)
        if part.edit.needs:
            needing[id(part.edit), part.layers] = part
    for template, layers in written.items():
        check_writable(model, template, sorted(layers))
    measured = identities(model)
    for part in needing.values():
        for identity in part.edit.needs:
            measured.require(identity, part.layers)


def _validate_reads(patch: Patch) -> None:
    for layer in patch.layers:
        for place in patch.edit.reads_in(layer):
            if not 0 <= place.layer <= layer:
                raise InputError(
                    f"the edit {patch.edit.name!r} in block {layer} reads block {place.layer}, but it can only read "
                    f"blocks up to its own: {patch.describe()}"
                )
