"""The report in a real browser: Debian's Chromium without a screen, driven by selenium, off the network.

In CI a missing browser is a failure; elsewhere these tests are left out, and say what they need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sinklens.pages.page import report
from tests.helpers.browser import Page, contrast, figures, luminance
from tests.helpers.made_circuit import made_circuit
from tests.helpers.made_results import HOSTILE, HOSTILE_FIGURE, LONG, made_analysis, made_result

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
REQUIRED = os.environ.get("CI") == "true"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
DRAWN = "return document.documentElement.dataset.drawn"
TAB = "\ue004"
EVIL_NAME = "<img src=x onerror=window.hacked=1>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not REQUIRED and not (CHROMIUM.exists() and DRIVER.exists()),
        reason="needs a browser: apt-get install chromium chromium-driver",
    ),
]
pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    if not REQUIRED:
        pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A run with everything in it, and hostile text everywhere."""
    folder = tmp_path_factory.mktemp("run")
    tokens = [*HOSTILE, LONG, "<a href='javascript:window.hacked=1'>x</a>", "&lt;b&gt;", *["word"] * 20]
    chain = made_result(name=HOSTILE[0], source=HOSTILE[1], tokens=tokens)
    for table in (chain.scores, chain.matrix):
        table["stage"] = [EVIL_NAME if stage == "qk_locking" else stage for stage in table.stage]
    chain.checks.loc[0, "quantity"] = LONG
    chain.config["claims"] = {"value_aggregation": f"{HOSTILE[1]} {LONG}", EVIL_NAME: "שלום ‮abc"}
    chain.save(folder / "chain")
    made_result(natural=True, tokens=tokens).save(folder / "שלום natural")
    for name, figure in figures().items():
        made_analysis(name, "does not hold" if name == "bars" else "holds", figure=figure).save(folder / name)
    made_analysis("hostile", text=" ".join([*HOSTILE, LONG]), figure=HOSTILE_FIGURE).save(folder / EVIL_NAME)
    made_analysis("none", "not measurable", text=LONG).save(folder / "none")
    made_analysis("damaged").save(folder / "damaged")
    (folder / "damaged" / "summary.json").write_text("{")
    parts = {"broken": {"status": "failed", "reason": f"{HOSTILE[0]} {LONG}"}, HOSTILE[1]: {"status": "failed"}}
    (folder / "run.json").write_text(json.dumps({"parts": parts, "command": f"sinklens all '{EVIL_NAME}' {LONG}"}))
    return report(folder)


@pytest.fixture
def show(driver: Any) -> Iterator[Callable[..., Page]]:
    def open_page(path: Path, width: int = 1280, dark: bool = False, ready: str = DRAWN) -> Page:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get_log("browser")  # what an earlier page said
        driver.get(path.as_uri())
        shown = Page(driver)
        shown.wait(lambda: shown.run(ready))
        return shown

    yield open_page
    driver.switch_to.default_content()


def test_every_figure_is_drawn_and_the_console_is_silent(show, page):
    shown = show(page)
    assert len(shown.all("[data-figure]")) == 4 + 3 + len(figures()) + 1
    for place in shown.all("[data-figure]"):
        name = place.get_attribute("data-figure")
        marks = shown.run(
            "return arguments[0].querySelectorAll('.main-svg .trace, .main-svg .heatmaplayer image, .main-svg .points "
            "path, .main-svg .point').length",
            place,
        )
        assert marks > 0 and place.get_attribute("data-drawn") == "yes", name
        assert not shown.run("return arguments[0].querySelector('canvas, .gl-container canvas')", place), name
    for frame in ("views-chain-tokens", "views-chain-attention", "views-chain-2-tokens", "views-chain-2-attention"):
        shown.frame(frame)
        shown.leave()
    assert shown.driver.get_log("browser") == []
    assert shown.run("return performance.getEntriesByType('resource').length") == 0


def test_nothing_of_the_data_runs_or_links(show, page):
    shown = show(page)
    assert shown.run("return window.hacked") is None
    links = shown.run(
        "return [...document.querySelectorAll('a, svg a')].map(a => a.getAttribute('href') ?? "
        "a.getAttributeNS('http://www.w3.org/1999/xlink', 'href'))"
    )
    assert links and all(link and link.startswith("#") for link in links)
    assert shown.run("return document.querySelectorAll('img, object, embed, form, base, body script[src]').length") == 0
    assert shown.run("return document.querySelector('h1').textContent").startswith("4 models")
    assert EVIL_NAME in shown.run("return document.body.innerText")
    for frame in ("views-chain-tokens", "views-chain-attention"):
        shown.frame(frame)
        assert shown.run("return window.hacked") is None
        assert shown.run("return document.querySelectorAll('a, img, b').length") == 0
        shown.leave()


