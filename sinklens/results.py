"""Results: effects per prompt, aggregated last, saved atomically with all that is needed to trace them.

An effect is a ratio of differences, ``(M_patched - M_without) / (M_with - M_without)``, counted from the run that was
patched: 1 means that the patch did all that the sink pair does, 0 nothing. It is never clipped. A prompt in which the
pair itself moves the metric by less than ``min_gap`` cannot be divided by: it is excluded, and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from safetensors import SafetensorError
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
            os.chmod(folder / "attention.safetensors", 0o644)  # safetensors makes it private
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
            found = data["formation"]
            return cls(
                scores=_with_lists(pd.read_parquet(folder / "scores.parquet")),
                effects=_with_lists(pd.read_parquet(folder / "effects.parquet")),
                matrix=_frame(data["chain_matrix"]),
                checks=_frame(data["checks"]),
                formation=Formation(
                    layer=found["layer"],
                    sink_positions=tuple(found["sink_positions"]),
                    super_neurons=tuple(_from_plain(SuperNeuron, item) for item in found["super_neurons"]),
                    outlier_dims=tuple(_from_plain(OutlierDim, item) for item in found["outlier_dims"]),
                    events=tuple(_from_plain(FormationEvent, item) for item in found["events"]),
                    profile=_frame(found["profile"]),
                ),
                runs=data["runs"],
                config=data["config"],
                provenance=data["provenance"],
                engine=data["engine"],
                tokens=data["tokens"],
                attention=load_file(folder / "attention.safetensors"),
            )
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the run in {folder} is damaged ({reason}): run the chain again") from error


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


class atomic_folder:  # noqa: N801  (used as a context manager, like tempfile's)
    """A folder that is built under a temporary name beside ``out`` and renamed when all is written.

    After an exception nothing is left of it, parents that were made for it included, and an earlier run is as it was.

    Raises:
        InputError: when ``out`` exists and ``force`` is not set, or the place cannot be written.
    """

    def __init__(self, out: str | Path, *, force: bool) -> None:
        self.out, self.force = Path(out), force

    def __enter__(self) -> Path:
        check_out(self.out, force=self.force)
        self._place = self.out.resolve()  # a link is followed, so that it stays when what it points to is replaced
        self._made = [parent for parent in self._place.parents if not parent.exists()]
        self._scratch = None
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=".sinklens-", dir=self._place.parent))
            (self._scratch / "new").mkdir()
        except BaseException as error:
            self._clean_up()
            if isinstance(error, OSError):
                raise _cannot_write(self._place.parent, error) from error
            raise
        return self._scratch / "new"

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self._put_in_place()
        except OSError as failure:
            raise _cannot_write(self.out, failure) from failure
        finally:
            self._clean_up()
        if isinstance(error, OSError):  # a full disk, for instance
            raise _cannot_write(self.out, error) from error

    def _put_in_place(self) -> None:
        assert self._scratch is not None
        old = self._scratch / "old"
        try:
            if self.force and self._place.exists():
                os.replace(self._place, old)
            os.replace(self._scratch / "new", self._place)
        except BaseException:
            if old.exists() and not self._place.exists():
                os.replace(old, self._place)
            raise

    def _clean_up(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if not self._place.exists():
            for parent in self._made:  # the innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()


def check_out(out: Path, *, force: bool) -> None:
    """Make sure, before any work is done, that a result folder can be written; leaves no trace.

    Raises:
        InputError: when it exists and ``force`` is not set, is a file or not a run, or its parent cannot be written.
    """
    parent = out.parent
    try:
        if out.exists():
            if not out.is_dir():
                raise InputError(f"{out} is a file: give a folder for the results")
            if not force:
                raise InputError(f"{out} exists already: choose another --out, or replace it with --force")
            if any(out.iterdir()) and not (out / "chain.json").is_file():
                raise InputError(
                    f"{out} is not the folder of an earlier run, so --force will not replace it: choose another"
                )
        place = out.resolve()
        missing = [folder for folder in (place, *place.parents) if not folder.exists()]
        parent = missing[-1].parent if missing else place.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
        for folder in missing:
            (parent / folder.name).exists()  # raises where a name is too long, which a missing parent hides
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _cannot_write(parent, error) from error


def _cannot_write(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path} cannot be written ({reason}): choose another --out")


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
