"""How far it is from the public function to the tensor that is written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor

import sinklens as sl
from sinklens import edits, engine, readouts, sites
from tests.helpers.tiny import tiny_model, tiny_tokens


class Watching(edits.Edit):
    """Notes by which functions of the package it was called."""

    calls: Sequence[str] = ()

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        if self.calls:  # only the first call writes: the others try it on fewer rows
            return x + 1
        frames = [frame for frame in inspect.stack() if frame.filename.startswith(sl.__path__[0])]
        object.__setattr__(self, "calls", [frame.function for frame in reversed(frames)])
        return x + 1


def test_the_calls_from_a_runner_to_the_write_are_those_that_the_docstring_lists() -> None:
    model, edit = tiny_model("llama", "hooked"), Watching("watching")
    norm = readouts.vector_readout("norm", sites.RESID_POST, (3,), (5,), 2, lambda x, _: x.norm(dim=-1))
    runner = engine.PatchRunner(model, tiny_tokens(2, 9), [norm])
    runner.run([sl.Patch(sites.Z, (1,), (4,), edit)])
    *calls, asked = edit.calls
    assert calls == ["run", "_batches", "forward", "run", "_block", "_attention", "visit", "apply_edit"]
    assert asked == "edited" and len(calls) <= 8
    listed = [line for line in (engine.__doc__ or "").splitlines() if line[:1].isdigit()]
    assert len(listed) == 8 and all(name in line for name, line in zip(calls, listed, strict=True))
