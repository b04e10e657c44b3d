"""Each variant's attention against a few lines of float64 that are written from its paper, and what all must keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.decoder import Decoder, DecoderConfig
from sinklens.variants import REGISTRY, AttentionSizes, make_variant, variant_kind
from tests.helpers.decoders import CASES, SIZES, grouped, kept_decoder, made_decoder

TOKENS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))


# --- References: one block's attention from its normed input, prompt by prompt and head by head ----------------------


def turned(x: Tensor, base: float = 10000.0, first: int = 0) -> Tensor:
    """Rotary embeddings of ``[pos, d_head]``, as complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(len(x)) + first, base ** (-torch.arange(half) / half)).double()
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps) ** 0.5


def softmax(s: Tensor, logit: Tensor | None = None) -> Tensor:
    extra = torch.zeros(len(s), dtype=s.dtype) if logit is None else logit.exp()
    return s.exp() / (s.exp().sum(-1) + extra)[:, None]


def sigmoid(s: Tensor, **_: Any) -> Tensor:
    return 1 / (1 + (-s).exp())


def sigmoid_normalised(s: Tensor, **_: Any) -> Tensor:
    w = 1 / (1 + (math.log(16) - s).exp())
    return w / w.sum(-1, keepdim=True)


def softpick(s: Tensor, **_: Any) -> Tensor:
    over = (s.exp() - 1) * (s > -torch.inf)
    return over.clamp(min=0) / over.abs().sum(-1, keepdim=True)


def affine(s: Tensor, x: Tensor, p: dict, h: int, **_: Any) -> Tensor:
    alpha = (0.1 * x @ p["W"][:, h] + 0.5).clamp(0, 1)[:, None]
    n = torch.arange(1, len(s) + 1, dtype=s.dtype)[:, None]
    return ((alpha * softmax(s)) + (p["mean"][h] - alpha) / n).tril()


