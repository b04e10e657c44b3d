"""Folders of earlier runs that were cut, edited or mixed up: a report, or one sentence, and never a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.suite import run_all
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.command_line import invoke
from tests.helpers.synthetic import synthetic_result
from tests.helpers.tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.slow

N = int(os.environ.get("SINKLENS_FUZZ", "300")) // 10
OTHERS = (None, True, -1, 1.5, "text", "", [], {}, [[1]], {"a": {}}, 10**400, "\ud800")
"""What somebody may have put in the place of a value."""


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every value in a JSON document, as the keys that lead there."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [path, *(place for key in keys for place in places(node[key], (*path, key)))]


def edited(draw: random.Random, text: str) -> str:
    """The document with one value changed or removed; nothing of one that is none any more."""
    try:
        data = json.loads(text)
    except ValueError:
        return ""
    # What lies near the top matters more, and there is less of it.
    deep = places(data)[1:] or [()]
    depth = draw.randint(1, 4)
    path = draw.choice([place for place in deep if len(place) <= depth])
    node = data
    if not path:
        return ""
    for key in path[:-1]:
        node = node[key]
    if draw.random() < 0.3:
        del node[path[-1]]
    else:
        node[path[-1]] = draw.choice(OTHERS)
    return json.dumps(data)


def damage(draw: random.Random, folder: Path) -> str:
    """Something done to one file; says what."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice([*files, *(path for path in files if path.suffix == ".json")])
    content = path.read_bytes()
    kind = draw.choice(["cut", "flip", "swap", "gone", "folder", "empty", *["edit"] * 8])
    if kind == "edit" and path.suffix == ".json":
        path.write_text(edited(draw, content.decode(errors="replace")), encoding="utf-8", errors="surrogatepass")
    elif kind == "swap":
        path.write_bytes(draw.choice(files).read_bytes())
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(max(len(content), 1))])
    elif content:
        place = draw.randrange(max(len(content), 1))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :])
    return f"{kind} {path.relative_to(folder)}"


def only_sentences(act: Callable[[], Any]) -> None:
    try:
        act()
    except InputError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as `sinklens all` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    model = tiny_model("llama")
    given = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}
    study = Study(model, from_tokens(model, tiny_tokens(3, 16)), given=given)
    run_all(study, folder, target=5, only=("formation", "onset"))
    synthetic_result().save(folder / "chain")
    return folder


@pytest.mark.parametrize("part", range(3))
def test_a_damaged_folder_is_reported_or_refused(part: int, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(part)
    for number in range(part, N, 3):
        run = shutil.copytree(whole, tmp_path / str(number))
        told = [damage(draw, run) for _ in range(draw.randint(1, 2))]
        try:
            only_sentences(lambda run=run: ChainResult.load(run / "chain"))
            only_sentences(lambda run=run: AnalysisResult.load(run / "onset"))
            for folder in (run, run / ("chain", "onset")[number % 2]):
                outcome = invoke("report", str(folder))
                assert outcome.code == 0 or (outcome.code == 2 and outcome.sentence), outcome
        except Exception as error:
            error.add_note(f"{number}: {told}")
            raise
