"""Results: effects per prompt, aggregated last, saved atomically with all that is needed to trace them.

An effect is a ratio of differences, ``(M_patched - M_without) / (M_with - M_without)``, counted from the run that was
patched: 1 means that the patch did all that the sink pair does, 0 nothing. It is never clipped. A prompt in which the
pair itself moves the metric by less than ``min_gap`` cannot be divided by: it is excluded, and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinklens._files import atomic_folder
from sinklens.errors import InputError
from sinklens.formation import Formation, FormationEvent, OutlierDim, SuperNeuron
from sinklens.statistics import bootstrap_interval

SCORE_KEYS = ["stage", "edit", "direction", "control"]
"""What one score is about."""
OF_TOKENS = ("received", "neurons")
"""Fields of a result with a number for every token."""


@dataclass(frozen=True, eq=False)
class ChainResult:
    """Scores, chain matrix, checks, formation and provenance of one chain."""

    scores: pd.DataFrame
    """One row per stage, edit, direction and control: effect, interval, n, n_excluded, layers, units."""
    effects: pd.DataFrame
    """The same per prompt and draw, with the metric's values."""
    matrix: pd.DataFrame
    """Edit stage i, read stage j: effect of each stage's transplant on every stage's readout and on the sink."""
    checks: pd.DataFrame
    """What else the pair changes: entropy, mixing, variance, activations, norms, in both runs."""
    formation: Formation
    """Where the sink forms."""
    runs: dict[str, dict[str, list[float]]]
    """Per run and readout, the value for every prompt."""
    config: dict[str, Any]
    """Everything that was chosen."""
    provenance: dict[str, Any]
    """Versions, git commit, device, dtype, model id and digests."""
    engine: dict[str, Any]
    """Forward passes, patches, seconds, peak memory."""
    tokens: list[list[str]]
    """Token strings of the prompts that have views."""
    attention: dict[str, Tensor] = field(default_factory=dict)
    """``{run: [prompt head query key]}``, attention of the block after the formation block, for views."""
    received: dict[str, Tensor] = field(default_factory=dict)
    """``{run: [prompt pos]}``, attention from later queries, mean over heads and readout blocks; NaN for the last."""
    neurons: dict[str, Tensor] = field(default_factory=dict)
    """``{run: [prompt pos neuron]}``, activations of the super neurons."""

    def score(self, stage: str, edit: str, direction: str, control: str = "") -> pd.Series:
        """The row of :attr:`scores` for one experiment.

        Raises:
            KeyError: when there is none.
        """
        wanted = dict(zip(SCORE_KEYS, (stage, edit, direction, control), strict=True))
        rows = self.scores[(self.scores[SCORE_KEYS] == list(wanted.values())).all(axis=1)]
        if rows.empty:
            raise KeyError(f"no score for {wanted}")
        return rows.iloc[0]

    def to_json(self) -> dict[str, Any]:
        """The content of ``chain.json``."""
        return {
            "config": self.config,
            "provenance": self.provenance,
            "engine": self.engine,
            "formation": formation_to_json(self.formation),
            "runs": self.runs,
            "scores": _records(self.scores),
            "chain_matrix": _records(self.matrix),
            "checks": _records(self.checks),
            "tokens": self.tokens,
        }

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write ``chain.json``, ``scores.parquet``, ``effects.parquet``, ``attention.safetensors`` and
        ``tokens.safetensors`` (what views of single tokens show) into a folder, as a whole or not at all.

        Raises:
            InputError: when it exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            text = json.dumps(to_plain(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
            (folder / "chain.json").write_text(text, encoding="utf-8")
            self.scores.to_parquet(folder / "scores.parquet", index=False)
            self.effects.to_parquet(folder / "effects.parquet", index=False)
            _save_tensors(self.attention, folder / "attention.safetensors")
            of_tokens = {f"{name}/{run}": x for name in OF_TOKENS for run, x in getattr(self, name).items()}
            _save_tensors(of_tokens, folder / "tokens.safetensors")
        return Path(out)

    @classmethod
    def load(cls, folder: str | Path) -> ChainResult:
        """Read back what :meth:`save` wrote.

        Raises:
            InputError: when the folder does not hold a finished run.
        """
        folder = Path(folder)
        if not (folder / "chain.json").is_file():
            raise InputError(f"{folder} holds no chain.json: give the folder that a chain was saved in")
        try:
            data = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
            return cls(
                scores=_with_lists(pd.read_parquet(folder / "scores.parquet")),
                effects=_with_lists(pd.read_parquet(folder / "effects.parquet")),
                matrix=_frame(data["chain_matrix"]),
                checks=_frame(data["checks"]),
                formation=formation_from_json(data["formation"]),
                runs=data["runs"],
                config=data["config"],
                provenance=data["provenance"],
                engine=data["engine"],
                tokens=data["tokens"],
                attention=load_file(folder / "attention.safetensors"),
                **_of_tokens(folder / "tokens.safetensors"),
            )
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the run in {folder} is damaged ({reason}): run the chain again") from error


def formation_to_json(formation: Formation) -> dict[str, Any]:
    """A formation as plain lists and dictionaries."""
    return {**asdict(formation), "profile": formation.profile.to_dict("records")}


def formation_from_json(data: Mapping[str, Any]) -> Formation:
    """The inverse of :func:`formation_to_json`, also of what :func:`to_plain` made of it.

    Raises:
        LookupError, TypeError: something is missing.
    """
    return Formation(
        layer=data["layer"],
        sink_positions=tuple(data["sink_positions"]),
        super_neurons=tuple(_from_plain(SuperNeuron, item) for item in data["super_neurons"]),
        outlier_dims=tuple(_from_plain(OutlierDim, item) for item in data["outlier_dims"]),
        events=tuple(_from_plain(FormationEvent, item) for item in data["events"]),
        profile=_frame(data["profile"]),
    )


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    os.chmod(path, 0o644)  # safetensors makes it private


def _of_tokens(path: Path) -> dict[str, dict[str, Tensor]]:
    found = load_file(path) if path.is_file() else {}  # runs of earlier versions have none
    return {
        name: {key.partition("/")[2]: x for key, x in found.items() if key.partition("/")[0] == name}
        for name in OF_TOKENS
    }


def to_plain(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities become null, tuples lists, numpy scalars Python's own."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


_Item = TypeVar("_Item", SuperNeuron, OutlierDim, FormationEvent)


def _from_plain(kind: type[_Item], item: Mapping[str, Any]) -> _Item:
    """The inverse of :func:`to_plain`: a number that JSON could not hold is NaN again."""
    missing = {f.name: np.nan for f in fields(kind) if f.type == "float" and item[f.name] is None}
    return kind(**{**item, **missing})


def _frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(records)
    empty = frame.columns[frame.isna().all()]  # a column of nulls alone would hold objects
    return frame.astype(dict.fromkeys(empty, float))


def _with_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """Layers and units as the lists that they were: Parquet gives arrays."""
    for name in frame.columns.intersection(["layers", "units"]):
        lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in frame[name]]
        frame[name] = pd.Series(lists, index=frame.index, dtype=object)
    return frame


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [to_plain(record) for record in frame.to_dict("records")]


def effect(patched: np.ndarray, start: np.ndarray, end: np.ndarray | float, min_gap: float) -> np.ndarray:
    """``(patched - start) / (end - start)``; NaN where ``|end - start| < min_gap``. Arrays broadcast."""
    gap = np.asarray(end - start, dtype=float)
    safe = np.where(np.abs(gap) >= max(min_gap, np.finfo(float).tiny), gap, np.nan)
    return (patched - start) / safe


def summarise(effects: pd.DataFrame, keys: Sequence[str], seed: int) -> pd.DataFrame:
    """Mean effect with its interval over prompts, for every combination of ``keys``; draws are averaged first."""
    records = []
    for key, group in effects.groupby(list(keys), sort=False, dropna=False):
        per_prompt = group.groupby("prompt").effect.mean()
        low, high = bootstrap_interval(per_prompt.to_numpy(), seed)
        record = dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True))
        record |= {
            "effect": per_prompt.mean(),
            "ci_low": low,
            "ci_high": high,
            "n": int(per_prompt.notna().sum()),
            "n_excluded": int(per_prompt.isna().sum()),
        }
        records.append(record)
    return pd.DataFrame(records)
