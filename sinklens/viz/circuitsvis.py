"""CircuitsVis without the network and with tokens that it must not read as HTML.

CircuitsVis writes its properties into a script without escaping ``<``: a token ``</script>`` ends it. And it sets its
coloured tokens as HTML: a token ``<img onerror=...>`` becomes one. So whatever comes from here has every ``<`` of the
data written as JavaScript's escape for it, which is the same string to JavaScript, and in coloured tokens an invisible
word joiner behind every ``<`` and ``&``, after which HTML takes neither for markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinklens.errors import InputError, need
from sinklens.records.printable import clip, printable

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML

WORD_JOINER = "\u2060"


def label(token: str, length: int = 24) -> str:
    """A token as an axis can show it: spaces and line breaks that are all of it are written out, and it is not long."""
    return clip(token, length) if token.strip() else repr(token)[1:-1][:length]


def as_text(token: str, length: int = 60) -> str:
    """A token for a component that reads HTML, so that it is text there too."""
    text = printable(token)
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return re.sub("[<&]", rf"\g<0>{WORD_JOINER}", text)


def safe(view: RenderedHTML) -> RenderedHTML:
    """The view with its data escaped.

    Raises:
        InputError: another version of CircuitsVis is installed, whose views are not understood.
    """
    return type(view)(_escape_data(view.local_src), _escape_data(view.cdn_src))


def component(view: RenderedHTML) -> tuple[str, dict[str, Any]]:
    """Name and properties of the component that a view shows.

    Raises:
        InputError: as :func:`safe`.
    """
    source = view.local_src
    start = _data_start(source)
    name = re.compile(r"\s*,\s*CircuitsVis\.(\w+)\s*,\s*").match(source, start)
    if not name:
        raise _unknown_version()
    return name[1], json.JSONDecoder().raw_decode(source, name.end())[0]


def check_version() -> None:
    """Make sure, before any work is done, that CircuitsVis is here and writes its views as we know them.

    Raises:
        InputError: it is not installed, or another version is.
    """
    component(need("circuitsvis.tokens").colored_tokens(["a"], [0.0]))


def _escape_data(source: str) -> str:
    """Write ``<`` in the data of a rendered view as an escape; all but the last ``</script>`` is data."""
    start = _data_start(source)
    end = source.rindex("</script>")
    return source[:start] + source[start:end].replace("<", "\\u003c") + source[end:]


def _data_start(source: str) -> int:
    # The id of the view is random, so that no token can pass for the call; nor has the library's script it.
    name = re.match(r'<div id="([\w-]+)"', source)
    call = source.find(f'"{name[1]}"', name.end()) if name else -1
    if not name or call < 0 or not re.search(r"\brender\(\s*$", source[max(0, call - 200) : call]):
        raise _unknown_version()
    return call + len(name[1]) + 2


def _unknown_version() -> InputError:
    return InputError(
        f"circuitsvis {metadata.version('circuitsvis')} writes its views in a way that sinklens does not know: "
        "pip install 'circuitsvis>=1.43,<1.44'"
    )


@cache
def library() -> str:
    """The script of CircuitsVis."""
    folder = Path(str(need("circuitsvis").__file__)).parent
    script = (folder / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # A closing tag would end the script, and the map is looked for on the disk.
    return re.sub(r"</script>|//# sourceMappingURL=\S+", "", script)


def script_json(data: Any) -> str:
    """``data`` as JSON that may stand inside a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no half of a surrogate pair gets through
    return text.replace("<", "\\u003c")


def section(title: str, views: Mapping[str, RenderedHTML]) -> dict[str, Any]:
    """Views beside one another under a title, as ``frame.js`` draws them."""
    drawn = []
    for name, view in views.items():
        kind, props = component(view)
        drawn.append({"title": printable(name), "component": kind, "props": props})
    return {"title": printable(title), "views": drawn}


def frame_style() -> str:
    """Style of a page of views."""
    return resources.files("sinklens.viz").joinpath("templates", "frame.css").read_text(encoding="utf-8")


def frame_script() -> str:
    """The script that draws views from their JSON."""
    return resources.files("sinklens.viz").joinpath("templates", "frame.js").read_text(encoding="utf-8")


def views_html(views: Mapping[str, RenderedHTML], title: str = "Attention") -> str:
    """A page with the views under their names, which works offline and carries the CircuitsVis script once."""
    return _PAGE.format(
        title=html.escape(title),
        style=frame_style(),
        views=script_json([section("", views)]),
        library=library(),
        script=frame_script(),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body><main></main>
<script type="application/json" id="views">{views}</script>
<script>{library}</script>
<script>{script}</script></body></html>
"""
