"""The decoder: Hugging Face's Llama with softmax, TransformerLens's names, files, and a model like any other."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import sinklens as sl
from sinklens.engine.run import run_patches
from sinklens.errors import InputError
from sinklens.models.decoder import Decoder, DecoderConfig, save_decoder
from sinklens.models.digest import weight_digest
from sinklens.models.identities import identities, is_unnormalised
from sinklens.models.load import load_model
from sinklens.models.state import foreign_part
from sinklens.models.view import backend_name, check_model, prepends_bos
from sinklens.variants import REGISTRY, Softmax, register_variant, variant_kind
from tests.helpers.decoders import SIZES, kept_decoder, made_decoder
from tests.helpers.grids import SHRINK
from tests.helpers.tiny import save_tiny, tiny_model

TOKENS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
NO_NORM_IN_FRONT = {"heads_write", "neurons_write", "neurons_read", "norm_before_attention", "norm_before_mlp"}
TEMPLATE = Path(sl.__file__).parents[1] / "analyses" / "_variant_template.py"


def saved(model: Decoder, folder: Path) -> Path:
    folder.mkdir()
    save_decoder(model, folder)
    return folder


# --- What it computes ------------------------------------------------------------------------------------------------


def as_llama(model: Decoder) -> LlamaForCausalLM:
    """The same weights in Hugging Face's Llama."""
    cfg = model.cfg
    config = LlamaConfig(
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.d_head,
        rms_norm_eps=cfg.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
        tie_word_embeddings=cfg.tied,
    )
    own: dict[str, Any] = {"model.embed_tokens.weight": model.embed.W_E, "model.norm.weight": model.ln_final.w}
    if not cfg.tied:
        own["lm_head.weight"] = model.unembed.W_U.T
    for layer, block in enumerate(model.blocks):
        attn, mlp, at = block.attn, block.mlp, f"model.layers.{layer}."
        for name in "qkv":
            own[f"{at}self_attn.{name}_proj.weight"] = (
                (attn.W_Q if name == "q" else attn._kv(f"W_{name.upper()}")).transpose(1, 2).flatten(0, 1)
            )
        own[f"{at}self_attn.o_proj.weight"] = attn.W_O.flatten(0, 1).T
        for theirs, ours in (("gate", mlp.W_gate), ("up", mlp.W_in), ("down", mlp.W_out)):
            own[f"{at}mlp.{theirs}_proj.weight"] = ours.T
        own[f"{at}input_layernorm.weight"] = block.ln1.w
        own[f"{at}post_attention_layernorm.weight"] = block.ln2.w
    llama = LlamaForCausalLM(config).eval()
    llama.set_attn_implementation("eager")
    missing = llama.load_state_dict(own, strict=False).missing_keys
    assert [name for name in missing if name != "lm_head.weight"] == []
    return llama


@pytest.mark.parametrize(("kv_heads", "tied"), [(2, True), (4, False), (1, False)])
def test_with_softmax_it_is_hugging_face_s_llama(kv_heads: int, tied: bool) -> None:
    model = made_decoder(n_key_value_heads=kv_heads, tied=tied, rotary_base=500.0)
    with torch.no_grad():
        theirs = as_llama(model)(TOKENS, output_attentions=True)
        logits, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, theirs.logits, rtol=0, atol=1e-5)
    for layer, pattern in enumerate(theirs.attentions):
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], pattern, rtol=0, atol=1e-5)


