"""What replaces an activation, and that its control is a change of the same size: prompt by prompt, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import stages
from sinklens.edits import PerPrompt
from sinklens.sites import RESID_POST, Z
from tests.helpers.settings import setting_for
from tests.helpers.tiny import tiny_model

SIZED = [e.edit for e in stages.VALUE_AGGREGATION.experiments if e.control == "random_change"]
DIRECTIONS = ("denoise", "noise")


@pytest.fixture(scope="module")
def setting() -> stages.Setting:
    return setting_for(tiny_model("llama"))


def values(setting: stages.Setting, stage: stages.Stage, edit: str, control: str, direction: Any) -> dict[int, Tensor]:
    (found,) = [e for e in stage.experiments if (e.edit, e.control) == (edit, control)]
    made = found.build(setting, stage, direction, setting.study.generator("test")).edit
    assert isinstance(made, PerPrompt)
    return dict(made.values)


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("edit", SIZED)
def test_the_control_changes_as_much_in_another_direction(setting: stages.Setting, edit: str, direction: str) -> None:
    """From the run that is patched where something is carried over, from the one with the sink where it is taken."""
    stage = stages.VALUE_AGGREGATION
    carried = edit in ("deviation_exchanged", "mean_exchanged")
    run = setting.pair.without if carried and direction == "denoise" else setting.pair.with_sink
    start = setting.at(run, Z, stage.layers(setting))
    own, control = (values(setting, stage, edit, name, direction) for name in ("", "random_change"))
    for layer, x in start.items():
        if edit != "random_write":  # that one is drawn, and drawn anew for its control
            torch.testing.assert_close(norms(control[layer] - x), norms(own[layer] - x), rtol=1e-4, atol=1e-6)
        assert (norms(control[layer] - own[layer]) > 0.1 * norms(own[layer] - x)).all()


def test_mean_and_deviation_are_all_there_is(setting: stages.Setting) -> None:
    """Either exchanged alone, the two changes add up to the whole exchange; and a random write has the sink's norm."""
    stage = stages.VALUE_AGGREGATION
    layers = stage.layers(setting)
    base, sink = (setting.at(run, Z, layers) for run in (setting.pair.without, setting.pair.with_sink))
    mean, deviation = (values(setting, stage, f"{name}_exchanged", "", "denoise") for name in ("mean", "deviation"))
    write = values(setting, stage, "random_write", "", "denoise")
    other = values(setting, stage, "no_variance", "other_prompt", "noise")
    for layer in layers:
        changes = (mean[layer] - base[layer]) + (deviation[layer] - base[layer])
        torch.testing.assert_close(changes, sink[layer] - base[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norms(write[layer]), norms(sink[layer]), rtol=1e-4, atol=1e-6)
        assert not any(torch.equal(other[layer][i], sink[layer][i]) for i in range(len(sink[layer])))
        assert {tuple(x.flatten().tolist()) for x in other[layer]} == {tuple(x.flatten().tolist()) for x in sink[layer]}


def test_a_spike_elsewhere_is_as_large(setting: stages.Setting) -> None:
    """Made dense or moved, what takes the place of the outlier dimensions' change has its norm."""
    stage, dims = stages.DOWN_PROJECTION, list(setting.formation.dims)
    block = (setting.formation.layer,)
    sink, base = (
        setting.at(run, RESID_POST, block)[block[0]] for run in (setting.pair.with_sink, setting.pair.without)
    )
    spike = torch.zeros_like(sink)
    spike[:, dims] = (sink - base)[:, dims]
    for control in ("", "spike_moved"):
        put = values(setting, stage, "dense_direction", control, "noise")[block[0]] - (sink - spike)
        torch.testing.assert_close(put.norm(dim=-1), spike.norm(dim=-1), rtol=1e-4, atol=1e-6)
        moved = (put.abs() > 1e-6).sum(-1)
        assert (moved <= len(dims)).all() if control else (moved > len(dims)).all()
    flipped = values(setting, stage, "spike_flipped", "", "noise")[block[0]]
    torch.testing.assert_close(flipped[:, dims], -sink[:, dims])
