"""sinklens against a second implementation (hf_chain), which shares no code with it, on the real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens import prompts
from sinklens.chain.result import ChainResult
from sinklens.chain.run import run_chain
from sinklens.formation import Formation, find_formation
from sinklens.models.load import REGISTRY
from sinklens.stages import EARLY_MLPS, QK_LOCKING, SUPER_NEURONS, VALUE_AGGREGATION
from tests.helpers import hf_chain
from tests.helpers.hf_chain import Recording, Swap

pytestmark = pytest.mark.smollm2

TARGET = 10
# An odd number of prompts, and of tokens beside the first, so that a median is the same by every definition.
N_PROMPTS, LENGTH = 5, 32
# Absolute. The two agree to about 1e-7 and 1e-6.
METRIC_TOLERANCE, EFFECT_TOLERANCE = 1e-5, 1e-4
STAGES = ("value_aggregation", "super_neurons", "qk_locking")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: on a busy machine more threads mostly wait for each other, several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch(smollm2: Any) -> prompts.PromptBatch:
    return prompts.natural(smollm2, n=N_PROMPTS, length=LENGTH)


@pytest.fixture(scope="module")
def formation(smollm2: Any, batch: prompts.PromptBatch) -> Formation:
    return find_formation(smollm2, batch)


@pytest.fixture(scope="module")
def result(smollm2: Any, batch: prompts.PromptBatch, formation: Formation) -> ChainResult:
    # With all their edits and controls: those run in the same batches as the transplants, and must not leak.
    stages = (VALUE_AGGREGATION, EARLY_MLPS, SUPER_NEURONS, QK_LOCKING)
    return run_chain(smollm2, batch, target=TARGET, stages=stages, formation=formation, control_draws=1)


@dataclass
class Second:
    """The second implementation's runs. Of sinklens it is told where the sink forms, and nothing else."""

    model: Any
    tokens: Tensor
    layer: int
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        self.up_to = range(self.layer + 1)
        self.after = range(self.layer + 1, self.layer + 5)
        self.base = hf_chain.forward(self.model, self.tokens)
        self.anchored = self.run(alone=(TARGET, self.up_to))

    def run(self, **options: Any) -> Recording:
        return hf_chain.forward(self.model, self.tokens, n_blocks=self.after.stop, **options)

    def metric(self, run: Recording) -> np.ndarray:
        return hf_chain.metric(run, TARGET, self.after).numpy()

    def of_swaps(self, direction: str, swaps: Sequence[Swap], *, masked: bool = True) -> np.ndarray:
        """The effect of some swaps, per prompt."""
        denoise = direction == "denoise"
        alone = None if denoise or not masked else (TARGET, self.up_to)
        patched = self.metric(self.run(alone=alone, swaps=swaps))
        base, anchored = self.metric(self.base), self.metric(self.anchored)
        return (patched - base if denoise else anchored - patched) / (anchored - base)

    def replaced(self, edit: str, direction: str) -> list[Swap]:
        """What the edits that replace an activation put at the target, from the two runs."""
        here, there = (self.base, self.anchored) if direction == "denoise" else (self.anchored, self.base)
        early = range(self.layer)
        if edit in ("mlps_alone", "attention_alone"):
            of_mlps, of_attention = (there, here) if edit == "mlps_alone" else (here, there)
            return [
                Swap(hf_chain.MLP_OUT, early, TARGET, of_mlps),
                Swap(hf_chain.ATTN_OUT, self.up_to, TARGET, of_attention),
            ]
        place, blocks = (hf_chain.KEY, self.after) if edit == "constant_key" else (hf_chain.Z, self.up_to)

        def put(block: int) -> Tensor:
            sink, base = self.anchored.seen[place, block], self.base.seen[place, block]
            mine, other = here.seen[place, block], there.seen[place, block]
            return {
                "no_variance": sink.mean(0, keepdim=True).expand_as(sink),
                "constant_key": sink.mean(0, keepdim=True).expand_as(sink),
                "ordinary_write": base.mean(0, keepdim=True).expand_as(base),
                "no_write": torch.zeros_like(sink),
                "mean_exchanged": mine - mine.mean(0) + other.mean(0),
                "deviation_exchanged": other - other.mean(0) + mine.mean(0),
            }[edit]

        made = Recording(seen={(place, block): put(block) for block in blocks})
        return [Swap(place, blocks, TARGET, made)]

    def effect(self, stage: str, direction: str, *, position: int = TARGET, masked: bool = True) -> np.ndarray:
        """Per prompt; `position` and `masked` are for doing it wrong."""
        source = self.anchored if direction == "denoise" else self.base
        swap = {
            "value_aggregation": Swap(hf_chain.Z, self.up_to, position, source),
            "super_neurons": Swap(hf_chain.POST, [self.layer], position, source, self.neurons),
            "qk_locking": Swap(hf_chain.KEY, self.after, position, source),
        }[stage]
        return self.of_swaps(direction, [swap], masked=masked)


