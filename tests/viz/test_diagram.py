"""The chain's diagram: its numbers, its arrows, and names that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import pytest

from sinklens import viz
from sinklens.viz.diagram import describe, steps
from tests.helpers.made_results import HOSTILE, LONG, made_result

SVG = "{http://www.w3.org/2000/svg}"
BLUE, ORANGE = "#2f7fbc", "#d9661f"


def lines(svg: str) -> list[tuple[str, float, bool]]:
    """Colour, width and dashedness of every arrow."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}line")
    return [(x.attrib["stroke"], float(x.attrib["stroke-width"]), "stroke-dasharray" in x.attrib) for x in found]


def texts(svg: str) -> list[str]:
    return ["".join(x.itertext()) for x in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture
def result():
    made = made_result()
    matrix = made.matrix
    for key, effect in {
        ("value_aggregation", "qk_locking", "denoise"): 0.5,
        ("value_aggregation", "qk_locking", "noise"): float("nan"),
        ("qk_locking", "sink", "denoise"): 1.5,
    }.items():
        chosen = (matrix[["stage", "readout", "direction"]] == list(key)).all(axis=1)
        matrix.loc[chosen, "effect"] = effect
    return made


@pytest.mark.parametrize("vertical", [False, True])
def test_arrows_are_as_wide_as_the_chain_matrix_says(result, vertical):
    svg = viz.chain_diagram(result, vertical=vertical)
    assert lines(svg) == [
        (BLUE, 2.5, False),  # value aggregation to QK locking; its noise arrow has no number, and is not drawn
        (BLUE, 10, True),  # to the sink: -9.724, dashed, and no wider than an effect of 2
        (ORANGE, 10, True),
        (BLUE, 7.5, False),  # QK locking to the sink: more than all of it
        (ORANGE, 5, False),
    ]
    shown = texts(svg)
    for number in ("0.50", "–", "−9.72", "1.50"):
        assert number in shown


def test_boxes_hold_blocks_and_effects(result):
    first, second = steps(result)
    assert (first.name, first.blocks, second.name) == ("1 Value aggregation", "blocks 0–1", "2 QK locking")
    assert first.edits == [
        ("transplant", {"denoise": 1.0, "noise": 1.0}),
        ("moment match", {"denoise": 0.02, "noise": -0.03}),
    ]
    assert second.onward == {}
    shown = texts(viz.chain_diagram(result))
    assert {"0.020", "−0.030", "blocks 0–1", "moment match"} <= set(shown)
    assert any(text.startswith("attention received: 0.200 base, 0.200 anc") for text in shown)


def test_the_diagram_in_words_has_every_number(result):
    text = describe(result)
    assert "moment match: denoise 0.020, noise −0.030" in text
    assert "Its transplant moves 2 QK locking by denoise 0.500, noise –." in text
    assert "attention received by denoise 1.500, noise 1.000" in text
    root = ElementTree.fromstring(viz.chain_diagram(result, name="a"))
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"] == "a-wide-title a-wide-desc"
    assert root.findtext(f"{SVG}desc") == text


def test_a_natural_sink_has_arrows_of_one_direction():
    assert {colour for colour, _, _ in lines(viz.chain_diagram(made_result(natural=True)))} == {ORANGE}


def test_a_chain_without_a_matrix_has_boxes_and_no_arrows():
    svg = viz.chain_diagram(replace(made_result(), matrix=pd.DataFrame()))
    assert lines(svg) == [] and "2 QK locking" in texts(svg)


@pytest.mark.parametrize("name", [*HOSTILE, LONG, "界" * 100], ids=lambda name: ascii(name[:12]))
@pytest.mark.parametrize("vertical", [False, True])
def test_any_name_fits_and_is_text(name, vertical):
    result = made_result()
    for table in (result.scores, result.matrix):
        table["stage"] = table.stage.replace("qk_locking", name)
    result.scores["edit"] = result.scores.edit.replace("query_direction_removed", name)
    svg = viz.chain_diagram(result, vertical=vertical)
    root = ElementTree.fromstring(svg)  # well-formed: nothing of the name was read as markup
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg",
        "title",
        "desc",
        "g",
        "rect",
        "circle",
        "line",
        "polygon",
        "text",
        "tspan",
    }
    assert max(map(len, texts(svg))) <= 60
    assert not re.search("[\u202a-\u202e]", svg)


def test_a_notebook_shows_it():
    svg = viz.chain_diagram(made_result())
    assert svg._repr_html_().startswith("<svg xmlns=")
