"""What is committed of the tutorials can be read without running them. `pytest --nbmake tutorials` runs them.

`python -m tests.test_tutorials [NAME ...]` runs them and writes their outputs back in the form that these tests ask
for.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient")

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
MAX_BYTES = 2_000_000
LOCAL_PATH = re.compile(r"/(?:home|root|tmp|work|Users|var/folders)/|[A-Z]:\\+Users")
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}

each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


class ThisPython(AsyncKernelManager):
    """A kernel in the interpreter that runs the tests, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def executed(notebook: NotebookNode) -> NotebookNode:
    """A copy of the notebook that was run in this checkout, offline; the first exception in it is raised."""
    notebook = copy.deepcopy(notebook)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # One thread: the last digits do not depend on the machine's cores, nor the time on who else uses them.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **offline, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    client = NotebookClient(notebook, kernel_manager_class=ThisPython, timeout=600, record_timing=False)
    client.execute(cwd=str(ROOT / "tutorials"), env=env)
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A copy without what differs from run to run, and without CircuitsVis views, whose script is 1.3 MB."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict({**METADATA, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "CircuitsVis" in data.get("text/html", ""):
                data["text/html"] = "<em>An interactive CircuitsVis view: run the cell to see it.</em>"
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
    return notebook


def texts(notebook: NotebookNode) -> list[str]:
    """Everything that the outputs show, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        str(part) for output in outputs for part in (output.get("text", ""), *output.get("data", {}).values()) if part
    ]


def noise(notebook: NotebookNode) -> list[str]:
    """Errors, and what went to stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [str(o) for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_there_are_tutorials():
    assert TUTORIALS


@each_tutorial
def test_a_committed_tutorial_can_be_read_without_running_it(path: Path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert not noise(notebook)
    assert not [text for text in texts(notebook) if LOCAL_PATH.search(text)]
    assert not [text for text in texts(notebook) if "<script" in text], "an output that runs something when opened"


@each_tutorial
def test_a_committed_tutorial_holds_nothing_that_changes_with_every_run(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.metadata for cell in notebook.cells)
    assert notebook.metadata == {**METADATA, "language_info": {"name": "python"}}
    assert all(len(text) < MAX_BYTES / 4 for text in texts(notebook))


def test_the_kernel_is_the_interpreter_of_the_tests():
    cell = nbformat.v4.new_code_cell("import sys\nprint(sys.executable, sys.prefix)")
    found = executed(nbformat.v4.new_notebook(cells=[cell]))
    assert texts(found) == [f"{sys.executable} {sys.prefix}\n"]


if __name__ == "__main__":
    for tutorial in [path for path in TUTORIALS if not sys.argv[1:] or path.stem in sys.argv[1:]]:
        fresh = cleaned(executed(nbformat.read(tutorial, as_version=4)))
        nbformat.write(fresh, tutorial)
