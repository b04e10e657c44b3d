"""An analysis: a question about the sink, its table, its figure, and a verdict on the claim by a stated rule.

An analysis is a file with an :class:`Analysis` named ``ANALYSIS``. Its ``run`` takes a :class:`sinklens.Study`
and its own options by keyword, and returns :class:`Findings`; its ``draw`` makes a plotly figure of these. What is
measured and what is drawn stay apart, so that numbers can be had without a plotting library.

A verdict has parts (:mod:`sinklens.chain.rules`): does the quantity behave as stated, and is it the cause? Each
follows from the rule that the analysis states, which compares an interval with a control and with a threshold. All of
them hold and the claim *holds*; some do and it *holds in part*; none does and it *does not hold*; *undecided* is what
more prompts would tell, and *not measurable* comes with the reason. A result against a claim is a result.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd

from sinklens.chain.rules import About, Answer, Part, PartAnswer, together, which
from sinklens.errors import InputError
from sinklens.records.files import atomic_folder, write_json
from sinklens.records.plain import check_kinds
from sinklens.records.summaries import html, summary
from sinklens.records.text import join, number
from sinklens.statistics import PROMPTS, Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim."""

    outcome: Answer
    """Whether the claim holds on this model and these prompts."""
    claim: str
    """The claim, in one sentence."""
    statistic: str = ""
    """What was measured, in words, with its unit."""
    estimate: Estimate | None = None
    """Its value and 95% interval."""
    control: str = ""
    """What it is compared with: a control or a null, in words."""
    control_estimate: Estimate | None = None
    """Its value and 95% interval; for a null the mean and the range of 95% of its draws."""
    p_value: float | None = None
    """Of the rule (:attr:`sinklens.chain.rules.Part.p_value`), where there is one."""
    rule: str = ""
    """When the claim counts as holding."""
    reason: str = ""
    """Why it is not measurable; empty otherwise."""
    parts: tuple[Part, ...] = ()
    """What it is made of; the fields above from ``statistic`` on are the first one's."""

    @property
    def which(self) -> str:
        """Which parts hold and which do not; empty where there are fewer than two."""
        return which(self.parts)

    def part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            KeyError: there is none.
        """
        found = {part.name: part for part in self.parts}
        if name not in found:
            raise KeyError(f"the verdict has no part {name!r}: its parts are {', '.join(found) or 'none'}")
        return found[name]


def verdict(
    claim: str,
    statistic: str,
    estimate: Estimate,
    control: str,
    control_estimate: Estimate | None,
    rule: str,
    holds: bool,
    p_value: float | None = None,
) -> Verdict:
    """A verdict of one part, a quantity, by a rule that is either met or not: ``holds`` says whether it is.

    A statistic that is NaN is not measurable. :func:`sinklens.analysis.verdict_of` makes verdicts of several parts, and
    :func:`sinklens.analysis.judge` parts that can be undecided.
    """
    outcome: PartAnswer = "holds" if holds else "does not hold"
    reason = ""
    if not np.isfinite(estimate.value):
        outcome, reason = "not measurable", "the statistic has no finite value on these prompts"
    part = Part("quantity", "quantity", claim, outcome, statistic, estimate, control, control_estimate, rule, p_value)
    return verdict_of(claim, [replace(part, reason=reason)])


def verdict_of(claim: str, parts: Sequence[Part]) -> Verdict:
    """A verdict by what its parts say together (:func:`sinklens.chain.rules.together`).

    Args:
        claim: the claim, in one sentence.
        parts: at least one; the first one's value and control stand for the verdict where there is room for one.

    Raises:
        InputError: there are no parts, or two of one name.
    """
    if not parts or len({part.name for part in parts}) < len(parts):
        raise InputError("a verdict needs parts, and each a name of its own")
    first = parts[0]
    return Verdict(
        together([part.outcome for part in parts]),
        claim,
        first.statistic,
        first.estimate,
        first.control,
        first.control_estimate,
        first.p_value,
        first.rule,
        first.reason if all(part.outcome == "not measurable" for part in parts) else "",
        tuple(parts),
    )


@dataclass(frozen=True, eq=False)
class Findings:
    """What an analysis found."""

    verdict: Verdict
    """The answer."""
    table: pd.DataFrame
    """All that was measured, tidy: one observation a row."""
    caption: str = ""
    """What the figure shows."""
    numbers: Mapping[str, Estimate | float] = field(default_factory=dict)
    """Other numbers worth a line, by what they are."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """A question, and how it is answered."""

    name: str
    """Short name: the command line's, and the file's."""
    title: str
    """Heading of its section in reports."""
    claim: str
    """The claim it tests, in one sentence."""
    run: Callable[..., Findings]
    """``(study, *, options...) -> Findings``; options have defaults, and ``Annotated`` with a line of help."""
    draw: Callable[[Findings], Figure]
    """``(findings) -> plotly figure``."""
    paper: str = ""
    """The figure of the paper that it answers to, and the paper's value where it gives one."""
    code: Callable[..., object] | None = None
    """A function of the file that the analysis is written in, where ``run`` comes from another."""
    alone: bool = False
    """Whether it is run by its name alone, and not with all others: it needs to be told more than they are."""
    group: str = ""
    """Name of a group that is run when it is asked for (``sinklens all --with GROUP``), and not with all others."""

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults."""
        given = list(inspect.signature(self.run).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in given}


@dataclass(frozen=True, eq=False)
class AnalysisResult:
    """An analysis's findings with all that is needed to trace them."""

    name: str
    """The analysis."""
    title: str
    """Its heading."""
    paper: str
    """Its figure in the paper, and the value there."""
    findings: Findings
    """Verdict, table, caption and other numbers."""
    figure: dict[str, Any] | None
    """Plotly's JSON; None when nothing was measured, or plotly is not installed."""
    config: dict[str, Any]
    """Options, prompts and seed; ``command`` when it was made on the command line."""
    provenance: dict[str, Any]
    """Versions, git commit, device, dtype, model id and digests."""
    seconds: float
    """Wall-clock time."""

    def __repr__(self) -> str:
        found = self.findings.verdict
        value = "" if found.estimate is None else f"{found.statistic}: {number(found.estimate.value)}"
        said = found.outcome + (f" ({found.which})" if found.which else "")
        return summary(self, self.name, said, value, found.reason, f"{len(self.findings.table):,} rows")

    def _repr_html_(self) -> str:
        return html(f"{self!r} {self.findings.verdict.claim}", self.findings.table)

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write ``summary.json``, ``table.parquet`` and ``figure.json`` into a folder, as a whole or not at all.

        Raises:
            InputError: when it exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            self.findings.table.to_parquet(folder / "table.parquet", index=False)
            if self.figure is not None:
                write_json(folder / "figure.json", self.figure, indent=None)
            write_json(folder / "summary.json", self.summary())
        return Path(out)

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return {
            "analysis": self.name,
            "title": self.title,
            "paper": self.paper,
            "verdict": asdict(self.findings.verdict),
            "caption": self.findings.caption,
            "numbers": {k: asdict(v) if isinstance(v, Estimate) else v for k, v in self.findings.numbers.items()},
            "config": self.config,
            "provenance": self.provenance,
            "seconds": self.seconds,
        }

    @classmethod
    def load(cls, folder: str | Path) -> AnalysisResult:
        """Read back what :meth:`save` wrote.

        Raises:
            InputError: when the folder does not hold a finished analysis.
        """
        folder = Path(folder)
        if not (folder / "summary.json").is_file():
            raise InputError(f"{folder} holds no summary.json: give the folder that an analysis was saved in")
        try:
            data = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            found = data["verdict"]
            _check(data)
            found |= _estimates(found)
            found["parts"] = tuple(_part(part) for part in found.get("parts", ()))  # there were none once
            numbers = {name: _either(value) for name, value in data["numbers"].items()}
            table = pd.read_parquet(folder / "table.parquet")
            figure = folder / "figure.json"
            return cls(
                name=data["analysis"],
                title=data["title"],
                paper=data["paper"],
                findings=Findings(Verdict(**found), table, data["caption"], numbers),
                figure=json.loads(figure.read_text(encoding="utf-8")) if figure.is_file() else None,
                config=data["config"],
                provenance=data["provenance"],
                seconds=data["seconds"],
            )
        except Exception as error:  # JSON and Parquet share no class, and a file may hold anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the analysis in {folder} is damaged ({reason}): run it again") from error


