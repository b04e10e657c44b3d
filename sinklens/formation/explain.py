"""What makes the jump of a block: its super neurons, and the dimensions that they write."""

from __future__ import annotations

import torch
from torch import Tensor

from sinklens import metrics
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.errors import NoSinkError
from sinklens.formation.result import OutlierDim, SuperNeuron
from sinklens.models.identities import identities, require
from sinklens.models.view import BlockWeights, Model
from sinklens.patches import CLEAN
from sinklens.prompts import PromptBatch
from sinklens.sites import ATTN_OUT, MLP_OUT, MLP_POST


def written_at(model: Model, batch: PromptBatch, layer: int, rows: int) -> tuple[Tensor | None, Tensor]:
    """The neurons' activations, ``None`` without a dense MLP; and what the MLP adds, or attention without an MLP."""
    measured = identities(model)
    dense = measured.holds("dense_mlp", (layer,))
    adds = MLP_OUT if MLP_OUT.at(layer) in measured.fired else ATTN_OUT
    wants = [Want("base", site, layer) for site in ([MLP_POST, adds] if dense else [adds])]
    store = capture_runs(model, batch.tokens, CLEAN, wants, max_rows=rows)
    return store.tensor("base", MLP_POST, layer) if dense else None, store.tensor("base", adds, layer)


def super_neurons_of(model, layer, post, sinks, neuron_z, selectivity, given) -> tuple[SuperNeuron, ...]:  # noqa: ANN001
    """Neurons that write the jump of a block; those that are given, with what is measured of them.

    Raises:
        NoSinkError: none qualifies.
    """
    if post is None:
        if given:
            require(model, "dense_mlp", (layer,))
        return ()
    weights = BlockWeights(model, layer)
    up_z = metrics.robust_z(weights.W_in.detach().float().norm(dim=0)).cpu()
    gate_z = None if weights.W_gate is None else metrics.robust_z(weights.W_gate.detach().float().norm(dim=0)).cpu()
    joint = up_z if gate_z is None else torch.minimum(gate_z, up_z)
    post = post.float().cpu()
    index = torch.arange(len(post))
    sink = post[index, sinks].mean(0)
    other = torch.ones(post.shape[:2], dtype=torch.bool)
    other[index, sinks] = False
    ordinary = post[other].abs().double().quantile(0.95, dim=0).float()
    if given is None:
        chosen = (joint >= neuron_z) & (sink.abs() >= selectivity * ordinary) & (sink != 0)
        if not chosen.any():
            best = int(joint.argmax())
            raise NoSinkError(
                f"no super neuron in block {layer}: neuron {best} has the largest weight norms (robust z "
                f"{joint[best]:.1f}, {neuron_z} asked) and activation {sink[best]:.2f} on the sink token against "
                f"{ordinary[best]:.2f} on others; name neurons yourself (super_neurons=)"
            )
        given = chosen.nonzero().flatten().tolist()
    found = [
        SuperNeuron(
            index=int(i),
            gate_z=None if gate_z is None else float(gate_z[i]),
            up_z=float(up_z[i]),
            activation_sink=float(sink[i]),
            activation_other=float(ordinary[i]),
        )
        for i in given
    ]
    return tuple(sorted(found, key=lambda neuron: -abs(neuron.activation_sink)))


def outlier_dims_of(model, layer, post, added, sinks, neurons, dim_z, given) -> tuple[OutlierDim, ...]:  # noqa: ANN001
    """Dimensions of the residual stream that these neurons write."""
    index = torch.arange(len(added))
    measured = identities(model)
    if neurons and measured.holds("neurons_write", (layer,)) and measured.holds("mlp_adds", (layer,)):
        chosen = [neuron.index for neuron in neurons]
        rows = BlockWeights(model, layer).W_out.detach()[chosen].float()
        written = post[index, sinks.to(post.device)][:, chosen].float() @ rows
    else:
        # No neuron's share can be told (a norm or a multiplier stands behind the MLP): take all that the MLP adds.
        written = added[index, sinks.to(added.device)].float()
    written = written.mean(0).cpu()
    z = metrics.robust_z(written.abs())
    if given is None:
        given = (z >= dim_z).nonzero().flatten().tolist() or [int(z.argmax())]
    dims = [OutlierDim(int(i), float(written[i]), float(z[i])) for i in given]
    return tuple(sorted(dims, key=lambda dim: -abs(dim.written)))
