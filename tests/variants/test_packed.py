"""The packed pass with every variant, against one patch and one prompt at a time."""

from __future__ import annotations

import pytest

from sinklens import edits, sites
from sinklens.engine.run import PatchRunner, run_patches
from sinklens.patches import Patch
from sinklens.readouts import attention_received
from tests.helpers.decoders import CASES, kept_decoder, made_decoder
from tests.helpers.grids import LENGTH, RUNS, N, measured, patch_of, sites_of, tokens_for
from tests.helpers.one_at_a_time import OneAtATime


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_patch_at_every_site_equals_one_at_a_time(case: str) -> None:
    """Of one or two blocks, at positions of each prompt's own; with patterns whole, and a few queries at a time."""
    model = kept_decoder(case)
    tokens, wanted = tokens_for(model), measured(model)
    places = (((4,), (2,), (7,)), (3, 6), (0,))
    patches = [
        patch_of(model, (i, (1, 3) if i % 2 else (2,), places[i % 3], i % 2 == 0, ("base", "other")[i % 3 == 1], None))
        for i in range(len(sites_of(model)))
    ]
    whole = run_patches(model, tokens, patches, wanted, runs=RUNS, max_rows=5)
    assert whole.stats.path == "packed", whole.stats
    runner = PatchRunner(model, tokens, wanted, runs=RUNS)
    runner.pattern_bytes = 5 * 4 * 4 * int(model.cfg.n_heads) * LENGTH
    pieces = runner.run(patches)
    slow = OneAtATime(model, tokens, wanted, RUNS)
    for index, patch in enumerate(patches):
        prompt = index % N
        for readout, expected in zip(wanted, slow(patch, prompt), strict=True):
            for result in (whole, pieces):
                found = float(result.values[readout.name][index, prompt])
                assert found == pytest.approx(expected, abs=1e-5, rel=2e-5), (readout.name, patch.describe(), prompt)


@pytest.mark.parametrize("case", ["sink_logit", "differential"])
def test_half_precision_is_the_decoder_s_own(case: str) -> None:
    model = made_decoder(case).bfloat16()
    patches = [Patch(sites.RESID_PRE, (1,), (3,), edits.Constant())]
    wanted = [attention_received("received", (3,), ((0,), (2,), (1,)), N)]
    found = run_patches(model, tokens_for(model), patches, wanted, runs=RUNS)
    assert found.stats.path == "packed"
    slow = OneAtATime(model, tokens_for(model), wanted, RUNS)
    for prompt in range(N):
        assert float(found.values["received"][0, prompt]) == pytest.approx(slow(patches[0], prompt)[0], abs=0.02)
