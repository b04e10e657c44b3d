"""The packed pass with every variant, against one patch and one prompt at a time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinklens.engine.run import run_patches
from tests.helpers.decoders import CASES, kept_decoder
from tests.helpers.grids import RUNS, N, grids, measured, patch_of, tokens_for
from tests.helpers.one_at_a_time import OneAtATime


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=grids(), max_rows=st.sampled_from((4, 64)))
def test_any_grid_equals_one_patch_at_a_time(case: str, drawn: list[tuple], max_rows: int) -> None:
    model = kept_decoder(case)
    tokens, wanted = tokens_for(model), measured(model)
    patches = [patch_of(model, item) for item in drawn]
    result = run_patches(model, tokens, patches, wanted, runs=RUNS, max_rows=max_rows)
    assert result.stats.path == "packed", result.stats
    slow = OneAtATime(model, tokens, wanted, RUNS)
    for index, patch in enumerate(patches):
        for prompt in range(N):
            for readout, expected in zip(wanted, slow(patch, prompt), strict=True):
                found = float(result.values[readout.name][index, prompt])
                assert found == pytest.approx(expected, abs=1e-5, rel=2e-5), (readout.name, patch.describe(), prompt)
