"""What a model computes is measured: planted faults are found, and what holds is not refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import sites
from sinklens.edits import AttendSelf
from sinklens.errors import NotApplicableError
from sinklens.formation import Formation
from sinklens.models.identities import (
    HOOKS,
    IDENTITIES,
    TOLERANCE,
    _but_for_rounding,
    check_writes_directly,
    error_of,
    identities,
    require,
)
from sinklens.models.load import load_model
from sinklens.models.writes import check_writable
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts.base import Readout
from sinklens.study import Study
from tests.helpers.tiny import BACKENDS, HOOKED, N_LAYERS, hooks_left, slow_but, tiny_hf, tiny_model, tiny_tokens

ALL = range(N_LAYERS)
BEHIND = {"heads_write", "neurons_write"}
"""What a norm or a multiplier behind the sublayers takes."""
FAILS = {
    "gemma2": BEHIND,
    "gemma3": BEHIND,
    "granite": BEHIND,
    "olmo2": BEHIND | {"neurons_read", "norm_before_attention", "norm_before_mlp"},
}
ON_A_BRIDGE = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gptj",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
]
SHOWN_ONLY = {"gptj": {"pattern_is_softmax"}}
"""On a bridge, whose pattern is not softmax of what its hook shows as scores."""


def failing(model: Any) -> set[str]:
    return {name for name in IDENTITIES if not identities(model).holds(name)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", slow_but("llama", "gpt2", "gptj", of=HOOKED))
def test_all_holds_where_sublayers_read_through_a_norm_and_add(arch: str) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny_model(arch, "hooked")
    assert failing(model) == FAILS.get(arch, set())
    for name in HOOKS:
        check_writable(model, "blocks.{layer}." + name, ALL)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", slow_but("llama", "gemma2", "gptj", "olmo2", of=ON_A_BRIDGE))
def test_what_fails_on_a_bridge(arch: str) -> None:
    assert failing(tiny_model(arch, "bridge")) == FAILS.get(arch, SHOWN_ONLY.get(arch, set()))


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_sixteen_bits_is_no_failure(backend: Any, dtype: str) -> None:
    assert failing(load_model(tiny_hf("llama"), backend=backend, device="cpu", dtype=dtype)) == set()


# --- Planted faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_mlp_that_does_the_same_for_every_token_writes_and_reads_what_its_weights_say(dtype: str) -> None:
    """Then deviations from the mean over tokens are rounding, and no measure of anything."""
    hf: Any = tiny_hf("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.ln_2.weight.fill_(1e-7 if dtype == "float32" else 1e-4)
            block.ln_2.bias.fill_(1.0)
    measured = identities(load_model(hf, backend="bridge", device="cpu", dtype=dtype))
    assert measured.holds("neurons_write") and measured.holds("neurons_read")


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "sublayer", "linear"),
    [
        ("neurons_write", "mlp", "down_proj"),
        ("heads_write", "self_attn", "o_proj"),
        ("neurons_read", "mlp", "gate_proj"),
    ],
)
def test_five_percent_in_one_block_are_found(name: str, sublayer: str, linear: str, dtype: str) -> None:
    """As a multiplier or an adapter that nobody knows of."""
    hf = tiny_hf("llama")
    model = load_model(hf, backend="bridge", device="cpu", dtype=dtype)
    inner = getattr(getattr(model.original_model.model.layers[2], sublayer), linear).original_component
    inner.register_forward_hook(lambda _module, _args, out: out * 0.95)
    measured = identities(model)
    assert failing(model) == {name}
    assert measured.holds(name, (0, 1, 3)) and not measured.holds(name, (2,))
    assert measured.errors[name][2] == pytest.approx(0.05, rel=0.4)
    require(model, name, (0, 1, 3))
    with pytest.raises(NotApplicableError, match=r"off by 0\.0[345].* in block 2"):  # less what rounding may do
        require(model, name, ALL)


def test_a_model_is_measured_again_when_its_weights_have_changed() -> None:
    model = tiny_model("llama")
    check_writes_directly(model, 1)
    assert identities(model) is identities(model)
    before = identities(model)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2.0)
    assert identities(model) is not before


@pytest.mark.slow
@pytest.mark.backend
def test_the_model_is_left_as_it_was_and_its_hooks_do_not_count() -> None:
    model = tiny_model("llama", "bridge")
    model.train()
    seen: list[int] = []

    def triple(act: Tensor, hook: object) -> Tensor:  # noqa: ARG001
        seen.append(1)
        return act * 3

    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", triple)]):
        assert failing(model) == set() and not seen
        check_writable(model, "blocks.{layer}.attn.hook_z", ALL)
        model(torch.tensor([[5, 6, 7]]))
        assert seen
    assert hooks_left(model) == []
    assert all(module.training for module in model.modules())


# --- Where an edit goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_whose_return_is_ignored_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hook point in turn shows its activation and goes on with what it had."""
    model = tiny_model("llama")
    pytest.importorskip("transformer_lens.HookedTransformer")
    point = model.hook_dict[f"blocks.0.{name}"]
    real = type(point).__call__

    def ignoring(self: Any, x: Tensor) -> Tensor:
        returned = real(self, x)
        return x if self is point else returned

    monkeypatch.setattr(type(point), "__call__", ignoring)
    with pytest.raises(NotApplicableError, match=rf"an edit at blocks.0.{name} (has no effect|reaches only a part)"):
        check_writable(model, "blocks.{layer}." + name, (0,))


