"""Edge scores and exact edges against auto-circuit, where it is installed.

It pins an old kaleido, and of what it depends on this takes no more than ``pip install --no-deps auto-circuit
ordered-set blobfile`` brings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.circuits.estimates import Estimator
from sinklens.circuits.nodes import Edge, Node
from tests.helpers.circuits import made_for, root_hooks
from tests.helpers.settings import TARGET
from tests.helpers.tiny import tiny_model

pytest.importorskip("transformer_lens.HookedTransformer")
pytest.importorskip("auto_circuit")


@pytest.fixture
def graph_utils(monkeypatch) -> Any:
    """Its patchable models; it looks for TransformerLens's cache, which is not used, under an older name."""
    import transformer_lens

    older: Any = ModuleType("transformer_lens.past_key_value_caching")
    older.HookedTransformerKeyValueCache = type("HookedTransformerKeyValueCache", (), {})
    monkeypatch.setitem(sys.modules, older.__name__, older)
    monkeypatch.setattr(
        transformer_lens, "HookedTransformerKeyValueCache", older.HookedTransformerKeyValueCache, raising=False
    )
    from auto_circuit.utils import graph_utils  # pyright: ignore[reportMissingImports]: not among the requirements

    return graph_utils


@contextmanager
def listening(model: Any, root: list[Any], layers: tuple[int, ...] = (2, 3)) -> Iterator[list[torch.Tensor]]:
    """Patterns of the blocks in which the sink is read, of a run under some hooks."""
    patterns: list[torch.Tensor] = []
    read = [(f"blocks.{block}.attn.hook_pattern", lambda x, hook: patterns.append(x)) for block in layers]  # noqa: ARG005
    with model.hooks(fwd_hooks=[*root, *read]):
        yield patterns


class AutoCircuit:
    """The same model in auto-circuit, for one prompt: edges at every token."""

    def __init__(self, graph_utils: Any, model: Any, tokens: torch.Tensor) -> None:
        self.utils, self.tokens, self.hooked = graph_utils, tokens, model
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        self.model = self.utils.patchable_model(model, factorized=True, seq_len=tokens.shape[1], separate_qkv=True)

    def received(self, root: list[Any], says: torch.Tensor | None = None, edges: Any = None) -> tuple[Any, Any]:
        """The metric, and what all its nodes write, where the senders of some edges say something else."""
        size = (len(self.model.srcs), *self.tokens.shape, self.hooked.cfg.d_model)
        writes = torch.zeros(size)
        other = torch.zeros(size) if says is None else says
        with (
            self.utils.patch_mode(self.model, other, edges, writes),
            listening(self.hooked, root) as patterns,
        ):
            self.model(self.tokens)
        return torch.stack([x[:, :, TARGET + 1 :, TARGET].mean() for x in patterns]).mean(), writes.detach()

    def scores(self, root: list[Any], says: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of every edge's mask where none is patched."""
        self.utils.set_all_masks(self.model, 0.0)
        with torch.enable_grad(), self.utils.train_mask_mode(self.model) as masks:
            self.received(root, says)[0].backward()
            return {name: mask.grad.clone() for name, mask in masks.items() if mask.grad is not None}

    def edge(self, edge: Edge) -> Any:
        """Its edge of that name at the sink's token."""
        return self.model.edge_name_dict[TARGET][f"{_name(edge.sender)}->{_name(edge.receiver, edge.branch)}"]


def _name(node: Node, branch: str = "in") -> str:
    if node.kind == "embed":
        return "Resid Start"
    if node.kind == "mlp":
        return f"MLP {node.block}"
    return f"A{node.block}.{node.index}" + ("" if branch == "in" else f".{branch.upper()}")


def shared_edges(edges: Any) -> list[Edge]:
    """Edges that auto-circuit has as well: it knows no super neurons apart from their MLP."""
    ends = [(edge, node) for edge in edges for node in (edge.sender, edge.receiver)]
    apart = {edge for edge, node in ends if node.kind == "super" or (node.kind == "mlp" and node.block == 1)}
    return [edge for edge in edges if edge not in apart]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_edges_are_those_of_auto_circuit(direction, graph_utils) -> None:
    made = made_for(tiny_model("gpt2", "hooked"))
    edges = shared_edges(made.graph.edges)
    places = [made.graph.place[edge] for edge in edges]
    rewiring = made.verifier(made.setting.pair.with_sink.run).rewiring
    estimates = Estimator(made.measure, made.graph, rewiring, made.with_sink, made.without).eap(direction)[places]
    some = list(range(0, len(edges), 9))
    exact = made.effects([edges[i] for i in some], direction)
    root = root_hooks(made.setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    for prompt, tokens in enumerate(made.setting.batch.tokens):
        theirs = AutoCircuit(graph_utils, tiny_model("gpt2", "hooked"), tokens[None])
        (start, _), (end, says) = theirs.received(own), theirs.received(other)
        gap = (end - start).item()
        scores = theirs.scores(own, says)
        expected = [float(theirs.edge(edge).prune_score(scores)) / gap for edge in edges]
        np.testing.assert_allclose(estimates[:, prompt], expected, atol=1e-4, rtol=1e-4)
        alone = [(theirs.received(own, says, [theirs.edge(edges[i])])[0] - start).item() / gap for i in some]
        np.testing.assert_allclose(exact[:, prompt], alone, atol=2e-3, rtol=2e-3)
    assert np.abs(estimates).max() > 0.01 and np.abs(exact).max() > 0.01
