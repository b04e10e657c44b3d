"""What a report's tables say of a chain: plain rows of text, which the template escapes and lays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sinklens.chain.result import LOSS_CHANGE, ChainResult
from sinklens.chain.verdicts import Finding, findings, groups, overall
from sinklens.formation import Formation
from sinklens.pairs.choice import is_natural
from sinklens.records.ranges import spans
from sinklens.records.text import NONE, change_text, effect_text, heading, interval_text, number, pretty
from sinklens.stages.base import experiment_kind
from sinklens.viz.chain import chain_matrix, directions

MARKS = {"agrees": "✓", "beyond": "↑", "partly": "≈", "unclear": "?", "against": "✗"}
"""A sign for each verdict, so that colour is never the only difference."""


@dataclass(frozen=True)
class Table:
    """A plain table."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]


def sections(result: ChainResult) -> dict[str, Any]:
    """Everything but the figures, the views and the summary, by the names that the template uses."""
    return {
        "natural": is_natural(result.config),
        "stages": stages(result),
        "has_loss": LOSS_CHANGE in result.scores,
        "claims": claims(result),
        "left_out": left_out(result),
        "matrices": [matrix(result, direction) for direction in directions(result.matrix)],
        "matrix_directions": directions(result.matrix),
        "formation": formation(result),
        "checks": checks(result),
    }


def subtitle(result: ChainResult) -> str:
    """How the sink came about, in a line."""
    config = result.config
    sink = "the sink that the data has" if is_natural(config) else f"a sink at position {config['target']}"
    how = "" if is_natural(config) else f", made by {pretty(config['pair'])}"
    return f"{sink[:1].upper()}{sink[1:]}{how}; formation block {result.formation.layer}"


def claims(result: ChainResult) -> list[dict[str, Any]]:
    """A row for every stage: its claim, and what its transplant, its mechanism edits and its controls say of it."""
    all_findings, rows = findings(result), []
    for number_, stage in enumerate(dict.fromkeys(result.scores.stage), start=1):
        own = [item for item in all_findings if item.stage == stage and not item.control]
        controls = [item for item in all_findings if item.stage == stage and item.control]
        rows.append(
            {
                "name": f"{number_} {heading(stage)}",
                "claim": result.config.get("claims", {}).get(str(stage), ""),
                "transplant": [
                    _answer(edit, items)
                    for (_, edit), items in groups(own).items()
                    if experiment_kind(str(edit)) == "transplant"
                ],
                "mechanisms": [
                    _answer(edit, items)
                    for (_, edit), items in groups(own).items()
                    if experiment_kind(str(edit)) == "mechanism"
                ],
                "n_controls": len(controls),
                "off": [
                    f"{pretty(c.control)}, {c.direction} {effect_text(c.effect)}"
                    for c in controls
                    if c.verdict != "agrees"
                ],
            }
        )
    return rows


def left_out(result: ChainResult) -> list[tuple[str, str]]:
    """Experiments that the model does not allow, and why."""
    reasons = result.config.get("not_applicable", {})
    return [(", ".join(map(pretty, name.split("/", 1))), str(why)) for name, why in reasons.items()]


def _answer(edit: str, items: list[Finding]) -> dict[str, Any]:
    """One edit's verdict over its directions, with their effects."""
    verdict = overall(items)
    numbers = [(item.direction, effect_text(item.effect), interval_text(item.low, item.high)) for item in items]
    return {"name": pretty(edit), "verdict": verdict, "mark": MARKS.get(verdict, ""), "numbers": numbers}


