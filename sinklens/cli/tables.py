"""Tables for the terminal: the scores of a chain, and where a sink forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sinklens.analysis.base import AnalysisResult, Verdict
from sinklens.analysis.capabilities import Capabilities
from sinklens.analysis.suite import SuiteResult, judged_parts
from sinklens.chain.result import LOSS_CHANGE, METRIC, ChainResult, shares_text, strength_text
from sinklens.chain.rules import Part
from sinklens.chain.verdicts import loss_in_words
from sinklens.cli.words import in_own_words
from sinklens.formation import Formation
from sinklens.pairs.choice import is_natural
from sinklens.prompts import prompts_text
from sinklens.records.ranges import spans
from sinklens.records.text import MINUS, change_text, number, pretty
from sinklens.statistics import Estimate, estimate_text, interval_text


def console(stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output goes to a file or a pipe."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def two_decimals(x: float) -> str:
    """``x`` with two decimals, the minus of the other numbers, and none before a zero."""
    text = f"{x:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", MINUS)


def score_text(rows: pd.DataFrame) -> str:
    """``effect [low, high]`` and what the claim predicts; empty when there is no such row."""
    if rows.empty:
        return ""
    row = rows.iloc[0]
    if not row.n:
        return "no prompt left"
    interval = "" if pd.isna(row.ci_low) else f" [{two_decimals(row.ci_low)}, {two_decimals(row.ci_high)}]"
    return f"{two_decimals(row.effect)}{interval} ({row.predicted:.0f})"


def chain_table(result: ChainResult) -> Table:
    """Effects of every stage, controls under the effects that they belong to; with the change of the loss in
    every direction, where it was read.
    """
    table = Table(title="Per-stage causal effects: mean over prompts [95% interval] (predicted by the claim)")
    directions = list(dict.fromkeys(result.scores.direction))
    for name in ("stage", "edit", "layers"):
        table.add_column(name, no_wrap=True)
    for direction in directions:
        table.add_column(direction, justify="right", no_wrap=True)
    with_loss = LOSS_CHANGE in result.scores
    if with_loss:
        table.add_column("loss, nats", justify="right", no_wrap=True)
    table.add_column("over ½", justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    keys = ["stage", "edit", "control"]
    previous = ""
    for key in result.scores[keys].drop_duplicates().itertuples(index=False):
        stage, edit, control = (str(part) for part in key)
        rows = result.scores[(result.scores[keys] == list(key)).all(axis=1)]
        if stage != previous and previous:
            table.add_section()
        cells = [score_text(rows.loc[rows.direction == direction]) for direction in directions]
        if with_loss:
            cells.append(" ".join(map(change_text, rows[LOSS_CHANGE])))
        label = f"  control: {control}" if control else edit + strength_text(rows)
        table.add_row(
            stage if stage != previous else "",
            label,
            "" if control else spans(rows.iloc[0].layers, "-"),
            *cells,
            shares_text(rows),
            str(rows.n.min()),
            style="dim" if control else None,
        )
        previous = stage
    return table


def chain_footer(result: ChainResult) -> list[str]:
    """What the table was computed from, and what it cost."""
    config, engine = result.config, result.engine
    excluded = int(result.scores.n_excluded.max())
    left_out = [f"Not applicable: {name}: {why}" for name, why in config.get("not_applicable", {}).items()]
    return [
        *left_out,
        f"{_received(result)} in blocks {spans(config['readout_layers'], '-')}.",
        f"{prompts_text(config)}; {config['n_skipped']} skipped as too short; {excluded} excluded: the pair moves the "
        "metric too little.",
        *loss_in_words(result),
        f"{engine['n_patches']} patches, {engine['n_rows']} patched rows in {engine['n_forwards']} forward passes, "
        f"{engine['seconds']:.1f} s, {engine['n_rows'] / engine['seconds']:.0f} rows per second, peak memory "
        f"{(engine['peak_bytes'] or 0) / 2**30:.1f} GiB.",
        *_slower(engine),
    ]


def _slower(engine: Mapping[str, Any]) -> list[str]:
    """Why patches did not run through the fast pass, where they did not; runs of earlier versions do not know."""
    if engine.get("path") != "model":
        return []
    why = f" ({engine['reason']})" if engine.get("reason") else ""
    return [f"Patches ran through TransformerLens, more slowly{why}."]


def _received(result: ChainResult) -> str:
    config = result.config
    mean = {
        (run, name): sum(values) / len(values) for run, found in result.runs.items() for name, values in found.items()
    }
    if is_natural(config):
        sink, ordinary = mean["natural", "sink"], mean["natural", "ordinary"]
        return f"{_measured(result)}: {sink:.3f} by the sink, {ordinary:.3f} by an ordinary position,"
    by = f" by the target ({config['target']}, {config['pair']})"
    runs = ", ".join(f"{mean[run, 'sink']:.3f} in the {run} run" for run in result.runs)
    return f"{_measured(result, by)}: {runs},"


def _measured(result: ChainResult, by: str = "") -> str:
    if result.metric == METRIC:
        return f"Attention received{by} from later queries"
    return f"Measured, {pretty(result.metric)}{by}"


def formation_tables(formation: Formation) -> list[Table | Text]:
    """Formation blocks, super neurons and outlier dimensions."""
    positions = sorted(set(formation.sink_positions))
    events = Table(title="Formation blocks (the residual norm of the sink token jumps); an event is a run of them")
    numbers = {block: step.number for step in formation.steps for block in step.blocks}
    for name in (
        "event",
        "block",
        "norm before",
        "after",
        "others' ratio before",
        "after",
        "MLP output",
        "attention output",
    ):
        events.add_column(name, justify="right")
    for e in formation.events:
        mark = " (explained)" if e.layer == formation.layer else ""
        measured = (e.norm_before, e.norm_after, e.ratio_before, e.ratio_after, e.mlp_norm, e.attn_norm)
        events.add_row(str(numbers[e.layer]), f"{e.layer}{mark}", *(f"{x:,.1f}" for x in measured))
    neurons = Table(title=f"Super neurons of block {formation.layer}")
    for name in ("neuron", "z of |W_gate|", "z of |W_up|", "activation on the sink", "on others (95%)"):
        neurons.add_column(name, justify="right")
    for n in formation.super_neurons:
        gate = "no gate" if n.gate_z is None else f"{n.gate_z:.1f}"
        neurons.add_row(str(n.index), gate, f"{n.up_z:.1f}", f"{n.activation_sink:,.1f}", f"{n.activation_other:,.2f}")
    dims = Table(title="Outlier dimensions that they write")
    for name in ("dimension", "written on the sink", "robust z"):
        dims.add_column(name, justify="right")
    for d in formation.outlier_dims:
        dims.add_row(str(d.index), f"{d.written:,.1f}", f"{d.z:.1f}")
    return [Text(f"Sink position in the prompts: {spans(positions, '-')}"), events, neurons, dims]


def verdict_table(result: AnalysisResult) -> Table:
    """An analysis's answer: claim, statistic, control, rule, and the other numbers."""
    verdict = result.findings.verdict
    table = Table(title=escape(result.title), show_header=False, box=box.SIMPLE)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [("claim", verdict.claim), ("verdict", verdict.outcome.upper())]
    if verdict.reason:
        rows.append(("why", in_own_words(verdict.reason)))
    for part in verdict.parts or [verdict]:
        rows += _part_rows(part, alone=len(verdict.parts) < 2)
    for name, value in result.findings.numbers.items():
        rows.append((name, estimate_text(value) if isinstance(value, Estimate) else number(value)))
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    return table