def test_names_and_axes_are_a_hooked_transformer_s() -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    theirs = tiny_model("llama", "hooked")
    cfg = theirs.cfg
    sizes = {name: getattr(cfg, name) for name in ("d_model", "n_layers", "n_heads", "d_head", "d_mlp", "d_vocab")}
    ours = Decoder(DecoderConfig(**sizes, n_key_value_heads=cfg.n_key_value_heads, tied=False))
    with torch.no_grad():
        expected, found = (model.run_with_cache(TOKENS)[1] for model in (theirs, ours))
    extra = {f"blocks.{layer}.attn.hook_aggregated" for layer in range(cfg.n_layers)}
    assert {name: act.shape for name, act in found.items() if name not in extra} == {
        name: act.shape for name, act in expected.items()
    }
    weights = {name: w.shape for name, w in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        assert weights[name.replace("unembed.own", "unembed.W_U")] == weight.shape, name


def test_it_starts_and_stops_at_blocks_as_a_hooked_transformer_does() -> None:
    model = kept_decoder("sink_token")
    with torch.no_grad():
        resid = model(TOKENS, stop_at_layer=2)
        logits = model(TOKENS)
        assert torch.equal(model(resid, start_at_layer=2), logits)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        torch.testing.assert_close(model(TOKENS, return_type="loss"), loss)


def test_it_generates_with_the_arguments_of_transformer_lens() -> None:
    model = kept_decoder("softmax")
    told = model.generate(TOKENS, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
    with torch.no_grad():
        first = model(TOKENS)[:, -1].argmax(-1)
    assert told.shape == (2, 14) and torch.equal(told[:, 12], first)
    assert torch.equal(model.generate(TOKENS, 2, temperature=1.0, seed=3, do_sample=False), told)
    drawn = model.generate(TOKENS, 2, do_sample=True, seed=3)
    assert torch.equal(drawn, model.generate(TOKENS, 2, temperature=1.0, seed=3, use_past_kv_cache=True))
    assert not torch.equal(drawn, told)
    for wrong in ({"tokens": "some text"}, {"stop_at_eos": True}, {"return_type": "str"}):
        with pytest.raises(InputError, match="goes on from tokens, to as many tokens as are asked for: give it tokens"):
            model.generate(**{"tokens": TOKENS, "max_new_tokens": 2} | wrong)  # type: ignore[arg-type]


# --- A model like any other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "failing", "shares"),
    [
        ("softmax", set(), False),
        ("window", set(), False),
        ("no_positions", set(), False),
        ("sink_logit", {"pattern_sums_to_one"}, False),
        ("kv_bias", {"pattern_sums_to_one", "pattern_weighs_values"}, False),
        ("sink_token", {"pattern_sums_to_one", "pattern_weighs_values"}, False),
        ("sigmoid", {"pattern_sums_to_one", "pattern_is_softmax"}, True),
        ("sigmoid normalised", {"pattern_is_softmax"}, False),
        ("differential", {"pattern_sums_to_one", "pattern_is_softmax", "pattern_weighs_values"}, True),
        ("gate", {"pattern_weighs_values"}, False),
        ("sandwich_norm", {"heads_write", "neurons_write"}, False),
        ("post_norm", NO_NORM_IN_FRONT, False),
    ],
)
def test_what_holds_of_a_variant_is_measured(case: str, failing: set[str], shares: bool) -> None:
    model = kept_decoder(case)
    found = identities(model)
    assert {name for name in found.errors if not found.holds(name)} == failing
    assert is_unnormalised(model) is shares
    assert backend_name(model) == "Decoder"
    check_model(model)
    assert foreign_part(model) is None


@pytest.mark.parametrize("case", ["softmax", "affine_scaled"])
def test_copies_of_it_are_whole(case: str) -> None:
    model = made_decoder(case, tied=False)
    with torch.no_grad():
        expected = model(TOKENS)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(TOKENS), expected)
            assert weight_digest(again) == weight_digest(model)
            again.embed.W_E += 1
            assert torch.equal(model(TOKENS), expected)
            assert not torch.equal(again(TOKENS), expected)


def test_its_config_says_where_it_is_and_in_which_dtype() -> None:
    model = made_decoder()
    twin = copy.deepcopy(model).to("meta", torch.bfloat16)
    assert (twin.cfg.device, twin.cfg.dtype) == ("meta", torch.bfloat16)
    assert (model.cfg.device, model.cfg.dtype) == ("cpu", torch.float32)


def test_what_somebody_has_put_in_place_of_a_part_is_seen() -> None:
    model = made_decoder("head_rmsnorm")
    model.blocks[1].attn.variant = Softmax(model.blocks[1].attn.variant.sizes)
    assert "blocks.1.attn.variant: Softmax" in str(foreign_part(model))
    model = made_decoder()
    model.blocks[0].mlp = torch.nn.Linear(32, 32)
    assert "blocks.0.mlp: Linear" in str(foreign_part(model))


def test_digests_tell_variants_options_and_running_means_apart() -> None:
    plain = made_decoder("softmax_off_by_one")
    other = Decoder(DecoderConfig(**{**SIZES, "n_key_value_heads": 2}))
    other.load_state_dict(plain.state_dict())
    window = made_decoder("window")
    wider = Decoder(DecoderConfig(**SIZES, n_key_value_heads=2, variant="window", variant_options={"window": 5}))
    wider.load_state_dict(window.state_dict())
    moved = made_decoder("affine_scaled")
    before = weight_digest(moved)
    moved.train()(TOKENS)
    moved.stepped()
    assert len({weight_digest(model) for model in (plain, other, window, wider, moved)} | {before}) == 6


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["softmax", "affine_scaled", "sink_token", "gate headwise"])
def test_what_is_saved_is_loaded(case: str, tmp_path: Path) -> None:
    model = made_decoder(case, tied=case != "softmax")
    folder = saved(model, tmp_path / "model")
    again = load_model(str(folder), device="cpu")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
    assert weight_digest(again) == weight_digest(model)
    assert again.tokenizer is None
    assert load_model(folder, device="cpu", dtype="bfloat16").cfg.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_tokenizer_comes_with_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "tiny"))
    model = made_decoder(d_vocab=len(tokenizer))
    model.tokenizer = tokenizer
    again = load_model(saved(model, tmp_path / "model"), device="cpu")
    theirs = load_model(tmp_path / "tiny", device="cpu")
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name in ("tokenizer_prepends_bos", "default_prepend_bos"):
        assert getattr(again.cfg, name) == getattr(theirs.cfg, name)
    assert prepends_bos(again) == prepends_bos(theirs)
    assert again.tokenizer.padding_side == "right"


