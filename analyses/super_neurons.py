"""Do the neurons that fire for the sink have outlying weight norms in W_gate and W_up?

    python analyses/super_neurons.py

Formation picks super neurons by weights *and* activation, so asking whether those have large weights would answer
itself. Here neurons are picked by activation alone: the ones whose mean magnitude on the sink token is largest against
what they reach on other tokens (95th percentile of each prompt, mean over prompts). How far their weight norms outlie
is then a finding. A neuron's joint score is the smaller of its two scores, one for each matrix; a plain MLP has W_in
alone. The null is as many neurons drawn at random.

Do they make the sink? They are silenced at the sink's own position, all else left; as many others, drawn at random,
must leave it.

A score counts as outlying from a robust z of 5, which is what formation asks of a super neuron's weights, or from the
99th percentile of the block's neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites, statistics

CLAIM = "The neurons that fire for the sink have outlying weight norms in W_gate and W_up."
LEAST = {"robust_z": 5.0, "percentile": 99.0}
"""From where a score is an outlier's."""
KINDS = {
    (True, True): "fires most for the sink, a super neuron",
    (True, False): "fires most for the sink",
    (False, True): "a super neuron that fires less",
    (False, False): "other neuron",
}
"""What a neuron is called, by whether activation picks it and whether formation calls it a super neuron."""

PerNeuron = Float[Tensor, " neuron"]
Magnitude = Float[Tensor, "token neuron"]
"""Mean magnitude on the sink token, and what it reaches elsewhere."""


def run(
    study: sl.Study,
    *,
    top: Annotated[int, "neurons to pick by activation; 0: as many as there are super neurons", sl.Between(0)] = 0,
    score: Annotated[Literal["robust_z", "percentile"], "how far a weight norm outlies its block's"] = "robust_z",
    draws: Annotated[int, "random sets of neurons for the null", sl.Between(1, 100_000)] = 2000,
) -> sl.Findings:
    study.require("neurons_read", (study.formation.layer,))
    d_mlp, top = study.shape.d_mlp, top or len(study.neurons)
    if not 0 < top < d_mlp:
        raise sl.InputError(f"top={top} must be in 1..{d_mlp - 1}: the block has {d_mlp} neurons")
    norms = weight_norms(study)
    scores = {matrix: outlyingness(norm, score) for matrix, norm in norms.items()}
    joint = torch.stack(list(scores.values())).amin(0)
    magnitude = magnitudes(study)  # [prompt, token, neuron]

    def statistic(prompts: np.ndarray) -> float:
        return float(joint[most_selective(magnitude[prompts].mean(0), top)].mean())

    estimate = study.bootstrap(statistic)
    null = random_means(joint, top, draws, study.generator("super_neurons/null"))
    control, p_value = statistics.null_estimate(null), statistics.permutation_p(estimate.value, null)
    outlying = sl.analysis.judge(
        "quantity",
        "weights",
        CLAIM,
        statistic=f"mean {score.replace('_', ' ')} of the weight norms (the smaller of {' and '.join(scores)}) of the "
        f"{top} neurons of the formation block that fire most selectively for the sink",
        estimate=estimate,
        control=f"as many neurons drawn at random, {draws} times",
        control_estimate=control,
        rule=f"holds when p < 0.05 and the whole interval lies above {LEAST[score]:g} and above the null's range",
        conditions=outlies(estimate, control, p_value, LEAST[score]),
    )
    verdict = sl.analysis.verdict_of(CLAIM, [outlying, cause(study)])
    mean = magnitude.mean(0)
    picked, supers = set(most_selective(mean, top).tolist()), set(study.formation.neurons)
    numbers = overlaps(mean, joint, picked, supers)
    return sl.Findings(verdict, table(norms, scores, mean, picked, supers), caption(study, top), numbers)


def outlies(
    estimate: sl.Estimate, null: sl.Estimate, p_value: float, least: float
) -> tuple[sl.analysis.Condition, ...]:
    """The rule: beyond the threshold and the null's range, and rare."""
    return (
        sl.analysis.above(estimate, least),
        sl.analysis.above(estimate, null.high),
        sl.analysis.rare(estimate, null, p_value, sought=least - null.value),
    )


def cause(study: sl.Study) -> sl.analysis.Part:
    """Does the sink go without them?"""
    return sl.analysis.cause(
        study,
        sl.stages.SUPER_NEURONS,
        "zero",
        "random_neurons",
        sentence="The sink is made by the super neurons.",
    )


