"""Does W_O pass the first token's variance on: its weights against the variance of what it reads, and what comes out.

    python analyses/w_o_alignment.py

An output neuron i of attention (a residual dimension) reads all heads' aggregated values through the column
``W_O[:, i]``. Where Kendall's tau between ``|W_O[:, i]|`` and the variance of these inputs across prompts, taken at the
sink, is positive, it weighs most what varies most. (``W_O^2`` has the same ranks.) The null permutes the variances,
those of query heads that share a value head together: at the first token these are equal.

The tau at an ordinary position is no part of the rule: a W_O that favours what varies anywhere passes the first token's
variance on just as well, and the comparison says whether it does more. The second half of the claim is about
``z @ W_O`` itself, before any norm that may follow: there the sink must still vary most across prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites, statistics

CLAIM = "W_O is aligned with the first token's variance, which stays the highest after it."
RESAMPLES = 200  # fewer than usual: each costs a rank correlation with every output neuron


def run(
    study: sl.Study,
    *,
    layers: Annotated[tuple[int, ...], "blocks to look at; those up to the first formation blocks by default"] = (),
    weights: Annotated[Literal["absolute", "signed"], "the weights to rank against variances"] = "absolute",
    outputs: Annotated[int, "how many output neurons to draw, where there are more"] = 512,
    permutations: Annotated[int, "draws of permuted variances"] = 200,
) -> sl.Findings:
    if min(outputs, permutations) < 1:
        raise sl.InputError(f"outputs={outputs} and permutations={permutations} must be at least 1")
    if not study.sinks.any() and len(study.batch.tokens[:, 0].unique()) == 1:
        raise sl.NotApplicableError("the sink is the first token and the same in all prompts: it has no variance")
    blocks, everyone = study.blocks(layers), np.arange(study.batch.n)
    z = [x.float() for x in study.activations(sites.Z, blocks).values()]
    columns = [study.weights(layer).W_O.detach().float().flatten(0, 1) for layer in blocks]
    after = curves([study.sink_first(x.flatten(2) @ w) for x, w in zip(z, columns, strict=True)])
    share = statistics.bootstrap_estimate(lambda drawn: sink_is_highest(after(drawn)), study.batch.n, study.seed)
    chosen = torch.randperm(study.shape.d_model, generator=study.generator("w_o_alignment/outputs"))[:outputs]
    read = [(w.abs() if weights == "absolute" else w).T[chosen.to(w.device)] for w in columns]
    ordinary = torch.multinomial(study.ordinary.float(), 1, generator=study.generator("w_o_alignment/ordinary"))
    tokens = {"sink": study.sinks, "ordinary position": ordinary.squeeze(-1)}
    inputs = {who: [x[torch.arange(len(x)), where].flatten(1) for x in z] for who, where in tokens.items()}
    tau = {who: mean_tau(study, x, read) for who, x in inputs.items()}
    found = {who: taus(variances(x, everyone[None]), read)[:, 0] for who, x in inputs.items()}  # [block, output]
    null = taus(permuted(variances(inputs["sink"], everyone[None]), permutations, study), read)
    # A draw of its own for every output neuron: one permutation's taus rise and fall together.
    index = torch.arange(len(chosen))
    found["permuted"] = null[:, index % permutations, index]

    spread = after(everyone)
    axes = {"layer": blocks, "index": chosen.tolist()}  # of the output neuron, or the position
    rows = [sl.analysis.tidy(values, axes, quantity="tau", token=who) for who, values in found.items()]
    axes["index"] = range(study.batch.length)
    rows.append(sl.analysis.tidy(spread, axes, quantity="variance after W_O", token="sink first"))
    numbers: dict[str, sl.Estimate | float] = {
        "the same tau at an ordinary position": tau["ordinary position"],
        "share of blocks in which the sink has the highest variance after W_O": share,
    }
    ratio = spread[:, 0] / spread[:, 1:].quantile(0.5, dim=1)
    for layer, mean, over in zip(blocks, found["sink"].mean(1).tolist(), ratio.tolist(), strict=True):
        numbers |= {f"tau in block {layer}": mean, f"variance after W_O over the median in block {layer}": over}
    caption = (
        "Kendall's tau of output neurons' weights with the variances they read at the sink, and with these permuted."
    )
    return sl.Findings(
        judged(tau["sink"], null.mean((0, 2)), share), pd.concat(rows, ignore_index=True), caption, numbers
    )


def judged(tau: sl.Estimate, null: Float[Tensor, " draw"], share: sl.Estimate) -> sl.Verdict:
    by_chance, p_value = statistics.null_estimate(null), statistics.permutation_p(tau.value, null)
    return sl.verdict(
        CLAIM,
        "Kendall's tau between W_O's weights and the variance of the sink's values, mean over outputs and blocks",
        tau,
        "the same with permuted variances",
        by_chance,
        "holds when the interval of tau lies above 0 and above the null's, p < 0.05, and the interval of the share of "
        "blocks in which the sink varies most after W_O lies above one half; tau need not exceed an ordinary one's",
        holds=tau.above(max(0.0, by_chance.high)) and p_value < 0.05 and share.above(0.5),
        p_value=p_value,
    )


def variances(inputs: list[Tensor], drawn: Int[np.ndarray, "draw prompt"]) -> list[Float[Tensor, "draw input"]]:
    """Across the prompts of every draw, for each block's ``[prompt input]``."""
    return [torch.stack([x[torch.from_numpy(one)].var(0) for one in drawn]) for x in inputs]


