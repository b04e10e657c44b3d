"""Stage 2, W_O alignment: the output projection passes the variance on to what the super neurons read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from sinklens import edits
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.sites import ATTN_OUT, Z
from sinklens.stages.base import ISOLATED, NOTHING, REMOVED, Build, Experiment, Need, Setting, Stage, at_formation
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_positions


def reading_subspace(setting: Setting) -> Tensor:
    """Orthonormal basis ``[d_model rank]`` of what the super neurons read: their W_gate and W_in columns through
    ln2.
    """
    weights, neurons = setting.weights, list(setting.neurons)
    columns = [w[:, neurons] for w in (weights.W_gate, weights.W_in) if w is not None]
    read = torch.cat(columns, -1).detach().float() * weights.ln2_w.detach().float()[:, None]
    return torch.linalg.qr(read.cpu()).Q


def in_subspace(
    make: Callable[[Setting, Tensor], edits.Edit], *, at_random: bool = False, may_be_nothing: bool = False
) -> Build:
    """An edit of what lies in the subspace that the super neurons read.

    Args:
        make: ``(setting, basis) -> edit``.
        at_random: in a random subspace of that rank instead.
        may_be_nothing: whether there may be nothing in it in which the runs differ.
    """

    def build(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
        basis = reading_subspace(setting)
        if at_random:
            d_model, rank = basis.shape
            basis = edits.random_orthonormal(d_model, rank, generator)
        patch = setting.patch(direction, stage.site, stage.layers(setting), make(setting, basis))
        return replace(patch, allow_unchanged=may_be_nothing)

    return build


def all_read(_setting: Setting, basis: Tensor) -> edits.Edit:
    """Exchange all that lies in the subspace."""
    return edits.Subspace("reading_subspace", basis)


def _permuted(setting: Setting, direction: Direction, generator: Generator) -> edits.Edit:
    order = edits.random_permutations(setting.shape.n_heads, setting.shape.d_head, generator)
    return setting.removal(direction, edits.PermuteWithin("permuted_z", order))


def _permuted_z(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    return setting.patch(direction, Z, stage.layers(setting), _permuted(setting, direction, generator))


def _permuted_elsewhere(setting: Setting, stage: Stage, direction: Direction, generator: Generator) -> Patch:
    edit = _permuted(setting, direction, generator)
    return setting.patch(direction, Z, stage.layers(setting), edit, positions=other_positions(setting, generator))


def read_readout(setting: Setting, stage: Stage) -> Readout:
    """How much of what the stage's blocks write together the super neurons read: its norm in their subspace."""
    basis = reading_subspace(setting)

    def combine(stack: Tensor) -> Tensor:
        return stack.sum(0).norm(dim=-1)

    return setting.readout(stage, lambda x, _layer: x.float() @ basis.to(x.device), combine=combine)


READ = (Need("attention_adds"), at_formation("neurons_read"))
"""Without these the subspace is not what the super neurons read of attention's output."""

W_O_ALIGNMENT = Stage(
    name="w_o_alignment",
    claim="W_O passes that variance on, into the directions that the super neurons read.",
    site=ATTN_OUT,
    layers=lambda setting: setting.up_to_formation,
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("reading_subspace", in_subspace(all_read), ISOLATED, needs=READ),
        Experiment(
            "reading_subspace",
            in_subspace(all_read, at_random=True),
            NOTHING,
            control="random_subspace",
            drawn=True,
            needs=READ,
        ),
        Experiment("permuted_z", _permuted_z, REMOVED, drawn=True),
        # Permuting z where the sink is not must leave the sink as it was in either run.
        Experiment("permuted_z", _permuted_elsewhere, NOTHING, control="other_position"),
    ),
    readout=read_readout,
)
