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

from collections.abc import Callable, Sequence
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
VERDICT, PROMPTS, RANDOM = "verdict", "prompts", "random tokens"
"""Parts of the table: every target at the largest lambda, and one at all lambdas, on prompts and on random tokens."""

Dose = tuple[str, float]
"""An edit, and its lambda."""


def run(
    study: sl.Study,
    *,
    positions: Annotated[tuple[int, ...], "tokens to amplify, one at a time"] = (5, 10, 20),
    strengths: Annotated[tuple[float, ...], "lambdas, above 1; the verdict is at the largest"] = (1.5, 2, 4, 8, 16),
    axis: Annotated[edits.MeanAxis, "mean over prompts at k, over each prompt's positions, or over both"] = "prompts",
    layers: Annotated[tuple[int, ...], "blocks; those in which the outlier sets in by default"] = (),
    sweep_prompts: Annotated[int, "prompts for the dose-response, as many of random tokens", sl.Between(1)] = 8,
) -> sl.Findings:
    targets, layers, top = study.targets(positions), study.blocks(layers), max(strengths)
    check_options(study, layers, strengths, axis, sweep_prompts)
    k = targets[(len(targets) - 1) // 2]
    z, few = study.activations(sites.Z, layers), study.first(sweep_prompts)
    tables = [effects(study, z, token, [(NORM_ONLY, top)], top, axis).assign(part=VERDICT) for token in targets]
    doses = [(edit, s) for edit in EDITS for s in strengths if (edit, s) != (AMPLIFIED, top)]
    tables.append(effects(few, z, k, doses, top, axis).assign(part=PROMPTS))
    random_tokens, left_out = effects_on_random_tokens(few, layers, k, doses, top, axis)
    table: Any = pd.concat([*tables, *random_tokens], ignore_index=True)
    table["above_bar"] = (table.share > BAR).astype(float)
    at_top = table[table.strength.isin((1, top))]
    share, control = (mean(study, at_top, edit) for edit in (AMPLIFIED, NORM_ONLY))
    amplifies = sl.analysis.judge(
        "cause",
        "variance",
        CLAIM,
        statistic=f"attention gained by the token at lambda {top:g}, as a share of the natural sink's (mean over "
        "tokens)",
        estimate=share,
        control="the same with z scaled to the norm that amplification gives it",
        control_estimate=control,
        rule=f"holds when the share's interval lies above {BAR} and the control's below {NORM_BAR}",
        conditions=conditions(share, control),
        detail=f"beyond {BAR} in {mean(study, at_top, AMPLIFIED, column='above_bar').value:.0%} of prompts and tokens",
    )
    at_each = at_each_token(study, at_top) if len(targets) > 1 else {}
    verdict = sl.analysis.verdict_of(CLAIM, [sl.analysis.elsewhere(amplifies, at_each)])
    return sl.Findings(verdict, table, caption(k, left_out), numbers(study, table, at_top, k))


def conditions(share: sl.Estimate, control: sl.Estimate) -> list[sl.analysis.Condition]:
    return [sl.analysis.above(share, BAR), sl.analysis.below(control, NORM_BAR)]


def at_each_token(study: sl.Study, at_top: pd.DataFrame) -> dict[str, list[sl.analysis.Condition]]:
    """The rule for each token alone."""
    tokens: Any = at_top[at_top.part == VERDICT].groupby("token")
    return {f"token {k}": conditions(*(mean(study, rows, e) for e in (AMPLIFIED, NORM_ONLY))) for k, rows in tokens}


def check_options(
    study: sl.Study, layers: tuple[int, ...], strengths: Sequence[float], axis: edits.MeanAxis, sweep_prompts: int
) -> None:
    if min(strengths) <= 1 or layers[-1] > study.formation.layer:
        raise sl.InputError(f"strengths must be above 1, and blocks at most {study.formation.layer}, where it forms")
    if axis == "prompts" and min(study.batch.n, sweep_prompts) < 2:
        raise sl.InputError("a mean over prompts needs at least 2 of them: give more, or another axis")


def effects(
    study: sl.Study, z: dict[int, Tensor], k: int, doses: Sequence[Dose], top: float, axis: edits.MeanAxis
) -> pd.DataFrame:
    """Every dose at token k, the clean run, and the amplified run at ``top``, as it is and ablated."""
    runs = {"base": (), AMPLIFIED: (amplify(z, k, (AMPLIFIED, top), axis),)}
    patches = [*(amplify(z, k, dose, axis) for dose in doses), *ablations(study, k)]
    result = study.run(patches, readouts_at(study, tuple(z), k), runs)
    labels = [{"edit": edit, "strength": s} for edit, s in (*doses, *((edit, top) for edit in ablated(study)))]
    in_table = {"base": {"edit": "clean", "strength": 1.0}, AMPLIFIED: {"edit": AMPLIFIED, "strength": top}}
    table = sl.analysis.patch_table(result, labels, in_table)
    before, sink = (sl.analysis.base_reading(result, table, name) for name in ("attention", "sink_attention"))
    return table.assign(share=(table.attention - before) / sink, token=k)


def effects_on_random_tokens(
    few: sl.Study, layers: tuple[int, ...], k: int, doses: Sequence[Dose], top: float, axis: edits.MeanAxis
) -> tuple[list[pd.DataFrame], str]:
    """The same on random tokens, or a note: they can have no sink, or the token is it."""
    try:
        few.random.targets((k,))
        z = few.random.activations(sites.Z, layers)
        return [effects(few.random, z, k, doses, top, axis).assign(part=RANDOM)], ""
    except sl.InputError as error:
        return [], f" Random tokens are left out: {error}."


def amplify(z: dict[int, Tensor], k: int, dose: Dose, axis: edits.MeanAxis) -> sl.Patch:
    """The deviation of z from its mean times lambda; z scaled to the norm that this gives it; or z times lambda."""
    name, strength = dose
    edit = amplified = edits.amplification(z, k, strength, axis)
    if name == NORM_ONLY:
        edit = edits.SameNormScaling(of=amplified)
    elif name == PLAIN:
        edit = replace(amplified, mean={layer: torch.zeros_like(x[0, 0]) for layer, x in z.items()})
    return sl.Patch(sites.Z, tuple(z), (k,), edit, allow_unchanged=True)  # no variance, no effect


def ablated(study: sl.Study) -> tuple[str, ...]:
    """What the ablations are called: there are none where no super neurons are known (no dense MLP)."""
    return ABLATIONS if study.formation.neurons else ()


def ablations(study: sl.Study, k: int) -> list[sl.Patch]:
    """In the amplified run the super neurons silenced at k, or as many others."""
    if not ablated(study):
        return []
    sets = (study.formation.neurons, study.other_neurons("amplification/others")[0])
    at, edit = ((study.formation.layer,), (k,)), edits.Constant()
    return [sl.Patch(sites.MLP_POST, *at, edit, units, run=AMPLIFIED, allow_unchanged=True) for units in sets]


def readouts_at(study: sl.Study, layers: tuple[int, ...], k: int) -> list[sl.Readout]:
    """Attention to token k and to the natural sink, and what else lambda changes at k."""
    block, later = (study.formation.layer,), study.after_formation()
    neurons, n = list(study.formation.neurons), study.batch.n

    def at_k(name: str, site: sl.HookSite, layers: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> sl.Readout:
        return sl.readouts.vector_readout(name, site, layers, (k,), n, lambda x, _: function(x.float()))

    of_neurons = [at_k("activation", sites.MLP_POST, block, lambda x: x[:, neurons].abs().mean(-1))] if neurons else []
    return [
        sl.readouts.attention_received("attention", later, (k,), n),
        sl.readouts.attention_received("sink_attention", later, study.sink, n),
        *of_neurons,
        at_k("z_norm", sites.Z, layers, lambda x: x.flatten(1).norm(dim=-1)),
        at_k("residual_norm", sites.RESID_POST, block, lambda x: x.norm(dim=-1)),
    ]


def mean(study: sl.Study, table: pd.DataFrame, edit: str, part: str = VERDICT, column: str = "share") -> sl.Estimate:
    """Mean over prompts, each the mean over its tokens."""
    rows: Any = table[(table.edit == edit) & (table.part == part)]
    return study.mean(rows.groupby("prompt")[column].mean().tolist())


def numbers(study: sl.Study, table: pd.DataFrame, at_top: pd.DataFrame, k: int) -> dict[str, sl.Estimate]:
    """What else is worth a line: the ablations, the dose-response, and what else lambda changes."""
    lines = {
        f"share of prompts in which a token gains more than {BAR}": mean(study, at_top, AMPLIFIED, column="above_bar")
    }
    lines |= {f"share gained, {edit}": mean(study, at_top, edit) for edit in ablated(study)}
    for part, rows in table[table.part != VERDICT].groupby("part"):
        for edit in EDITS:
            lines[f"share gained by token {k}, {part}, {edit}"] = mean(study, at_top, edit, str(part))
        for edit in EDITS:
            lines[f"tau of lambda and attention, {part}, {edit}"] = study.mean(taus(rows, edit))
    for column, name in side(table).items():
        lines |= {
            f"{name}, {edit}": mean(study, at_top, edit, column=column) for edit in ("clean", AMPLIFIED, NORM_ONLY)
        }
    return lines


def side(table: pd.DataFrame) -> dict[str, str]:
    """What else lambda changes, as far as it was measured."""
    return {column: name for column, name in SIDE.items() if column in table}


def taus(table: Any, edit: str) -> list[float]:
    """Kendall's tau of lambda and attention in every prompt, the clean run at lambda 1."""
    rows = table[table.edit.isin(("clean", edit))]
    results: list[Any] = [stats.kendalltau(each.strength, each.attention) for _, each in rows.groupby("prompt")]
    return [result.statistic for result in results]


def caption(k: int, left_out: str) -> str:
    return (
        f"Attention that token {k} receives after formation against lambda, and what else lambda changes there. "
        f"Lambda 1 is the clean run.{left_out}"
    )


def draw(findings: sl.Findings):
    table: Any = findings.table.query("part != 'verdict'").rename(columns={"strength": "lambda"})
    curves = pd.concat([table[table.edit.isin(("clean", edit))].assign(edit=edit) for edit in EDITS])
    means: Any = curves.groupby(["part", "edit", "lambda"], as_index=False).mean(numeric_only=True)
    of_prompts = means[means.part == PROMPTS]
    received = f"attention received by token {table.token.iloc[0]}, "
    panels = [means.assign(panel=received + means.part, value=means.attention)]
    panels += [of_prompts.assign(panel=name, value=of_prompts[column]) for column, name in side(means).items()]
    lines, titles = pd.concat(panels), {"value": ""}
    figure = sl.viz.line(lines, "lambda", "value", series="edit", facet="panel", titles=titles, log_x=True, height=260)
    figure.update_xaxes(tickvals=sorted(set(means["lambda"])), showticklabels=True)
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="variance_amplification", title="Amplifying variance", claim=CLAIM, run=run, draw=draw, paper="figures 6, 20"
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
