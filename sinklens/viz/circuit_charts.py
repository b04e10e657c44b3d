"""What was measured of a circuit: contributions to the super neurons, pruning, tests, interactions of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinklens.circuits import Circuit
from sinklens.errors import InputError
from sinklens.viz.charts import bars, heatmap, line, mark
from sinklens.viz.circuit import check_circuit

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def contributions_figure(circuit: Circuit, *, run: str = "difference", most: int = 20) -> Figure:
    """What senders add to the super neurons' inputs in one run: the ``most`` that add most to any of them.

    Raises:
        InputError: plotly is not installed, or there is no such run.
    """
    check_circuit(circuit)
    rows: Any = circuit.contributions[circuit.contributions.run == run]
    if rows.empty:
        there = ", ".join(dict.fromkeys(map(str, circuit.contributions.run))) or "none"
        raise InputError(f"no contributions of a run {run!r}: this circuit has {there}")
    size = rows.assign(size=rows.value.abs()).groupby("sender", sort=False)["size"].max()
    chosen = size.sort_values(ascending=False, kind="stable").index[:most]
    rows = rows[rows.sender.isin(chosen)]
    rows = rows.assign(sender=pd.Categorical(rows.sender, chosen))
    titles = {"sender": "", "value": "adds to the input"}
    return bars(
        rows.sort_values("sender"), "sender", "value", series="branch", low="ci_low", high="ci_high", titles=titles
    )


def pruning_figure(circuit: Circuit) -> Figure:
    """The share of the sink that the best so many edges keep; dashed: how many were kept.

    Raises:
        InputError: plotly is not installed, or nothing was pruned.
    """
    check_circuit(circuit)
    if circuit.pruning.empty:
        raise InputError("this circuit has no record of its pruning")
    titles = {"n_edges": "edges", "share": "share of the sink"}
    drawn: Any = circuit.pruning.sort_values("n_edges")
    figure = line(drawn[drawn.n_edges > 0], "n_edges", "share", titles=titles, log_x=True)
    return mark(figure, x=len(circuit.kept))


def tests_figure(circuit: Circuit) -> Figure:
    """How much of the sink is left: with the circuit alone, with all but it, with random edges, by each ablation.

    Raises:
        InputError: plotly is not installed, or nothing was tested.
    """
    check_circuit(circuit)
    if circuit.tests.empty:
        raise InputError("this circuit was not tested")
    titles = {"what": "edges that are intact", "effect": "share of the sink", "ablation": "the rest"}
    return bars(circuit.tests, "what", "effect", series="ablation", low="ci_low", high="ci_high", titles=titles)


def interactions_figure(circuit: Circuit, *, direction: str | None = None) -> Figure:
    """Interactions of pairs of nodes as a heatmap: the effect of both less the sum of each; below 0 they stand in for
    one another, above 0 both are needed.

    Raises:
        InputError: plotly is not installed, or there are no pairs of that direction.
    """
    check_circuit(circuit)
    there = list(dict.fromkeys(map(str, circuit.interactions.direction)))
    chosen = direction or next(iter(there), None)
    if chosen not in there:
        raise InputError(f"no interactions of direction {chosen!r}: this circuit has {', '.join(there) or 'none'}")
    rows: Any = circuit.interactions[circuit.interactions.direction == chosen]
    names = list(dict.fromkeys([*rows.a, *rows.b]))
    wide = pd.DataFrame(np.nan, index=names, columns=names)
    for row in rows.itertuples():
        wide.loc[row.a, row.b] = wide.loc[row.b, row.a] = row.interaction
    return heatmap(wide, value=f"interaction, {chosen}", x="node", y="node", centre=0)
