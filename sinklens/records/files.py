"""Files that appear as a whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinklens.errors import InputError, WriteError
from sinklens.records.plain import to_plain

if TYPE_CHECKING:
    from torch import Tensor

RUN_FILES = (
    "chain.json",
    "summary.json",
    "run.json",
    "replicate.json",
    "events.json",
    "compare.json",
    "circuit.json",
    "mitigation.json",
)
"""A folder that holds one of these was written by sinklens, and may be replaced when the user says so."""
_HERE = f".{socket.gethostname()}-"
"""How the temporary names of this machine's processes begin."""
_SUFFIXES = (".tmp", ".old")
"""How they end: what will have a name, and what had it before."""


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
    """Remove the temporary files and folders in ``folder`` whose processes, of this machine, are no more."""
    for path in [path for path in folder.glob(f"{_HERE}*") if path.suffix in _SUFFIXES]:
        pid = path.name.removeprefix(_HERE).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def holds_something(folder: Path) -> bool:
    """Whether there is anything in a folder but what a process that was killed while writing leaves."""
    return any(not (path.name.startswith(".") and path.suffix in _SUFFIXES) for path in folder.iterdir())


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
        InputError: when ``out`` exists and ``force`` is not set.
        WriteError: the place cannot be written.
    """
    out = Path(out)
    check_out(out, force=force)
    place = out.resolve()  # a link is followed, so that it stays when what it points to is replaced
    with writing(out), _parents(place):
        remove_leftovers(place.parent)
        with replaced(place, exclusive=not force) as folder:
            folder.mkdir()
            yield folder


@contextlib.contextmanager
def writing(path: str | Path, instead: str = "choose another folder (out=)") -> Iterator[None]:
    """Says in one sentence that ``path`` cannot be written: a full disk, for instance.

    Raises:
        WriteError: for any OSError inside, and for what was said of a file in a folder that has no name yet.
    """
    try:
        yield
    except WriteError as error:
        raise cannot_write(path, error.__cause__ or error, instead) from error
    except OSError as error:
        raise cannot_write(path, error, instead) from error


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """The folders above ``place`` are made where they are missing, and removed again where it does not come about."""
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if not place.exists():
            for parent in missing:  # the innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()


def check_out(out: Path, *, force: bool) -> None:
    """Make sure, before any work is done, that a result folder can be written; leaves no trace.

    Raises:
        InputError: when it exists and ``force`` is not set, or is a file or not a run.
        WriteError: its parent cannot be written.
    """
    parent = out.parent
    try:
        if out.exists():
            if not out.is_dir():
                raise InputError(f"{out} is a file: give a folder for the results")
            if not force:
                raise InputError(f"{out} exists already: choose another folder (out=), or replace it with force=True")
            if holds_something(out) and not any((out / name).is_file() for name in RUN_FILES):
                raise InputError(
                    f"{out} is not the folder of an earlier run, so force=True will not replace it: choose another"
                )
        place = out.resolve()
        missing = [folder for folder in (place, *place.parents) if not folder.exists()]
        parent = missing[-1].parent if missing else place.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
        for folder in missing:
            (parent / folder.name).exists()  # raises where a name is too long, which a missing parent hides
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise cannot_write(parent, error) from error


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where there is no room left."""


def cannot_write(path: str | Path, error: BaseException, instead: str = "choose another folder (out=)") -> WriteError:
    """The sentence for what the system says of writing to ``path``."""
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else " ".join(str(error).split())
    room = "make room or " if number in FULL or "No space left" in reason else ""
    return WriteError(f"{path} cannot be written ({reason}): {room}{instead}")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: a reader never sees half a page.

    Raises:
        WriteError: the place cannot be written.
    """
    with writing(path, "choose another place"), _parents(path), replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        WriteError: the place cannot be written.
    """
    with writing(path, "choose another place"), _parents(path), replaced(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, that others may read as they may any file.

    Raises:
        OSError: the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # what it makes of an OSError
        raise OSError(" ".join(str(error).split())) from error
    path.chmod(0o644)  # safetensors makes it private


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write what JSON can hold (see :func:`sinklens.records.plain.to_plain`) as a whole or not at all.

    Raises:
        WriteError: the place cannot be written.
    """
    write_text(path, json.dumps(to_plain(data), indent=indent, ensure_ascii=False, allow_nan=False))
