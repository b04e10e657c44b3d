"""The chain as a diagram: a box for every stage, arrows as strong as one stage's transplant moves what comes next.

An arrow from a stage to the next is the chain matrix's entry of that edit and that readout; one to the bar is what the
same transplant does to attention received by the sink. Widths follow the size of the effect and stop growing at 2; the
number beside an arrow is the effect as it is, also below 0 (a dashed arrow) and above 1. Colours are of middle
lightness and text takes the colour of its surroundings, so that it can be read on a light ground and on a dark one.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.chain.result import ChainResult
from sinklens.records.printable import clipped, printable, wrapped
from sinklens.records.ranges import spans
from sinklens.records.text import effect_text, heading, number, pretty

Effects = Mapping[str, float]
"""Effect by direction."""
COLOURS = {"denoise": "#2f7fbc", "noise": "#d9661f"}
ROW = 15
"""Height of a line of text, pixels."""
MOST_EDITS = 4


class Svg(str):
    """A picture as text, which notebooks and templates show as it is."""

    __slots__ = ()

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
    scores = result.scores.loc[result.scores.control == ""]
    names = list(dict.fromkeys(scores.stage))
    found: list[Step] = []
    for index, (stage, following) in enumerate(zip(names, [*names[1:], None], strict=True), start=1):
        rows = scores.loc[scores.stage == stage]
        layers = [int(layer) for layer in rows.iloc[0].layers]
        edits = [(pretty(edit), _effects(group)) for edit, group in rows.groupby("edit", sort=False)]
        onward = {} if following is None else _moved(result, stage, following)
        blocks = f"block{'s' if len(layers) > 1 else ''} {spans(layers)}"
        found.append(Step(f"{index} {heading(stage)}", blocks, edits, onward, _moved(result, stage, "sink")))
    return found


def _effects(rows) -> Effects:  # noqa: ANN001  (a data frame)
    return {str(d): float(e) for d, e in zip(rows.direction, rows.effect, strict=True) if d in COLOURS}


def _moved(result: ChainResult, stage: str, readout: str) -> Effects:
    matrix = result.matrix
    return {} if matrix.empty else _effects(matrix[(matrix.stage == stage) & (matrix.readout == readout)])


def describe(result: ChainResult) -> str:
    """The diagram in words, every number of it."""
    found, parts = steps(result), []
    for step, following in zip(found, [*found[1:], None], strict=True):
        edits = "; ".join(f"{name}: {_words(effects)}" for name, effects in step.edits)
        text = f"{step.name} ({step.blocks}). Effects on the sink: {edits}."
        if following is not None and step.onward:
            text += f" Its transplant moves {following.name} by {_words(step.onward)}."
        if step.sink:
            text += f" Its transplant moves attention received by {_words(step.sink)}."
        parts.append(text)
    return printable(" ".join(parts))


def _words(effects: Effects) -> str:
    return ", ".join(f"{direction} {effect_text(effect)}" for direction, effect in effects.items())


def chain_diagram(result: ChainResult, *, vertical: bool = False, name: str = "chain") -> Svg:
    """The chain as an SVG picture: boxes with each stage's effects, arrows weighted by the chain matrix.

    Args:
        result: a chain's result.
        vertical: boxes below one another: for narrow screens, and for chains of many stages.
        name: prefix of the picture's ids, for pages that show several.
    """
    found = steps(result)
    sheet = _Vertical(found) if vertical else _Horizontal(found)
    body = sheet.draw(_sink_text(result))
    ids = f"{name}-{'tall' if vertical else 'wide'}"
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {sheet.width} {sheet.height}" role="img" '
        f'width="{sheet.width}" aria-labelledby="{ids}-title {ids}-desc" font-family="system-ui, sans-serif" '
        f'font-size="11.5" fill="currentColor"><title id="{ids}-title">The chain, stage by stage</title>'
        f'<desc id="{ids}-desc">{_escaped(describe(result))}</desc>{"".join(body)}</svg>'
    )


def _sink_text(result: ChainResult) -> str:
    means = [(run, float(np.mean(values["sink"]))) for run, values in result.runs.items() if "sink" in values]
    return "attention received: " + ", ".join(f"{number(mean)} {pretty(run)}" for run, mean in means)


class _Sheet:
    """Boxes and arrows on a drawing area; subclasses say where they go."""

    box_width: int
    columns: tuple[int, int]
    """Where the values of the two directions stand in a box."""
    letters: int
    """Letters in a line of a box."""

    def __init__(self, found: Sequence[Step]) -> None:
        self.steps = found
        self.boxes = [self.lines(step) for step in found]
        self.width = self.height = 0

    def draw(self, sink: str) -> list[str]:
        raise NotImplementedError

    def lines(self, step: Step) -> list[str]:
        """Lines of a box as SVG, each at its own height from 0."""
        raise NotImplementedError

    def title(self, step: Step) -> list[str]:
        lines = wrapped(step.name, self.letters - 2, 2)
        bold = [f'<tspan font-weight="600">{_escaped(line)}</tspan>' for line in lines]
        return [*(_text(10, 0, line) for line in bold), _soft(10, clipped(step.blocks, self.letters))]

    def values(self, effects: Effects) -> str:
        pairs = zip(self.columns, effects.items(), strict=False)
        return "".join(
            f"{_marker(direction, x, -4)}{_text(x + 7, 0, effect_text(effect))}" for x, (direction, effect) in pairs
        )

    def box(self, x: float, y: float, height: float, lines: Sequence[str], whole: str) -> str:
        # An inner picture cuts off what a narrower font would have left room for.
        inner = "".join(f'<g transform="translate(0 {18 + ROW * i})">{line}</g>' for i, line in enumerate(lines))
        return (
            f'<g><title>{_escaped(printable(whole))}</title><rect x="{x}" y="{y}" width="{self.box_width - 1}" '
            f'height="{height}" rx="6" fill="currentColor" fill-opacity="0.05" stroke="currentColor" '
            f'stroke-opacity="0.35"/><svg x="{x}" y="{y}" width="{self.box_width}" height="{height}">{inner}</svg></g>'
        )

    def bar(self, x: float, y: float, width: float, height: float, text: str) -> str:
        middle = f"{x + width / 2} {y + height / 2}"
        turn = " rotate(-90)" if height > width else ""
        letters = int(max(width, height) / 7)
        return (
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="currentColor" fill-opacity="0.12" '
            f'stroke="currentColor" stroke-opacity="0.35"/><g transform="translate({middle}){turn}">'
            f'<text y="4" text-anchor="middle" font-weight="600">{_escaped(clipped(text, letters))}</text></g>'
        )


class _Horizontal(_Sheet):
    box_width, columns, letters = 128, (14, 74), 18
    gap, fall = 44, 58

    def lines(self, step: Step) -> list[str]:
        title = self.title(step)
        title += [""] * (3 - len(title))
        rows = []
        for name, effects in step.edits[:MOST_EDITS]:
            rows += [_soft(10, line) for line in wrapped(name, self.letters, 2)]
            rows.append(self.values(effects))
        return [*title, *rows, *_more(step)]

    def draw(self, sink: str) -> list[str]:
        tall = 26 + ROW * max(map(len, self.boxes), default=1)
        pitch = self.box_width + self.gap
        self.width = pitch * len(self.boxes) - self.gap
        self.height = tall + self.fall + 34
        out = [self.bar(0.5, tall + self.fall, self.width - 1, 33, sink)]
        for index, (step, lines) in enumerate(zip(self.steps, self.boxes, strict=True)):
            x = index * pitch
            out.append(self.box(x + 0.5, 0.5, tall - 1, lines, f"{step.name}, {step.blocks}"))
            for row, (direction, effect) in enumerate(step.onward.items()):
                y = 34 + 40 * row
                out.append(_arrow(x + self.box_width + 3, y, x + pitch - 3, y, direction, effect))
                out.append(_number(x + self.box_width + self.gap / 2, y - 9, effect, "middle"))
            for row, (direction, effect) in enumerate(step.sink.items()):
                down = x + 26 + 58 * row
                out.append(_arrow(down, tall + 3, down, tall + self.fall - 3, direction, effect))
                out.append(_number(down + 9, tall + self.fall / 2, effect, "start"))
        return out


class _Vertical(_Sheet):
    box_width, columns, letters = 256, (140, 200), 38
    gap, reach = 48, 66

    def lines(self, step: Step) -> list[str]:
        rows = [_soft(10, clipped(name, 19)) + self.values(effects) for name, effects in step.edits[:MOST_EDITS]]
        return [*self.title(step), *rows, *_more(step)]

    def draw(self, sink: str) -> list[str]:
        heights = [18 + ROW * max(4, len(lines)) for lines in self.boxes]
        self.width = self.box_width + self.reach + 36
        self.height = sum(heights) + self.gap * (len(heights) - 1)
        out = [self.bar(self.width - 35, 0.5, 34, self.height - 1, sink)]
        y = 0
        for step, lines, tall in zip(self.steps, self.boxes, heights, strict=True):
            out.append(self.box(0.5, y + 0.5, tall - 1, lines, f"{step.name}, {step.blocks}"))
            for row, (direction, effect) in enumerate(step.onward.items()):
                x = 50 + 90 * row
                out.append(_arrow(x, y + tall + 3, x, y + tall + self.gap - 3, direction, effect))
                out.append(_number(x + 10, y + tall + self.gap / 2 + 4, effect, "start"))
            for row, (direction, effect) in enumerate(step.sink.items()):
                line = y + tall / 2 + 30 * row - 8
                out.append(_arrow(self.box_width + 3, line, self.box_width + self.reach - 2, line, direction, effect))
                out.append(_number(self.box_width + self.reach / 2, line - 8, effect, "middle"))
            y += tall + self.gap
        return out


def _more(step: Step) -> list[str]:
    left = len(step.edits) - MOST_EDITS
    return [_soft(10, f"and {left} more")] if left > 0 else []


def _arrow(x1: float, y1: float, x2: float, y2: float, direction: str, effect: float) -> str:
    if not np.isfinite(effect):
        return ""
    width = max(1.5, 5 * min(abs(effect), 2.0))
    half = max(4.0, width / 2 + 3)
    along = (1, 0) if y1 == y2 else (0, 1)
    neck = (x2 - along[0] * half * 1.3, y2 - along[1] * half * 1.3)
    side = (along[1] * half, along[0] * half)
    corners = [(x2, y2), (neck[0] + side[0], neck[1] + side[1]), (neck[0] - side[0], neck[1] - side[1])]
    points = " ".join(f"{x:g},{y:g}" for x, y in corners)
    dashed = ' stroke-dasharray="4 3"' if effect < 0 else ""
    faint = ' opacity="0.55"' if abs(effect) < 0.05 else ""
    colour = COLOURS[direction]
    return (
        f'<g{faint}><line x1="{x1:g}" y1="{y1:g}" x2="{neck[0]:g}" y2="{neck[1]:g}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/><polygon points="{points}" fill="{colour}"/></g>'
    )


def _number(x: float, y: float, effect: float, anchor: str) -> str:
    text = effect_text(effect) if abs(effect) >= 10 or not np.isfinite(effect) else f"{effect:.2f}".replace("-", "−")
    text = "0.00" if text == "−0.00" else text
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="11">{text}</text>'


def _marker(direction: str, x: float, y: float) -> str:
    colour = COLOURS[direction]
    if direction == "denoise":
        return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'
    return f'<rect x="{x - 3.5}" y="{y - 3.5}" width="7" height="7" fill="{colour}"/>'


def _text(x: float, y: float, content: str) -> str:
    return f'<text x="{x}" y="{y}">{content}</text>'


def _soft(x: float, text: str) -> str:
    return f'<text x="{x}" y="0" fill-opacity="0.75">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