def permuted(variance: list[Tensor], draws: int, study: sl.Study) -> list[Tensor]:
    """Per block ``[draw input]``: the first draw's variances in another order."""
    rng, heads = study.generator("w_o_alignment/permuted"), {"kv": study.shape.n_kv_heads, "d": study.shape.d_head}
    units = [rearrange(v[0], "(kv group d) -> (kv d) group", **heads) for v in variance]
    orders = [torch.rand(draws, len(unit), generator=rng).argsort(-1).to(unit.device) for unit in units]
    shuffled = [unit[order] for unit, order in zip(units, orders, strict=True)]
    return [rearrange(unit, "draw (kv d) group -> draw (kv group d)", **heads) for unit in shuffled]


def taus(variance: list[Tensor], read: list[Tensor]) -> Float[Tensor, "block draw output"]:
    return torch.stack([metrics.kendall_tau(v, w).cpu() for v, w in zip(variance, read, strict=True)])


def mean_tau(study: sl.Study, inputs: list[Tensor], read: list[Tensor]) -> sl.Estimate:
    return statistics.bootstrap_estimate(
        lambda drawn: taus(variances(inputs, drawn), read).mean((0, 2)),
        study.batch.n,
        study.seed,
        RESAMPLES,
        vectorized=True,
        correlation=True,
    )


def curves(written: list[Tensor]) -> Callable[[np.ndarray], Float[Tensor, "block pos"]]:
    each = [statistics.resampled_variance(x) for x in written]
    return lambda drawn: torch.stack([variance(drawn) for variance in each])


def sink_is_highest(variance: Float[Tensor, "block pos"]) -> float:
    """Share of blocks in which no other position varies as much."""
    return float((variance[:, 0] > variance[:, 1:].amax(-1)).float().mean())


def draw(findings: sl.Findings):
    table = findings.table.query("quantity == 'tau' and token != 'ordinary position'")
    table = table.assign(block="block " + table.layer.astype(str))
    figure = sl.viz.histogram(table, "value", series="token", facet="block", titles={"value": "Kendall's tau"})
    return sl.viz.mark(figure, x=0)


ANALYSIS = sl.Analysis(
    name="w_o_alignment",
    title="W_O against the variance that it reads",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 7: 0.32 in block 1 of Llama-2",
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
