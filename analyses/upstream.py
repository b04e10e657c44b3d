"""Which early components make the super neurons fire: heads, or the MLPs between?

    sinklens analyse upstream

The super neurons of the formation block read the residual stream by a gate and a linear branch. Into these two inputs
lead edges from the embedding, every head and every MLP before them. Each edge is run exactly (path patching, Wang et
al. 2022; Goldowsky-Dill et al. 2023): one input alone hears what one sender writes in the other run, with the norm
computed anew, and everybody else hears their own. An effect is a share of the sink that is made at ``target``.

The paper's account has W_O write what makes the neurons fire. That is asked three times: edge by edge (do those of
heads add up to more than those of MLPs?), of all heads' edges at once put into the run without the sink (are they
enough?), and of the same taken away in the run with it (are they needed?). Beside each stand the MLPs, and what the
same heads write at an ordinary token, at the length of what they say here: any push of that size might do it.

The embedding says the same in both runs of a made sink: its edges are there and must do nothing.

Pitfall: this is what is said *directly*. A head that makes an MLP fire that makes the neurons fire counts as that MLP's
edge: heads can carry all of the sink and none of these edges. Effects of single edges do not add up where the neurons
saturate, so the sum is compared and never taken for a share.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import pandas as pd

import sinklens as sl
from sinklens.circuits import Edges
from sinklens.pairs.choice import Direction

CLAIM = "What heads write (W_O) makes the super neurons fire, more than what MLPs write."
HALF = 0.5
KINDS = {"head": "heads", "mlp": "MLPs", "embed": "embedding"}
BOTH = "all at once"
ITS_OWN, ANOTHER = "its own", "another token"
"""Whose output a sender says."""
CAPTION = (
    "Exact effect of every edge into the super neurons, both branches added up (means over prompts with 95% "
    "intervals), by sender: {top} with the largest; and all edges of a kind at once."
)


def run(
    study: sl.Study,
    *,
    target: Annotated[int, "position that is made a sink"] = 10,
    top: Annotated[int, "senders to name and to draw, those with the largest effects", sl.Between(1)] = 10,
    min_gap: Annotated[float, "exclude prompts whose sink is less than this", sl.Between(0)] = 0.01,
) -> sl.Findings:
    (position,) = study.targets((target,))
    edges = Edges.of(sl.Setting.of(study, sl.PairChoice(position)), min_gap=min_gap)
    single, of_kind = one_by_one(edges), at_once(edges)
    added = {kind: by_kind(study, single, kind) for kind in KINDS}
    control = by_kind(study, one_by_one(edges, control=True), "head")
    parts = [edge_by_edge(added, control), together(study, of_kind, "denoise"), together(study, of_kind, "noise")]
    verdict = sl.analysis.verdict_of(CLAIM, parts)
    table = pd.concat([single, of_kind], ignore_index=True)
    numbers: dict[str, sl.Estimate | float] = {
        f"edges of {KINDS[kind]}, added up (denoise)": estimate for kind, estimate in added.items()
    }
    by_set: Any = of_kind.groupby(["sender", "direction", "said"], sort=False)
    for (kind, direction, said), rows in by_set:
        numbers[f"edges of {kind} at once ({direction}, {said})"] = study.mean(rows.effect.tolist())
    for sender, estimate in largest(study, single, top).items():
        numbers[f"edges of {sender} (denoise)"] = estimate
    return sl.Findings(verdict, table, CAPTION.format(top=top), numbers)


def edge_by_edge(added: dict[str, sl.Estimate], control: sl.Estimate) -> sl.analysis.Part:
    """The quantity: edge by edge, whose do more?"""
    return sl.analysis.judge(
        "quantity",
        "edges",
        "Edge by edge, heads do more of the sink than MLPs.",
        statistic="effects of the edges of single heads into the super neurons (denoise), added up",
        estimate=added["head"],
        control="the same of the MLPs before",
        control_estimate=added["mlp"],
        rule="holds when the whole interval lies above the MLPs', and above that of what the same heads write at an "
        "ordinary token, at equal length",
        conditions=[sl.analysis.above(added["head"], added["mlp"]), sl.analysis.above(added["head"], control)],
        detail=f"another token's output: {sl.statistics.estimate_text(control)}",
    )


def together(study: sl.Study, of_kind: Any, direction: Direction) -> sl.analysis.Part:
    """The cause: do all heads' edges at once make the sink, or take it away?"""
    rows = of_kind[of_kind.direction == direction]

    def effect(kind: str, said: str) -> sl.Estimate:
        return study.mean(rows[(rows.sender == kind) & (rows.said == said)].effect.tolist())

    heads, control, mlps = effect("heads", ITS_OWN), effect("heads", ANOTHER), effect("MLPs", ITS_OWN)
    enough = direction == "denoise"
    return sl.analysis.judge(
        "cause",
        "enough" if enough else "needed",
        "What heads write is enough to make them fire." if enough else "Without what heads write they do not fire.",
        statistic=f"effect of all heads' edges into the super neurons at once ({direction})",
        estimate=heads,
        control="what they write at an ordinary token, at equal length",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {HALF}, above the control's and above the MLPs'",
        conditions=[sl.analysis.above(heads, limit) for limit in (HALF, control, mlps)],
        detail=f"all MLPs' edges at once: {sl.statistics.estimate_text(mlps)}",
    )


