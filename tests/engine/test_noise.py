"""The trial of the packed pass in 16 bits: what rounding does is let pass, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import edits, readouts, sites
from sinklens.engine.packed import packed_model
from sinklens.engine.packed import proof as proof_of
from sinklens.engine.packed.noise import differs
from sinklens.engine.packed.of_bridge import BridgedModel
from sinklens.engine.packed.weights import PackedBlock, PackedModel
from sinklens.engine.run import PatchRunner
from sinklens.models.load import load_model
from sinklens.models.parts import Linear
from sinklens.patches import Patch
from tests.helpers.tiny import tiny_hf, tiny_tokens

LENGTH = 40
SHARP = [("bfloat16", 0, 8.0), ("float16", 0, 8.0)]
"""Bridges whose rounding is larger than it ordinarily is."""


def sharp(family: str, dtype: str, seed: int, times: float, backend: Any = "auto") -> Any:
    """A model whose scores are so large that rounding decides between keys."""
    hf = tiny_hf(family, seed=seed)
    for name, weight in hf.named_parameters():
        if "q_proj" in name or "k_proj" in name or "c_attn" in name:
            weight.data *= times
    return load_model(hf, dtype=dtype, device="cpu", backend=backend)


def packed(model: Any) -> PackedModel:
    return packed_model(model, LENGTH)


@pytest.mark.backend
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_right_ones_are_kept(family: str, dtype: str) -> None:
    for seed in range(9 if dtype == "bfloat16" else 3):  # what rounds more, more often
        for times in (1.0, 2.0) if family == "gpt2" else (1.0, 3.0, 8.0):
            model = sharp(family, dtype, seed, times)
            assert differs(model, packed(model), tiny_tokens(1, LENGTH, seed=seed)) is None, (seed, times)


def turned(block: PackedBlock) -> PackedBlock:
    assert block.rotary is not None
    return replace(
        block, rotary=replace(block.rotary, cos=block.rotary.cos.roll(1, 0), sin=block.rotary.sin.roll(1, 0))
    )


def other_way(block: PackedBlock) -> PackedBlock:
    assert block.rotary is not None
    return replace(block, rotary=replace(block.rotary, sin=-block.rotary.sin))


def window(block: PackedBlock) -> PackedBlock:
    place = torch.arange(LENGTH)
    return replace(block, seen=(place[:, None] >= place) & (place[:, None] - place < LENGTH // 2))


def swapped_heads(block: PackedBlock) -> PackedBlock:
    out = block.out.W.view(4, -1, block.out.W.shape[1])[[1, 0, 2, 3]].flatten(0, 1)
    return replace(block, out=Linear(out, block.out.b))


def without_norm(block: PackedBlock) -> PackedBlock:
    assert block.ln1 is not None and block.ln1.w is not None
    return replace(block, ln1=replace(block.ln1, w=torch.rand(len(block.ln1.w)).to(block.ln1.w) + 0.5))


def other_activation(block: PackedBlock) -> PackedBlock:
    assert block.mlp_parts is not None
    return replace(block, mlp_parts=replace(block.mlp_parts, act=torch.relu))


WRONG: dict[str, Callable[[PackedBlock], PackedBlock]] = {
    "scale": lambda block: replace(block, scale=block.scale * 1.5),
    "rotary shifted": turned,
    "rotary the other way": other_way,
    "window": window,
    "heads swapped": swapped_heads,
    "norm": without_norm,
    "activation": other_activation,
    "cap": lambda block: replace(block, cap=1.0),
    "multiplier": lambda block: replace(block, added=1.2),
}


class Planted(PackedModel):
    """A model of which one block is taken apart wrongly."""

    def __init__(self, right: PackedModel, change: Callable[[PackedBlock], PackedBlock]) -> None:
        super().__init__(right.model, right.length)
        self.right, self.change = right, change

    @property
    def keys_site(self) -> Any:
        return self.right.keys_site

    def take_apart(self, layer: int) -> PackedBlock:
        block = self.right.block(layer)
        return self.change(block) if layer == 2 else block


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_part_is_found(name: str, dtype: str) -> None:
    for times in (1.0, 2.0):
        model = sharp("llama", dtype, 0, times)
        why = differs(model, Planted(packed(model), WRONG[name]), tiny_tokens(1, LENGTH))
        assert why is not None and why.startswith("blocks.2."), (times, why)


@pytest.mark.slow
def test_a_reading_that_rounding_moves_does_not_end_the_packed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a wrong part moves does."""
    pytest.importorskip("transformer_lens.HookedTransformer")  # a bridge is held to more, before
    monkeypatch.setattr("sinklens.engine.packed.known.TOLERANCE", {torch.bfloat16: 1e-9, torch.float32: 1e-3})
    model = sharp("llama", "bfloat16", 0, 3.0)
    tokens = tiny_tokens(2, LENGTH)
    patches = [Patch(sites.Z, (1,), (5,), edits.Constant())]
    wanted = [readouts.attention_received("received", (2, 3), (5,), 2)]
    stats = PatchRunner(model, tokens, wanted, once=True).run(patches).stats
    assert stats.path == "packed", stats.reason

    def wrong(model: Any, length: int) -> PackedModel:
        return Planted(packed_model(model, length), WRONG["rotary shifted"])

    monkeypatch.setattr("sinklens.engine.run.packed_model", wrong)
    stats = PatchRunner(model, tokens, wanted, once=True).run(patches).stats
    assert stats.path == "model" and "blocks.2." in stats.reason and "rounding makes" in stats.reason


def test_float32_is_held_to_its_own_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Tensor) -> None:
        raise AssertionError("no trial of rounding in float32")

    monkeypatch.setattr("sinklens.engine.packed.noise.differs", never)
    monkeypatch.setattr("sinklens.engine.packed.known.TOLERANCE", {torch.float32: -1.0})
    model = sharp("llama", "float32", 0, 1.0)
    wanted = [readouts.attention_received("received", (2, 3), (5,), 2)]
    runner = PatchRunner(model, tiny_tokens(2, LENGTH), wanted, once=True)
    assert runner.run([Patch(sites.Z, (1,), (5,), edits.Constant())]).stats.path == "model"


def is_found(model: Any, change: Callable[[PackedBlock], PackedBlock], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the proof of a bridge finds a wrong part: it refuses it, or runs that MLP as the bridge does."""
    take_apart = BridgedModel.take_apart

    def planted(self: BridgedModel, layer: int) -> PackedBlock:
        block = take_apart(self, layer)
        run_whole = change is other_activation and block.mlp_parts is None  # by the bridge, rightly
        return change(block) if layer == 2 and not run_whole else block

    monkeypatch.setattr(BridgedModel, "take_apart", planted)
    found = proof_of.prove(model)
    monkeypatch.undo()
    return found.why_not is not None or 2 in found.whole


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize(("dtype", "seed", "times"), SHARP)
def test_the_proof_of_a_sharp_bridge_knows_its_noise(
    dtype: str, seed: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharp("llama", dtype, seed, times, "bridge")
    found = proof_of.prove(model)
    assert found.why_not is None and not found.whole and "blocks.2.hook_resid_post" in found.proven
    monkeypatch.setattr(proof_of, "trial", lambda *_: ("nothing is let pass", set()))
    assert proof_of.prove(model).why_not is not None, "not sharp: this tests nothing"


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("name", list(WRONG))
def test_the_proof_of_a_bridge_in_16_bits_finds_a_wrong_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for times in (1.0, 2.0):
        model = sharp("llama", "bfloat16", 0, times, "bridge")
        assert is_found(model, WRONG[name], monkeypatch), times
