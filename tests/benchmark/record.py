"""What was measured: a tidy table, a JSON with all that is needed to trace it, the printed table, and the figure.

Files are written anew after every case, so that a benchmark that is cut short leaves what it has.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from rich.table import Table

from sinklens.records.files import replaced, write_text
from sinklens.records.plain import to_plain
from sinklens.records.provenance import git_commit, versions
from sinklens.records.text import bytes_text, number
from sinklens.viz.charts import COLOURS, INK, need_plotly
from tests.benchmark.cases import Case
from tests.benchmark.flops import needed_flops
from tests.benchmark.measure import Timing, version
from tests.benchmark.peers import Peer
from tests.benchmark.shapes import Models

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLUMNS = (
    "model",
    "device",
    "dtype",
    "axis",
    "value",
    "peer",
    "n_patches",
    "n_prompts",
    "length",
    "n_blocks",
    "readout",
    "rows",
    "patches_timed",
    "repeats",
    "ms_median",
    "ms_min",
    "ms_q25",
    "ms_q75",
    "ms_max",
    "speedup",
    "gflop_needed",
    "tflop_per_s",
    "share_of_ceiling",
    "peak_bytes",
    "difference",
)
"""Columns of the table. Times are milliseconds a patch; ``speedup`` is over ``transformer_lens`` in the same case."""

TITLES = {"patches": "patches in the sweep", "length": "tokens in a prompt", "blocks": "patched blocks"}


@dataclass(eq=False)
class Record:
    """All that a run of the benchmark found."""

    models: Models
    """What it ran on."""
    ceiling: float
    """FLOP/s of a large matrix product, measured in the same process."""
    settings: dict[str, Any]
    """Options and command line."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the table."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Peers that were not timed, and why."""
    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Version and use of each peer."""

    def know(self, peers: Sequence[Peer]) -> None:
        """Note the peers' versions."""
        for peer in peers:
            self.peers[peer.name] = {"package": peer.package, "version": version(peer), "use": peer.note}

    def add(self, case: Case, timings: Sequence[Timing]) -> pd.DataFrame:
        """Take up a case; gives its rows."""
        base = next((np.median(t.milliseconds) for t in timings if t.peer == "transformer_lens"), np.nan)
        new = [self._row(case, timing, float(base)) for timing in timings]
        self.rows += new
        return pd.DataFrame(new, columns=COLUMNS)  # pyright: ignore[reportArgumentType]

    def _row(self, case: Case, timing: Timing, base: float) -> dict[str, Any]:
        low, q25, middle, q75, high = np.quantile(timing.milliseconds, (0, 0.25, 0.5, 0.75, 1)).tolist()
        work, flops = case.work, needed_flops(self.models.sizes, case.work)
        speed = flops / (middle / 1000)
        values = (
            self.models.name,
            self.device,
            self.dtype,
            case.axis,
            case.value,
            timing.peer,
            work.n_patches,
            work.n_prompts,
            work.length,
            case.n_blocks,
            max(work.readouts),
            timing.rows,
            timing.patches,
            len(timing.seconds),
            middle,
            low,
            q25,
            q75,
            high,
            base / middle,
            flops / 1e9,
            speed / 1e12,
            speed / self.ceiling,
            timing.peak_bytes,
            timing.error,
        )
        return dict(zip(COLUMNS, values, strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """Everything measured, one peer in one case a row."""
        return pd.DataFrame(self.rows, columns=COLUMNS)  # pyright: ignore[reportArgumentType]

    @property
    def device(self) -> str:
        """The device's name."""
        if self.models.device.type == "cuda":
            return torch.cuda.get_device_name(self.models.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    @property
    def dtype(self) -> str:
        """The format of the weights."""
        return str(self.models.dtype).removeprefix("torch.")

    def summary(self) -> dict[str, Any]:
        """The content of ``benchmark.json``."""
        return {
            "model": self.models.name,
            "weights": self.models.weights,
            "sizes": vars(self.models.sizes),
            "device": self.device,
            "dtype": self.dtype,
            "ceiling_tflop_per_s": self.ceiling / 1e12,
            "peers": self.peers,
            "left_out": self.left_out,
            "versions": versions(),
            "git_commit": git_commit(),
            "settings": self.settings,
            "cases": self.rows,
        }

    def write(self, out: Path) -> None:
        """Write ``table.parquet`` and ``benchmark.json``, each as a whole."""
        write_text(out / "benchmark.json", json.dumps(to_plain(self.summary()), indent=1, allow_nan=False))
        with replaced(out / "table.parquet") as temporary:
            self.table.to_parquet(temporary, index=False)

    def write_figure(self, out: Path) -> None:
        """Write ``figure.html``, which needs nothing from the network."""
        title = f"{self.models.name}, {self.dtype}, {self.device}: time for a patch, median and range"
        write_text(out / "figure.html", draw(self.table, title).to_html(include_plotlyjs=True, full_html=True))


def printed(rows: pd.DataFrame, case: Case) -> Table:
    """The rows of one case, for a terminal."""
    work = case.work
    title = (
        f"{case.axis} {case.value}: {work.n_patches} patches on {work.n_prompts} prompt(s) of {work.length} tokens, "
        f"{case.n_blocks} blocks, readout block {max(work.readouts)}"
    )
    columns = ("peer", "rows", "ms a patch", "range", "over TL", "TFLOP/s", "of ceiling", "peak", "timed")
    table = Table(*columns, title=title)
    for name in table.columns[1:]:
        name.justify = "right"
    for row in rows.to_dict("records"):
        span = f"{number(row['ms_min'])} to {number(row['ms_max'])}"
        table.add_row(
            row["peer"],
            str(row["rows"] or "–"),
            number(row["ms_median"]),
            span,
            f"{number(row['speedup'])}x",
            number(row["tflop_per_s"]),
            f"{100 * row['share_of_ceiling']:.1f}%",
            bytes_text(None if np.isnan(row["peak_bytes"]) else row["peak_bytes"]),
            str(row["patches_timed"]),
        )
    return table


def draw(table: pd.DataFrame, title: str, titles: Mapping[str, str] = TITLES) -> Figure:
    """Milliseconds a patch against the number of patches, of tokens and of blocks; all axes are logarithmic.

    The dashed line is the time that the matrix products alone would take at the device's measured ceiling.
    """
    _, subplots = need_plotly()
    axes = [axis for axis in titles if (table.axis == axis).any()] or ["patches"]
    figure = subplots.make_subplots(rows=1, cols=len(axes), shared_yaxes=True, horizontal_spacing=0.04)
    for column, axis in enumerate(axes, 1):
        mine = table.query("axis == @axis")
        for trace in _traces(mine, list(dict.fromkeys(table.peer)), show_legend=column == 1):
            figure.add_trace(trace, row=1, col=column)
        ticks = sorted(set(mine.value.tolist()))
        figure.update_xaxes(type="log", title=titles[axis], tickvals=ticks, row=1, col=column)
    figure.update_yaxes(type="log", dtick="D2", exponentformat="none")
    figure.update_yaxes(title="milliseconds a patch", row=1, col=1)
    figure.update_layout(title=title, template="plotly_white", height=480, legend={"title": None})
    return figure


def _traces(table: pd.DataFrame, names: Sequence[str], show_legend: bool) -> list[Any]:
    go, _ = need_plotly()
    traces = []
    for i, name in enumerate(names):
        mine = table.query("peer == @name").sort_values("value")
        middle = mine.ms_median
        traces.append(
            go.Scatter(
                x=mine.value,
                y=middle,
                name=name,
                legendgroup=name,
                showlegend=show_legend,
                mode="lines+markers",
                line={"color": COLOURS[i % len(COLOURS)]},
                marker={"symbol": i, "size": 8},
                error_y={"type": "data", "array": mine.ms_max - middle, "arrayminus": middle - mine.ms_min},
                customdata=mine[["speedup", "share_of_ceiling", "n_prompts"]],
                hovertemplate="%{y:.3g} ms a patch on %{customdata[2]} prompt(s), %{customdata[0]:.3g} times as fast "
                "as transformer_lens, %{customdata[1]:.1%} of the device's ceiling",
            )
        )
    cases = table.drop_duplicates("value").sort_values("value")
    least = cases.ms_median * cases.share_of_ceiling
    dashes = {"color": INK, "dash": "dash"}
    label = "matrix products at the device's ceiling"
    return [
        *traces,
        go.Scatter(
            x=cases.value, y=least, name=label, legendgroup=label, showlegend=show_legend, mode="lines", line=dashes
        ),
    ]
