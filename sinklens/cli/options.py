"""Options that several commands have, besides what they are run on (:mod:`sinklens.cli.inputs`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.choices import Backend, Pair

BackendOption = Annotated[Backend, typer.Option(help="TransformerLens class to load the model as.")]
PairOption = Annotated[Pair, typer.Option(help="How the sink is made at the target.")]
StrengthOption = Annotated[float, typer.Option(help="Lambda of amplify_variance.")]
ReadoutBlocksOption = Annotated[int, typer.Option(min=1, help="Blocks after formation to measure attention in.")]
MinGapOption = Annotated[float, typer.Option(help="Exclude prompts whose metric the pair moves by less.")]
LossOption = Annotated[
    bool,
    typer.Option(
        "--loss",
        help="Also what every edit of the chain does to the loss, beside its control: every row then runs to the end "
        "of the model, which takes about 4 times as long (SmolLM2, 4 prompts of 32 tokens).",
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
