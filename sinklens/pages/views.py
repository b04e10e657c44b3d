"""The first prompt of a chain in CircuitsVis, token by token and head by head, and the same numbers as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sinklens import viz
from sinklens.chain.result import ChainResult
from sinklens.records.ranges import spans
from sinklens.records.text import number, pretty
from sinklens.viz.attention import Quantity, target_position
from sinklens.viz.circuitsvis import label, script_json, section

MOST_HEADS, MOST_TOKENS, MOST_COLOURED = 6, 64, 256
"""Heads and tokens of attention views, and tokens that are coloured: the page stays small, and a browser quick."""
HEADS_HINT = "Shown by CircuitsVis: point at a head to see it, click it (or press Enter on it) to keep it."
TOKENS_HINT = "Shown by CircuitsVis: point at a token to read its value."
"""What one can do with the views; paper has nothing to point at."""


@dataclass(frozen=True)
class Frame:
    """Views in a frame of their own."""

    name: str
    """Attention or tokens."""
    title: str
    """What it shows, for those who do not see it."""
    data: str
    """JSON for ``frame.js``."""
    caption: str
    """What there is to see."""
    hint: str
    """What one can do there with a mouse or keys; not said on paper."""
    head: list[str]
    """Head of the table with the same numbers; empty where there is none."""
    rows: list[list[str]]
    """Its rows."""


def has_views(result: ChainResult) -> bool:
    """Whether there is anything to show: results of earlier versions have no numbers of the first prompt."""
    return bool(result.received or result.neurons or result.attention)


def frames(result: ChainResult) -> list[Frame]:
    """The frames that a result has the numbers for."""
    shown = []
    if result.received or result.neurons:
        shown.append(_tokens(result))
    if result.attention:
        shown.append(_attention(result))
    return shown


def _runs(named: dict[str, object]) -> list[str]:
    return sorted(named, key=lambda run: run != "base")  # before, then after


def _tokens(result: ChainResult) -> Frame:
    blocks = spans(result.config["readout_layers"])
    titles: dict[Quantity, str] = {
        "received": f"Attention received from later queries, mean over heads and blocks {blocks}",
        "neurons": f"Magnitude of the super neurons of block {result.formation.layer}, mean over them",
    }
    sections, head, columns = [], ["Position", "Token"], []
    for quantity, title in titles.items():
        runs = _runs(getattr(result, quantity))
        views = {f"{pretty(run)} run": viz.token_view(result, run, quantity, MOST_COLOURED) for run in runs}
        sections += [section(title, views)] if views else []
        short = "received" if quantity == "received" else "super neurons"
        head += [f"{short}, {pretty(run)}" for run in runs]
        columns += [viz.token_values(result, run, quantity)[:MOST_COLOURED].tolist() for run in runs]
    tokens = [label(token, 40) for token in result.tokens[0][:MOST_COLOURED]]
    rows = [
        [str(position), token, *(number(x) if math.isfinite(x) else "" for x in values)]
        for position, (token, *values) in enumerate(zip(tokens, *columns, strict=False))
    ]
    caption = (
        f"The first prompt{_cut(result, MOST_COLOURED)}: the stronger a token's colour, the more of it; runs share a "
        "scale. The last token is seen by no later query, so that it has no attention received."
    )
    title = "The first prompt, its tokens coloured by value"
    return Frame("tokens", title, script_json(sections), caption, TOKENS_HINT, head, rows)


def _attention(result: ChainResult) -> Frame:
    heads = viz.sink_heads(result, MOST_HEADS)
    of = next(iter(result.attention.values())).shape[1]
    shown = f"all {of} heads" if len(heads) == of else f"the {len(heads)} of {of} heads that attend most to the sink"
    runs = _runs(dict(result.attention))
    views = {f"{pretty(run)} run": viz.attention_view(result, run, heads, MOST_TOKENS) for run in runs}
    block, names = result.formation.layer + 1, ", ".join(views)
    beyond = " The target lies beyond these tokens." if target_position(result) >= MOST_TOKENS else ""
    caption = (
        f"Attention of block {block}, the one after the formation block, on the first prompt"
        f"{_cut(result, MOST_TOKENS)}: {shown}.{beyond} A row is a query, a column a key; a column that stands out is "
        "a sink."
    )
    title = f"Attention patterns of block {block} on the first prompt: {names}"
    return Frame("attention", title, script_json([section("", views)]), caption, HEADS_HINT, [], [])


def _cut(result: ChainResult, most: int) -> str:
    n = len(result.tokens[0])
    return f" (the first {most} of its {n} tokens)" if n > most else ""
