"""Where a number comes from: versions, commit, device, dtype, and digests of the model and the prompts."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sinklens.memory import device_of
from sinklens.models import Model, model_id, weight_digest
from sinklens.prompts import PromptBatch


def provenance(model: Model, batch: PromptBatch) -> dict[str, Any]:
    """Versions, git commit, device, dtype, and digests of the model and the prompts."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "device": name,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "model": model_id(model),
        "weight_digest": weight_digest(model),
        "prompts_digest": batch.digest(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    names = ("sinklens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that sinklens runs from, with ``-dirty`` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(top) != here.parent:
            return None  # installed inside some other project's checkout
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
