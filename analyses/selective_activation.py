"""Does the sink token alone meet both weight vectors of a super neuron?

    python analyses/selective_activation.py

A gated neuron computes ``act(x . w_gate) * (x . w_up)`` of the normalised input x. It fires for one token alone when
that token is high on both factors: the gate opens (the cosine of x and w_gate, with its sign, because a negative gate
stays shut) and the linear branch is large (x . w_up in magnitude, because its sign only turns what is written). A
plain MLP has W_in alone; it stands in for both, with its sign.

x is ``ln2.hook_normalized`` times the norm's weight (ln1's in a parallel block that has one norm for both); a
LayerNorm's bias, equal at every position, is left out. The control is as many other neurons of the block. Alone means
that no other token is as high on either factor; this has to be so more often than not, so in over half of the prompts.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import sites

CLAIM = "Of all tokens the sink alone is high on both factors of the super neurons, the gate and the linear branch."


def run(
    study: sl.Study, *, draws: Annotated[int, "how many sets of as many other neurons to compare with"] = 5
) -> sl.Findings:
    layer, neurons = study.formation.layer, study.formation.neurons
    others = [i for drawn in study.other_neurons("selective_activation/others", draws) for i in drawn]
    gate, linear = factors(study, layer, [*neurons, *others])  # [prompt, pos, neuron]
    hit = (highest(gate, study.sinks) & highest(linear, study.sinks)).double()  # [prompt, neuron]
    own = len(neurons)
    share, control = study.mean(hit[:, :own].mean(1)), study.mean(hit[:, own:].mean(1))
    verdict = sl.verdict(
        CLAIM,
        "share of prompts in which the sink token has the highest gate cosine and the largest linear branch of all "
        "tokens, averaged over super neurons",
        share,
        f"the same of as many other neurons of the block, {draws} draws",
        control,
        "holds when the whole interval lies above one half and above the control's",
        holds=share.above(np.nanmax([0.5, control.high])),
    )
    numbers = {}
    for what, values in (("cosine of the input and w_gate", gate), ("linear branch", linear)):
        sink, rest = sink_and_rest(values[..., :own].mean(-1), study.sinks)
        numbers |= {
            f"{what} of the sink token, mean over super neurons": study.mean(sink),
            f"{what} of the other tokens": study.mean(rest.mean(1)),
            f"{what}, largest of the other tokens": study.mean(rest.amax(1)),
        }
    caption = (
        f"How the input of the MLP of block {layer} meets the two weight vectors of super neurons (the strongest "
        f"three) and of other neurons, position by position: mean over prompts. Sink positions: "
        f"{', '.join(map(str, sorted(set(study.formation.sink_positions))))}."
    )
    kinds = ["super"] * own + ["other"] * len(others)
    return sl.Findings(verdict, tidy(gate, linear, [*neurons, *others], kinds, study.sinks), caption, numbers)


def factors(study: sl.Study, layer: int, neurons: list[int]) -> tuple[Tensor, Tensor]:
    """Cosine with w_gate and linear branch (in magnitude, where there is a gate), each ``[prompt, pos, neuron]``."""
    weights = study.weights(layer)
    gated = weights.W_gate is not None
    w_up = weights.W_in.detach().float()[:, neurons]
    w_gate = w_up if weights.W_gate is None else weights.W_gate.detach().float()[:, neurons]

    def reduce(normalised: Tensor, _rows: sl.Rows) -> Tensor:
        x = normalised.float() * weights.ln2_w.detach().float()
        cosine = x @ (w_gate / w_gate.norm(dim=0)) / x.norm(dim=-1, keepdim=True)
        linear = x @ w_up
        return torch.stack([cosine, linear.abs() if gated else linear])

    own_norm = sl.models.has_hook(study.model, sites.LN2_NORMALIZED.at(layer))
    site = sites.LN2_NORMALIZED if own_norm else sites.LN1_NORMALIZED
    readout = sl.Readout("factors", site, (layer,), lambda x, rows: reduce(x, rows).movedim(0, -1))
    cosine, linear = study.measure([readout])["factors"][0].unbind(-1)
    return cosine, linear


def sink_and_rest(values: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``[prompt, pos, ...]`` at the sink, ``[prompt, ...]``, and at all other positions, ``[prompt, other, ...]``."""
    prompts = torch.arange(len(sinks))
    is_sink = torch.zeros(values.shape[:2], dtype=torch.bool)
    is_sink[prompts, sinks] = True
    return values[prompts, sinks], values[~is_sink].view(len(sinks), -1, *values.shape[2:])


def highest(values: Tensor, sinks: Tensor) -> Tensor:
    """Whether the sink token is above all others, ``[prompt, pos, neuron] -> [prompt, neuron]``."""
    sink, rest = sink_and_rest(values, sinks)
    return sink > rest.amax(1)


def tidy(gate: Tensor, linear: Tensor, neurons: list[int], kinds: list[str], sinks: Tensor) -> pd.DataFrame:
    """One row for every neuron, prompt and position."""
    prompt, pos, neuron = np.indices(gate.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "position": pos,
            "token": np.where(pos == sinks.numpy()[prompt], "sink", "other"),
            "neuron": np.array(neurons)[neuron],
            "kind": np.array(kinds)[neuron],
            "gate_cosine": gate.flatten().numpy(),
            "linear_branch": linear.flatten().numpy(),
        }
    )


def draw(findings: sl.Findings):
    table = findings.table
    first = [n for n in table[table.kind == "super"].neuron.unique()[:3]]
    names = {n: f"super neuron {n}" for n in first}
    shown = table[(table.kind == "other") | table.neuron.isin(first)]
    shown = shown.assign(series=np.where(shown.kind == "super", shown.neuron.map(names), "other neurons"))
    titles = {"gate_cosine": "cosine of the input and the gate's weights", "linear_branch": "linear branch"}
    long = shown.melt(["series", "position"], list(titles), "factor").replace({"factor": titles})
    long = long.pivot_table("value", ["factor", "series", "position"], sort=False).reset_index()
    figure = sl.viz.line(long, "position", "value", series="series", facet="factor", titles={"value": "", "series": ""})
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
    sl.analysis.main(ANALYSIS)
