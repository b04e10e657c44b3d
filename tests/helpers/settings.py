"""What a stage may know, on a random model: there is no sink to find, so block and neurons are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinklens.formation import find_formation
from sinklens.pairs.pair import induced_pair, natural_pair
from sinklens.prompts import from_tokens
from sinklens.stages.base import Setting
from sinklens.study import Study

N, LENGTH, TARGET = 3, 12, 4


def tokens_for(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.cfg.d_vocab, (N, LENGTH), generator=generator)


def setting_for(model: Any, kind: str = "block_aggregation") -> Setting:
    batch = from_tokens(model, tokens_for(model))
    formation = find_formation(model, batch, layer=1, super_neurons=[3, 7], outlier_dims=[2, 5])
    if kind == "natural":
        # Different positions in different prompts: nothing may assume one position for all.
        formation = replace(formation, sink_positions=(0, 2, 1))
        pair = natural_pair(batch, formation)
    else:
        formation = replace(formation, sink_positions=(0, 0, 0))
        pair = induced_pair(model, batch, formation, TARGET, kind=kind)  # type: ignore[arg-type]
    return Setting(Study.of(model, batch, formation, rows=8), pair, (2, 3))
