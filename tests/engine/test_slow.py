"""That patches do not run through the packed pass is said once: for every model, whatever is asked of it."""

from __future__ import annotations

import pytest

import sinklens as sl
from sinklens import edits, sites
from sinklens.engine import run
from sinklens.prompts import from_tokens
from tests.helpers.sweeps import FORMATION
from tests.helpers.tiny import tiny_model, tiny_tokens


@pytest.mark.slow
@pytest.mark.backend
def test_what_is_slow_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(run, "unpackable", lambda *_: "a test says so")
    said = []
    for _ in range(2):
        model = tiny_model("llama")
        batch = from_tokens(model, tiny_tokens(3, 8))
        patch = sl.Patch(sites.RESID_PRE, (1,), (3,), edits.Constant("zero"))
        readout = sl.readouts.attention_received("received", (2,), (0,), batch.n)
        for _ in range(2):
            assert sl.run_patches(model, batch, [patch], [readout]).stats.path == "model"
            sl.sweep(model, batch, stages="resid_pre", layers="1", positions="4", target=4, formation=FORMATION)
        said.append([record.getMessage() for record in caplog.records if "TransformerLens" in record.getMessage()])
    assert said[0] == ["this runs through TransformerLens, several times more slowly: a test says so"]
    assert said[1] == said[0] * 2, "another model is told of too"
