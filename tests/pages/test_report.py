from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys

import pytest

import sinklens as sl
from sinklens.chain.verdicts import findings
from sinklens.errors import InputError, WriteError
from sinklens.pages.page import render, report
from sinklens.records.text import effect_text, interval_text
from tests.helpers.made_results import HOSTILE, made_result
from tests.helpers.pages import readmes
from tests.helpers.parsed import Parsed

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


@pytest.fixture(scope="module", params=[False, True], ids=["induced", "natural"])
def page(request) -> str:
    name, source = HOSTILE[0], "file:" + HOSTILE[1]
    return render(made_result(natural=request.param, name=name, source=source))


def test_page_fetches_nothing(page):
    parsed = Parsed(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(https?:)?//", value), (tag, name, value[:80])
        assert "src" not in attributes, tag
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    assert "@import" not in page[: page.index("</style>")]


def test_page_is_one_of_a_kind_and_small(page):
    assert page.count("plotly.js v") == 1
    assert page.count("var CircuitsVis=") == 1
    assert len(page.encode()) < 10_000_000


def test_hostile_names_are_text(page):
    parsed = Parsed(page)
    assert HOSTILE[0] in parsed.text and "file:" + HOSTILE[1] in parsed.text
    assert "<script>window.hacked" not in page
    assert not any(tag == "img" for tag, _ in parsed.tags)


def test_frames_are_sandboxed_and_hold_hostile_tokens_as_data(page):
    frames = [a for t, a in Parsed(page).tags if t == "iframe"]
    assert [frame["sandbox"] for frame in frames] == ["allow-scripts", "allow-scripts"]
    for frame in frames:
        data = re.search(rf'<script type="application/json" id="{frame["data-views"]}">(.*?)</script>', page, re.S)
        assert data and "<" not in data[1]
        components = {view["component"] for section in json.loads(data[1]) for view in section["views"]}
        assert components == {"AttentionHeads" if "attention" in (frame["data-views"] or "") else "ColoredTokens"}


def test_only_scripts_of_the_page_s_own_may_run(page):
    parsed = Parsed(page)
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    scripts = re.findall(r"<script(?: type=\"text/plain\" id=\"frame-(?:library|script)\")?>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.search("script-src ([^;]*);", policy)[1].split() == [f"'sha256-{x}'" for x in digests[2:] + digests[:2]]  # pyright: ignore[reportOptionalSubscript]
    assert "'unsafe-inline'" not in policy.split("style-src")[0] and "unsafe-eval" not in policy


def test_headings_and_regions_are_in_order(page):
    parsed = Parsed(page)
    levels = [int(t[1]) for t, _ in parsed.tags if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for t, a in parsed.tags if t == "a"]
    assert links and all(link.removeprefix("#") in ids for link in links)
    for tag, attributes in parsed.tags:
        if "data-figure" in attributes or tag == "iframe":
            assert attributes.get("aria-label") or attributes.get("title")
        if attributes.get("class", "") and "scroll" in (attributes["class"] or "").split():
            assert attributes.get("tabindex") == "0" and attributes.get("aria-label")


@pytest.mark.slow
def test_table_has_every_score():
    result = made_result()
    text = re.sub(r"\s+", " ", Parsed(render(result)).text)
    for row in result.scores.to_dict("records"):
        assert effect_text(row["effect"]) in text
        assert interval_text(row["ci_low"], row["ci_high"]) in text


@pytest.mark.slow
def test_natural_page_speaks_of_one_direction():
    text = Parsed(render(made_result(natural=True))).text
    assert "natural sink" in text and "only the noise direction exists" in text
    assert "matrix-denoise" not in text


@pytest.mark.slow
def test_scores_without_predictions_have_no_verdict():
    result = made_result()
    result.scores["predicted"] = float("nan")
    assert {item.verdict for item in findings(result)} == {"no prediction"}
    assert "no prediction" in render(result)


@pytest.mark.slow
def test_what_a_model_does_not_allow_is_said():
    result = made_result()
    result.config["not_applicable"] = {"w_o_alignment/reading_subspace": "a norm stands behind the MLP"}
    assert "W_O alignment, reading subspace: a norm stands behind the MLP" in Parsed(render(result)).text


@pytest.mark.slow
def test_command_is_shown_as_it_was_given():
    result = made_result()
    assert "sl.run_chain(" in render(result)
    result.config["command"] = "sinklens chain --target 2 --prompts 'a <b>.txt'"
    assert "sinklens chain --target 2 --prompts 'a <b>.txt'" in Parsed(render(result)).text


@pytest.mark.slow
def test_report_of_a_folder_and_of_a_result(tmp_path):
    made_result().save(tmp_path / "run")
    path = report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html" and path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert report(made_result(), tmp_path / "other" / "page.html").is_file()
    assert report(made_result(), tmp_path / "run").name == "report.html"
    assert sl.report(tmp_path / "run") == path  # also after the module of that name was imported
    with pytest.raises(InputError, match="say where"):
        report(made_result())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"chain\.json"):
        report(tmp_path / "empty")


@pytest.mark.slow
def test_report_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    made_result().save(tmp_path / "run")
    path = report(tmp_path / "run")
    path.write_text("the old one")
    before = sorted(os.listdir(tmp_path / "run"))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WriteError, match="disk full"):
        report(tmp_path / "run")
    assert path.read_text() == "the old one"
    assert sorted(os.listdir(tmp_path / "run")) == before


@pytest.mark.slow
def test_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        report(made_result(), tmp_path / "file" / "report.html")


def test_missing_plotly_is_one_clear_sentence(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r"sinklens\[viz\]"):
        report(made_result(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_pages_say_which_model_a_result_is_of():
    """The default model is the Instruct one, dequantised from 4 bits: its numbers are not those of the base model."""
    named = {path: path.read_text(encoding="utf-8") for path in readmes() if path.parent.name != "benchmark"}
    named = {path: text for path, text in named.items() if "SmolLM2-135M" in text}
    assert len(named) >= 4
    for path, text in named.items():
        assert re.search(r"\*\*Instruct\*\*[^.|]*dequantised\s+from\s+4\s+bits", text), path
