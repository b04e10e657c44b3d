"""A figure in a file: a page that works offline, or a picture.

Pictures are drawn by kaleido 1.x, which drives a Chrome or Chromium that is on this machine (Debian's ``chromium`` will
do) with the plotly that is installed and without MathJax, so that nothing is fetched; a picture takes some seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinklens.errors import InputError, need
from sinklens.records.files import write_bytes, write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")
"""What kaleido writes."""
HEIGHT = 450
"""Of a picture whose figure has none, pixels: plotly's own default."""


def save(figure: Figure, path: str | Path, *, width: int = 1000, height: int | None = None, scale: float = 2) -> Path:
    """Write a figure as ``.html`` (with plotly's script in it), ``.png``, ``.svg``, ``.pdf``, ``.jpg``, ``.webp``.

    Args:
        figure: plotly's.
        path: the file, whose ending says what is written; one that is there is replaced.
        width: of a picture, pixels.
        height: of a picture; the figure's own by default.
        scale: pixels of a picture to one of these.

    Raises:
        InputError: the ending is another, it is no figure of plotly's, or kaleido (``sinklens[png]``) or a browser for
            it is missing.
        WriteError: the file cannot be written.
    """
    path, given = Path(path), figure
    if not hasattr(given, "to_plotly_json"):
        what = type(given).__name__
        raise InputError(f"a plotly figure is saved, not of type {what}: attention_html writes views of CircuitsVis")
    ending = path.suffix.lower()
    if ending == ".html":
        write_text(path, figure.to_html(include_plotlyjs=True))
    elif ending in PICTURES:
        write_bytes(path, _picture(figure, ending[1:], width, height, scale))
    else:
        raise InputError(f"{path.name} must end with .html, {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    return path


def _picture(figure: Any, kind: str, width: int, height: int | None, scale: float) -> bytes:
    kaleido = need("kaleido", "png")
    wanted = {"format": kind, "width": width, "height": height or figure.layout.height or HEIGHT, "scale": scale}
    try:
        # Asked through plotly, kaleido would look for MathJax on the network every time.
        return kaleido.calc_fig_sync(figure.to_dict(), opts=wanted, kopts={"mathjax": False})
    except Exception as error:  # kaleido's, plotly's and the browser's share no class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the picture could not be drawn ({reason}): kaleido needs a Chrome or Chromium on this machine "
            "(BROWSER_PATH names one); a file that ends with .html needs none"
        ) from error
