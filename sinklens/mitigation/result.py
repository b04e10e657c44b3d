"""What mitigations cost and what they leave of the sink: values by prompt, and the table made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sinklens.errors import InputError
from sinklens.interventions.harm import HARM, QUANTITIES
from sinklens.records.files import atomic_folder, write_json
from sinklens.records.plain import check_kinds
from sinklens.records.summaries import html, summary
from sinklens.statistics import Estimate, mean_estimate

FILE = "mitigation.json"
UNTOUCHED = "untouched"
"""What the model without hooks is called in the table."""


@dataclass(frozen=True)
class Row:
    """A mitigation that was run."""

    name: str
    """The name that it is asked for by."""
    title: str
    """What it does."""
    source: str
    """Where it was published."""
    said: str
    """What was fitted."""
    control: str
    """What its control is."""


@dataclass(frozen=True)
class Said:
    """What a model says after a prompt under a mitigation."""

    mitigation: str
    """Its name; ``untouched`` for the model as it is."""
    prompt: int
    """Which of the prompts."""
    text: str
    """The prompt's tokens that it goes on from."""
    continuation: str
    """The tokens that follow."""


@dataclass(frozen=True, eq=False)
class MitigationResult:
    """Harm, sink, outliers and quantisation under every mitigation and its control."""

    rows: tuple[Row, ...]
    """What was run."""
    values: pd.DataFrame
    """Tidy: ``mitigation`` (``untouched`` for the model as it is), ``control``, ``prompt``, ``quantity``, ``value``."""
    said: tuple[Said, ...]
    """What the model says under each."""
    left_out: dict[str, str]
    """Mitigations that cannot be done to this model, and why."""
    groups: tuple[str, ...] | None
    """For each prompt the text that it is of; None where each is a text of its own."""
    config: dict[str, Any]
    """What was asked for; ``command`` when it was made on the command line."""
    provenance: dict[str, Any]
    """Versions, git commit, device, dtype, model id and digests."""
    seconds: float
    """Wall-clock time."""

    title = "Mitigations"
    paper = ""

    def __repr__(self) -> str:
        losses = ", ".join(f"{row.name} {self.change(row.name, 'loss').value:+.3g}" for row in self.rows)
        return summary(self, f"{len(self.rows)} mitigations", f"change of the loss: {losses}")

    def _repr_html_(self) -> str:
        return html(repr(self), self.table)

    def of(self, name: str, quantity: str, *, control: bool = False) -> np.ndarray:
        """A quantity under a mitigation, by prompt; empty where it was not measured."""
        table: Any = self.values
        mine = (table["mitigation"] == name) & (table["control"] == control) & (table["quantity"] == quantity)
        return table[mine].sort_values("prompt")["value"].to_numpy(float)

    def estimate(self, name: str, quantity: str, *, control: bool = False) -> Estimate:
        """The mean over prompts, with its interval; NaN where it was not measured."""
        return self._mean(self.of(name, quantity, control=control))

    def change(self, name: str, quantity: str, *, control: bool = False) -> Estimate:
        """By how much a mitigation raises a quantity, each prompt compared with itself."""
        values = self.of(name, quantity, control=control)
        return self._mean(values - self.of(UNTOUCHED, quantity) if len(values) else values)

    def _mean(self, values: np.ndarray) -> Estimate:
        return mean_estimate(values, self.config["seed"], self.groups) if len(values) else Estimate(np.nan, n=0)

    @property
    def table(self) -> pd.DataFrame:
        """One row a mitigation, the untouched model first.

        ``n`` prompts with finite logits; every quantity; the change of the loss, KL and agreement with their intervals;
        and the same three and the first token's share of its control.
        """
        rows = []
        for name in (UNTOUCHED, *(row.name for row in self.rows)):
            row: dict[str, Any] = {"mitigation": name, "n": self.estimate(name, "loss").n}
            row |= _with_interval("loss_change", self.change(name, "loss"))
            for quantity in QUANTITIES:
                found = self.estimate(name, quantity)
                row |= _with_interval(quantity, found) if quantity in HARM else {quantity: found.value}
            row |= _with_interval("control_loss_change", self.change(name, "loss", control=True))
            row |= _with_interval("control_kl", self.estimate(name, "kl", control=True))
            row |= {f"control_{q}": self.estimate(name, q, control=True).value for q in ("top1", "first_share")}
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """The content of ``mitigation.json``."""
        names = ("left_out", "config", "provenance", "seconds")
        return {
            "rows": [asdict(row) for row in self.rows],
            "said": [asdict(said) for said in self.said],
            "groups": None if self.groups is None else list(self.groups),
            "table": self.table.to_dict("records"),
            **{name: getattr(self, name) for name in names},
        }

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write ``mitigation.json``, ``table.parquet`` and ``values.parquet`` into a folder, as a whole or not at all.

        Raises:
            InputError: it exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            write_json(folder / FILE, self.summary())
            self.table.to_parquet(folder / "table.parquet", index=False)
            self.values.to_parquet(folder / "values.parquet", index=False)
        return Path(out)

    @classmethod
    def load(cls, folder: str | Path) -> MitigationResult:
        """Read back what :meth:`save` wrote.

        Raises:
            InputError: the folder does not hold a finished run.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise InputError(f"{folder} holds no {FILE}: give the folder that mitigations were saved in")
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            check_kinds({name: (data[name], dict) for name in ("left_out", "config", "provenance")})
            check_kinds({name: (data[name], list) for name in ("rows", "said")})
            check_kinds({"seconds": (data["seconds"], (int, float)), "seed": (data["config"]["seed"], int)})
            rows, said = tuple(Row(**row) for row in data["rows"]), tuple(Said(**one) for one in data["said"])
            check_kinds({f"text {n}": (text, str) for n, text in enumerate(_texts(rows, said))})
            values = pd.read_parquet(folder / "values.parquet")
            values[["mitigation", "control", "prompt", "quantity", "value"]]  # noqa: B018  (all are there)
            groups = None if data["groups"] is None else tuple(map(str, data["groups"]))
            rest = {name: data[name] for name in ("left_out", "config", "provenance", "seconds")}
            return cls(rows, values, said, groups=groups, **rest)
        except Exception as error:  # JSON and Parquet share no class, and a file may hold anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the mitigations in {folder} are damaged ({reason}): run them again") from error


def _texts(rows: tuple[Row, ...], said: tuple[Said, ...]) -> list[Any]:
    return [value for one in (*rows, *said) for name, value in asdict(one).items() if name != "prompt"]


def _with_interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
