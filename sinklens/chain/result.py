"""Results: effects per prompt, aggregated last, saved atomically with all that is needed to trace them.

An effect is a ratio of differences, ``(M_patched - M_without) / (M_with - M_without)``, counted from the run that was
patched: 1 means that the patch did all that the sink pair does, 0 nothing. It is never clipped. A prompt in which the
pair itself moves the metric by less than ``min_gap`` cannot be divided by: it is excluded, and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from sinklens.errors import InputError
from sinklens.formation import Formation, formation_from_json, formation_to_json
from sinklens.formation.result import frame_of
from sinklens.records.files import atomic_folder, write_json, write_tensors
from sinklens.records.plain import check_kinds, to_plain
from sinklens.records.printable import clip
from sinklens.records.ranges import spans
from sinklens.records.summaries import html, some, summary
from sinklens.records.text import change_text, effect_text, interval_text, number
from sinklens.stages.base import experiment_kind
from sinklens.statistics import drawn_interval

SCORE_KEYS = ["stage", "edit", "direction", "control"]
"""What one score is about."""
METRIC = "attention_received"
"""Name of what a chain measures of the sink, unless it is asked for something else."""
HALF = 0.5
"""An effect beyond it is nearer to all than to nothing."""
LOSS_CHANGE = "loss_change"
"""Column of what an edit does to the loss, where that was read."""
OF_LOSS = (LOSS_CHANGE, f"{LOSS_CHANGE}_low", f"{LOSS_CHANGE}_high")
"""The same with the ends of its interval, in a table of scores."""
_LONGEST = 60
"""Letters of a name in a notebook's table."""
OF_TOKENS = ("received", "neurons")
"""Fields of a result with a number for every token."""


def shares_text(rows: Any) -> str:
    """Share of the prompts with an effect beyond one half, by direction; runs of earlier versions do not know."""
    return " ".join(f"{share:.0%}" for share in rows.get("share", ()))


def strength_text(rows: Any) -> str:
    """`` (x 1.41)`` where the edit has a strength; runs of earlier versions do not know."""
    strength = float(rows.strength.iloc[0]) if "strength" in rows else math.nan
    return "" if math.isnan(strength) else f" (x {strength:.3g})"


def _row(rows: pd.DataFrame) -> dict[str, str]:
    """A row of the table that the command prints: an edit in every direction."""
    first = rows.iloc[0]
    cells = {
        "stage": clip(first.stage, _LONGEST),
        "edit": clip(first.edit, _LONGEST) + strength_text(rows),
        "layers": spans(first.layers, "-"),
    }
    for score in rows.to_dict("records"):
        interval = "" if pd.isna(score["ci_low"]) else f" {interval_text(score['ci_low'], score['ci_high'])}"
        effect = f"{effect_text(score['effect'])}{interval} ({number(score['predicted'])})"
        cells[str(score["direction"])] = effect if score["n"] else "no prompt left"
    if LOSS_CHANGE in rows:
        cells["loss, nats"] = " ".join(map(change_text, rows[LOSS_CHANGE]))
    if "share" in rows:
        cells["over ½"] = shares_text(rows)
    return {**cells, "n": str(rows.n.min())}


@dataclass(frozen=True, eq=False)
class ChainResult:
    """Scores, chain matrix, checks, formation and provenance of one chain."""

    scores: pd.DataFrame
    """One row per stage, edit, direction and control: effect, interval, median, share of prompts beyond one half, n,
    n_groups (of how many texts), n_excluded, predicted, strength (of an edit that has one, such as a factor on a
    deviation), layers, units, draws. Where the loss was read also loss_change with loss_change_low and
    loss_change_high, in nats per token: patched minus the run that was patched, over all prompts."""
    effects: pd.DataFrame
    """The same per prompt and draw, with the metric's values; where it was read, with the patched loss and its
    change."""
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

    def __repr__(self) -> str:
        stages = some(dict.fromkeys(self.scores["stage"])) if "stage" in self.scores else ""
        sink = f"{self.config.get('pair', '')} at {self.config.get('target', '')}"
        return summary(self, f"{self.metric}, {sink}", f"stages {stages}", f"block {self.formation.layer}")

    def _repr_html_(self) -> str:
        own: Any = self.scores[self.scores.control == ""]
        left = len(self.scores) - len(own)
        line = f"{self!r}; mean over prompts [95% interval] (predicted by the claim)"
        line += f"; {left} scores of controls are in .scores" if left else ""
        rows = pd.DataFrame([_row(rows) for _, rows in own.groupby(["stage", "edit"], sort=False)])
        if len(rows):
            rows.loc[rows.stage.duplicated(), "stage"] = ""  # once, as where the command prints it
        with pd.option_context("display.max_colwidth", None):
            return html(line) + rows.to_html(index=False, escape=True, border=0)

    @property
    def metric(self) -> str:
        """Name of what was measured of the sink."""
        return self.config.get("metric", METRIC)

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
            write_json(folder / "chain.json", self.to_json())
            self.scores.to_parquet(folder / "scores.parquet", index=False)
            self.effects.to_parquet(folder / "effects.parquet", index=False)
            write_tensors(folder / "attention.safetensors", self.attention)
            of_tokens = {f"{name}/{run}": x for name in OF_TOKENS for run, x in getattr(self, name).items()}
            write_tensors(folder / "tokens.safetensors", of_tokens)
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
            found = cls(
                scores=_with_lists(pd.read_parquet(folder / "scores.parquet")),
                effects=_with_lists(pd.read_parquet(folder / "effects.parquet")),
                matrix=frame_of(data["chain_matrix"]),
                checks=frame_of(data["checks"]),
                formation=formation_from_json(data["formation"]),
                runs=data["runs"],
                config=data["config"],
                provenance=data["provenance"],
                engine=data["engine"],
                tokens=data["tokens"],
                attention=load_file(folder / "attention.safetensors"),
                **_of_tokens(folder / "tokens.safetensors"),
            )
            _check(found)
            return found
        except Exception as error:  # JSON, Parquet and safetensors share no class, and a file may hold anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the run in {folder} is damaged ({reason}): run the chain again") from error


