"""Stages and their experiments: what they are made of, and when one cannot be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens import edits, stages
from sinklens.chain.run import _trials
from sinklens.chain.scoring import SINK
from sinklens.engine.run import run_patches
from sinklens.errors import InputError, NotApplicableError
from sinklens.pairs import EDITS, Direction, NamedEdit
from sinklens.pairs.ablations import edit_fingerprint
from sinklens.pairs.choice import DIRECTIONS
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts.build import attention_received
from sinklens.sites import SITES, Z
from sinklens.stages.base import Prediction, Setting
from tests.helpers.settings import TARGET, N, setting_for, tokens_for
from tests.helpers.tiny import tiny_model


@pytest.mark.slow
@pytest.mark.backend
def test_a_norm_behind_the_mlp_is_not_passed_over():
    """Gemma-2 normalises what its MLP writes: contributions read off W_out would be wrong, and are refused."""
    model = tiny_model("gemma2", "bridge")
    batch = from_tokens(model, tokens_for(model))
    setting = setting_for(model)
    with pytest.raises(NotApplicableError, match="cannot be read off W_out"):
        refused = [e for e in stages.DOWN_PROJECTION.experiments if e.edit in ("outlier_dims", "densified")]
        _trials(setting, (replace(stages.DOWN_PROJECTION, experiments=tuple(refused)),), 1)
    trials, skipped = _trials(setting, stages.CHAIN, 1)
    assert set(skipped) == {"down_projection/outlier_dims", "down_projection/densified"}
    assert all("off by" in why for why in skipped.values())
    patches = [replace(trial.patch, allow_unchanged=True) for trial in trials]
    result = run_patches(
        model, batch, patches, [attention_received(SINK, (2, 3), (TARGET,), N)], runs=setting.pair.runs
    )
    assert torch.isfinite(result.values[SINK]).all()


def test_an_edit_is_put_on_the_stage_s_own_units() -> None:
    """That of the transplant is the shared experiment's patch, in both directions."""
    setting, generator = setting_for(tiny_model("llama")), torch.Generator()
    for direction in ("denoise", "noise"):
        patch = stages.edited(edits.Transplant())(setting, stages.SUPER_NEURONS, direction, generator)
        shared = stages.TRANSPLANT.build(setting, stages.SUPER_NEURONS, direction, generator)
        assert isinstance(patch.edit, edits.Transplant) and patch.units == setting.neurons
        for name in ("site", "layers", "positions", "units", "run", "source"):
            assert getattr(patch, name) == getattr(shared, name), name


EXCHANGED = ["sink_mean", "mean_exchanged"]


def in_a_sweep(setting: Setting, name: str, direction: str, patch: Patch) -> np.ndarray:
    """What an edit by its name gives in a sweep that edits the stage's blocks at once, two prompts at a time."""
    swept = sl.sweep(
        setting.model,
        setting.batch,
        target=TARGET,
        formation=setting.formation,
        stages="value_aggregation",
        layers=0,
        window=len(patch.layers),
        edits=name,
        directions=direction,
        readout_layers="2-3",
        min_gap=0,
        seed=setting.study.seed,
        group_size=2,
    )
    table = swept.table.sort_values("prompt")
    assert table.window.unique().tolist() == [patch.layers[-1]] and patch.layers[0] == 0
    return table.value.to_numpy()


def scored(setting: Setting, patch: Patch) -> np.ndarray:
    readout = attention_received(SINK, (2, 3), setting.pair.target, N)
    return run_patches(setting.model, setting.batch, [patch], [readout], runs=setting.pair.runs).values[SINK][0].numpy()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", sorted({*EDITS} - {"resample"}))
def test_an_edit_by_its_name_is_the_one_that_a_sweep_makes(name: str, direction: Direction) -> None:
    """In a stage of one's own an edit puts the same there as in a sweep of that stage."""
    setting = setting_for(tiny_model("llama"))
    patch = stages.edited(name)(setting, stages.VALUE_AGGREGATION, direction, torch.Generator())
    np.testing.assert_allclose(in_a_sweep(setting, name, direction, patch), scored(setting, patch), rtol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("name", "experiment"),
    [("sink_mean", "no_variance"), ("deviation_exchanged",) * 2, ("mean_exchanged",) * 2, ("zero", "no_write")],
)
def test_the_chain_s_fairer_edits_can_be_swept(name: str, experiment: str, direction: Direction) -> None:
    """They are those of the stage, block by block: over all its blocks at once they give its number."""
    setting, stage = setting_for(tiny_model("llama")), stages.VALUE_AGGREGATION
    (own,) = [each for each in stage.experiments if each.edit == experiment and not each.control]
    patch = own.build(setting, stage, direction, torch.Generator())
    np.testing.assert_allclose(in_a_sweep(setting, name, direction, patch), scored(setting, patch), rtol=1e-5)


def test_means_over_prompts_of_the_natural_sink_are_of_each_prompt_s_own_position() -> None:
    """From a full cache, in float64: sinks lie at 0, 2 and 1, ordinary positions where they were drawn."""
    model = tiny_model("llama")
    setting = setting_for(model, "natural")
    pair, n = setting.pair, setting.batch.n
    sinks, ordinary = (where.single(n) for where in (pair.target, pair.reference))
    assert len(set(sinks.tolist())) == n
    _, cache = model.run_with_cache(setting.batch.tokens)
    for layer in (0, 2):
        z = cache[Z.at(layer)].double()
        with_sink, without = (z[torch.arange(n), where] for where in (sinks, ordinary))
        shift = with_sink.mean(0) - without.mean(0)
        expected = {"deviation_exchanged": without + shift, "mean_exchanged": with_sink - shift}
        for name, by_hand in expected.items():
            edit = setting.edit("noise", name, Z, (layer,))
            assert isinstance(edit, edits.PerPrompt)
            np.testing.assert_allclose(edit.values[layer], by_hand, rtol=1e-4, atol=1e-6)
        same = setting.edit("noise", "sink_mean", Z, (layer,))
        assert isinstance(same, edits.Constant) and same.values is not None
        np.testing.assert_allclose(same.values[layer], with_sink.mean(0), rtol=1e-4, atol=1e-6)


