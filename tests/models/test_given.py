"""The state that a given model is in: taken as it is, or refused in a sentence; and left as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sinklens.errors import InputError
from sinklens.models import given
from sinklens.models.given import private_copy
from sinklens.models.load import load_model
from tests.helpers.tiny import BACKENDS, tiny_hf, tiny_tokens


def state(hf: Any) -> tuple[Any, ...]:
    """Everything of a model that loading must not change."""
    modules = [
        (
            name,
            type(module),
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            set(vars(module)),
        )
        for name, module in hf.named_modules()
    ]
    weights = [(name, id(p), p.data_ptr(), p.dtype, p.device, p.requires_grad) for name, p in hf.named_parameters()]
    buffers = [(name, id(b), b.dtype, b.device) for name, b in hf.named_buffers()]
    return modules, weights, buffers, str(getattr(hf, "config", "")), getattr(hf, "_attn_implementation", "")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tiny_tokens(), return_type="logits")


def outputs(hf: Any) -> torch.Tensor:
    """What the model computes in eval mode, without touching its own modes."""
    with torch.no_grad():
        return copy.deepcopy(hf).eval()(tiny_tokens(), use_cache=False).logits


# -- Right ------------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A linear layer with a term that its weight does not have, under names of its own."""

    bias = None

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    """A linear layer that does not compute what a linear layer does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(input)


class Stretched(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.3


def trained(hf: Any) -> Any:
    hf.config.attention_dropout = 0.5
    for block in hf.model.layers:
        block.self_attn.attention_dropout = 0.5
    hf.train()
    hf.model.layers[1].eval()
    hf.model.layers[0].requires_grad_(False)
    return hf


def with_sdpa(hf: Any) -> Any:
    hf.set_attn_implementation("sdpa")
    return hf


def adapted(hf: Any) -> Any:
    hf.model.layers[2].self_attn.q_proj = Adapter(hf.model.layers[2].self_attn.q_proj)
    return hf


def with_a_linear_of_its_own(hf: Any) -> Any:
    old = hf.model.layers[1].self_attn.o_proj
    new = Scaled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    hf.model.layers[1].self_attn.o_proj = new
    return hf


def parametrised(hf: Any) -> Any:
    nn.utils.parametrize.register_parametrization(hf.model.layers[1].self_attn.k_proj, "weight", Stretched())
    return hf


def sharing_weights(hf: Any) -> Any:
    hf.model.layers[2].mlp = hf.model.layers[1].mlp
    hf.model.layers[3].self_attn.q_proj.weight = hf.model.layers[0].self_attn.q_proj.weight
    hf.lm_head.weight = hf.model.embed_tokens.weight
    return hf


def run_before(hf: Any) -> Any:
    hf(tiny_tokens(), output_attentions=True, output_hidden_states=True)  # which leaves hooks of transformers
    return hf


def compiled_in_place(hf: Any) -> Any:
    hf.compile(backend="eager")
    return hf


def compiled_in_part(hf: Any) -> Any:
    hf.model.layers[1] = torch.compile(hf.model.layers[1], backend="eager")
    return hf


def aligned(hf: Any) -> Any:
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(hf, execution_device=torch.device("cpu"))
    return hf


def with_another_activation(hf: Any) -> Any:
    hf.model.layers[1].mlp.act_fn = nn.GELU()
    return hf


def in_double(hf: Any) -> Any:
    return hf.double()


RIGHT = (
    trained,
    with_sdpa,
    adapted,
    with_a_linear_of_its_own,
    parametrised,
    sharing_weights,
    run_before,
    compiled_in_place,
    compiled_in_part,
    aligned,
    with_another_activation,
    in_double,
)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", RIGHT)
def test_a_model_in_this_state_is_loaded_right(change: Callable[[Any], Any], backend: Any) -> None:
    hf = change(tiny_hf("llama"))
    theirs, before = outputs(hf), state(hf)
    ours = load_model(hf, device="cpu", backend=backend)
    assert (logits(ours) - theirs).abs().max() < 1e-3
    assert state(hf) == before
    assert torch.equal(outputs(hf), theirs)


@pytest.mark.backend
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda hf: torch.compile(hf, backend="eager")], ids=["data", "compile"]
)
def test_wrappers_are_taken_off(wrap: Callable[[Any], Any]) -> None:
    hf = tiny_hf("llama")
    assert (logits(load_model(wrap(hf), device="cpu")) - outputs(hf)).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.backend
def test_a_subclass_is_known_by_the_class_it_derives_from() -> None:
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        pass

    class Louder(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: a test
            output = super().forward(*args, **options)
            output.logits = output["logits"] + self.model.embed_tokens.weight[:, 0]
            return output

    for kind in (Mine, Louder):
        config: Any = tiny_hf("llama").config
        hf = kind(config)
        hf.load_state_dict(tiny_hf("llama").state_dict())
        for backend in BACKENDS:
            ours = load_model(hf.eval(), device="cpu", backend=backend)
            assert (logits(ours) - outputs(hf)).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.backend
def test_a_model_is_independent_of_the_object_it_was_made_from() -> None:
    for backend in BACKENDS:
        hf = tiny_hf("llama")
        model = load_model(hf, device="cpu", backend=backend)
        before = logits(model)
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.zero_()
        assert torch.equal(logits(model), before)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_as_the_caller_has_it(backend: Any) -> None:
    """Neither the caller's modes nor defaults of torch are in the model, and they are as they were afterwards."""
    expected = logits(load_model(tiny_hf("llama"), device="cpu", backend=backend))
    hf = tiny_hf("llama")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            model = load_model(hf, device="cpu", backend=backend)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), expected)


