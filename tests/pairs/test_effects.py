"""How far a patch goes from one run of a pair to the other."""

from __future__ import annotations

import math

import numpy as np

from sinklens.pairs.effects import effect

NAN = math.nan


def test_effect_counts_from_the_run_that_was_patched() -> None:
    base, anchored = np.array([0.1, 0.2]), np.array([0.5, 0.6])
    denoised, noised = np.array([0.2, 0.5]), np.array([0.2, 0.5])
    np.testing.assert_allclose(effect(denoised, base, anchored, 0.01), [0.1 / 0.4, 0.3 / 0.4])
    np.testing.assert_allclose(effect(noised, anchored, base, 0.01), [0.3 / 0.4, 0.1 / 0.4])
    # As the definition of the noise direction writes it: (M_anchored - M_patched) / (M_anchored - M_base).
    np.testing.assert_allclose(effect(noised, anchored, base, 0.01), (anchored - noised) / (anchored - base))


def test_effect_identities_are_exact() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.random(1000), rng.random(1000)
    for a, b in ((start, end), (end, start)):
        kept = np.abs(b - a) >= 0.01
        assert (effect(b, a, b, 0.01)[kept] == 1).all()
        assert (effect(a, a, b, 0.01)[kept] == 0).all()


def test_effect_is_never_clipped() -> None:
    found = effect(np.array([-0.4, 1.6]), np.array([0.0, 0.0]), np.array([0.8, 0.8]), 0.01)
    np.testing.assert_allclose(found, [-0.5, 2.0])


def test_effect_keeps_its_sign_when_the_pair_lowers_the_metric() -> None:
    np.testing.assert_allclose(effect(np.array([0.4]), np.array([0.5]), np.array([0.1]), 0.01), [0.25])


def test_effect_is_missing_where_the_gap_is_too_small() -> None:
    start = np.zeros(4)
    found = effect(np.ones(4), start, np.array([0.25, -0.25, 0.249, -0.249]), 0.25)
    np.testing.assert_allclose(found, [4, -4, NAN, NAN])
    assert np.isnan(effect(np.ones(1), np.zeros(1), np.zeros(1), 0.0)).all()  # never divided by zero


def test_effect_towards_one_number_for_all() -> None:
    np.testing.assert_allclose(effect(np.array([1.0, 3.0]), np.array([2.0, 4.0]), 0.0, 0.01), [0.5, 0.25])