def test_what_is_drawn_is_another_in_every_draw() -> None:
    setting = setting_for(tiny_model("llama"))
    build = stages.edited("resample")
    found = [
        build(setting, stages.VALUE_AGGREGATION, "noise", torch.Generator().manual_seed(seed)).edit.fingerprint()
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["sink_mean", "mean_exchanged", "deviation_exchanged"])
def test_a_mean_over_prompts_is_refused_where_there_is_none(name: str) -> None:
    setting = setting_for(tiny_model("llama"))
    for site in (site for site in SITES.values() if "key" in site.axes):
        with pytest.raises(InputError, match="would be no attention: choose another site or edit"):
            setting.edit("noise", name, site, (1,))
    with pytest.raises(InputError, match="need at least 2 prompts, there is 1"):
        replace(setting, study=setting.study.first(1)).edit("noise", name, Z, (1,))
    with pytest.raises(InputError, match="direction 'Noise' must be denoise or noise"):
        setting.edit("Noise", name, Z, (1,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked", [{"edits": "sink_mean", "stages": "pattern"}, {"stages": "z", "companions": "pattern:mean_exchanged:1"}]
)
def test_a_sweep_of_such_an_edit_leaves_no_folder(asked: dict[str, str], tmp_path: Path) -> None:
    setting = setting_for(tiny_model("llama"))
    given: dict[str, Any] = {"target": TARGET, "formation": setting.formation, "layers": "1", "out": tmp_path / "swept"}
    with pytest.raises(InputError, match="the mean over prompts of pattern would be no attention"):
        sl.sweep(setting.model, setting.batch, **asked, **given)
    assert not (tmp_path / "swept").exists()


def test_only_an_edit_that_exchanges_is_told_the_direction() -> None:
    """Any other is one for both directions, whichever task is the first to make it."""
    setting, told = setting_for(tiny_model("llama")), []

    def make(context: Any) -> edits.Edit:
        told.append(context.direction)
        return edits.Constant("zero")

    one, each = NamedEdit("one", make), NamedEdit("one", make, exchanges=True)
    for named in (one, each):
        for direction in DIRECTIONS:
            setting.edit(direction, named, Z, (1,))
    assert told == [None, None, "denoise", "noise"]
    assert edit_fingerprint(one) != edit_fingerprint(each)
    with pytest.raises(InputError, match="the edit 'none' must make an Edit, not something of type NoneType"):
        setting.edit("noise", NamedEdit("none", lambda _: None), Z, (1,))  # type: ignore[arg-type, return-value]


def test_what_is_no_experiment_is_refused_in_a_stage() -> None:
    told = r"must be such as Experiment\(name, edited\(edit\), predicted\), not of type function"
    with pytest.raises(InputError, match=told):
        replace(stages.VALUE_AGGREGATION, experiments=(stages.edited("mean"),))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layers of stage 'value_aggregation' must be a function of a Setting"):
        replace(stages.VALUE_AGGREGATION, layers=(1,))  # type: ignore[arg-type]


def test_what_is_exchanged_is_exchanged_at_the_target() -> None:
    setting = setting_for(tiny_model("llama"))
    with pytest.raises(InputError, match="edit mean_exchanged exchanges what the two runs have at the target: leave"):
        sl.sweep(
            setting.model, setting.batch, target=TARGET, formation=setting.formation, positions="2-4", edits=EXCHANGED
        )


def test_no_edit_has_another_name() -> None:
    with pytest.raises(InputError, match="edit 'meen' is not known: choose from transplant, zero, mean, resample"):
        stages.edited("meen")


def test_a_prediction_is_by_direction() -> None:
    def build(*_: Any) -> Any:
        raise AssertionError

    two = stages.Experiment("zero", build, (0.25, 0.75))  # type: ignore[arg-type]
    assert two.predicted == Prediction(denoise=0.25, noise=0.75)
    assert (two.predicted.of("denoise"), two.predicted.of("noise")) == (0.25, 0.75)
    for nonsense in (1, "ab", (1,), (1, 2, 3), None, {"denoise": 1}):
        with pytest.raises(InputError, match="'zero': predicted is .* must be a Prediction or two numbers"):
            stages.Experiment("zero", build, nonsense)  # type: ignore[arg-type]


def test_stages_are_given_themselves_or_by_name() -> None:
    assert stages.stages_of("qk_locking") == stages.stages_of(stages.QK_LOCKING) == (stages.QK_LOCKING,)
    assert stages.stages_of(["qk_locking", stages.SUPER_NEURONS]) == (stages.QK_LOCKING, stages.SUPER_NEURONS)
    for wrong, told in (("locking", "not 'locking'"), (3, "not of type int"), ([None], "not of type NoneType")):
        with pytest.raises(InputError, match=f"a stage must be a Stage or the name of one .*{told}"):
            stages.stages_of(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="give at least one stage"):
        stages.stages_of([])


def test_help_of_a_function_with_the_chain_as_a_default_can_be_read() -> None:
    import inspect

    import sinklens as sl

    assert len(str(inspect.signature(sl.run_chain))) < 1500
