"""Folders in which something is wrong: one sentence, and never a weight that nobody trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinklens.errors import InputError
from sinklens.models.load import load_model

BROKEN = ("", "{", "[]", "3", '"x"', "null", "\0\1")
"""Contents that are no JSON, or JSON of another type."""


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model's folder that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_none_or_of_another_type(name: str, folder: Path) -> None:
    for text in BROKEN:
        (folder / name).write_text(text)
        try:
            load_model(folder, device="cpu")
        except InputError as error:
            assert "\n" not in str(error)
            assert "cannot load" in str(error)
        else:
            assert name == "generation_config.json"  # which decides nothing here


def test_bytes_that_are_no_text(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes(b"\xff\xfe\0")
        refused(folder, "cannot load")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "nonsense", None])
def test_a_quantised_checkpoint(method: str | None, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_8bit": True})
    refused(folder, r"model\.dequantize\(\)")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"vocab_size": None},
        {"hidden_act": "none"},
        {"rope_parameters": 3},
        {"model_type": 7},
        {"dtype": "float99"},
        {"max_position_embeddings": "a"},
    ],
    ids=str,
)
def test_values_that_no_config_has(changes: dict[str, Any], folder: Path) -> None:
    change_config(folder, **changes)
    refused(folder, "cannot load|unused")


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            del weights[name]

    return change


def with_more(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("model.layers.1.mlp.down_proj.weight"), "down_proj.* make them up"),
        (without("lm_head.weight"), "lm_head.* make them up"),
        (lambda weights: {f"net.{name}": weight for name, weight in weights.items()}, "make them up"),
        (with_more("model.layers.2.self_attn.q_proj.bias", (32,)), "leaves unused"),
        (with_more("model.layers.2.self_attn.q_norm.weight", (8,)), "leaves unused"),
        (with_more("model.layers.2.self_attn.q_proj.lora_A.weight", (2, 32)), "leaves unused"),
        (with_more("model.layers.2.mlp.up_proj.weight_scale_inv", (1, 1)), "leaves unused"),
    ],
    ids=["weight", "head", "prefix", "bias", "norm", "adapter", "scale"],
)
def test_a_checkpoint_that_does_not_fit_its_config(change: Any, match: str, folder: Path) -> None:
    change_weights(folder, change)
    refused(folder, match)


def test_a_config_that_does_not_fit_its_checkpoint(folder: Path) -> None:
    for changes, match in (
        ({"num_hidden_layers": 5}, "make them up"),
        ({"num_hidden_layers": 3}, "leaves unused"),
        ({"num_hidden_layers": 4, "intermediate_size": 52}, "other shapes"),
        ({"intermediate_size": 48, "attention_bias": True}, "make them up"),
    ):
        change_config(folder, **changes)
        refused(folder, match)


def test_what_is_left_over_beside_the_model_is_only_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, with_more("v_head.weight", (1, 32)))
    change_weights(folder, with_more("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)))  # of old checkpoints
    load_model(folder, device="cpu")
    assert "v_head.weight" in caplog.text


def test_tied_weights_are_not_missing(folder: Path) -> None:
    change_weights(folder, without("lm_head.weight"))
    change_config(folder, tie_word_embeddings=True)
    model = load_model(folder, device="cpu")
    assert model.cfg.n_layers == 4


def test_weights_that_are_cut_off(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    for kept in (weights[: len(weights) // 2], weights[:4], b""):
        (folder / "model.safetensors").write_bytes(kept)
        refused(folder, "cannot load the model")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ('{"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}', "never unpickles"),
        ('{"metadata": {}, "weight_map": {"lm_head.weight": "../other.safetensors"}}', "never unpickles"),
        ('{"metadata": {}, "weight_map": {"lm_head.weight": "/tmp/other.safetensors"}}', "never unpickles"),
        ('{"metadata": {}, "weight_map": {"lm_head.weight": 3}}', "never unpickles"),
        ('{"metadata": {}, "weight_map": {"lm_head.weight": "absent.safetensors"}}', "is not there"),
        ('{"weight_map": {"lm_head.weight": "part.safetensors"}}', "cannot load the model"),
        *((text, "is damaged") for text in ("", "[]", "{}", '{"weight_map": 3}')),
    ],
)
def test_an_index_that_points_elsewhere(index: str, match: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, match)


def test_folders_that_are_none(folder: Path) -> None:
    refused(folder / "config.json", "is not a folder")
    refused(folder / "absent", "is not a folder")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "merge_and_unload")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "no config.json")
