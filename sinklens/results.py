"""Results: effects per prompt, aggregated last, saved atomically with all that is needed to trace them.

An effect is a ratio of differences, ``(M_patched - M_without) / (M_with - M_without)``, counted from the run that was
patched: 1 means that the patch did all that the sink pair does, 0 nothing. It is never clipped. A prompt in which the
pair itself moves the metric by less than ``min_gap`` cannot be divided by: it is excluded, and counted.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from sinklens.errors import InputError
from sinklens.formation import Formation, FormationEvent, OutlierDim, SuperNeuron

SCORE_KEYS = ["stage", "edit", "direction", "control"]
"""What one score is about."""
N_RESAMPLES = 2000
"""Bootstrap resamples for every interval."""


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
    """Token strings of the prompts that have an attention view."""
    attention: dict[str, Tensor] = field(default_factory=dict)
    """``{run: [prompt head query key]}``, attention of the block after the formation block, for views."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``chain.json``."""
        formation = asdict(self.formation)
        formation["profile"] = self.formation.profile.to_dict("records")
        return {
            "config": self.config,
            "provenance": self.provenance,
            "engine": self.engine,
            "formation": formation,
            "runs": self.runs,
            "scores": _records(self.scores),
            "chain_matrix": _records(self.matrix),
            "checks": _records(self.checks),
            "tokens": self.tokens,
        }

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write ``chain.json``, ``scores.parquet``, ``effects.parquet`` and ``attention.safetensors`` into a folder.

        The folder appears as a whole or not at all.

        Raises:
            InputError: when it exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            text = json.dumps(to_plain(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
            (folder / "chain.json").write_text(text, encoding="utf-8")
            self.scores.to_parquet(folder / "scores.parquet", index=False)
            self.effects.to_parquet(folder / "effects.parquet", index=False)
            save_file({k: v.contiguous() for k, v in self.attention.items()}, folder / "attention.safetensors")
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
        data = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
        formation = data["formation"]
        return cls(
            scores=pd.read_parquet(folder / "scores.parquet"),
            effects=pd.read_parquet(folder / "effects.parquet"),
            matrix=pd.DataFrame(data["chain_matrix"]),
            checks=pd.DataFrame(data["checks"]),
            formation=Formation(
                layer=formation["layer"],
                sink_positions=tuple(formation["sink_positions"]),
                super_neurons=tuple(SuperNeuron(**item) for item in formation["super_neurons"]),
                outlier_dims=tuple(OutlierDim(**item) for item in formation["outlier_dims"]),
                events=tuple(FormationEvent(**item) for item in formation["events"]),
                profile=pd.DataFrame(formation["profile"]),
            ),
            runs=data["runs"],
            config=data["config"],
            provenance=data["provenance"],
            engine=data["engine"],
            tokens=data["tokens"],
            attention=load_file(folder / "attention.safetensors"),
        )


def to_plain(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities become null, tuples lists, numpy scalars Python's own."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [to_plain(record) for record in frame.to_dict("records")]


class atomic_folder:  # noqa: N801  (used as a context manager, like tempfile's)
    """A folder that is built under a temporary name beside ``out`` and renamed when all is written.

    Raises:
        InputError: when ``out`` exists and ``force`` is not set, or the place cannot be written.
    """

    def __init__(self, out: str | Path, *, force: bool) -> None:
        self.out, self.force = Path(out), force

    def __enter__(self) -> Path:
        check_out(self.out, force=self.force)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.resolve().parent))
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        os.chmod(self.temporary, 0o755)
        old = self.out.with_name(f".{self.out.name}-replaced-{os.getpid()}")
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.temporary, self.out)
        shutil.rmtree(old, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Make sure, before any work is done, that a result folder can be written.

    Raises:
        InputError: when it exists and ``force`` is not set, is a file or not a run, or its parent cannot be written.
    """
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out} is a file: give a folder for the results")
        if not force:
            raise InputError(f"{out} exists already: choose another --out, or replace it with --force")
        if any(out.iterdir()) and not (out / "chain.json").is_file():
            raise InputError(
                f"{out} is not the folder of an earlier run, so --force will not replace it: choose another"
            )
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{parent} cannot be written ({error.strerror}): choose another --out") from error


def effect(patched: np.ndarray, start: np.ndarray, end: np.ndarray | float, min_gap: float) -> np.ndarray:
    """``(patched - start) / (end - start)``; NaN where ``|end - start| < min_gap``. Arrays broadcast."""
    gap = np.asarray(end - start, dtype=float)
    safe = np.where(np.abs(gap) >= max(min_gap, np.finfo(float).tiny), gap, np.nan)
    return (patched - start) / safe


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (NaN with fewer than two values)."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=N_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    names = ("sinklens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that sinklens runs from, with ``-dirty`` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(top) != here.parent:
            return None  # installed inside some other project's checkout
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
