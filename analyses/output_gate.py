"""Would a sigmoid gate on attention's output lessen the first token's variance: the same model with and without one.

    python analyses/output_gate.py

Every aggregated value is multiplied by a gate of its own, ``z * sigmoid(scale * logits + bias)``, at all positions of
the blocks up to the first formation blocks. The paper trains models with such a gate; this one was trained without, so
the gate is a choice, and shows what gating does by its form, not what a model would learn: ``input`` makes logits of
the block's normalised input by a random Gaussian projection, ``value`` of z over its RMS at that position.
The control, a constant gate of the same mean, scales all variances of a block alike and leaves their ratio as it is,
exactly in the first block; later blocks read a smaller attention output, which can change theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import gmean
from torch import Tensor

import sinklens as sl
from sinklens import metrics, readouts, sites, statistics

CLAIM = "A sigmoid output gate lessens the variance discrepancy between the first token and the others."
NOT_THE_PAPERS = "A gate put on a model that was trained without one is not the paper's experiment."
LITTLE = 0.05
"""A change of the variance by less than a twentieth would not matter."""
RULE = (
    "holds when the interval of this factor lies below 1 and below the control's; does not hold when it lies above "
    f"{1 - LITTLE:g}, or no more than {LITTLE:g} below the control's"
)
CAPTION = "Variance of z by position, the sink first, over the median of the others (geometric mean over blocks)."
NO_GATE, CONSTANT, SIGMOID = "no gate", "constant gate", "sigmoid gate"

Curves = Callable[[np.ndarray], Float[Tensor, "block pos"]]
"""Variance across prompts by position, the sink first, as a function of the prompts."""


@dataclass(frozen=True, eq=False)
class OutputGate(sl.Edit):
    """``z * sigmoid(scale * logits + bias)``."""

    projections: Mapping[int, Float[Tensor, "d_model input"]] = field(default_factory=dict)
    """Per block, what makes the logits of its normalised input; without any they are made of z."""
    scale: float = 1.0
    """Factor on the logits."""
    bias: float = 0.0
    """Offset of the logits."""

    @property
    def reads(self) -> tuple[sl.HookSite, ...]:
        return (sites.LN1_NORMALIZED,) if self.projections else ()

    def __call__(self, x: Tensor, source: Tensor | None, at: sl.EditSite) -> Tensor:  # noqa: ARG002
        if self.projections:
            block_input = at.live[sites.LN1_NORMALIZED.template].float()
            logits = (block_input @ self.projections[at.layer].to(x.device)).view_as(x)
        else:
            logits = x / x.float().pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
        return x * torch.sigmoid(self.scale * logits + self.bias)


def run(
    study: sl.Study,
    *,
    gate: Annotated[Literal["input", "value"], "what the gate's logits are made of"] = "input",
    scale: Annotated[float, "factor on the logits, which have a variance of one"] = 1.0,
    bias: Annotated[float, "offset of the logits; with 0 the gates are one half on average"] = 0.0,
) -> sl.Findings:
    sl.analysis.check_sink_varies(study)
    if gate == "input":
        study.require("norm_before_attention", study.onset)
    sigmoid = OutputGate(SIGMOID, projections(study) if gate == "input" else {}, scale, bias)
    constant = OutputGate(CONSTANT, scale=0.0, bias=mean_logit(scale, bias))
    gates = {NO_GATE: None, CONSTANT: constant, SIGMOID: sigmoid}
    readings = {name: readings_under(study, edit) for name, edit in gates.items()}
    curves = {
        name: statistics.resampled_curves(map(study.sink_first, reading["z"])) for name, reading in readings.items()
    }
    change, control = (factor(study, curves[name], curves[NO_GATE]) for name in (SIGMOID, CONSTANT))
    lessened = sl.analysis.judge(
        "quantity",
        "variance",
        f"{CLAIM} {NOT_THE_PAPERS}",
        statistic="factor by which the gate changes the variance of the sink's aggregated value over the median of "
        "others",
        estimate=change,
        control="the same of a constant gate with the same mean",
        control_estimate=control,
        rule=RULE,
        conditions=[sl.analysis.below(change, 1.0, least=LITTLE), sl.analysis.below(change, control, least=LITTLE)],
        detail=NOT_THE_PAPERS,
    )
    verdict = sl.analysis.verdict_of(CLAIM, [lessened])
    first = factor(study, curves[SIGMOID], curves[NO_GATE], slice(1))
    numbers = {"the same factor in the first block, where a constant gate's is 1": first}
    for name, reading in readings.items():
        numbers[f"variance of the sink over the median of others, {name}"] = discrepancy(study, curves[name])
        if "magnitude" in reading:
            numbers[f"magnitude of the super neurons at the sink, {name}"] = study.mean(reading["magnitude"][0])
        numbers[f"attention to the sink after formation, {name}"] = study.mean(reading["attention"].mean(0))
    return sl.Findings(verdict, table(study, curves), CAPTION, numbers)


def projections(study: sl.Study) -> dict[int, Tensor]:
    """Gaussian, and scaled so that the logits of a normalised input have a variance of one."""
    size, rng = (study.shape.d_model, study.shape.n_heads * study.shape.d_head), study.generator("output_gate/logits")
    return {layer: torch.randn(size, generator=rng) / size[0] ** 0.5 for layer in study.onset}


def mean_logit(scale: float, bias: float) -> float:
    """The logit of the mean of the sigmoid gate over normal logits."""
    normal = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000)
    return float(torch.sigmoid(scale * normal + bias).mean().logit())


def readings_under(study: sl.Study, gate: sl.Edit | None) -> dict[str, Tensor]:
    """Aggregated values under a gate, and what becomes of the sink downstream."""
    neurons, n, block = list(study.formation.neurons), study.batch.n, (study.formation.layer,)
    measured = [
        sl.Readout("z", sites.Z, study.onset, lambda z, _: z),
        readouts.attention_received("attention", study.after_formation(), study.sink, n),
    ]
    if neurons:  # none are known in models without a dense MLP
        of_neurons = partial(readouts.vector_readout, "magnitude", sites.MLP_POST, block, study.sink, n)
        measured.append(of_neurons(lambda x, _: x[:, neurons].abs().mean(1)))
    patches = [sl.Patch(sites.Z, study.onset, tuple(range(study.batch.length)), gate)] if gate else []
    return study.measure(measured, patches)


def discrepancy(study: sl.Study, curves: Curves) -> sl.Estimate:
    """Variance of the sink over the median of others."""
    return study.bootstrap(lambda prompts: metrics.first_over_later(curves(prompts)))


def factor(study: sl.Study, gated: Curves, ungated: Curves, blocks: slice = slice(None)) -> sl.Estimate:
    """What the gate multiplies this discrepancy by."""

    def statistic(prompts: np.ndarray) -> Tensor:
        return metrics.first_over_later(gated(prompts)[blocks]) / metrics.first_over_later(ungated(prompts)[blocks])

    return study.bootstrap(statistic)


def table(study: sl.Study, curves: Mapping[str, Curves]) -> pd.DataFrame:
    """A row for every gate, block and position."""
    axes = {"layer": study.onset, "position": range(study.batch.length)}
    tables = []
    for name, variance in curves.items():
        values = variance(np.arange(study.batch.n))
        relative = metrics.relative_to_later(values).flatten().numpy()
        tables.append(sl.analysis.tidy(values, axes, gate=name, relative=relative))
    return pd.concat(tables, ignore_index=True)


def draw(findings: sl.Findings):
    mean = findings.table.pivot_table("relative", ["gate", "position"], aggfunc=gmean, sort=False).reset_index()
    titles = {"position": "position, the sink first", "relative": "variance / median of others"}
    figure = sl.viz.line(mean, "position", "relative", series="gate", titles=titles, log_y=True)
    return figure.update_yaxes(dtick=np.log10(2))


ANALYSIS = sl.Analysis(
    name="output_gate",
    title="A sigmoid gate on attention's output",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 23",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
