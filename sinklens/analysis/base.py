"""An analysis: a question about the sink, its table, its figure, and a verdict on the claim by a stated rule.

An analysis is a file with an :class:`Analysis` named ``ANALYSIS``. Its ``run`` takes a :class:`sinklens.Study`
and its own options by keyword, and returns :class:`Findings`; its ``draw`` makes a plotly figure of these. What is
measured and what is drawn stay apart, so that numbers can be had without a plotting library.

The verdict is one of three words. *holds* and *does not hold* follow from the rule that the analysis states, which
compares an interval with a control and with a threshold; *not measurable* comes with the reason. A result against a
claim is a result.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from sinklens.errors import InputError
from sinklens.records.files import atomic_folder, write_json
from sinklens.records.plain import check_kinds
from sinklens.records.summaries import html, summary
from sinklens.records.text import number
from sinklens.statistics import Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Answer = Literal["holds", "does not hold", "not measurable"]


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
    """Against the null, where there is one."""
    rule: str = ""
    """When the claim counts as holding."""
    reason: str = ""
    """Why it is not measurable; empty otherwise."""


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
    """A verdict by a rule: ``holds`` says whether the rule is met. A statistic that is NaN is not measurable."""
    outcome: Answer = "holds" if holds else "does not hold"
    reason = ""
    if not np.isfinite(estimate.value):
        outcome, reason = "not measurable", "the statistic has no finite value on these prompts"
    return Verdict(outcome, claim, statistic, estimate, control, control_estimate, p_value, rule, reason)


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
        return summary(self, self.name, found.outcome, value, found.reason, f"{len(self.findings.table):,} rows")

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
            for key in ("estimate", "control_estimate"):
                found[key] = None if found[key] is None else _estimate(found[key])
            _check(data)
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
    if said["outcome"] not in get_args(Answer):
        raise ValueError(
            f"its verdict is {said['outcome']!r}, which is none of holds, does not hold and not measurable"
        )
    if said["p_value"] is not None:
        check_kinds({"p_value": (said["p_value"], (int, float))})


def _number(value: float | None) -> float:
    if value is None:
        return np.nan
    check_kinds({"a number": (value, (int, float))})
    return float(value)


def _estimate(data: Mapping[str, Any]) -> Estimate:
    check_kinds({"n": (data["n"], int)})
    return Estimate(_number(data["value"]), _number(data["low"]), _number(data["high"]), data["n"])


def _either(value: Mapping[str, Any] | float | None) -> Estimate | float:
    return _estimate(value) if isinstance(value, Mapping) else _number(value)
