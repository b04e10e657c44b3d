"""Heatmaps of a sweep: layer by position (or unit), mean over prompts, one panel for everything else."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.errors import InputError
from sinklens.records.text import pretty
from sinklens.sites import SITES, HookSite
from sinklens.stages import STAGES, Stage
from sinklens.sweeps.result import TENSOR_AXES, SweepResult
from sinklens.sweeps.tensor import LabelledTensor
from sinklens.viz.charts import need_plotly, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_PANELS = 24
"""More than these nobody can read."""
UNITS = {"head": "head", "kv_head": "key/value head", "d_mlp": "neuron", "d_model": "dimension"}
"""What the units of a site are called."""
SIGNED = ("effect", "change")
"""Values of either sign, whose colours turn at 0."""


def sweep_heatmap(
    source: SweepResult | LabelledTensor,
    *,
    value: str | None = None,
    x: str | None = None,
    y: str | None = None,
    readout: str | None = None,
    columns: int = 2,
) -> Figure:
    """A heatmap of a sweep, mean over prompts; axes that are not drawn make one panel for each of their places.

    Args:
        source: a sweep, or a tensor cut from one (``result.to_tensor().select(stage="resid_pre")``).
        value: what the cells are (see :meth:`SweepResult.to_tensor`); ``effect`` by default.
        x: axis across: ``position``, ``unit`` or ``stage`` by default, the first that has several places.
        y: axis downwards: ``layer`` by default.
        readout: which, when the sweep has several.
        columns: panels beside one another.

    Raises:
        InputError: plotly is not installed, an unknown axis, or too many panels.
    """
    quantity: Any = value or "effect"
    tensor = source.to_tensor(readout, quantity) if isinstance(source, SweepResult) else source
    if "prompt" in tensor.axes and "prompt" not in (x, y):
        tensor = tensor.mean("prompt")
    y, x = _drawn(tensor, x, y)
    drawn = tensor = _present(tensor)
    figure = _grid(_panels(tensor, x, y), x, y, columns)
    figure.update_xaxes(type="category", showgrid=False, title={"text": _axis_title(x, tensor), "standoff": 4})
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", automargin=True)
    figure.update_yaxes(title_text=_axis_title(y, tensor), col=1)
    figure.update_annotations(font_size=13)
    title = html.escape(_title(drawn, readout_of(source, readout), x, y), quote=False)
    figure.update_layout(coloraxis=_colours(tensor.name), title={"text": title, "font": {"size": 14}, "x": 0.01})
    figure.update_layout(margin={"t": 80})  # room for it above the panels' own titles
    return figure


def readout_of(source: SweepResult | LabelledTensor, readout: str | None) -> str:
    """What was measured, where the source knows."""
    return source.readout(readout) if isinstance(source, SweepResult) else readout or str(source.at.get("readout", ""))


def _title(tensor: LabelledTensor, readout: str, x: str, y: str) -> str:
    """What all panels share: readout and quantity, the places that were cut out or are alone, and means."""
    alone = [axis for axis in tensor.axes if axis not in (x, y) and len(tensor.coords[axis]) == 1]
    shared = {axis: place for axis, place in tensor.at.items() if axis != "readout"}
    shared |= {axis: tensor.coords[axis][0] for axis in alone}
    ordered = sorted(shared, key=lambda axis: TENSOR_AXES.index(axis) if axis in TENSOR_AXES else len(TENSOR_AXES))
    places = [_place(axis, shared[axis]) for axis in ordered if shared[axis] is not None]
    means = [_mean(axis, n) for axis, n in tensor.over.items()]
    measured = f"{pretty(readout)}: {tensor.name}" if readout else tensor.name
    return ", ".join((measured, *places, *means))


def _mean(axis: str, n: int) -> str:
    name = _axis_title(axis)
    return f"1 {name}" if n == 1 else f"mean over {n} {name}s"


def _grid(panels: dict[str, LabelledTensor], x: str, y: str, columns: int) -> Figure:
    """The panels beside and below one another, each under what tells it apart."""
    go, subplots = need_plotly()
    n_columns = min(columns, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    n_cells = len(next(iter(panels.values())).coords[y])
    height = 26 * min(32, max(6, n_cells)) + 64
    figure = subplots.make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=[html.escape(title, quote=False) for title in panels] if len(panels) > 1 else None,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.2, 64 / (n_rows * height)),
    )
    for number, panel in enumerate(panels.values()):
        row, column = divmod(number, n_columns)
        trace = go.Heatmap(
            z=_cells(panel, x, y),
            x=_labels(panel.coords[x]),
            y=_labels(panel.coords[y]),
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate=f"{pretty(y)} %{{y}}, {pretty(x)} %{{x}}: %{{z:.4g}}<extra></extra>",
        )
        figure.add_trace(trace, row=row + 1, col=column + 1)
    return styled(figure, n_rows * height + 60)


def _drawn(tensor: LabelledTensor, x: str | None, y: str | None) -> tuple[str, str]:
    for axis in (x, y):
        if axis is not None and axis not in tensor.axes:
            raise InputError(f"there is no axis {axis!r}: the axes are {', '.join(tensor.axes)}")
    several = [axis for axis in ("layer", "position", "unit", "stage", *tensor.axes) if axis in tensor.axes]
    several = [*dict.fromkeys(sorted(several, key=lambda axis: len(tensor.coords[axis]) == 1))]  # stable
    y = y or next((axis for axis in several if axis != x), None)
    x = x or next((axis for axis in several if axis != y), None)
    if x is None or y is None or x == y:
        raise InputError(f"a heatmap needs two different axes, and there are {', '.join(tensor.axes)}")
    return y, x


def _present(tensor: LabelledTensor) -> LabelledTensor:
    """Without the units that none of the drawn stages has."""
    if "unit" not in tensor.axes:
        return tensor
    dim = tensor.axes.index("unit")
    there = tensor.values.isnan().logical_not().movedim(dim, 0).flatten(1).any(1)
    units = tuple(unit for unit, some in zip(tensor.coords["unit"], there.tolist(), strict=True) if some)
    values = tensor.values.index_select(dim, there.nonzero().flatten())
    return replace(tensor, values=values, coords={**tensor.coords, "unit": units})


def _panels(tensor: LabelledTensor, x: str, y: str) -> dict[str, LabelledTensor]:
    """The places of all other axes, by what tells them apart."""
    others = [axis for axis in tensor.axes if axis not in (x, y)]
    several = [axis for axis in others if len(tensor.coords[axis]) > 1]
    panels = {}
    for place in product(*(tensor.coords[axis] for axis in others)):
        where = dict(zip(others, place, strict=True))
        panel = tensor.select(**where)
        if panel.values.isnan().all():
            continue  # this stage has no such unit, for instance
        panels[", ".join(_place(axis, where[axis]) for axis in several)] = panel
        if len(panels) > MOST_PANELS:
            raise InputError(
                f"that would be more than {MOST_PANELS} panels: take result.to_tensor() and select or take the mean of "
                f"some of {', '.join(several)}"
            )
    if not panels:
        raise InputError("there is no value to draw: every cell is missing or excluded")
    return panels


def _place(axis: str, place: object) -> str:
    if axis in ("stage", "edit", "direction"):
        return pretty(place)
    return f"{_axis_title(axis)} {'all' if place is None else place}"


def _cells(panel: LabelledTensor, x: str, y: str) -> list[list[float | None]]:
    values = panel.values if panel.axes == (y, x) else panel.values.T
    return [[None if np.isnan(cell) else cell for cell in row] for row in values.tolist()]


def _labels(coords: tuple[Any, ...]) -> list[str]:
    return ["all" if item is None else html.escape(pretty(item), quote=False) for item in coords]


def _axis_title(axis: str, tensor: LabelledTensor | None = None) -> str:
    """What an axis is called; units by what they are, where all stages have the same kind."""
    if axis != "unit" or tensor is None:
        return {"layer": "block"}.get(axis, pretty(axis))
    sites = [place.site if isinstance(place, Stage) else place for place in map(_known, tensor.coords.get("stage", ()))]
    names = {None if site is None else site.unit_name for site in sites}
    return UNITS.get(names.pop() or "", "unit") if len(names) == 1 else "unit"


def _known(name: str) -> Stage | HookSite | None:
    return {**SITES, **STAGES}.get(name)


def _colours(name: str) -> dict[str, Any]:
    common = {"colorbar": {"title": {"text": name}, "thickness": 12, "outlinewidth": 0}}
    return common | ({"colorscale": "RdBu", "cmid": 0} if name in SIGNED else {"colorscale": "Blues"})