# -- Refused ----------------------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """A linear layer that keeps integers and their scale."""

    bias = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale if self.weight.element_size() == 1 else self.weight).T


def in_int8(hf: Any) -> Any:
    for block in hf.model.layers:
        block.mlp.down_proj = Quantised(block.mlp.down_proj)
    return hf


def in_fp8(hf: Any) -> Any:
    hf.model.layers[1].mlp.up_proj.weight.data = hf.model.layers[1].mlp.up_proj.weight.data.to(torch.float8_e4m3fn)
    return hf


def packed(hf: Any) -> Any:
    hf.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    return hf


def with_a_scale(hf: Any) -> Any:
    hf.model.layers[0].mlp.up_proj.weight_scale_inv = nn.Parameter(torch.ones(1, 1))
    return hf


def with_lora(hf: Any) -> Any:
    hf.model.layers[3].self_attn.v_proj.lora_A = nn.ModuleDict({"default": nn.Linear(32, 2, bias=False)})
    return hf


def offloaded(hf: Any) -> Any:
    hf.model.layers[2].to("meta")
    return hf


def hooked(hf: Any) -> Any:
    hf.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)  # noqa: ARG005
    return hf


def hooked_before(hf: Any) -> Any:
    hf.model.layers[1].register_forward_pre_hook(lambda module, args: None)  # noqa: ARG005
    return hf


def pruned(hf: Any) -> Any:
    from torch.nn.utils import prune

    prune.l1_unstructured(hf.model.layers[1].mlp.up_proj, "weight", 0.3)
    return hf


def with_another_forward(hf: Any) -> Any:
    old = hf.model.layers[1].mlp.forward
    hf.model.layers[1].mlp.forward = lambda x: old(x) * 0.5
    return hf


REFUSED = (
    (in_int8, "dequantize"),
    (in_fp8, "dequantize"),
    (packed, "dequantize"),
    (with_a_scale, "dequantize"),
    (with_lora, "merge_and_unload"),
    (offloaded, "without device_map"),
    (hooked, "torch hook"),
    (hooked_before, "torch hook"),
    (pruned, "torch hook"),
    (with_another_forward, "forward of model.layers.1.mlp was replaced"),
)


@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "what"), REFUSED)
def test_a_model_in_this_state_is_refused(change: Callable[[Any], Any], what: str, backend: Any) -> None:
    hf = change(tiny_hf("llama"))
    before = state(hf)
    with pytest.raises(InputError, match=what) as error:
        load_model(hf, device="cpu", backend=backend)
    assert "\n" not in str(error.value)
    assert state(hf) == before


@pytest.mark.backend
def test_what_is_no_language_model() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

    class Foreign(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)
            self.post_init()

    config = tiny_hf("llama").config
    with pytest.raises(InputError, match="derives from no model class"):
        load_model(Foreign(config), device="cpu")
    for other in (tiny_hf("llama").model, LlamaForSequenceClassification(config)):
        with pytest.raises(InputError, match="needs a language model"):
            load_model(other, device="cpu")


def test_a_private_copy_shares_weights_and_nothing_else() -> None:
    hf = tiny_hf("llama")
    copied = private_copy(hf)
    assert {p.data_ptr() for p in copied.parameters()} == {p.data_ptr() for p in hf.parameters()}
    assert not {id(m) for m in copied.modules()} & {id(m) for m in hf.modules()}
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in hf.parameters()}
    own = private_copy(hf, shared=False)
    assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in hf.parameters()}
    hf.lm_head.weight = hf.model.embed_tokens.weight
    tied = private_copy(hf, dtype=torch.bfloat16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert given.blocks_name(hf) == "model.layers"


def _of_another_kind() -> dict[str, Any]:
    import transformers as hf

    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    t5 = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    bert = hf.BertConfig(**small, num_attention_heads=4, intermediate_size=64)
    vit = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    return {
        "an encoder with a decoder": [
            hf.T5ForConditionalGeneration(t5),
            hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=64, **sizes, **heads)),
        ],
        "attends to later tokens": [hf.BertForMaskedLM(bert)],
        "has no attention": [hf.MambaForCausalLM(hf.MambaConfig(**small, state_size=4))],
        "reads pixel_values, not tokens": [hf.ViTForImageClassification(vit)],
    }


@pytest.mark.slow
@pytest.mark.backend
def test_what_is_no_causal_transformer() -> None:
    for told, models in _of_another_kind().items():
        for model in models:
            with pytest.raises(InputError, match=told) as error:
                load_model(model, device="cpu")
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_folder_of_another_kind(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_layers": 1, "num_hidden_layers": 1}))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=f"is a {kind}, of which transformers has no model that predicts the next token"
    ):
        load_model(tmp_path, device="cpu")
