"""Numbers and names as people read them."""

from __future__ import annotations

from sinklens.records.text import effect_text, number, pretty, seconds_text


def test_numbers_read_well():
    assert [number(x) for x in (23665.2, 0.260077, 0.00948, 145.46, 0, -733.6, 10.018, 3e-7, None)] == [
        "23,700",
        "0.260",
        "0.00948",
        "145",
        "0",
        "−734",
        "10.0",
        "3.00e−07",
        "–",
    ]
    assert [effect_text(x) for x in (1.0, -0.0000144, -9.7246, 123.4)] == ["1.000", "0.000", "−9.725", "123"]
    assert [seconds_text(x) for x in (0.5, 134.5, 7300)] == ["0.500 s", "2 min 14 s", "2 h 1 min"]


def test_names_are_written_as_people_write_them():
    names = ("moment_match", "w_o_alignment", "qk_locking", "rmsnorm_filter", "show_order")
    written = ["moment match", "W_O alignment", "QK locking", "RMSNorm filter", "show order"]
    assert [pretty(name) for name in names] == written
