"""Softening, calibration, biases, gating, the dark subspace: against hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import interventions
from sinklens.errors import InputError, NotApplicableError
from sinklens.interventions.calibration import _as_many_others, calibrated, columns
from sinklens.interventions.softening import _dims
from sinklens.models.identities import block_weights
from sinklens.prompts import PromptBatch, from_tokens
from tests.helpers.tiny import D_MODEL, N_HEADS, N_LAYERS, each_once, hooks_left, slow_but, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH = 3, 9
MODELS = each_once(
    {
        "llama": ("llama", "auto"),
        "llama_bridge": ("llama", "bridge"),
        "gpt2": ("gpt2", "auto"),
        "gpt2_bridge": ("gpt2", "bridge"),
    }
)
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module", params=slow_but("llama", "gpt2_bridge", of=MODELS))
def shared(request: pytest.FixtureRequest) -> Any:
    return tiny_model(*MODELS[request.param])


@pytest.fixture
def model(shared: Any) -> Iterator[Any]:
    yield shared
    assert hooks_left(shared) == []


@pytest.fixture
def batch(model: Any) -> PromptBatch:
    return from_tokens(model, tiny_tokens(N, LENGTH))


def by_hand(names: list[str], change: Callable[[Tensor], Any]) -> list[tuple[str, Any]]:
    def hook(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        act = act.clone()
        change(act)
        return act

    return [(name, hook) for name in names]


def same(model: Any, batch: PromptBatch, hooks: Any, hand: Any) -> None:
    """The hooks move the logits, and to where the ones written by hand move them."""
    with torch.no_grad():
        expected = model.run_with_hooks(batch.tokens, fwd_hooks=hand)
        with model.hooks(fwd_hooks=hooks):
            found = model(batch.tokens)
        assert (expected - model(batch.tokens)).abs().max() > 1e-3, "the test would not notice a missing hook"
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def names(what: str, layers: range | list[int] = range(N_LAYERS)) -> list[str]:
    return [f"blocks.{layer}.{what}" for layer in layers]


# --- Softening -------------------------------------------------------------------------------------------------------


def test_softening_by_activation(model: Any, batch: PromptBatch) -> None:
    k, layers = round(0.25 * D_MODEL), range(1, N_LAYERS)

    def hook_of(layer: int) -> list[tuple[str, Any]]:
        weight = block_weights(model, layer).ln1_w.detach()

        def change(x: Tensor) -> None:
            for prompt in range(N):
                largest = (x[prompt, 0] * weight).abs().argsort(descending=True)[:k]
                x[prompt, 0, largest] *= 0.5

        return by_hand(names("ln1.hook_normalized", [layer]), change)

    hooks = interventions.soften(model, 1, rate=0.25, amount=0.5)
    same(model, batch, hooks, [hook for layer in layers for hook in hook_of(layer)])


def test_softening_by_weight(model: Any, batch: PromptBatch) -> None:
    written = block_weights(model, 1).W_out.detach().norm(dim=0)
    dims = written.argsort(descending=True)[:8]

    def change(x: Tensor) -> None:
        x[torch.arange(N)[:, None], torch.tensor([2, 0, 4])[:, None], dims] = 0

    hooks = interventions.soften(model, 1, ((2,), (0,), (4,)), layers=[2], rate=0.25, by="weight")
    same(model, batch, hooks, by_hand(names("ln1.hook_normalized", [2]), change))


def test_softening_at_random_takes_as_many(model: Any) -> None:
    drawn = [_dims(model, 1, 8, "random", seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(dims)) for dims in drawn] == [8, 8, 8]
    with pytest.raises(InputError, match="choose activation, weight, random"):
        interventions.soften(model, 1, by="size")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rate"):
        interventions.soften(model, 1, rate=1.5)


# --- Calibration -----------------------------------------------------------------------------------------------------


def by_the_letter(A: Tensor, threshold: float, beta: float, spare: tuple[int, ...]) -> Tensor:
    """One head, row by row, as the paper has it."""
    n, out = len(A), A.clone()
    sinks = [k for k in range(n) if k not in spare and float(A[:, k].sum()) / (n - k) > threshold]
    others = [k for k in range(n) if k not in sinks]
    for q in range(n):
        freed = (1 - beta) * float(A[q, sinks].sum())
        left = float(A[q, others].sum())
        if left > 0:
            out[q, sinks] = beta * A[q, sinks]
            out[q, others] = A[q, others] + freed * A[q, others] / left
    return out


@pytest.mark.parametrize("spare", [(0,), ()])
def test_calibration_as_the_paper_has_it(model: Any, batch: PromptBatch, spare: tuple[int, ...]) -> None:
    heads = {0: (1,), 2: (0, 3)}

    def hook_of(layer: int) -> list[tuple[str, Any]]:
        def change(pattern: Tensor) -> None:
            for prompt in range(N):
                for head in heads[layer]:
                    pattern[prompt, head] = by_the_letter(pattern[prompt, head], 0.2, 0.4, spare)
                    torch.testing.assert_close(pattern[prompt, head].sum(-1), torch.ones(LENGTH))

        return by_hand(names("attn.hook_pattern", [layer]), change)

    hooks = interventions.calibrate(heads, 0.2, spare=spare)
    same(model, batch, hooks, [hook for layer in heads for hook in hook_of(layer)])


def test_calibration_on_numbers() -> None:
    """Key 1 is a sink (scores 0.5, 0.65, 0.6): half of what it has goes to the others, by what they have."""
    A = torch.tensor([[1.0, 0, 0], [0.2, 0.8, 0], [0.3, 0.5, 0.2]])[None, None]
    sinks = columns(A, 0.6, (0,))
    assert sinks.tolist() == [[[False, True, False]]]
    expected = [[1, 0, 0], [0.6, 0.4, 0], [0.45, 0.25, 0.3]]
    torch.testing.assert_close(calibrated(A, sinks, 0.5)[0, 0], torch.tensor(expected))
    assert columns(A, 0.1, ()).all() and not columns(A, 0.99, ()).any()


def test_the_control_calibrates_as_many_others(model: Any, batch: PromptBatch) -> None:
    with torch.no_grad():
        pattern = model.run_with_cache(batch.tokens)[1]["blocks.1.attn.hook_pattern"]
    sinks = columns(pattern, 0.2, (0,))
    drawn = [_as_many_others(sinks, (0,), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    free = LENGTH - 1 - sinks.sum(-1)
    assert torch.equal(drawn[0].sum(-1), sinks.sum(-1).minimum(free))
    assert not (drawn[0] & sinks).any() and not drawn[0][..., 0].any()


@pytest.mark.slow
def test_heads_are_found_by_the_loss(model: Any, batch: PromptBatch) -> None:
    def loss(hooks: Any) -> float:
        with torch.no_grad():
            logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
        return float(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.tokens[:, 1:].flatten())
        )

    every = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    better = {pair for pair in every if loss(interventions.calibrate({pair[0]: [pair[1]]}, 0.2)) < loss([])}
    found = interventions.search_heads(model, batch, 0.2, candidates=len(every))
    assert {(layer, head) for layer, heads in found.items() for head in heads} == better
    assert 0 < len(better) < len(every)


def test_numbers_that_are_no_shares_are_refused() -> None:
    with pytest.raises(InputError, match="beta 2 must be between 0 and 1"):
        interventions.calibrate({0: [0]}, beta=2)


@pytest.mark.parametrize("head", [99, -1])
def test_a_head_that_is_not_there_is_refused(model: Any, batch: PromptBatch, head: int) -> None:
    told = pytest.raises(InputError, match=r"heads .* of block 0 are not all in 0\.\.")
    with told, model.hooks(interventions.calibrate({0: [head]})):
        model(batch.tokens)


# --- Biases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["mean", "zero"])
def test_biases_in_place_of_the_sink(model: Any, batch: PromptBatch, value: Any) -> None:
    where = torch.tensor([2, 0, 5])
    with torch.no_grad():
        cache = model.run_with_cache(batch.tokens)[1]
    means = {name: cache[name][torch.arange(N), where].mean(0) for what in "kv" for name in names(f"attn.hook_{what}")}
    bias = interventions.find_bias(model, batch, tuple((int(i),) for i in where))
    for layer in range(N_LAYERS):
        torch.testing.assert_close(bias.keys[layer], means[f"blocks.{layer}.attn.hook_k"], atol=1e-5, rtol=1e-5)

    def put(name: str, to: Any) -> list[tuple[str, Any]]:
        def change(act: Tensor) -> None:
            act[torch.arange(N), where] = to

        return by_hand([name], change)

    hand = [hook for name, mean in means.items() if "hook_k" in name for hook in put(name, mean)]
    hand += [
        hook for name, mean in means.items() if "hook_v" in name for hook in put(name, mean if value == "mean" else 0.0)
    ]
    hooks = interventions.bias_keys_values(bias, tuple((int(i),) for i in where), value=value)
    same(model, batch, hooks, hand)


def test_constants_that_are_there_already_change_nothing(model: Any, batch: PromptBatch) -> None:
    """One prompt's own key and value are their mean."""
    one = batch.subset([0])
    bias = interventions.find_bias(model, one, (3,))
    with torch.no_grad():
        found = model.run_with_hooks(one.tokens, fwd_hooks=interventions.bias_keys_values(bias, (3,)))
        torch.testing.assert_close(found, model(one.tokens), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="choose mean or zero"):
        interventions.bias_keys_values(bias, keys=False, value=None)


