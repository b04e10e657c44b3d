"""A chain's result with everything that a real one has, in a few rows: no model is run."""

from __future__ import annotations

import math

import pandas as pd
import torch

from sinklens.chain.result import SCORE_KEYS, ChainResult, summarise
from sinklens.formation import Formation, FormationEvent, OutlierDim, SuperNeuron

NAN = math.nan


def synthetic_result(n_prompts: int = 3) -> ChainResult:
    """A small result with everything that a real one has: two stages, controls, an excluded prompt, no units, NaN."""
    rows = []
    for stage, edit, control, units in (
        ("value_aggregation", "transplant", "", None),
        ("super_neurons", "transplant", "", [7, 3]),
        ("super_neurons", "transplant", "other_neurons", None),
    ):
        for direction in ("denoise", "noise"):
            for prompt in range(n_prompts):
                value = NAN if prompt == 2 else (0.1 if control else 1.0) + 0.02 * prompt
                rows.append(
                    {
                        "stage": stage,
                        "edit": edit,
                        "direction": direction,
                        "control": control,
                        "draw": 0,
                        "prompt": prompt,
                        "effect": value,
                        "units": units,
                    }
                )
    effects = pd.DataFrame(rows)
    scores = summarise(effects, SCORE_KEYS, seed=0)
    scores["predicted"] = [0.0 if control else 1.0 for control in scores.control]
    scores["layers"] = [[0, 1, 2] if stage == "value_aggregation" else [2] for stage in scores.stage]
    is_super = (scores.stage == "super_neurons") & (scores.control == "")
    scores["units"] = [[7, 3] if flag else None for flag in is_super]
    scores["draws"] = 1
    matrix = pd.DataFrame(
        {
            "stage": ["value_aggregation"] * 2,
            "direction": ["denoise", "noise"],
            "readout": ["sink"] * 2,
            "effect": [1.0, 1.0],
            "ci_low": [NAN, NAN],
            "ci_high": [NAN, NAN],
            "n": [1, 1],
            "n_excluded": [0, 0],
        }
    )
    return ChainResult(
        scores=scores,
        effects=effects,
        matrix=matrix,
        checks=pd.DataFrame({"quantity": ["entropy"], "where": ["target"], "layers": [[0, 1]], "base": [1.5]}),
        formation=Formation(
            layer=2,
            sink_positions=(0,) * n_prompts,
            super_neurons=(SuperNeuron(7, 12.5, 11.0, 300.0, 0.5), SuperNeuron(3, None, 9.0, 30.0, 0.1)),
            outlier_dims=(OutlierDim(5, -250.0, math.inf),),
            events=(FormationEvent(2, 1.0, 100.0, 1.5, 80.0, 99.0, NAN),),
            profile=pd.DataFrame({"layer": [0, 1, 2], "norm_sink_after": [1.0, NAN, 100.0]}),
        ),
        runs={run: {"sink": [value] * n_prompts} for run, value in (("base", 0.02), ("anchored", 0.6))},
        config={
            "target": 10,
            "pair": "block_aggregation",
            "readout_layers": [3, 4],
            "n_prompts": n_prompts,
            "length": 16,
            "prompts": "synthetic ✓",
            "n_skipped": 1,
            "min_gap": 0.01,
            "seed": 0,
            "strength": None,
        },
        provenance={"versions": {"python": "3"}, "git_commit": None, "device": "cpu", "dtype": "float32"},
        engine={"n_patches": 6, "n_rows": 18, "n_forwards": 4, "seconds": 0.5, "peak_bytes": None},
        tokens=[["<b>", " ", "é", "\n"] * 4],
        attention={run: torch.rand(1, 2, 16, 16).half() for run in ("base", "anchored")},
        received={run: torch.rand(1, 16) for run in ("base", "anchored")},
        neurons={run: torch.rand(1, 16, 2) for run in ("base", "anchored")},
    )
