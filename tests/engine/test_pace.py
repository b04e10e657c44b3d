"""Which batch size is chosen from given times."""

from __future__ import annotations

from sinklens.engine.pace import Pace


def settle(pace: Pace, rate_of: dict[int, float]) -> int:
    for _ in range(10):
        pace.record(pace.rows, pace.rows, pace.rows / rate_of[pace.rows])
    return pace.rows


def test_the_fastest_size_is_kept():
    assert settle(Pace(800, measured=True), {100: 1.0, 200: 2.0, 400: 2.5, 800: 2.4}) == 400


def test_larger_batches_that_gain_nothing_are_not_tried():
    pace = Pace(800, measured=True)
    assert settle(pace, {100: 1.0, 200: 1.01}) == 200
    assert not pace.measuring


def test_the_first_batch_does_not_count():
    pace = Pace(800, measured=True)
    pace.record(100, 100, 1e9)
    assert settle(pace, {100: 5.0, 200: 1.0}) == 100


def test_batches_that_are_not_full_do_not_count():
    pace = Pace(800, measured=True)
    pace.record(100, 100, 1)
    pace.record(7, 7, 1e-9)
    assert pace.measuring
    assert pace.rows == 100


def test_without_measuring_the_limit_is_used():
    pace = Pace(800, measured=False)
    assert not pace.measuring
    assert settle(pace, {800: 1.0}) == 800


def test_what_did_not_fit_is_not_tried_again():
    pace = Pace(800, measured=True)
    pace.halve(100)
    assert pace.rows == 50
    assert settle(pace, {50: 1.0}) == 50
