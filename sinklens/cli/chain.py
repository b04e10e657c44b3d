"""``sinklens chain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklens.cli.choices import Pair
from sinklens.cli.display import progress
from sinklens.cli.inputs import EventInputs, with_inputs
from sinklens.cli.mistakes import errors, fail
from sinklens.cli.options import (
    ForceOption,
    JsonOption,
    LossOption,
    MinGapOption,
    OutOption,
    PairOption,
    ReadoutBlocksOption,
    StrengthOption,
)
from sinklens.cli.pages import write_pages
from sinklens.cli.values import check_enough, check_finite, targets_of
from sinklens.records.ranges import MOST_REPEATS, integers

if TYPE_CHECKING:
    from sinklens.pairs.choice import Target


@with_inputs(n=16)
def chain(
    *,
    target: Annotated[
        str,
        typer.Option(
            help="Position that is made a sink, or `natural` for the data's own; several, such as `5,10,20`: a folder "
            "for each in --out, and whether their verdicts agree."
        ),
    ] = "10",
    pair: PairOption = Pair.block_aggregation,
    metric: Annotated[
        str,
        typer.Option(
            help="What is measured of the sink: attention_received, alpha, sink_rate, residual_norm, dominance, loss "
            "or kl; `sinklens sweep` also measures logit_diff."
        ),
    ] = "attention_received",
    strength: StrengthOption = 8.0,
    pair_layers: Annotated[
        str | None, typer.Option(help="Blocks of that intervention, such as `0-2` or `0,3`; see the documentation.")
    ] = None,
    links: Annotated[
        bool,
        typer.Option("--links", help="Two more stages between W_O and the super neurons: what carries one's write."),
    ] = False,
    readout_blocks: ReadoutBlocksOption = 4,
    control_draws: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Repetitions of random draws.")] = 3,
    min_gap: MinGapOption = 0.01,
    loss: LossOption = False,
    inputs: EventInputs,
    out: OutOption = Path("runs/chain"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of the attention-sink chain, with controls and intervals."""
    with errors():
        targets = targets_of(target, inputs.length)
        check_enough(inputs.n)
        check_finite("--min-gap", min_gap, least=0.0)
        check_finite("--strength", strength)
        bytes_allowed, given = inputs.bytes_allowed(), inputs.given()
        options = {
            "pair": pair.value,
            "metric": metric,
            "strength": strength,
            "pair_layers": None if pair_layers is None else integers("--pair-layers", pair_layers),
            "readout_blocks": readout_blocks,
            "control_draws": control_draws,
            "min_gap": min_gap,
            **({"loss": True} if loss else {}),
            "seed": inputs.seed,
            "memory_budget": bytes_allowed,
        }
        _check_several(inputs, targets)
        _check_folder(inputs, out, force)
        from sinklens.cli.of_chain import Job, print_chains, score

        with progress() as (step, rows):
            model, batch = inputs.load(step)
            check_enough(batch.n, f"only {batch.n} in {batch.source} has {inputs.length} tokens or more")
            job = Job(model, batch, given, targets, links, options | {"progress": rows}, out, force, step)
            chains = score(job, inputs)
        print_chains(chains, as_json)
        write_pages([chain.out for chain in chains.each], as_json, besides=[out])


def _check_several(inputs: EventInputs, targets: list[Target]) -> None:
    """Make sure that the chain is scored more than once for one reason alone."""
    if inputs.every_event + (len(targets) > 1) + (inputs.replicate is not None) > 1:
        fail("give --event all, several targets or --replicate, one of the three")


def _check_folder(inputs: EventInputs, out: Path, force: bool) -> None:
    """Make sure that results can be written: several sets of prompts are taken up in the folder that they have left."""
    from sinklens.records.files import check_out

    if inputs.replicate is None:
        check_out(out, force=force)
    else:
        from sinklens.analysis.suite import earlier_parts

        earlier_parts(out)
