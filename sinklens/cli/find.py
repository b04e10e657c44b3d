"""``sinklens find``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sinklens.cli.display import progress
from sinklens.cli.inputs import Inputs, with_inputs
from sinklens.cli.mistakes import errors
from sinklens.cli.options import JsonOption

if TYPE_CHECKING:
    from sinklens.formation import Formation
    from sinklens.prompts import PromptBatch


@with_inputs(n=16, without=("replicate", "memory_budget"))
def find(*, inputs: Inputs, as_json: JsonOption = False) -> None:
    """Find where the sink forms: blocks, super neurons, outlier dimensions."""
    with errors():
        given = inputs.given()
        with progress() as (step, _rows):
            model, batch = inputs.load(step)
            from sinklens.formation import find_formation

            step("finding the formation block")
            formation = find_formation(model, batch, **given)
        _print(formation, batch, as_json)


def _print(formation: Formation, batch: PromptBatch, as_json: bool) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console, formation_tables
    from sinklens.formation import formation_to_json
    from sinklens.prompts import prompts_text
    from sinklens.records.plain import to_plain

    if as_json:
        data = {**formation_to_json(formation), **batch.record()}
        print(json.dumps(to_plain(data), indent=1))  # noqa: T201  (the command's output)
        return
    show(console(), *formation_tables(formation))
    console().print(prompts_text(batch.record()), markup=False)
