"""Stages and their experiments: what they are made of, and when one cannot be asked."""

from __future__ import annotations

from dataclasses import replace
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
from sinklens.prompts import from_tokens
from sinklens.readouts.build import attention_received
from sinklens.stages.base import Prediction
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


def test_an_edit_by_its_name_is_the_one_that_a_sweep_makes() -> None:
    """In a stage of one's own ``mean`` and ``resample`` put the same there as in a sweep of that stage."""
    model = tiny_model("llama")
    setting = setting_for(model)
    for name in ("zero", "mean", "resample", "transplant"):
        build = stages.edited(name)
        patch = build(setting, stages.VALUE_AGGREGATION, "noise", torch.Generator())
        scored = run_patches(
            model,
            setting.batch,
            [patch],
            [attention_received(SINK, (2, 3), setting.pair.target, N)],
            runs=setting.pair.runs,
        )
        swept = sl.sweep(
            model,
            setting.batch,
            target=TARGET,
            formation=setting.formation,
            stages="value_aggregation",
            layers=0,
            window=len(patch.layers),
            edits=name,
            directions="noise",
            readout_layers="2-3",
            min_gap=0,
            seed=setting.study.seed,
        )
        table = swept.table.sort_values("prompt")
        assert table.window.unique().tolist() == [patch.layers[-1]] and patch.layers[0] == 0
        np.testing.assert_allclose(scored.values[SINK][0], table.value, rtol=1e-5)
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