def test_a_script_that_gets_in_all_the_same_does_not_run(show, page, tmp_path):
    """The policy is the second line: markup put into the page by hand, as if escaping had failed."""
    text = page.read_text(encoding="utf-8")
    evil = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    (tmp_path / "page.html").write_text(text.replace("<main>", f"<main>{evil}", 1), encoding="utf-8")
    shown = show(tmp_path / "page.html")
    assert shown.run("return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in shown.driver.get_log("browser"))


def test_a_click_on_a_head_shows_it(show, page):
    shown = show(page)
    shown.frame("views-chain-attention")

    def zoomed() -> list[str]:
        return [found.text for found in shown.all("h3") if found.text.endswith("Zoomed")]

    def pixels() -> int:
        # Coloured points of the large patterns: a drawn pattern has many.
        return shown.run(
            "return [...document.querySelectorAll('canvas')].filter(c => c.width > 150).reduce((n, c) => n + "
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((x, i) => i % 4 == 0 && x < 190)"
            ".length, 0)"
        )

    shown.wait(lambda: pixels() > 1000)
    before = pixels()
    assert zoomed() == ["H0 Zoomed", "H0 Zoomed"]
    heads = shown.all('[role="button"]')
    assert [head.get_attribute("aria-label") for head in heads] == ["Head H0", "Head H1"] * 2
    heads[1].click()
    shown.wait(lambda: zoomed() == ["H1 Zoomed", "H0 Zoomed"])
    shown.wait(lambda: pixels() != before)
    shown.run("arguments[0].focus()", heads[3])  # and with the keyboard
    heads[3].send_keys("\n")
    shown.wait(lambda: zoomed() == ["H1 Zoomed", "H1 Zoomed"])


def test_a_token_shows_its_value_when_it_is_pointed_at(show, page):
    from selenium.webdriver.common.action_chains import ActionChains

    shown = show(page)
    shown.frame("views-chain-tokens")
    views = shown.all(".colored-tokens")
    assert len(views) == 4  # attention received and super neurons, base and anchored
    tokens = views[0].find_elements("css selector", ":scope > span")
    assert len(tokens) == len(HOSTILE) + 3 + 20 - 1  # the last receives nothing
    texts = [token.text.replace("\u2060", "") for token in tokens]
    assert texts[0] == HOSTILE[0] and texts[1] == HOSTILE[1] and "&lt;b&gt;" in texts
    colours = [token.find_element("css selector", "span").value_of_css_property("background-color") for token in tokens]
    assert len(set(colours)) > 20  # the more, the stronger
    ActionChains(shown.driver).move_to_element(tokens[3]).perform()
    tip = shown.wait(lambda: shown.all("[data-popper-placement]"))[0]
    assert tip.text.split() == ["🙂", "0.125"]  # 4 of 32


def test_dark_is_dark_and_readable(show, page):
    for dark in (False, True):
        shown = show(page, dark=dark)
        ground = shown.run("return getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) < 0.1) == dark
        for selector in ("body", ".subtitle", "figcaption", "nav a", "summary", "td", ".sub"):
            colour = shown.run(f"return getComputedStyle(document.querySelector('{selector}')).color")
            assert contrast(colour, ground) > 4.5, (selector, dark)
        for kind in ("outcome.good", "outcome.bad", "outcome.none", "badge.agrees", "badge.against", "badge.partly"):
            found = shown.run(
                f"const s = document.querySelector('.{kind}'); if (!s) return null; const c = getComputedStyle(s); "
                "return [c.color, c.backgroundColor]"
            )
            assert found is None or contrast(*found) > 4.5, (kind, dark)
        ticks = shown.run("return [...document.querySelectorAll('.xtick text')].map(t => getComputedStyle(t).fill)")
        assert ticks and all(contrast(colour, ground) > 4.5 for colour in set(ticks))
        marks = shown.run(
            "return [...document.querySelectorAll('[data-figure=chain-scores] .scatterlayer .point')]"
            ".map(p => getComputedStyle(p).stroke)"
        )
        assert marks and all(contrast(colour, ground) > 4.5 for colour in set(marks))  # what the claim predicts
        box = shown.run("return getComputedStyle(document.querySelector('.diagram .box .number')).color")
        assert contrast(box, ground) > 4.5


@pytest.mark.parametrize("width", [390, 700, 1000, 1280])
def test_no_width_needs_sideways_scrolling(show, page, width):
    shown = show(page, width)
    assert shown.run("return document.documentElement.scrollWidth") <= width
    outside = shown.run(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, .plot, .hidden, .skip, "
        "svg, .cards thead') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 100))"
    )
    assert outside == []
    diagrams = boxes(shown)
    assert len(diagrams) == 2  # one for each chain
    assert [beside(places) for places in diagrams] == [width > 390] * 2


def boxes(shown: Page) -> list[list[list[float]]]:
    """Where the boxes of every diagram lie: left, top, right, bottom."""
    return shown.run(
        "return [...document.querySelectorAll('.sinklens-chain')].map(e => [...e.querySelectorAll('.box, .bar')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom]))"
    )


def beside(places: list[list[float]]) -> bool:
    """Whether the stages lie beside one another, with the bar below; else they lie below one another, with it beside.

    In either case nothing lies on anything.
    """
    *stages, bar = places
    start, end = (0, 2) if stages[0][1] == stages[1][1] else (1, 3)
    across = 1 - start
    assert all(one[end] < other[start] for one, other in zip(stages, stages[1:], strict=False))
    assert len({stage[across] for stage in stages}) == 1
    assert all(stage[across + 2] < bar[across] for stage in stages)
    return start == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_diagram_of_its_own_finds_its_place(show, tmp_path, dark):
    """As in a notebook: two on a page of other styles, the one with more stages is the first to go below."""
    from sinklens import viz

    result = made_result()
    one = result.scores[result.scores.stage == "qk_locking"]
    many = replace(result, scores=pd.concat([one.assign(stage=f"stage_{i}") for i in range(6)]))
    page = "".join(viz.chain_diagram(item) for item in (many, result, many))
    scheme = '<meta name="color-scheme" content="light dark">'
    (tmp_path / "page.html").write_text(f"<!doctype html>{scheme}<body>{page}", encoding="utf-8")
    for width, expected in ((1280, [True] * 3), (700, [False, True, False]), (390, [False] * 3)):
        shown = show(tmp_path / "page.html", width, dark, ready="return document.readyState == 'complete'")
        assert [beside(places) for places in boxes(shown)] == expected, width
        assert shown.run("return document.documentElement.scrollWidth") <= width
    ink = shown.run("return getComputedStyle(document.querySelector('.number')).color")
    assert (luminance(ink) > 0.5) == dark


def test_a_phone_gets_panels_and_rows_below_one_another(show, page):
    shown = show(page, 390)
    panels = shown.run(
        "return [...document.querySelectorAll('[data-figure=analysis-panels] .bglayer .bg')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.x, r.y])"
    )
    assert len({round(x) for x, _ in panels}) == 1 and len({round(y) for _, y in panels}) == 4
    cells = shown.run(
        "return [...document.querySelector('.claims tbody tr').children].map(e => e.getBoundingClientRect().x)"
    )
    assert len(set(cells)) == 1


def test_tab_reaches_everything(show, page):
    from selenium.webdriver.common.action_chains import ActionChains

    shown = show(page)
    shown.run("document.querySelectorAll('details').forEach(e => e.open = false); scrollTo(0, 0)")
    wanted = shown.run(
        "window.wanted = [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"], iframe')]"
        ".filter(e => e.checkVisibility() && !e.closest('.modebar')); return wanted.length"
    )
    order = []
    for _ in range(wanted + 60):
        ActionChains(shown.driver).send_keys(TAB).perform()
        shown.leave()
        found = shown.run("return wanted.indexOf(document.activeElement)")
        if order and found == order[0]:
            break
        if found >= 0 and (not order or found != order[-1]):
            order.append(found)
    assert order[0] == 0 and shown.run("return wanted[0].textContent") == "Skip to the summary"
    missed = shown.run(
        "return wanted.filter((_, i) => !arguments[0].includes(i)).map(e => e.outerHTML.slice(0, 90))", order
    )
    assert missed == []
    assert order == sorted(order)  # as one reads


def test_focus_can_be_seen_and_the_skip_link_skips(show, page):
    from selenium.webdriver.common.action_chains import ActionChains

    shown = show(page)
    link = shown.all(".skip")[0]
    assert shown.run("return arguments[0].getBoundingClientRect().x", link) < 0
    ActionChains(shown.driver).send_keys(TAB).perform()
    assert shown.run("return document.activeElement === arguments[0]", link)
    assert shown.run("return arguments[0].getBoundingClientRect().x", link) >= 0
    ActionChains(shown.driver).send_keys("\n").perform()
    assert shown.run("return location.hash") == "#summary"


def test_paper_gets_everything_in_light(show, page):
    shown = show(page, dark=True)
    folded = shown.run("return document.querySelectorAll('details:not([open])').length")
    assert folded > 3
    pdf = shown.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    assert len(pdf) > 100_000
    shown.run("dispatchEvent(new Event('beforeprint'))")
    assert shown.run("return document.querySelectorAll('details:not([open])').length") == 0
    shown.run("dispatchEvent(new Event('afterprint'))")
    assert shown.run("return document.querySelectorAll('details:not([open])').length") == folded


PAPER = {"width": 703, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
"""A4 between its margins, in pixels."""


@pytest.fixture(params=["page", "circuit_page"])
def paper(request, show) -> Iterator[Page]:
    """A page as it is printed, on a sheet without end."""
    shown = show(request.getfixturevalue(request.param))
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PAPER)
    shown.run("dispatchEvent(new Event('beforeprint'))")
    yield shown
    shown.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_paper_cuts_nothing_and_has_no_scroll_bars(paper):
    overflowing = paper.run("return document.documentElement.scrollWidth")
    beyond = paper.run(
        "return [...document.querySelectorAll('body *')].filter((it) => !it.closest('.hidden, .unseen, svg') && "
        "it.checkVisibility() && it.getBoundingClientRect().right > arguments[0] + 1)"
        ".map((it) => it.outerHTML.slice(0, 200))",
        PAPER["width"],
    )
    assert beyond == []  # a printer would cut it, or shrink every page
    assert overflowing <= PAPER["width"]
    scrolling = paper.run(
        "return [...document.querySelectorAll('body *')].filter((it) => !it.closest('.hidden, .unseen, .plot, .box') "
        "&& it.checkVisibility() && getComputedStyle(it).overflow !== 'visible' && "
        "(it.scrollHeight > it.clientHeight + 1 || it.scrollWidth > it.clientWidth + 1))"
        ".map((it) => it.outerHTML.slice(0, 200))"
    )
    assert scrolling == []
    spilt = paper.run(  # what a column of a table cannot hold lies on the next one
        "return [...document.querySelectorAll('td, th')].filter((it) => it.checkVisibility() && "
        "it.scrollWidth > it.clientWidth + 2).map((it) => it.outerHTML.slice(0, 200))"
    )
    assert spilt == []


def test_paper_keeps_figures_whole_and_headings_with_what_they_head(paper):
    heights = paper.run(
        "return [...document.querySelectorAll('.plot, .sinklens-chain')].map((it) => it.getBoundingClientRect().height)"
    )
    assert heights and max(heights) <= 940  # of a letter's page
    style = "(it, name) => getComputedStyle(it)[name]"
    for selector, rule in (
        ("h2, h3, h4, summary, article > .claim, .note:has(+ .scroll)", "breakAfter"),
        ("h2, h3, h4, summary, article > .claim, .note:has(+ .scroll), figure, tr", "breakInside"),
    ):
        found = paper.run(
            f"const style = {style}; return [...document.querySelectorAll('{selector}')].filter((it) => "
            "it.checkVisibility()).map((it) => style(it, arguments[0]))",
            rule,
        )
        assert found and set(found) == {"avoid"}, rule
    heads = paper.run("return [...document.querySelectorAll('thead')].map((it) => getComputedStyle(it).display)")
    assert set(heads) == {"table-header-group"}  # repeated on every page


def test_paper_has_still_views_in_place_of_interactive_ones(paper):
    assert not paper.run("return [...document.querySelectorAll('iframe, .screen')].some((it) => it.checkVisibility())")
    data = paper.run(
        "return [...document.querySelectorAll('iframe')].map((it) => "
        "JSON.parse(document.getElementById(it.dataset.views).textContent))"
    )
    views = [view for sections in data for section in sections for view in section["views"]]
    tokens = [view["props"]["tokens"] for view in views if view["component"] == "ColoredTokens"]
    assert [item.get_attribute("textContent") for item in paper.all(".paper .tokens")] == ["".join(t) for t in tokens]
    heads = [len(view["props"]["attention"]) for view in views if view["component"] == "AttentionHeads"]
    assert [len(item.find_elements("css selector", "canvas")) for item in paper.all(".paper .heads")] == heads
    blank = paper.run(
        "return [...document.querySelectorAll('.paper canvas')].filter((it) => new Set(it.getContext('2d')"
        ".getImageData(0, 0, it.width, it.height).data).size < 4).length"
    )
    assert heads and blank == 0
    assert paper.run("return window.hacked") is None
    assert paper.run("return document.querySelectorAll('.paper :is(img, a, b, script)').length") == 0


def test_the_page_of_one_analysis(show, tmp_path):
    made_analysis().save(tmp_path / "onset")
    shown = show(report(tmp_path / "onset"))
    assert len(shown.all(".main-svg .trace")) > 0 and shown.all("iframe") == []
    assert shown.driver.get_log("browser") == []


def test_views_on_a_page_of_their_own_are_safe_too(show, tmp_path):
    from sinklens import viz

    result = made_result(tokens=[*HOSTILE, EVIL_NAME, "end"])
    views = {run: viz.token_view(result, run) for run in result.received} | {"a": viz.attention_view(result, "base")}
    (tmp_path / "views.html").write_text(viz.attention_html(views), encoding="utf-8")
    shown = show(tmp_path / "views.html", ready="return document.querySelector('canvas')")
    assert len(shown.all(".colored-tokens")) == 2 and shown.all("img") == []
    assert shown.run("return window.hacked") is None
    assert shown.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def circuit_page(tmp_path_factory) -> Path:
    """A circuit alone, with hostile text wherever text can be."""
    circuit = made_circuit(more=12, tokens=[*HOSTILE, EVIL_NAME, LONG, "end"])
    for name in ("edges", "contributions", "minimality"):
        table = getattr(circuit, name)
        table["branch"] = table["branch"].astype(object)
    circuit.tests["ablation"] = [EVIL_NAME if x == "zero" else x for x in circuit.tests.ablation]
    circuit.contributions["sender"] = [LONG if x == "mlp 1" else x for x in circuit.contributions.sender]
    circuit.config.update(pair=HOSTILE[0], prompts=HOSTILE[1])
    return report(circuit, tmp_path_factory.mktemp("circuit") / "report.html")


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (400, True)])
def test_a_circuit_is_drawn_and_read_at_any_width(show, circuit_page, width, dark):
    shown = show(circuit_page, width, dark)
    assert len(shown.all("[data-figure]")) == len(shown.all("[data-figure][data-drawn=yes]")) == 5
    assert shown.run("return document.documentElement.scrollWidth") <= width
    graph = "[data-figure=circuit-graph] "
    names = [item.text for item in shown.all(graph + ".textpoint, " + graph + ".scatterlayer .text text")]
    assert {"embed", "mlp 0", "super 2", "kv 3.0", "0.1"} <= set(names)
    places = shown.run(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(r => [r.x, r.y, r.right, r.bottom])",
        graph + ".scatterlayer .text text",
    )
    assert all(left >= 0 and right <= width for left, _, right, _ in places)
    blocks = [item.text for item in shown.all(graph + (".ytick text" if width == 400 else ".xtick text"))]
    assert {"embedding", "block 0", "block 3"} <= set(blocks)
    ink = shown.run("return getComputedStyle(document.querySelector(arguments[0])).fill", graph + ".text text")
    assert contrast(ink, shown.run("return getComputedStyle(document.body).backgroundColor")) > 4.5
    for frame in ("views-circuit-tokens", "views-circuit-attention"):
        shown.frame(frame)
        assert shown.run("return window.hacked") is None
        shown.leave()
    assert shown.run("return window.hacked") is None and shown.driver.get_log("browser") == []
    assert shown.run("return performance.getEntriesByType('resource').length") == 0


