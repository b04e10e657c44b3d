"""What was found of a circuit: the edges that are kept, and the tables that say why.

Every effect is a share of what the sink pair does to the metric, ``(M_patched - M_without) / (M_with - M_without)``
counted from the run that is patched (1: all of it, 0: nothing), taken for each prompt, averaged last, never clipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from sinklens.circuits.nodes import Edge, Node
from sinklens.errors import InputError
from sinklens.formation import Formation, formation_from_json, formation_to_json
from sinklens.records.files import atomic_folder, write_json, write_tensors
from sinklens.records.plain import check_kinds
from sinklens.records.summaries import html, some, summary

ESTIMATED = ["effect", "ci_low", "ci_high", "n", "n_excluded"]
"""Columns of every mean over prompts: the mean effect, its 95% interval, and the prompts that it is of."""
EDGE = ["sender", "receiver", "branch"]
"""Columns that name an edge: :attr:`Node.name` of both ends, and the input."""
COLUMNS: dict[str, list[str]] = {
    "edges": [*EDGE, "direction", "method", *ESTIMATED, "kept"],
    "contributions": ["receiver", "branch", "sender", "run", "value", "ci_low", "ci_high", "n"],
    "tests": ["what", "ablation", "n_edges", "draws", *ESTIMATED],
    "minimality": [*EDGE, "loss", "ci_low", "ci_high", "n", "n_excluded"],
    "pruning": ["n_edges", "share"],
    "interactions": ["a", "b", "direction", "effect_a", "effect_b", "both", "interaction", "ci_low", "ci_high", "n"],
    "agreement": ["method", "direction", "spearman", "ci_low", "ci_high", "n_edges"],
    "by_token": ["run", "prompt", "position", "token", "branch", "value"],
}
"""The tables of a :class:`Circuit` and what columns each has."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """The fewest edges that keep a stated share of the sink, and how this was found and tested."""

    kept: tuple[Edge, ...]
    """The circuit's edges, in the order of the forward pass."""
    edges: pd.DataFrame
    """One row for each edge, direction (``denoise``: the sender of the run with the sink into the run without;
    ``noise``: the other way) and method (``exact``, ``eap``, ``eap_ig``): effect, ci_low, ci_high, n, n_excluded, and
    whether the edge is of the circuit."""
    contributions: pd.DataFrame
    """What each sender adds to each branch of the super neurons (``gate`` and ``linear``, mean over the neurons) by run
    (a run of the pair, or ``difference``): value, with its interval. ``norm`` as a sender is what the norm's own scale
    contributes (to the difference), ``bias`` what biases of attention do."""
    tests: pd.DataFrame
    """One row for each ``what`` (``circuit``: only these edges; ``complement``: all but these; ``random``: as many
    drawn edges; ``all``, ``none``) and ``ablation`` of the rest (``other run``, ``mean``, ``zero``, ``resample``):
    the share of the sink that is left."""
    minimality: pd.DataFrame
    """For each edge of the circuit the loss when it goes, as a share of the sink."""
    pruning: pd.DataFrame
    """The share of the sink that the best so many edges keep."""
    interactions: pd.DataFrame
    """Pairs of nodes: effects of transplanting each, both, and ``interaction``: both less the sum."""
    agreement: pd.DataFrame
    """Rank correlation of each estimate with exact effects, on a random sample of edges."""
    formation: Formation
    """Where the sink forms."""
    config: dict[str, Any]
    """Everything that was chosen: target, pair, metric, share, seed and so on; ``n_edges`` and ``n_nodes`` of the whole
    graph; ``target_positions``, one a prompt."""
    runs: dict[str, list[float]]
    """For each run of the pair the metric of every prompt."""
    provenance: dict[str, Any]
    """Versions, git commit, device, dtype, model id and digests."""
    engine: dict[str, Any]
    """Patches, rows, seconds by step."""
    tokens: list[str]
    """Token strings of the first prompt, for views."""
    by_token: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS["by_token"]))
    """First prompt: what each token's values, by all heads, contribute directly to the super neurons at the sink."""
    attention: dict[str, Tensor] = field(default_factory=dict)
    """``{run/head 3.5: [query key]}`` of the first prompt: attention of the circuit's heads, in both runs."""

    def __repr__(self) -> str:
        sink = f"{self.config.get('pair', '')} at {self.config.get('target', '')}"
        return summary(self, f"{len(self.kept)} of {self.config.get('n_edges', '?')} edges", sink, some(self.kept, 3))

    def _repr_html_(self) -> str:
        return html(repr(self), self.of(kept=True))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the circuit's edges, in the order of the forward pass."""
        return tuple(
            sorted({node for edge in self.kept for node in (edge.sender, edge.receiver)}, key=lambda n: n.rank)
        )

    def of(self, *, direction: str | None = None, method: str | None = None, kept: bool | None = None) -> pd.DataFrame:
        """Rows of :attr:`edges`, the largest effects first."""
        rows = self.edges
        for name, value in (("direction", direction), ("method", method), ("kept", kept)):
            if value is not None:
                rows = rows.loc[rows[name] == value]
        order = np.argsort(-rows["effect"].abs().to_numpy(), kind="stable")
        return rows.iloc[order]

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write ``circuit.json``, a parquet file for each table, and ``attention.safetensors`` into a folder, as a
        whole or not at all.

        Raises:
            InputError: when it exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            record: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
            record |= {"kept": [edge.name for edge in self.kept], "formation": formation_to_json(self.formation)}
            write_json(folder / "circuit.json", record)
            for name in COLUMNS:
                getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
            write_tensors(folder / "attention.safetensors", self.attention)
        return Path(out)

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """Read back what :meth:`save` wrote.

        Raises:
            InputError: when the folder does not hold a finished run.
        """
        folder = Path(folder)
        if not (folder / "circuit.json").is_file():
            raise InputError(f"{folder} holds no circuit.json: give the folder that a circuit was saved in")
        try:
            data = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
            check_kinds({name: (data[name], kind) for name, kind in _PLAIN.items()})
            fields: dict[str, Any] = {name: data[name] for name in _PLAIN}
            fields |= {name: _table(folder, name) for name in COLUMNS}
            return cls(
                kept=tuple(map(Edge.of, data["kept"])),
                formation=formation_from_json(data["formation"]),
                attention=load_file(folder / "attention.safetensors"),
                **fields,
            )
        except Exception as error:  # JSON, Parquet and safetensors share no class, and a file may hold anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the run in {folder} is damaged ({reason}): find the circuit again") from error


_PLAIN: Mapping[str, type] = {"config": dict, "runs": dict, "provenance": dict, "engine": dict, "tokens": list}


def _table(folder: Path, name: str) -> pd.DataFrame:
    table = pd.read_parquet(folder / f"{name}.parquet")
    if missing := [column for column in COLUMNS[name] if column not in table]:
        raise KeyError(f"{name} has no column {missing[0]}")
    return table


def table(name: str, records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as the table of that name, with its columns in their order, also where there are none."""
    return pd.DataFrame(records, columns=COLUMNS[name])
