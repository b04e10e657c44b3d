"""A file or a folder that takes its name when all of it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinklens.errors import InputError
from sinklens.records.files import replaced, write_text


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replaced(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, folder: bool, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), replaced(path) as temporary:
        temporary.mkdir() if folder else temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").touch()
    with replaced(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [item.name for item in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_what_must_be_new_does_not_replace(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "a"
    path.mkdir() if folder else path.write_text("first")
    before = path.stat().st_ino
    if folder:
        (path / "first").touch()
    with pytest.raises(OSError), replaced(path, exclusive=True) as temporary:
        temporary.mkdir() if folder else temporary.write_text("second")
    assert path.stat().st_ino == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/a.txt", f"{'x' * 300}/a.txt"])
def test_text_that_has_no_place_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written .*: choose another place"):
        write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
