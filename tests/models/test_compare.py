"""What is loaded is the model that was given: every family against Hugging Face, and planted faults that are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sinklens.errors import InputError
from sinklens.models import backends, compare
from sinklens.models.backends import has_hooked_transformer
from sinklens.models.families import FAMILIES, random_model
from sinklens.models.given import private_copy
from sinklens.models.load import load_model
from sinklens.models.view import is_bridge
from tests.helpers.tiny import hooks_left, on_both, slow_but, tiny_hf

pytestmark = pytest.mark.slow

QUICK = ("llama3", "gemma3", "opt_post", "cohere", "granite", "olmoe", "deepseek_v3", "gpt_oss")
"""Scaled rotary, windows, norms behind, turned neighbours, multipliers, experts, latent keys, learned sinks."""
DTYPES = (torch.float32, torch.bfloat16)

needs_hooked = pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has no HookedTransformer")


def tokens(length: int = 40, size: int = 101) -> torch.Tensor:
    return torch.randint(3, size, (2, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def off(model: Any, hf: Any, on: torch.Tensor | None = None) -> float:
    """Largest difference of the logits, in standard deviations."""
    on = tokens() if on is None else on
    theirs = hf(on, use_cache=False).logits
    return ((model(on, return_type="logits") - theirs).abs().max() / theirs.std()).item()


@pytest.mark.backend
@pytest.mark.parametrize("family", slow_but(*QUICK, of=FAMILIES))
@torch.no_grad()
def test_every_family_is_hugging_faces(family: str) -> None:
    hf = random_model(family)
    model = load_model(hf, device="cpu")
    assert is_bridge(model) != (FAMILIES[family].hooked and has_hooked_transformer())
    theirs = private_copy(hf)(tokens(), use_cache=False, output_attentions=True)
    assert theirs.logits.std() > 1  # not degenerate: agreement means something
    shown: dict[int, torch.Tensor] = {}
    names = {f"blocks.{layer}.attn.hook_pattern": layer for layer in range(4)}
    hooks = [(name, lambda x, at=layer, **_: shown.__setitem__(at, x.clone())) for name, layer in names.items()]
    own = hooks_left(model)  # some bridges have hooks of their own
    with model.hooks(fwd_hooks=hooks):
        logits = model(tokens(), return_type="logits")
    assert (logits - theirs.logits).abs().max() < 1e-3
    assert list(shown) == [0, 1, 2, 3]
    for layer, pattern in enumerate(theirs.attentions or ()):
        torch.testing.assert_close(shown[layer], pattern, atol=1e-4, rtol=0)
    assert hooks_left(model) == own
    assert model.cfg.n_ctx == (64 if family != "bloom" else 2048)


@pytest.mark.backend
@pytest.mark.parametrize("family", slow_but("llama", "cohere", of=FAMILIES))
def test_every_family_in_sixteen_bits(family: str) -> None:
    hf = random_model(family)
    model = load_model(hf, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        exact, rounded = hf(tokens()).logits, private_copy(hf, dtype=torch.bfloat16)(tokens()).logits.float()
        ours = model(tokens(), return_type="logits").float()
    assert (ours - exact).square().mean() < 4 * (rounded - exact).square().mean() + 1e-3


# -- Windows and lengths ----------------------------------------------------------------------------------------------


@pytest.mark.backend
@pytest.mark.parametrize("window", [12, 700])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_the_conversion_drops(family: str, window: int) -> None:
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    hf = random_model(family, **options, max_position_embeddings=2048, num_hidden_layers=2)
    assert off(load_model(hf, device="cpu"), hf, tokens(window + 20)) < 1e-3
    if has_hooked_transformer():
        with pytest.raises(InputError, match="wrongly"):
            load_model(hf, device="cpu", backend="hooked")


@needs_hooked
def test_a_window_that_the_conversion_keeps_is_compared_short(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = random_model("mistral", sliding_window=700, max_position_embeddings=2048)
    seen = compare.probe(hf)
    assert seen.windows == {"sliding_window": 700} and seen.tokens.shape[1] < 30
    assert hf.config.sliding_window == 700
    model = load_model(hf, device="cpu", backend="hooked")
    assert model.cfg.window_size == 700 and off(model, hf, tokens(720)) < 1e-3
    convert = backends._convert

    def widens(*args: Any) -> Any:
        converted = convert(*args)
        if converted.cfg.window_size == 700:
            converted.cfg.window_size = 800
        return converted

    monkeypatch.setattr(backends, "_convert", widens)
    with pytest.raises(InputError, match="window"):
        load_model(hf, device="cpu", backend="hooked")


def test_the_context_is_the_configs() -> None:
    hf = random_model("llama", max_position_embeddings=131072, num_hidden_layers=1)
    model = load_model(hf, device="cpu")
    assert model.cfg.n_ctx == 131072
    assert off(model, hf, tokens(3000)[:1]) < 1e-3  # past the first tables of rotary embeddings, which grow


def test_rotary_scaling_that_depends_on_the_length_is_left_to_the_bridge() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    hf = random_model("llama", rope_parameters=scaling)
    model = load_model(hf, device="cpu")
    assert is_bridge(model) and off(model, hf) < 1e-3


@needs_hooked
def test_a_wrong_scaling_of_slow_rotary_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hardly shows in short prompts, so the frequencies are compared by themselves."""
    scaling = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    hf = random_model("llama", rope_parameters=scaling, max_position_embeddings=65536)
    assert not is_bridge(load_model(hf, device="cpu"))
    convert = backends._convert

    def unscaled(hf_model: Any, dtype: torch.dtype, device: torch.device) -> Any:
        plain = private_copy(hf_model)
        plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        return convert(plain, dtype, device)

    monkeypatch.setattr(backends, "_convert", unscaled)
    with pytest.raises(InputError, match="other speeds"):
        load_model(hf, device="cpu", backend="hooked")


