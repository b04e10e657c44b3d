"""Text that is not to be trusted, or cannot be seen."""

from __future__ import annotations

import pytest

from sinklens.records.printable import clip, isolated, printable

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


def test_text_that_cannot_be_seen_is_written_out():
    assert printable("a\u202eb\x00\ud800\n") == "a\\u202eb\\u0000\\ud800\n"
    assert isolated("abc") == "abc" and isolated("שלום") == "\u2068שלום\u2069"
    assert isolated("\u2069שלום") == "\u2068שלום\u2069"
    assert clip("a  b\nc" + "d" * 100, 6) == "a b c…" and clip("abc", 3) == "abc"
