"""A result in words and short numbers, for the terminal and the report."""

from __future__ import annotations

from typing import Any

from sinklens.interventions.harm import QUANTITIES
from sinklens.mitigation.result import UNTOUCHED, MitigationResult
from sinklens.records.text import NONE, number, pretty

HEAD = (
    "mitigation",
    "more loss",
    "the control's",
    "KL",
    "same top token",
    "first token's share",
    "int8 per tensor",
    "int8 per token",
    "KV int4 per channel",
    "KV int4 per token",
)
"""Columns of the short table."""
_SHORT = ("first_share", "int8_residual_tensor", "int8_residual_token", "kv_int4_channel", "kv_int4_token")


def texts_of(result: MitigationResult) -> list[list[str]]:
    """The short table: a line a mitigation, the untouched model first. int8 is that of the residual stream."""
    rows: Any = result.table.to_dict("records")
    return [
        [
            str(row["mitigation"]),
            _with(row, "loss_change") if row["mitigation"] != UNTOUCHED else NONE,
            _with(row, "control_loss_change"),
            _with(row, "kl"),
            number(row["top1"]),
            *(number(row[quantity]) for quantity in _SHORT),
        ]
        for row in rows
    ]


def every_quantity(result: MitigationResult) -> tuple[list[str], list[list[str]]]:
    """All that was measured: a line a quantity, a column a mitigation."""
    rows: Any = result.table.to_dict("records")
    head = ["quantity", "what it is", *(str(row["mitigation"]) for row in rows)]
    lines = [[pretty(name), what, *(number(row[name]) for row in rows)] for name, what in QUANTITIES.items()]
    return head, lines


def lead(result: MitigationResult) -> str:
    """What the mitigations cost, in a sentence."""
    change = {row.name: result.change(row.name, "loss").value for row in result.rows}
    known = {name: value for name, value in change.items() if value == value}
    if not known:
        return "Under none of them does the model say anything finite."
    least, most = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    left = result.estimate(least, "first_share").value / result.estimate(UNTOUCHED, "first_share").value
    return (
        f"The loss changes least under {least} ({known[least]:+.3g} nats per token), which leaves {left:.0%} of the "
        f"first token's share, and most under {most} ({known[most]:+.3g})."
    )


def _with(row: dict[str, Any], name: str) -> str:
    if row[name] != row[name]:
        return NONE
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return number(row[name]) + ("" if low != low else f" [{number(low)}, {number(high)}]")
