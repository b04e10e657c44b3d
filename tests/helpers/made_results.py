"""Small made-up results of a chain and of analyses, for the tests of figures and reports: no model is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sinklens.analysis.base import AnalysisResult, Findings, Verdict
from sinklens.chain.result import ChainResult
from sinklens.formation import Formation, FormationEvent, OutlierDim, SuperNeuron
from sinklens.statistics import Estimate

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'`${window.hacked=1}",
    "🙂",
    "שלום",
    "‮abc",
    "\n",
    "<!--<script>",
    "<img/src=x/onerror=window.hacked=1>",  # CircuitsVis spoils the one with spaces
]
"""Tokens that try to be more than text."""
LONG = "x" * 10_000
HOSTILE_FIGURE: dict[str, Any] = {
    "data": [
        {
            "type": "scattergl",
            "name": '<a href="javascript:window.hacked=1">click</a>',
            "x": ["</script><script>window.hacked=1</script>", "<b>bold</b>", LONG, LONG + "y"],
            "y": [1, 2, float("nan"), float("inf")],
            "text": ['<A HREF="https://example.org">x</A>', "a<br>b", "<img src=x onerror=window.hacked=1>", "שלום"],
            "hovertemplate": '%{x}<a href="data:text/html,x">y</a><extra></extra>',
        }
    ],
    "layout": {
        "template": {"layout": {"paper_bgcolor": "red"}},
        "title": {"text": '<a href="javascript:window.hacked=1">title</a> <b onclick="window.hacked=1">x</b>'},
        "images": [{"source": "https://example.org/a.png"}, {"source": "data:image/png;base64,AAAA"}],
        "annotations": [{"text": "<a href='//example.org' target='_top'>note</a>", "x": 0, "y": 1}],
        "xaxis": {"title": {"text": "</script>"}},
    },
}
"""A figure that tries to be more than a figure."""
N_BLOCKS = 4

_SCORES = [
    # stage, edit, control, predicted and effect by direction (denoise, noise)
    ("value_aggregation", "transplant", "", (1, 1), (1.0, 1.0)),
    ("value_aggregation", "transplant", "other_position", (0, 0), (0.0, -0.01)),
    ("value_aggregation", "moment_match", "", (1, 1), (0.02, -0.03)),
    ("value_aggregation", "moment_match", "same_norm", (0, 0), (0.01, 0.0)),
    ("qk_locking", "transplant", "", (1, 1), (1.37, 0.93)),
    ("qk_locking", "transplant", "value", (0, 0), (0.81, 0.04)),
    ("qk_locking", "query_direction_removed", "", (0, 1), (0.12, 0.9)),
]


def made_result(
    *, natural: bool = False, name: str = "tiny", source: str = "passages", tokens: Sequence[str] = tuple(HOSTILE)
) -> ChainResult:
    """A result with two stages in a model of four blocks."""
    directions = ("noise",) if natural else ("denoise", "noise")
    runs = ("natural",) if natural else ("base", "anchored")
    return ChainResult(
        scores=pd.DataFrame([_score(row, d) for row in _SCORES for d in directions]),
        effects=pd.DataFrame(),
        matrix=_matrix(directions),
        checks=pd.DataFrame(
            [
                {"quantity": "entropy", "where": where, "layers": [0, 1]} | dict.fromkeys(runs, 1.5)
                for where in ("target", "ordinary position")
            ]
        ),
        formation=_formation(),
        runs={run: {"sink": [0.1, 0.3], "ordinary": [0.01, 0.02]} for run in runs},
        config={
            "target": "natural" if natural else 2,
            "pair": "natural" if natural else "block_aggregation",
            "strength": None,
            "pair_layers": [] if natural else [0, 1],
            "stages": ["value_aggregation", "qk_locking"],
            "readout_layers": [2, 3],
            "control_draws": 1,
            "min_gap": 0.01,
            "seed": 0,
            "n_prompts": 2,
            "length": len(tokens),
            "prompts": source,
            "n_skipped": 0,
        },
        provenance={
            "versions": {"python": "3"},
            "model": name,
            "dtype": "float32",
            "device": "cpu",
            "git_commit": None,
            "weight_digest": "aa",
            "prompts_digest": "bb",
        },
        engine={
            "n_patches": 14,
            "n_rows": 28,
            "n_forwards": 3,
            "max_rows": 8,
            "n_halvings": 0,
            "seconds": 0.5,
            "peak_bytes": None,
        },
        tokens=[list(tokens)],
        attention={run: torch.rand(1, 2, len(tokens), len(tokens)).tril().half() for run in runs},
        received={run: torch.tensor([[*range(1, len(tokens)), float("nan")]]) / len(tokens) for run in runs},
        neurons={run: torch.arange(len(tokens)).view(1, -1, 1) * (100.0 if run == "anchored" else 1.0) for run in runs},
    )


def _score(row: tuple, direction: str) -> dict[str, object]:
    stage, edit, control, predicted, effects = row
    index = int(direction == "noise")
    effect = effects[index]
    return {
        "stage": stage,
        "edit": edit,
        "direction": direction,
        "control": control,
        "effect": effect,
        "ci_low": effect if effect == 1 else effect - 0.02,
        "ci_high": effect if effect == 1 else effect + 0.03,
        "n": 2,
        "n_excluded": 0,
        "predicted": float(predicted[index]),
        "layers": [0, 1] if stage == "value_aggregation" else [2, 3],
        "units": None,
        "draws": 1,
    }


def _matrix(directions: tuple[str, ...]) -> pd.DataFrame:
    values = {("value_aggregation", "sink"): -9.724, ("qk_locking", "value_aggregation"): float("nan")}
    return pd.DataFrame(
        [
            {
                "stage": stage,
                "direction": direction,
                "readout": readout,
                "n": 2,
                "n_excluded": 0,
                "effect": values.get((stage, readout), 1.0),
                "ci_low": 0.9,
                "ci_high": 1.1,
            }
            for direction in directions
            for stage in ("value_aggregation", "qk_locking")
            for readout in ("value_aggregation", "qk_locking", "sink")
        ]
    )


def _formation() -> Formation:
    profile = pd.DataFrame(
        {
            "layer": range(N_BLOCKS),
            "norm_sink_before": [1.0, 2.0, 900.0, 950.0],
            "norm_other_before": [1.0, 2.0, 3.0, 4.0],
            "norm_sink_after": [2.0, 900.0, 950.0, 800.0],
            "norm_other_after": [2.0, 3.0, 4.0, 5.0],
            "attention_sink": [0.1, 0.1, 0.7, 0.6],
            "attention_other": [0.1, 0.1, 0.05, 0.05],
        }
    )
    return Formation(
        layer=1,
        sink_positions=(0, 0),
        super_neurons=(SuperNeuron(5, None, 12.0, 345.6, 0.0123),),
        outlier_dims=(OutlierDim(3, -789.1, 44.0),),
        events=(FormationEvent(1, 2.0, 900.0, 1.0, 300.0, 898.0, 3.0),),
        profile=profile,
    )


def made_analysis(
    name: str = "onset",
    outcome: Any = "holds",
    *,
    text: str = "",
    figure: dict[str, Any] | None = None,
    prompts: str = "passages",
) -> AnalysisResult:
    """An analysis of two points; ``text`` is put into everything that is text."""
    measured = outcome != "not measurable"
    verdict = Verdict(
        outcome,
        claim=f"The claim of {name}. {text}",
        statistic=f"share of prompts {text}",
        estimate=Estimate(0.75, 0.61, 0.88, 16) if measured else None,
        control=f"an ordinary position {text}",
        control_estimate=Estimate(0.03, 0.01, 0.052, 16) if measured else None,
        p_value=0.0123 if measured else None,
        rule=f"holds above one half {text}",
        reason="" if measured else f"it has no such part {text}",
    )
    table = pd.DataFrame({"x": [0, 1], "y": [0.25, 0.5], "series": [f"a {text}", "b"]})
    if figure is None:
        from sinklens import viz

        drawn = viz.points(table, "x", "y", series="series")
        figure = json.loads(drawn.to_json() or "")
    return AnalysisResult(
        name=name,
        title=f"Title of {name} {text}".strip(),
        paper="figure 3",
        findings=Findings(verdict, table, f"Caption. {text}", {f"a number {text}": 2.5}),
        figure=figure if measured else None,
        config={
            "options": {"lengths": [8, 16]},
            "seed": 0,
            "given": {},
            "prompts": prompts,
            "n_prompts": 2,
            "length": 8,
        },
        provenance={
            "versions": {"python": "3"},
            "model": f"tiny{text}",
            "dtype": "float32",
            "device": "cpu",
            "git_commit": None,
            "weight_digest": "aa",
            "prompts_digest": "bb",
        },
        seconds=1.5,
    )


def put(folder: Path, **parts: Any) -> Path:
    """Save results in folders of a run."""
    for name, result in parts.items():
        result.save(folder / name)
    return folder
