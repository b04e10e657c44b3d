"""What writes what the super neurons read, against TransformerLens's own activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sinklens as sl
from sinklens.sites import RESID_MID
from sinklens.stages import base as stages_base
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.settings import TARGET, setting_for, tokens_for
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.backend
READING = sl.analysis.load_analysis("reading")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest) -> sl.stages.Setting:
    return setting_for(tiny_model(request.param, "auto"))


@pytest.fixture(scope="module")
def result(setting: sl.stages.Setting) -> sl.AnalysisResult:
    batch = sl.prompts.from_tokens(setting.model, tokens_for(setting.model))
    return sl.run_analysis(READING, sl.Study.of(setting.model, batch, setting.formation), target=TARGET)


@pytest.mark.slow
def test_each_run_is_captured_once_for_all_that_is_asked(
    setting: sl.stages.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[str] = []
    real = stages_base.capture_runs

    def counted(model: Any, tokens: Any, runs: Any, *wants: Any, **limits: Any) -> Any:
        captured.extend(runs)
        return real(model, tokens, runs, *wants, **limits)

    monkeypatch.setattr(stages_base, "capture_runs", counted)
    batch = sl.prompts.from_tokens(setting.model, tokens_for(setting.model))
    sl.run_analysis(READING, sl.Study.of(setting.model, batch, setting.formation), target=TARGET)
    assert sorted(captured) == ["anchored", "base"]


def test_amounts_add_up_to_what_each_branch_reads(setting: sl.stages.Setting, result: sl.AnalysisResult) -> None:
    """The branch's input in the run with the sink, less what it would be with the base run's residual in its place."""
    model, block = setting.model, setting.formation.layer
    names = {RESID_MID.at(block), f"blocks.{block}.mlp.hook_pre", f"blocks.{block}.mlp.hook_pre_linear"}
    if setting.weights.W_gate is None:
        names = {name for name in names if "linear" not in name}
    hooks = sl.interventions.block_aggregation(TARGET, setting.up_to_formation)
    anchored = cache_of(model, setting.batch.tokens, hooks, names)
    base = cache_of(model, setting.batch.tokens, [], {RESID_MID.at(block)})
    difference = (anchored[RESID_MID.at(block)] - base[RESID_MID.at(block)])[:, TARGET]
    resid = anchored[RESID_MID.at(block)][:, TARGET]
    if setting.shape.norm == "layer":
        difference = difference - difference.mean(-1, keepdim=True)
        resid = resid - resid.mean(-1, keepdim=True)
    scale = (resid.pow(2).mean(-1, keepdim=True) + setting.shape.norm_eps).sqrt()
    amounts: Any = result.findings.table.query("quantity == 'amount'")
    for branch, matrix in (("gate", setting.weights.W_gate), ("linear", setting.weights.W_in)):
        if matrix is None:
            continue
        for neuron in setting.neurons:
            rows = amounts[(amounts.branch == branch) & (amounts.neuron == neuron)]
            expected = difference / scale * setting.weights.ln2_w @ matrix[:, neuron]
            found = torch.tensor(rows.groupby("prompt").value.sum().tolist())
            torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)


def test_all_writers_together_are_the_whole_subspace(setting: sl.stages.Setting) -> None:
    """Exchanging what attention and the MLPs wrote, one edit over both, is exchanging the subspace."""
    basis, block = sl.stages.reading_subspace(setting), (setting.formation.layer,)
    writers = tuple((sl.sites.ATTN_OUT, b) for b in setting.up_to_formation)
    writers += tuple((sl.sites.MLP_OUT, b) for b in setting.up_to_formation[:-1])
    patches = [
        setting.patch("denoise", RESID_MID, block, edit)
        for edit in (sl.edits.WrittenBy("both", basis, writers), sl.edits.Subspace("subspace", basis))
    ]
    metric = sl.readouts.attention_received("r", setting.readout_layers, (TARGET,), setting.batch.n)
    both, whole = sl.run_patches(setting.model, setting.batch, patches, [metric], runs=setting.pair.runs).values["r"]
    torch.testing.assert_close(both, whole, atol=1e-6, rtol=1e-5)


def test_it_is_drawn(result: sl.AnalysisResult) -> None:
    pytest.importorskip("plotly")
    figure: Any = READING.draw(result.findings)
    assert len(figure.data) == 4
