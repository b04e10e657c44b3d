"""Analyses of the neurons: their weights, what they read, what they write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.errors import InputError
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers import planted
from tests.helpers.planted import MINUS, OUTLIER, PLUS, SMALL_PLUS, SUPER
from tests.helpers.tiny import tiny_model, tiny_tokens

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}


def run(name: str, study: Study, **options: Any) -> AnalysisResult:
    return run_analysis(load_analysis(name), study, **options)


def tiny_study(arch: str = "llama", **changes: Any) -> Study:
    model = tiny_model(arch)
    return Study(model, from_tokens(model, tiny_tokens(4, 24)), given=GIVEN, **changes)


@pytest.fixture
def many_neurons(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The planted model with 48 neurons: among its own twelve no single one can have a p below 0.05."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    monkeypatch.setattr(planted, "D_MLP", 48)
    return planted.planted_model()


def planted_study(model: Any, length: int = 16) -> Study:
    """Every prompt's first token is its sink: it fires neuron 0, and no later average does."""
    starts = [[PLUS, MINUS, PLUS, MINUS], [SMALL_PLUS, MINUS, PLUS, MINUS], [PLUS, MINUS, MINUS, PLUS]]
    tokens = torch.tensor([start * (length // 4) for start in starts])
    given = {"layer": 0, "super_neurons": (SUPER,), "outlier_dims": (OUTLIER,)}
    return Study(model, from_tokens(model, tokens), given=given)


def robust_z(x: np.ndarray) -> np.ndarray:
    return (x - np.median(x)) / (1.4826 * np.median(np.abs(x - np.median(x))))


# --- super_neurons ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_planted_neuron_is_found_by_activation_and_its_weights_outlie(many_neurons):
    result = run("super_neurons", planted_study(many_neurons))
    mlp = many_neurons.blocks[0].mlp
    gate, up = (w.detach().norm(dim=0).numpy() for w in (mlp.W_gate, mlp.W_in))
    expected = min(robust_z(gate)[SUPER], robust_z(up)[SUPER])
    verdict, table = result.findings.verdict, result.findings.table
    assert verdict.estimate is not None and verdict.p_value is not None
    assert verdict.estimate.value == pytest.approx(expected, rel=1e-4)
    assert verdict.p_value == pytest.approx(1 / 48, abs=0.01)  # a random neuron is the planted one as often
    assert verdict.parts[0].outcome == "holds"
    assert table.kind.tolist() == ["fires most for the sink, a super neuron"] + ["other neuron"] * 47
    assert np.isinf(table.selectivity[SUPER])  # it is silent elsewhere


@pytest.mark.slow
def test_small_weights_that_fire_for_the_sink_do_not_outlie(many_neurons):
    """The same activation pattern and the same contribution, of a neuron whose columns are short."""
    mlp = many_neurons.blocks[0].mlp
    with torch.no_grad():
        mlp.W_gate[:, SUPER] /= 10
        mlp.W_in[:, SUPER] /= 10
        mlp.W_out[SUPER] *= 100
    result = run("super_neurons", planted_study(many_neurons))
    assert result.findings.table.kind[SUPER] == "fires most for the sink, a super neuron"
    assert result.findings.verdict.parts[0].outcome == "does not hold"


@pytest.mark.slow
def test_large_weights_that_do_not_fire_for_the_sink_do_not_count(many_neurons):
    """A neuron with the longest columns of all that fires for everyone is not picked."""
    before = run("super_neurons", planted_study(many_neurons)).findings
    mlp = many_neurons.blocks[0].mlp
    with torch.no_grad():
        mlp.W_gate[:, 5] *= 100
        mlp.W_in[:, 5] *= 100
        mlp.W_out[5] /= 10_000
    after = run("super_neurons", planted_study(many_neurons)).findings
    assert after.table.kind[5] == "other neuron"
    assert before.verdict.estimate is not None and after.verdict.estimate is not None
    assert after.verdict.estimate.value < 2 * before.verdict.estimate.value < after.table.gate_score[5]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_norms_and_selectivity_against_numpy(arch):
    study = tiny_study(arch)
    table = run("super_neurons", study, top=5).findings.table
    _, cache = study.model.run_with_cache(study.batch.tokens)
    post = cache["blocks.1.mlp.hook_post"].abs().numpy()  # [prompt, pos, neuron]
    sinks = study.sinks.numpy()
    sink = np.stack([post[i, s] for i, s in enumerate(sinks)]).mean(0)
    elsewhere = np.stack([np.quantile(np.delete(post[i], s, 0), 0.95, axis=0) for i, s in enumerate(sinks)]).mean(0)
    assert table.selectivity.to_numpy() == pytest.approx(sink / elsewhere, rel=1e-4)
    picked = set(np.argsort(-sink / elsewhere)[:5])
    assert set(table.neuron[table.kind.str.startswith("fires")]) == picked
    norms = study.weights(1).W_in.detach().numpy()
    assert table.up_score.to_numpy() == pytest.approx(robust_z(np.linalg.norm(norms, axis=0)), rel=1e-3, abs=1e-4)
    assert ("gate_norm" in table) == (arch == "llama")


@pytest.mark.slow
def test_a_percentile_is_one():
    result = run("super_neurons", tiny_study(), score="percentile", top=2)
    scores = result.findings.table.up_score
    assert sorted(scores) == pytest.approx([100 * (i + 1) / 48 for i in range(48)], rel=1e-5)
    with pytest.raises(InputError, match="top=48"):
        run("super_neurons", tiny_study(), top=48)


# --- selective_activation ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_planted_sink_is_high_on_both(many_neurons):
    verdict = run("selective_activation", planted_study(many_neurons)).findings.verdict
    assert verdict.parts[0].outcome == "holds"
    assert verdict.estimate is not None and verdict.estimate.value == 1
    # The others' gates read the constant, which the sink has least of after its norm.
    assert verdict.control_estimate is not None and verdict.control_estimate.value == 0


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["W_gate", "W_in"])
def test_one_factor_alone_is_not_enough(many_neurons, matrix):
    """With a gate, or a linear branch, that reads the constant, the sink is high on the other factor only."""
    with torch.no_grad():
        column = getattr(many_neurons.blocks[0].mlp, matrix)[:, SUPER]
        column.zero_()
        column[3] = 5.0
    verdict = run("selective_activation", planted_study(many_neurons)).findings.verdict
    assert verdict.estimate is not None and verdict.estimate.value == 0
    assert verdict.parts[0].outcome == "does not hold"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
def test_both_factors_against_the_mlp_s_own_hooks(arch):
    """What the model itself multiplies: ``hook_pre`` is x . w_gate, ``hook_pre_linear`` x . w_up."""
    study = tiny_study(arch)
    table = run("selective_activation", study, draws=2).findings.table
    _, cache = study.model.run_with_cache(study.batch.tokens)
    gate, linear = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_pre_linear"].abs()
    x = cache["blocks.1.ln2.hook_normalized"] * study.weights(1).ln2_w
    W_gate = study.weights(1).W_gate
    assert W_gate is not None
    cosine = (gate / x.norm(dim=-1, keepdim=True) / W_gate.norm(dim=0)).detach().numpy()
    where = tuple(table[column].to_numpy().copy() for column in ("prompt", "position", "neuron"))
    assert table.gate_cosine.to_numpy() == pytest.approx(cosine[where], rel=1e-4, abs=1e-5)
    assert table.linear_branch.to_numpy() == pytest.approx(linear.detach().numpy()[where], rel=1e-4, abs=1e-5)
    assert set(table.neuron[table.kind == "super"]) == {3, 7}
    assert not set(table.neuron[table.kind == "other"]) & {3, 7}


@pytest.mark.slow
def test_a_plain_mlp_has_one_matrix_for_both():
    table = run("selective_activation", tiny_study("gpt2")).findings.table
    assert (np.sign(table.gate_cosine) == np.sign(table.linear_branch)).all()
    assert (table.linear_branch < 0).any()  # with its sign: a negative preactivation is no activation


# --- down_projection --------------------------------------------------------------------------------------------


def with_rows(rows: torch.Tensor) -> Study:
    study = tiny_study()
    model: Any = study.model
    with torch.no_grad():
        model.blocks[1].mlp.W_out[[3, 7]] = rows
    return study


@pytest.mark.slow
def test_rows_with_one_entry_are_heavy_tailed():
    rows = torch.zeros(2, 32)
    rows[0, 4], rows[1, 9] = 3.0, -0.2
    findings = run("down_projection", with_rows(rows), k=1).findings
    verdict = findings.verdict
    assert verdict.estimate is not None
    assert verdict.estimate.value == pytest.approx(stats.kurtosis(rows[0].numpy()), rel=1e-4)
    assert findings.numbers["share of the energy in the 1 largest entries, super neurons"] == pytest.approx(1)
    assert verdict.parts[0].outcome == "holds"


@pytest.mark.slow
def test_dense_rows_are_not_however_long_they_are():
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    short, long = (run("down_projection", with_rows(size * rows), k=1).findings for size in (1, 1000))
    assert short.verdict.parts[0].outcome == long.verdict.parts[0].outcome == "does not hold"
    assert short.verdict.estimate is not None and long.verdict.estimate is not None
    assert short.verdict.estimate.value == pytest.approx(long.verdict.estimate.value, rel=1e-4)


@pytest.mark.slow
def test_heavy_tails_that_all_neurons_have_are_not_the_super_neurons(many_neurons):
    """In the planted model every row of W_out has one large entry."""
    verdict = run("down_projection", planted_study(many_neurons), k=1).findings.verdict
    assert verdict.estimate is not None and verdict.control_estimate is not None
    assert verdict.estimate.value == pytest.approx(verdict.control_estimate.value, rel=1e-2)
    assert verdict.parts[0].outcome == "does not hold"


@pytest.mark.slow
def test_the_shape_of_rows_against_scipy():
    study = tiny_study()
    table = run("down_projection", study, k=3).findings.table
    rows = study.weights(1).W_out.detach().numpy()
    mine = table[table.kind != "normal"]
    energy = np.sort(rows**2, axis=1)[:, ::-1]
    assert mine.excess_kurtosis.to_numpy() == pytest.approx(stats.kurtosis(rows, axis=1), rel=1e-3, abs=1e-4)
    assert mine.top_share.to_numpy() == pytest.approx(energy[:, :3].sum(1) / energy.sum(1), rel=1e-4)
    assert mine.rank_2.to_numpy() == pytest.approx(np.sqrt(energy[:, 1] / energy.mean(1)), rel=1e-4)
    assert mine.row[mine.kind == "super"].tolist() == [3, 7] and len(mine) == 48
    # The k largest of normal rows hold what the order statistics of 32 squared normals say: about 0.42 for k = 3.
    drawn = np.random.default_rng(0).standard_normal((20_000, 32)) ** 2
    share = np.sort(drawn, axis=1)[:, -3:].sum(1) / drawn.sum(1)
    assert table.top_share[table.kind == "normal"].mean() == pytest.approx(share.mean(), abs=0.01)


@pytest.mark.slow
def test_more_entries_than_dimensions_are_refused():
    with pytest.raises(InputError, match="k=32"):
        run("down_projection", tiny_study(), k=32)


@pytest.mark.slow
def test_a_model_with_a_norm_behind_its_mlps_has_no_rows_to_read():
    result = run("down_projection", tiny_study("gemma2"))
    assert result.findings.verdict.outcome == "not measurable" and "W_out" in result.findings.verdict.reason


# --- all ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("super_neurons", {"top": 4, "score": "percentile"}),
        ("selective_activation", {"draws": 2}),
        ("down_projection", {"k": 2, "draws": 50}),
    ],
)
def test_the_batch_size_is_of_no_account(name, options):
    one, all_at_once = run(name, tiny_study(memory_budget=1), **options), run(name, tiny_study(), **options)
    assert tiny_study(memory_budget=1).max_rows == 1 < tiny_study().max_rows
    a, b = one.findings.table, all_at_once.findings.table
    for column in a.columns:
        if a[column].dtype.kind == "f":
            assert a[column].to_numpy() == pytest.approx(b[column].to_numpy(), rel=1e-4, abs=1e-5, nan_ok=True)
        else:
            assert a[column].tolist() == b[column].tolist()
    assert one.findings.verdict.outcome == all_at_once.findings.verdict.outcome
