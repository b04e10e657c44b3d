from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sinklens import viz
from sinklens.cli.pages import write_report
from sinklens.errors import InputError
from sinklens.sweeps import LabelledTensor
from sinklens.viz.chain import KINDS
from sinklens.viz.circuitsvis import safe
from tests.helpers.made_results import HOSTILE, N_BLOCKS, made_result

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


def _bars(figure: Any) -> dict[tuple[int, str], float]:
    axis = {"y": 0, "y2": 1, None: 0}
    return {
        (axis[trace.yaxis], row): x
        for trace in figure.data
        if trace.type == "bar"
        for row, x in zip(trace.y, trace.x, strict=True)
    }


@pytest.mark.parametrize("stacked", [False, True])
def test_every_score_is_a_bar_with_its_interval_and_prediction(stacked):
    result = made_result()
    figure: Any = viz.scores_figure(result, stacked=stacked)
    rows = viz.score_rows(result)
    bars = _bars(figure)
    found = rows.merge(result.scores, on=["stage", "edit", "control"])
    assert len(bars) == len(result.scores) == len(found)
    for item in found.to_dict("records"):
        assert bars[int(item["direction"] == "noise"), item["row"]] == item["effect"]  # never clipped
    for trace in (t for t in figure.data if t.type == "bar"):
        low = np.array(trace.x) - np.array(trace.error_x.arrayminus)
        assert low == pytest.approx([d[0] for d in trace.customdata])
    ticks = [t for t in figure.data if t.type == "scatter"]
    assert [len(t.x) for t in ticks] == [7, 7]
    assert list(ticks[0].x) == [1, 0, 1, 0, 1, 0, 0]


def test_controls_stand_below_their_edit_and_look_different():
    rows = viz.score_rows(made_result())
    assert rows.kind.tolist() == [
        "header",
        "transplant",
        "control",
        "mechanism",
        "control",
        "header",
        "transplant",
        "control",
        "mechanism",
    ]
    looks = {(colour, pattern) for colour, pattern, _ in KINDS.values()}
    assert len({c for c, _ in looks}) == len({p for _, p in looks}) == 3


def test_scores_of_the_natural_sink_have_one_direction():
    figure: Any = viz.scores_figure(made_result(natural=True))
    assert {trace.yaxis for trace in figure.data} == {"y"}
    assert [a.text for a in figure.layout.annotations] == ["noise: is it necessary?"]


def test_a_score_without_prompts_is_no_bar():
    result = made_result()
    result.scores.loc[0, ["effect", "ci_low", "ci_high"]] = np.nan
    assert len(_bars(viz.scores_figure(result))) == len(result.scores) - 1


def test_onset_shows_the_norm_entering_every_block_and_leaving_the_last():
    profile = viz.onset_profile(made_result())
    assert profile.norm_sink.tolist() == [1, 2, 900, 950, 800]
    assert profile.layer.tolist() == list(range(N_BLOCKS + 1))
    figure: Any = viz.onset_figure(made_result())
    assert [len(t.x) for t in figure.data] == [4, 4, 5, 5]
    assert figure.data[0].y == (0.1, 0.1, 0.7, 0.6)
    assert figure.layout.yaxis2.type == "log"
    assert {(s.x0, s.x1) for s in figure.layout.shapes} == {(1, 2)}


def test_onset_needs_a_profile():
    result = made_result()
    bare = replace(result, formation=replace(result.formation, profile=result.formation.profile.iloc[:0]))
    with pytest.raises(InputError, match="profile"):
        viz.onset_figure(bare)


def test_matrix_writes_true_values_and_leaves_missing_cells_empty():
    figure: Any = viz.matrix_figure(made_result(), "denoise")
    heatmap = figure.data[0]
    assert heatmap.x == ("value aggregation", "QK locking", "sink")
    assert [list(row) for row in heatmap.text] == [["1.00", "1.00", "−9.72"], ["", "1.00", "1.00"]]
    assert heatmap.z[0][2] == -9.724
    assert heatmap.z[1][0] is None or np.isnan(heatmap.z[1][0])
    assert (heatmap.zmin, heatmap.zmax) == (-1, 2)


def test_matrix_says_which_direction_is_missing():
    with pytest.raises(InputError, match="denoise"):
        viz.matrix_figure(made_result(natural=True), "denoise")


