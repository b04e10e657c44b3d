"""What folders hold that can be compared: trained models, and what was found in models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.analysis.base import AnalysisResult
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.lab.record import RECORD, WATCH, read_record
from sinklens.lab.settings import variant_text


@dataclass(frozen=True, eq=False)
class Run:
    """One run."""

    name: str
    """What it is called: the name of its folder."""
    arm: str
    """What it shares with runs of other seeds; its name, where it was not trained here."""
    seed: int | None
    """Seed of its training; None where it was not trained here."""
    results: list[ChainResult | AnalysisResult]
    """What was found in the model."""
    watched: pd.DataFrame | None = None
    """What was watched in training."""
    data: str = ""
    """What it was trained and watched on."""
    settings: dict[str, Any] | None = None
    """How it was trained."""
    tokens: int | None = None
    """Tokens that it was trained on, once training is over."""
    parameters: int | None = None
    """How many it has."""

    @classmethod
    def of_results(
        cls, name: str, results: ChainResult | AnalysisResult | Sequence[ChainResult | AnalysisResult]
    ) -> Run:
        """A run of results in memory."""
        found = [results] if isinstance(results, (ChainResult, AnalysisResult)) else list(results)
        return cls(name, name, None, found)

    def summary(self) -> dict[str, Any]:
        """What a file keeps of it."""
        models = sorted({str(result.provenance.get("model")) for result in self.results})
        return {"name": self.name, "arm": self.arm, "seed": self.seed, "models": models, "settings": self.settings}


def read_run(folder: Path) -> list[Run]:
    """The run in a folder; the runs in its folders, where it has none of its own.

    Raises:
        InputError: it holds none, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give folders of runs.")
    own = _run(folder)
    if own is not None:
        return [own]
    inside = [run for path in sorted(folder.iterdir()) if path.is_dir() for run in [_run(path)] if run is not None]
    if not inside:
        raise InputError(f"{folder} holds no trained model, no chain and no analysis: give the folder of a run.")
    return inside


def _run(folder: Path) -> Run | None:
    results = _results(folder)
    if not (folder / RECORD).is_file():
        return Run(folder.resolve().name, folder.resolve().name, None, results) if results else None
    try:
        record = read_record(folder)
        watched = pd.read_parquet(folder / WATCH) if (folder / WATCH).is_file() else None
        settings, data = dict(record["settings"]), json.dumps(record["data"], sort_keys=True)
        name, arm = folder.resolve().name, variant_text(str(settings["variant"]), dict(settings["options"]))
        finished = dict(record.get("finished", {}))
        tokens = None if "tokens" not in finished else int(finished["tokens"])
        return Run(
            name, arm, int(settings["seed"]), results, watched, data, settings, tokens, int(record["parameters"])
        )
    except Exception as error:  # JSON and Parquet share no class, and a file may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the training run in {folder} is damaged ({reason}): train it again.") from error


def _results(folder: Path) -> list[ChainResult | AnalysisResult]:
    """The chains and analyses in a folder, and in folders in it (as ``sinklens all`` leaves them), up to two deep."""
    found: list[ChainResult | AnalysisResult] = []
    for place in (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))):
        if (place / "chain.json").is_file():
            found.append(ChainResult.load(place))
        if (place / "summary.json").is_file():
            found.append(AnalysisResult.load(place))
    return found
