"""How far it is from the public function to the tensor that is written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor

import sinklens as sl
from sinklens import edits, engine, sites
from sinklens.models import state
from tests.helpers.sweeps import tiny_batch
from tests.helpers.tiny import tiny_model


class Watching(edits.Edit):
    """Notes by which functions of the package it was called."""

    calls: Sequence[str] = ()

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        if self.calls:  # only the first call writes: the others try it on fewer rows
            return x + 1
        frames = [frame for frame in inspect.stack() if frame.filename.startswith(sl.__path__[0])]
        frames = [frame for frame in frames if frame.filename != state.__file__]  # of a decorator
        object.__setattr__(self, "calls", [frame.function for frame in reversed(frames)])
        return x + 1


def test_the_calls_from_a_chain_to_the_write_are_those_that_the_docstring_lists() -> None:
    edit = Watching("watching")
    stage = sl.Stage(
        name="watched",
        claim="It is called.",
        site=sites.Z,
        layers=lambda setting: (setting.formation.layer,),
        experiments=(
            sl.Experiment(
                "watching", lambda s, stage, way, _: s.patch(way, stage.site, (1,), edit), sl.Prediction(1, 1)
            ),
        ),
        readout=lambda s, stage: s.readout(stage, lambda x, _block: x.float().flatten(1).norm(dim=-1)),
    )
    model = tiny_model("llama", "hooked")
    batch = tiny_batch(model, 3, 12)
    formation = sl.find_formation(model, batch, layer=1, super_neurons=[3, 7], outlier_dims=[2, 5])
    sl.run_chain(model, batch, target=4, stages=(stage,), formation=formation, min_gap=1e-9)
    asked, *calls, edited = edit.calls
    assert (asked, edited) == ("run_chain", "edited")
    names = ["score_chain", "run", "_batches", "forward", "run", "_attention", "visit", "apply_edit"]
    assert calls == names
    listed = [line for line in (engine.__doc__ or "").splitlines() if line[:1].isdigit()]
    assert len(listed) == 8 and all(name in line for name, line in zip(calls, listed, strict=True))
