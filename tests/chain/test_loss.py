"""What edits do to the loss, against plain hooks and a cross entropy by hand; and nothing else changes with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Tensor

from sinklens import edits
from sinklens.chain.agree import agreement
from sinklens.chain.result import OF_LOSS, ChainResult
from sinklens.chain.run import run_chain
from sinklens.chain.verdicts import summary
from sinklens.cli.fitting import stacked
from sinklens.cli.tables import chain_footer, chain_table
from sinklens.formation import find_formation
from sinklens.pages.page import render
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts.base import Readout
from sinklens.sites import LOGITS
from sinklens.stages import SUPER_NEURONS, VALUE_AGGREGATION, Experiment, Prediction, Setting, Stage
from sinklens.statistics import bootstrap_interval
from tests.helpers.made_results import made_result
from tests.helpers.parsed import Parsed
from tests.helpers.settings import LENGTH, TARGET, tokens_for
from tests.helpers.tiny import BACKENDS, N_LAYERS, tiny_model

pytestmark = [pytest.mark.backend, pytest.mark.slow]

N, NEURONS, BLOCK = 3, (3, 7), 1
ROOT = (0, 1)
LAST = (LENGTH - 1,)


def _back_itself(setting: Setting, stage: Stage, direction: Any, _generator: Any) -> Patch:
    """What the run has anyway at the last position, whose next token nobody knows."""
    patch = setting.patch(direction, stage.site, stage.layers(setting), edits.Transplant(), positions=LAST)
    assert patch.source is not None
    return replace(patch, source=replace(patch.source, run=patch.run), allow_unchanged=True)


IDLE = replace(
    VALUE_AGGREGATION,
    name="idle",
    experiments=(Experiment("put_back", _back_itself, Prediction(0, 0)),),
    readout=lambda _setting, _stage: Readout("idle", LOGITS, (N_LAYERS,), lambda logits, _rows: logits[:, TARGET, 0]),
)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model("llama", request.param)


def chain(model: Any, **options: Any) -> ChainResult:
    batch = from_tokens(model, tokens_for(model))
    formation = find_formation(model, batch, layer=BLOCK, super_neurons=list(NEURONS), outlier_dims=[2, 5])
    options = {"stages": (VALUE_AGGREGATION, SUPER_NEURONS), **options}
    return run_chain(
        model, batch, target=TARGET, formation=formation, min_gap=1e-9, control_draws=2, readout_blocks=1, **options
    )


@pytest.fixture(scope="module")
def result(model: Any) -> ChainResult:
    return chain(model, loss=True)


@pytest.fixture(scope="module")
def plain(model: Any) -> ChainResult:
    return chain(model)


def attend_self(pattern: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    new = pattern.clone()
    new[:, :, TARGET] = torch.nn.functional.one_hot(torch.tensor(TARGET), LENGTH).to(pattern)
    return new


def put(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """A hook that gives the MLP's activation at the target another value."""

    def hooked(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        new = act.clone()
        new[:, TARGET] = change(act[:, TARGET].clone())
        return new

    return hooked


MADE = [(f"blocks.{block}.attn.hook_pattern", attend_self) for block in ROOT]
POST = f"blocks.{BLOCK}.mlp.hook_post"


def loss_of(model: Any, hooks: list[Any]) -> np.ndarray:
    tokens = tokens_for(model)
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    chosen = -logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return chosen.mean(-1).numpy()


def rows_of(result: ChainResult, edit: str, direction: str, control: str = "", draw: int = 0) -> pd.DataFrame:
    table = result.effects.set_index(["stage", "edit", "direction", "control", "draw"]).sort_index()
    return table.loc[[("super_neurons", edit, direction, control, draw)]].sort_values("prompt")


def zeroed(units: Any) -> Callable[[Tensor], Tensor]:
    return lambda act: act.index_fill(1, torch.tensor(list(units)), 0)


def test_it_is_the_cross_entropy_under_plain_hooks_and_every_control_has_its_own(
    model: Any, result: ChainResult
) -> None:
    base, anchored = loss_of(model, []), loss_of(model, MADE)
    for run, expected in (("base", base), ("anchored", anchored)):
        assert np.allclose(result.runs[run]["loss"], expected, atol=1e-5)
    seen = {}
    for draw, control in ((0, ""), (0, "random_neurons"), (1, "random_neurons")):
        rows = rows_of(result, "zero", "noise", control, draw)
        expected = loss_of(model, [*MADE, (POST, put(zeroed(rows.units.iloc[0])))])
        assert np.allclose(rows.loss, expected, atol=1e-5)
        assert np.allclose(rows.loss_change, expected - anchored, atol=1e-5)
        seen[control, draw] = rows.loss_change.mean()
    assert len({round(value, 6) for value in seen.values()}) == 3  # else they could be mixed up
    kept: dict[str, Tensor] = {}
    loss_of(model, [*MADE, (POST, lambda act, hook: kept.update(post=act))])  # noqa: ARG005
    units = list(NEURONS)

    def transplanted(act: Tensor) -> Tensor:
        act[:, units] = kept["post"][:, TARGET][:, units]
        return act

    rows = rows_of(result, "transplant", "denoise")
    assert np.allclose(rows.loss_change, loss_of(model, [(POST, put(transplanted))]) - base, atol=1e-5)


def test_scores_are_means_over_prompts_with_their_interval(result: ChainResult) -> None:
    row = result.score("super_neurons", "zero", "noise")
    own = rows_of(result, "zero", "noise").loss_change
    assert row.loss_change == own.mean() and not np.isclose(row.loss_change, 0, atol=1e-6)
    assert (row.loss_change_low, row.loss_change_high) == bootstrap_interval(own, 0)
    control = result.score("super_neurons", "zero", "noise", "random_neurons")
    both = [rows_of(result, "zero", "noise", "random_neurons", draw).loss_change.mean() for draw in (0, 1)]
    assert control.loss_change == pytest.approx(np.mean(both))


def test_the_root_s_transplants_cost_just_what_the_runs_differ_by(result: ChainResult) -> None:
    base, anchored = (np.array(result.runs[run]["loss"]) for run in ("base", "anchored"))
    for direction, expected in (("denoise", anchored - base), ("noise", base - anchored)):
        found = result.score("value_aggregation", "transplant", direction).loss_change
        assert found == pytest.approx(expected.mean(), abs=1e-5) and abs(found) > 1e-3


def test_all_else_is_as_without_it(model: Any, result: ChainResult, plain: ChainResult, tmp_path: Path) -> None:
    assert not [name for table in (plain.scores, plain.effects) for name in table.columns if "loss" in name]
    assert "loss" not in plain.config and "loss" not in plain.runs["base"]
    for with_it, without in ((result.scores, plain.scores), (result.effects, plain.effects)):
        same = pd.DataFrame(with_it, columns=without.columns)
        assert_frame_equal(same, without, rtol=0, atol=1e-5)
    assert_frame_equal(chain(model, loss=False).scores, plain.scores, rtol=0, atol=0)
    plain.save(tmp_path / "plain")
    result.save(tmp_path / "loss")
    old, new = ChainResult.load(tmp_path / "plain"), ChainResult.load(tmp_path / "loss")
    again, before = (pd.DataFrame(each.scores, columns=pd.Index(OF_LOSS)) for each in (new, result))
    assert_frame_equal(again, before)
    assert not any(re.search(r"\bloss|nats", text) for text in texts(old))
    assert all(re.search(r"\bloss|nats", text) for text in texts(new))
    assert re.search(r"<th>[^<]*loss", new._repr_html_()) and "loss" not in old._repr_html_()
    assert set(agreement({"one": old, "other": new}).same) == {True}


def texts(result: ChainResult) -> list[str]:
    """The table on the terminal, the lines under it, and the summary, in lower case."""
    table = " ".join(text.plain for text in stacked(chain_table(result), 100))
    said = " ".join(sentence for _, sentences in summary(result)[1] for sentence in sentences)
    return [text.lower() for text in (table, " ".join(chain_footer(result)), said)]


def test_the_summary_says_it_with_the_control_beside(result: ChainResult) -> None:
    own, control = (result.score("super_neurons", "zero", "noise", name) for name in ("", "random_neurons"))
    (sentences,) = [sentences for name, sentences in summary(result)[1] if name == "Loss"]
    assert "Ablating the super neurons" in sentences[0]
    for row in (own, control):
        assert f"{abs(row.loss_change):.3f}" in sentences[0] and f"{abs(row.loss_change_high):.3f}" in sentences[0]
    assert sentences[0].index("random neurons") > sentences[0].index("zero")


def test_the_report_has_every_change_with_its_interval() -> None:
    result = made_result()
    scores = result.scores.copy()
    scores[[*OF_LOSS]] = [(1.5 + i / 100, 1 + i / 100, 2 + i / 100) for i in range(len(scores))]
    text = re.sub(r"\s+", " ", Parsed(render(replace(result, scores=scores))).text)
    for i in range(len(scores)):
        assert f"+{1.5 + i / 100:.3f} [{1 + i / 100:.3f}, {2 + i / 100:.3f}]" in text


def test_a_stage_that_does_nothing_costs_exactly_nothing(model: Any) -> None:
    found = chain(model, loss=True, stages=(IDLE, SUPER_NEURONS))
    idle = found.effects.query("stage == 'idle'")
    assert len(idle) == 2 * N and (idle.loss_change == 0).all()
    assert (found.scores.query("stage == 'idle'")[[*OF_LOSS]].to_numpy() == 0).all()
