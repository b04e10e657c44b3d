from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sinklens as sl
from sinklens._format import effect_text, interval_text, number, seconds_text
from sinklens._report_claims import OUTCOMES, claim, counted
from sinklens._report_figures import from_disk
from sinklens._report_gather import Missing, gather, of_result
from sinklens._report_run import reproduce
from sinklens._report_text import clip, isolated, printable
from sinklens._verdicts import findings, summary, verdict
from sinklens.cli import app
from sinklens.errors import InputError
from sinklens.report_page import render, report
from tests.made_results import HOSTILE, LONG, made_analysis, made_result

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


class _Page(HTMLParser):
    """Tags, ids, text outside of scripts, and the frame's document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):  # noqa: ARG002  (the signature is the parser's)
        self._skip = False

    def handle_data(self, data):
        self.text += "" if self._skip else data


@pytest.fixture(scope="module", params=[False, True], ids=["induced", "natural"])
def page(request) -> str:
    name, source = HOSTILE[0], "file:" + HOSTILE[1]
    return render(made_result(natural=request.param, name=name, source=source))


def test_page_fetches_nothing(page):
    parsed = _Page(page)
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
    parsed = _Page(page)
    assert HOSTILE[0] in parsed.text and "file:" + HOSTILE[1] in parsed.text
    assert "<script>window.hacked" not in page
    assert not any(tag == "img" for tag, _ in parsed.tags)


def test_frames_are_sandboxed_and_hold_hostile_tokens_as_data(page):
    frames = [a for t, a in _Page(page).tags if t == "iframe"]
    assert [frame["sandbox"] for frame in frames] == ["allow-scripts", "allow-scripts"]
    for frame in frames:
        data = re.search(rf'<script type="application/json" id="{frame["data-views"]}">(.*?)</script>', page, re.S)
        assert data and "<" not in data[1]
        components = {view["component"] for section in json.loads(data[1]) for view in section["views"]}
        assert components == {"AttentionHeads" if "attention" in (frame["data-views"] or "") else "ColoredTokens"}


def test_only_scripts_of_the_page_s_own_may_run(page):
    parsed = _Page(page)
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    scripts = re.findall(r"<script(?: type=\"text/plain\" id=\"frame-(?:library|script)\")?>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.search("script-src ([^;]*);", policy)[1].split() == [f"'sha256-{x}'" for x in digests[2:] + digests[:2]]  # pyright: ignore[reportOptionalSubscript]
    assert "'unsafe-inline'" not in policy.split("style-src")[0] and "unsafe-eval" not in policy


def test_headings_and_regions_are_in_order(page):
    parsed = _Page(page)
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


def test_table_has_every_score():
    result = made_result()
    text = re.sub(r"\s+", " ", _Page(render(result)).text)
    for row in result.scores.to_dict("records"):
        assert effect_text(row["effect"]) in text
        assert interval_text(row["ci_low"], row["ci_high"]) in text


def test_natural_page_speaks_of_one_direction():
    text = _Page(render(made_result(natural=True))).text
    assert "natural sink" in text and "only the noise direction exists" in text
    assert "matrix-denoise" not in text


def test_summary_is_computed_and_speaks_against_as_well_as_for():
    lead, parts = summary(made_result())
    said = {name: " ".join(sentences) for name, sentences in parts}
    assert "through 2 of 2 stages (1 of them by construction)" in lead
    assert "of 2 edits" in lead and "1 came out as it predicts, 1 spoke against it" in lead
    assert "Against the claim: moment match of value aggregation" in said["Mechanisms"]
    assert "As predicted: query direction removed of QK locking" in said["Mechanisms"]
    assert "More than the whole: QK locking (denoise 1.370; predicted 1)" in said["Transplants"]
    assert "In value aggregation it is exactly 1 because" in said["Transplants"]
    assert "value for transplant of QK locking (denoise 0.810; predicted 0)" in said["Controls"]


def test_summary_turns_with_the_numbers():
    result = made_result()
    chosen = result.scores.edit == "moment_match"
    result.scores.loc[chosen, ["effect", "ci_low", "ci_high"]] = [0.9, 0.88, 0.93]
    lead, _ = summary(result)
    assert "2 came out as it predicts, 0 spoke against it" in lead


@pytest.mark.parametrize(
    ("effect", "low", "high", "predicted", "expected"),
    [
        (0.99, 0.98, 1.0, 1, "agrees"),
        (0.65, 0.6, 0.7, 1, "partly"),
        (0.3, 0.2, 0.4, 1, "against"),
        (-0.8, -0.9, -0.7, 1, "against"),
        (1.4, 1.3, 1.5, 1, "beyond"),
        (0.5, 0.4, 0.6, 1, "unclear"),
        (0.1, 0.0, 0.2, 0, "agrees"),
        (-0.3, -0.4, -0.2, 0, "partly"),
        (1.8, 1.7, 1.9, 0, "against"),
        (0.6, float("nan"), float("nan"), 1, "partly"),
        (float("nan"), float("nan"), float("nan"), 1, "not measured"),
        (0.6, 0.5, 0.7, float("nan"), "no prediction"),
    ],
)
def test_verdicts(effect, low, high, predicted, expected):
    assert verdict(effect, low, high, predicted) == expected


def test_scores_without_predictions_have_no_verdict():
    result = made_result()
    result.scores["predicted"] = float("nan")
    assert {item.verdict for item in findings(result)} == {"no prediction"}
    assert "no prediction" in render(result)


def test_numbers_read_well():
    assert [number(x) for x in (23665.2, 0.260077, 0.00948, 145.46, 0, -733.6, 10.018, 3e-7, None)] == [
        "23,700", "0.260", "0.00948", "145", "0", "−734", "10.0", "3.00e−07", "–",
    ]  # fmt: skip
    assert [effect_text(x) for x in (1.0, -0.0000144, -9.7246, 123.4)] == ["1.000", "0.000", "−9.725", "123"]
    assert [seconds_text(x) for x in (0.5, 134.5, 7300)] == ["0.500 s", "2 min 14 s", "2 h 1 min"]


def test_command_is_shown_as_it_was_given():
    result = made_result()
    assert "sl.run_chain(" in render(result)
    result.config["command"] = "sinklens chain --target 2 --prompts 'a <b>.txt'"
    assert "sinklens chain --target 2 --prompts 'a <b>.txt'" in _Page(render(result)).text


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


def test_report_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    made_result().save(tmp_path / "run")
    path = report(tmp_path / "run")
    path.write_text("the old one")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path / "run")
    assert path.read_text() == "the old one"
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".report")]


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


# -- A folder of runs -------------------------------------------------------------------------------------------------


def put(folder: Path, **parts: Any) -> Path:
    for name, result in parts.items():
        result.save(folder / name)
    return folder


def told(folder: Path) -> dict[str, tuple[str, str]]:
    return {item.name: (item.status, item.reason) for item in gather(folder).missing}


def test_a_folder_of_chains_and_analyses_is_one_page(tmp_path):
    put(
        tmp_path, first=made_result(), second=made_result(natural=True), onset=made_analysis(),
        rank=made_analysis("rank", "does not hold"), gate=made_analysis("gate", "not measurable"),
    )  # fmt: skip
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "today.txt").write_text("not ours")
    (tmp_path / ".sinklens-abc").mkdir()
    gathered = gather(tmp_path)
    assert [part.name for part in gathered.parts] == ["first", "second", "gate", "onset", "rank"]
    assert gathered.missing == []
    text = re.sub(r"\s+", " ", _Page(report(tmp_path).read_text(encoding="utf-8")).text)
    assert "Of 3 claims put to the test by analyses, 1 holds, 1 does not hold and 1 could not be measured." in text
    for part in ("The chain: first", "The chain: second", "Title of onset", "0.750 [0.610, 0.880], n = 16", "0.012"):
        assert part in text
    assert "it has no such part" in text  # the reason of what is not measurable


def test_outcomes_are_equally_loud(tmp_path):
    put(tmp_path, a=made_analysis("a"), b=made_analysis("b", "does not hold"), c=made_analysis("c", "not measurable"))
    page = report(tmp_path).read_text(encoding="utf-8")
    for outcome, (mark, kind) in OUTCOMES.items():
        badge = f'<span class="outcome {kind}"><span aria-hidden="true">{mark} </span>{outcome}</span>'
        assert page.count(badge) == 3  # summary, table, section


def test_a_verdict_that_is_none_of_the_three_is_damage(tmp_path):
    put(tmp_path, a=made_analysis("a"), b=made_analysis("b", "proves everything"))
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "none of holds, does not hold and not measurable" in _Page(page).text


@pytest.mark.parametrize("number", [1, 3])
def test_claims_are_counted(number):
    part, result = of_result(made_analysis()).analyses[0]
    claims = [claim(part, result, "a")] * number
    assert counted(claims) in ("The claim holds.", "Of 3 claims put to the test by analyses, 3 hold and 0 do not hold.")


def test_an_analysis_s_own_folder_has_no_chain(tmp_path):
    made_analysis().save(tmp_path / "onset")
    parsed = _Page(report(tmp_path / "onset").read_text(encoding="utf-8"))
    assert "Title of onset" in parsed.text and "Where the sink sets in" not in parsed.text
    assert not any(tag in ("iframe", "svg") for tag, _ in parsed.tags)
    assert [a["data-figure"] for _, a in parsed.tags if "data-figure" in a] == ["analysis-onset"]
    assert "circuitsvis" not in parsed.text.lower()


def test_an_analysis_in_memory(tmp_path):
    assert sl.report(made_analysis(), tmp_path / "page.html").is_file()
    with pytest.raises(InputError, match="say where"):
        sl.report(made_analysis())


def test_parts_that_are_not_there_are_listed_with_the_reason(tmp_path):
    put(tmp_path, chain=made_result(), cut=made_analysis("cut"), left=made_analysis("left"), fine=made_analysis("fine"))
    (tmp_path / "cut" / "summary.json").write_text('{"analysis": "cut"')
    (tmp_path / "left" / "summary.json").unlink()
    entries = {
        "formation": {"status": "done"},
        "fine": {"status": "done", "seconds": 2},
        "broke": {"status": "failed", "reason": "ValueError: no such thing", "seconds": 1},
        "gating": {"status": "not measurable", "reason": "it has no gate"},
        "gone": {"status": "done"},
        "odd": None,
    }
    (tmp_path / "run.json").write_text(json.dumps({"parts": entries, "config": {"command": "sinklens all --n 2"}}))
    found = told(tmp_path)
    assert found.pop("cut")[0] == "damaged"
    assert found.pop("left")[0] == "unfinished"
    assert found == {
        "broke": ("failed", "ValueError: no such thing"),
        "gating": ("not measurable", "it has no gate"),
        "gone": ("missing", "it was run, but its folder is not here"),
        "odd": ("unknown", "no reason was recorded"),
    }
    text = _Page(report(tmp_path).read_text(encoding="utf-8")).text
    for word in ("ValueError: no such thing", "it has no gate", "sinklens all --n 2", "Title of fine", "6 parts"):
        assert word in text


@pytest.mark.parametrize("text", ["", "[]", "3", '{"parts": [1]}', '{"parts": {"a": 1}, "config": 7}', "[" * 100_000])
def test_a_damaged_record_breaks_nothing(tmp_path, text):
    put(tmp_path, fine=made_analysis("fine"))
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "formation.json").write_text(text)
    assert "Title of fine" in report(tmp_path).read_text(encoding="utf-8")


def test_a_run_in_which_all_failed_says_so(tmp_path):
    (tmp_path / "run.json").write_text('{"parts": {"onset": {"status": "failed", "reason": "no sink"}}}')
    assert "no sink" in _Page(report(tmp_path).read_text(encoding="utf-8")).text


def test_figures_that_are_none_leave_the_rest_as_it_is(tmp_path):
    put(tmp_path, **{f"a{i}": made_analysis(f"a{i}") for i in range(4)})
    huge = {"data": [{"type": "scatter", "y": list(range(400_000))}], "layout": {}}
    for name, content in (("a0", "[1]"), ("a1", '{"data": {"x": 1}}'), ("a2", json.dumps(huge))):
        (tmp_path / name / "figure.json").write_text(content)
    page = report(tmp_path).read_text(encoding="utf-8")
    assert re.findall('data-figure="([^"]*)"', page) == ["analysis-a3"]
    text = _Page(page).text
    assert text.count("figure.json holds no plotly figure") == 2 and "too large for this page (2.7 MB)" in text


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("chain.json", {"config": {}}),
        ("chain.json", {"runs": 3}),
        ("chain.json", {"tokens": []}),
        ("summary.json", {"verdict": {"outcome": "holds", "claim": 3, "estimate": None, "control_estimate": None}}),
        ("summary.json", {"config": 3}),
        ("summary.json", {"seconds": "long", "caption": None}),
    ],
)
def test_a_part_of_the_wrong_shape_is_listed_or_shown(tmp_path, file, change):
    put(tmp_path, chain=made_result(), bad=made_analysis("bad"), fine=made_analysis("fine"))
    path = tmp_path / ("chain" if file == "chain.json" else "bad") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = _Page(report(tmp_path).read_text(encoding="utf-8")).text
    assert "Title of fine" in text
    assert "damaged" in text or "verdict" in change


def test_mixed_set_ups_are_told_apart(tmp_path):
    other = replace(made_analysis("b"), provenance={**made_analysis().provenance, "model": "another"})
    put(tmp_path, a=made_analysis("a"), b=other)
    parsed = _Page(report(tmp_path).read_text(encoding="utf-8"))
    assert "tiny (a)" in parsed.text and "another (b)" in parsed.text and "2 models" in parsed.text


def test_a_full_run_stays_small(tmp_path):
    put(tmp_path, chain=made_result(), **{f"a{i}": made_analysis(f"a{i}") for i in range(15)})
    path = report(tmp_path)
    page = path.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == page.count("var CircuitsVis=") == 1
    assert path.stat().st_size < 7_500_000  # leaves 150 kB for each figure


# -- How to run it again ----------------------------------------------------------------------------------------------


def test_an_analysis_made_in_python_has_a_command_that_does_the_same():
    assert reproduce(made_analysis()) == (
        "sinklens analyse onset --model tiny --n 2 --length 8 --prompts passages --seed 0 --dtype float32 "
        "--lengths 8,16"
    )
    given = made_analysis(prompts="random_tokens(seed=0)")
    given.config.update(given={"layer": 1, "super_neurons": [3, 7]}, options={"steps": True, "pairs": None})
    assert reproduce(given).endswith("--prompts random --seed 0 --block 1 --super-neurons 3,7 --dtype float32 --steps")
    given.config["command"] = "sinklens analyse onset --n 3"
    assert reproduce(given) == "sinklens analyse onset --n 3"


def test_an_analysis_of_one_s_own_has_code_that_does_the_same():
    code = reproduce(made_analysis("mine", prompts="file:a.txt"))
    assert "sl.analysis.load_analysis('mine.py')" in code and "lengths=(8, 16)" in code and "'file:a.txt'" in code
    compile(code.replace("batch = ...", "batch = None"), "code", "exec")


def test_a_command_takes_the_short_name_of_the_model():
    result = made_analysis()
    result.provenance["model"] = sl.models.REGISTRY["smollm2"].title
    assert "--model smollm2 " in reproduce(result)


# -- Text that is not to be trusted -----------------------------------------------------------------------------------


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
    parsed = _Page(page)
    assert not any(tag in ("img", "b", "a") and "onerror" in attributes for tag, attributes in parsed.tags)
    assert "<script>window" not in page and "<img src" not in page
    assert not re.search("[\u202a-\u202e]", page[: page.index("plotly.js v")])
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids)) and all(len(found or "") < 80 for found in ids)
    assert {result.name for _, result in gathered.analyses} == {"onset", "b"}


HOSTILE_FIGURE = {
    "data": [
        {
            "type": "scattergl",
            "name": '<a href="javascript:window.hacked=1">click</a>',
            "x": ["</script><script>window.hacked=1</script>", "<b>bold</b>", LONG, LONG + "y"],
            "y": [1, 2, float("nan"), float("inf")],
            "text": ['<A HREF="https://example.org">x</A>', "a<br>b", "<img src=x onerror=window.hacked=1>", "שלום"],
            "hovertemplate": '%{x}<a href="data:text/html,x">y</a><extra></extra>',
        }
    ],
    "layout": {
        "template": {"layout": {"paper_bgcolor": "red"}},
        "title": {"text": '<a href="javascript:window.hacked=1">title</a> <b onclick="window.hacked=1">x</b>'},
        "images": [{"source": "https://example.org/a.png"}, {"source": "data:image/png;base64,AAAA"}],
        "annotations": [{"text": "<a href='//example.org' target='_top'>note</a>", "x": 0, "y": 1}],
        "xaxis": {"title": {"text": "</script>"}},
    },
}


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


def test_text_that_cannot_be_seen_is_written_out():
    assert printable("a\u202eb\x00\ud800\n") == "a\\u202eb\\u0000\\ud800\n"
    assert isolated("abc") == "abc" and isolated("שלום") == "\u2068שלום\u2069"
    assert isolated("\u2069שלום") == "\u2068שלום\u2069"
    assert clip("a  b\nc" + "d" * 100, 6) == "a b c…" and clip("abc", 3) == "abc"


# -- The command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["report", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_the_page(tmp_path):
    put(tmp_path / "run", onset=made_analysis())
    code, out, err = command(str(tmp_path / "run"), "--out", str(tmp_path / "sent" / "page.html"))
    assert (code, out.strip(), err) == (0, str(tmp_path / "sent" / "page.html"), "")
    assert command(str(tmp_path / "run"))[1].strip() == str(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "there is no folder"), ("empty", "holds no chain.json"), ("file", "no folder")]
)
def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(str(tmp_path / name))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_run_is_one_sentence(tmp_path):
    made_analysis().save(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{")
    code, _, err = command(str(tmp_path / "a"))
    assert code == 2 and "is damaged" in err and err.count("\n") == 1
    made_result().save(tmp_path / "b")
    path = tmp_path / "b" / "chain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {}}))
    code, _, err = command(str(tmp_path / "b"))
    assert code == 2 and "is damaged" in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))
