"""Do the heads that attend most sharply have the outputs that vary most: attention entropy against variance.

    python analyses/head_imbalance.py

Averaging takes variance away, and a head of low entropy averages little, so within a block the two should be ordered
against one another. Both are taken over the queries that have a choice, those with at least two keys: the entropy
(nats) averaged over prompts and queries, the variance of ``hook_z`` across prompts averaged over positions and
dimensions. Ranks are compared within blocks (Kendall's tau, averaged over blocks), because both change from block to
block for other reasons; the null permutes the heads of every block.

Heads also differ in how much their values vary before they are averaged. The same tau with the variance of ``hook_v``
is therefore given beside it: a relation that is as strong there is not made by averaging. The paper shows one block;
that whose attention feeds the MLP which forms the sink stands beside all of them. (A block has few heads, so that
little can be told from chance in one: such a part is undecided.) After formation a head of low
entropy looks at the sink, whose value is near zero, which is another mechanism: by default (``span``) the question is
about the blocks up to formation, and the others are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites, statistics

CLAIM = "Heads with low attention entropy have outputs of high variance."
CAPTION = (
    "Every head's attention entropy and the variance of its output across prompts, in units of its block's median, "
    "in the blocks up to formation and after it."
)
FIRST_QUERY = 1  # the first with two keys to choose from
SOUGHT = 0.3
"""A tau of this size must have been possible to see, for one that is not seen to speak against the claim."""
NAMES = {"up_to_formation": "up to formation", "after_formation": "after formation", "all": "in all blocks"}

PerHead = Float[Tensor, "block head"]
ByHead = Callable[[np.ndarray, Sequence[int]], PerHead]
"""A quantity of every head, as a function of the prompts it is computed from and of the blocks."""


def run(
    study: sl.Study,
    *,
    span: Annotated[Literal["up_to_formation", "after_formation", "all"], "blocks to ask it of"] = "up_to_formation",
    permutations: Annotated[int, "draws of permuted heads", sl.Between(1, 100_000)] = 2000,
) -> sl.Findings:
    if study.shape.n_heads < 2:
        raise sl.NotApplicableError("the model has one head in every block: there is nothing to order")
    every, all_prompts = tuple(range(study.shape.n_layers)), np.arange(study.batch.n)
    formation, until = study.formation, study.formation.until(study.shape.n_layers)
    spans = {"up_to_formation": study.up_to_formation, "after_formation": every[formation.layer + 1 : until]}
    spans |= {"all": every}
    blocks = spans[span] or study.after_formation()  # which refuses, with the reason
    entropy, output, values = by_head(study, every)
    chosen = {NAMES[span]: blocks}
    if span == "up_to_formation" and len(blocks) > 1:
        shown = study.formation.first  # its attention feeds the MLP that forms the sink, as in the paper's block 1
        chosen[f"block {shown}"] = (shown,)
    parts = []
    for name, within in chosen.items():
        tau = tau_of_heads(study, entropy, output, within)
        null = null_of_heads(entropy(all_prompts, within), output(all_prompts, within), permutations, study)
        p_value = statistics.permutation_p(tau.value, null, "less")
        parts.append(order_of_heads(name, tau, statistics.null_estimate(null), p_value))
    verdict = sl.analysis.verdict_of(CLAIM, parts)
    others = {name: within for name, within in spans.items() if within and name != span}
    numbers = {f"tau {NAMES[name]}": tau_of_heads(study, entropy, output, within) for name, within in others.items()}
    before = tau_of_heads(study, entropy, values, blocks)
    numbers |= {f"tau {NAMES[span]} with the variance of the values before averaging": before}
    columns = (quantity(all_prompts, every) for quantity in (entropy, output, values))
    return sl.Findings(verdict, table(*columns, formation=formation.layer, until=until), CAPTION, numbers)


def order_of_heads(name: str, tau: sl.Estimate, null: sl.Estimate, p_value: float) -> sl.analysis.Part:
    """The quantity: do entropy and variance order the heads against one another?"""
    return sl.analysis.judge(
        "quantity",
        name,
        CLAIM,
        statistic="Kendall's tau over the heads of a block between attention entropy and the variance of the output, "
        f"mean over blocks ({name})",
        estimate=tau,
        control="the same with the heads of every block permuted",
        control_estimate=null,
        rule="holds when the interval of tau lies below 0 and p < 0.05; does not hold when it lies above, or when a "
        f"tau of {-SOUGHT:g} could have been told from chance and the whole interval is nearer to 0",
        conditions=[
            sl.analysis.rare(tau, null, p_value, sought=SOUGHT, alternative="less"),
            sl.analysis.below(tau, 0.0),
        ],
    )


def by_head(study: sl.Study, blocks: tuple[int, ...]) -> tuple[ByHead, ByHead, ByHead]:
    """Entropy, variance of the output and variance of the values."""
    readings = study.measure(
        [
            sl.Readout("entropy", sites.PATTERN, blocks, lambda a, _: entropy_of(a)),
            sl.Readout("z", sites.Z, blocks, lambda z, _: z[:, FIRST_QUERY:]),
            sl.Readout("v", sites.V, blocks, lambda v, _: v[:, FIRST_QUERY:]),
        ]
    )
    entropy = readings["entropy"]
    z, v = ([statistics.resampled_variance(x.movedim(2, 1)) for x in readings[name]] for name in ("z", "v"))
    group = study.shape.n_heads // readings["v"].shape[3]  # query heads that share a key/value head
    return (
        lambda prompts, within: entropy[list(within)][:, prompts].mean(1),
        lambda prompts, within: torch.stack([z[layer](prompts) for layer in within]),
        lambda prompts, within: torch.stack([v[layer](prompts) for layer in within]).repeat_interleave(group, dim=1),
    )


def entropy_of(pattern: Float[Tensor, "prompt head query key"]) -> Float[Tensor, "prompt head"]:
    return metrics.attention_entropy(pattern)[..., FIRST_QUERY:].mean(-1)


def tau_of_heads(study: sl.Study, entropy: ByHead, variance: ByHead, blocks: Sequence[int]) -> sl.Estimate:
    """Tau over the heads of a block, mean over blocks; a block whose heads are all alike has none."""

    def statistic(prompts: np.ndarray) -> float:
        return float(metrics.kendall_tau(entropy(prompts, blocks), variance(prompts, blocks)).diagonal().nanmean())

    return study.bootstrap(statistic, correlation=True)


def null_of_heads(entropy: PerHead, variance: PerHead, draws: int, study: sl.Study) -> Float[Tensor, " draw"]:
    """The mean tau when every block's heads are put in another order."""
    shape = (len(entropy), draws, entropy.shape[1])
    orders = statistics.random_orders(shape, study.generator("head_imbalance/permuted"))
    blocks = zip(entropy, variance, orders, strict=True)
    return torch.stack([metrics.kendall_tau(x[None], y[order])[0] for x, y, order in blocks]).nanmean(0)


def table(entropy: PerHead, output: PerHead, values: PerHead, formation: int, until: int) -> pd.DataFrame:
    """A row for every head."""
    layer, head = np.indices(entropy.shape)
    later = np.where(layer < until, NAMES["after_formation"], "after the next event")
    columns = {
        "layer": layer,
        "head": head,
        "blocks": np.where(layer <= formation, NAMES["up_to_formation"], later),
        "entropy": entropy,
        "variance": output,
        "relative_variance": output / output.quantile(0.5, dim=1, keepdim=True),
        "variance_of_values": values,
    }
    return pd.DataFrame({name: np.asarray(column).ravel() for name, column in columns.items()})


def draw(findings: sl.Findings):
    titles = {"entropy": "attention entropy (nats)", "relative_variance": "variance of output / median head of block"}
    return sl.viz.points(
        findings.table,
        "entropy",
        "relative_variance",
        facet="blocks",
        titles=titles,
        log_y=True,
        hover=["layer", "head"],
    )


ANALYSIS = sl.Analysis(
    name="head_imbalance",
    title="Attention entropy of heads against the variance of their outputs",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 13",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
