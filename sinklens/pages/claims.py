"""What the analyses say, a row for every claim: as loud when it fails as when it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sinklens.analysis.base import AnalysisResult
from sinklens.errors import InputError
from sinklens.pages.gather import Part
from sinklens.pages.run import Facts, reproduce, settings
from sinklens.records.text import join, number
from sinklens.statistics import Estimate, estimate_text

OUTCOMES = {"holds": ("✓", "good"), "does not hold": ("✗", "bad"), "not measurable": ("–", "none")}
"""Sign and kind of every outcome: colour is never the only difference."""


@dataclass(frozen=True)
class Claim:
    """An analysis, as the report shows it."""

    id: str
    """Anchor of its section."""
    title: str
    """Heading."""
    claim: str
    """The claim."""
    outcome: str
    """Holds, does not hold, or not measurable."""
    mark: str
    """Its sign."""
    kind: str
    """Its class in the style sheet."""
    reason: str
    """Why it is not measurable."""
    statistic: str
    """What was measured."""
    value: tuple[str, str]
    """Its value; its interval and n."""
    control: str
    """What it is compared with."""
    control_value: tuple[str, str]
    """Its value; its interval and n."""
    p: str
    """p-value, where there is one."""
    rule: str
    """When the claim counts as holding."""
    paper: str
    """The paper's figure."""
    caption: str
    """What the figure shows."""
    numbers: list[tuple[str, tuple[str, str]]]
    """Further numbers."""
    rows: int
    """Rows of the table that the figure is made of."""
    place: str
    """Where the table is."""
    reproduce: str
    """Command or code that makes it again."""
    settings: Facts
    """Options and set-up."""


def claim(part: Part, result: AnalysisResult, anchor: str) -> Claim:
    """The row and the section of an analysis.

    Raises:
        InputError: its outcome is none of the three.
    """
    verdict = result.findings.verdict
    if verdict.outcome not in OUTCOMES:
        raise InputError(f"its outcome is {verdict.outcome!r}, which is none of {join(list(OUTCOMES))}: run it again")
    mark, kind = OUTCOMES[verdict.outcome]
    return Claim(
        id=anchor,
        title=str(result.title),
        claim=str(verdict.claim),
        outcome=verdict.outcome,
        mark=mark,
        kind=kind,
        reason=str(verdict.reason),
        statistic=str(verdict.statistic),
        value=_text(verdict.estimate),
        control=str(verdict.control),
        control_value=_text(verdict.control_estimate),
        p="" if verdict.p_value is None else number(verdict.p_value, 2),
        rule=str(verdict.rule),
        paper=str(result.paper),
        caption=str(result.findings.caption),
        numbers=[(str(name), _text(value)) for name, value in result.findings.numbers.items()],
        rows=len(result.findings.table),
        place=f"{part.place}/table.parquet" if part.place else "table.parquet",
        reproduce=reproduce(result),
        settings=settings(result.config),
    )


def _text(value: Estimate | float | None) -> tuple[str, str]:
    if isinstance(value, Estimate):
        head, _, tail = (
            estimate_text(value).partition(" ") if "[" in estimate_text(value) else (number(value.value), "", "")
        )
        return head, tail or f"n = {value.n}"
    return "" if value is None else number(value), ""


def counted(claims: Sequence[Claim]) -> str:
    """How many claims hold, in a sentence."""
    counts = {outcome: sum(item.outcome == outcome for item in claims) for outcome in OUTCOMES}
    if not claims:
        return ""
    failed, unknown = counts["does not hold"], counts["not measurable"]
    phrases = [f"{counts['holds']} hold" + ("s" if counts["holds"] == 1 else "")]
    phrases += [f"{failed} {'does' if failed == 1 else 'do'} not hold"]
    phrases += [f"{unknown} could not be measured"] if unknown else []
    return f"Of {len(claims)} claims put to the test by analyses, {join(phrases)}."


def by_outcome(claims: Sequence[Claim]) -> list[tuple[str, str, str, list[Claim]]]:
    """``(outcome, sign, kind, claims)``, those that fail first."""
    order = ("does not hold", "holds", "not measurable")
    rows = [(outcome, *OUTCOMES[outcome], [c for c in claims if c.outcome == outcome]) for outcome in order]
    return [row for row in rows if row[3]]
