"""Folders that appear as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sinklens.errors import InputError, WriteError
from sinklens.records.files import atomic_folder, check_out, write_tensors, writing
from tests.helpers.folders import earlier_run, names


def write_run(out: Path, *, force: bool = False) -> None:
    with atomic_folder(out, force=force) as folder:
        assert out != folder
        (folder / "chain.json").write_text("new")


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "run"
    with atomic_folder(out, force=False) as folder:
        (folder / "chain.json").write_text("new")
        assert not out.exists()
    assert names(out) == {"chain.json"}
    assert names(out.parent) == {"run"}


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_exists_needs_force(tmp_path: Path) -> None:
    out = earlier_run(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"exists already: choose another folder \(out=\), or replace it with force=True"
    ):
        write_run(out)
    assert (out / "chain.json").read_text() == "old"
    write_run(out, force=True)
    assert (out / "chain.json").read_text() == "new"
    assert names(out) == {"chain.json"} and names(tmp_path) == {"run"}


def test_force_makes_a_new_folder_and_fills_an_empty_one(tmp_path: Path) -> None:
    write_run(tmp_path / "new", force=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_run(tmp_path / "empty")
    write_run(tmp_path / "empty", force=True)
    assert names(tmp_path / "new") == names(tmp_path / "empty") == {"chain.json"}


def test_force_replaces_only_earlier_runs(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not the folder of an earlier run"):
        write_run(tmp_path / "precious", force=True)
    (tmp_path / "file").write_text("text")
    for force in (False, True):
        with pytest.raises(InputError, match="is a file: give a folder"):
            write_run(tmp_path / "file", force=force)
    assert names(tmp_path) == {"precious", "file"} and names(tmp_path / "precious") == {"thesis.txt"}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    out = earlier_run(tmp_path / "run")
    for target, force in ((out, True), (tmp_path / "new", False), (tmp_path / "made" / "for" / "it", False)):
        with pytest.raises(type(error)), atomic_folder(target, force=force) as folder:
            (folder / "chain.json").write_text("half")
            raise error
    assert names(tmp_path) == {"run"}
    assert names(out) == {"chain.json", "extra.txt"} and (out / "chain.json").read_text() == "old"


def test_parents_that_are_in_use_stay(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    with pytest.raises(RuntimeError), atomic_folder(out, force=False):
        (tmp_path / "runs" / "other").mkdir()
        raise RuntimeError
    assert names(tmp_path / "runs") == {"other"}


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    match = r"run cannot be written \(No space left"
    with pytest.raises(InputError, match=match), atomic_folder(tmp_path / "run", force=False):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == set()


def test_a_rename_that_fails_brings_the_old_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace_file, calls = earlier_run(tmp_path / "run"), os.replace, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(InputError, match="cannot be written"):
        write_run(out, force=True)
    assert len(calls) == 3
    assert names(tmp_path) == {"run"} and (out / "chain.json").read_text() == "old"


def test_somebody_elses_run_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="cannot be written"), atomic_folder(out, force=False) as folder:
        (folder / "chain.json").write_text("mine")
        earlier_run(out, "theirs")
    assert names(tmp_path) == {"run"} and (out / "chain.json").read_text() == "theirs"


def test_a_link_to_an_earlier_run_stays_a_link(tmp_path: Path) -> None:
    earlier_run(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_run(tmp_path / "link", force=True)
    assert names(tmp_path) == {"real", "link"} and (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "chain.json").read_text() == "new"


def test_the_working_folder_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(earlier_run(tmp_path / "run"))
    write_run(Path(), force=True)
    assert (tmp_path / "run" / "chain.json").read_text() == "new"
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize("name", ["file/run", "file/deep/run", "x" * 300, f"new/{'x' * 300}", "circle/run"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "circle").symlink_to("circle")
    for attempt in (lambda: check_out(tmp_path / name, force=False), lambda: write_run(tmp_path / name)):
        with pytest.raises(InputError, match=r"cannot be written \(.+\): choose another folder \(out=\)"):
            attempt()
    assert names(tmp_path) == {"file", "circle"}


def test_a_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuse(**_: Any) -> Iterator[None]:  # permission bits do not stop root
        raise PermissionError(13, "Permission denied")
        yield

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        check_out(tmp_path / "run", force=False)


def test_a_look_leaves_no_trace(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b" / "run", force=False)
    check_out(earlier_run(tmp_path / "run"), force=True)
    assert names(tmp_path) == {"run"} and names(tmp_path / "run") == {"chain.json", "extra.txt"}


def test_tensors_on_a_full_disk_are_an_error_of_the_system(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_tensors(tmp_path / "x.safetensors", {"x": torch.arange(6.0).view(2, 3).T})  # not contiguous
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.arange(6.0).view(2, 3).T)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WriteError, match="No space left.*make room"), writing(tmp_path / "run"):
        write_tensors(tmp_path / "y.safetensors", {"y": torch.ones(1)})
