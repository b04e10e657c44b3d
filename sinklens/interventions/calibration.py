"""ACT: attention of chosen heads is taken from sinks and given to the other keys (Yu et al., ICML 2024).

In a head with weights A over N tokens, the score of a column is the mean attention that its key receives,

    c_k = sum_q A[q, k] / (N - k),    S = {k : c_k > threshold} without the first token,

    A[q, k] <- beta A[q, k]                                     for k in S,
    A[q, k] <- A[q, k] (1 + (1 - beta) sum_S A[q] / sum_{not S} A[q])   else,

so that rows keep their sums. Threshold 0.1 and beta 0.4 are those of the authors' scripts. It is done in the pass over
the prompt; tokens that are generated with a cache attend as they are, as in their code.

What differs from the released code: there the first element of S is spared, which is the first token only where that
is above the threshold; here the tokens of ``spare`` are. ``spare=()`` calibrates the first token too, and so softens
the sink itself. The control calibrates, in the same heads, as many other columns, drawn. The authors search heads by
the accuracy of a task on 900 samples; :func:`search_heads` by the loss on prompts that must not be those measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.engine.memory import row_budget
from sinklens.errors import InputError
from sinklens.interventions.cached import Span
from sinklens.interventions.patched import Hooks
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, device_of, forward, hooked, model_shape
from sinklens.prompts import PromptBatch
from sinklens.records.integers import whole_numbers
from sinklens.sites import PATTERN
from sinklens.statistics import generator

THRESHOLD, BETA = 0.1, 0.4
Heads = Mapping[int, Sequence[int]]
"""Heads of every block."""


def calibrate(
    heads: Heads,
    threshold: float = THRESHOLD,
    beta: float = BETA,
    *,
    spare: Sequence[int] = (0,),
    control: bool = False,
    seed: int = 0,
) -> Hooks:
    """Calibrate the attention of some heads.

    Args:
        heads: the heads of every block.
        threshold: column score beyond which a key is a sink.
        beta: what sinks keep of their attention.
        spare: positions that are no sinks whatever they receive.
        control: calibrate as many other columns instead, drawn with ``seed``.
        seed: fixes these.

    Raises:
        InputError: numbers that are no shares. From the hooks: a head that the block does not have.
    """
    for name, value in (("threshold", threshold), ("beta", beta)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} {value} must be between 0 and 1")
    spared = whole_numbers(spare, "spare")

    def hooks_for(layer: int, chosen: tuple[int, ...]) -> Hooks:
        span = Span(f"the calibration of attention in block {layer}")

        def hook(act: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            span.see(*act.shape[-2:])
            if act.shape[-2] < act.shape[-1]:
                return None  # a token that is generated
            if any(not 0 <= head < act.shape[1] for head in chosen):
                raise InputError(f"heads {chosen} of block {layer} are not all in 0..{act.shape[1] - 1}")
            old = act[:, list(chosen)].float()
            sinks = columns(old, threshold, spared)
            if control:
                sinks = _as_many_others(sinks, spared, generator(seed, f"calibration/{layer}"))
            new = act.clone()
            new[:, list(chosen)] = calibrated(old, sinks, beta).to(act)
            return new

        return [(PATTERN.at(layer), hook)]

    plain = {int(layer): whole_numbers(chosen, "heads") for layer, chosen in heads.items()}
    return [pair for layer, chosen in plain.items() if chosen for pair in hooks_for(layer, chosen)]


def columns(
    pattern: Float[Tensor, "batch head query key"], threshold: float, spare: Sequence[int]
) -> Bool[Tensor, "batch head key"]:
    """The keys that are sinks of a head, S."""
    n = pattern.shape[-1]
    score = pattern.sum(-2) / torch.arange(n, 0, -1, device=pattern.device)
    over = score > threshold
    over[..., [position for position in spare if position < n]] = False
    return over


def calibrated(
    pattern: Float[Tensor, "batch head query key"], sinks: Bool[Tensor, "batch head key"], beta: float
) -> Float[Tensor, "batch head query key"]:
    """Attention with that of sinks scaled by ``beta``, and what is freed spread over the other keys of each row."""
    of_sinks = pattern * sinks[..., None, :]
    others = pattern - of_sinks
    mass = others.sum(-1, keepdim=True)
    # A row without another key has nowhere to give it: it stays.
    gain = 1 + (1 - beta) * of_sinks.sum(-1, keepdim=True) / mass
    return torch.where(mass > 0, beta * of_sinks + others * gain, pattern)


def _as_many_others(
    sinks: Bool[Tensor, "batch head key"], spare: Sequence[int], drawn: torch.Generator
) -> Bool[Tensor, "batch head key"]:
    """As many keys of every head, drawn from those that are neither sinks nor spared."""
    order = torch.rand(sinks.shape, generator=drawn, device="cpu").to(sinks.device)
    free = ~sinks
    free[..., [position for position in spare if position < sinks.shape[-1]]] = False
    order = order.masked_fill(~free, 2.0)
    rank = order.argsort(-1).argsort(-1)
    return (rank < sinks.sum(-1, keepdim=True)) & free


@in_usual_state
def search_heads(
    model: Model,
    batch: PromptBatch,
    threshold: float = THRESHOLD,
    beta: float = BETA,
    *,
    spare: Sequence[int] = (0,),
    candidates: int = 16,
) -> dict[int, tuple[int, ...]]:
    """The heads of which each, calibrated alone, lowers the loss on these prompts.

    Only the ``candidates`` heads with the most attention on columns that would be calibrated are tried: ours, as each
    costs a pass. (The authors try every head of all but the first two and the last blocks.)

    Args:
        model: the model.
        batch: prompts for the search, which must not be those that the effect is measured on.
        threshold: as in :func:`calibrate`.
        beta: as there.
        spare: as there.
        candidates: how many heads are tried.

    Returns:
        The heads of every block that has some.
    """
    tried = _most_calibrated(model, batch, threshold, spare)[:candidates]
    usual = _loss(model, batch, [])
    found: dict[int, list[int]] = {}
    for layer, head in tried:
        if _loss(model, batch, calibrate({layer: [head]}, threshold, beta, spare=spare)) < usual:
            found.setdefault(layer, []).append(head)
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(found.items())}


def _most_calibrated(model: Model, batch: PromptBatch, threshold: float, spare: Sequence[int]) -> list[tuple[int, int]]:
    """Heads by how much of their attention lies on columns beyond the threshold; those with none are left out."""
    shape = model_shape(model)
    mass = torch.zeros(shape.n_layers, shape.n_heads)

    def reader(layer: int) -> Any:
        def read(act: Tensor, hook: Any) -> None:  # noqa: ARG001
            sinks = columns(act.float(), threshold, spare)
            mass[layer] += (act.float() * sinks[..., None, :]).sum((0, 2, 3)).cpu()

        return read

    _passes(model, batch, [(PATTERN.at(layer), reader(layer)) for layer in range(shape.n_layers)])
    order = mass.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(place, shape.n_heads) for place in order if mass.flatten()[place] > 0]


def _loss(model: Model, batch: PromptBatch, hooks: Hooks) -> float:
    return float(torch.cat(_passes(model, batch, hooks)).mean())


def _passes(model: Model, batch: PromptBatch, hooks: Hooks) -> list[Tensor]:
    """Next-token losses of every prompt."""
    rows, losses = row_budget(model, batch.length, None, logits=True), []
    for tokens in batch.tokens.split(rows):
        tokens = tokens.to(device_of(model))
        with hooked(model, hooks):
            logits = forward(model, tokens, return_type="logits")
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        losses.append(flat.view(len(tokens), -1).mean(1))
    return losses
