"""Many verdicts at once: what each part says, with p-values as they are and corrected for how many were asked.

Of twenty rules of which none is true one is met by chance at p < 0.05. Holm's correction
(:func:`sinklens.statistics.holm`) keeps the chance that any is at 0.05, whatever the parts have to do with one another.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sinklens.analysis.base import AnalysisResult
from sinklens.statistics import holm

COLUMNS = (
    *("analysis", "part", "about", "outcome", "value", "low", "high", "control", "control_low", "control_high"),
    *("smallest", "p", "p_holm"),
)
NAN = float("nan")


def parts_table(results: Mapping[str, AnalysisResult]) -> pd.DataFrame:
    """A row for every part of every verdict: analysis, part, what it is about, outcome, value and control with their
    intervals, the smallest effect that could have been seen, p, and p after Holm's correction over all rows that have
    one.
    """
    rows = []
    for name, result in results.items():
        for part in result.findings.verdict.parts:
            own, control = part.estimate, part.control_estimate
            ends = [(x.value, x.low, x.high) if x else (NAN, NAN, NAN) for x in (own, control)]
            known = [np.nan if x is None else x for x in (part.smallest, part.p_value)]
            rows.append((name, part.name, part.about, part.outcome, *ends[0], *ends[1], *known, NAN))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.assign(p_holm=holm(table.p.tolist()))
