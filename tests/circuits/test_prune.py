"""What pruning leaves keeps the share, and not without any one of its edges."""

from __future__ import annotations

import pytest
import torch

from sinklens.circuits.run import Search
from tests.helpers.circuits import made_for
from tests.helpers.tiny import slow_but, tiny_model


@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt2")))
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_no_single_edge_can_go(family, share) -> None:
    made = made_for(tiny_model(family))
    search = Search(made, share, steps=3, sample=0, draws=1)
    pruner, kept = search._pruned(search._estimates())
    sets = [kept, *([e for e in kept if e != gone] for gone in kept)]
    whole, *without = search.verifier.shares(pruner.masks(sets), made.without.nodes, "test").mean(1)
    assert share <= whole <= 2 - share
    assert 1 < len(kept) < 150
    assert not [x for x in without if share <= x <= 2 - share]
    assert (len(kept), pytest.approx(whole, abs=1e-5)) in pruner.curve


def test_a_set_that_makes_too_much_loses_what_does(tiny_llama) -> None:
    """The order is turned about where a set is far from the sink, and by slopes where there are many edges."""
    made = made_for(tiny_llama)
    search = Search(made, 0.9, steps=3, sample=0, draws=1)
    pruner, _ = search._pruned(search._estimates())
    kept = torch.arange(0, len(made.graph.edges), 9).tolist()
    assert len(kept) < 150
    pruner._far = 0.0
    near = list(pruner._orders(kept))
    pruner._far = 0.09
    far = list(pruner._orders(kept))
    assert near[:2] == far[1::-1] and near[0] != near[1]
    assert all(sorted(order) == kept for order in near)
