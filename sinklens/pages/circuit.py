"""A circuit's section of the page: the graph, what was tested, who makes the super neurons fire, views, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sinklens import viz
from sinklens.circuits import Circuit
from sinklens.errors import InputError
from sinklens.pages.figures import page_figure
from sinklens.pages.run import reproduce, settings, total_seconds
from sinklens.pages.views import HEADS_HINT, MOST_COLOURED, MOST_TOKENS, TOKENS_HINT, Frame
from sinklens.pairs.choice import is_natural
from sinklens.records.ranges import spans
from sinklens.records.text import effect_text, number, pretty, seconds_text
from sinklens.viz.circuitsvis import label, script_json, section

MOST_ROWS, MOST_HEADS = 60, 6
"""Rows of a table, and heads whose attention is shown."""
FIGURES = {
    "tests": ("What is left of the sink", viz.tests_figure),
    "pruning": ("Pruning", viz.pruning_figure),
    "contributions": ("What makes the super neurons fire", viz.contributions_figure),
    "interactions": ("Pairs of nodes", viz.interactions_figure),
}
"""Figures besides the graph: heading, and what draws it."""


def sections(circuit: Circuit) -> dict[str, Any]:
    """What the template shows, by the names that it uses."""
    figures = drawn(circuit)
    return {
        "subtitle": subtitle(circuit),
        "lead": lead(circuit),
        "drawn": figures,
        "graph": "graph" in figures,
        "figures": [(name, heading) for name, (heading, _) in FIGURES.items() if name in figures],
        "frames": frames(circuit),
        "tables": tables(circuit),
        "facts": facts(circuit),
        "settings": settings(circuit.config),
        "reproduce": reproduce(circuit),
    }


def subtitle(circuit: Circuit) -> str:
    """How the sink came about, in a line."""
    config = circuit.config
    how = "the sink that the data has" if is_natural(config) else f"a sink at position {config.get('target')}"
    made = "" if is_natural(config) else f", made by {pretty(config.get('pair'))}"
    return f"{how[:1].upper()}{how[1:]}{made}; formation block {circuit.formation.layer}"


def lead(circuit: Circuit) -> str:
    """What was found, in two sentences."""
    asked = circuit.config.get("share")
    wanted = f" (asked: {number(float(asked))})" if isinstance(asked, (int, float)) else ""
    kept, of = len(circuit.kept), circuit.config.get("n_edges", "?")
    first = f"{kept} of {of} edges keep {_share(circuit, 'circuit')} of the sink{wanted}."
    others = [
        f"{words} {text}"
        for what, words in (("complement", "all but these keep"), ("random", "as many random ones"))
        if (text := _share(circuit, what))
    ]
    return first if not others else f"{first} {', '.join(others)[:1].upper()}{', '.join(others)[1:]}."


def _share(circuit: Circuit, what: str) -> str:
    """The share with its interval, by the first way in which the rest was ablated."""
    rows: Any = circuit.tests[circuit.tests.what == what]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    interval = "" if pd.isna(row.ci_low) else f" [{effect_text(row.ci_low)}, {effect_text(row.ci_high)}]"
    return f"{effect_text(row.effect)}{interval}"


def drawn(circuit: Circuit) -> dict[str, str]:
    """The figures by name; one that the circuit has no numbers for is left out."""
    figures = {}
    if circuit.kept:
        figures["graph"] = page_figure(viz.circuit_figure(circuit))
        figures["graph-narrow"] = page_figure(viz.circuit_figure(circuit, vertical=True))
    for name, (_, draw) in FIGURES.items():
        try:
            figures[name] = page_figure(draw(circuit))
        except InputError:  # nothing was measured of it
            continue
    return figures


def tables(circuit: Circuit) -> list[dict[str, Any]]:
    """The same numbers as tables, the largest first where there are many."""
    kept, tested, agreed = map(_rows, (viz.circuit_edges(circuit), circuit.tests, circuit.agreement))
    names = ("sender", "receiver", "branch")
    edges = [
        [*(row[name] for name in names), pretty(row["direction"]), pretty(row["method"]), *_interval(row), row["n"]]
        for row in kept
    ]
    tests = [[row["what"], row["ablation"], row["n_edges"], *_interval(row), row["n"]] for row in tested]
    agree = [
        [pretty(row["method"]), pretty(row["direction"]), *_interval(row, "spearman"), row["n_edges"]] for row in agreed
    ]
    interval = "95% interval"
    head = ["From", "To", "Read as", "Direction", "Method", "Effect", interval, "n"]
    found = [
        ("Edges of the circuit", head, edges),
        ("What is left of the sink", ["Intact", "The rest", "Edges", "Share", interval, "n"], tests),
        ("Rank correlation of estimates and exact effects", ["Method", "Direction", "Value", interval, "Edges"], agree),
    ]
    return [
        {"title": title + _cut(rows), "head": head, "rows": [[str(cell) for cell in row] for row in rows[:MOST_ROWS]]}
        for title, head, rows in found
        if rows
    ]


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _interval(row: dict[str, Any], name: str = "effect") -> list[str]:
    low, high = row["ci_low"], row["ci_high"]
    return [effect_text(row[name]), "" if pd.isna(low) else f"[{effect_text(low)}, {effect_text(high)}]"]


def _cut(rows: Sequence[Any]) -> str:
    return f", the first {MOST_ROWS} of {len(rows)} rows" if len(rows) > MOST_ROWS else ""


def frames(circuit: Circuit) -> list[Frame]:
    """The first prompt in CircuitsVis: attention of the circuit's heads, and what tokens add to the super neurons."""
    shown = [_tokens(circuit)] if len(circuit.by_token) else []
    return [*shown, _attention(circuit)] if circuit.attention else shown


