"""Files that appear as a whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from sinklens.errors import InputError

RUN_FILES = ("chain.json", "summary.json", "run.json")
"""A folder that holds one of these was written by sinklens, and may be replaced when the user says so."""
_HERE = f".{socket.gethostname()}-"
"""How the temporary names of this machine's processes begin."""


@contextlib.contextmanager
def replaced(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``, for a file or a folder, which takes that name when the block is done.

    After an exception nothing is left of it, and what had the name before is as it was.

    Args:
        path: the name it will have.
        exclusive: what has the name by then keeps it.

    Raises:
        FileExistsError: (``exclusive``) there is such a file by then; a folder that is not empty is another OSError.
    """
    temporary = path.with_name(temporary_name())
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir() and not exclusive:
            _swap(temporary, path)
        elif temporary.is_file() and exclusive:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


def _swap(temporary: Path, path: Path) -> None:
    """Rename a folder to the name of another, which comes back if that fails."""
    aside = temporary.with_suffix(".old")
    os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken: of several processes the first wins."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


def temporary_name() -> str:
    """A name that nothing else has, and that tells whose it is, so that :func:`remove_leftovers` knows it."""
    return f"{_HERE}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` whose processes, of this machine, are no more."""
    for path in folder.glob(f"{_HERE}*.tmp"):
        pid = path.name.removeprefix(_HERE).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def atomic_folder(out: str | Path, *, force: bool) -> Iterator[Path]:
    """A folder that is built under a temporary name beside ``out`` and renamed when all is written.

    After an exception nothing is left of it, parents that were made for it included, and an earlier run is as it was.

    Raises:
        InputError: when ``out`` exists and ``force`` is not set, or the place cannot be written.
    """
    out = Path(out)
    check_out(out, force=force)
    place = out.resolve()  # a link is followed, so that it stays when what it points to is replaced
    new_parents = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replaced(place, exclusive=not force) as folder:
            folder.mkdir()
            yield folder
    except OSError as error:  # a full disk, for instance
        raise _cannot_write(out, error) from error
    finally:
        if not place.exists():
            for parent in new_parents:  # the innermost first
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
    """Write a file as a whole or not at all: a reader never sees half a page.

    Raises:
        InputError: the place cannot be written.
    """
    with replaced(path) as temporary:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(temporary, "w", encoding="utf-8", newline="\n")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another place") from error
        with file:
            file.write(text)
