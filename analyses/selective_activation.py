"""Does the sink token alone meet both weight vectors of a super neuron?

    python analyses/selective_activation.py

A gated neuron computes ``act(x . w_gate) * (x . w_up)`` of the normalised input x. It fires for one token alone when
that token is high on both factors: the gate opens (the cosine of x and w_gate, with its sign, because a negative gate
stays shut) and the linear branch is large (x . w_up in magnitude, because its sign only turns what is written). A
plain MLP has W_in alone; it stands in for both, with its sign.

x is ``ln2.hook_normalized`` times the norm's weight (ln1's in a parallel block that has one norm for both); a
LayerNorm's bias, equal at every position, is left out. The control is as many other neurons of the block. Alone means
that no other token is as high on either factor; this has to be so more often than not, so in over half of the prompts.

Does it count? Of the residual stream that enters the MLP of the formation block, only the directions that the super
neurons read are exchanged at the sink for an ordinary position's: the sink must go. In as many random directions, or in
all the others, the same must leave it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import sinklens as sl
from sinklens import sites

CLAIM = "Of all tokens the sink alone is high on both factors of the super neurons, the gate and the linear branch."

Factor = Float[Tensor, "prompt pos neuron"]


def run(
    study: sl.Study,
    *,
    draws: Annotated[int, "sets of as many other neurons to compare with", sl.Between(1, 100_000)] = 5,
) -> sl.Findings:
    study.require("neurons_read", (study.formation.layer,))
    n_super = len(study.neurons)
    others = [neuron for units in study.other_neurons("selective_activation/others", draws) for neuron in units]
    neurons = [*study.formation.neurons, *others]
    gate, linear = factors(study, neurons)
    selected = (highest_at_sink(study, gate) & highest_at_sink(study, linear)).double()  # [prompt, neuron]
    share, control = study.mean(selected[:, :n_super].mean(1)), study.mean(selected[:, n_super:].mean(1))
    alone = sl.analysis.judge(
        "quantity",
        "selectivity",
        CLAIM,
        statistic="share of prompts in which the sink token has the highest gate cosine and the largest linear branch "
        "of all tokens, averaged over super neurons",
        estimate=share,
        control=f"the same of as many other neurons of the block, {draws} draws",
        control_estimate=control,
        rule="holds when the whole interval lies above one half and above the control's",
        conditions=[sl.analysis.above(share, 0.5), sl.analysis.above(share, control)],
    )
    verdict = sl.analysis.verdict_of(CLAIM, [alone, cause(study)])
    numbers = {}
    for name, factor in (("cosine of the input and w_gate", gate), ("linear branch", linear)):
        mean = study.sink_first(factor[..., :n_super].mean(-1))
        numbers[f"{name} of the sink token, mean over super neurons"] = study.mean(mean[:, 0])
        numbers[f"{name} of the other tokens"] = study.mean(mean[:, 1:].mean(1))
        numbers[f"{name}, largest of the other tokens"] = study.mean(mean[:, 1:].amax(1))
    kinds = ["super"] * n_super + ["other"] * len(others)
    return sl.Findings(verdict, table(study, gate, linear, neurons, kinds), caption(study), numbers)


def cause(study: sl.Study) -> sl.analysis.Part:
    """Does what the super neurons read count?"""
    return sl.analysis.cause(
        study,
        sl.stages.READING,
        "reading_subspace",
        ("random_subspace", "all_the_rest"),
        name="what is read",
        sentence="The sink comes about because its residual meets the weights of the super neurons.",
    )


def factors(study: sl.Study, neurons: list[int]) -> tuple[Factor, Factor]:
    """Cosine with w_gate, and linear branch (in magnitude, where there is a gate)."""
    layer = study.formation.layer
    weights = study.weights(layer)
    gated = weights.W_gate is not None
    w_up = weights.W_in.detach().float()[:, neurons]
    w_gate = w_up if weights.W_gate is None else weights.W_gate.detach().float()[:, neurons]

    def reduce(normalised: Tensor, _rows: sl.Rows) -> Tensor:
        x = normalised.float() * weights.ln2_w.detach().float()
        cosine = x @ (w_gate / w_gate.norm(dim=0)) / x.norm(dim=-1, keepdim=True)
        linear = x @ w_up
        return torch.stack([cosine, linear.abs() if gated else linear]).movedim(0, -1)

    own_norm = sl.models.has_hook(study.model, sites.LN2_NORMALIZED.at(layer))
    site = sites.LN2_NORMALIZED if own_norm else sites.LN1_NORMALIZED
    cosine, linear = study.measure([sl.Readout("factors", site, (layer,), reduce)])["factors"][0].unbind(-1)
    return cosine, linear


def highest_at_sink(study: sl.Study, factor: Factor) -> Bool[Tensor, "prompt neuron"]:
    """Whether the sink token is above all others."""
    values = study.sink_first(factor)
    return values[:, 0] > values[:, 1:].amax(1)


def table(study: sl.Study, gate: Factor, linear: Factor, neurons: list[int], kinds: list[str]) -> pd.DataFrame:
    """One row for every neuron, prompt and position."""
    prompt, pos, neuron = np.indices(gate.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "position": pos,
            "token": np.where(pos == study.sinks.numpy()[prompt], "sink", "other"),
            "neuron": np.array(neurons)[neuron],
            "kind": np.array(kinds)[neuron],
            "gate_cosine": gate.flatten().numpy(),
            "linear_branch": linear.flatten().numpy(),
        }
    )


def caption(study: sl.Study) -> str:
    positions = ", ".join(map(str, sorted(set(study.formation.sink_positions))))
    return (
        f"How the input of the MLP of block {study.formation.layer} meets the two weight vectors of super neurons (the "
        f"strongest three) and of other neurons, position by position: mean over prompts. Sink positions: {positions}."
    )


def draw(findings: sl.Findings):
    table = findings.table
    strongest = list(table[table.kind == "super"].neuron.unique()[:3])
    names = {neuron: f"super neuron {neuron}" for neuron in strongest}
    rows = table[(table.kind == "other") | table.neuron.isin(strongest)]
    rows = rows.assign(series=np.where(rows.kind == "super", rows.neuron.map(names), "other neurons"))
    titles = {"gate_cosine": "cosine of the input and the gate's weights", "linear_branch": "linear branch"}
    long = rows.melt(["series", "position"], list(titles), "factor").replace({"factor": titles})
    lines = long.pivot_table("value", ["factor", "series", "position"], sort=False).reset_index()
    figure = sl.viz.line(
        lines, "position", "value", series="series", facet="factor", titles={"value": "", "series": ""}
    )
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="selective_activation",
    title="What the super neurons read",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 9",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
