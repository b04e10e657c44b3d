"""An analysis: a question about the sink, its table, its figure, and a verdict on the claim by a stated rule.

An analysis is a file with an :class:`Analysis` named ``ANALYSIS``. Its ``run`` takes a :class:`sinklens.Study`
and its own options by keyword, and returns :class:`Findings`; its ``draw`` makes a plotly figure of these. What is
measured and what is drawn stay apart, so that numbers can be had without a plotting library.

A verdict has parts: does the quantity behave as stated, and is it the cause (:func:`cause`)? Each follows from a stated
rule on whole intervals (:func:`above`, :func:`below`, :func:`rare`). Together they say *holds*, *holds in part*, *does
not hold*, *undecided* (more prompts would tell) or *not measurable*, with the reason. A result against a claim is a
result.
"""

from sinklens.analysis.base import Analysis, AnalysisResult, Findings, Verdict, verdict, verdict_of
from sinklens.analysis.causes import cause, induced
from sinklens.analysis.corrections import parts_table
from sinklens.analysis.discovery import folder, list_analyses, list_groups
from sinklens.analysis.elsewhere import elsewhere
from sinklens.analysis.preconditions import check_first_varies, check_k, check_sink_varies
from sinklens.analysis.run import config_of, load_analysis, main, run_analysis
from sinklens.analysis.tables import MIN_GAP, base_reading, effect_table, mean_and_range, patch_table, tidy
from sinklens.chain.rules import Condition, Part, above, below, judge, of_bool, rare, unmeasured, within

__all__ = [
    "Analysis",
    "AnalysisResult",
    "Condition",
    "Findings",
    "MIN_GAP",
    "Part",
    "Verdict",
    "above",
    "base_reading",
    "below",
    "cause",
    "check_first_varies",
    "check_k",
    "check_sink_varies",
    "config_of",
    "effect_table",
    "elsewhere",
    "folder",
    "induced",
    "judge",
    "list_analyses",
    "list_groups",
    "load_analysis",
    "main",
    "mean_and_range",
    "of_bool",
    "parts_table",
    "patch_table",
    "rare",
    "run_analysis",
    "tidy",
    "unmeasured",
    "verdict",
    "verdict_of",
    "within",
]
