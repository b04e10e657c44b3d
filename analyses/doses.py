"""How much does it take: the effect of every change against its dose, with the dose that nature gives.

    python analyses/doses.py

Three kinds of dose, all in the run without the sink, at the target, where 0 is no effect and 1 all of the sink:

* *the way*: every stage's activation goes a part of the way to what it is in the run with the sink, whose own dose is
  1;
* *the deviation* of the aggregated value from its mean over prompts, times a factor: the natural one is the ratio of
  the sink's deviation to that at the target;
* *the spike*: the residual that leaves the formation block, with its outlier dimensions times a factor (nature has 1);
  and of the input of attention only the so many largest dimensions (nature: as many as are outlier dimensions).

An effect can be all or nothing in a prompt: beside the mean stands the share of prompts in which it is beyond one half,
and the dose at which the mean reaches one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch

import sinklens as sl
from sinklens import edits, sites

CLAIM = "The deviation that the first token's aggregated value has is enough to make a token a sink."
DEVIATION, NORM, SPIKE, LARGEST = "deviation", "deviation's norm alone", "spike", "largest dimensions"
HALF, LITTLE = 0.5, 0.1


def run(
    study: sl.Study,
    *,
    target: Annotated[int, "position that is made a sink"] = 10,
    ways: Annotated[tuple[float, ...], "parts of the way to the run with the sink"] = (0.25, 0.5, 0.75, 0.9, 1, 1.25),
    factors: Annotated[tuple[float, ...], "factors on the deviation"] = (1.5, 2, 4, 8, 16),
    spikes: Annotated[tuple[float, ...], "factors on the outlier dimensions"] = (0, 0.1, 0.3, 1, 3),
    dims: Annotated[tuple[int, ...], "numbers of largest dimensions", sl.Between(1)] = (1, 3, 10, 30, 100),
) -> sl.Findings:
    (position,) = study.targets((target,))
    setting = sl.Setting.of(study, sl.PairChoice(position))
    natural = natural_factor(setting)
    varies = [] if np.isnan(natural) else sorted({*factors, natural})
    asked = [
        *along_the_way(setting, ways),
        *of_the_deviation(setting, varies),
        *of_the_spike(setting, spikes),
        *of_the_largest(setting, sorted({*dims, len(study.formation.dims)})),
    ]
    table = effects(setting, asked)
    marks = {curve: 1.0 for curve in table.curve.unique()} | {DEVIATION: natural, NORM: natural}
    marks[LARGEST] = float(len(study.formation.dims))
    table["natural"] = table.dose == table.curve.map(marks)
    deviation, norm = (study.mean(of(table, curve, natural).tolist()) for curve in (DEVIATION, NORM))
    enough = sl.analysis.judge(
        "cause",
        "natural dose",
        CLAIM,
        statistic=f"effect of the deviation times {natural:.3g}, the sink's own ratio (denoise)",
        estimate=deviation,
        control="the value scaled to the norm that this gives it",
        control_estimate=norm,
        rule=f"holds when the effect's interval lies above {HALF} and the control's below {LITTLE}",
        conditions=[sl.analysis.above(deviation, HALF), sl.analysis.below(norm, LITTLE)],
    )
    verdict = sl.analysis.verdict_of(CLAIM, [enough])
    caption = "Effect on attention to the target against the dose. Means over prompts; the mark is the natural dose."
    return sl.Findings(verdict, table, caption, numbers(study, table, marks))


def natural_factor(setting: sl.Setting) -> float:
    """How many times as far the sink's aggregated value deviates over prompts as the target's, mean over blocks.

    The ratio of root mean squares over heads and dimensions, in the blocks in which aggregation starts the outlier off
    (later it is smaller). NaN where one of the two is the same in all prompts, as the sink's behind a BOS.
    """
    layers, base = setting.study.onset, setting.pair.without
    sink = setting.spread(sl.Source(base.run, setting.study.sink), sites.Z, layers)
    here = setting.spread(base, sites.Z, layers)
    sizes = [tuple(float(x[layer][1].pow(2).mean().sqrt()) for x in (sink, here)) for layer in layers]
    if min(min(pair) for pair in sizes) <= 1e-6:
        return float("nan")
    return float(np.mean([of_sink / of_target for of_sink, of_target in sizes]))


Asked = tuple[str, float, sl.Patch]
"""Curve, dose and patch."""


def along_the_way(setting: sl.Setting, ways: Sequence[float]) -> list[Asked]:
    """Every stage's activation a part of the way to the run with the sink."""
    asked = []
    for stage in sl.CHAIN:
        try:
            stage.check(setting, stage.experiments[0])
            layers, units = stage.layers(setting), stage.units(setting)
        except sl.NotApplicableError:
            continue  # what the model does not have has no curve
        for way in ways:
            patch = setting.patch("denoise", stage.site, layers, edits.Interpolate(amount=float(way)), units=units)
            asked.append((stage.name, float(way), patch))
    return asked


