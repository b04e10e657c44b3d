"""Causes: chosen experiments of a stage as parts of a verdict, scored once; and which model's sink variance makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sinklens import stages
from sinklens.analysis import causes
from sinklens.analysis.causes import cause, scored
from sinklens.analysis.of_stage import of_stage
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.formation import find_formation
from sinklens.pairs import PairChoice
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.analyses import study
from tests.helpers.planted import MIRROR, OUTLIER, SUPER, planted_model, prompts

TARGET = 5

pytest.importorskip("transformer_lens.HookedTransformer")


def planted(*, symmetric: bool = False) -> Study:
    """The planted model on two prompts; in the symmetric one the target is a plus in one and a minus in the other."""
    model, tokens = planted_model(symmetric=symmetric), prompts(16)
    if symmetric:
        tokens[1] = 1 - tokens[0]
    batch = from_tokens(model, tokens)
    neurons = [SUPER, MIRROR] if symmetric else [SUPER]
    formation = find_formation(model, batch, layer=0, super_neurons=neurons, outlier_dims=[OUTLIER])
    return Study.of(model, batch, replace(formation, sink_positions=(0, 0)))


@pytest.mark.slow
@pytest.mark.parametrize(("symmetric", "outcome"), [(False, "does not hold"), (True, "holds")])
def test_variance_decay_tells_the_model_in_which_variance_is_the_cause(symmetric, outcome):
    found = run_analysis(load_analysis("variance_decay"), planted(symmetric=symmetric), target=TARGET, permutations=50)
    part = found.findings.verdict.part("cause")
    assert part.outcome == outcome, part
    assert part.estimate is not None and part.estimate.value == pytest.approx(float(symmetric), abs=2e-3)
    assert part.control_estimate is not None and part.control_estimate.value == pytest.approx(1.0 - symmetric, abs=2e-3)
    assert part.detail.endswith(f"beyond one half in {float(symmetric):.0%} of the prompts")


def test_the_planted_neuron_is_the_cause_and_the_reason_is_said():
    here = planted()
    silenced = cause(here, stages.SUPER_NEURONS, "zero", "random_neurons", target=TARGET, name="silenced")
    assert (silenced.about, silenced.name, silenced.outcome) == ("cause", "silenced", "holds")
    assert silenced.sentence == stages.SUPER_NEURONS.claim and silenced.rule.startswith("holds when")
    assert "position 5" in silenced.statistic and silenced.p_value is not None


@pytest.mark.slow
def test_what_was_scored_is_not_scored_again(monkeypatch: pytest.MonkeyPatch):
    here, calls = planted(), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return score_chain(*args, **options)

    score_chain = causes.score_chain
    monkeypatch.setattr(causes, "score_chain", counted)
    ask: Any = (here, stages.SUPER_NEURONS, "zero", "random_neurons")
    first, again = cause(*ask, target=TARGET), cause(*ask, target=PairChoice(TARGET))
    assert first == again and len(calls) == 1
    cause(*ask, target=TARGET + 2)
    cause(*ask, target=TARGET, draws=3)
    here.seed = 1
    cause(*ask, target=TARGET)
    assert len(calls) == 4


def test_experiments_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="stage super_neurons has no experiment nothing, random_neurons: give"):
        cause(study(), stages.SUPER_NEURONS, "nothing", "random_neurons")
    with pytest.raises(InputError, match="no experiment same_norm"):
        cause(study(), stages.SUPER_NEURONS, "zero", "same_norm")


@pytest.mark.parametrize("error", [NoSinkError("no sink here"), NotApplicableError("no gate here")])
def test_a_cause_that_cannot_be_asked_is_not_measurable(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise error

    monkeypatch.setattr(causes, "score_chain", refuse)
    part = cause(study(), stages.SUPER_NEURONS, "zero", "random_neurons")
    assert (part.outcome, part.reason) == ("not measurable", str(error))


def test_a_sink_is_made_where_the_prompts_have_room():
    here = planted()
    short = Study.of(here.model, here.batch.subset(range(2)), here.formation)
    assert causes.induced(short) == 10
    tight = from_tokens(here.model, prompts(16)[:, :4])
    with pytest.raises(NotApplicableError, match="10, 5, 20"):
        causes.induced(Study.of(here.model, tight, here.formation))
    with pytest.raises(NotApplicableError):
        scored(Study.of(here.model, tight, here.formation), stages.SUPER_NEURONS, None)


@pytest.mark.slow
def test_an_analysis_of_a_stage_makes_no_views(monkeypatch):
    """It shows the scores and the stage's own readout: checks and views of the pair would be passes for nothing."""

    def unwanted(_setting):
        raise AssertionError("a pass for what is not shown")

    for name in ("pair_checks", "first_prompt"):
        monkeypatch.setattr(f"sinklens.chain.run.{name}", unwanted)
    found = run_analysis(of_stage(stages.SUPER_NEURONS, "Super neurons"), planted(), target=TARGET)
    quantity = found.findings.verdict.parts[-1]
    assert quantity.about == "quantity" and quantity.estimate is not None
