"""How far runs agree: counted by hand."""

from __future__ import annotations

import math

import pytest

from sinklens.chain.agree import Said, agreement, agreement_text, compare, run_chains
from sinklens.errors import InputError
from sinklens.prompts import from_tokens
from sinklens.stages import SUPER_NEURONS
from tests.helpers.planted import planted_model, prompts
from tests.helpers.synthetic import synthetic_result

RUNS = {
    "a": [Said("s", "x", "agrees", 1.0), Said("s", "y", "against", 0.2), Said("s", "c", "agrees", 0.0, control=True)],
    "b": [Said("s", "x", "agrees", 0.8), Said("s", "y", "agrees", 0.9), Said("s", "c", "against", 0.7, control=True)],
    "c": [Said("s", "x", "agrees", math.nan), Said("s", "y", "agrees", 0.7), Said("t", "z", "agrees", 1.0)],
}


def test_verdicts_are_counted_and_estimates_spread() -> None:
    x, y, c, z = compare(RUNS).to_dict("records")
    assert (x["n_runs"], x["n_same"], x["same"], x["spread"]) == (3, 3, True, pytest.approx(0.2))
    assert (y["n_runs"], y["n_same"], y["same"], y["verdict"]) == (3, 2, False, "agrees")
    assert (y["mean"], y["least"], y["most"], y["value: a"]) == (pytest.approx(0.6), 0.2, 0.9, 0.2)
    assert (c["n_runs"], c["control"]) == (2, True)
    assert (z["n_runs"], z["verdict: c"]) == (1, "agrees") and not isinstance(z["verdict: a"], str)


def test_a_line_says_which_verdicts_of_edits_differ() -> None:
    assert agreement_text(compare(RUNS), "three runs") == (
        "1 of 2 verdicts are the same for three runs; they differ in s y (a against, b agrees, c agrees; from 0.200 to "
        "0.900)."
    )
    lacking = {"a": RUNS["a"][1:2], "b": RUNS["b"][1:2], "c": [Said("t", "z", "agrees", 1.0)]}
    assert "s y (a against, b agrees; from" in agreement_text(compare(lacking), "three runs")
    many = {name: [Said("s", f"x{i}", verdict, 0.5) for i in range(7)] for name, verdict in (("a", "1"), ("b", "2"))}
    assert agreement_text(compare(many), "two runs").endswith(
        "they differ in s x0, s x1, s x2, s x3, s x4, s x5 and s x6 (the table has how)."
    )
    same = {name: said[:1] for name, said in RUNS.items()}
    assert agreement_text(compare(same), "three runs") == "1 of 1 verdicts are the same for three runs."
    assert agreement_text(compare({"a": RUNS["a"]}), "one run") == "There is nothing to compare between one run."


def test_a_chain_agrees_with_itself() -> None:
    result = synthetic_result()
    table = agreement({"once": result, "again": result})
    assert len(table) == len(result.scores) and table.same.all() and not table.spread.dropna().any()
    assert table.control.sum() == (result.scores.control != "").sum()


@pytest.mark.slow
def test_several_targets() -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = planted_model()
    batch = from_tokens(model, prompts(16).repeat(2, 1))
    results = run_chains(model, batch, targets=(5, 7), stages=(SUPER_NEURONS,))
    assert [results[target].config["target"] for target in (5, 7)] == [5, 7]
    for targets, sentence in (((), "at least one target"), ((5, 5), "named twice"), ((5, 99), "must be in 1..14")):
        with pytest.raises(InputError, match=sentence):
            run_chains(model, batch, targets=targets)