# -- Planted faults ---------------------------------------------------------------------------------------------------


def drops_a_bias(model: Any) -> None:
    model.blocks[2].attn._b_K.zero_()


def widens_the_window(model: Any) -> None:
    for block in model.blocks:
        block.attn.attn_type = "global"


def scales_attention(model: Any) -> None:
    model.blocks[1].attn.attn_scale *= 1.02


def swaps_heads(model: Any) -> None:
    model.blocks[3].attn.W_O[:] = model.blocks[3].attn.W_O.flip(0)


def drops_a_multiplier(model: Any) -> None:
    model.blocks[0].mlp.W_out /= 1.05


def drops_a_norm_weight(model: Any) -> None:
    model.blocks[1].ln2.w.fill_(1.0)


def keeps_an_old_weight(model: Any) -> None:
    model.blocks[2].mlp.W_in[3] = 0


PLANTED = (
    drops_a_bias,
    widens_the_window,
    scales_attention,
    swaps_heads,
    drops_a_multiplier,
    drops_a_norm_weight,
    keeps_an_old_weight,
)


SAME = tuple((dtype, dtype) for dtype in DTYPES)
OTHER = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))


@needs_hooked
@pytest.mark.parametrize(
    ("fault", "given", "dtype"),
    [
        pytest.param(fault, *dtypes, id=f"{fault.__name__}-{'-'.join(map(str, dtypes))}")
        for number, fault in enumerate(PLANTED)
        for dtypes in (*SAME, OTHER[number % 2])
    ],
)
@torch.no_grad()
def test_a_wrong_conversion_is_found(
    fault: Callable[[Any], None], given: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = tiny_hf("qwen2") if fault is drops_a_bias else tiny_hf("mistral", sliding_window=12)
    for parameter in hf.parameters():  # as from_pretrained(dtype=) does it, which rounds no rotary frequencies
        parameter.data = parameter.data.to(given)
    convert = backends._convert

    def wrong(*args: Any) -> Any:
        converted = convert(*args)
        with torch.no_grad():
            fault(converted)
        return converted

    assert not is_bridge(load_model(hf, device="cpu", dtype=dtype))
    monkeypatch.setattr(backends, "_convert", wrong)
    with pytest.raises(InputError, match="wrongly"):
        load_model(hf, device="cpu", dtype=dtype, backend="hooked")
    assert is_bridge(load_model(hf, device="cpu", dtype=dtype))


@needs_hooked
@torch.no_grad()
def test_a_fault_of_the_second_conversion_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = backends._convert

    def stale(hf_model: Any, dtype: torch.dtype, device: torch.device) -> Any:
        converted = convert(hf_model, dtype, device)
        if dtype == torch.bfloat16:
            keeps_an_old_weight(converted)
        return converted

    monkeypatch.setattr(backends, "_convert", stale)
    with pytest.raises(InputError, match=r"its weight blocks\.2\.mlp\.W_in"):
        load_model(tiny_hf("llama"), device="cpu", dtype="bfloat16", backend="hooked")


def scales_attention_a_little(model: Any) -> None:
    model.blocks[1].attn.attn_scale *= 1.002


def adds_more_to_the_norms(model: Any) -> None:
    model.blocks[0].ln1.eps *= 100


def has_another_activation(model: Any) -> None:
    model.blocks[1].mlp.act_fn = torch.nn.functional.gelu


def turns_a_position_late(model: Any) -> None:
    model.blocks[2].attn.rotary_sin.copy_(model.blocks[2].attn.rotary_sin.roll(1, 0))


def caps_the_logits(model: Any) -> None:
    model.cfg.output_logits_soft_cap = 50.0


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "fault",
    [
        scales_attention_a_little,
        adds_more_to_the_norms,
        has_another_activation,
        turns_a_position_late,
        caps_the_logits,
        swaps_heads,
        drops_a_norm_weight,
    ],
)
def test_a_fault_of_the_conversion_in_sixteen_bits_alone(
    fault: Callable[[Any], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of them change the logits by less than the rounding does."""
    convert = backends._convert

    def wrong(hf_model: Any, precision: torch.dtype, device: torch.device) -> Any:
        converted = convert(hf_model, precision, device)
        if precision == dtype:
            with torch.no_grad():
                fault(converted)
        return converted

    monkeypatch.setattr(backends, "_convert", wrong)
    with pytest.raises(InputError, match="wrongly"):
        load_model(tiny_hf("llama"), device="cpu", dtype=dtype, backend="hooked")


@pytest.mark.backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["a bias", "scaling", "an old weight"])
@torch.no_grad()
def test_a_fault_of_the_bridge_in_sixteen_bits_alone(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = backends._build_bridge

    def wrong(hf_model: Any, name: str) -> Any:
        if hf_model.lm_head.weight.dtype == dtype:
            layer = hf_model.model.layers[1]
            if what == "a bias":
                layer.self_attn.k_proj.bias.data.zero_()
            elif what == "scaling":
                layer.self_attn.scaling *= 1.002
            else:
                layer.mlp.up_proj.weight.data[3] = 0
        return build(hf_model, name)

    monkeypatch.setattr(backends, "_build_bridge", wrong)
    with pytest.raises(InputError, match="TransformerBridge computes .* wrongly"):
        load_model(tiny_hf("qwen2"), device="cpu", dtype=dtype, backend="bridge")


@pytest.mark.backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["scaling", "norm", "heads"])
@torch.no_grad()
def test_a_wrong_bridge_is_refused(what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    build = backends._build_bridge

    def wrong(hf_model: Any, name: str) -> Any:
        if what == "scaling":
            hf_model.model.layers[1].self_attn.scaling *= 1.02
        if what == "norm":
            hf_model.model.layers[2].post_attention_layernorm.weight.data = torch.ones(32, dtype=hf_model.dtype)
        if what == "heads":
            proj = hf_model.model.layers[1].self_attn.o_proj
            proj.weight.data = proj.weight.data.view(32, 4, 8).flip(1).reshape(32, 32)
        return build(hf_model, name)

    monkeypatch.setattr(backends, "_build_bridge", wrong)
    with pytest.raises(InputError, match="TransformerBridge computes .* wrongly"):
        load_model(tiny_hf("llama"), device="cpu", dtype=dtype, backend="bridge")


@pytest.mark.backend
@pytest.mark.parametrize("family", ["cohere", "llama"])
@torch.no_grad()
def test_a_pattern_that_is_shown_and_not_used_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = compare.look_loaded

    def shows_another(*args: Any) -> Any:
        seen = look(*args)
        return compare.Sight(seen.logits, {layer: one.flip(0) for layer, one in seen.patterns.items()})

    monkeypatch.setattr(compare, "look_loaded", shows_another)
    with pytest.raises(InputError, match="attention in block 0"):
        load_model(tiny_hf(family), device="cpu", backend="bridge")


@pytest.mark.backend
def test_biases_too_small_for_sixteen_bits_are_kept() -> None:
    hf = tiny_hf("llama", attention_bias=True)
    for name, parameter in hf.named_parameters():
        parameter.data = parameter.data.mul(0.1 if name.endswith("proj.bias") else 1).to(torch.bfloat16)
    model = load_model(hf, dtype="float32", device="cpu")
    assert off(model, private_copy(hf, dtype=torch.float32)) < 1e-3


# -- Models too large for a float32 copy ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", on_both("llama", "gemma3", "gpt_oss", of=FAMILIES))
def test_a_large_model_is_compared_by_its_first_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SMALL", 40_000)
    monkeypatch.setattr(compare, "_VOCABULARY", 50)
    hf = random_model(family)
    seen = compare.probe(hf)
    assert not seen.whole and seen.tokens.max() < 101
    assert sum(p.numel() for p in seen.model.parameters()) < sum(p.numel() for p in hf.parameters())
    assert off(load_model(hf, device="cpu"), hf) < 1e-3
    load_model(hf, device="cpu", dtype="bfloat16")


@needs_hooked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [2, 3])
@torch.no_grad()
def test_a_fault_in_a_late_block_of_a_large_model(
    layer: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SMALL", 40_000)
    convert = backends._convert

    def wrong(*args: Any) -> Any:
        converted = convert(*args)
        if len(converted.blocks) == 4:
            converted.blocks[layer].mlp.W_out /= 1.3
        return converted

    monkeypatch.setattr(backends, "_convert", wrong)
    with pytest.raises(InputError, match="wrongly"):
        load_model(tiny_hf("llama"), device="cpu", dtype=dtype, backend="hooked")
