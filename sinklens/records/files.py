"""Files that appear as a whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from sinklens.errors import InputError

RUN_FILES = ("chain.json", "summary.json", "run.json")
"""A folder that holds one of these was written by sinklens, and may be replaced when the user says so."""


class atomic_folder:  # noqa: N801  (used as a context manager, like tempfile's)
    """A folder that is built under a temporary name beside ``out`` and renamed when all is written.

    After an exception nothing is left of it, parents that were made for it included, and an earlier run is as it was.

    Raises:
        InputError: when ``out`` exists and ``force`` is not set, or the place cannot be written.
    """

    def __init__(self, out: str | Path, *, force: bool) -> None:
        self.out, self.force = Path(out), force

    def __enter__(self) -> Path:
        check_out(self.out, force=self.force)
        self._place = self.out.resolve()  # a link is followed, so that it stays when what it points to is replaced
        self._made = [parent for parent in self._place.parents if not parent.exists()]
        self._scratch = None
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=".sinklens-", dir=self._place.parent))
            (self._scratch / "new").mkdir()
        except BaseException as error:
            self._clean_up()
            if isinstance(error, OSError):
                raise _cannot_write(self._place.parent, error) from error
            raise
        return self._scratch / "new"

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self._put_in_place()
        except OSError as failure:
            raise _cannot_write(self.out, failure) from failure
        finally:
            self._clean_up()
        if isinstance(error, OSError):  # a full disk, for instance
            raise _cannot_write(self.out, error) from error

    def _put_in_place(self) -> None:
        assert self._scratch is not None
        old = self._scratch / "old"
        try:
            if self.force and self._place.exists():
                os.replace(self._place, old)
            os.replace(self._scratch / "new", self._place)
        except BaseException:
            if old.exists() and not self._place.exists():
                os.replace(old, self._place)
            raise

    def _clean_up(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if not self._place.exists():
            for parent in self._made:  # the innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()


def check_out(out: Path, *, force: bool) -> None:
    """Make sure, before any work is done, that a result folder can be written; leaves no trace.

    Raises:
        InputError: when it exists and ``force`` is not set, is a file or not a run, or its parent cannot be written.
    """
    parent = out.parent
    try:
        if out.exists():
            if not out.is_dir():
                raise InputError(f"{out} is a file: give a folder for the results")
            if not force:
                raise InputError(f"{out} exists already: choose another --out, or replace it with --force")
            if any(out.iterdir()) and not any((out / name).is_file() for name in RUN_FILES):
                raise InputError(
                    f"{out} is not the folder of an earlier run, so --force will not replace it: choose another"
                )
        place = out.resolve()
        missing = [folder for folder in (place, *place.parents) if not folder.exists()]
        parent = missing[-1].parent if missing else place.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
        for folder in missing:
            (parent / folder.name).exists()  # raises where a name is too long, which a missing parent hides
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _cannot_write(parent, error) from error


def _cannot_write(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path} cannot be written ({reason}): choose another --out")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees half a page."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
