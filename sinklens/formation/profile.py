"""Where the sink is and what it does from block to block: positions, norms, attention, and the jumps."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.engine.store import ActivationStore
from sinklens.formation.result import FormationEvent
from sinklens.models.identities import identities, is_unnormalised
from sinklens.models.view import Model
from sinklens.readouts.base import Readout
from sinklens.sites import ATTN_OUT, MLP_OUT, PATTERN, RESID_POST, RESID_PRE


def profile_readouts(model: Model, n_layers: int) -> list[Readout]:
    """What has to be read of every block."""
    blocks = tuple(range(n_layers))

    def norm(act: Tensor, _rows: object) -> Tensor:
        return act.float().norm(dim=-1)

    def received(act: Tensor, _rows: object) -> Tensor:
        return metrics.attention_received(metrics.normalised_rows(act)[0] if shares else act)

    def missing(act: Tensor, _rows: object) -> Tensor:
        return 1 - act.float().sum(-1).mean((1, 2))

    shares, fired = is_unnormalised(model), identities(model).fired
    whole = identities(model).holds("pattern_sums_to_one")
    with_mlp = tuple(block for block in blocks if MLP_OUT.at(block) in fired)
    return [
        Readout("before", RESID_PRE, blocks, norm),
        Readout("after", RESID_POST, blocks, norm),
        Readout("attn", ATTN_OUT, blocks, norm),
        *([Readout("mlp", MLP_OUT, with_mlp, norm)] if with_mlp else []),
        Readout("attention", PATTERN, blocks, received),
        *([] if whole else [Readout("missing", PATTERN, blocks, missing)]),
    ]


def sink_positions_of(received: Float[Tensor, "layer prompt head key"]) -> Int[Tensor, " prompt"]:
    """The position of each prompt that receives most attention from later queries."""
    length = received.shape[-1]
    # A position that only a few queries see can get a high mean by chance: ask for a quarter of the sequence.
    eligible = max(1, length - max(1, length // 4))
    return received.mean((0, 2))[:, :eligible].argmax(-1)


def _of_sink(values: Float[Tensor, "prompt pos"], sinks: Tensor) -> Float[Tensor, " prompt"]:
    return values.take_along_dim(sinks[:, None], -1).squeeze(-1)


def _of_others(values: Float[Tensor, "prompt pos"], sinks: Tensor) -> Float[Tensor, "prompt other"]:
    other = torch.ones_like(values, dtype=torch.bool).scatter(1, sinks[:, None], False)
    return values[other].view(len(values), -1)


def _median(x: Tensor, dim: int = -1) -> Tensor:
    # Not torch.median, which gives the lower of the two middle values.
    return x.float().quantile(0.5, dim=dim)


def profile_of(store: ActivationStore, received: Tensor, sinks: Tensor, n_layers: int, eps: float) -> pd.DataFrame:
    """A row for every block: residual norms and attention, of the sink and of other tokens.

    Where attention does not sum to one over keys there is also what it lacks, ``missing_mass``, the mean over queries,
    heads and prompts.
    """
    records = []
    for block in range(n_layers):
        norms = {name: store.readings["base", name, block].cpu() for name in ("before", "after", "attn")}
        norms["mlp"] = store.readings.get(("base", "mlp", block), torch.zeros_like(norms["attn"])).cpu()
        attention = received[block].mean(1)
        heads = received[block].take_along_dim(sinks[:, None, None], -1).squeeze(-1)
        record = {"layer": block}
        for name in ("before", "after"):
            sink, other = _of_sink(norms[name], sinks), _median(_of_others(norms[name], sinks), -1)
            record |= {f"norm_sink_{name}": _median(sink), f"norm_other_{name}": _median(other)}
            record |= {f"ratio_{name}": _median(sink / other)}
        record |= {
            "attn_norm": _median(_of_sink(norms["attn"], sinks)),
            "mlp_norm": _median(_of_sink(norms["mlp"], sinks)),
        }
        record |= {
            "attention_sink": _of_sink(attention, sinks).mean(),
            "attention_other": _of_others(attention, sinks).nanmean(),
            "sink_rate": (heads > eps).float().mean(),
        }
        if (missing := store.readings.get(("base", "missing", block))) is not None:
            record["missing_mass"] = missing.mean()
        records.append({key: float(value) if key != "layer" else value for key, value in record.items()})
    return pd.DataFrame(records)


def events_of(profile: pd.DataFrame, min_ratio: float, min_jump: float) -> tuple[FormationEvent, ...]:
    """The blocks in which the norm of the sink token jumps against the others'."""
    jumps = profile.loc[(profile.ratio_after >= min_ratio) & (profile.ratio_after >= min_jump * profile.ratio_before)]
    return tuple(
        FormationEvent(
            layer=int(row["layer"]),
            norm_before=row["norm_sink_before"],
            norm_after=row["norm_sink_after"],
            ratio_before=row["ratio_before"],
            ratio_after=row["ratio_after"],
            mlp_norm=row["mlp_norm"],
            attn_norm=row["attn_norm"],
        )
        for row in jumps.to_dict("records")
    )
