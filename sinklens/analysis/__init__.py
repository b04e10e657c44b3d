"""An analysis: a question about the sink, its table, its figure, and a verdict on the claim by a stated rule.

An analysis is a file with an :class:`Analysis` named ``ANALYSIS``. Its ``run`` takes a :class:`sinklens.Study`
and its own options by keyword, and returns :class:`Findings`; its ``draw`` makes a plotly figure of these. What is
measured and what is drawn stay apart, so that numbers can be had without a plotting library.

The verdict is one of three words. *holds* and *does not hold* follow from the rule that the analysis states, which
compares an interval with a control and with a threshold; *not measurable* comes with the reason. A result against a
claim is a result.
"""

from sinklens.analysis.base import Analysis, AnalysisResult, Findings, Verdict, verdict
from sinklens.analysis.discovery import folder, list_analyses
from sinklens.analysis.preconditions import check_first_varies, check_k, check_sink_varies
from sinklens.analysis.run import config_of, load_analysis, main, run_analysis
from sinklens.analysis.tables import base_reading, mean_and_range, patch_table, tidy

__all__ = [
    "Analysis",
    "AnalysisResult",
    "Findings",
    "Verdict",
    "base_reading",
    "check_first_varies",
    "check_k",
    "check_sink_varies",
    "config_of",
    "folder",
    "list_analyses",
    "load_analysis",
    "main",
    "mean_and_range",
    "patch_table",
    "run_analysis",
    "tidy",
    "verdict",
]
