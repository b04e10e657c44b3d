"""A compiled model learns what the model itself learns, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sinklens.errors import InputError
from sinklens.lab import compiling
from tests.helpers.lab import trained


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_an_eager_one_and_one_graph_for_all_blocks(tmp_path):
    from torch._dynamo.utils import counters

    counters.clear()
    eager = trained(tmp_path / "eager", steps=6)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = trained(tmp_path / "compiled", steps=6, compile=True)
    assert counters["stats"]["unique_graphs"] == 2  # that of a block and that of the loss
    assert compiled.loss.loss.tolist() == pytest.approx(eager.loss.loss.tolist(), abs=1e-4)


def of_other_blocks(wrap):
    """In the place of :func:`compiling.by_blocks`: blocks as ``wrap`` makes them."""

    def by_blocks(model):
        other = compiling.copy.copy(model)
        other._modules = dict(model._modules)
        other.blocks = nn.ModuleList(wrap(block) for block in model.blocks)
        return other

    return by_blocks


class _Of(nn.Module):
    def __init__(self, block, function):
        super().__init__()
        self.block, self.function = block, function

    def forward(self, x, token=None):
        return self.function(self.block(x, token), x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda out, x: out.detach() + x - x.detach(),
        lambda out, x: out + 0.2 * x.roll(1, -1),
        lambda out, _x: out.detach(),
    ],
    ids=["no gradient of blocks", "something added", "nothing learned below"],
)
def test_a_compiled_model_that_learns_something_else_is_refused(function, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda one: one)
    monkeypatch.setattr(compiling, "by_blocks", of_other_blocks(lambda block: _Of(block, function)))
    with pytest.raises(InputError, match="learns something else"):
        trained(tmp_path / "one", steps=12, compile=True)


@pytest.mark.slow
def test_blocks_that_are_the_models_own_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda one: one)
    monkeypatch.setattr(compiling, "by_blocks", of_other_blocks(lambda block: _Of(block, lambda out, _x: out)))
    one, two = trained(tmp_path / "one", compile=True), trained(tmp_path / "two")
    assert one.loss.loss.tolist() == two.loss.loss.tolist()


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_is_refused_in_one_sentence(tmp_path, monkeypatch):
    def failing(_model):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(compiling, "by_blocks", failing)
    with pytest.raises(InputError, match=r"cannot be compiled here \(no such luck\): leave compile out"):
        trained(tmp_path / "one", compile=True)