def matrix(result: ChainResult, direction: str) -> Table:
    """The chain matrix in one direction, as a table."""
    wide = chain_matrix(result, direction)
    rows = [
        [pretty(stage), *map(effect_text, values)] for stage, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    caption = "Effect of each row's transplant on each column's readout, mean over prompts."
    return Table(f"Chain matrix, {direction}", caption, ["Edited stage", *map(pretty, wide.columns)], rows)


def stages(result: ChainResult) -> list[dict[str, Any]]:
    """Per stage: name, claim, blocks, and a row for every edit and direction with its controls."""
    all_findings, listed = findings(result), []
    for stage, rows in result.scores.groupby("stage", sort=False):
        of_stage = [item for item in all_findings if item.stage == stage]
        own = [item for item in of_stage if not item.control]
        transplant = rows[(rows.edit.map(experiment_kind) == "transplant") & (rows.control == "")]
        first = (transplant if len(transplant) else rows).iloc[0]
        listed.append(
            {
                "name": heading(stage),
                "claim": result.config.get("claims", {}).get(str(stage), ""),
                "layers": _where(first),
                "edits": [
                    {"name": pretty(edit), "rows": [_row(item, of_stage) for item in own if item.edit == edit]}
                    for edit in dict.fromkeys(item.edit for item in own)
                ],
            }
        )
    return listed


def _where(row: pd.Series) -> str:
    layers = list(row.layers)
    text = f"block {layers[0]}" if len(layers) == 1 else f"blocks {spans(layers)}"
    units = row.get("units")
    if units is None or not np.ndim(units):
        return text
    shown = ", ".join(str(unit) for unit in list(units)[:8]) + (", …" if len(units) > 8 else "")
    return f"{text}, units {shown}"


def _row(item: Finding, of_stage: list[Finding]) -> dict[str, Any]:
    controls = [c for c in of_stage if c.control and (c.edit, c.direction) == (item.edit, item.direction)]
    return {
        **_cell(item),
        "direction": item.direction,
        "controls": [{**_cell(c), "name": pretty(c.control)} for c in controls],
    }


def _cell(item: Finding) -> dict[str, Any]:
    return {
        "effect": effect_text(item.effect),
        "interval": interval_text(item.low, item.high),
        "predicted": number(item.predicted),
        "verdict": item.verdict,
        "mark": MARKS.get(item.verdict, ""),
        "n": item.n,
        "n_excluded": item.n_excluded,
        "loss": change_text(item.loss_change),
        "loss_interval": interval_text(item.loss_low, item.loss_high),
    }


def formation(result: ChainResult) -> dict[str, Any]:
    """Where the sink forms: positions and three tables."""
    formation = result.formation
    return {
        "layer": formation.layer,
        "positions": spans(sorted(set(formation.sink_positions))),
        "tables": [_events(formation), _super_neurons(formation), _outlier_dims(formation)],
    }


def _events(formation: Formation) -> Table:
    rows = [
        [
            f"{e.layer} (explained)" if e.layer == formation.layer else str(e.layer),
            *map(number, (e.norm_before, e.norm_after, e.ratio_before, e.ratio_after, e.mlp_norm, e.attn_norm)),
        ]
        for e in formation.events
    ]
    head = ["Block", "Norm before", "Norm after", "Ratio before", "Ratio after", "MLP output", "Attention output"]
    return Table(
        "Formation blocks", "Norms of the sink token, and their ratio to the median of the others.", head, rows
    )


def _super_neurons(formation: Formation) -> Table:
    rows = [
        [
            str(n.index),
            "no gate" if n.gate_z is None else number(n.gate_z),
            *map(number, (n.up_z, n.activation_sink, n.activation_other)),
        ]
        for n in formation.super_neurons
    ]
    head = ["Neuron", "z of |W_gate|", "z of |W_up|", "On the sink", "On others (95%)"]
    return Table(
        f"Super neurons of block {formation.layer}",
        "Robust z of their weight norms, and their activations.",
        head,
        rows,
    )


def _outlier_dims(formation: Formation) -> Table:
    rows = [[str(dim.index), number(dim.written), number(dim.z)] for dim in formation.outlier_dims]
    caption = "What the super neurons write there on the sink token."
    return Table("Outlier dimensions", caption, ["Dimension", "Written", "Robust z"], rows)


def checks(result: ChainResult) -> dict[str, Any]:
    """What else the pair changes: a row for every quantity, a column for every place and run."""
    table = result.checks
    runs = [name for name in table.columns if name not in ("quantity", "where", "layers")]
    places = list(dict.fromkeys(table["where"])) if len(table) else []
    rows = []
    for quantity, group in table.groupby("quantity", sort=False) if len(table) else ():
        by_place = {record["where"]: record for record in group.to_dict("records")}
        values = [number(by_place[place][run]) if place in by_place else NONE for place in places for run in runs]
        rows.append([heading(quantity), spans(group.iloc[0].layers), *values])
    return {"runs": [pretty(run) for run in runs], "places": [heading(place) for place in places], "rows": rows}