def test_names_from_the_data_are_not_read_as_html():
    result = made_result()
    result.scores["stage"] = result.scores.stage.replace("qk_locking", '<a href="https://example.org">x</a>')
    text = viz.scores_figure(result).to_json() or ""
    assert "<a" not in text and "\\u003ca" not in text


def _props(source: str) -> dict:
    start = source.index("{", source.rindex("CircuitsVis.AttentionHeads,"))
    return json.JSONDecoder().raw_decode(source[start:])[0]


def test_attention_view_holds_hostile_tokens_as_text():
    view = viz.attention_view(made_result(), "base")
    for source in (view.local_src, view.cdn_src):
        assert source.count("</script>") == 1
        assert "window.hacked=1</script>" not in source
    props = _props(view.local_src)
    assert props["tokens"] == [
        "</script><script>window…",
        "<img src=x onerror=wind…",
        "\"'`${window.hacked=1}",
        "🙂",
        "שלום",
        "\\u202eabc",
        "\\n",
        "<!--<script>",
        "<img/src=x/onerror=wind…",
    ]
    assert len(props["attention"]) == 2


def test_attention_view_rounds_and_selects():
    result = made_result()
    props = _props(viz.attention_view(result, "anchored", heads=[1], max_tokens=3).local_src)
    expected = result.attention["anchored"][0, 1, :3, :3].float().numpy()
    assert props["attentionHeadNames"] == ["H1"]
    np.testing.assert_allclose(props["attention"], expected[None], atol=5.1e-4)
    assert all(len(str(x)) <= 5 for row in props["attention"][0] for x in row)


def test_attention_html_carries_the_script_once_and_is_offline():
    result = made_result()
    page = viz.attention_html({run: viz.attention_view(result, run) for run in result.attention})
    assert page.count("var CircuitsVis=") == 1
    assert page.count('"component":"AttentionHeads"') == 2
    assert not re.search(r"(?:src=|from |import\()\s*[\"']https?:", page), "a script from the network"
    assert "sourceMappingURL" not in page
    assert page.count("</script>") == 3


@pytest.mark.parametrize(
    ("run", "heads", "word"), [("nope", None, "nope"), ("base", [2], "0..1"), ("base", [], "0..1")]
)
def test_attention_view_says_what_there_is(run, heads, word):
    with pytest.raises(InputError, match=word):
        viz.attention_view(made_result(), run, heads)


def test_tokens_are_coloured_by_what_they_receive_and_the_last_is_left_out():
    result = made_result()
    source = viz.token_view(result, "base").local_src
    props = json.JSONDecoder().raw_decode(source[source.index("{", source.rindex("CircuitsVis.ColoredTokens,")) :])[0]
    n = len(HOSTILE)
    assert props["values"] == pytest.approx([i / n for i in range(1, n)], rel=1e-3)
    assert len(props["tokens"]) == n - 1
    assert (props["minValue"], props["maxValue"]) == (0, pytest.approx((n - 1) / n))


def test_runs_share_the_scale_of_the_super_neurons():
    result = made_result()
    for run, top in (("base", len(HOSTILE) - 1), ("anchored", 100 * (len(HOSTILE) - 1))):
        assert viz.token_values(result, run, "neurons").max() == top
        source = viz.token_view(result, run, "neurons").local_src
        assert f'"maxValue": {100.0 * (len(HOSTILE) - 1)}' in source


def test_coloured_tokens_hold_no_markup():
    """CircuitsVis sets them as HTML: behind a word joiner neither ``<`` nor ``&`` begins anything."""
    result = made_result(tokens=[*HOSTILE, "&lt;img&gt;", "&amp"])
    source = viz.token_view(result, "base", "neurons").local_src
    props = json.JSONDecoder().raw_decode(source[source.index("{", source.rindex("CircuitsVis.ColoredTokens,")) :])[0]
    assert not any(re.search("[<&](?!\u2060)", token) for token in props["tokens"])
    assert props["tokens"][1].replace("\u2060", "") == HOSTILE[1]


def test_heads_that_attend_most_to_the_target():
    result = made_result()
    for pattern in result.attention.values():
        pattern[:] = 0
        pattern[0, 1, :, 2] = 0.9
    assert viz.sink_heads(result, 1) == [1] and viz.sink_heads(result) == [0, 1]


