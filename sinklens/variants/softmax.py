"""Softmax attention, as nearly every model has it."""

from __future__ import annotations

from sinklens.variants.base import Variant


class Softmax(Variant):
    """``softmax(q k^T / sqrt(d_head)) v`` (Vaswani et al. 2017), the arm that others are compared with."""

    name = "softmax"
    claim = "a sink forms at the first token"
