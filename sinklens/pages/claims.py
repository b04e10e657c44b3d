"""What the analyses say, a row for every claim: as loud when it fails as when it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sinklens.analysis.base import AnalysisResult
from sinklens.chain.rules import Part as Judged
from sinklens.errors import InputError
from sinklens.pages.gather import Part
from sinklens.pages.run import Facts, reproduce, settings
from sinklens.records.text import join, number
from sinklens.statistics import Estimate, estimate_text

OUTCOMES = {
    "holds": ("✓", "good"),
    "holds in part": ("◐", "none"),
    "does not hold": ("✗", "bad"),
    "undecided": ("?", "none"),
    "not measurable": ("–", "none"),
}
"""Sign and kind of every outcome: colour is never the only difference."""
Corrected = Mapping[tuple[str, str], float]
"""By analysis and part, p corrected for how many parts there are."""


@dataclass(frozen=True)
class PartRow:
    """One part of a verdict, as the report shows it."""

    about: str
    """Quantity or cause."""
    name: str
    """Its short name."""
    sentence: str
    """What it judges."""
    outcome: str
    """What its rule says."""
    mark: str
    """Its sign."""
    kind: str
    """Its class in the style sheet."""
    reason: str
    """Why it is undecided, or not measurable."""
    statistic: str
    """What was measured."""
    value: tuple[str, str]
    """Its value; its interval and n."""
    detail: str
    """What to know beside the value."""
    control: str
    """What it is compared with."""
    control_value: tuple[str, str]
    """Its value; its interval and n."""
    rule: str
    """When it counts as holding."""
    p: str
    """p-value."""
    corrected: str
    """The same corrected for their number, where there are others."""
    smallest: str
    """The smallest effect that could have been seen."""


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
    which: str
    """Which parts of it hold."""
    mark: str
    """Its sign."""
    kind: str
    """Its class in the style sheet."""
    reason: str
    """Why it is not measurable."""
    parts: list[PartRow]
    """What the verdict is made of."""
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


def claim(part: Part, result: AnalysisResult, anchor: str, corrected: Corrected | None = None) -> Claim:
    """The row and the section of an analysis.

    Raises:
        InputError: its outcome is none of those that there are.
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
        which=str(verdict.which),
        mark=mark,
        kind=kind,
        reason=str(verdict.reason),
        parts=[_part_row(item, (corrected or {}).get((part.name, item.name))) for item in verdict.parts],
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


def _part_row(part: Judged, corrected: float | None) -> PartRow:
    p = "" if part.p_value is None else number(part.p_value, 2)
    mark, kind = OUTCOMES[part.outcome]
    return PartRow(
        about=str(part.about),
        name=str(part.name),
        sentence=str(part.sentence),
        outcome=part.outcome,
        mark=mark,
        kind=kind,
        reason=str(part.reason),
        statistic=str(part.statistic),
        value=_text(part.estimate),
        detail=str(part.detail),
        control=str(part.control),
        control_value=_text(part.control_estimate),
        rule=str(part.rule),
        p=p,
        corrected="" if corrected is None or not p else f"Holm {number(corrected, 2)}",
        smallest="" if part.smallest is None else number(part.smallest, 2),
    )


def _text(value: Estimate | float | None) -> tuple[str, str]:
    if isinstance(value, Estimate):
        head, _, tail = (
            estimate_text(value).partition(" ") if "[" in estimate_text(value) else (number(value.value), "", "")
        )
        return head, tail or estimate_text(value).partition(", ")[2]
    return "" if value is None else number(value), ""


def counted(claims: Sequence[Claim]) -> str:
    """How many claims hold, in a sentence."""
    counts = {outcome: sum(item.outcome == outcome for item in claims) for outcome in OUTCOMES}
    if not claims:
        return ""
    failed, unknown = counts["does not hold"], counts["not measurable"]
    phrases = [f"{counts['holds']} hold" + ("s" if counts["holds"] == 1 else "")]
    partly, open_ = counts["holds in part"], counts["undecided"]
    phrases += [f"{partly} {'holds' if partly == 1 else 'hold'} in part"] if partly else []
    phrases += [f"{failed} {'does' if failed == 1 else 'do'} not hold"]
    phrases += [f"{open_} {'is' if open_ == 1 else 'are'} undecided"] if open_ else []
    phrases += [f"{unknown} could not be measured"] if unknown else []
    return f"Of {len(claims)} claims put to the test by analyses, {join(phrases)}."


def by_outcome(claims: Sequence[Claim]) -> list[tuple[str, str, str, list[Claim]]]:
    """``(outcome, sign, kind, claims)``, those that fail first."""
    order = ("does not hold", "holds in part", "undecided", "holds", "not measurable")
    rows = [(outcome, *OUTCOMES[outcome], [c for c in claims if c.outcome == outcome]) for outcome in order]
    return [row for row in rows if row[3]]
