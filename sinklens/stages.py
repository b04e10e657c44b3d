"""The six stages of the proposed chain, and what a stage is.

A :class:`Stage` is a claim about *where* the effect passes: a site, blocks, units, and a readout that says how far it has
gone. Its :class:`Experiment`\\ s test the claim: a *transplant* (does the stage carry the effect?), *mechanism* edits
(by what the claim names?), and for each a *control* of equal size that should do nothing of the kind. ``predicted`` is
what the claim says the (denoise, noise) effects are. Isolating edits carry over only the mechanism: 1 and 1. Removing
edits take the mechanism away: putting what is left into the base run should not restore the sink (0), and taking it
out of the anchored run should remove it (1); for their controls it is the other way round.

The weight counterfactuals (permuted z, rotated W_out rows) are written as activation edits: no weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from sinklens import edits, metrics, readouts
from sinklens.errors import InputError
from sinklens.pairs import Direction
from sinklens.patches import Patch, Readout, per_prompt_index
from sinklens.setting import Setting
from sinklens.sites import ATTN_OUT, LN1_NORMALIZED, MLP_OUT, MLP_POST, K, Q, V, Z, HookSite

Build = Callable[[Setting, "Stage", Direction, Generator], Patch]
Prediction = tuple[float, float]

ISOLATED: Prediction = (1.0, 1.0)
"""Effects (denoise, noise) that the claim predicts when only the mechanism is carried over."""
REMOVED: Prediction = (0.0, 1.0)
"""And when only the mechanism is taken away."""
NOTHING: Prediction = (0.0, 0.0)
"""Control of an isolating edit: what is carried over is beside the point."""
SPARED: Prediction = (1.0, 0.0)
"""Control of a removing edit: what is taken away is beside the point."""


@dataclass(frozen=True)
class Experiment:
    """One edit of a stage, or a control of one."""

    edit: str
    """Name of the edit."""
    build: Build
    """``(setting, stage, direction, generator) -> Patch``."""
    predicted: Prediction
    """(denoise, noise) effect if the claim holds."""
    control: str = ""
    """What it is a control by; empty for the effect itself."""
    drawn: bool = False
    """Whether it has a random draw, and is repeated over several."""


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    """Short name."""
    claim: str
    """The claim, in one sentence."""
    site: HookSite
    """Where the effect passes."""
    layers: Callable[[Setting], tuple[int, ...]]
    """In which blocks."""
    experiments: tuple[Experiment, ...]
    """Transplant, mechanism edits and controls."""
    readout: Callable[[Setting, "Stage"], Readout]
    """How far the stage has gone, as one number for every prompt."""
    units: Callable[[Setting], tuple[int, ...] | None] = lambda _setting: None
    """Which units of the site; ``None``: all."""


REGISTRY: dict[str, Stage] = {}
"""Stages by name, for the command line; :func:`sinklens.run_chain` takes stages themselves and needs no registry."""


def register(stage: Stage) -> Stage:
    """Make ``stage`` known by its name.

    Raises:
        ValueError: when another stage has that name.
    """
    if stage.name in REGISTRY and REGISTRY[stage.name] is not stage:
        raise ValueError(f"a stage named {stage.name!r} is already registered")
    REGISTRY[stage.name] = stage
    return stage


def _transplant(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(
        direction, stage.site, stage.layers(setting), edits.Transplant(), units=stage.units(setting)
    )


def _elsewhere(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    positions = _other_positions(setting, generator)
    layers = stage.layers(setting)
    return setting.patch(direction, stage.site, layers, edits.Transplant(), units=stage.units(setting), positions=positions)


def _other_positions(setting: Setting, generator: Generator) -> tuple[tuple[int, ...], ...]:
    """An ordinary position of every prompt, after the target where there is one: earlier ones cannot differ."""
    marks = setting.pair.ordinary.clone()
    target = per_prompt_index(setting.pair.target, setting.batch.n)
    later = marks * (torch.arange(marks.shape[1]) > target[:, None])
    later[torch.arange(len(later)), per_prompt_index(setting.pair.reference, setting.batch.n)] = 0
    marks = torch.where(later.sum(-1, keepdim=True) > 0, later, marks)
    return tuple((p,) for p in torch.multinomial(marks, 1, generator=generator).flatten().tolist())


TRANSPLANT = Experiment("transplant", _transplant, ISOLATED)
"""Exchange the stage's activation at the target with the other run's."""
ELSEWHERE = Experiment("transplant", _elsewhere, NOTHING, control="other_position")
"""The same exchange at an ordinary position, another one in every prompt."""


def others(n: int, chosen: tuple[int, ...], generator: Generator, size: int | None = None) -> tuple[int, ...]:
    """Indices below ``n`` that are not ``chosen``: all, or ``size`` of them drawn at random.

    Raises:
        InputError: when there are not as many.
    """
    left = torch.tensor([i for i in range(n) if i not in set(chosen)])
    if size is None:
        return tuple(left.tolist())
    if size > len(left):
        raise InputError(f"a control of {size} other units was asked for, but only {len(left)} of {n} are left")
    return tuple(sorted(left[torch.randperm(len(left), generator=generator)[:size]].tolist()))


# 1. Value aggregation


def _moment_match(setting: Setting, stage: Stage, direction: Direction) -> edits.Rescale:
    layers = stage.layers(setting)
    run, _ = setting.pair.ends(direction)
    here = setting.pair.without if direction == "denoise" else setting.pair.with_sink
    if direction == "denoise":
        sinks = tuple((p,) for p in setting.formation.sink_positions)
        goal = setting.spread(replace(here, positions=None), stage.site, layers, sinks)
    else:
        goal = setting.spread(setting.pair.without, stage.site, layers)
    now = setting.spread(replace(here, run=run), stage.site, layers)
    mean = {layer: now[layer][0] for layer in layers}
    scale = {}
    for layer in layers:
        sigma = now[layer][1]
        # A dimension that does not vary over prompts has no deviation to rescale: leave it.
        scale[layer] = torch.where(sigma > 1e-6 * sigma.mean(), goal[layer][1] / sigma.clamp_min(1e-30), 1.0)
    return edits.Rescale("moment_match", mean, scale)


def _moments(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(direction, stage.site, stage.layers(setting), _moment_match(setting, stage, direction))


def _same_norm(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    edit = edits.SameNormScaling(of=_moment_match(setting, stage, direction))
    return setting.patch(direction, stage.site, stage.layers(setting), edit)


def _value_readout(setting: Setting, stage: Stage) -> Readout:
    statistics = {}
    layers = stage.layers(setting)
    for layer in layers:
        x = setting.ordinary(stage.site, layer, layers).flatten(1)
        statistics[layer] = (x.mean(0), (x - x.mean(0)).pow(2).mean())
    return readouts.deviation(stage.name, stage.site, layers, setting.pair.target, setting.batch.n, statistics)


VALUE_AGGREGATION = Stage(
    name="value_aggregation",
    claim="The aggregated value of a token that averages nothing is a high-variance outlier.",
    site=Z,
    layers=lambda setting: setting.up_to_formation,
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("moment_match", _moments, ISOLATED),
        Experiment("moment_match", _same_norm, NOTHING, control="same_norm"),
    ),
    readout=_value_readout,
)


# 2. W_O alignment


def reading_subspace(setting: Setting) -> Tensor:
    """Orthonormal basis ``[d_model rank]`` of what the super neurons read: their W_gate and W_in columns through ln2."""
    weights, neurons = setting.weights, list(setting.formation.neurons)
    columns = [w[:, neurons] for w in (weights.W_gate, weights.W_in) if w is not None]
    read = torch.cat(columns, -1).detach().float() * weights.ln2_w.detach().float()[:, None]
    return torch.linalg.qr(read.cpu()).Q


def _subspace(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    edit = edits.Subspace("reading_subspace", reading_subspace(setting))
    return setting.patch(direction, stage.site, stage.layers(setting), edit)


def _random_subspace(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    d_model, rank = reading_subspace(setting).shape
    edit = edits.Subspace("reading_subspace", edits.random_orthonormal(d_model, rank, generator))
    return setting.patch(direction, stage.site, stage.layers(setting), edit)


def _permuted(setting: Setting, direction: Direction, generator: Generator) -> edits.Edit:
    order = edits.random_permutations(setting.shape.n_heads, setting.shape.d_head, generator)
    return setting.removal(direction, edits.PermuteWithin("permuted_z", order))


def _permuted_z(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    return setting.patch(direction, Z, stage.layers(setting), _permuted(setting, direction, generator))


def _permuted_elsewhere(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    edit = _permuted(setting, direction, generator)
    return setting.patch(direction, Z, stage.layers(setting), edit, positions=_other_positions(setting, generator))


def _alignment_readout(setting: Setting, stage: Stage) -> Readout:
    basis = reading_subspace(setting)

    def combine(stack: Tensor) -> Tensor:
        return stack.sum(0).norm(dim=-1)

    return readouts.vector_readout(
        stage.name,
        stage.site,
        stage.layers(setting),
        setting.pair.target,
        setting.batch.n,
        lambda x, _layer: x.float() @ basis.to(x.device),
        combine,
    )


W_O_ALIGNMENT = Stage(
    name="w_o_alignment",
    claim="W_O passes that variance on, into the directions that the super neurons read.",
    site=ATTN_OUT,
    layers=lambda setting: setting.up_to_formation,
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("reading_subspace", _subspace, ISOLATED),
        Experiment("reading_subspace", _random_subspace, NOTHING, control="random_subspace", drawn=True),
        Experiment("permuted_z", _permuted_z, REMOVED, drawn=True),
        # Permuting z where the sink is not must leave the sink as it was in either run.
        Experiment("permuted_z", _permuted_elsewhere, NOTHING, control="other_position"),
    ),
    readout=_alignment_readout,
)


# 3. Super neurons


def _other_neurons(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    units = others(setting.shape.d_mlp, setting.formation.neurons, generator, len(setting.formation.neurons))
    return setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), units=units)


def _all_the_others(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    units = others(setting.shape.d_mlp, setting.formation.neurons, generator)
    return setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), units=units)


def _ablation_edit(setting: Setting, mode: str, generator: Generator) -> edits.Edit:
    layer = setting.formation.layer
    if mode == "zero":
        return edits.Constant("zero")
    values = setting.ordinary(MLP_POST, layer, (layer,))
    if mode == "mean":
        return edits.Constant("mean", {layer: values.mean(0)})
    drawn = torch.randint(len(values), (setting.batch.n,), generator=generator)
    return edits.PerPrompt("resample", {layer: values[drawn.to(values.device)]})


def _ablate(mode: str, random_units: bool = False) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons = setting.formation.neurons
        if random_units:
            neurons = others(setting.shape.d_mlp, neurons, generator, len(neurons))
        edit = setting.removal(direction, _ablation_edit(setting, mode, generator), within=neurons)
        units = neurons if direction == "noise" else None
        return setting.patch(direction, stage.site, stage.layers(setting), edit, units=units)

    return build


def _neuron_readout(setting: Setting, stage: Stage) -> Readout:
    neurons = list(setting.formation.neurons)
    return readouts.vector_readout(
        stage.name,
        stage.site,
        stage.layers(setting),
        setting.pair.target,
        setting.batch.n,
        lambda x, _layer: x[:, neurons].float().abs().mean(-1),
    )


SUPER_NEURONS = Stage(
    name="super_neurons",
    claim="A few neurons of the formation block fire massively for that token alone.",
    site=MLP_POST,
    layers=lambda setting: (setting.formation.layer,),
    units=lambda setting: setting.formation.neurons,
    experiments=(
        TRANSPLANT,
        Experiment("transplant", _other_neurons, NOTHING, control="random_neurons", drawn=True),
        Experiment("transplant", _all_the_others, NOTHING, control="all_the_others"),
        *(
            item
            for mode in ("zero", "mean", "resample")
            for item in (
                Experiment(mode, _ablate(mode), REMOVED, drawn=mode == "resample"),
                Experiment(mode, _ablate(mode, True), SPARED, control="random_neurons", drawn=True),
            )
        ),
    ),
    readout=_neuron_readout,
)


# 4. Down-projection channeling


def _super_rows(setting: Setting, neurons: tuple[int, ...]) -> Tensor:
    return setting.weights.W_out.detach()[list(neurons)].float()


def _contribution(random_dims: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons, dims = setting.formation.neurons, setting.formation.dims
        if random_dims:
            dims = others(setting.shape.d_model, dims, generator, len(dims))
        edit = edits.NeuronContribution("outlier_dims", neurons, _super_rows(setting, neurons), dims)
        return setting.patch(direction, stage.site, stage.layers(setting), edit)

    return build


def _densify(random_neurons: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        neurons = setting.formation.neurons
        if random_neurons:
            neurons = others(setting.shape.d_mlp, neurons, generator, len(neurons))
        rows = _super_rows(setting, neurons)
        edit = edits.DensifyRows("densified", neurons, rows, edits.rotate_rows(rows, generator))
        return setting.patch(direction, stage.site, stage.layers(setting), setting.removal(direction, edit))

    return build


def _dominance_readout(setting: Setting, stage: Stage) -> Readout:
    return readouts.vector_readout(
        stage.name,
        stage.site,
        stage.layers(setting),
        setting.pair.target,
        setting.batch.n,
        lambda x, _layer: metrics.dominance_ratio(x),
    )


DOWN_PROJECTION = Stage(
    name="down_projection",
    claim="Their heavy-tailed down-projections write that activation into a few residual dimensions.",
    site=MLP_OUT,
    layers=lambda setting: (setting.formation.layer,),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("outlier_dims", _contribution(False), ISOLATED),
        Experiment("outlier_dims", _contribution(True), NOTHING, control="other_dims", drawn=True),
        Experiment("densified", _densify(False), REMOVED, drawn=True),
        Experiment("densified", _densify(True), SPARED, control="random_neurons", drawn=True),
    ),
    readout=_dominance_readout,
)


# 5. RMSNorm as a filter


def _drop_dims(denominator_only: bool, random_dims: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        dims = setting.formation.dims
        if random_dims:
            dims = others(setting.shape.d_model, dims, generator, len(dims))
        name = "denominator_only" if denominator_only else "dims_removed"
        shape = setting.shape
        edit = edits.DropDimsBeforeNorm(name, dims, shape.norm_eps, shape.norm == "layer", denominator_only)
        return setting.patch(direction, stage.site, stage.layers(setting), setting.removal(direction, edit))

    return build


def _energy_readout(setting: Setting, stage: Stage) -> Readout:
    dims = setting.formation.dims
    return readouts.vector_readout(
        stage.name,
        stage.site,
        setting.readout_layers,
        setting.pair.target,
        setting.batch.n,
        lambda x, _layer: metrics.energy_share(x, dims),
    )


RMSNORM_FILTER = Stage(
    name="rmsnorm_filter",
    claim="With one dominating dimension the norm turns the token's input into nearly a constant vector.",
    site=LN1_NORMALIZED,
    layers=lambda setting: setting.after_formation,
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("dims_removed", _drop_dims(False, False), REMOVED),
        Experiment("dims_removed", _drop_dims(False, True), SPARED, control="other_dims", drawn=True),
        Experiment("denominator_only", _drop_dims(True, False), REMOVED),
        Experiment("denominator_only", _drop_dims(True, True), SPARED, control="other_dims", drawn=True),
    ),
    readout=_energy_readout,
)


# 6. QK locking


def query_directions(setting: Setting, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Per block, for every key head ``[kv_head d_head]``, the principal direction of the queries that meet it.

    Activation queries before rotary embedding, of ordinary positions in the run without the sink; the query heads that
    share a key head are pooled; the sign makes the product with the mean query positive.
    """
    groups = setting.shape.n_heads // setting.shape.n_kv_heads
    found = {}
    for layer in layers:
        queries = setting.ordinary(Q, layer, layers)
        by_key_head = queries.unflatten(1, (setting.shape.n_kv_heads, groups))
        found[layer] = torch.stack(
            [metrics.principal_direction(by_key_head[:, h].flatten(0, 1)) for h in range(setting.shape.n_kv_heads)]
        )
    return found


