"""The analyses of circuits: on models whose circuit is known on paper, with verdicts that turn, and as a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import list_analyses, list_groups
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.study import Study
from tests.helpers.planted_circuit import TARGET, planted_circuit, planted_setting
from tests.helpers.settings import setting_for
from tests.helpers.tiny import hooks_left, tiny_model

pytest.importorskip("transformer_lens.HookedTransformer")

GROUP, NAMES = "circuits", ("downstream", "upstream")
WHOLE, NONE = pytest.approx(1, abs=1e-3), pytest.approx(0, abs=1e-3)


def run(name: str, study: Study, **options: Any) -> AnalysisResult:
    return run_analysis(load_analysis(name), study, **{"target": TARGET, **options})


def one_branch(*, heads_fire: bool = False, others_are_read: bool = False) -> Study:
    """The planted circuit with one reading head, 2.0: all of the sink is the key that the super neuron gives it.

    Args:
        heads_fire: the super neuron reads what head 0.0 writes, and not what MLP 0 makes of it.
        others_are_read: the reading head's key is what the MLP's other neuron writes, and not the super neuron.
    """
    model = planted_circuit()
    _, second, third = model.blocks
    with torch.no_grad():
        third.attn.W_K[1] = 0.0
        if heads_fire:
            second.mlp.W_gate[[0, 7], 0] = second.mlp.W_gate[[7, 0], 0].clone()
        if others_are_read:
            third.attn.W_K[0, [2, 6]] = third.attn.W_K[0, [6, 2]].clone()
    return planted_setting(model).study


@pytest.fixture(scope="module")
def by_mlp() -> Study:
    return one_branch()


# -- Which components make the super neurons fire --------------------------------------------------------------------


def parts(result: AnalysisResult) -> dict[str, str]:
    return {part.name: part.outcome for part in result.findings.verdict.parts}


@pytest.mark.slow
def test_an_mlp_between_refutes_the_claim(by_mlp: Study) -> None:
    """All of the sink is MLP 0's edge into the gate: heads do nothing directly, though head 0.0 makes MLP 0 fire."""
    result = run("upstream", by_mlp)
    found = result.findings
    assert result.findings.verdict.outcome == "does not hold"
    assert parts(result) == dict.fromkeys(("edges", "enough", "needed"), "does not hold")
    for part in found.verdict.parts:
        assert part.estimate is not None and part.estimate.value == NONE
    rows: Any = found.table[found.table.said == "its own"]
    by_edge = rows[rows.branch != "all at once"].groupby(["sender", "branch"]).effect.mean()
    assert by_edge["mlp 0", "gate"] == WHOLE
    assert by_edge.drop(("mlp 0", "gate")).abs().max() < 1e-4
    together = rows[rows.branch == "all at once"].groupby(["sender", "direction"]).effect.mean()
    for direction in ("denoise", "noise"):
        assert together["MLPs", direction] == WHOLE and together["all", direction] == WHOLE
        assert together["heads", direction] == NONE


@pytest.mark.slow
def test_a_head_that_is_read_directly_bears_it_out() -> None:
    """The same model, in which the super neuron reads what head 0.0 writes: the verdict turns."""
    result = run("upstream", one_branch(heads_fire=True))
    assert result.findings.verdict.outcome == "holds", parts(result)
    edges, enough, needed = result.findings.verdict.parts
    for part in (edges, enough, needed):
        assert part.estimate is not None and part.estimate.value == WHOLE
    assert edges.control_estimate is not None and edges.control_estimate.value == NONE  # the MLPs
    assert enough.control_estimate is not None and enough.control_estimate.value < 0.5  # another token's output
    numbers = result.findings.numbers
    first = next(name for name in numbers if name.startswith("edges of head 0."))
    assert first == "edges of head 0.0 (denoise)" and numbers[first].value == WHOLE  # type: ignore[union-attr]


@pytest.mark.slow
def test_both_branches_count_half_where_the_sink_has_two() -> None:
    """The planted circuit as it is: MLP 0 reaches half of the sink by the super neuron."""
    numbers = run("upstream", planted_setting(planted_circuit()).study).findings.numbers
    half = pytest.approx(0.5, abs=1e-3)
    assert numbers["edges of MLPs, added up (denoise)"].value == half  # type: ignore[union-attr]
    assert numbers["edges of MLPs at once (noise, its own)"].value == half  # type: ignore[union-attr]


