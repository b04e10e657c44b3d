"""Attention patterns of the formation block's successor in CircuitsVis, on screen or as HTML that works offline.

CircuitsVis writes tokens into a script without escaping ``<``: a token ``</script>`` ends it. What comes from here has
every ``<`` of the data written as JavaScript's escape for it, which is the same string to JavaScript.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinklens._optional import need
from sinklens.errors import InputError

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML

    from sinklens.results import ChainResult


def attention_view(
    result: ChainResult, run: str, heads: Sequence[int] | None = None, max_tokens: int = 64
) -> RenderedHTML:
    """Attention of the block after the formation block, on the first prompt in one run, as a CircuitsVis view.

    Args:
        result: a chain's result.
        run: name of the run: ``base`` or ``anchored``, or ``natural``.
        heads: heads to show; all by default.
        max_tokens: show the first so many tokens: a view's size grows with their square.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such run or head.
    """
    if run not in result.attention:
        raise InputError(f"no attention of a run {run!r}: this result has {', '.join(result.attention) or 'none'}")
    pattern = result.attention[run][0, :, :max_tokens, :max_tokens].float()
    heads = range(len(pattern)) if heads is None else heads
    if not len(heads) or not all(0 <= head < len(pattern) for head in heads):
        raise InputError(f"heads {list(heads)} are not in 0..{len(pattern) - 1}")
    # Three decimals are all that a colour can show, and keep a page with many heads small.
    values = [[[round(x, 3) for x in row] for row in pattern[head].tolist()] for head in heads]
    tokens = [token if token.strip() else repr(token)[1:-1] for token in result.tokens[0][:max_tokens]]
    view = need("circuitsvis.attention").attention_heads(values, tokens, [f"H{h}" for h in heads], max_value=1.0)
    return type(view)(_escape_data(view.local_src), _escape_data(view.cdn_src))


def attention_html(views: Mapping[str, RenderedHTML]) -> str:
    """A page with the views under their names, which works offline and carries the CircuitsVis script once."""
    script = _library()
    calls = "\n".join(f"CircuitsVis.{_call(view.local_src, index)}" for index, view in enumerate(views.values()))
    places = "\n".join(
        f"<section><h2>{html.escape(name)}</h2><div id=view-{index}></div></section>"
        for index, name in enumerate(views)
    )
    return _PAGE.format(places=places, script=script, calls=calls)


def _escape_data(source: str) -> str:
    """Write ``<`` in the data of a rendered view as an escape; all but the last ``</script>`` is data."""
    start = _data_start(source)
    end = source.rindex("</script>")
    return source[:start] + source[start:end].replace("<", "\\u003c") + source[end:]


def _data_start(source: str) -> int:
    # The id of the view is random, so that no token can pass for the call.
    name = re.match(r'<div id="([\w-]+)"', source)
    call = name and re.search(r"\brender\(\s*\"" + re.escape(name[1]) + '"', source)
    if not call:
        raise RuntimeError("this version of circuitsvis writes its views in another way: sinklens knows 1.43")
    return call.end()


def _call(source: str, index: int) -> str:
    safe = _escape_data(source)
    start, end = _data_start(safe), safe.rindex("</script>")
    return f'render("view-{index}"{safe[start:end].strip()}'


def _library() -> str:
    folder = Path(str(need("circuitsvis").__file__)).parent
    script = (folder / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # A closing tag would end the script, and the map is looked for on the disk.
    return re.sub(r"</script>|//# sourceMappingURL=\S+", "", script)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Attention</title>
<style>
body {{ margin: 0; background: #fff; color: #111; font: 14px/1.4 system-ui, sans-serif; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
section {{ min-width: 0; overflow-x: auto; }}
h2 {{ font-size: 1rem; margin: .75rem 1rem 0; }}
h3 {{ font-size: .9rem; }}
/* A small canvas must not stretch its box before it is drawn; and twelve heads in a row are too small to tell apart. */
h4 + div canvas {{ position: absolute; top: 0; left: 0; }}
[style*="8.33333%"] {{ width: 16.6667% !important; flex-basis: 16.6667% !important; max-width: 16.6667% !important; }}
</style></head><body><main>
{places}
</main><script>{script}</script>
<script>
{calls}
// Tells an enclosing page how high this one is.
new ResizeObserver(() => {{
  parent.postMessage({{ height: document.querySelector("main").offsetHeight }}, "*");
}}).observe(document.querySelector("main"));
</script></body></html>
"""
