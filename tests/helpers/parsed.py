"""A page of HTML as the tests look at it."""

from __future__ import annotations

from html.parser import HTMLParser


class Parsed(HTMLParser):
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
