"""Checkpoints: a model folder that can be loaded, with the optimiser's state beside it; whole or not at all.

    checkpoints/step-000100/   config.json, model.safetensors, tokenizer: a model like any other
                               optimiser.safetensors, state.json: to go on from; of the latest alone

The data's position needs no state: rows are drawn by number. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sinklens.errors import InputError
from sinklens.lab.optimiser import Optimiser
from sinklens.models.decoder import WEIGHTS, Decoder, save_decoder
from sinklens.records.files import remove_leftovers, replaced, temporary_name, write_json, write_tensors, writing

FOLDER = "checkpoints"
"""Where they are in a run's folder."""
OPTIMISER, STATE = "optimiser.safetensors", "state.json"
"""Files beside the model."""


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run, by step."""
    found = {path.name: path for path in (run / FOLDER).glob("step-*") if (path / "config.json").is_file()}
    return {int(name.removeprefix("step-")): path for name, path in sorted(found.items())}


def write_checkpoint(run: Path, model: Decoder, optimiser: Optimiser, step: int, state: dict[str, Any]) -> None:
    """Write one, and drop what earlier ones had to go on from.

    Raises:
        WriteError: there is no room; earlier ones are as they were.
    """
    path = run / FOLDER / f"step-{step:06d}"
    with writing(
        path, "train into another folder; earlier checkpoints are kept, and the same command goes on from the latest"
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with replaced(path) as folder:
            folder.mkdir()
            save_decoder(model, folder)
            write_tensors(folder / OPTIMISER, optimiser.state())
            write_json(folder / STATE, {"step": step, **state})
    for earlier, folder in checkpoints(run).items():
        if earlier < step:
            (folder / OPTIMISER).unlink(missing_ok=True)


def restore(run: Path, model: Decoder, optimiser: Optimiser) -> dict[str, Any] | None:
    """Put the latest checkpoint back into a model and its optimiser, and give its state; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    ready = {step: path for step, path in checkpoints(run).items() if (path / OPTIMISER).is_file()}
    if not ready:
        return None
    folder = ready[max(ready)]
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        model.load_state_dict(load_file(folder / WEIGHTS))
        optimiser.restore(load_file(folder / OPTIMISER))
    except Exception as error:  # whatever is wrong with such files comes up as anything
        told = " ".join(str(error).split())[:200]
        raise InputError(
            f"the checkpoint {folder} is damaged ({told}): train again in another folder (out=)."
        ) from error
    return state


def write_final(run: Path, model: Decoder) -> None:
    """Write the model into the run's folder itself, file by file, the config last: with it, it is a model."""
    with writing(run):
        folder = run / temporary_name()
        folder.mkdir()
        try:
            save_decoder(model, folder)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, run / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
