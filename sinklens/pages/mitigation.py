"""The report's section on mitigations: one table, one figure, and what the model says under each."""

from __future__ import annotations

from typing import Any

from sinklens.mitigation.result import UNTOUCHED, MitigationResult
from sinklens.mitigation.texts import HEAD, every_quantity, lead, texts_of
from sinklens.pages.figures import mitigation_json


def mitigation_section(name: str, result: MitigationResult, anchor: str) -> dict[str, Any]:
    """What the template shows; the figure under ``drawn``."""
    head, lines = every_quantity(result)
    return {
        "id": anchor,
        "name": name,
        "lead": lead(result),
        "head": list(HEAD),
        "rows": texts_of(result),
        "all_head": head,
        "all_rows": lines,
        "what": [[row.name, row.title, row.said, row.control, row.source] for row in result.rows],
        "left_out": list(result.left_out.items()),
        "said": [(said.mitigation, said.continuation) for said in result.said],
        "prompt": next((said.text for said in result.said if said.mitigation == UNTOUCHED), ""),
        "fitted": result.config.get("n_fitted"),
        "measured": result.config.get("n_prompts"),
        "drawn": mitigation_json(result.table),
    }
