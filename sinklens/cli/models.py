"""``sinklens models``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sinklens.cli.choices import Backend
from sinklens.cli.display import progress
from sinklens.cli.mistakes import errors
from sinklens.cli.options import BackendOption, JsonOption


def models(
    capabilities: Annotated[
        str | None,
        typer.Option(
            help="Try every stage and analysis on a model, or on a family: llama, qwen2, gpt2, gpt_neox, gemma2, ..."
        ),
    ] = None,
    backend: BackendOption = Backend.auto,
    as_json: JsonOption = False,
) -> None:
    """List the models that have a short name, or try what runs on one."""
    if capabilities is not None:
        _capabilities(capabilities, backend, as_json)
        return
    with errors():
        from dataclasses import asdict

        from rich.table import Table

        from sinklens.cli.fitting import show
        from sinklens.cli.tables import console
        from sinklens.models.load import list_models
        from sinklens.records.plain import to_plain

        found = [asdict(item) for item in list_models()]
        if as_json:
            print(json.dumps(to_plain(found), indent=1))  # noqa: T201  (the command's output)
            return
        table = Table(title="Models with a short name")
        for name in found[0]:
            table.add_column(name, overflow="fold")
        for item in found:
            table.add_row(*("" if value is None else str(value) for value in item.values()))
        show(console(), table)
        console().print("Any other model: give a Hugging Face id or a local folder to --model.")


def _capabilities(name: str, backend: Backend, as_json: bool) -> None:
    with errors(), progress() as (step, _rows):
        from dataclasses import asdict

        step(f"trying everything on {name}")
        from sinklens.analysis.capabilities import capabilities
        from sinklens.cli.fitting import show
        from sinklens.cli.tables import capabilities_table, console
        from sinklens.models.families import FAMILIES
        from sinklens.models.load import load_model

        found = capabilities(name if name in FAMILIES else load_model(name, backend=backend.value))
        if as_json:
            print(json.dumps(asdict(found), indent=1))  # noqa: T201  (the command's output)
        else:
            show(console(), capabilities_table(found))
