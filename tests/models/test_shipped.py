"""The small models that come with the package: what is said of them holds, on every backend."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import sinklens as sl
from sinklens.models.load import REGISTRY, ModelSource, list_models

NAMES = ("tiny-sink", "tiny-normed")
MOST_BYTES = 2_500_000


@cache
def loaded(name: str) -> Any:
    return sl.load_model(name, device="cpu")


def batch(n: int = 6, length: int = 32) -> sl.PromptBatch:
    return sl.prompts.natural(loaded("tiny-sink"), n=n, length=length)


def folder(name: str) -> Path:
    found = REGISTRY[name].folder
    assert found is not None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_say_how_they_were_made(name: str) -> None:
    assert (folder(name) / "model.safetensors").stat().st_size < MOST_BYTES
    record = json.loads((folder(name) / "lab.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("sinklens train ") and record["commit"] and record["versions"]["torch"]
    assert record["model"]["variant"] == loaded(name).cfg.variant == record["settings"]["variant"]
    assert {row.name: row.path for row in list_models()}[name] == folder(name)


def test_the_two_differ_in_their_attention_alone() -> None:
    sink, normed = (json.loads((folder(name) / "lab.json").read_text(encoding="utf-8")) for name in NAMES)
    assert sink["data"] == normed["data"]
    assert {key for key in sink["settings"] if sink["settings"][key] != normed["settings"][key]} == {"variant"}
    texts = [(folder(name) / "tokenizer.json").read_bytes() for name in NAMES]
    assert texts[0] == texts[1]


def test_one_has_a_sink_and_a_super_neuron_and_the_other_has_none() -> None:
    found = sl.find_formation(loaded("tiny-sink"), batch())
    assert set(found.sink_positions) == {0} and len(found.neurons) == 1
    neuron = found.super_neurons[0]
    assert abs(neuron.activation_sink) > 10 * abs(neuron.activation_other)
    page = found._repr_html_()
    for title in ("Super neurons of block", "Outlier dimensions that they write"):
        assert title in page
    assert f"<td>{neuron.index}</td>" in page and f"<td>{found.outlier_dims[0].index}</td>" in page
    with pytest.raises(sl.NoSinkError, match="no formation block"):
        sl.find_formation(loaded("tiny-normed"), batch())


def test_its_super_neuron_carries_the_sink() -> None:
    """One neuron of 304, and the whole chain in seconds: what random weights cannot show."""
    result = sl.run_chain(loaded("tiny-sink"), batch(4), target=5, progress=False)
    assert result.engine["path"] == "packed"
    effect = result.scores.set_index(["stage", "edit", "direction", "control"]).effect.sort_index()
    assert effect["value_aggregation", "transplant", "denoise", ""] == pytest.approx(1, abs=1e-6)  # the root
    assert effect["super_neurons", "transplant", "denoise", ""] > 0.7
    assert effect["super_neurons", "zero", "noise", ""] > 0.5
    random_neuron = effect["super_neurons", "zero", "noise", "random_neurons"]
    assert abs(random_neuron) < 0.1


def test_they_take_a_dtype_and_refuse_a_backend() -> None:
    assert str(sl.load_model("tiny-sink", device="cpu", dtype="bfloat16").cfg.dtype) == "torch.bfloat16"
    with pytest.raises(sl.InputError, match="leave backend and devices out"):
        sl.load_model("tiny-sink", backend="bridge")


def test_a_source_has_either_a_loader_or_a_folder() -> None:
    said = {"name": "x", "title": "x", "description": "", "source": "", "licence": "MIT"}
    for more in ({}, {"load": lambda: None, "folder": Path()}):
        with pytest.raises(ValueError, match="either load= or the folder="):
            ModelSource(**said, **more)  # type: ignore[arg-type]
