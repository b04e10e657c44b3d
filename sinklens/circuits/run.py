"""The whole job: estimate all edges, prune to the fewest, verify and test them, and say how nodes work together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sinklens.chain.result import METRIC
from sinklens.circuits.contributions import Contributions
from sinklens.circuits.direct import Listeners
from sinklens.circuits.edges import Edges
from sinklens.circuits.estimates import STEPS, Estimator, rank_correlation
from sinklens.circuits.exact import exact_edges, exact_rows
from sinklens.circuits.interactions import chosen_nodes, interactions
from sinklens.circuits.measure import Effects
from sinklens.circuits.prune import Pruner
from sinklens.circuits.result import Circuit, table
from sinklens.circuits.rewired import Rewiring
from sinklens.circuits.trials import Tester
from sinklens.circuits.verify import Verifier
from sinklens.circuits.views import attention_of
from sinklens.formation import Formation
from sinklens.formation.find import given_event
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.pairs.choice import STRENGTH, InducedKind, PairChoice, Target
from sinklens.pairs.effects import MIN_GAP
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import PositionReadout
from sinklens.readouts.named import NamedReadout
from sinklens.records.integers import whole_numbers
from sinklens.records.progress import Progress, progress_of
from sinklens.records.ranges import MOST_REPEATS, Between, check_number, check_seed
from sinklens.stages.base import Setting
from sinklens.statistics import bootstrap_estimate
from sinklens.study import Study

MOST_SAMPLED = 100_000
"""The largest sample of edges that are run exactly."""


@in_usual_state
def circuit(
    model: Model,
    batch: PromptBatch,
    *,
    target: Target = 10,
    pair: InducedKind = "block_aggregation",
    strength: float = STRENGTH,
    pair_layers: Sequence[int] | None = None,
    formation: Formation | None = None,
    event: int | None = None,
    metric: str | NamedReadout = METRIC,
    share: float = 0.9,
    steps: int = STEPS,
    sample: int = 64,
    control_draws: int = 10,
    readout_blocks: int = READOUT_BLOCKS,
    min_gap: float = MIN_GAP,
    seed: int = 0,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | bool | None = None,
) -> Circuit:
    """The fewest edges, of all up to the blocks in which the sink is read, that keep ``share`` of the sink.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        target: position that is made a sink, or ``"natural"`` for the sink that the data has.
        pair: how the sink is made at ``target``: ``block_aggregation`` or ``amplify_variance``.
        strength: lambda of ``amplify_variance``.
        pair_layers: blocks of that intervention (see :func:`sinklens.induced_pair` for the default).
        formation: where the sink forms; found if not given.
        event: number of the formation event to explain, in place of ``formation``.
        metric: what is measured of the sink: something of attention, in which the sink's own query does not count.
        share: what part of the sink the circuit is to keep, as a mean over prompts.
        steps: points on the way between the runs, for integrated gradients.
        sample: edges that are drawn at random and run exactly, to judge the estimates by.
        control_draws: random sets of edges.
        readout_blocks: in how many blocks after the formation block the metric is measured.
        min_gap: least difference of the metric between the pair's runs; prompts with less are excluded.
        seed: fixes every draw and the bootstrap.
        memory_budget: bytes for one forward pass's activations.
        max_rows: rows for one forward pass, in place of the budget.
        progress: called with (rows done, rows in all); ``True`` or ``False``: a line that says it, or none; by default
            one in terminals and notebooks.

    Raises:
        NoSinkError: the model has no sink on these prompts, or the pair makes none in any prompt.
        NotApplicableError: the model cannot be taken apart, or all edges together do not keep the share.
        InputError: an option that does not fit the model and prompts.
        EngineError: what the nodes write does not add up to what the model has.
    """
    layers = None if pair_layers is None else whole_numbers(pair_layers, "block")
    choice = PairChoice(target, pair, strength=strength, layers=layers)
    choice.check(batch.length)
    check_seed(seed)
    check_number("share", share, Between(0.01, 1))
    for name, value, most in (("steps", steps, 1000), ("control_draws", control_draws, MOST_REPEATS)):
        check_number(name, value, Between(1, most), whole=True)
    check_number("sample", sample, Between(0, MOST_SAMPLED), whole=True)
    check_number("readout_blocks", readout_blocks, Between(1), whole=True)
    check_number("min_gap", min_gap, Between(0))
    given = given_event(event, formation)
    options: dict[str, Any] = {"given": given, "seed": seed, "memory_budget": memory_budget, "rows": max_rows}
    with progress_of(progress, "circuit") as told:
        study = Study.of(model, batch, formation, **options, progress=told)
        edges = Edges.of(Setting.of(study, choice, readout_blocks), metric, min_gap)
        found = Search(edges, share, steps, sample, control_draws).run()
    found.config.update(choice.record(), min_gap=min_gap, seed=seed, **batch.record())
    return found


class Search:
    """One search for a circuit: what it stands on, and its steps.

    Args:
        all_edges: the edges that it chooses from, with the metric.
        share: what part of the sink is to be kept.
        steps: points on the way between the runs.
        sample: edges drawn at random that are run exactly.
        draws: random sets of edges.
    """

    def __init__(self, all_edges: Edges, share: float, steps: int, sample: int, draws: int) -> None:
        self.all_edges, self.share = all_edges, share
        self.steps, self.sample, self.draws = steps, sample, draws
        self.measure, self.graph, self.parts = all_edges.measure, all_edges.graph, all_edges.parts
        self.with_sink, self.without = all_edges.with_sink, all_edges.without
        self.setting = self.measure.setting
        self.rewiring = Rewiring(self.setting, self.graph, self.parts, self.setting.pair.with_sink.run)
        self.verifier = Verifier(self.measure, self.graph, self.rewiring)
        self.seconds: dict[str, float] = {}

    def run(self) -> Circuit:
        """All steps."""
        estimates = self._timed("estimates", self._estimates)
        pruner, kept = self._timed("pruning", lambda: self._pruned(estimates))
        edges = self.graph.edges
        tester = Tester(self.measure, self.verifier, kept, self.without, self.draws)
        minimality = self._timed("minimality", tester.minimality)
        tests = self._timed("tests", lambda: tester.frame(self._carried()))
        exact, agreement = self._timed("exact", lambda: self._exact(kept, estimates))
        nodes = chosen_nodes(self.graph, [edges[e] for e in kept], minimality["loss"].tolist())
        pairs = self._timed("interactions", lambda: interactions(self.measure, self.graph, nodes))
        contributions = Contributions(self.setting, self.graph, self.parts, self.with_sink, self.without)
        return Circuit(
            kept=tuple(edges[e] for e in kept),
            edges=pd.concat([exact, self._estimated(estimates, kept)], ignore_index=True),
            contributions=contributions.frame(self.measure),
            tests=tests,
            minimality=minimality,
            pruning=_curve(pruner.curve),
            interactions=pairs,
            agreement=agreement,
            formation=self.setting.formation,
            config=self._config(len(kept)),
            runs={run: found["sink"].tolist() for run, found in self.measure.runs.items()},
            provenance=self.setting.study.provenance,
            engine={"seconds": self.seconds, **self.measure.cost},
            tokens=list(self.setting.batch.labels[0]),
            by_token=contributions.by_token(),
            attention=attention_of(self.setting, self.graph, [edges[e] for e in kept]),
        )

    def _timed(self, what: str, step: Any) -> Any:
        began = time.perf_counter()
        found = step()
        self.seconds[what] = time.perf_counter() - began
        return found

    def _estimates(self) -> dict[tuple[str, str], Effects]:
        """``(method, direction)`` to the estimates of all edges."""
        estimator = Estimator(self.measure, self.graph, self.rewiring, self.with_sink, self.without)
        found = {}
        for direction in self.setting.pair.directions:
            found["eap", direction] = estimator.eap(direction)
            found["eap_ig", direction] = estimator.eap_ig(direction, self.steps)
        return found

    def _pruned(self, estimates: dict[tuple[str, str], Effects]) -> tuple[Pruner, list[int]]:
        size = np.abs(np.nanmean(estimates["eap_ig", "noise"], axis=1))
        ranking = np.argsort(-size, kind="stable").tolist()
        readout = self.measure.readouts[0]
        assert isinstance(readout, PositionReadout)
        setting = self.setting
        listeners = Listeners(setting, self.parts, setting.pair.with_sink.run, readout)
        rooted = tuple(range(self.graph.last)) if setting.pair.is_natural else setting.pair.root_layers
        pruner = Pruner(self.verifier, listeners, self.without.nodes, rooted, self.share)
        return pruner, pruner.prune(ranking)

    def _carried(self) -> tuple[Rewiring, Tensor, Tensor] | None:
        pair = self.setting.pair
        if pair.is_natural:
            return None
        base = Rewiring(self.setting, self.graph, self.parts, pair.without.run)
        return base, self.with_sink.nodes, self.without.nodes + self.all_edges.other_token

    def _exact(self, kept: list[int], estimates: dict[tuple[str, str], Effects]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Exact effects of all edges into the super neurons, of the circuit's and of a random sample; how far
        estimates agree on the sample.
        """
        edges, drawn = self.graph.edges, self.setting.study.generator("circuit/sample")
        sampled = torch.randperm(len(edges), generator=drawn)[: self.sample].sort().values.tolist()
        supers = [self.graph.place[edge] for edge in self.graph.edges_into(self.graph.super_inputs)]
        chosen = sorted({*supers, *kept, *sampled})
        records, agreement = [], []
        own = {edges[e] for e in kept}
        for direction in self.setting.pair.directions:
            for method, which, change in (
                ("exact", chosen, self.all_edges.change),
                ("other_token", sorted(kept), self.all_edges.other_token),
            ):
                some = [edges[e] for e in which]
                found = exact_edges(self.measure, self.graph, self.parts, some, change, direction)
                records += exact_rows(some, self.measure.means(found), direction, method, own)
                if method == "exact":
                    exact = np.nanmean(found[[chosen.index(e) for e in sampled]], axis=1)
                    agreement += [
                        _agreement(name, direction, np.nanmean(estimates[name, direction][sampled], axis=1), exact)
                        for name in ("eap", "eap_ig")
                        if len(sampled) > 1
                    ]
        return table("edges", records), table("agreement", agreement)

    def _estimated(self, estimates: dict[tuple[str, str], Effects], kept: list[int]) -> pd.DataFrame:
        edges = self.graph.edges
        own, records = {edges[e] for e in kept}, []
        for (method, direction), found in estimates.items():
            records += exact_rows(edges, self.measure.means(found), direction, method, own)
        return table("edges", records)

    def _config(self, n_kept: int) -> dict[str, Any]:
        setting, graph = self.setting, self.graph
        return {
            "metric": self.measure.metric.name,
            "share": self.share,
            "n_kept": n_kept,
            "n_edges": len(graph.edges),
            "n_nodes": len({*graph.senders, *(node for node, _ in graph.inputs)}),
            "sample": self.sample,
            "steps": self.steps,
            "control_draws": self.draws,
            "readout_layers": list(setting.readout_layers),
            "root_layers": list(setting.pair.root_layers),
            "target_positions": setting.pair.target.single(setting.batch.n).tolist(),
        }


def _curve(points: Sequence[tuple[int, float]]) -> pd.DataFrame:
    """The best share of every size, the smallest first."""
    best: dict[int, float] = {}
    for size, share in points:
        best[size] = max(share, best.get(size, -np.inf))
    return table("pruning", [{"n_edges": size, "share": best[size]} for size in sorted(best)])


def _agreement(method: str, direction: str, estimate: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    found = bootstrap_estimate(
        lambda some: rank_correlation(estimate[some], exact[some]), len(exact), 0, correlation=True
    )
    return {
        "method": method,
        "direction": direction,
        "spearman": found.value,
        "ci_low": found.low,
        "ci_high": found.high,
        "n_edges": len(exact),
    }