def _drop_direction(random_direction: bool) -> Build:
    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        layers = stage.layers(setting)
        if random_direction:
            size = (setting.shape.n_kv_heads, setting.shape.d_head)
            drawn = {layer: torch.randn(size, generator=generator) for layer in layers}
            directions = {layer: x / x.norm(dim=-1, keepdim=True) for layer, x in drawn.items()}
        else:
            directions = query_directions(setting, layers)
        edit = edits.RemoveDirection("query_direction_removed", directions)
        return setting.patch(direction, stage.site, layers, setting.removal(direction, edit))

    return build


def _value_instead(setting: Setting, stage: Stage, direction: Direction, _generator: Generator) -> Patch:
    return setting.patch(direction, V, stage.layers(setting), edits.Transplant())


def _locking_readout(setting: Setting, stage: Stage) -> Readout:
    directions = query_directions(setting, stage.layers(setting))
    return readouts.vector_readout(
        stage.name,
        stage.site,
        setting.readout_layers,
        setting.pair.target,
        setting.batch.n,
        lambda x, layer: metrics.cosine(x, directions[layer].to(x.device)).mean(-1),
    )


QK_LOCKING = Stage(
    name="qk_locking",
    claim="The token's key is then locked to the principal direction of the queries.",
    site=K,
    layers=lambda setting: setting.after_formation,
    experiments=(
        TRANSPLANT,
        Experiment("transplant", _value_instead, NOTHING, control="value"),
        Experiment("query_direction_removed", _drop_direction(False), REMOVED),
        Experiment("query_direction_removed", _drop_direction(True), SPARED, control="random_direction", drawn=True),
    ),
    readout=_locking_readout,
)

CHAIN: tuple[Stage, ...] = tuple(
    register(stage)
    for stage in (VALUE_AGGREGATION, W_O_ALIGNMENT, SUPER_NEURONS, DOWN_PROJECTION, RMSNORM_FILTER, QK_LOCKING)
)
"""The six stages, in order."""
