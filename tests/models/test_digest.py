"""The digest of the weights: everything that changes a bit changes it, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.models import digest
from sinklens.models.digest import short_of, weight_digest
from tests.helpers.tiny import tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
SIZES = (0, 1, 7, 8192, 8193, 40_000, 500_001)
"""Empty, raw bytes, whole rows and a rest, several pieces on a CPU; the last with more sums than fit in one row."""


def bits(weight: Tensor) -> bytes:
    return short_of(weight).numpy().tobytes()


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 40
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def flip(values: Tensor, entry: int, bit: int) -> None:
    """Turn one bit of one entry over, in place and without a trace."""
    raw = values.detach().view(-1).view(torch.uint8).numpy()
    raw[entry * values.element_size() + bit // 8] ^= 1 << (bit % 8)


def changed(original: Tensor, by: Callable[[Tensor], Any]) -> Tensor:
    """A copy that ``by`` has changed in place, or has made another tensor of."""
    copied = original.clone()
    other = by(copied)
    return other if isinstance(other, Tensor) else copied


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_have_one_digest_and_it_is_short(dtype: torch.dtype) -> None:
    for size in SIZES:
        one = weight(size, dtype=dtype)
        assert bits(one) == bits(one.clone())
        assert len(bits(one)) <= 16384
        if 0 < size * one.element_size() <= 8192:
            assert bits(one) == one.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES[:4])
@pytest.mark.parametrize("size", SIZES[2:])
def test_every_flipped_bit_is_seen(size: int, dtype: torch.dtype) -> None:
    draw, values = random.Random(size), weight(size, dtype=dtype)
    flips = {(draw.randrange(size), draw.randrange(8 * values.element_size())) for _ in range(100)}
    flips.add((size - 1, 0))  # in the last word of the last row
    seen = {bits(values)}
    for entry, bit in list(flips)[: 100 if size < 100_000 else 20]:
        flip(values, entry, bit)
        seen.add(bits(values))
        flip(values, entry, bit)
    assert len(seen) == 1 + min(len(flips), 100 if size < 100_000 else 20)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_changes_that_keep_sums_and_signs_are_seen(dtype: torch.dtype) -> None:
    original = weight(12, 64, 96, dtype=dtype)
    turned: list[Callable[[Tensor], Any]] = [
        lambda w: w.__setitem__([0, 1], w[[1, 0]]),  # two heads
        lambda w: w[3].__setitem__([5, 60], w[3][[60, 5]]),  # two rows
        lambda w: w.view(-1).__setitem__([9, 8192 + 9], w.view(-1)[[8192 + 9, 9]]),  # one place in two rows of sums
        lambda w: w.view(-1).__setitem__([0, 1], w.view(-1)[[1, 0]]),
        lambda w: w.neg_(),
        lambda w: w.view(-1)[:2].neg_(),  # two sign bits
        lambda w: w.mul_(2),
        lambda w: w.transpose(1, 2).contiguous().view(w.shape),
        lambda w: w.flip(0),
        lambda w: w.roll(1, -1),
        lambda w: w.zero_(),
    ]
    found = {bits(original)} | {bits(changed(original, by)) for by in turned}
    assert len(found) == len(turned) + 1


def test_no_two_permutations_of_the_entries_agree() -> None:
    values = weight(9000)
    orders = [torch.randperm(9000, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert len({bits(values[order]) for order in orders}) == 200


def test_bits_count_not_values() -> None:
    zeros = torch.zeros(9000)
    assert bits(zeros) != bits(changed(zeros, lambda w: w[4000:4001].neg_()))
    assert bits(zeros) != bits(-zeros)
    nan = torch.full((9000,), torch.nan)
    other = changed(nan, lambda w: flip(w, 17, 3))
    assert other.isnan().all()
    assert bits(nan) != bits(other)
    assert bits(nan) == bits(nan.clone())


def test_entries_are_read_in_their_order_wherever_they_lie() -> None:
    for dtype in DTYPES:
        values = weight(300, 700, dtype=dtype)
        assert bits(values.t()) == bits(values.t().contiguous())
        assert bits(values[:, ::3]) == bits(values[:, ::3].contiguous())
        assert bits(values[0].expand(300, 700)) == bits(values[0].repeat(300, 1))
        assert bits(values.t()) != bits(values)
        assert bits(values.view(-1)[1:]) == bits(values.view(-1)[1:].clone())


def test_pieces_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device takes more rows at once, and sums them in another order."""
    values = weight(500_001)
    expected = bits(values)
    for rows in (1, 3, 256):
        monkeypatch.setattr(digest, "_ROWS", {"cpu": rows})
        assert bits(values) == expected
    keys = digest._keys(values.device)
    words = values.view(torch.int16)[: 8192 * 10].view(10, 8192)
    whole = torch.tensor(
        [[sum(map(int.__mul__, row, key)) for key in keys.long().t().tolist()] for row in words.tolist()]
    )
    assert torch.equal(digest._row_sums(values)[:10], whole)