def _check(data: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError where the content of ``summary.json`` is not what it should be."""
    check_kinds({name: (data[name], str) for name in ("analysis", "title", "paper", "caption")})
    check_kinds({name: (data[name], dict) for name in ("verdict", "numbers", "config", "provenance")})
    check_kinds({"seconds": (data["seconds"], (int, float))})
    said = data["verdict"]
    check_kinds({name: (said[name], str) for name in ("claim", "statistic", "control", "rule", "reason")})
    check_kinds({"parts": (said.get("parts", []), list)})
    _check_said(said, get_args(Answer))


def _check_said(said: Mapping[str, Any], answers: Sequence[str]) -> None:
    if said["outcome"] not in answers:
        raise ValueError(f"its verdict is {said['outcome']!r}, which is none of {join(answers)}")
    if said["p_value"] is not None:
        check_kinds({"p_value": (said["p_value"], (int, float))})


def _part(said: dict[str, Any]) -> Part:
    check_kinds({"a part": (said, dict)})
    text = ("name", "sentence", "statistic", "control", "rule", "detail", "reason")
    check_kinds({name: (said[name], str) for name in text})
    if said["about"] not in get_args(About):
        raise ValueError(f"a part of its verdict is about {said['about']!r}")
    _check_said(said, get_args(PartAnswer))
    smallest = None if said["smallest"] is None else _number(said["smallest"])
    fields: dict[str, Any] = {**said, **_estimates(said), "smallest": smallest}
    return Part(**fields)


def _estimates(said: Mapping[str, Any]) -> dict[str, Estimate | None]:
    both = {name: said[name] for name in ("estimate", "control_estimate")}
    return {name: None if value is None else _estimate(value) for name, value in both.items()}


def _number(value: float | None) -> float:
    if value is None:
        return np.nan
    check_kinds({"a number": (value, (int, float))})
    return float(value)


def _estimate(data: Mapping[str, Any]) -> Estimate:
    check_kinds({"n": (data["n"], int)})
    value, low, high = (_number(data[name]) for name in ("value", "low", "high"))
    over = data.get("over", PROMPTS)  # nothing said so once
    check_kinds({"over": (over, str)})
    return Estimate(value, low, high, data["n"], data.get("n_groups"), over)


def _either(value: Mapping[str, Any] | float | None) -> Estimate | float:
    return _estimate(value) if isinstance(value, Mapping) else _number(value)
