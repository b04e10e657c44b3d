"""Do the heads that attend most sharply have the outputs that vary most: attention entropy against variance.

    python analyses/head_imbalance.py

Averaging takes variance away, and a head of low entropy averages little, so within a block the two should be ordered
against one another. Both are taken over the queries that have a choice, those with at least two keys: the entropy
(nats) averaged over prompts and queries, the variance of ``hook_z`` across prompts averaged over positions and
dimensions. Ranks are compared within blocks (Kendall's tau, averaged over blocks), because both change from block to
block for other reasons; the null permutes the heads of every block.

Heads also differ in how much their values vary before they are averaged. The same tau with the variance of ``hook_v``
is therefore given beside it: a relation that is as strong there is not made by averaging. After formation a head of low
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
FIRST_QUERY = 1  # the first with two keys to choose from
NAMES = {"up_to_formation": "up to formation", "after_formation": "after formation", "all": "in all blocks"}

ByHead = Callable[[np.ndarray, Sequence[int]], Float[Tensor, "block head"]]


def run(
    study: sl.Study,
    *,
    span: Annotated[Literal["up_to_formation", "after_formation", "all"], "blocks to ask it of"] = "up_to_formation",
    permutations: Annotated[int, "draws of permuted heads"] = 2000,
) -> sl.Findings:
    if study.shape.n_heads < 2:
        raise sl.NotApplicableError("the model has one head in every block: there is nothing to order")
    every, everyone = tuple(range(study.shape.n_layers)), np.arange(study.batch.n)
    spans = {"up_to_formation": study.up_to_formation, "after_formation": every[study.formation.layer + 1 :]}
    spans |= {"all": every}
    blocks = spans[span] or study.after_formation()  # which refuses, with the reason
    entropy, output, values = by_head(study, every)

    def tau(what: ByHead, within: Sequence[int]) -> sl.Estimate:
        def statistic(drawn: np.ndarray) -> float:
            return float(taus(entropy(drawn, within), what(drawn, within)).nanmean())

        return statistics.bootstrap_estimate(statistic, study.batch.n, study.seed, correlation=True)

    found = tau(output, blocks)
    null = permuted(entropy(everyone, blocks), output(everyone, blocks), permutations, study)
    p_value = statistics.permutation_p(found.value, null, "less")
    verdict = sl.verdict(
        CLAIM,
        f"Kendall's tau over the heads of a block between attention entropy and the variance of the output, mean over "
        f"blocks ({NAMES[span]})",
        found,
        "the same with the heads of every block permuted",
        statistics.null_estimate(null),
        "holds when the interval of tau lies below 0 and p < 0.05",
        holds=found.below(0) and p_value < 0.05,
        p_value=p_value,
    )
    numbers = {f"tau {NAMES[name]}": tau(output, within) for name, within in spans.items() if within and name != span}
    numbers |= {f"tau {NAMES[span]} with the variance of the values before averaging": tau(values, blocks)}
    caption = (
        "Every head's attention entropy and the variance of its output across prompts, in units of its block's median, "
        "in the blocks up to formation and after it."
    )
    table = tidy(*(what(everyone, every) for what in (entropy, output, values)), formation=study.formation.layer)
    return sl.Findings(verdict, table, caption, numbers)


def by_head(study: sl.Study, blocks: tuple[int, ...]) -> tuple[ByHead, ByHead, ByHead]:
    """Entropy, variance of the output and variance of the values, as functions of the prompts drawn and the blocks."""
    found = study.measure(
        [
            sl.Readout("entropy", sites.PATTERN, blocks, lambda a, _: entropy_of(a)),
            sl.Readout("z", sites.Z, blocks, lambda z, _: z[:, FIRST_QUERY:]),
            sl.Readout("v", sites.V, blocks, lambda v, _: v[:, FIRST_QUERY:]),
        ]
    )
    z, v = ([statistics.resampled_variance(x.movedim(2, 1)) for x in found[name]] for name in ("z", "v"))
    group = study.shape.n_heads // found["v"].shape[3]  # query heads that share a key/value head
    return (
        lambda drawn, within: found["entropy"][list(within)][:, drawn].mean(1),
        lambda drawn, within: torch.stack([z[layer](drawn) for layer in within]),
        lambda drawn, within: torch.stack([v[layer](drawn) for layer in within]).repeat_interleave(group, dim=1),
    )


def entropy_of(pattern: Float[Tensor, "prompt head query key"]) -> Float[Tensor, "prompt head"]:
    return metrics.attention_entropy(pattern)[..., FIRST_QUERY:].mean(-1)


def taus(x: Float[Tensor, "block head"], y: Float[Tensor, "block head"]) -> Float[Tensor, " block"]:
    """Tau over heads in every block; NaN where all heads are alike."""
    return metrics.kendall_tau(x, y).diagonal()


def permuted(x: Tensor, y: Tensor, draws: int, study: sl.Study) -> Float[Tensor, " draw"]:
    """The mean tau when every block's heads are put in another order."""
    rng = study.generator("head_imbalance/permuted")
    orders = torch.rand(len(x), draws, x.shape[1], generator=rng).argsort(-1)
    each = [metrics.kendall_tau(a[None], b[order])[0] for a, b, order in zip(x, y, orders, strict=True)]
    return torch.stack(each).nanmean(0)


def tidy(entropy: Tensor, output: Tensor, values: Tensor, formation: int) -> pd.DataFrame:
    layer, head = np.indices(entropy.shape)
    columns = {
        "layer": layer,
        "head": head,
        "blocks": np.where(layer <= formation, NAMES["up_to_formation"], NAMES["after_formation"]),
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
    sl.analysis.main(ANALYSIS)