def test_sums_stay_exact_at_the_largest_words() -> None:
    keys = digest._keys(torch.device("cpu"))
    assert torch.equal(keys, keys.round())
    assert keys.abs().max() <= 2**23
    assert 2**15 * keys.abs().sum(0).max() < 2**53
    assert (keys.abs().amin(0) < 2**12).all()  # spread over the range
    assert len(keys.unique(dim=0)) == len(keys)
    assert len(keys.t().unique(dim=0)) == keys.shape[1]


@pytest.mark.backend
@pytest.mark.parametrize("backend", ("hooked", "bridge"))
def test_a_write_without_a_trace_is_seen(backend: Any, tiny_bridge: Any) -> None:
    model = tiny_model("llama") if backend == "hooked" else tiny_bridge
    before = weight_digest(model)
    weights = [w for _, w in sorted(model.named_parameters()) if w.numel()]
    assert before == weight_digest(model)
    for held in (weights[0], weights[len(weights) // 2], weights[-1]):
        flip(held, held.numel() - 1, 0)
        assert weight_digest(model) != before
        flip(held, held.numel() - 1, 0)
    assert weight_digest(model) == before


def test_names_shapes_dtypes_and_ties_count() -> None:
    def made(**held: Tensor) -> Any:
        model: Any = torch.nn.Module()
        model.cfg = type("Config", (), {})()
        for name, values in held.items():
            setattr(model, name, values if isinstance(values, torch.nn.Parameter) else torch.nn.Parameter(values))
        return model

    a, b = weight(30, 400), weight(30, 400, seed=1)
    tied = torch.nn.Parameter(a)
    models = [
        made(a=a, b=b),
        made(a=b, b=a),
        made(a=a, c=b),
        made(a=a.view(400, 30), b=b),
        made(a=a.bfloat16(), b=b),
        made(a=a.bfloat16().float(), b=b),
        made(a=a, b=b, c=torch.empty(0)),
        made(a=a, b=b, c=torch.empty(0, 4)),
        made(a=a, b=a.clone()),
        made(a=tied, b=tied),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(digest, "config_text", lambda _: "{}")
        assert len({weight_digest(model) for model in models}) == len(models)
        assert weight_digest(models[0]) == weight_digest(made(b=b.clone(), a=a.clone()))


@pytest.mark.slow
def test_no_large_copy_is_made() -> None:
    """On the CPU, as torch counts it."""
    from torch.profiler import ProfilerActivity, profile

    values = weight(2000, 4000)  # 32 MB
    bits(values[:10])
    for held in (values, values.t()):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            bits(held)
        largest = max(event.cpu_memory_usage for event in seen.events() or [])
        assert largest < 16 << 20


def test_what_modules_compute_with_beside_weights_counts() -> None:
    """Somebody may have changed it after the model was loaded."""
    from sinklens.models.load import load_model

    for model in (tiny_model("llama"), load_model("tiny-sink", device="cpu")):
        seen = [weight_digest(model)]
        assert seen[0] == weight_digest(model)
        block = model.blocks[1]
        for owner, name, value in (
            (block.attn, "attn_scale", 2.0),
            (block.ln1, "eps", 0.1),
            (block.mlp, "act_fn", abs),
        ):
            was = getattr(owner, name)
            setattr(owner, name, value)
            seen.append(weight_digest(model))
            setattr(owner, name, was)
        assert len(set(seen)) == 4 and weight_digest(model) == seen[0]
