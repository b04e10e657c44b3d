"""Does W_O pass the first token's variance on: its weights against the variance of what it reads, and what comes out.

    python analyses/w_o_alignment.py

An output neuron i of attention (a residual dimension) reads all heads' aggregated values through the column
``W_O[:, i]``. Where Kendall's tau between ``|W_O[:, i]|`` and the variance of these inputs across prompts, taken at the
sink, is positive, it weighs most what varies most. (``W_O^2`` has the same ranks.) The null permutes the variances,
those of query heads that share a value head together: at the first token these are equal.

The paper shows the block whose attention feeds the MLP that forms the sink (block 1 of Llama-2); here that is the last
of the blocks looked at, and stands beside all of them. That the weights are aligned is no cause: does the write act by
its alignment? With z permuted within every head, what W_O reads has the same variance and is not aligned with it; and
if alignment passes the sink on to the super neurons, what counts of attention's output is what these read of it.

The tau at an ordinary position is no part of the rule: a W_O that favours what varies anywhere passes the first token's
variance on just as well, and the comparison says whether it does more. The second half of the claim is about
``z @ W_O`` itself, before any norm that may follow: there the sink must still vary most across prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
CAPTION = "Kendall's tau of output neurons' weights with the variances they read at the sink, and with these permuted."
SINK, ORDINARY, PERMUTED = "sink", "ordinary position", "permuted"
SOUGHT = 0.3
"""A tau of this size (the paper's) must have been possible to see, for one that is not to speak against the claim."""
RESAMPLES = 200  # fewer than usual: each costs a rank correlation with every output neuron

Blocks = Sequence[Tensor]
"""A tensor for every block: inputs ``[prompt input]``, their variances ``[draw input]``, weights ``[output input]``."""


def run(
    study: sl.Study,
    *,
    layers: Annotated[tuple[int, ...], "blocks to look at; those up to the first formation blocks by default"] = (),
    weights: Annotated[Literal["absolute", "signed"], "the weights to rank against variances"] = "absolute",
    outputs: Annotated[int, "how many output neurons to draw, where there are more", sl.Between(1)] = 512,
    permutations: Annotated[int, "draws of permuted variances", sl.Between(1, 100_000)] = 200,
) -> sl.Findings:
    if min(outputs, permutations) < 1:
        raise sl.InputError(f"outputs={outputs} and permutations={permutations} must be at least 1")
    sl.analysis.check_sink_varies(study)
    blocks = study.blocks(layers)
    study.require("heads_write", blocks)
    z = [x.float() for x in study.activations(sites.Z, blocks).values()]
    W_O = [study.weights(layer).W_O.detach().float().flatten(0, 1) for layer in blocks]
    neurons = torch.randperm(study.shape.d_model, generator=study.generator("w_o_alignment/outputs"))[:outputs]
    read = [(w.abs() if weights == "absolute" else w).T[neurons.to(w.device)] for w in W_O]
    inputs = inputs_by_token(study, z)
    tau = {who: tau_of_outputs(study, each, read) for who, each in inputs.items()}
    null = taus(permuted(all_variances(inputs[SINK]), permutations, study), read)
    after = statistics.resampled_curves(study.sink_first(x.flatten(2) @ w) for x, w in zip(z, W_O, strict=True))
    highest = study.bootstrap(lambda on: sink_is_highest(after(on)))
    aligned = alignment("alignment", "mean over outputs and blocks", tau[SINK], null)
    parts = [aligned, stays_highest(highest)]
    if len(blocks) > 1:
        shown = tau_of_outputs(study, inputs[SINK][-1:], read[-1:])
        parts.insert(1, alignment(f"block {blocks[-1]}", f"mean over outputs, block {blocks[-1]}", shown, null[-1:]))
    verdict = sl.analysis.verdict_of(CLAIM, [*parts, *causes(study)])
    variance = after(np.arange(study.batch.n))
    by_output = {who: taus(all_variances(each), read)[:, 0] for who, each in inputs.items()}
    table = table_of(blocks, neurons, by_output | {PERMUTED: one_draw_each(null)}, variance)
    return sl.Findings(verdict, table, CAPTION, numbers(tau[ORDINARY], highest, blocks, by_output[SINK], variance))


def alignment(name: str, over: str, tau: sl.Estimate, null: Float[Tensor, "block draw output"]) -> sl.analysis.Part:
    """The quantity: is tau positive, and more than chance?"""
    by_chance = statistics.null_estimate(null.mean((0, 2)))
    p_value = statistics.permutation_p(tau.value, null.mean((0, 2)))
    return sl.analysis.judge(
        "quantity",
        name,
        "W_O is aligned with the first token's variance.",
        statistic=f"Kendall's tau between W_O's weights and the variance of the sink's values, {over}",
        estimate=tau,
        control="the same with permuted variances",
        control_estimate=by_chance,
        rule="holds when the interval of tau lies above 0 and above the null's, and p < 0.05; tau need not exceed an "
        "ordinary one's",
        conditions=[
            sl.analysis.rare(tau, by_chance, p_value, sought=SOUGHT),
            sl.analysis.above(tau, 0.0),
            sl.analysis.above(tau, by_chance.high),
        ],
    )


def stays_highest(highest: sl.Estimate) -> sl.analysis.Part:
    """The quantity: does the sink vary most after W_O?"""
    return sl.analysis.judge(
        "quantity",
        "highest after W_O",
        "The first token's variance stays the highest after W_O.",
        statistic="share of blocks in which the sink varies most of all positions after W_O",
        estimate=highest,
        rule="holds when the whole interval lies above one half",
        conditions=[sl.analysis.above(highest, 0.5)],
    )


def causes(study: sl.Study) -> list[sl.analysis.Part]:
    """Does attention's write act by its alignment?"""
    asked = (
        ("permuted", "permuted_z", "other_position", "Without the alignment of z and W_O there is no sink."),
        (
            "what is read",
            "reading_subspace",
            "random_subspace",
            "W_O passes the variance on in the directions that the super neurons read.",
        ),
    )
    stage = sl.stages.W_O_ALIGNMENT
    return [
        sl.analysis.cause(study, stage, edit, control, name=name, sentence=sentence, target=None)
        for name, edit, control, sentence in asked
    ]


def inputs_by_token(study: sl.Study, z: Blocks) -> dict[str, Blocks]:
    """What every output neuron reads at the sink, and at an ordinary position of the same prompt."""
    positions = {SINK: study.sinks, ORDINARY: study.ordinary_position("w_o_alignment/ordinary")}
    return {who: [x[torch.arange(len(x)), where].flatten(1) for x in z] for who, where in positions.items()}


def variances(inputs: Blocks, prompts: Int[np.ndarray, "draw prompt"]) -> Blocks:
    """Of every input, across the prompts of every draw."""
    return [torch.stack([x[torch.from_numpy(draw)].var(0) for draw in prompts]) for x in inputs]


def all_variances(inputs: Blocks) -> Blocks:
    """The same, as the one draw that all prompts are."""
    return variances(inputs, np.arange(len(inputs[0]))[None])


def permuted(variance: Blocks, draws: int, study: sl.Study) -> Blocks:
    """The first draw's variances in other orders, in which query heads that share a value head stay together."""
    rng, heads = study.generator("w_o_alignment/permuted"), {"kv": study.shape.n_kv_heads, "d": study.shape.d_head}
    units = [rearrange(v[0], "(kv group d) -> (kv d) group", **heads) for v in variance]
    orders = [statistics.random_orders((draws, len(unit)), rng).to(unit.device) for unit in units]
    shuffled = [unit[order] for unit, order in zip(units, orders, strict=True)]
    return [rearrange(unit, "draw (kv d) group -> draw (kv group d)", **heads) for unit in shuffled]


def taus(variance: Blocks, read: Blocks) -> Float[Tensor, "block draw output"]:
    return torch.stack([metrics.kendall_tau(v, w).cpu() for v, w in zip(variance, read, strict=True)])


def tau_of_outputs(study: sl.Study, inputs: Blocks, read: Blocks) -> sl.Estimate:
    """Mean over outputs and blocks, with its interval over prompts."""
    return study.bootstrap(
        lambda prompts: taus(variances(inputs, prompts), read).mean((0, 2)),
        n_resamples=RESAMPLES,
        vectorized=True,
        correlation=True,
    )


def one_draw_each(null: Float[Tensor, "block draw output"]) -> Float[Tensor, "block output"]:
    """A draw of its own for every output neuron: one permutation's taus rise and fall together."""
    output = torch.arange(null.shape[2])
    return null[:, output % null.shape[1], output]


def sink_is_highest(variance: Float[Tensor, "block pos"]) -> float:
    """Share of blocks in which no other position varies as much."""
    return float((variance[:, 0] > variance[:, 1:].amax(-1)).float().mean())


def table_of(
    blocks: tuple[int, ...],
    neurons: Int[Tensor, " output"],
    by_output: Mapping[str, Float[Tensor, "block output"]],
    variance: Float[Tensor, "block pos"],
) -> pd.DataFrame:
    """Tau of every output neuron, and the variance at every position; ``index`` is that of the neuron or position."""
    axes = {"layer": blocks, "index": neurons.tolist()}
    tables = [sl.analysis.tidy(values, axes, quantity="tau", token=who) for who, values in by_output.items()]
    axes = {"layer": blocks, "index": range(variance.shape[1])}
    tables.append(sl.analysis.tidy(variance, axes, quantity="variance after W_O", token="sink first"))
    return pd.concat(tables, ignore_index=True)


def numbers(
    ordinary: sl.Estimate,
    highest: sl.Estimate,
    blocks: tuple[int, ...],
    by_output: Float[Tensor, "block output"],
    variance: Float[Tensor, "block pos"],
) -> dict[str, sl.Estimate | float]:
    lines: dict[str, sl.Estimate | float] = {
        "the same tau at an ordinary position": ordinary,
        "share of blocks in which the sink has the highest variance after W_O": highest,
    }
    over = metrics.relative_to_later(variance)[:, 0].tolist()
    for layer, tau, ratio in zip(blocks, by_output.mean(1).tolist(), over, strict=True):
        lines |= {f"tau in block {layer}": tau, f"variance after W_O over the median in block {layer}": ratio}
    return lines


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
    sl.main(ANALYSIS)
