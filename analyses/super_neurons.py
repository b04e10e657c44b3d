"""Do the neurons that fire for the sink have outlying weight norms in W_gate and W_up?

    python analyses/super_neurons.py

Formation picks super neurons by weights *and* activation, so asking whether those have large weights would answer
itself. Here neurons are picked by activation alone: the ones whose mean magnitude on the sink token is largest against
what they reach on other tokens (95th percentile of each prompt, mean over prompts). How far their weight norms outlie
is then a finding. A neuron's joint score is the smaller of its two scores, one for each matrix; a plain MLP has W_in
alone. The null is as many neurons drawn at random.

A score counts as outlying from a robust z of 5, which is what formation asks of a super neuron's weights, or from the
99th percentile of the block's neurons.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

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


def run(
    study: sl.Study,
    *,
    top: Annotated[int, "how many neurons to pick by activation; 0: as many as there are super neurons"] = 0,
    score: Annotated[Literal["robust_z", "percentile"], "how far a weight norm outlies its block's"] = "robust_z",
    draws: Annotated[int, "random sets of neurons for the null"] = 2000,
) -> sl.Findings:
    layer, d_mlp = study.formation.layer, study.shape.d_mlp
    top = top or len(study.formation.neurons)
    if not 0 < top < d_mlp:
        raise sl.InputError(f"top={top} must be in 1..{d_mlp - 1}: the block has {d_mlp} neurons")
    weights = study.weights(layer)
    matrices = {"gate": weights.W_gate, "up": weights.W_in}
    norms = {name: w.detach().float().norm(dim=0).cpu() for name, w in matrices.items() if w is not None}
    scores = {name: scored(norm, score) for name, norm in norms.items()}
    joint = torch.stack(list(scores.values())).amin(0)
    found = study.measure([sl.Readout("fired", sites.MLP_POST, (layer,), on_sink_and_elsewhere(study.sinks))])
    fired = found["fired"][0]  # [prompt, (sink, elsewhere), neuron]
    mean = fired.mean(0)
    chosen = most_selective(mean, top)

    def statistic(prompts: np.ndarray) -> float:
        return float(joint[most_selective(fired[prompts].mean(0), top)].mean())

    estimate = sl.statistics.bootstrap_estimate(statistic, study.batch.n, study.seed)
    rng = study.generator("super_neurons/null")
    null = torch.stack([joint[torch.randperm(d_mlp, generator=rng)[:top]].mean() for _ in range(draws)])
    control, p = sl.statistics.null_estimate(null), sl.statistics.permutation_p(estimate.value, null)
    least = LEAST[score]
    verdict = sl.verdict(
        CLAIM,
        f"mean {score.replace('_', ' ')} of the weight norms (the smaller of {' and '.join(scores)}) of the {top} "
        "neurons of the formation block that fire most selectively for the sink",
        estimate,
        f"as many neurons drawn at random, {draws} times",
        control,
        f"holds when p < 0.05 and the whole interval lies above {least:g} and above the null's range",
        holds=p < 0.05 and estimate.above(max(least, control.high)),
        p_value=p,
    )
    columns = {f"{name}_norm": norm for name, norm in norms.items()} | {f"{n}_score": s for n, s in scores.items()}
    columns |= {"activation_sink": mean[0], "activation_elsewhere": mean[1], "selectivity": selectivity(mean)}
    table = pd.DataFrame({"neuron": range(d_mlp)} | {name: value.tolist() for name, value in columns.items()})
    picked, supers = set(chosen.tolist()), set(study.formation.neurons)
    table["kind"] = [KINDS[neuron in picked, neuron in supers] for neuron in range(d_mlp)]
    largest = set(joint.topk(top).indices.tolist())
    tau = metrics.kendall_tau(selectivity(mean)[None], joint[None])
    numbers = {
        "share of the super neurons among those picked by activation alone": len(picked & supers) / len(supers),
        f"share of those picked that have the {top} largest joint scores": len(picked & largest) / top,
        "Kendall's tau of selectivity and joint score over all neurons of the block": float(tau),
    }
    caption = (
        f"Weight norms of every neuron of block {layer}, and which {top} fire most selectively for the sink token. "
        "A plain MLP has no W_gate: its W_in norms stand against the selectivity."
    )
    return sl.Findings(verdict, table, caption, numbers)


def scored(norms: Tensor, score: str) -> Tensor:
    """Robust z, or the percentile of each norm among all."""
    if score == "robust_z":
        return metrics.robust_z(norms)
    return 100 * torch.searchsorted(norms.sort().values, norms, right=True) / len(norms)


def on_sink_and_elsewhere(sinks: Tensor):
    """Magnitude of every neuron on the sink token, and its 95th percentile over the other tokens of the prompt."""

    def reduce(post: Tensor, rows: sl.Rows) -> Tensor:
        sink = sinks.to(post.device)[rows.prompts]
        magnitude = post.float().abs()
        index = torch.arange(len(sink), device=post.device)
        other = torch.ones(post.shape[:2], dtype=torch.bool, device=post.device)
        other[index, sink] = False
        rest = magnitude[other].view(len(sink), -1, post.shape[-1])
        return torch.stack([magnitude[index, sink], rest.quantile(0.95, dim=1)], 1)

    return reduce


def selectivity(fired: Tensor) -> Tensor:
    """``[(sink, elsewhere), neuron] -> [neuron]``, their ratio: 0 for a neuron that never fires for the sink."""
    return torch.where(fired[0] > 0, fired[0] / fired[1], 0)


def most_selective(fired: Tensor, top: int) -> Tensor:
    """The ``top`` most selective neurons; among infinite ones those that fire most."""
    by_size = fired[0].argsort(descending=True, stable=True)
    return by_size[selectivity(fired)[by_size].argsort(descending=True, stable=True)][:top]


def draw(findings: sl.Findings):
    gated = "gate_norm" in findings.table
    x, y = ("gate_norm", "up_norm") if gated else ("up_norm", "selectivity")
    titles = {"gate_norm": "norm of the W_gate column", "up_norm": "norm of the W_up column", "kind": ""}
    shown = findings.table.sort_values("kind", ascending=False, key=lambda column: column == "other neuron")
    figure = sl.viz.points(shown, x, y, series="kind", titles=titles, log_y=not gated, hover=("neuron", "selectivity"))
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
    sl.analysis.main(ANALYSIS)