def weight_norms(study: sl.Study) -> dict[str, PerNeuron]:
    """Norm of every neuron's column of W_gate (where there is one) and of W_up."""
    weights = study.weights(study.formation.layer)
    matrices = {"gate": weights.W_gate, "up": weights.W_in}
    return {name: w.detach().float().norm(dim=0).cpu() for name, w in matrices.items() if w is not None}


def outlyingness(norms: PerNeuron, score: str) -> PerNeuron:
    """Robust z, or the percentile of each norm among all."""
    if score == "robust_z":
        return metrics.robust_z(norms)
    return 100 * torch.searchsorted(norms.sort().values, norms, right=True) / len(norms)


def magnitudes(study: sl.Study) -> Float[Tensor, "prompt token neuron"]:
    """Magnitude of every neuron on the sink token, and its 95th percentile over the other tokens of the prompt."""

    def reduce(post: Tensor, rows: sl.Rows) -> Tensor:
        magnitude = study.sink_first(post.float().abs(), rows.prompts)
        return torch.stack([magnitude[:, 0], magnitude[:, 1:].quantile(0.95, dim=1)], 1)

    readout = sl.Readout("magnitude", sites.MLP_POST, (study.formation.layer,), reduce)
    return study.measure([readout])["magnitude"][0]


def selectivity(magnitude: Magnitude) -> PerNeuron:
    """Their ratio: 0 for a neuron that never fires for the sink."""
    return torch.where(magnitude[0] > 0, magnitude[0] / magnitude[1], 0)


def most_selective(magnitude: Magnitude, top: int) -> Int[Tensor, " top"]:
    """The ``top`` most selective neurons; among infinite ones those that fire most."""
    by_size = magnitude[0].argsort(descending=True, stable=True)
    return by_size[selectivity(magnitude)[by_size].argsort(descending=True, stable=True)][:top]


def random_means(scores: PerNeuron, size: int, draws: int, rng: torch.Generator) -> Float[Tensor, " draw"]:
    """The mean score of ``size`` neurons drawn at random, draw by draw."""
    return torch.stack([scores[torch.randperm(len(scores), generator=rng)[:size]].mean() for _ in range(draws)])


def overlaps(magnitude: Magnitude, joint: PerNeuron, picked: set[int], supers: set[int]) -> dict[str, float]:
    """How far activation and weights agree on which neurons stand out."""
    top = len(picked)
    largest = set(joint.topk(top).indices.tolist())
    tau = metrics.kendall_tau(selectivity(magnitude)[None], joint[None])
    return {
        "share of the super neurons among those picked by activation alone": len(picked & supers) / len(supers),
        f"share of those picked that have the {top} largest joint scores": len(picked & largest) / top,
        "Kendall's tau of selectivity and joint score over all neurons of the block": float(tau),
    }


def table(
    norms: Mapping[str, PerNeuron],
    scores: Mapping[str, PerNeuron],
    magnitude: Magnitude,
    picked: set[int],
    supers: set[int],
) -> pd.DataFrame:
    """A row for every neuron of the block."""
    columns = {f"{name}_norm": norm for name, norm in norms.items()}
    columns |= {f"{name}_score": score for name, score in scores.items()}
    columns |= {"activation_sink": magnitude[0], "activation_elsewhere": magnitude[1]}
    columns |= {"selectivity": selectivity(magnitude)}
    neurons = range(magnitude.shape[-1])
    rows = pd.DataFrame({"neuron": neurons} | {name: values.tolist() for name, values in columns.items()})
    return rows.assign(kind=[KINDS[neuron in picked, neuron in supers] for neuron in neurons])


def caption(study: sl.Study, top: int) -> str:
    return (
        f"Weight norms of every neuron of block {study.formation.layer}, and which {top} fire most selectively for the "
        "sink token. A plain MLP has no W_gate: its W_in norms stand against the selectivity."
    )


def draw(findings: sl.Findings):
    gated = "gate_norm" in findings.table
    x, y = ("gate_norm", "up_norm") if gated else ("up_norm", "selectivity")
    titles = {"gate_norm": "norm of the W_gate column", "up_norm": "norm of the W_up column", "kind": ""}
    points = findings.table.sort_values("kind", ascending=False, key=lambda column: column == "other neuron")
    figure = sl.viz.points(points, x, y, series="kind", titles=titles, log_y=not gated, hover=("neuron", "selectivity"))
    return figure.for_each_trace(lambda trace: trace.update(marker_size=5 if trace.name == "other neuron" else 12))


ANALYSIS = sl.Analysis(
    name="super_neurons",
    title="Super neurons by their weights",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 8",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
