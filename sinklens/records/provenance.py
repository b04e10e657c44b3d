"""Where a number comes from: versions, commit, device, dtype, and digests of the model and the prompts."""

from __future__ import annotations

import hashlib
import inspect
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    names = ("sinklens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "pandas")
    known = {"python": platform.python_version()}
    for name in names:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def git_commit() -> str | None:
    """Commit of the checkout that sinklens runs from, with ``-dirty`` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(top) != here.parent:
            return None  # installed inside some other project's checkout
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


@cache
def package_digest() -> str:
    """SHA-256 of sinklens's own source: numbers made by other code are not the same numbers."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parents[1]
    for path in sorted(here.rglob("*.py")):
        if "analyses" not in path.relative_to(here).parts:  # each stands for itself
            digest.update(f"{path.relative_to(here).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def code_digest(function: Callable[..., object]) -> str:
    """Digest of sinklens's source and of the file that ``function`` is written in."""
    digest = hashlib.sha256(package_digest().encode())
    source = inspect.getsourcefile(function)
    if source is not None and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]