@pytest.mark.slow
@pytest.mark.backend
def test_edits_that_a_bridge_ignores_are_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"blocks\.0\.attn\.hook_pattern has no effect"):
        check_writable(tiny_model("gptj", "bridge"), "blocks.{layer}.attn.hook_pattern", (0,))
    llama = tiny_model("llama", "bridge")
    with pytest.raises(NotApplicableError, match=r"hook_resid_mid reaches only a part of what follows"):
        check_writable(llama, "blocks.{layer}.hook_resid_mid", (1,))
    for name in HOOKS:
        if name != "hook_resid_mid":
            check_writable(llama, "blocks.{layer}." + name, ALL)


@pytest.mark.slow
@pytest.mark.backend
def test_what_is_measured_without_patches_is_held_to_the_same() -> None:
    """A study's own passes: an edit that the model ignores, and an activation with other axes than its site says."""
    model = tiny_model("gptj", "bridge")
    batch = from_tokens(model, tiny_tokens(2, 12))
    study = Study.of(model, batch, Formation(1, (0, 0), (), ()))
    norm = Readout("norm", sites.RESID_POST, (1,), lambda act, rows: act.float().norm(dim=(1, 2)))  # noqa: ARG005
    with pytest.raises(NotApplicableError, match=r"hook_pattern has no effect"):
        study.measure([norm], [Patch(sites.PATTERN, (0,), (5,), AttendSelf())])
    latent = load_model(tiny_hf("deepseek_v3"), device="cpu")
    other = Study.of(latent, from_tokens(latent, tiny_tokens(2, 12)), Formation(1, (0, 0), (), ()))
    with pytest.raises(NotApplicableError, match=r"hook_v is of shape .* and not \[2 batch, 13 pos, "):
        other.activations(sites.V, (0,))


@pytest.mark.slow
@pytest.mark.backend
def test_norms_without_weights_are_no_obstacle() -> None:
    """OPT can have them: logits are Hugging Face's, and an edit of what they give is not lost."""
    hf, tokens = tiny_hf("opt", layer_norm_elementwise_affine=False), tiny_tokens(2, 12)
    model = load_model(hf, backend="bridge", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, return_type="logits"), hf(tokens).logits, atol=1e-4, rtol=1e-4)
    check_writable(model, "blocks.{layer}.ln1.hook_normalized", (1,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_all_tokens_share_hides_rounding_and_nothing_else(dtype: str) -> None:
    """Attention's output is nearly the same for all tokens: its rounding is as large as what tells them apart."""
    model = load_model(tiny_hf("llama"), device="cpu", dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    apart, shared = torch.randn(26, 64, generator=draw), 20 * torch.randn(64, generator=draw)
    whole = apart + shared

    def found(left: torch.Tensor, right: torch.Tensor) -> float:
        return error_of(*_but_for_rounding(model, left, right))

    assert found(whole, whole + 3.0) <= 1e-4, "a bias is the same for all"
    rounding = found(whole, whole.bfloat16().float())
    assert rounding <= TOLERANCE[torch.bfloat16] if dtype == "bfloat16" else rounding > TOLERANCE[torch.bfloat16]
    assert found(1.5 * apart + shared, whole) > 0.1, "a wrong weight is no rounding"