def one_by_one(edges: Edges, control: bool = False) -> pd.DataFrame:
    """The effect of every edge into the super neurons alone, put into the run without the sink."""
    single = edges.into(edges.graph.super_inputs)
    speaker, said = (ANOTHER, edges.other_token) if control else (ITS_OWN, None)
    labels = [label(edge.sender.name, edge.sender.kind, edge.branch, "denoise", speaker) for edge in single]
    return edges.table([[edge] for edge in single], labels, "denoise", said)


def at_once(edges: Edges) -> pd.DataFrame:
    """All edges of a kind of sender at once, in both directions, beside what another token's output does."""
    graph, tables = edges.graph, []
    of_kind = {kind: [node for node in graph.senders if node.kind == kind] for kind in ("head", "mlp")}
    sets = {kind: edges.into(graph.super_inputs, nodes) for kind, nodes in of_kind.items()}
    sets["all"] = edges.into(graph.super_inputs)
    for direction in edges.measure.setting.pair.directions:
        for speaker, said in ((ITS_OWN, None), (ANOTHER, edges.other_token)):
            labels = [label(KINDS.get(kind, kind), kind, BOTH, direction, speaker) for kind in sets]
            tables.append(edges.table(list(sets.values()), labels, direction, said))
    return pd.concat(tables, ignore_index=True)


def label(sender: str, kind: str, branch: str, direction: Direction, said: str) -> dict[str, str]:
    """The columns that say what an effect is of."""
    return {"sender": sender, "kind": kind, "branch": branch, "direction": direction, "said": said}


def by_kind(study: sl.Study, single: Any, kind: str) -> sl.Estimate:
    """What the edges of a kind of sender do one by one, added up; 0 where there are none."""
    rows = single[single.kind == kind]
    added = rows.groupby("prompt").effect.sum(min_count=1).reindex(range(study.batch.n))
    return study.mean((added if len(rows) else added.fillna(0.0)).tolist())


def largest(study: sl.Study, single: Any, top: int) -> dict[str, sl.Estimate]:
    """The senders with the largest effects, branches added up."""
    by_sender: Any = single.groupby(["prompt", "sender"]).effect.sum(min_count=1).unstack()
    order = by_sender.mean().abs().sort_values(ascending=False, kind="stable").index[:top]
    return {sender: study.mean(by_sender[sender].reindex(range(study.batch.n)).tolist()) for sender in order}


def draw(findings: sl.Findings):
    rows = []
    for name, x in findings.numbers.items():
        parts = re.fullmatch(r"edges of ([^,]+?)( at once)? \(denoise(?:, (.+))?\)", name)
        if parts and isinstance(x, sl.Estimate):
            sender, of_kind, said = parts.groups()
            panel = {"panel": BOTH if of_kind else "one sender", "said": said or ITS_OWN}
            rows.append({"sender": sender, "effect": x.value, "low": x.low, "high": x.high, **panel})
    figure = sl.viz.points(
        pd.DataFrame(rows),
        "sender",
        "effect",
        series="said",
        facet="panel",
        low="low",
        high="high",
        titles={"sender": "", "said": "what is said"},
    )
    return figure.update_xaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="upstream",
    title="Who makes the super neurons fire",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="its step 2: W_O",
    group="circuits",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