# -- Which heads use the sink's key ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_key_carries_all(by_mlp: Study) -> None:
    result = run("downstream", by_mlp)
    enough, needed, few = result.findings.verdict.parts
    for part in (enough, needed):
        assert part.outcome == "holds" and part.estimate is not None and part.control_estimate is not None
        assert part.estimate.value == WHOLE
        assert part.control_estimate.value == NONE  # values
    assert few.estimate is not None and few.estimate.value == pytest.approx(1 / 3)  # one of three is no few
    assert few.outcome == "does not hold" and "the largest: head 2.0" in few.detail
    rows = result.findings.table
    single = rows[rows.what == "one edge"].groupby(["sender", "receiver", "direction"]).effect.mean()
    for direction in ("denoise", "noise"):
        assert single["super 1", "head 2.0", direction] == WHOLE
        assert single.drop(("super 1", "head 2.0", direction)).xs(direction, level=2).abs().max() < 1e-3


@pytest.mark.slow
def test_a_key_of_something_else_refutes_it() -> None:
    """The reading head's key is what the other neuron writes: the super neurons do nothing, and the MLP's edge all."""
    result = run("downstream", one_branch(others_are_read=True))
    assert result.findings.verdict.outcome == "does not hold"
    assert parts(result) == {"enough": "does not hold", "needed": "does not hold", "few heads": "not measurable"}
    rows = result.findings.table
    others = rows[(rows.sender == "mlp 1") & (rows.receiver == "head 2.0")].groupby("direction").effect.mean()
    assert others["denoise"] == WHOLE and others["noise"] == WHOLE


def test_how_many_heads_make_half_by_hand(by_mlp: Study) -> None:
    """The largest two of five make half of 0.8 on average, though not in every prompt; the excluded one has no say."""
    how_many = load_analysis("downstream").run.__globals__["how_many"]
    rows = ((0.3, 0.3), (0.5, 0.35), (0.6, 0.5), (0.7, 0.6), (0.8, 0.8))
    grown = np.array([[one, np.nan, other] for one, other in rows])
    assert how_many(by_mlp, grown).value == pytest.approx(2 / 5)
    assert np.isnan(how_many(by_mlp, np.zeros((4, 3))).value)
    assert how_many(by_mlp, np.ones((4, 3))).value == 1 / 4


# -- As a group, and on a random model -------------------------------------------------------------------------------


@pytest.mark.slow
def test_they_run_when_they_are_asked_for() -> None:
    assert GROUP in list_groups()
    assert tuple(list_analyses(group=GROUP)) == NAMES
    assert not set(NAMES) & set(list_analyses())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_is_complete(name: str, tmp_path: Path) -> None:
    """Grouped heads, gate and linear branch, and an excluded prompt: nothing is counted that has no effect."""
    study = setting_for(tiny_model("llama")).study
    result = run(name, study, target=4, min_gap=1e-6)
    verdict = result.findings.verdict
    assert verdict.outcome in ("holds", "holds in part", "does not hold", "undecided"), verdict.reason
    for part in verdict.parts:
        assert part.sentence.endswith(".") and (part.reason or part.rule.startswith("holds when")), part.name
    assert result.figure is not None and result.figure["data"] and result.findings.caption.endswith(".")
    again = AnalysisResult.load(result.save(tmp_path / name))
    assert again.findings.verdict.outcome == verdict.outcome
    assert hooks_left(study.model) == []


@pytest.mark.slow
def test_a_prompt_without_a_sink_is_left_out_and_not_zero() -> None:
    """Sums over edges are means over the prompts that have a sink."""
    study = setting_for(tiny_model("llama")).study
    gaps = run("upstream", study, target=4, min_gap=1e-6).findings
    effects = gaps.table[gaps.table.sender == "all"].effect
    assert np.isfinite(effects).all()
    edges = sl.circuits.Edges.of(sl.Setting.of(study, sl.PairChoice(4)), min_gap=0.0)
    start, end = edges.measure.ends("denoise")
    sizes = np.sort(np.abs(end - start))
    some = run("upstream", study, target=4, min_gap=float(sizes[:2].mean())).findings
    parts_n = {part.estimate.n for part in some.verdict.parts if part.estimate is not None}
    named = {x.n for name, x in some.numbers.items() if isinstance(x, sl.Estimate)}
    assert parts_n == named == {2}


@pytest.mark.smollm2
def test_mlps_make_smollm2_s_super_neurons_fire(smollm2: Any) -> None:
    """Not heads, by the paths that lead there directly."""
    study = Study(smollm2, sl.prompts.natural(smollm2, 2, 32))
    edges = sl.circuits.Edges.of(sl.Setting.of(study, sl.PairChoice(10)))
    sets = [
        edges.into(edges.graph.super_inputs, [node for node in edges.graph.senders if node.kind == kind])
        for kind in ("head", "mlp")
    ]
    heads, mlps = edges.at_once(sets, "denoise").mean(1)
    assert mlps > 0.8 and heads < 0.3
