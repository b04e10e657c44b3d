"""What the tests do with an open page, and figures of every kind to open."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd


class Page:
    """An open page, and what one does with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)
        return found

    def frame(self, name: str) -> None:
        """Go into the frame whose data has that name; out again with :meth:`leave`."""
        frame = self.all(f'iframe[data-views="{name}"]')[0]
        places: list[Any] = []

        def still() -> bool:  # frames above it are as high as they will be
            self.run("arguments[0].scrollIntoView()", frame)
            places.append([self.run("return scrollY"), frame.rect])
            return len(places) > 5 and all(place == places[-1] for place in places[-5:])

        self.wait(still)
        self.driver.switch_to.frame(frame)
        self.wait(lambda: self.all("main canvas, main .colored-tokens"))

    def leave(self) -> None:
        self.driver.switch_to.default_content()


def figures() -> dict[str, Any]:
    """Figures of every kind that analyses draw."""
    from sinklens import viz

    generator = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "block": np.tile(np.arange(10), 8),
            "value": generator.random(80),
            "series": np.repeat(list("abcdefgh"), 10),
            "panel": np.repeat(["one", "two", "three", "four"], 20),
        }
    )
    many = pd.DataFrame({"x": generator.random(2000), "y": generator.random(2000)})  # plotly express would use WebGL
    wide = pd.DataFrame(generator.random((4, 5)), index=list("abcd"), columns=list("vwxyz"))
    drawn = {
        "panels": viz.line(table, "block", "value", series="series", facet="panel"),
        "points": viz.points(many, "x", "y"),
        "bars": viz.bars(table.loc[table.block < 2], "series", "value"),
        "heatmap": viz.heatmap(wide, value="share", x="x", y="y"),
        "signed": viz.heatmap(wide - 0.5, value="effect", x="x", y="y", centre=0),
        "histogram": viz.histogram(table, "value"),
    }
    return {name: json.loads(figure.to_json() or "") for name, figure in drawn.items()}


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(...)``."""
    parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
