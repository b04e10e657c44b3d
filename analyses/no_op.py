"""Is the sink a place to do nothing: what does a head take from it, and what is lost without that?

    sinklens analyse no_op

A softmax has to put its weight somewhere, and a head that has nothing to say puts it where nothing comes of it: on a
token with a value of next to no norm. Fesser et al. (arXiv 2606.08105) call a sink a *no-op* where its value's norm is
less than 0.2 of the others', and a *broadcast* where it is about as large: then every query that looks at it is told
the same thing. So of the heads that have a sink (it receives more than 0.3 there, Gu et al., ICLR 2025) the value's
norm is asked, and whether a head puts out less the more it looks at the sink.

The cause is asked of the loss. Without the sink as a place to look at, attention goes to the other tokens, and that
costs something; if the place is all that counts, then its value can be set to zero at a tenth of that cost. An ordinary
token's value in its place must cost more: the place does not work with any content.

Pitfalls: a value of small norm says nothing of what W_O makes of it; and under grouped queries several heads share a
value, of which each may make another use.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites

CLAIM = "The sink is a no-op: its value is next to nothing, and nothing is lost without it."
NO_OP, BROADCAST = 0.2, 0.8
"""Of Fesser et al.: the ratio of norms of a no-op; "about 1" is a broadcast, 0.8 is ours."""
LESS = -0.3  # ours: a moderate rank correlation
TENTH = 0.1  # ours
CAPTION = (
    "Every head behind the formation block: attention that the sink receives from later queries, and the norm of its "
    "value over that of ordinary tokens (means over prompts). Dashed: what makes a no-op."
)


def run(
    study: sl.Study,
    *,
    eps: Annotated[float, "attention received with which a head has a sink", sl.Between(0, 1)] = 0.3,
) -> sl.Findings:
    layers = study.after_formation(None)
    study.require("pattern_weighs_values", layers)
    share, ratio, tau, shuffled, rank = heads(study, layers)
    with_sink = (share.mean(1, keepdim=True) > eps).expand_as(share)
    if not with_sink.any():
        raise sl.NotApplicableError(f"no head gives the sink more than {eps:g} of its attention: choose less (eps=)")

    def over(x: Tensor, of: Tensor = with_sink) -> sl.Estimate:
        """Mean over the heads that have a sink, with its interval over prompts."""
        return study.mean(torch.where(of, x, torch.nan).nanmean((0, 2)))

    value = small(over(ratio), over(torch.ones_like(ratio)))
    verdict = sl.analysis.verdict_of(CLAIM, [value, quiet(over(tau), over(shuffled)), harmless(study, layers)])
    of_heads = torch.where(with_sink, ratio, torch.nan).nanmean(1)
    numbers: dict[str, sl.Estimate | float] = {
        "heads with a sink, share": float(with_sink[:, 0].float().mean()),
        f"of these, with a value's norm below {NO_OP} of the others' (no-op)": share_of(of_heads < NO_OP, with_sink),
        f"of these, above {BROADCAST} (broadcast)": share_of(of_heads > BROADCAST, with_sink),
        "stable rank of what such a head puts out": over(rank),
        "stable rank of what the other heads put out": over(rank, ~with_sink),
    }
    axes = {"layer": layers, "head": range(share.shape[-1])}
    columns = {"share": share, "ratio": ratio, "tau": tau, "stable_rank": rank}
    places = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    means = {name: x.nanmean(1).flatten().double().numpy() for name, x in columns.items()}
    table = pd.DataFrame(means, index=places).reset_index()
    return sl.Findings(verdict, table.assign(sink=(table["share"] > eps)), CAPTION, numbers)


def share_of(marks: Float[Tensor, "layer head"], with_sink: Tensor) -> float:
    """Share of the heads with a sink that are marked."""
    return float(marks.sum() / with_sink[:, 0].sum())


def small(ratio: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "value",
        "The sink's value is next to nothing.",
        statistic="norm of the sink's value over the mean of ordinary tokens', mean over the heads with a sink",
        estimate=ratio,
        control="an ordinary token, by construction",
        control_estimate=control,
        rule=f"holds when the whole interval lies below {NO_OP}",
        conditions=[sl.analysis.below(ratio, NO_OP)],
        detail=f"a broadcast would be above {BROADCAST}",
    )


def quiet(tau: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "output",
        "A head puts out less the more it looks at the sink.",
        statistic="Kendall's tau, over queries, of a head's attention to the sink and its output's norm, mean over "
        "the heads with a sink",
        estimate=tau,
        control="the same with the queries of each prompt shuffled",
        control_estimate=control,
        rule=f"holds when the whole interval lies below {LESS} and below the control's",
        conditions=[sl.analysis.below(tau, LESS), sl.analysis.below(tau, control)],
    )


def heads(study: sl.Study, layers: tuple[int, ...]) -> tuple[Tensor, ...]:
    """``[layer prompt head]``: attention received by the sink, its value's norm over ordinary ones', tau of attention
    and output, the same shuffled, and the stable rank of the output over the queries behind the sink.
    """
    order = torch.rand(study.batch.length, generator=study.generator("no_op/shuffled")).argsort()

    def paid(pattern: Tensor, rows: sl.Rows) -> Tensor:
        sinks = study.sinks.to(pattern.device)[rows.prompts]
        return pattern[torch.arange(len(pattern), device=pattern.device), :, :, sinks].float()

    def value(v: Tensor, rows: sl.Rows) -> Tensor:
        norm = metrics.vector_norm(v)  # [row pos kv_head]
        weight = study.ordinary.to(norm)[rows.prompts][..., None]
        return study.sink_first(norm, rows.prompts)[:, 0] / ((norm * weight).sum(1) / weight.sum(1))

    def output(z: Tensor, _rows: sl.Rows) -> Tensor:
        return metrics.vector_norm(z).transpose(1, 2)

    def rank(z: Tensor, rows: sl.Rows) -> Tensor:
        return metrics.stable_rank(study.sink_first(z, rows.prompts)[:, 1:].transpose(1, 2))

    read = study.measure(
        [
            sl.Readout("paid", sites.PATTERN, layers, paid),
            sl.Readout("value", sites.V, layers, value),
            sl.Readout("output", sites.Z, layers, output),
            sl.Readout("rank", sites.Z, layers, rank),
        ]
    )
    later = torch.arange(study.batch.length) > study.sinks[:, None]  # [prompt query]
    seen = later[None, :, None].expand_as(read["paid"])
    share = torch.where(seen, read["paid"], 0).sum(-1) / seen.sum(-1)
    ratio = read["value"].repeat_interleave(share.shape[-1] // read["value"].shape[-1], -1)
    tau, shuffled = torch.empty_like(share), torch.empty_like(share)
    for prompt, queries in enumerate(later):
        paid_to, norm = (read[name][:, prompt][..., queries].flatten(0, 1) for name in ("paid", "output"))
        mixed = norm[:, order[order < queries.sum()]]
        for taus, y in ((tau, norm), (shuffled, mixed)):
            taus[:, prompt] = metrics.kendall_tau(paid_to, y).diagonal().view(share.shape[0], -1)
    return share, ratio, tau, shuffled, read["rank"]


def harmless(study: sl.Study, layers: tuple[int, ...]) -> sl.analysis.Part:
    """The cause: is it the place that counts, and not what is taken from there?"""
    values = study.activations(sites.V, layers)
    ordinary = study.ordinary.to(next(iter(values.values())).device)
    mean = {layer: v[ordinary].float().mean(0) for layer, v in values.items()}
    keep = torch.ones(study.batch.n, study.batch.length, study.batch.length, dtype=torch.bool)
    keep[torch.arange(study.batch.n), :, study.sinks] = False
    keep |= torch.eye(study.batch.length, dtype=torch.bool)
    behind = tuple(tuple(range(sink + 1, study.batch.length)) for sink in study.formation.sink_positions)
    patches = [
        sl.Patch(sites.PATTERN, layers, behind, edits.MaskKeys(keep=keep)),
        sl.Patch(sites.V, layers, study.sink, edits.Constant()),
        sl.Patch(sites.V, layers, study.sink, edits.Constant("mean", mean)),
    ]
    result = study.run(patches, [study.readout("loss")])
    place, zero, content = result.added(patches, "loss").numpy()
    cost, control = (study.bootstrap(lambda i, x=x: x[i].mean() / place[i].mean()) for x in (zero, content))
    return sl.analysis.judge(
        "cause",
        "place alone",
        "The sink's value can be done without: the place is what counts.",
        statistic="loss added by a sink's value of zero, as a share of what is added where nobody can look at the sink",
        estimate=cost,
        control="the same with the mean value of ordinary tokens in its place",
        control_estimate=control,
        rule=f"holds when the interval lies below {TENTH} and below the control's, and no sink to look at costs loss",
        conditions=[
            sl.analysis.below(cost, TENTH),
            sl.analysis.below(cost, control),
            sl.analysis.above(study.mean(place), 0.0),
        ],
        detail=f"no sink to look at: {sl.statistics.estimate_text(study.mean(place))} nats more; its value zero: "
        f"{sl.statistics.estimate_text(study.mean(zero))}",
    )


def draw(findings: sl.Findings):
    titles = {"share": "attention received by the sink", "ratio": "norm of its value over others'"}
    table = findings.table.assign(
        head=[f"{a}.{b}" for a, b in zip(findings.table.layer, findings.table["head"], strict=True)]
    )
    figure = sl.viz.points(table, "share", "ratio", series="sink", titles=titles, hover=("head",))
    return sl.viz.mark(figure, y=NO_OP)


ANALYSIS = sl.Analysis(
    name="no_op",
    title="A place to do nothing",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="no-op: below 0.2, broadcast: about 1 (Fesser et al., arXiv 2606.08105)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
