"""Gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant


class Gate(Variant):
    """``z * sigmoid(x W)``: each head's output, in front of W_O, times a gate of the query's own normed input ``x``.

    Source: Qiu et al., arXiv 2505.06708 (their place G1; modeling_qwen3.py of their code). ``kind="elementwise"`` has
    ``W [d_model, head * d_head]``, ``kind="headwise"`` one gate a head, ``W [d_model, head]``. W starts from a normal
    with sd 0.02 and no bias, as there, so that gates start near one half and halve what attention writes. W is decayed
    with the other matrices. Pitfalls: gates that do not depend on the input, or stay over one half, keep the sink; one
    at the values (G2) does, too. Elementwise gates add a quarter to attention's weights: compare with a control of as
    many.
    """

    name = "gate"
    claim = "no sink forms and activations stay small, as a head can write nothing without one"
    edit = "output_gate"
    decays = True
    drawn: ClassVar[Mapping[str, float]] = {"W": 0.02}

    def __init__(self, sizes: AttentionSizes, *, kind: Literal["elementwise", "headwise"] = "elementwise") -> None:
        super().__init__(sizes)
        if kind not in ("elementwise", "headwise"):
            raise ValueError(f"kind must be elementwise or headwise, not {kind!r}")
        self.kind = kind
        self.W = nn.Parameter(
            torch.zeros(sizes.d_model, sizes.n_heads * (sizes.d_head if kind == "elementwise" else 1))
        )

    def options(self) -> dict[str, str]:
        """See :meth:`Variant.options`."""
        return {"kind": self.kind}

    def output(
        self, z: Float[Tensor, "*batch head d_head"], x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch head d_head"]:
        """See :meth:`Variant.output`."""
        return z * (x @ self.W).sigmoid().unflatten(-1, (self.sizes.n_heads, -1))
