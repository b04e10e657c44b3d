"""Tables for the terminal: what mitigations cost, and what they leave of the sink."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from sinklens.mitigation.result import MitigationResult
from sinklens.mitigation.texts import HEAD, texts_of


def mitigation_table(result: MitigationResult) -> Table:
    """A row a mitigation: harm with intervals, the control's, what is left of the sink, errors of quantisation."""
    table = Table(title="Mitigations: means over prompts [95% interval]")
    for number, name in enumerate(HEAD):
        table.add_column(name, justify="left" if number == 0 else "right")
    for cells in texts_of(result):
        table.add_row(*map(Text, cells))
    return table