# --- Heads, and the dark subspace ------------------------------------------------------------------------------------


def test_gating(model: Any, batch: PromptBatch) -> None:
    def change(z: Tensor) -> None:
        z[:, :, [0, 2]] *= 0.25

    hooks = interventions.gate_heads(model, {1: [0, 2]}, 0.25)
    same(model, batch, hooks, by_hand(names("attn.hook_z", [1]), change))


def test_sink_heads_and_as_many_others(model: Any, batch: PromptBatch) -> None:
    with torch.no_grad():
        cache = model.run_with_cache(batch.tokens)[1]
    alpha = torch.stack([cache[name][..., 0].mean((0, 2)) for name in names("attn.hook_pattern")])
    below, above = alpha.flatten().sort().values[alpha.numel() // 2 - 1 :][:2].tolist()
    eps = (below + above) / 2  # no head's own, of which rounding would decide
    found = interventions.find_sink_heads(model, batch, eps=eps)
    torch.testing.assert_close(found.received, alpha)
    for layer, heads in found.heads.items():
        over = [head for head in range(N_HEADS) if alpha[layer, head] > eps]
        assert set(heads) <= set(over) and len(heads) == min(len(over), N_HEADS // 2)
        assert len(found.others[layer]) == len(heads) and not set(found.others[layer]) & set(heads)
    assert sum(map(len, interventions.find_sink_heads(model, batch, eps=eps, most=1).heads.values())) == 1
    with pytest.raises(NotApplicableError, match="has no sink heads to gate"):
        interventions.find_sink_heads(model, batch, eps=0.999)


def test_the_dark_subspace(model: Any, batch: PromptBatch) -> None:
    U, S, _ = torch.linalg.svd(model.W_U.detach().double(), full_matrices=False)
    assert (S[:-1] >= S[1:]).all()
    last = U[:, -3:]
    basis = interventions.dark_basis(model, 3 / D_MODEL).double()
    torch.testing.assert_close(basis @ basis.T, last @ last.T, atol=1e-5, rtol=1e-5)
    P = (last @ last.T).float()

    def change(x: Tensor) -> None:
        x -= x @ P

    hooks = interventions.remove_dark_subspace(model, 3 / D_MODEL, layers=[0, 1])
    same(model, batch, hooks, by_hand(names("hook_resid_post", [0, 1]), change))
    with pytest.raises(InputError, match="share 0 must be"):
        interventions.dark_basis(model, 0)
