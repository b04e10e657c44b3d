"""A small made-up circuit, for the tests of figures and reports: no model is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinklens.circuits import Circuit, Edge
from sinklens.circuits.result import COLUMNS, table
from tests.helpers.made_results import HOSTILE, made_result

KEPT = {
    "embed > head 0.1 v": 0.31,
    "embed > mlp 0 in": 0.9,
    "head 0.1 > mlp 2 in": -0.12,
    "mlp 0 > mlp 2 in": 0.55,
    "head 1.0 > super 2 gate": 0.2,
    "mlp 0 > super 2 gate": 0.4,
    "mlp 0 > super 2 linear": 1.3,
    "super 2 > kv 3.0 k": 0.97,
    "mlp 2 > head 3.1 q": 0.02,
}
"""Edges of the circuit, and their effects (denoise)."""
LEFT = "embed > super 2 gate"
"""One that is not kept."""
RUNS = ("base", "anchored")


def made_circuit(*, natural: bool = False, tokens: Sequence[str] = tuple(HOSTILE), more: int = 0) -> Circuit:
    """A circuit of nine edges in a model of four blocks, and ``more`` between heads of its first and its last."""
    effects = KEPT | {f"head 0.{i} > kv 3.{i % 3} v": 0.01 * i for i in range(2, 2 + more)}
    kept = tuple(map(Edge.of, effects))
    like, runs = made_result(natural=natural), ("natural", "without") if natural else RUNS
    directions = ("noise",) if natural else ("denoise", "noise")
    edges = [
        {**_names(name), "direction": direction, "method": method, "kept": name != LEFT, **_mean(value * scale)}
        for name, value in {**effects, LEFT: 0.0}.items()
        for direction in directions
        for method, scale in (("eap", 2.0), ("exact", 1.0 if direction == "denoise" else -0.5))
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "edges": edges,
        "contributions": _contributions(runs),
        "tests": _tests(),
        "minimality": [{**_names(name), "loss": abs(x) / 2, **_ends(x / 2), "n": 2} for name, x in effects.items()],
        "pruning": [{"n_edges": n, "share": 1 - 0.5**n} for n in range(12)],
        "interactions": _interactions(directions),
        "agreement": [
            {"method": "eap", "direction": d, "spearman": 0.9, **_ends(0.9), "n_edges": 64} for d in directions
        ],
        "by_token": [
            {"run": run, "prompt": 0, "position": p, "token": t, "branch": branch, "value": (-1.0) ** p * p / 10}
            for run in runs
            for branch in ("gate", "linear")
            for p, t in enumerate(tokens[:-1])
        ],
    }
    tables: dict[str, pd.DataFrame] = {name: table(name, rows[name]) for name in COLUMNS}
    attention = {
        f"{run}/head {head}": torch.rand(len(tokens), len(tokens)).tril().half()
        for run in runs
        for head in ("0.1", "1.0")
    }
    return Circuit(
        kept=kept,
        formation=like.formation,
        config={**like.config, "n_edges": 400, "n_nodes": 40, "share": 0.9, "metric": "attention_received"},
        runs={run: [0.1 + 0.3 * place, 0.2] for place, run in enumerate(runs)},
        provenance=like.provenance,
        engine={"seconds": {"estimates": 1.0, "exact": 0.5}, "exact": {"patches": 100, "rows": 200, "seconds": 0.4}},
        tokens=list(tokens),
        attention=attention,
        **tables,
    )


def _names(name: str) -> dict[str, Any]:
    edge = Edge.of(name)
    return {"sender": str(edge.sender), "receiver": str(edge.receiver), "branch": edge.branch}


def _ends(value: float) -> dict[str, float]:
    return {"ci_low": value - 0.05, "ci_high": value + 0.05}


def _mean(value: float) -> dict[str, Any]:
    return {"effect": value, **_ends(value), "n": 2, "n_excluded": 0}


def _contributions(runs: Sequence[str]) -> list[dict[str, Any]]:
    senders = ["embed", "head 0.1", "mlp 0", "mlp 1", "norm"]
    return [
        {"receiver": "super 2", "branch": branch, "sender": sender, "run": run, "value": size, **_ends(size), "n": 2}
        for run in (*runs, "difference")
        for branch in ("gate", "linear")
        for sender, size in zip(senders, (0.1, -0.4, 2.5, 0.8, -0.2), strict=True)
    ]


def _tests() -> list[dict[str, Any]]:
    shares = {"circuit": 0.93, "complement": 0.04, "random": 0.1, "all but random": 0.99, "all": 1.0, "none": 0.0}
    return [
        {"what": what, "ablation": ablation, "n_edges": 9, "draws": 1, **_mean(share * scale)}
        for what, share in shares.items()
        for ablation, scale in (("other run", 1.0), ("mean", 0.8), ("zero", 0.2), ("resample", np.nan))
    ]


def _interactions(directions: Sequence[str]) -> list[dict[str, Any]]:
    pairs = [("mlp 0", "mlp 2", -0.3), ("mlp 0", "head 0.1", 0.1), ("mlp 2", "head 0.1", 0.0)]
    return [
        {
            "a": a,
            "b": b,
            "direction": d,
            "effect_a": 0.5,
            "effect_b": 0.4,
            "both": 0.9 + x,
            "interaction": x,
            **_ends(x),
        }
        | {"n": 2}
        for a, b, x in pairs
        for d in directions
    ]
