"""Numbers as people read them; how they are written is tested with the sweeps that take them."""

from __future__ import annotations

import pytest

from sinklens.records.ranges import parse, spans


@pytest.mark.parametrize(
    ("numbers", "options", "text"),
    [
        ((0, 1, 2, 5), {}, "0–2, 5"),
        ((5, 2, 0, 1), {"dash": "-"}, "0-2, 5"),
        ((), {}, ""),
        ((0, 2, 4, 5), {"most": 3}, "0, 2, 4–5"),
        ((0, 2, 4, 6), {"most": 3}, "0, 2, 4, ..."),
    ],
)
def test_spans(numbers, options, text):
    assert spans(numbers, **options) == text


def test_spans_can_be_read_again():
    assert parse("layers", spans((1, 2, 3, 7, 9), "-")) == (1, 2, 3, 7, 9)
