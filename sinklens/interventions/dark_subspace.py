"""The dark subspace: the last singular directions of the unembedding, removed from the residual stream.

With ``W_U = U S V^T`` and singular values in falling order, B are the last columns of U, a share of d_model of them;
behind every block ``x <- x - x B B^T``. What lies there hardly reaches the logits, and Cancedda (ACL 2024, "Spectral
filters, dark signals, and attention sinks") finds the sink's signal in it: the last 5% matter for the sink and not for
what is said directly.

Our choices: the unembedding as it is, without the weight of the norm in front of it; every block and position. The
control removes as many random directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens import edits
from sinklens.errors import InputError, NotApplicableError
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.models import bridged, hooked
from sinklens.models.parts import UnknownPartError
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_id, model_shape
from sinklens.patches import Patch
from sinklens.records.integers import whole_numbers
from sinklens.sites import RESID_POST
from sinklens.statistics import generator

SHARE = 0.05
"""Share of d_model that is removed, by default."""


def unembedding_matrix(model: Model) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding W_U.

    Raises:
        NotApplicableError: it is no matrix.
    """
    if hooked.can_take_apart(model):
        return hooked.unembedding(model)[0]
    try:
        return bridged.unembedding(model)[0].W
    except UnknownPartError as error:
        raise NotApplicableError(f"{model_id(model)} has no matrix for an unembedding: {error}") from error


@in_usual_state
def dark_basis(model: Model, share: float = SHARE) -> Float[Tensor, "d_model rank"]:
    """Orthonormal columns: the last ``share`` of the left singular vectors of the unembedding.

    Raises:
        InputError: a share that is not between 0 and 1.
        NotApplicableError: the unembedding is no matrix.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share} must be between 0 and 1")
    W_U = unembedding_matrix(model).detach().double()
    # Eigenvectors of the small Gram matrix are the left singular vectors, those of the smallest values first.
    vectors = torch.linalg.eigh(W_U @ W_U.T).eigenvectors
    return vectors[:, : max(1, round(share * len(W_U)))].float()


@in_usual_state
def remove_dark_subspace(
    model: Model, share: float = SHARE, *, layers: Sequence[int] | None = None, control: bool = False, seed: int = 0
) -> Hooks:
    """Remove the dark subspace from the residual stream behind some blocks.

    Args:
        model: the model.
        share: share of d_model that is removed.
        layers: blocks; all by default.
        control: remove as many random directions, drawn with ``seed``.
        seed: fixes these.

    Raises:
        InputError: a share that is not between 0 and 1.
    """
    basis = dark_basis(model, share)
    if control:
        basis = edits.random_orthonormal(len(basis), basis.shape[1], generator(seed, "dark_subspace"))
    blocks = tuple(range(model_shape(model).n_layers)) if layers is None else whole_numbers(layers, "layers")
    name = "random_subspace" if control else "dark_subspace"
    return hooks_of(Patch(RESID_POST, blocks, (), edits.RemoveSubspace(name, basis)))
