"""Data sets as objects and in folders, through the real library; names on the hub are in ``test_prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinklens import prompts
from sinklens.errors import InputError
from sinklens.models.load import load_model
from sinklens.prompts.datasets import from_words
from tests.helpers.command_line import invoke, refused
from tests.helpers.tiny import WORDS

datasets: Any = pytest.importorskip("datasets")
LINES = [" ".join(WORDS[i : i + 12]) for i in range(4)]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(tiny_folder, device="cpu")


def expected(model: Any, lines: list[str]) -> list[list[int]]:
    return prompts.from_texts(model, lines, length=8).tokens.tolist()


def test_a_data_set_that_is_loaded(model: Any) -> None:
    rows = {"body": ["w4", *LINES], "page": ["a", "b", "c", "d", "e"], "number": [0, 1, 2, 3, 4]}
    whole = datasets.Dataset.from_dict(rows)
    for given in (whole.remove_columns("page"), datasets.DatasetDict({"train": whole.remove_columns("page")})):
        batch = prompts.from_dataset(model, given, n=2, length=8)  # the only column of strings
        assert batch.tokens.tolist() == expected(model, LINES[:2]) and batch.n_skipped == 1
    assert batch.source == "dataset:given[train]"
    with pytest.raises(InputError, match=r"several with strings \(body, page\): say which"):
        prompts.from_dataset(model, whole, length=8)
    streamed = whole.to_iterable_dataset()
    for given in (whole, streamed):
        batch = prompts.from_dataset(model, given, column="body", group="page", n=3, length=8)
        assert (batch.tokens.tolist(), batch.groups) == (expected(model, LINES[:3]), ("b", "c", "d"))
    with pytest.raises(InputError, match="no_such"):
        prompts.from_dataset(model, whole, column="no_such", length=8)
    parts = datasets.DatasetDict({"train": whole.select([1]), "test": whole.select([2])})
    assert prompts.from_dataset(model, parts, column="body", length=8, n=1).tokens.tolist() == expected(
        model, LINES[1:2]
    )
    parts = prompts.from_dataset(model, parts, split="train", column="body", length=8, n=1)
    assert (parts.tokens.tolist(), parts.source) == (expected(model, LINES[:1]), "dataset:given[train]")


def test_a_folder_on_this_machine(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"text": LINES}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.txt").write_text("\n".join(LINES))
    for name, split in (("saved", "all"), ("files", "train")):
        batch = prompts.from_dataset(model, tmp_path / name, n=4, length=8)
        assert (batch.tokens.tolist(), batch.source) == (expected(model, LINES), f"dataset:{name}[{split}]")


def test_what_is_written_on_the_command_line(tmp_path: Path) -> None:
    assert from_words("wikitext") == ("wikitext", None, None)
    assert from_words("owner/name:config@train") == ("owner/name", "config", "train")
    (tmp_path / "a:b@c").mkdir()
    assert from_words(str(tmp_path / "a:b@c")) == (str(tmp_path / "a:b@c"), None, None)


@pytest.mark.slow
def test_commands_take_a_data_set(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict({"text": LINES}).save_to_disk(tmp_path / "saved")
    options = f"--model {tiny_folder} --length 8 --n 2 --device cpu --block 1 --super-neurons 3".split()
    options += ["--outlier-dims", "1"]
    place = ["--dataset", "saved", "--stages", "resid_pre", "--layers", "1", "--positions", "4", "--target", "4"]
    found = invoke("sweep", *options, *place)
    assert found.code == 0 and "dataset:saved[all]" in found.out, found.err
    refused(
        invoke("find", *options, "--dataset", "saved", "--prompts", "random"), "--prompts random or --dataset saved"
    )
    refused(invoke("find", *options, "--dataset", "no/such"), "'no/such' could not be loaded", "check its name")
    for command in ("chain --target 4", "all --target 4", "analyse onset"):
        refused(invoke(*command.split(), *options, "--dataset", "no/such"), "'no/such' could not be loaded")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(invoke("find", *options, "--dataset", "saved"), "pip install 'sinklens[datasets]'")