def _check(result: ChainResult) -> None:
    """Raises TypeError or LookupError where something that was read is not what it should be."""
    dicts = {name: (getattr(result, name), dict) for name in ("config", "provenance", "engine", "runs")}
    check_kinds({**dicts, "tokens": (result.tokens, list)})
    check_kinds({f"prompt {i} of tokens": (row, list) for i, row in enumerate(result.tokens)})
    check_kinds({f"token {i}": (token, str) for row in result.tokens for i, token in enumerate(row)})
    formation = result.formation
    check_kinds({"layer": (formation.layer, int)})
    check_kinds({f"sink position {i}": (p, int) for i, p in enumerate(formation.sink_positions)})
    for unit in (*formation.super_neurons, *formation.outlier_dims):
        check_kinds({"the index of a unit": (unit.index, int)})
    for run, readings in result.runs.items():
        check_kinds({f"runs[{run!r}]": (readings, dict)})
        check_kinds({f"runs[{run!r}][{name!r}]": (values, list) for name, values in readings.items()})
    missing = {*SCORE_KEYS, "effect"} - set(result.scores.columns)
    if missing:
        raise KeyError(f"the scores have no column {min(missing)}")


def _of_tokens(path: Path) -> dict[str, dict[str, Tensor]]:
    found = load_file(path) if path.is_file() else {}  # runs of earlier versions have none
    return {
        name: {key.partition("/")[2]: x for key, x in found.items() if key.partition("/")[0] == name}
        for name in OF_TOKENS
    }


def _with_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """Layers and units as the lists that they were: Parquet gives arrays."""
    for name in frame.columns.intersection(["layers", "units"]):
        lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in frame[name]]
        frame[name] = pd.Series(lists, index=frame.index, dtype=object)
    return frame


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [to_plain(record) for record in frame.to_dict("records")]


def is_transplant(table: pd.DataFrame) -> pd.Series:
    """Marks the rows (with ``edit`` and ``control``) that are of a stage's own transplant, not of a control."""
    return (table.edit.map(experiment_kind) == "transplant") & (table.control == "")


def summarise(
    effects: pd.DataFrame, keys: Sequence[str], seed: int, groups: Sequence[object] | None = None
) -> pd.DataFrame:
    """Mean effect with its interval over prompts, for every combination of ``keys``; draws are averaged first.

    What is drawn at random is drawn once for all prompts, so where there are several draws the interval resamples
    prompts and draws both (:func:`sinklens.statistics.drawn_interval`). ``groups`` names for each prompt the text that
    it is a passage of: whole texts are resampled then, and ``n_groups`` says how many there are.

    Beside it stand the median, and the share of prompts in which the effect is beyond one half: a mean of a half may be
    all of the effect in half of the prompts and nothing in the others.

    A change of the loss is summarised likewise, over all prompts: nothing is divided there.
    """
    records = []
    for key, group in effects.groupby(list(keys), sort=False, dropna=False):
        drawn = _by_draw(group, "effect")
        per_prompt = drawn.mean(axis=1)
        texts = None if groups is None else [groups[prompt] for prompt in drawn.index]
        low, high = drawn_interval(drawn.to_numpy(), seed, groups=texts)
        measured = per_prompt.dropna().index
        record = dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True))
        record |= {
            "effect": per_prompt.mean(),
            "ci_low": low,
            "ci_high": high,
            "median": per_prompt.median(),
            "share": (per_prompt.dropna() > HALF).mean(),
            "n": len(measured),
            "n_groups": len(measured if groups is None else {groups[prompt] for prompt in measured}),
            "n_excluded": int(per_prompt.isna().sum()),
        }
        if LOSS_CHANGE in group:
            changes = _by_draw(group, LOSS_CHANGE)
            ends = drawn_interval(changes.to_numpy(), seed, groups=texts)
            record |= dict(zip(OF_LOSS, (changes.mean(axis=1).mean(), *ends), strict=True))
        records.append(record)
    return pd.DataFrame(records)


def _by_draw(effects: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row for each prompt, one column for each draw."""
    if "draw" not in effects:
        return pd.DataFrame(effects.set_index("prompt")[column])
    return effects.pivot(index="prompt", columns="draw", values=column)
