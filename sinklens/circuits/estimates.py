"""Estimated edges: edge attribution patching, for all edges of the token in a few passes.

    EAP (Syed, Rager and Conmy 2023):        (s_other - s_own) . dM/dx_r,  with x_r what input r hears
    EAP-IG (Hanna, Pezzelle, Belinkov 2024): the same with the gradient averaged on the way between the runs

The way between the two runs is that of what makes the sink: the pair's root edits are put in force little by little.
The natural sink has none: there every input goes from what is written at the other position to what is written at its
own. The gradient goes from the metric through the whole model to the keys and values of the token, and from these
through the token alone, with an input for every receiver (:mod:`sinklens.circuits.rewired`).

Pitfall: first order only. A super neuron that is silent in one of the runs has hardly a slope there: EAP sees little of
what makes it fire, which is why the average is taken. Compare the rank correlations with exact edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.attribution.trace import Node as Place
from sinklens.attribution.trace import trace_run
from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Effects, Measure
from sinklens.circuits.rewired import Rewiring, Token, Wiring
from sinklens.circuits.written import Written
from sinklens.edits import PerPrompt
from sinklens.models.view import device_of
from sinklens.pairs.choice import Direction
from sinklens.patches import Patch
from sinklens.sites import HookSite, K, V

STEPS = 5
"""Points on the way between the runs."""


class Estimator:
    """Gradients with respect to what every input hears, at points between the runs of a pair.

    Args:
        measure: the metric.
        graph: the graph.
        rewiring: the token in the run with the sink.
        with_sink: what nodes write in that run.
        without: what they write in the other.
    """

    def __init__(
        self, measure: Measure, graph: Graph, rewiring: Rewiring, with_sink: Written, without: Written
    ) -> None:
        self.measure, self.graph, self.rewiring = measure, graph, rewiring
        self.with_sink, self.without = with_sink, without
        self._gradients: dict[float, dict[tuple[int, str], Tensor]] = {}

    def eap(self, direction: Direction) -> Effects:
        """Estimated effects of all edges, ``[edge, prompt]``, from the gradient of the run that is patched."""
        return self._effects([0.0 if direction == "denoise" else 1.0], direction)

    def eap_ig(self, direction: Direction, steps: int = STEPS) -> Effects:
        """The same from the mean gradient on the way between the runs (middles of as many equal parts)."""
        return self._effects([(i + 0.5) / steps for i in range(steps)], direction)

    def _effects(self, points: Sequence[float], direction: Direction) -> Effects:
        gradients = [self._gradient(point) for point in points]
        change = (self.with_sink.nodes - self.without.nodes).transpose(0, 1)  # [prompt sender d_model]
        found = []
        for block in range(self.graph.last + 1):
            for part in ("attn", "mlp"):
                if (block, part) in gradients[0]:
                    mean = torch.stack([gradient[block, part] for gradient in gradients]).mean(0)
                    inputs = [
                        key for key in self.graph.inputs_of(block) if (key[1] in ("q", "k", "v")) == (part == "attn")
                    ]
                    heard = self.graph.heard(inputs[0][0])
                    scores = torch.einsum("prd,psd->rsp", mean, change[:, :heard].to(mean))
                    found.append(scores.flatten(0, 1))
        moved = torch.cat(found).double().cpu().numpy()
        start, end = self.measure.ends(direction)
        # Denoising adds the change to what is heard, noising takes it away: both count towards the other run.
        sign = 1.0 if direction == "denoise" else -1.0
        return self.measure.as_effects(start + sign * moved, start, end)

    def _gradient(self, point: float) -> dict[tuple[int, str], Float[Tensor, "prompt input d_model"]]:
        """The metric's gradient with respect to what every input hears, ``point`` of the way to the sink."""
        if point not in self._gradients:
            with torch.enable_grad():
                token, probe = self._token(point)
            self._gradients[point] = self._backward(token, probe)
        return self._gradients[point]

    def _token(self, point: float) -> tuple[Token, dict[tuple[int, str], Tensor]]:
        graph, made = self.graph, self.rewiring
        keep, prompts = made.keep(torch.ones(1, len(graph.edges), dtype=torch.bool))
        natural = self.measure.setting.pair.is_natural
        wiring = Wiring(keep * point if natural else keep, self.without.nodes, prompts)
        probe: dict[tuple[int, str], Tensor] = {}
        for block in range(graph.last + 1):
            n = {"attn": 0, "mlp": 0}
            for _, branch in graph.inputs_of(block):
                n["attn" if branch in ("q", "k", "v") else "mlp"] += 1
            for part, count in n.items():
                if count:
                    size = (len(prompts), count, graph.shape.d_model)
                    probe[block, part] = torch.zeros(size, device=made.device, requires_grad=True)
        return made(wiring, root=1.0 if natural else point, probe=probe), probe

    def _backward(self, token: Token, probe: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
        """From the metric to the token's keys and values through the model, and from these to what was heard."""
        outside = self._outside(token)
        outputs = [(token.k[b], outside[K, b]) for b in token.k] + [(token.v[b], outside[V, b]) for b in token.v]
        used = [(x, grad.to(x)) for x, grad in outputs if grad is not None]
        names = list(probe)
        found = torch.autograd.grad(
            [x for x, _ in used], [probe[name] for name in names], [grad for _, grad in used], allow_unused=True
        )
        return {
            name: torch.zeros_like(probe[name]) if grad is None else grad.detach()
            for name, grad in zip(names, found, strict=True)
        }

    def _outside(self, token: Token) -> dict[tuple[HookSite, int], Tensor | None]:
        """The metric's gradient with respect to the token's keys and values, all held as they are."""
        setting, measure = self.measure.setting, self.measure
        sites = {K: token.k, V: token.v}
        roots = [
            Patch(site, tuple(x), setting.pair.target, PerPrompt("held", {b: y.detach() for b, y in x.items()}))
            for site, x in sites.items()
        ]
        places = {Place(site, block) for site, x in sites.items() for block in x}
        n, device = setting.batch.n, device_of(setting.model)
        rows, found = max(1, min(n, setting.max_rows // 4)), []
        for first in range(0, n, rows):
            prompts = torch.arange(first, min(first + rows, n), device=device)
            tokens = setting.batch.tokens[first : first + rows]
            own = measure.readouts[:1]
            trace = trace_run(setting.model, tokens, prompts, roots, own, keep=set(), wrt=places)
            index = self.rewiring.positions[prompts.to(self.rewiring.device)]
            each = torch.arange(len(prompts), device=index.device)
            found.append(
                {
                    place: None if (grad := trace.grads.get((own[0].name, place))) is None else grad[each, index]
                    for place in places
                }
            )
        together: dict[tuple[HookSite, int], Tensor | None] = {}
        for place in places:
            parts = [part[place] for part in found]
            key = (place.site, place.layer)
            together[key] = (
                None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])
            )
        return together


def rank_correlation(estimate: np.ndarray, exact: np.ndarray) -> float:
    """Spearman's, of means over prompts."""
    from scipy import stats

    if np.ptp(estimate) == 0 or np.ptp(exact) == 0:
        return float("nan")
    return float(stats.spearmanr(estimate, exact)[0])  # pyright: ignore[reportArgumentType]: the stub has no tuple
