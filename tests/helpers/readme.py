"""The table of analyses/README.md, made and not written: `python -m tests.helpers.readme runs/all` puts it there."""

from __future__ import annotations

import sys
from pathlib import Path

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import folder, list_analyses
from sinklens.statistics import Estimate, interval_text

README = folder() / "README.md"
BEGIN, END = "<!-- results: python -m tests.helpers.readme runs/all -->", "<!-- end of results -->"
"""What stands above the table and below it."""


def marks(group: str) -> tuple[str, str]:
    """The same of the analyses of a group."""
    return f"<!-- {group}: python -m tests.helpers.readme runs/all -->", f"<!-- end of {group} -->"


GROUP, CIRCUITS = "other-sinks", "circuits"
OTHERS, END_OTHERS = marks(GROUP)
ORDER = (
    "onset",
    "variance_decay",
    "mask_intervention",
    "variance_amplification",
    "doses",
    "w_o_alignment",
    "reading",
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
    """``0.48 [0.47, 0.49]``, and over what the interval is where that is no prompts."""
    return "" if estimate is None else interval_text(estimate)


def row(result: AnalysisResult) -> str:
    """One analysis as a line of the results table."""
    verdict = result.findings.verdict
    outcome = f"**{verdict.outcome}**" if verdict.outcome != "holds" else verdict.outcome
    cells = (f"`{result.name}`", outcome, verdict.statistic, text(verdict.estimate), text(verdict.control_estimate))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, result.paper)) + " |"


def results(runs: Path, group: str = "") -> str:
    """The results table of a folder that `sinklens all` left, of the analyses of a group or of those in none."""
    known = list_analyses(group=group)
    names = sorted(known, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    rows = [row(AnalysisResult.load(runs / name)) for name in names]
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *rows])


def table(readme: str, begin: str = BEGIN, end: str = END) -> str:
    """The table that stands between the marks of a README's text."""
    return readme.split(begin)[1].split(end)[0].strip()


def with_table(readme: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """A README's text with another table between its marks."""
    before, rest = readme.split(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    runs = Path(sys.argv[1])
    page = with_table(README.read_text(encoding="utf-8"), results(runs))
    for group in (GROUP, CIRCUITS):
        if all((runs / name).is_dir() for name in list_analyses(group=group)):
            page = with_table(page, results(runs, group), *marks(group))
    README.write_text(page, encoding="utf-8")