def n_hooks(model: Any) -> int:
    """Transformers keeps some of its own, so there may be more than none."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def second(batch: prompts.PromptBatch, formation: Formation) -> Iterator[Second]:
    load = REGISTRY["smollm2"].load
    assert load is not None
    model, _ = load()
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32
    runs = Second(model.eval(), batch.tokens, formation.layer, formation.neurons)
    hooks = n_hooks(model)
    yield runs
    assert n_hooks(model) == hooks


def effects_of(result: ChainResult, stage: str, direction: str, edit: str = "transplant") -> np.ndarray:
    rows = result.effects.to_dict("records")
    mine = [row for row in rows if (row["stage"], row["direction"]) == (stage, direction)]
    mine = [row for row in mine if (row["edit"], row["control"]) == (edit, "")]
    assert [row["prompt"] for row in mine] == list(range(N_PROMPTS))
    return np.array([row["effect"] for row in mine])


@pytest.mark.parametrize("run", ["base", "anchored"])
def test_metric_of_both_runs(result: ChainResult, second: Second, run: str) -> None:
    found = second.metric(getattr(second, run))
    np.testing.assert_allclose(result.runs[run]["sink"], found, rtol=0, atol=METRIC_TOLERANCE)


def test_the_intervention_makes_a_sink(second: Second) -> None:
    # Otherwise everything else here compares noise with noise.
    assert (second.metric(second.anchored) - second.metric(second.base) > 0.1).all()
    for block in second.up_to:
        row = second.anchored.attention[block][:, :, TARGET]
        assert torch.equal(row, torch.eye(LENGTH)[TARGET].expand_as(row))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("stage", STAGES)
def test_effect_of_a_transplant(result: ChainResult, second: Second, stage: str, direction: str) -> None:
    found = second.effect(stage, direction)
    np.testing.assert_allclose(effects_of(result, stage, direction), found, rtol=0, atol=EFFECT_TOLERANCE)
    if stage == "value_aggregation":
        np.testing.assert_allclose(found, 1, rtol=0, atol=EFFECT_TOLERANCE)


REPLACED = {
    "value_aggregation": ("no_variance", "no_write", "ordinary_write", "mean_exchanged", "deviation_exchanged"),
    "early_mlps": ("mlps_alone", "attention_alone"),
    "qk_locking": ("constant_key",),
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("stage", "edit"), [(stage, edit) for stage, edits in REPLACED.items() for edit in edits])
def test_effect_of_a_replacement(result: ChainResult, second: Second, stage: str, edit: str, direction: str) -> None:
    found = second.of_swaps(direction, second.replaced(edit, direction))
    np.testing.assert_allclose(effects_of(result, stage, direction, edit), found, rtol=0, atol=EFFECT_TOLERANCE)


@pytest.mark.parametrize(
    ("stage", "direction", "wrong"),
    [
        ("super_neurons", "denoise", {"position": TARGET + 1}),
        ("super_neurons", "noise", {"masked": False}),
        ("qk_locking", "noise", {"masked": False}),
    ],
)
def test_a_mistake_would_show(
    result: ChainResult, second: Second, stage: str, direction: str, wrong: dict[str, Any]
) -> None:
    off = np.abs(effects_of(result, stage, direction) - second.effect(stage, direction, **wrong))
    assert off.max() > 10 * EFFECT_TOLERANCE


def norms(run: Recording, place: hf_chain.Place) -> np.ndarray:
    """`[block prompt pos]`"""
    blocks = sorted(block for where, block in run.seen if where == place)
    return torch.stack([run.seen[place, block] for block in blocks]).norm(dim=-1).numpy()


def robust_z(x: np.ndarray) -> np.ndarray:
    deviation = x - np.median(x)
    return deviation / (1.4826 * np.median(np.abs(deviation)))


def test_formation_profile(formation: Formation, second: Second) -> None:
    profile, run = formation.profile.set_index("layer"), second.base
    assert profile.index.tolist() == list(range(len(second.model.model.layers)))

    def agrees(column: str, expected: Sequence[float] | np.ndarray) -> None:
        np.testing.assert_allclose(profile[column], expected, rtol=1e-4, atol=1e-6, err_msg=column)

    for when, place in (("before", hf_chain.RESID_PRE), ("after", hf_chain.RESID_POST)):
        norm = norms(run, place)
        first, others = norm[:, :, 0], np.median(norm[:, :, 1:], axis=-1)
        agrees(f"norm_sink_{when}", np.median(first, axis=-1))
        agrees(f"norm_other_{when}", np.median(others, axis=-1))
        agrees(f"ratio_{when}", np.median(first / others, axis=-1))
    agrees("attn_norm", np.median(norms(run, hf_chain.ATTN_OUT)[:, :, 0], axis=-1))
    agrees("mlp_norm", np.median(norms(run, hf_chain.MLP_OUT)[:, :, 0], axis=-1))
    heads = np.stack([hf_chain.received(attention, 0).numpy() for attention in run.attention])
    agrees("attention_sink", heads.mean((1, 2)))
    agrees("sink_rate", (heads > 0.3).mean((1, 2)))
    others = [[float(hf_chain.received(a, k).mean()) for k in range(1, LENGTH - 1)] for a in run.attention]
    agrees("attention_other", np.mean(others, axis=-1))


def test_formation_block_and_sink_position(formation: Formation, second: Second) -> None:
    run = second.base
    given = [torch.stack([hf_chain.received(a, k).mean(-1) for k in range(LENGTH * 3 // 4)]) for a in run.attention]
    assert formation.sink_positions == tuple(torch.stack(given).mean(0).argmax(0).tolist()) == (0,) * N_PROMPTS
    before, after = norms(run, hf_chain.RESID_PRE), norms(run, hf_chain.RESID_POST)
    ratio = [np.median(n[:, :, 0] / np.median(n[:, :, 1:], axis=-1), axis=-1) for n in (before, after)]
    assert formation.layer == int(np.argmax(ratio[1] - ratio[0]))


def test_super_neurons(formation: Formation, second: Second) -> None:
    mlp = second.model.model.layers[formation.layer].mlp
    gate_z = robust_z(mlp.gate_proj.weight.detach().double().norm(dim=1).numpy())
    up_z = robust_z(mlp.up_proj.weight.detach().double().norm(dim=1).numpy())
    post = second.base.seen[hf_chain.POST, formation.layer].numpy()
    first = post[:, 0].mean(0)
    others = np.quantile(np.abs(post[:, 1:]).reshape(-1, post.shape[-1]).astype(float), 0.95, axis=0)
    chosen = np.flatnonzero((np.minimum(gate_z, up_z) >= 5) & (np.abs(first) >= 10 * others))
    assert formation.neurons == tuple(sorted(chosen.tolist(), key=lambda i: -abs(first[i])))
    for neuron in formation.super_neurons:
        i = neuron.index
        found = [neuron.activation_sink, neuron.activation_other, neuron.gate_z, neuron.up_z]
        np.testing.assert_allclose(found, [first[i], others[i], gate_z[i], up_z[i]], rtol=1e-4)


def test_outlier_dims(formation: Formation, second: Second) -> None:
    neurons = list(formation.neurons)
    weight = second.model.model.layers[formation.layer].mlp.down_proj.weight.detach()[:, neurons]
    written = (second.base.seen[hf_chain.POST, formation.layer][:, 0, neurons] @ weight.T).mean(0).numpy()
    z = robust_z(np.abs(written))
    assert set(formation.dims) == set(np.flatnonzero(z >= 10).tolist())
    for dim in formation.outlier_dims:
        np.testing.assert_allclose([dim.written, dim.z], [written[dim.index], z[dim.index]], rtol=1e-4)
