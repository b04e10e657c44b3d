"""Text from the data as a page can show it: names, prompts and reasons come from disk and are not to be trusted.

Escaping is the template's work. What is left is text that is no markup and harms all the same: control characters, half
a surrogate pair (which no file can hold), characters that turn the direction of what follows, and sheer length.
"""

from __future__ import annotations

import re
import unicodedata

import jinja2
from markupsafe import Markup, escape

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\u2067\ud800-\udfff\ufeff\ufffe\uffff]")
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_ISOLATE, _POP = "\u2068", "\u2069"


def printable(text: str) -> str:
    """``text`` with what is unseen, or turns the direction of other text, written as an escape of its code point."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def isolated(text: str) -> str:
    """``text`` for the middle of a sentence: when it runs from right to left it does not carry the rest along."""
    text = printable(text).replace(_ISOLATE, "").replace(_POP, "")
    turns = any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in text)
    return f"{_ISOLATE}{text}{_POP}" if turns else text


def clip(text: object, length: int) -> str:
    """``text`` on one line of at most ``length`` characters."""
    line = " ".join(printable(str(text)).split())
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"


def bdi(text: object) -> Markup:
    """``text`` in an element of its own direction."""
    return Markup("<bdi>") + escape(printable(str(text))) + Markup("</bdi>")


def shown(value: object) -> object:
    """What the template prints for ``value``: text as it can be seen; what is markup already stays so."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def templates(package: str) -> jinja2.Environment:
    """The folder ``templates`` of a package: they escape all that they show, and know :func:`bdi` and :func:`clip`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    environment.filters.update(bdi=bdi, clip=clip)
    return environment
