"""Tables that are wider than the terminal: no number is cut, and none is lost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console, RenderableType
from rich.table import Table

from sinklens.cli.fitting import fits, show
from sinklens.cli.tables import chain_table, formation_tables
from sinklens.cli.tables_sweep import overview_table, strongest_table
from tests.helpers.synthetic import synthetic_result

NUMBER = re.compile(r"-?\d[\d,.]*%?")


def printed(width: int, *things: RenderableType) -> str:
    screen = Console(width=width, highlight=False, color_system=None)
    with screen.capture() as capture:
        show(screen, *things)
    return capture.get()


def test_on_80_columns_every_number_and_prediction_is_whole() -> None:
    result = synthetic_result()
    text = printed(80, chain_table(result), *formation_tables(result.formation))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for row in result.scores.to_dict("records"):
        told = "{effect:.2f} [{ci_low:.2f}, {ci_high:.2f}] ({predicted:.0f})".format(**row)
        assert f"{row['direction']} {told}" in text
    assert "control: other_neurons" in text


@pytest.mark.parametrize("width", [20, 33, 47, 60, 80, 100, 140])
def test_whatever_the_width_no_number_is_cut(width: int) -> None:
    result = synthetic_result()
    wide = replace(result, scores=result.scores.assign(effect=-123.456, ci_low=-1234.5, ci_high=1234.5))
    tables: list[Callable[[], Table]] = [lambda: chain_table(wide), lambda: chain_table(result)]
    tables += [lambda i=i: formation_tables(result.formation)[i] for i in (1, 2, 3)]  # pyright: ignore
    for make in tables:
        text = printed(width, make())
        assert "…" not in text
        lost = Counter(numbers(make())) - Counter(NUMBER.findall(text))
        assert not lost


def numbers(table: Table) -> list[str]:
    return [found for column in table.columns for cell in column.cells for found in NUMBER.findall(str(cell))]


def test_a_sweep_on_80_columns() -> None:
    rows = {"stage": "resid_pre", "edit": "transplant", "direction": "denoise", "readout": "attention_received"}
    places = {"layer": 11, "window": 11, "position": 10, "unit": pd.NA}
    found: Any = type("Found", (), {"config": {"method": "exact"}})()
    found.overview = lambda: pd.DataFrame([{**rows, "cells": 1234, "effect": 0.0777, "strongest": 1.0101, **places}])
    found.strongest = lambda _n: pd.DataFrame([{**rows, **places, "effect": 1.0, "effect_std": 0.004, "n": 4}])
    text = printed(80, overview_table(found), strongest_table(found))
    assert "…" not in text and "cells 1,234" in text and "layer 11" in text and "strongest 1.010" in text


def test_what_fits_stays_a_table() -> None:
    table = Table(title="Title")
    table.add_column("what")
    table.add_column("a number with a name", justify="right")
    table.add_row("a text that may go on in a second line", "-0.25")
    assert fits(table, 40) and not fits(table, 15)
    assert "┃" in printed(40, table)
    told = " ".join(printed(15, table).split())
    assert told == "Title a text that may go on in a second line a number with a name -0.25"
