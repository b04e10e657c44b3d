"""The results table of `analyses/README.md`: `python -m tests.helpers.readme runs/all` prints it."""

from __future__ import annotations

import sys
from pathlib import Path

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import list_analyses
from sinklens.records.text import number
from sinklens.statistics import Estimate

README = Path(__file__).parents[2] / "analyses" / "README.md"
ORDER = (
    "onset",
    "variance_decay",
    "mask_intervention",
    "variance_amplification",
    "w_o_alignment",
    "super_neurons",
    "selective_activation",
    "down_projection",
    "settle_it",
    "dominance",
    "rmsnorm_filter",
    "qk_locking",
    "effective_rank",
    "head_imbalance",
    "output_gate",
    "residual_direction",
)
"""The analyses in the order of the chain; others follow."""
HEAD = "| analysis | verdict | statistic | value [95% interval] | control or null | in the paper |"


def text(estimate: Estimate | None) -> str:
    """``0.48 [0.47, 0.49]``."""
    if estimate is None:
        return ""
    low, high = number(estimate.low), number(estimate.high)
    return number(estimate.value) + ("" if low == "–" else f" [{low}, {high}]")


def row(result: AnalysisResult) -> str:
    """One analysis as a line of the results table."""
    verdict = result.findings.verdict
    outcome = f"**{verdict.outcome}**" if verdict.outcome != "holds" else verdict.outcome
    cells = (f"`{result.name}`", outcome, verdict.statistic, text(verdict.estimate), text(verdict.control_estimate))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, result.paper)) + " |"


def results(folder: Path) -> str:
    """The results table of a folder that `sinklens all` left."""
    names = sorted(list_analyses(), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    rows = [row(AnalysisResult.load(folder / name)) for name in names]
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(results(Path(sys.argv[1])))  # noqa: T201