def _part_rows(part: Part | Verdict, *, alone: bool) -> list[tuple[str, str]]:
    """One part of a verdict (or a verdict that has none): its outcome, statistic, control, p, power and rule."""
    rows = []
    if isinstance(part, Part) and not alone:
        rows.append((f"{part.about}: {part.name}", f"{part.outcome.upper()}. {part.sentence}"))
    if isinstance(part, Part) and part.reason and part.outcome != "holds":
        rows.append(("why", in_own_words(part.reason)))
    if part.estimate is not None:
        detail = f" ({part.detail})" if isinstance(part, Part) and part.detail else ""
        rows.append((part.statistic, estimate_text(part.estimate) + detail))
    if part.control_estimate is not None:
        rows.append((f"control: {part.control}", estimate_text(part.control_estimate)))
    if part.p_value is not None:
        rows.append(("p", number(part.p_value, 2)))
    if isinstance(part, Part) and part.smallest is not None:
        rows.append(("smallest effect that could have been seen", number(part.smallest, 2)))
    return [*rows, ("rule", part.rule)] if part.rule else rows


def verdicts_table(result: SuiteResult) -> Table:
    """One row per analysis: whether its claim holds, the statistic, the control."""
    table = Table(
        title="Claims on this model, and the parts of each; p is corrected for their number in brackets (Holm)"
    )
    for name in ("analysis", "verdict", "statistic [95% interval]", "control", "p", "claim"):
        table.add_column(name, overflow="fold")
    corrected = {(row["analysis"], row["part"]): row["p_holm"] for row in judged_parts(result.folder, result.parts)}
    for name, part in result.parts.items():
        if name in ("formation", "chain"):
            continue
        if part.status == "failed":
            table.add_row(name, "failed", "", "", "", escape(in_own_words(part.reason)))
            continue
        verdict = AnalysisResult.load(result.folder / name).findings.verdict
        claim = escape(verdict.claim + (f" ({in_own_words(verdict.reason)})" if verdict.reason else ""))
        parts = {item.name: _numbers(item, corrected.get((name, item.name))) for item in verdict.parts}
        only = next(iter(parts.values())) if len(parts) == 1 else _numbers(verdict) if not parts else ("", "", "")
        table.add_row(name, verdict.outcome, *only, claim)
        for item in verdict.parts if len(parts) > 1 else ():
            table.add_row(
                "", f"  {item.outcome}", *parts[item.name], f"  {item.about}: {escape(item.name)}", style="dim"
            )
    return table


