"""Template of a variant of attention: copy this file, change the equation, train it.

    sl.lab.train(variant="analyses/_variant_template.py", ...)      # or import it, then variant="temperature"

What else a variant may override, and with which axes, is in sinklens/variants/base.py; each of its neighbours is an
example. Import this file before you load a model that was trained with it: models bring no code with them.
"""

from __future__ import annotations

import torch

import sinklens as sl


@sl.register_variant
class Temperature(sl.Variant):
    """``softmax(exp(-t_h) q k^T / sqrt(d_head)) v``: each head learns how sharply it attends."""

    name = "temperature"
    claim = "heads that need no sink attend more evenly"

    def __init__(self, sizes: sl.AttentionSizes, *, start: float = 0.0) -> None:
        super().__init__(sizes)
        self.start = start
        self.t = torch.nn.Parameter(torch.full((sizes.n_heads,), start))

    def options(self):
        return {"start": self.start}

    def queries(self, q):  # [*batch head d_head]
        return q * (-self.t).exp()[:, None]
