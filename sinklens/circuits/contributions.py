"""Direct contributions: what every sender adds to an input of the super neurons, exactly.

A norm is linear but for its scale, so with ``s`` over senders and biases, ``w`` the norm's multiplier, ``sigma`` its
scale in a run A,

    in a run:           input_A  =  sum_s (s_A * w / sigma_A) W  +  offset

    between two runs:   input_A - input_B  =  sum_s (s_A - s_B) w W (1/sigma_A + 1/sigma_B) / 2
                                           +  sum_s (s_A + s_B) w W / 2 (1/sigma_A - 1/sigma_B)

where the last line is what the scale itself contributes. A LayerNorm subtracts each sender's own mean. The sums are
held against the model's own activations. It is what a sender says *directly*: what others make of it counts as theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.circuits.graph import Graph, Input
from sinklens.circuits.measure import Measure, intervals
from sinklens.circuits.parts import Parts, Reader, share
from sinklens.circuits.result import table
from sinklens.circuits.written import SUM_TOLERANCE, Written
from sinklens.engine.capture import capture_runs
from sinklens.engine.packed.weights import Norm
from sinklens.engine.store import Want
from sinklens.errors import EngineError
from sinklens.models.view import dtype_of
from sinklens.patches import Source
from sinklens.sites import PATTERN, V
from sinklens.stages.base import Setting

BIAS, NORM = "bias", "norm"
"""What stands among the senders for biases (of attention's output, and of norm and projection), and for the scale."""


class Contributions:
    """Decompositions of the super neurons' inputs in the two runs of a pair."""

    def __init__(self, setting: Setting, graph: Graph, parts: Parts, with_sink: Written, without: Written) -> None:
        self.setting, self.graph, self.parts = setting, graph, parts
        self.runs = {"with": with_sink, "without": without}

    @torch.no_grad()
    def of_run(self, which: str, key: Input) -> Float[Tensor, "sender prompt neuron"]:
        """What each sender adds to an input of each neuron in a run; the last is what biases do."""
        reader, terms = self._terms(which, key)
        whole = terms.sum(0)
        added = share(reader.norm, terms, whole).to(reader.W.dtype) @ reader.W
        offset = self._offset(reader)
        found = torch.cat([added[:-1], added[-1:] + offset])
        self._check(found.sum(0), which, key)
        return found

    @torch.no_grad()
    def difference(self, key: Input) -> Float[Tensor, "sender prompt neuron"]:
        """What each sender adds to the difference between the runs: then biases, then the norm's scale."""
        reader, a = self._terms("with", key)
        _, b = self._terms("without", key)
        one, other = (1 / _scale(reader.norm, x.sum(0)) for x in (a, b))
        project = reader.W.float()
        weigh = _linear(reader.norm)
        added = (weigh(a - b) * (one + other) / 2) @ project
        of_scale = (weigh((a + b).sum(0)) * (one - other) / 2) @ project
        return torch.cat([added, of_scale[None]])

    def _terms(self, which: str, key: Input) -> tuple[Reader, Float[Tensor, "sender prompt d_model"]]:
        node, branch = key
        (reader,), written = self.parts.readers(node, branch), self.runs[which]
        blocks = node.block + (not self.graph.shape.parallel)
        heard = written.nodes[: self.graph.heard(node)]
        return reader, torch.cat([heard, written.bias_before(blocks)[None]])

    def _offset(self, reader: Reader) -> Tensor:
        offset = torch.zeros(reader.W.shape[1], device=reader.W.device, dtype=reader.W.dtype)
        if reader.norm is not None and reader.norm.b is not None:
            offset = offset + reader.norm.b.to(reader.W) @ reader.W
        return offset if reader.b is None else offset + reader.b

    def _source(self, which: str) -> Source:
        pair = self.setting.pair
        return pair.with_sink if which == "with" else pair.without

    def _check(self, total: Float[Tensor, "prompt neuron"], which: str, key: Input) -> None:
        """Hold the sum against the model's own activation."""
        setting, source, (reader,) = self.setting, self._source(which), self.parts.readers(*key)
        index = source.where(setting.pair.target).single(setting.batch.n)
        want = Want(source.run, reader.site, self.graph.formation, tuple(sorted(set(index.tolist()))))
        runs = {source.run: setting.pair.runs[source.run]}
        store = capture_runs(setting.model, setting.batch.tokens, runs, [want], max_rows=setting.max_rows)
        own = store.at(source.run, reader.site, self.graph.formation, index)[:, list(self.graph.neurons)].float()
        error, dtype = float((total - own).abs().max() / own.abs().max()), dtype_of(setting.model)
        if not error <= SUM_TOLERANCE[dtype]:
            raise EngineError(f"the contributions to {reader.site.template} do not add up to it: {error:.2g} off")

    @torch.no_grad()
    def frame(self, measure: Measure) -> pd.DataFrame:
        """The table ``contributions`` of a circuit: means over the super neurons and prompts."""
        records: list[dict[str, Any]] = []
        names = [node.name for node in self.graph.senders]
        for key in self.graph.super_inputs:
            heard = names[: self.graph.heard(key[0])]
            for which in ("with", "without"):
                records += self._records(measure, key, which, [*heard, BIAS], self.of_run(which, key))
            records += self._records(measure, key, "difference", [*heard, BIAS, NORM], self.difference(key))
        return table("contributions", records)

    def _records(self, measure: Measure, key: Input, run: str, names: list[str], found: Tensor) -> list[dict[str, Any]]:
        values = found.mean(-1).double().cpu().numpy()
        low, high = intervals(values, measure.setting.study.seed, measure.setting.study.groups)
        node, branch = key
        return [
            dict(
                receiver=node.name, branch=branch, sender=name, run=run, value=x, ci_low=a, ci_high=b, n=values.shape[1]
            )
            for name, x, a, b in zip(names, values.mean(1), low, high, strict=True)
        ]

    @torch.no_grad()
    def by_token(self) -> pd.DataFrame:
        """The table ``by_token``: what each token's values add directly, by all heads up to the super neurons."""
        records: list[dict[str, Any]] = []
        for which in ("with", "without"):
            values = self._of_tokens(which)
            for branch, x in values.items():
                for prompt, position in np.ndindex(*x.shape):
                    token = self.setting.batch.labels[prompt][position]
                    record = {"run": which, "prompt": prompt, "position": position, "token": token, "branch": branch}
                    records.append({**record, "value": float(x[prompt, position])})
        return table("by_token", records)

    def _of_tokens(self, which: str) -> dict[str, Float[np.ndarray, "prompt pos"]]:
        setting, source = self.setting, self._source(which)
        index = source.where(setting.pair.target).single(setting.batch.n)
        blocks = range(self.graph.formation + (not self.graph.shape.parallel))
        wants = [Want(source.run, site, block) for block in blocks for site in (PATTERN, V)]
        runs = {source.run: setting.pair.runs[source.run]}
        store = capture_runs(setting.model, setting.batch.tokens, runs, wants, max_rows=setting.max_rows)
        written = sum(self._block(store, source.run, block, index) for block in blocks)
        found = {}
        for key in self.graph.super_inputs:
            reader, terms = self._terms(which, key)
            moved = share(reader.norm, written, terms.sum(0)[:, None]) if isinstance(written, Tensor) else None
            assert moved is not None
            found[key[1]] = (moved.to(reader.W.dtype) @ reader.W).mean(-1).double().cpu().numpy()
        return found

    def _block(self, store: Any, run: str, block: int, index: Tensor) -> Float[Tensor, "prompt pos d_model"]:
        """What each token's values write at the target in one block."""
        pattern = store.at(run, PATTERN, block, index)  # [prompt head key]
        values = store.tensor(run, V, block)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], 2)
        z = pattern.transpose(1, 2)[..., None].float() * values.float()  # [prompt key head d_head]
        weights = self.parts.block(block)
        raw = z.flatten(2) @ weights.out.W.to(z)
        whole = raw.sum(1) + (0 if weights.out.b is None else weights.out.b.to(raw))
        return weights.added * share(weights.ln1_post, raw, whole[:, None])


def _scale(norm: Norm | None, x: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt 1"]:
    """What a norm divides by."""
    if norm is None:
        return torch.ones_like(x[:, :1])
    x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    return (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()


def _linear(norm: Norm | None) -> Any:
    """A norm without its scale and offset."""

    def weigh(x: Tensor) -> Tensor:
        if norm is None:
            return x
        x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        return x if norm.w is None else x * norm.w.to(x)

    return weigh
