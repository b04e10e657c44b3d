"""Text and figures that are not to be trusted, in reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from sinklens.pages.figures import from_disk
from sinklens.pages.gather import Missing, gather, of_result
from sinklens.pages.page import render
from tests.helpers.made_results import HOSTILE, HOSTILE_FIGURE, LONG, made_analysis, made_result, put
from tests.helpers.parsed import Parsed

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


@pytest.mark.slow
@pytest.mark.parametrize("text", [" ".join(HOSTILE), LONG, "half a pair \ud800"], ids=["hostile", "long", "half"])
def test_hostile_text_is_text_wherever_it_stands(tmp_path, text):
    chain = made_result(name=text, source=text, tokens=[text, *HOSTILE])
    whole = text.replace("\ud800", "")  # tables hold none
    for table in (chain.scores, chain.matrix):
        table["stage"] = [whole if stage == "qk_locking" else stage for stage in table.stage]
    chain.checks.loc[0, "quantity"] = whole
    chain.config["claims"] = {text: text}
    put(tmp_path, onset=made_analysis(text=whole))
    gathered = gather(tmp_path)
    gathered.parts.extend([*of_result(chain).parts, replace(of_result(made_analysis("b")).parts[0], name=text)])
    gathered.missing.append(Missing(text, text, text))
    page = render(gathered)
    page.encode()  # no half of a surrogate pair
    parsed = Parsed(page)
    assert not any(tag in ("img", "b", "a") and "onerror" in attributes for tag, attributes in parsed.tags)
    assert "<script>window" not in page and "<img src" not in page
    assert not re.search("[\u202a-\u202e]", page[: page.index("plotly.js v")])
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids)) and all(len(found or "") < 80 for found in ids)
    assert {result.name for _, result in gathered.analyses} == {"onset", "b"}


def test_a_hostile_figure_keeps_its_numbers_and_loses_its_links():
    text = from_disk(HOSTILE_FIGURE)
    assert "<" not in text
    figure = json.loads(text)
    trace, layout = figure["data"][0], figure["layout"]
    assert trace["type"] == "scatter" and trace["y"] == [1, 2, None, None]
    assert trace["x"][1] == "<b>bold</b>" and trace["text"][1] == "a<br>b"
    assert trace["x"][2] != trace["x"][3] and max(map(len, trace["x"])) <= 80
    for found in (trace["name"], trace["text"][0], trace["hovertemplate"], layout["title"]["text"]):
        assert not re.search("<(?!/?b>|/?extra>)", found)
    assert trace["hovertemplate"].endswith("<extra></extra>")
    assert layout["images"] == [{}, {"source": "data:image/png;base64,AAAA"}] and "template" not in layout
