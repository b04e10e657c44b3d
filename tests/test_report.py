from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sinklens as sl
from sinklens._format import effect_text, interval_text, number, seconds_text
from sinklens._verdicts import findings, summary, verdict
from sinklens.errors import InputError
from sinklens.report_page import render, report
from tests.made_results import HOSTILE, made_result

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
    assert len(page.encode()) < 10_000_000


def test_hostile_names_are_text(page):
    parsed = _Page(page)
    assert HOSTILE[0] in parsed.text and "file:" + HOSTILE[1] in parsed.text
    assert "<script>window.hacked" not in page
    assert not any(tag == "img" for tag, _ in parsed.tags)


def test_frame_is_sandboxed_and_holds_hostile_tokens_as_text(page):
    frame = next(a for t, a in _Page(page).tags if t == "iframe")
    assert frame["sandbox"] == "allow-scripts"
    inner = _Page(frame["srcdoc"] or "")
    assert not any(tag == "img" for tag, _ in inner.tags)
    assert sum(tag == "script" for tag, _ in inner.tags) == 2


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
    with pytest.raises(InputError, match=r"chain\.json"):
        report(tmp_path)


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


CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


def _browse(page: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, with ``data-hacked`` on its root, and what the console said."""
    probe = (
        "<script>setTimeout(() => { document.documentElement.dataset.hacked = String(window.hacked); }, 3000)</script>"
    )
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
         "--enable-logging=stderr", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_draws_in_a_browser(tmp_path):
    shown, console = _browse(render(made_result(name=HOSTILE[0])), tmp_path)
    assert console == []
    assert 'data-hacked="undefined"' in shown
    figures = re.findall(r'<div class="plot[^>]*data-figure="([\w-]+)"', shown)
    assert figures == ["scores", "onset", "matrix-denoise", "matrix-noise"]
    for part in shown.split('data-figure="')[1:]:
        assert "main-svg" in part


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_attention_draws_in_a_browser(tmp_path):
    result = made_result()
    views = {run: sl.viz.attention_view(result, run) for run in result.attention}
    shown, console = _browse(sl.viz.attention_html(views), tmp_path)
    assert console == []
    assert 'data-hacked="undefined"' in shown
    assert shown.count("<canvas") >= 4