def _tokens(circuit: Circuit) -> Frame:
    pairs = list(dict.fromkeys(zip(circuit.by_token.run, circuit.by_token.branch, strict=True)))
    sections, head, columns = [], ["Position", "Token"], []
    for branch in dict.fromkeys(branch for _, branch in pairs):
        runs = [run for run, other in pairs if other == branch]
        views = {f"{pretty(run)} run": viz.circuit_token_view(circuit, run, branch, MOST_COLOURED) for run in runs}
        sections.append(section(f"Added to the {branch} of the super neurons", views))
        head += [f"{branch}, {pretty(run)}" for run in runs]
        columns += [viz.contributed(circuit, run, branch)[:MOST_COLOURED].tolist() for run in runs]
    tokens = [label(token, 40) for token in circuit.tokens[:MOST_COLOURED]]
    rows = [
        [str(place), token, *("" if x != x else number(x) for x in values)]
        for place, (token, *values) in enumerate(zip(tokens, *columns, strict=False))
    ]
    caption = (
        "The first prompt: what the values of each token add, by way of all heads, to what the super neurons read at "
        "the sink; blue adds, red takes away, and runs share a scale."
    )
    title = "The first prompt, its tokens coloured by what they add"
    return Frame("tokens", title, script_json(sections), caption, TOKENS_HINT, head, rows)


def _attention(circuit: Circuit) -> Frame:
    runs = list(dict.fromkeys(name.partition("/")[0] for name in circuit.attention))
    heads = viz.circuit_heads(circuit, runs[0])
    shown = heads[:MOST_HEADS]
    views = {f"{pretty(run)} run": viz.circuit_attention_view(circuit, run, shown, MOST_TOKENS) for run in runs}
    some = f"the first {len(shown)} of its {len(heads)} heads" if len(heads) > len(shown) else "its heads"
    caption = f"Attention of the circuit on the first prompt, {some} (block.head): a row is a query, a column a key."
    title = f"Attention of the circuit's heads on the first prompt: {', '.join(views)}"
    return Frame("attention", title, script_json([section("", views)]), caption, HEADS_HINT, [], [])


def facts(circuit: Circuit) -> list[tuple[str, list[str]]]:
    """What the circuit is made of, and what it took."""
    blocks = spans(sorted({node.block for node in circuit.nodes if node.block >= 0}))
    steps = circuit.engine.get("seconds")
    each = [f"{name} {seconds_text(float(x))}" for name, x in steps.items()] if isinstance(steps, dict) else []
    found = [
        ("Nodes", [f"{len(circuit.nodes)} of {circuit.config.get('n_nodes', '?')}, in blocks {blocks}"]),
        ("Edges", [f"{len(circuit.kept)} of {circuit.config.get('n_edges', '?')}"]),
        ("Measured", [pretty(circuit.config.get("metric", ""))]),
        ("Time", [seconds_text(total_seconds(steps)), *([", ".join(each)] if each else [])]),
    ]
    return [(name, texts) for name, texts in found if any(texts)]
