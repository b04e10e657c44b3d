"""Tables for the terminal: a circuit."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.table import Table

from sinklens.circuits.result import EDGE, Circuit
from sinklens.cli.tables import two_decimals
from sinklens.records.text import pretty


def circuit_table(found: Circuit) -> Table:
    """The circuit's edges, with the exact effect of each alone and what the circuit loses without it."""
    table = Table(
        title="The circuit's edges: each alone, and what is lost without it; shares of the sink [95% interval]"
    )
    directions = list(dict.fromkeys(found.edges.direction))
    for name in ("sender", "receiver", "by"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"{direction} alone" for direction in directions), "lost without it"):
        table.add_column(name, justify="right", no_wrap=True)
    exact = found.of(method="exact", kept=True).set_index([*EDGE, "direction"])
    lost = found.minimality.set_index(EDGE)
    for edge in found.kept:
        key = (edge.sender.name, edge.receiver.name, edge.branch)
        alone = [_interval(exact.loc[(*key, direction)], "effect") for direction in directions]
        table.add_row(*key, *alone, _interval(lost.loc[key], "loss"))
    return table


def _interval(row: Any, name: str) -> str:
    interval = "" if pd.isna(row.ci_low) else f" [{two_decimals(row.ci_low)}, {two_decimals(row.ci_high)}]"
    return f"{two_decimals(row[name])}{interval}"


def circuit_footer(found: Circuit) -> list[str]:
    """What the circuit keeps and what is left without it, by what the other edges hear; its controls; the estimates."""
    config, lines = found.config, []
    lines.append(
        f"{len(found.kept)} of {config['n_edges']:,} edges; {pretty(config['metric'])} in blocks "
        f"{config['readout_layers']}, sink {config['pair']} at {config['target']}, {config['n_prompts']} prompts."
    )
    for ablation, rows in found.tests.groupby("ablation", sort=False):
        told = [f"{row['what']} {_interval(row, 'effect')}" for _, row in rows.iterrows()]
        lines.append(f"Share of the sink, the rest hears {ablation}: {'; '.join(told)}.")
    for _, row in found.agreement.iterrows():
        lines.append(
            f"{row['method']} and exact effects, {row['direction']}: Spearman {_interval(row, 'spearman')} on "
            f"{row['n_edges']} random edges."
        )
    seconds = found.engine["seconds"]
    lines.append(
        f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    )
    return lines
