"""Figures in files: a page without kaleido, a picture with it, and one sentence where something is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sinklens import viz
from sinklens.errors import InputError

pytest.importorskip("plotly")


@pytest.fixture
def figure() -> Any:
    return viz.bars(pd.DataFrame({"x": ["a", "b"], "y": [1.0, 2.0]}), "x", "y")


def test_a_page_works_offline(figure: Any, tmp_path: Path) -> None:
    text = viz.save(figure, tmp_path / "deep" / "figure.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in text and "cdn.plot.ly/plotly" not in text


def test_a_picture_is_what_kaleido_gives(figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def drawn(_: Any, opts: dict[str, Any], kopts: dict[str, Any]) -> bytes:
        assert kopts == {"mathjax": False}  # which it would look for on the network
        seen.append(opts)
        return b"picture"

    kaleido = SimpleNamespace(calc_fig_sync=drawn)
    monkeypatch.setitem(sys.modules, "kaleido", kaleido)
    assert viz.save(figure, tmp_path / "figure.PNG", width=640).read_bytes() == b"picture"
    assert seen == [{"format": "png", "width": 640, "height": figure.layout.height, "scale": 2}]
    kaleido.calc_fig_sync = lambda *_, **__: 1 / 0
    with pytest.raises(InputError, match=r"could not be drawn \(division by zero\).*Chromium"):
        viz.save(figure, tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.PNG"]


def test_what_is_missing_is_named(figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(InputError, match=r"kaleido is not installed: pip install 'sinklens\[png\]'"):
        viz.save(figure, tmp_path / "figure.png")
    with pytest.raises(InputError, match=r"figure\.bmp must end with \.html, \.png"):
        viz.save(figure, tmp_path / "figure.bmp")
    with pytest.raises(InputError, match="not of type dict"):
        viz.save({}, tmp_path / "figure.png")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_real_picture(figure: Any, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    picture = viz.save(figure, tmp_path / "figure.png", width=500).read_bytes()
    assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20]) == 1000  # two pixels to one
    assert viz.save(figure, tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<svg")