WEIGHTS = {
    "sigmoid": sigmoid,
    "sigmoid normalised": sigmoid_normalised,
    "softpick": softpick,
    "affine_scaled": affine,
    "softmax_off_by_one": lambda s, **_: softmax(s, torch.zeros(len(s), dtype=s.dtype)),
    "sink_logit": lambda s, p, h, **_: softmax(s, p["logit"][h].expand(len(s))),
    "k_bias": lambda s, p, h, q, **_: softmax(s, q @ p["k"][h // 2] / 8**0.5),
    "k_bias shared": lambda s, p, q, **_: softmax(s, q @ p["k"][0] / 8**0.5),
}


def reference(case: str, model: Decoder, layer: int, x: Tensor, token: Tensor | None) -> Tensor:
    """What a block's attention writes for one prompt's normed inputs ``[pos, d_model]``."""
    attn = model.blocks[layer].attn
    p = {name: value.detach().double() for name, value in attn.variant.named_parameters()}
    W_Q, W_K, W_V, W_O = (getattr(attn, f"W_{name}").detach().double() for name in "QKVO")
    x = x if token is None else torch.cat([token[None], x])
    q, k, v = (torch.einsum("pd,hde->hpe", x, W) for W in (W_Q, W_K, W_V))
    if case == "qk_norm":
        q, k = rms(q) * p["gain_q"], rms(k) * p["gain_k"]
    if case == "value_scale":
        v = v * (1 + v.pow(2).mean(-1, keepdim=True)) ** p["theta"].repeat_interleave(2)[:, None, None]
    if case != "no_positions":
        q, k = (torch.stack([turned(one) for one in each]) for each in (q, k))
    unseen = torch.ones(len(x), len(x)).tril() == 0
    if case == "window":
        unseen |= torch.ones(len(x), len(x)).tril(-4) == 1
    scores = (q @ k.mT / 8**0.5).masked_fill(unseen, -torch.inf)
    weigh = WEIGHTS.get(case, lambda s, **_: softmax(s))
    patterns = [weigh(scores[h], x=x, p=p, h=h, q=q[h]) for h in range(4)]
    if case == "differential":
        lam = (p["lq1"] @ p["lk1"]).exp() - (p["lq2"] @ p["lk2"]).exp() + 0.8 - 0.6 * math.exp(-0.3 * layer)
        patterns = [patterns[h - h % 2] - lam * patterns[h - h % 2 + 1] for h in range(4)]
    z = torch.stack([pattern @ v[h] for h, pattern in enumerate(patterns)], 1)  # [pos head d_head]
    if case == "kv_bias":
        logit = torch.stack([q[h] @ p["k"][h // 2] / 8**0.5 for h in range(4)])
        share = (logit.exp() / (scores.exp().sum(-1) + logit.exp())).mT[:, :, None]
        z = (1 - share) * z + share * p["v"].repeat_interleave(2, 0)
    if case.startswith("gate"):
        z = z / (1 + (-(x @ p["W"])).exp()).view(len(x), 4, -1)
    if case == "head_rmsnorm":
        z = rms(z) * p["gain"]
    if case == "differential":
        z = (rms(z.view(len(x), 2, -1)) * p["gain"] * (0.6 * math.exp(-0.3 * layer) + 0.2)).view(len(x), 4, -1)
    out = torch.einsum("phe,hed->pd", z, W_O)
    return out if token is None else out[1:]


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_a_reference_in_float64(case: str) -> None:
    model = made_decoder(case).double()
    x = torch.randn(12, SIZES["d_model"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token = model.sink_stream(2)
    with torch.no_grad():
        found = model.blocks[2].attn(x[None], token)[0]
        expected = reference(case, model, 2, x, token)
    assert found.std() > 1e-3
    # The tables of the rotation are float32, as those of other models are.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_every_variant_is_among_the_cases() -> None:
    own = {name for name, kind in REGISTRY.items() if kind.__module__.startswith("sinklens.")}  # other tests add theirs
    assert {variant for variant, _ in CASES.values()} == own


# --- What holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_future_tokens_change_nothing_and_training_computes_the_same(case: str) -> None:
    model = kept_decoder(case)
    changed = TOKENS.clone()
    changed[:, 8:] = 3
    with torch.no_grad():
        out = model(TOKENS)
        assert torch.equal(out[:, :8], model(changed)[:, :8])
        assert not torch.equal(out[:, 8:], model(changed)[:, 8:])
        trained = made_decoder(case).train()(TOKENS)  # without a pattern, where a kernel can
    torch.testing.assert_close(trained, out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """Of all parameters of the variant and of the input, in both ways of computing."""
    kv_heads = grouped(case) or 2
    sizes = {"d_model": 6, "n_layers": 1, "n_heads": 2 if kv_heads == 2 else 4, "d_head": 4, "d_mlp": 4}
    model = made_decoder(case, **sizes, n_key_value_heads=kv_heads if sizes["n_heads"] > 2 else None).double()
    attn = model.blocks[0].attn
    own = {name: w.detach().clone().requires_grad_() for name, w in attn.named_parameters() if w.requires_grad}
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    token = None if model.token is None else model.token.detach()

    def out(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(attn, dict(zip(own, weights, strict=True)), (x, token))

    for training in (False, True):
        attn.train(training)
        attn.variant.eval()  # whose running mean is no function
        assert torch.autograd.gradcheck(out, (x, *own.values()), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_options_are_all_that_it_takes_to_make_it_again(case: str) -> None:
    name, options = CASES[case]
    sizes = AttentionSizes(32, 4, 4, 8, 16, 1)
    made = make_variant(name, sizes, options)
    again = make_variant(name, sizes, made.options())
    assert again.options() == made.options()
    assert options.items() <= made.options().items()
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert set(made.drawn) <= dict(made.named_parameters()).keys()
    assert made.claim
    assert made.__doc__


@pytest.mark.slow
def test_common_parameters_start_alike_whatever_the_variant() -> None:
    start = dict(Decoder(DecoderConfig(**SIZES), seed=3).named_parameters())
    other = dict(Decoder(DecoderConfig(**SIZES), seed=4).named_parameters())
    for name in REGISTRY:
        torch.manual_seed(len(name))  # which nothing may depend on
        model = Decoder(DecoderConfig(**SIZES, variant=name), seed=3)
        for key, weight in model.named_parameters():
            if key in start:
                assert torch.equal(weight, start[key]), (name, key)
        again = dict(Decoder(DecoderConfig(**SIZES, variant=name), seed=3).named_parameters())
        assert all(torch.equal(weight, again[key]) for key, weight in model.named_parameters())
    assert not torch.equal(start["embed.W_E"], other["embed.W_E"])


def test_a_sink_token_is_a_token_in_front() -> None:
    """The stream of a softmax decoder whose prompt begins with one more token, of that embedding."""
    model = made_decoder("sink_token").double()
    plain = Decoder(DecoderConfig(**{**SIZES, "n_key_value_heads": 2, "d_vocab": 51})).double().eval()
    weights = {name: w for name, w in model.state_dict().items() if name != "token"}
    assert model.token is not None
    weights["embed.W_E"] = torch.cat([weights["embed.W_E"], model.token.detach()[None]])
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        longer = torch.cat([torch.full((2, 1), 50), TOKENS], 1)
        expected, cache = plain.run_with_cache(longer)
        found, ours = model.run_with_cache(TOKENS)
    torch.testing.assert_close(found, expected[:, 1:, :50], rtol=0, atol=1e-6)
    pattern = cache["blocks.2.attn.hook_pattern"][:, :, 1:, 1:]
    torch.testing.assert_close(ours["blocks.2.attn.hook_pattern"], pattern, rtol=0, atol=1e-6)


def test_the_running_mean_of_affine_scaled_moves_behind_a_step_alone_and_is_saved_with_the_weights() -> None:
    whole, split = (made_decoder("affine_scaled").train() for _ in range(2))
    before = whole.blocks[0].attn.variant.mean.clone()
    with torch.no_grad():
        whole(TOKENS)
        for row in TOKENS:
            split(row[None])
    assert torch.equal(whole.blocks[0].attn.variant.mean, before)
    whole.stepped()
    split.stepped()
    found = [model.blocks[0].attn.variant.mean for model in (whole, split)]
    assert not torch.equal(found[0], before)
    torch.testing.assert_close(found[0], found[1])
    whole.eval()(TOKENS)
    whole.stepped()
    assert torch.equal(found[0], whole.blocks[0].attn.variant.mean)
    assert not found[0].requires_grad
    assert "blocks.0.attn.variant.mean" in dict(whole.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "unknown variant 'nothing'; the known ones are softmax"),
        ("gate", {"kind": "sideways"}, "kind must be elementwise or headwise"),
        ("window", {"window": 0}, "window must be 1 or more"),
        ("softmax", {"window": 3}, "cannot be made with the options"),
        ("differential", {}, "heads come in pairs"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DecoderConfig(**SIZES, n_key_value_heads=2, variant=name, variant_options=options)


def test_a_file_that_registers_nothing_or_is_not_there(tmp_path: Any) -> None:
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = 1 +\n")
    for name, message in (("nothing", "registers no variant"), ("broken", "cannot be run"), ("absent", "no file")):
        with pytest.raises(InputError, match=message):
            variant_kind(str(tmp_path / f"{name}.py"))
