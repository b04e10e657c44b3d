"""Does amplifying the variance of a token's aggregated value make it a sink, and does its norm alone?

    python analyses/variance_amplification.py

In the early blocks ``z_k' = mu + lambda (z_k - mu)``: the token's deviation from what is usual grows, and nothing else
changes. The control has the same norm and the old direction. The verdict is at the largest lambda, where each of the
two does the most that it can. Shares are of what the natural sink receives in the clean run: two equal sinks would hold
one half each, the bar is half of that, and the control must stay below 0.1, for scaling is no small disturbance.

By what does it act? The super neurons' activation at k, the norm of z and the residual norm are reported under every
lambda; and the super neurons are ablated at k in the amplified run, or as many others: if it acts through the super
neurons, the first takes the sink away and the second does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

import sinklens as sl
from sinklens import edits, sites

CLAIM = "Amplifying the variance of a token's aggregated value makes it a sink; scaling its norm alone does not."
BAR, NORM_BAR = 0.25, 0.1
EDITS = AMPLIFIED, NORM_ONLY, PLAIN = "amplified", "norm only", "lambda z"
ABLATIONS = "amplified, super neurons ablated", "amplified, as many others ablated"
SIDE = {"activation": "super neurons' mean activation", "z_norm": "norm of z", "residual_norm": "residual norm"}


def run(
    study: sl.Study,
    *,
    positions: Annotated[tuple[int, ...], "tokens to amplify, one at a time"] = (5, 10, 20),
    strengths: Annotated[tuple[float, ...], "lambdas, above 1; the verdict is at the largest"] = (1.5, 2, 4, 8, 16),
    axis: Annotated[edits.MeanAxis, "mean over prompts at k, over each prompt's positions, or over both"] = "prompts",
    layers: Annotated[tuple[int, ...], "blocks; those in which the outlier sets in by default"] = (),
    sweep_prompts: Annotated[int, "prompts for the dose-response, as many of random tokens"] = 8,
) -> sl.Findings:
    targets, layers, top = study.targets(positions), study.blocks(layers), max(strengths)
    if min(strengths) <= 1 or layers[-1] > study.formation.layer:
        raise sl.InputError(f"strengths must be above 1, and blocks at most {study.formation.layer}, where it forms")
    if axis == "prompts" and min(study.batch.n, sweep_prompts) < 2:
        raise sl.InputError("a mean over prompts needs at least 2 of them: give more, or another axis")
    z, k = study.activations(sites.Z, layers), targets[(len(targets) - 1) // 2]
    tables = [experiment(study, z, t, [(NORM_ONLY, top)], top, axis).assign(part="verdict") for t in targets]
    doses = [(edit, s) for edit in EDITS for s in strengths if (edit, s) != (AMPLIFIED, top)]
    few, left_out = study.first(sweep_prompts), ""
    tables.append(experiment(few, z, k, doses, top, axis).assign(part="prompts"))
    try:
        few.random.targets((k,))
        z = few.random.activations(sites.Z, layers)
        tables.append(experiment(few.random, z, k, doses, top, axis).assign(part="random tokens"))
    except sl.InputError as error:  # they have no sink, or the token is it
        left_out = f" Random tokens are left out: {error}."
    table: Any = pd.concat(tables, ignore_index=True)
    table["above_bar"] = (table.share > BAR).astype(float)

    def mean(edit: str, part: str = "verdict", column: str = "share") -> sl.Estimate:
        rows = table[(table.edit == edit) & (table.part == part) & table.strength.isin((1, top))]
        return study.mean(rows.groupby("prompt")[column].mean().tolist())

    share, control = mean(AMPLIFIED), mean(NORM_ONLY)
    verdict = sl.verdict(
        CLAIM,
        f"attention gained by the token at lambda {top:g}, as a share of the natural sink's (mean over tokens)",
        share,
        "the same with z scaled to the norm that amplification gives it",
        control,
        f"holds when the share's interval lies above {BAR} and the control's below {NORM_BAR}",
        holds=share.above(BAR) and control.below(NORM_BAR),
    )
    numbers = {f"share of prompts in which a token gains more than {BAR}": mean(AMPLIFIED, column="above_bar")}
    numbers |= {f"share gained, {edit}": mean(edit) for edit in ABLATIONS}
    for part, rows in table[table.part != "verdict"].groupby("part"):
        numbers |= {f"share gained by token {k}, {part}, {edit}": mean(edit, str(part)) for edit in EDITS}
        numbers |= {f"tau of lambda and attention, {part}, {edit}": study.mean(taus(rows, edit)) for edit in EDITS}
    for column, name in SIDE.items():
        numbers |= {f"{name}, {edit}": mean(edit, column=column) for edit in ("clean", AMPLIFIED, NORM_ONLY)}
    caption = (
        f"Attention that token {k} receives after formation against lambda, and what else lambda changes there. "
        f"Lambda 1 is the clean run.{left_out}"
    )
    return sl.Findings(verdict, table, caption, numbers)


def experiment(study: sl.Study, z: dict[int, Tensor], k: int, cases: list, top: float, axis: edits.MeanAxis):
    """Every (edit, lambda) of ``cases`` at token k, the clean run, and the amplified run at ``top``, ablated too."""
    block, neurons, n = (study.formation.layer,), list(study.formation.neurons), study.batch.n

    def patch(edit: str, strength: float) -> sl.Patch:
        amplified = edits.amplification(z, k, strength, axis)
        plain = replace(amplified, mean={layer: torch.zeros_like(x[0, 0]) for layer, x in z.items()})
        made = {AMPLIFIED: amplified, NORM_ONLY: edits.SameNormScaling(of=amplified), PLAIN: plain}
        return sl.Patch(sites.Z, tuple(z), (k,), made[edit], allow_unchanged=True)  # no variance, no effect

    def at_k(name: str, site: sl.HookSite, layers: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> sl.Readout:
        return sl.readouts.vector_readout(name, site, layers, (k,), n, lambda x, _: function(x.float()))

    patches, none = [patch(*case) for case in cases], edits.Constant()
    for units in (tuple(neurons), study.other_neurons("amplification/others")[0]):
        patches.append(sl.Patch(sites.MLP_POST, block, (k,), none, units, run=AMPLIFIED, allow_unchanged=True))
    measured = [
        sl.readouts.attention_received("attention", study.after_formation(), (k,), n),
        sl.readouts.attention_received("sink_attention", study.after_formation(), study.sink, n),
        at_k("activation", sites.MLP_POST, block, lambda x: x[:, neurons].abs().mean(-1)),
        at_k("z_norm", sites.Z, tuple(z), lambda x: x.flatten(1).norm(dim=-1)),
        at_k("residual_norm", sites.RESID_POST, block, lambda x: x.norm(dim=-1)),
    ]
    found = study.run(patches, measured, {"base": (), AMPLIFIED: (patch(AMPLIFIED, top),)})
    labels = [{"edit": edit, "strength": s} for edit, s in (*cases, *((edit, top) for edit in ABLATIONS))]
    runs = {"base": {"edit": "clean", "strength": 1.0}, AMPLIFIED: {"edit": AMPLIFIED, "strength": top}}
    table = sl.analysis.patch_table(found, labels, runs)
    before, sink = (found.runs["base"][name].numpy()[table.prompt] for name in ("attention", "sink_attention"))
    return table.assign(share=(table.attention - before) / sink, token=k)


def taus(table: Any, edit: str) -> list[float]:
    """Kendall's tau of lambda and attention in every prompt, the clean run at lambda 1."""
    rows = table[table.edit.isin(("clean", edit))]
    found: list[Any] = [stats.kendalltau(each.strength, each.attention) for _, each in rows.groupby("prompt")]
    return [x.statistic for x in found]


def draw(findings: sl.Findings):
    table: Any = findings.table.query("part != 'verdict'").rename(columns={"strength": "lambda"})
    curves = pd.concat([table[table.edit.isin(("clean", edit))].assign(edit=edit) for edit in EDITS])
    means: Any = curves.groupby(["part", "edit", "lambda"], as_index=False).mean(numeric_only=True)
    own = means[means.part == "prompts"]
    seen = f"attention received by token {table.token.iloc[0]}, "
    panels = [means.assign(panel=seen + means.part, value=means.attention)]
    panels += [own.assign(panel=name, value=own[column]) for column, name in SIDE.items()]
    shown, titles = pd.concat(panels), {"value": ""}
    figure = sl.viz.line(shown, "lambda", "value", series="edit", facet="panel", titles=titles, log_x=True, height=260)
    figure.update_xaxes(tickvals=sorted(set(means["lambda"])), showticklabels=True)
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="variance_amplification", title="Amplifying variance", claim=CLAIM, run=run, draw=draw, paper="figures 6, 20"
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
