"""Estimates of patches from gradients, on decoders: the softmax is recomputed where it is one, else refused."""

from __future__ import annotations

import pytest
import torch

from sinklens import edits, sites
from sinklens.attribution import estimate
from sinklens.engine.run import run_patches
from sinklens.errors import NotApplicableError
from sinklens.patches import Patch, Source
from sinklens.readouts import attention_received
from tests.helpers.decoders import kept_decoder
from tests.helpers.grids import RUNS, N, tokens_for

READOUT = attention_received("received", (2,), (4,), N)


@pytest.mark.parametrize("case", ["softmax", "qk_norm", "no_positions", "head_rmsnorm"])
def test_a_patched_query_or_key_goes_through_the_softmax_itself(case: str) -> None:
    model = kept_decoder(case)
    tokens = tokens_for(model)
    patches = [
        Patch(site, (2,), at, edits.Transplant(), source=Source("other"))
        for site in (sites.Q, sites.K)
        for at in ((7,), (4, 6, 8))
    ]
    found = run_patches(model, tokens, patches, [READOUT], runs=RUNS)
    expected = found.values["received"] - found.runs["base"]["received"]
    assert expected.abs().amax() > 1e-4
    torch.testing.assert_close(
        estimate(model, tokens, patches, [READOUT], runs=RUNS).changes["received"], expected, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("case", ["k_bias", "sink_token", "softpick", "window"])
def test_other_attention_is_refused_with_what_can_be_done(case: str) -> None:
    model = kept_decoder(case)
    patches = [Patch(sites.Q, (2,), (7,), edits.Transplant(), source=Source("other"))]
    with pytest.raises(NotApplicableError, match="leave these sites out, or run them exactly"):
        estimate(model, tokens_for(model), patches, [READOUT], runs=RUNS)
    plain = estimate(model, tokens_for(model), patches, [READOUT], runs=RUNS, qk_fix=False)
    assert plain.changes["received"].abs().max() > 0