def of_the_deviation(setting: sl.Setting, factors: Sequence[float]) -> list[Asked]:
    """The deviation of the aggregated value times a factor, and as a control its norm alone."""
    layers = setting.up_to_formation
    mean = {layer: middle for layer, (middle, _) in setting.spread(setting.pair.without, sites.Z, layers).items()}
    asked = []
    for factor in factors:
        rescaled = edits.Rescale(DEVIATION, mean, {layer: torch.tensor(float(factor)) for layer in layers})
        for curve, edit in ((DEVIATION, rescaled), (NORM, edits.SameNormScaling(of=rescaled))):
            asked.append((curve, float(factor), setting.patch("denoise", sites.Z, layers, edit)))
    return asked


def of_the_spike(setting: sl.Setting, factors: Sequence[float]) -> list[Asked]:
    """The residual of the run with the sink, its outlier dimensions times a factor."""
    block, dims = (setting.formation.layer,), list(setting.formation.dims)
    scale = torch.ones(setting.shape.d_model)
    zero = {block[0]: torch.zeros(setting.shape.d_model)}
    asked = []
    for factor in factors:
        edit = edits.Rescale(SPIKE, zero, {block[0]: scale.index_fill(0, torch.tensor(dims), float(factor))})
        asked.append(
            (SPIKE, float(factor), setting.patch("denoise", sites.RESID_POST, block, edits.OfSource(SPIKE, edit)))
        )
    return asked


def of_the_largest(setting: sl.Setting, dims: Sequence[int]) -> list[Asked]:
    """Of the normalised input of attention only the so many largest dimensions, where there is a norm in front."""
    stage = sl.stages.RMSNORM_FILTER
    try:
        stage.check(setting, stage.experiments[0])
    except sl.NotApplicableError:
        return []
    layers, d_model = stage.layers(setting), setting.shape.d_model
    chosen = {m: sl.stages.largest_dims(setting, layers, m) for m in dims if m <= d_model}
    only = {m: sl.stages.only_dims(LARGEST, largest, d_model) for m, largest in chosen.items()}
    return [(LARGEST, float(m), setting.patch("denoise", stage.site, layers, edit)) for m, edit in only.items()]


def effects(setting: sl.Setting, asked: Sequence[Asked]) -> pd.DataFrame:
    """The effect of every dose in every prompt."""
    labels = [{"curve": curve, "dose": dose} for curve, dose, _ in asked]
    table = sl.analysis.effect_table(setting, [patch for _, _, patch in asked], labels)
    if table.effect.isna().all():
        least = sl.analysis.MIN_GAP
        raise sl.NoSinkError(f"no prompt's target receives {least} more attention in the run with the sink")
    return table


def of(table: Any, curve: str, dose: float) -> pd.Series:
    """The effects of one dose, by prompt."""
    return table[(table.curve == curve) & (table.dose == dose)].set_index("prompt").effect


def half_dose(rows: Any, study: sl.Study) -> sl.Estimate:
    """The least dose at which the mean effect reaches one half, on straight lines between doses; NaN if at none."""
    nothing = 1.0 if rows.curve.iloc[0] in (DEVIATION, NORM) else 0.0
    by_dose = rows.pivot_table(index="prompt", columns="dose", values="effect")
    if nothing not in by_dose:
        by_dose[nothing] = 0.0
    by_dose = by_dose[sorted(by_dose.columns)].dropna()
    doses, by_prompt, prompts = by_dose.columns.to_numpy(), by_dose.to_numpy(), by_dose.index

    def crossing(chosen: np.ndarray) -> float:
        means = by_prompt[chosen].mean(0)
        above = np.flatnonzero(means >= HALF)
        if not len(above):
            return np.nan
        first = int(above[0])
        if first == 0:
            return float(doses[0])  # without any dose
        share = (HALF - means[first - 1]) / (means[first] - means[first - 1])
        return float(doses[first - 1] + share * (doses[first] - doses[first - 1]))

    return study.bootstrap(crossing, prompts)


def numbers(study: sl.Study, table: Any, marks: dict[str, float]) -> dict[str, Any]:
    """For every curve the natural dose, what it does, in how many prompts, and the dose of half the effect."""
    lines: dict[str, Any] = {}
    for curve, rows in table.groupby("curve", sort=False):
        natural = of(table, curve, marks[curve])
        if natural.empty:  # the natural dose is none of those that were asked for
            continue
        lines[f"{curve}: natural dose"] = marks[curve]
        lines[f"{curve}: effect of the natural dose"] = study.mean(natural.tolist())
        lines[f"{curve}: share of prompts beyond {HALF} at it"] = study.mean(
            (natural.dropna() > HALF).astype(float).tolist()
        )
        lines[f"{curve}: dose of half the effect"] = half_dose(rows, study)
    return lines


def draw(findings: sl.Findings):
    table: Any = findings.table
    means: Any = table.groupby(["curve", "dose", "natural"], sort=False).effect.agg(
        mean="mean", low=lambda x: x.quantile(0.25), high=lambda x: x.quantile(0.75)
    )
    shown = means.reset_index()
    titles = {"mean": "effect (bars: middle half of prompts)", "dose": "dose"}
    figure = sl.viz.line(shown, "dose", "mean", facet="curve", low="low", high="high", titles=titles, height=240)
    figure.update_xaxes(matches=None, showticklabels=True)
    return sl.viz.mark(figure, y=HALF)


ANALYSIS = sl.Analysis(
    name="doses", title="How much it takes", claim=CLAIM, run=run, draw=draw, paper="figures 6 and 20, by dose"
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