def weights_without(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.attn.W_O"]
    save_file(weights, folder / "model.safetensors")


def said(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "gone"}))


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no decoder that can be read"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\1\0"), "holds no decoder that can be read"),
    "missing weight": (weights_without, r"does not fit its config.json \(blocks.1.attn.W_O\)"),
    "another size": (lambda f: said(f, d_mlp=41), "does not fit its config.json"),
    "a text for a number": (lambda f: said(f, eps="small"), "holds no decoder that can be read"),
    "a number that is none": (lambda f: said(f, d_model=True), "holds no decoder that can be read"),
    "an odd head": (lambda f: said(f, d_head=7), "even width"),
    "nothing said": (lambda f: said(f, rotary_base="gone"), "does not say rotary_base"),
    "an unknown variant": (lambda f: said(f, variant="mine", variant_from="mine.py"), "import mine.py, which calls"),
    "an unknown option": (lambda f: said(f, variant_options={"window": 3}), "cannot be made with the options"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = saved(made_decoder(), tmp_path / "model")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"backend": "bridge"}, {"backend": "hooked"}, {"devices": 2}])
def test_there_is_one_way_to_load_it(options: dict, tmp_path: Path) -> None:
    folder = saved(made_decoder(), tmp_path / "model")
    with pytest.raises(InputError, match="leave backend and devices out"):
        load_model(folder, device="cpu", **options)


# --- A variant of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def template() -> Iterator[Any]:
    """The template's variant; nobody knows it afterwards."""
    kind = variant_kind(str(TEMPLATE))
    yield kind
    REGISTRY.pop(kind.name, None)
    sys.modules.pop(kind.__module__, None)


def test_the_template_is_short_and_trains_for_ten_steps(template: Any) -> None:
    assert len(TEMPLATE.read_text(encoding="utf-8").splitlines()) < 40
    model = Decoder(DecoderConfig(**SIZES, variant=template.name, variant_options={"start": 0.5})).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(TOKENS, return_type="loss")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.stepped()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model.blocks[0].attn.variant.t, torch.full((4,), 0.5))


def test_a_variant_of_one_s_own_is_a_model_like_any_other(template: Any, tmp_path: Path) -> None:
    model = Decoder(DecoderConfig(**SIZES, variant=template.name)).eval()
    folder = saved(model, tmp_path / "model")
    again = load_model(folder, device="cpu")
    assert weight_digest(again) == weight_digest(model)
    assert foreign_part(again) is None
    found = run_patches(
        again,
        TOKENS,
        [sl.Patch(sl.sites.RESID_PRE, (1,), (3,), SHRINK)],
        [sl.readouts.attention_received("received", (3,), ((0,), (2,)), 2)],
        runs={"base": ()},
    )
    assert found.stats.path == "packed"
    REGISTRY.pop(template.name)
    with pytest.raises(InputError, match="_variant_template.py, which calls register_variant"):
        load_model(folder, device="cpu")


def test_what_a_variant_keeps_beside_its_parameters_is_saved(tmp_path: Path) -> None:
    class Counted(Softmax):
        name = "counted"
        sharper: torch.Tensor

        def __init__(self, sizes: Any) -> None:
            super().__init__(sizes)
            self.register_buffer("sharper", torch.ones(()))

        def queries(self, q: torch.Tensor) -> torch.Tensor:
            return q * self.sharper

    register_variant(Counted)
    try:
        model = Decoder(DecoderConfig(**SIZES, variant="counted")).eval()
        for block in model.blocks:
            block.attn.variant.sharper.fill_(40.0)
        again = load_model(saved(model, tmp_path / "model"), device="cpu")
        with torch.no_grad():
            assert torch.equal(again(TOKENS), model(TOKENS))
    finally:
        REGISTRY.pop("counted")


def test_other_code_under_its_name_is_another_model(template: Any, tmp_path: Path) -> None:
    model = Decoder(DecoderConfig(**SIZES, variant=template.name))
    changed = Path(shutil.copy(TEMPLATE, tmp_path / "_variant_template.py"))
    changed.write_text(TEMPLATE.read_text(encoding="utf-8").replace("(-self.t).exp()", "(-2 * self.t).exp()"))
    REGISTRY.pop(template.name)
    variant_kind(str(changed))
    assert "Temperature" in str(foreign_part(model)), "it is no longer what its name says"
    again = Decoder(DecoderConfig(**SIZES, variant=template.name))
    again.load_state_dict(model.state_dict())
    assert weight_digest(again) != weight_digest(model)
