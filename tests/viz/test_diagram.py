"""The chain's diagram: its numbers, its arrows, and names that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import pytest

from sinklens import viz
from sinklens.records.printable import printable
from sinklens.records.text import heading, pretty
from sinklens.viz.diagram import steps
from tests.helpers.made_results import HOSTILE, LONG, made_result

TAGS = {"div", "span", "style", "bdi"}


def elements(page: str, name: str) -> list[ElementTree.Element]:
    """Elements of that class."""
    return [x for x in ElementTree.fromstring(page).iter() if name in x.attrib.get("class", "").split()]


def arrows(page: str) -> list[tuple[str, float, bool]]:
    """Direction, width and dashedness of every arrow."""
    shown = []
    for effect in elements(page, "effect"):
        for arrow in effect.iterfind("span[@style]"):
            width = float(arrow.attrib["style"].removeprefix("--width: ").removesuffix("px"))
            shown.append((effect.attrib["class"].split()[1], width, "dashed" in arrow.attrib["class"]))
    return shown


def words(element: ElementTree.Element) -> str:
    """What is read out, in order."""
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def texts(page: str, *names: str) -> list[str]:
    return [words(element) for name in names for element in elements(page, name)]


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
    page = viz.chain_diagram(result, vertical=vertical)
    assert arrows(page) == [
        ("denoise", 2.5, False),  # value aggregation to QK locking; its noise arrow has no number, and is not drawn
        ("denoise", 10, True),  # to the sink: -9.724, dashed, and no wider than an effect of 2
        ("noise", 10, True),
        ("denoise", 7.5, False),  # QK locking to the sink: more than all of it
        ("noise", 5, False),
    ]
    shown = texts(page, "number")
    for number in ("0.500", "–", "−9.724", "1.500"):
        assert number in shown


def test_boxes_hold_blocks_and_effects(result):
    first, second = steps(result)
    assert (first.name, first.blocks, second.name) == ("1 Value aggregation", "blocks 0–1", "2 QK locking")
    assert first.edits == [
        ("transplant", {"denoise": 1.0, "noise": 1.0}),
        ("moment match", {"denoise": 0.02, "noise": -0.03}),
    ]
    assert second.onward == {}
    page = viz.chain_diagram(result)
    assert {"0.020", "−0.030", "blocks 0–1", "moment match"} <= set(texts(page, "number", "blocks", "what"))
    assert texts(page, "bar") == ["attention received: 0.200 base, 0.200 anchored"]


def test_every_edit_is_shown(result):
    more = result.scores.loc[result.scores.edit == "moment_match"]
    scores = pd.concat([result.scores, *(more.assign(edit=f"edit_{i}") for i in range(9))])
    shown = texts(viz.chain_diagram(replace(result, scores=scores)), "what")
    assert shown[2:11] == [f"edit {i}" for i in range(9)]


def test_read_out_it_has_every_number(result):
    root = ElementTree.fromstring(viz.chain_diagram(result))
    picture = root.find("div[@role='group']")
    assert picture is not None and picture.attrib["aria-label"] == "The chain, stage by stage"
    first, second = (words(item) for item in picture.iterfind("div[@role='list']/div[@role='listitem']"))
    assert first.startswith("1 Value aggregation blocks 0–1 transplant: denoise 1.000, noise 1.000 moment match: ")
    assert "moment match: denoise 0.020, noise −0.030" in first
    assert "Its transplant moves 2 QK locking by denoise 0.500, noise –." in first
    assert "Its transplant moves attention received by denoise 1.500, noise 1.000." in second


def test_a_natural_sink_has_arrows_of_one_direction():
    assert {direction for direction, _, _ in arrows(viz.chain_diagram(made_result(natural=True)))} == {"noise"}


def test_a_chain_without_a_matrix_has_boxes_and_no_arrows():
    page = viz.chain_diagram(replace(made_result(), matrix=pd.DataFrame()))
    assert arrows(page) == [] and "2 QK locking" in texts(page, "name")


@pytest.mark.parametrize("name", [*HOSTILE, LONG, "界" * 100], ids=lambda name: ascii(name[:12]))
def test_any_name_is_text_and_keeps_its_direction_to_itself(name):
    result = made_result()
    for table in (result.scores, result.matrix):
        table["stage"] = table.stage.replace("qk_locking", name)
    result.matrix["readout"] = result.matrix.readout.replace("qk_locking", name)
    result.scores["edit"] = result.scores.edit.replace("query_direction_removed", name)
    page = viz.chain_diagram(result)
    root = ElementTree.fromstring(page)  # well-formed: nothing of the name was read as markup
    assert {element.tag for element in root.iter()} == TAGS
    assert not re.search("[\u202a-\u202e]", page)
    isolated = ["".join(element.itertext()) for element in root.iter("bdi")]
    # As a stage, as what the stage before moves, and as an edit: always whole, and in an element of its own direction.
    stage, edit = printable(f"2 {heading(name)}"), printable(pretty(name))
    assert isolated == ["1 Value aggregation", "transplant", "moment match", stage, stage, "transplant", edit]


def test_boxes_lie_beside_one_another_only_where_there_is_room(result):
    """The browser's tests look at the outcome; here is what it follows from."""
    room = re.compile(r"@container chain-(\d+) \(min-width: ([\d.]+)rem\)")
    assert room.findall(viz.chain_diagram(result)) == [("2", "30")]
    one = result.scores[result.scores.stage == "qk_locking"]
    many = replace(result, scores=pd.concat([one.assign(stage=f"stage_{i}") for i in range(9)]))
    assert room.findall(viz.chain_diagram(many)) == [("9", "86.7")]
    assert room.findall(viz.chain_diagram(many, vertical=True)) == []


def test_a_notebook_shows_it():
    page = viz.chain_diagram(made_result())
    assert page._repr_html_().startswith('<div class="sinklens-chain') and "<script" not in page
    assert len(repr(page)) < 50  # which notebooks keep beside it
