"""The chain as a diagram: a box for every stage, arrows as strong as one stage's transplant moves what comes next.

An arrow from a stage to the next is the chain matrix's entry of that edit and that readout; one to the bar is what the
same transplant does to attention received by the sink. Widths follow the size of the effect and stop growing at 2; the
number beside an arrow is the effect as it is, also below 0 (a dashed arrow) and above 1.

The diagram is text in boxes: ``templates/diagram.html.j2`` says what there is and ``diagram.css`` how it lies, beside
one another where there is room for all boxes, and below one another where there is not. Colours are of middle lightness
and text takes the colour of its surroundings, so that it can be read on a light ground and on a dark one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sinklens.chain.result import ChainResult
from sinklens.records.printable import templates
from sinklens.records.ranges import spans
from sinklens.records.text import effect_text, heading, number, pretty
from sinklens.viz.chain import check_chain

Effects = Mapping[str, float]
"""Effect by direction."""
DIRECTIONS = ("denoise", "noise")


class Picture(str):
    """A piece of HTML, which notebooks and templates show as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} letters of HTML>"

    def _repr_html_(self) -> str:
        return str(self)

    def __html__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Step:
    """One stage, as it is drawn."""

    name: str
    """Its number and name."""
    blocks: str
    """Where it acts."""
    edits: Sequence[tuple[str, Effects]]
    """Its transplant and its mechanism edits."""
    onward: Effects
    """What its transplant does to the next stage's readout; empty for the last."""
    sink: Effects
    """What its transplant does to attention received."""


def steps(result: ChainResult) -> list[Step]:
    """The stages in the chain's order, with the numbers that are drawn."""
    check_chain(result)
    scores = result.scores.loc[result.scores.control == ""]
    stages = list(dict.fromkeys(scores.stage))
    drawn = []
    for index, (stage, following) in enumerate(zip(stages, [*stages[1:], None], strict=True), start=1):
        rows = scores.loc[scores.stage == stage]
        layers = [int(layer) for layer in rows.iloc[0].layers]
        edits = [(pretty(edit), _effects(group)) for edit, group in rows.groupby("edit", sort=False)]
        onward = {} if following is None else _moved(result, stage, following)
        blocks = f"block{'s' if len(layers) > 1 else ''} {spans(layers)}"
        drawn.append(Step(f"{index} {heading(stage)}", blocks, edits, onward, _moved(result, stage, "sink")))
    return drawn


def _effects(rows: pd.DataFrame) -> Effects:
    return {str(d): float(e) for d, e in zip(rows.direction, rows.effect, strict=True) if d in DIRECTIONS}


def _moved(result: ChainResult, stage: str, readout: str) -> Effects:
    matrix = result.matrix
    return {} if matrix.empty else _effects(matrix.loc[(matrix.stage == stage) & (matrix.readout == readout)])


def chain_diagram(result: ChainResult, *, vertical: bool = False) -> Picture:
    """The chain as a diagram in HTML: boxes with each stage's effects, arrows weighted by the chain matrix.

    Args:
        result: a chain's result.
        vertical: boxes below one another, also where there is room to put them beside one another.
    """
    environment = templates("sinklens.viz")
    environment.filters.update(effect=effect_text, arrow=arrow_classes, width=arrow_width)
    return Picture(
        environment.get_template("diagram.html.j2").render(
            steps=steps(result), received=_received(result), vertical=vertical
        )
    )


def _received(result: ChainResult) -> str:
    means = [(run, float(np.mean(values["sink"]))) for run, values in result.runs.items() if "sink" in values]
    return f"{pretty(result.metric)}: " + ", ".join(f"{number(mean)} {pretty(run)}" for run, mean in means)


def arrow_width(effect: float) -> str:
    """Width of an arrow, pixels."""
    return f"{max(1.5, 5 * min(abs(effect), 2.0)):.3g}px"


def arrow_classes(effect: float) -> str:
    """An arrow's classes: what is below 0, or next to nothing, is set apart."""
    return "arrow" + " dashed" * (effect < 0) + " faint" * (abs(effect) < 0.05)