def test_a_result_of_an_earlier_version_says_that_it_has_no_tokens():
    with pytest.raises(InputError, match="no attention received of a run 'base': this result has none"):
        viz.token_view(replace(made_result(), received={}), "base")


@pytest.mark.parametrize("package", ["plotly", "circuitsvis"])
def test_a_missing_package_is_one_clear_sentence(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed: pip install 'sinklens\[viz\]'"):
        if package == "plotly":
            viz.scores_figure(made_result())
        else:
            viz.attention_view(made_result(), "base")


def test_another_version_of_circuitsvis_is_one_clear_sentence(monkeypatch, tmp_path, capsys):
    from circuitsvis.utils.render import RenderedHTML

    view = viz.attention_view(made_result(), "base")
    for source in (view.local_src.replace("render(", "draw("), "<p></p>"):
        with pytest.raises(InputError, match=r"circuitsvis 1\.43.* pip install 'circuitsvis>=1\.43,<1\.44'"):
            safe(RenderedHTML(source, source))
    monkeypatch.setattr("circuitsvis.tokens.colored_tokens", lambda *_, **__: RenderedHTML("<p></p>", "<p></p>"))
    made_result().save(tmp_path / "run" / "chain")
    made_result().save(tmp_path / "run" / "again")
    assert write_report(tmp_path / "run") is None  # the run itself is kept
    assert capsys.readouterr().err.startswith("no report.html: circuitsvis")


def test_no_global_theme_is_touched():
    import plotly.io as pio

    before = pio.templates.default
    viz.scores_figure(made_result())
    viz.onset_figure(made_result())
    assert pio.templates.default == before


def test_what_is_no_chain_or_no_sweep_is_one_sentence():
    chain, table = made_result(), pd.DataFrame({"a": [1.0]})
    with pytest.raises(InputError, match="not of type ChainResult; of a chain, viz.matrix_figure"):
        viz.heatmap(chain)  # pyright: ignore[reportArgumentType]
    draws = (viz.scores_figure, viz.onset_figure, viz.chain_diagram, viz.sink_heads)
    for draw in (*draws, lambda it: viz.matrix_figure(it, "denoise")):
        with pytest.raises(InputError, match="this draws the result of run_chain.*not of type DataFrame"):
            draw(table)  # pyright: ignore[reportArgumentType]


def test_a_mark_without_words_leaves_a_logarithmic_axis_alone():
    """A note has its place as a logarithm there: one at 24 edges would stretch the axis to 10 to the power of 24."""
    table = pd.DataFrame({"edges": [1, 10, 100], "share": [0.1, 0.5, 0.9]})
    figure = viz.mark(viz.line(table, "edges", "share", log_x=True), x=24)
    assert [shape.x0 for shape in figure.layout.shapes] == [24] and not figure.layout.annotations
    (note,) = viz.mark(viz.line(table, "edges", "share"), x=24, text="kept").layout.annotations
    assert note.text == "kept"


def test_a_part_of_a_tensor_says_what_it_is_of():
    coords = {
        "stage": ("z", "resid_pre"),
        "layer": (0, 1),
        "position": (3, 4),
        "direction": ("denoise", "noise"),
        "prompt": (0, 1, 2),
    }
    values = torch.arange(48.0).reshape(2, 2, 2, 2, 3)
    whole = LabelledTensor(values, tuple(coords), coords, "effect", {"readout": "attention_received"})
    cut = whole.select(direction="noise").mean("prompt").select(stage="resid_pre")
    assert cut.axes == ("layer", "position") and torch.equal(cut.values, values[1, :, :, 1].mean(-1))
    title = "attention received: effect, resid pre, noise, mean over 3 prompts"
    assert viz.heatmap(cut).layout.title.text == title
    assert viz.heatmap(whole.select(direction="noise", stage="resid_pre")).layout.title.text == title
    assert viz.heatmap(cut, readout="loss").layout.title.text.startswith("loss: effect")
    for fact in ("at direction noise", "at stage resid_pre", "mean over 3 of prompt"):
        assert fact in repr(cut) and fact in cut._repr_html_()
    means = viz.heatmap(whole.mean("direction").select(stage="z", prompt=2)).layout.title.text
    assert means == "attention received: effect, z, prompt 2, mean over 2 directions"
