"""Which sweeps are measured: along the number of patches, the length of prompts and the depth, and the chain's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinklens.errors import InputError
from tests.benchmark.flops import Sizes
from tests.benchmark.workload import Workload, grid, make_workload

Axis = Literal["patches", "length", "blocks", "chain"]


@dataclass(frozen=True, eq=False)
class Case:
    """One sweep to measure."""

    axis: Axis
    """What varies between this one and others."""
    value: int
    """Its value on that axis."""
    n_blocks: int
    """Patched blocks."""
    work: Workload
    """The sweep."""


@dataclass(frozen=True)
class Plan:
    """The sweeps that are asked for."""

    patches: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Numbers of patches."""
    lengths: tuple[int, ...] = ()
    """Lengths of prompts."""
    blocks: tuple[int, ...] = ()
    """Numbers of patched blocks, the last ones up to the readout."""
    chain: bool = False
    """Whether to measure patches as the chain has them: up to the block where a sink forms, read in the four after."""
    formation: int = 1
    """That block: 1 in Llama-2-7B."""
    length: int = 128
    """Tokens in a prompt, where that does not vary."""
    count: int = 1024
    """Patches, where that does not vary."""
    readout: int | None = None
    """Block in which attention is read; the last but one by default."""
    seed: int = 0
    """Draws prompts and cells."""


def make_cases(plan: Plan, model: str, sizes: Sizes, longest: int) -> list[Case]:
    """The sweeps of a plan.

    Raises:
        InputError: something that the model does not have.
    """
    readout = sizes.n_layers - 2 if plan.readout is None else plan.readout
    if not 0 <= readout < sizes.n_layers:
        raise InputError(f"--readout {readout} is not a block of this model: choose one of 0..{sizes.n_layers - 1}")
    for length in (plan.length, *plan.lengths):
        if not 16 <= length <= longest:
            raise InputError(f"prompts of {length} tokens: {model} takes 16 to {longest} here")
    for n in plan.blocks:
        if not 1 <= n <= readout + 1:
            raise InputError(f"--blocks {n}: there are 1 to {readout + 1} blocks up to the readout")
    every = readout + 1
    cases = [_late(plan, sizes, "patches", n, readout, every, n, plan.length) for n in plan.patches]
    if plan.chain:
        cases.append(_chain(plan, sizes))
    cases += [_late(plan, sizes, "length", t, readout, every, plan.count, t) for t in plan.lengths]
    cases += [_late(plan, sizes, "blocks", n, readout, n, plan.count, plan.length) for n in plan.blocks]
    return cases


def _late(plan, sizes, axis, value, readout, n_blocks, n_patches, length) -> Case:  # noqa: ANN001
    cells = grid(range(readout + 1 - n_blocks, readout + 1), range(length))
    return Case(
        axis, value, n_blocks, make_workload(n_patches, cells, length, (readout,), sizes.d_vocab, seed=plan.seed)
    )


def _chain(plan: Plan, sizes: Sizes) -> Case:
    if not 0 <= plan.formation < sizes.n_layers - 1:
        raise InputError(f"--formation {plan.formation} must be one of the blocks 0..{sizes.n_layers - 2}")
    after = plan.formation + 1
    readouts = tuple(range(after, min(after + 4, sizes.n_layers)))
    cells = grid(range(after), range(plan.length))  # all of them, on one prompt
    work = make_workload(len(cells), cells, plan.length, readouts, sizes.d_vocab, seed=plan.seed)
    return Case("chain", len(cells), after, work)