def agreement_table(agreement: pd.DataFrame) -> Table:
    """One row per analysis: its verdict in every run, and how far apart the statistics are."""
    table = Table(title="Do the runs agree?")
    names = [str(column).removeprefix("verdict: ") for column in agreement if str(column).startswith("verdict: ")]
    for name in ("analysis", "the same in", *names, "statistic, mean", "from", "to"):
        table.add_column(name, overflow="fold")
    for row in agreement.to_dict("records"):
        said = [row[f"verdict: {name}"] for name in names]
        verdicts = [verdict if isinstance(verdict, str) else "" for verdict in said]
        numbers = [number(float(row[key])) for key in ("mean", "least", "most")]
        cells = (row["part"], f"{row['n_same']} of {row['n_runs']}", *verdicts, *numbers)
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def _numbers(part: Part | Verdict, corrected: float | None = None) -> tuple[str, str, str]:
    p = "" if part.p_value is None else number(part.p_value, 2)
    if p and corrected is not None and math.isfinite(corrected):
        p += f" ({number(corrected, 2)})"
    return escape(_short(part.estimate)), escape(_short(part.control_estimate)), p


def capabilities_table(found: Capabilities) -> Table:
    """What runs on a model, and why the rest does not."""
    table = Table(title=escape(f"{found.title} ({found.backend or 'cannot be loaded'})"))
    for name in ("part", "runs", "remark"):
        table.add_column(name, overflow="fold")
    for item in found.found:
        table.add_row(item.part, "yes" if item.runs else "no", escape(item.reason))
    return table


def _short(estimate: Estimate | None) -> str:
    return "" if estimate is None else interval_text(estimate)
