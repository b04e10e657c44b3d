"""Where a number comes from: versions, commit, device, dtype, and digests of the model and the prompts."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

from sinklens.records.fingerprint import fingerprint_of, unstable_in
from sinklens.records.own_files import own_files


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read once: what is imported does not change, and to read it takes longer than a small sweep."""
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


def code_digest(*functions: Callable[..., object]) -> str:
    """Digest of sinklens's source, of what functions do (:mod:`sinklens.records.fingerprint`: what they close over, and
    the globals that they read, may have changed in a running process), of the files that they are written in, and of
    the user's own files that these import from.

    Of functions of which nothing tells whether they do the same, as of one that reads a file, no two digests are equal.
    """
    digest = hashlib.sha256(package_digest().encode())
    for function in functions:
        digest.update(fingerprint_of(function).encode())
        if unstable_in(function):
            digest.update(os.urandom(16))
    for path in own_files(*functions):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