def test_a_click_filters_a_circuit_and_a_button_widens_it(show, circuit_page):
    shown = show(circuit_page)
    state = "const f = document.querySelector('[data-figure=circuit-graph]'); return f.data.map(t => arguments[0] ? "
    state += "t.line && t.line.width : [t.legendgroup, t.visible])"
    before = shown.run(state, True)
    (toggle,) = [
        item
        for item in shown.all("[data-figure=circuit-graph] .legend .traces")
        if item.text == "v" or item.get_attribute("textContent").strip() == "v"
    ]
    shown.run("arguments[0].scrollIntoView({block: 'center'})", toggle)
    toggle.find_element("css selector", ".legendtoggle").click()
    shown.wait(lambda: ["v", "legendonly"] in shown.run(state, False))
    hidden = [group for group, visible in shown.run(state, False) if visible == "legendonly"]
    assert set(hidden) == {"v"} and len(hidden) == 13  # all of that input, and no other
    buttons = shown.all("[data-figure=circuit-graph] .updatemenu-button")
    assert [button.text for button in buttons] == ["width: denoise", "width: noise"]
    buttons[1].click()
    shown.wait(lambda: shown.run(state, True) != before)
    expected = [None if w is None else 1 + (w - 1) / 2 for w in before]
    found = shown.run(state, True)
    close = [
        abs(a - b) < 0.02 for a, b in zip(found, expected, strict=True) if a is not None and b is not None and b < 6
    ]
    assert all(close) and len(close) > 10
