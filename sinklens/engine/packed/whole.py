"""Whole prompts through the packed pass: what :func:`sinklens.engine.hooks.execute` does through TransformerLens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.apply import Op
from sinklens.engine.hooks import Program
from sinklens.engine.packed.blocks import PackedPass
from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.points import Points
from sinklens.engine.packed.weights import PackedModel
from sinklens.sites import HookSite


def execute_whole(
    packed: PackedModel, tokens: Int[Tensor, "row pos"], program: Program, *, stop_at: int
) -> dict[tuple[str, int], Tensor]:
    """Run blocks 0 to ``stop_at - 1`` on ``tokens`` with all that a program does; returns ``program.readings``.

    ``stop_at`` beyond the last block asks for the logits.
    """
    length, last = tokens.shape[1], stop_at - 1
    layout = whole_rows(program.prompts, length)
    points = Points(
        layout,
        [_packed(op, length) for op in program.ops],
        program.readouts,
        captured=_nothing_before,
        source_of=program.source_of,
        changed=program.changed,
        n_layers=packed.n_layers,
        captures=program.captures,
        broken=program.broken,
    )
    x = PackedPass(packed, layout, points).run(0, last, packed.embedded(tokens).flatten(0, 1))
    program.readings.update(points.readings)
    program.finite = torch.isfinite(x).view(len(tokens), -1).all(-1)
    return program.readings


def whole_rows(prompts: Int[Tensor, " row"], length: int, entry: int = 0) -> Layout:
    """Rows of all positions of some prompts."""
    zeros = np.zeros(len(prompts), dtype=np.int64)
    return Layout(
        prompts=prompts.cpu().numpy(),
        contexts=np.arange(len(prompts)),
        starts=zeros,
        stops=zeros + length,
        entries=zeros + entry,
        length=length,
        device=prompts.device,
    )


def _packed(op: Op, length: int) -> Op:
    """The op with its places as packed tokens."""
    row, position = op.address
    return replace(op, address=(row * length + position,))


def _nothing_before(site: HookSite, layer: int) -> Tensor:
    raise AssertionError(f"{site.at(layer)} of a pass that begins at the tokens")
