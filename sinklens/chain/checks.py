"""What else the pair changes: the questions that a careful reader of an intervention asks.

An intervention that makes a sink could do so by side effects. For both runs of the pair this measures, at the target
and at the other positions: attention entropy (nats) and how many values a query effectively averages, in the blocks up
to formation and in those after; the variance of the aggregated value; the super neurons' activations; and residual
norms.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from sinklens import metrics, readouts
from sinklens.engine.capture import capture_runs
from sinklens.models.identities import identities
from sinklens.patches import Positions
from sinklens.readouts.base import Readout
from sinklens.sites import LN1_NORMALIZED, MLP_POST, RESID_POST, HookSite, Z
from sinklens.stages.base import Setting


def pair_checks(setting: Setting) -> pd.DataFrame:
    """One row per quantity, place and run: the mean over prompts."""
    readings = _readouts(setting)
    store = capture_runs(
        setting.model,
        setting.batch.tokens,
        setting.pair.runs,
        [],
        [r for r, _, _ in readings],
        max_rows=setting.max_rows,
    )
    records = []
    for readout, quantity, where in readings:
        record: dict[str, object] = {"quantity": quantity, "where": where, "layers": list(readout.layers)}
        for run in setting.pair.runs:
            stack = torch.stack([store.readings[run, readout.name, layer] for layer in readout.layers])
            record[run] = float(readout.combine(stack).mean())
        records.append(record)
    return pd.DataFrame(records)


def _places(setting: Setting) -> dict[str, tuple[Tensor, Positions]]:
    """Marks of the queries at each kind of place, and one position for each prompt there."""
    n, length = setting.batch.n, setting.batch.length
    target = torch.zeros(n, length)
    target[torch.arange(n), setting.pair.target.single(n)] = 1
    sinks = Positions.one_each(setting.formation.sink_positions)
    places = {
        "target": (target, setting.pair.target),
        "ordinary position": (setting.pair.ordinary, setting.pair.reference),
    }
    if not setting.pair.is_natural:
        sink = torch.zeros(n, length)
        sink[torch.arange(n), torch.tensor(setting.formation.sink_positions)] = 1
        places["natural sink"] = (sink, sinks)
    return places


def _readouts(setting: Setting) -> list[tuple[Readout, str, str]]:
    found: list[tuple[Readout, str, str]] = []
    places = _places(setting)
    statistics = setting.ordinary_moments(Z, setting.up_to_formation)
    blocks = {"up to formation": setting.up_to_formation, "after formation": setting.readout_layers}
    n = setting.batch.n
    for where, (marks, position) in places.items():
        for span, layers in blocks.items():
            for quantity, statistic in (
                ("attention entropy (nats)", metrics.attention_entropy),
                ("values mixed (effective number)", metrics.effective_values),
            ):
                readout = readouts.attention_rows(f"{quantity}/{where}/{span}", layers, statistic, marks)
                found.append((readout, f"{quantity}, {span}", where))
        variance = readouts.deviation(f"variance/{where}", Z, setting.up_to_formation, position, n, statistics)
        found.append((variance, "variance of the aggregated value (ordinary = 1)", where))
        found += [
            (readouts.vector_readout(f"{name}/{where}", site, layers, position, n, function), quantity, where)
            for name, quantity, site, layers, function in _of_vectors(setting)
        ]
        received = readouts.attention_received(f"received/{where}", setting.readout_layers, position, n)
        found.append((received, "attention received, after formation", where))
    return found


Asked = tuple[str, str, HookSite, tuple[int, ...], Callable[[Tensor, int], Tensor]]


def _of_vectors(setting: Setting) -> list[Asked]:
    """Name, quantity, site, blocks and function of an activation; what the model does not have is left out."""
    neurons, block = list(setting.formation.neurons), (setting.formation.layer,)
    asked: list[Asked] = [
        ("norm", "residual norm after the formation block", RESID_POST, block, lambda x, _layer: x.float().norm(dim=-1))
    ]
    if neurons and identities(setting.model).holds("dense_mlp", block):
        quantity = "super-neuron activation (mean magnitude)"
        asked.insert(0, ("neurons", quantity, MLP_POST, block, lambda x, _layer: x[:, neurons].float().abs().mean(-1)))
    if identities(setting.model).holds("norm_before_attention", setting.readout_layers):
        quantity, layers = "dominance ratio after RMSNorm, next blocks", setting.readout_layers
        asked.append(("dominance", quantity, LN1_NORMALIZED, layers, lambda x, _layer: metrics.dominance_ratio(x)))
    return asked
