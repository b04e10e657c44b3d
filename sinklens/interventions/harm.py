"""Harm: what hooks cost a model, what becomes of its sink, and what quantisation gains; always measured in one way.

One pass over the prompts as the model is and one under the hooks, and for each prompt:

- harm: the next-token ``loss`` (nats per token), ``kl`` = KL(untouched || hooked) of the next-token distribution,
  ``top1`` = how often both have the same most likely token; means over the positions that have a next token;
- the sink: attention that the ``first_share`` receives from later queries, ``largest_share`` the most that any key in
  the first three quarters receives (a sink may move), ``sink_rate`` = Sink^0.3 of Gu et al. (ICLR 2025) for the first
  token; means over heads and blocks;
- outliers in the residual stream behind the blocks: the most ``massive`` activations behind any block (Sun et al., COLM
  2024), the ``dominance`` of the most dominated token, ``kurtosis`` of all entries (means over blocks), the
  ``effective_rank`` (Roy & Vetterli 2007; mean over four blocks);
- quantisation (:mod:`sinklens.metrics.quantisation`): error of int8 activations that linear layers read, and of the
  residual stream, per tensor and per token; of key-value caches of 8, 4 and 2 bits, per channel and per token, keys
  before their rotation; means over sites and blocks.

The last block's residual stream is counted as any other. A quantity that the model does not have is NaN, and so is
every quantity of a prompt whose logits are not finite: estimates are over the others, and say how many these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.engine.memory import row_budget
from sinklens.errors import InputError
from sinklens.interventions.patched import Hook
from sinklens.metrics.sink import EPS
from sinklens.models.identities import block_weights, identities, is_unnormalised
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, device_of, forward, hooked, model_shape
from sinklens.prompts import PromptBatch, check_batch
from sinklens.records.summaries import html, summary
from sinklens.records.text import number
from sinklens.sites import LN1_NORMALIZED, LN2_NORMALIZED, MLP_POST, PATTERN, RESID_POST, HookSite, K, V, Z
from sinklens.statistics import Estimate, mean_estimate

HARM = {
    "loss": "next-token cross entropy, nats per token",
    "kl": "KL(untouched || under the hooks) of the next token, nats",
    "top1": "share of positions with the same most likely next token",
}
SINK = {
    "first_share": "attention that the first token receives from later queries",
    "largest_share": "the most that any key of the first three quarters receives",
    "sink_rate": "Sink^0.3 of the first token",
}
OUTLIERS = {
    "massive": "massive activations of a prompt, behind the block that has most",
    "dominance": "max |x| / mean |x| of the most dominated token, residual stream",
    "kurtosis": "excess kurtosis of the residual stream",
    "effective_rank": "effective rank of the residual stream",
}
CACHES = {
    f"kv_int{bits}_{what}": f"error of a {bits}-bit key-value cache with a scale per {what}"
    for bits in (8, 4, 2)
    for what in ("channel", "token")
}
ROUNDING = {
    "int8_tensor": "error of int8 activations that linear layers read, one scale per tensor",
    "int8_token": "the same, one scale per token",
    "int8_residual_tensor": "error of an int8 residual stream, one scale per tensor",
    "int8_residual_token": "the same, one scale per token",
    **CACHES,
}
QUANTITIES = {**HARM, **SINK, **OUTLIERS, **ROUNDING}
"""What is measured, and what it is."""
BRIEF = (*HARM, *SINK)
"""What is measured of a control."""
RANK_BLOCKS = 4
"""Blocks that the effective rank is taken in, evenly spaced: it costs more than all else."""

Measured = Mapping[str, Float[Tensor, " prompt"]]
"""Quantity to its value for every prompt."""
AnyHooks = Sequence[tuple[str, Hook]]


@dataclass(frozen=True, eq=False)
class Harm:
    """What hooks do to a model, on some prompts."""

    before: Measured
    """Every quantity of the untouched model, by prompt."""
    after: Measured
    """Every quantity under the hooks."""
    seed: int
    """Fixes the resamples of intervals."""
    groups: tuple[str, ...] | None
    """For each prompt the text that it is of; None where each is a text of its own."""

    def __repr__(self) -> str:
        loss, kl = self.change("loss").value, self.estimate("kl").value
        return summary(self, f"loss {number(loss)} more per token", f"KL {number(kl)}")

    def _repr_html_(self) -> str:
        return html(repr(self), self.table)

    def estimate(self, quantity: str, *, before: bool = False) -> Estimate:
        """A quantity under the hooks (or of the untouched model), with the interval over prompts."""
        return mean_estimate(self._of(self.before if before else self.after, quantity), self.seed, self.groups)

    def change(self, quantity: str) -> Estimate:
        """By how much the hooks raise a quantity: the mean over prompts of each one's own difference."""
        return mean_estimate(self._of(self.after, quantity) - self._of(self.before, quantity), self.seed, self.groups)

    def _of(self, measured: Measured, quantity: str) -> Tensor:
        if quantity not in measured:
            raise InputError(f"quantity {quantity!r} was not measured: choose from {', '.join(measured)}")
        return measured[quantity]

    @property
    def table(self) -> pd.DataFrame:
        """One row a quantity: before, after, and the change, each with its interval."""
        rows = []
        for quantity in self.after:
            row: dict[str, Any] = {"quantity": quantity, "what": QUANTITIES[quantity]}
            views = {
                "before": self.estimate(quantity, before=True),
                "after": self.estimate(quantity),
                "change": self.change(quantity),
            }
            for name, estimate in views.items():
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            rows.append(row)
        return pd.DataFrame(rows)


def harm(model: Model, batch: PromptBatch, hooks: AnyHooks, *, seed: int = 0, brief: bool = False) -> Harm:
    """Measure what hooks cost, on prompts that they were not fitted to.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        batch: held-out prompts.
        hooks: the intervention, as the functions of this room give them; or any others.
        seed: fixes the resamples of intervals.
        brief: harm and sink alone, without outliers and quantisation.

    Raises:
        InputError: see :func:`sinklens.prompts.check_batch`.
    """
    return measure_harm(model, batch, {"hooks": hooks}, seed=seed, brief=("hooks",) if brief else ())["hooks"]


@in_usual_state
def measure_harm(
    model: Model,
    batch: PromptBatch,
    interventions: Mapping[str, AnyHooks],
    *,
    seed: int = 0,
    brief: Sequence[str] = (),
    step: Callable[[int, int], None] | None = None,
) -> dict[str, Harm]:
    """:func:`harm` of several interventions, which share the pass over the untouched model.

    Args:
        model: the model.
        batch: held-out prompts.
        interventions: hooks by name.
        seed: fixes the resamples of intervals.
        brief: those of which only harm and sink are measured.
        step: called with (passes done, passes in all).

    Raises:
        InputError: as :func:`harm`.
    """
    check_batch(model, batch)
    gauge = _Gauge(model, batch.length)
    rows = row_budget(model, batch.length, None, logits=True)
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ("", *interventions)}
    chunks, done = batch.tokens.split(rows), 0
    for tokens in chunks:
        tokens = tokens.to(device_of(model))
        usual: Tensor | None = None
        for name, hooks in {"": (), **interventions}.items():
            usual, values = gauge.measure(tokens, hooks, usual, full=name not in brief)
            parts[name].append(values)
            done += 1
            if step is not None:
                step(done * len(tokens), len(chunks) * len(tokens) * (1 + len(interventions)))
    found = {name: {q: torch.cat([part[q] for part in mine]) for q in mine[0]} for name, mine in parts.items()}
    groups = batch.groups if batch.is_grouped else None
    return {name: Harm(found[""], found[name], seed, groups) for name in interventions}


@dataclass(eq=False)
class _Gauge:
    """Measures a model while it runs; sums over blocks, on the device."""

    model: Model
    """The model."""
    length: int
    """Tokens in a prompt."""
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    """Quantity to what each block has given, ``[prompt]``."""

    def __post_init__(self) -> None:
        self.layers = range(model_shape(self.model).n_layers)
        self.shares = is_unnormalised(self.model)
        measured = identities(self.model)
        self.there = {
            (site, layer)
            for site in (PATTERN, RESID_POST, LN1_NORMALIZED, LN2_NORMALIZED, Z, MLP_POST, K, V)
            for layer in self.layers
            if (name := site.at(layer)) in measured.fired and name not in measured.odd
        }
        n = len(self.layers)
        self.ranked = {round((i + 1) * n / RANK_BLOCKS) - 1 for i in range(RANK_BLOCKS)}

    def measure(
        self, tokens: Int[Tensor, "prompt pos"], hooks: AnyHooks, usual: Tensor | None, full: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of the untouched model, and every quantity of these prompts on the CPU."""
        self.seen = {}
        with hooked(self.model, [*hooks, *self._readers(full)]):
            logits = forward(self.model, tokens, return_type="logits")
        log_p = logits[:, :-1].float().log_softmax(-1)
        usual = log_p if usual is None else usual
        values = _harm_of(log_p, usual, tokens)
        for name in QUANTITIES if full else BRIEF:
            if name not in values:
                each = self.seen.get(name)
                values[name] = torch.full((len(tokens),), torch.nan) if each is None else self._over_blocks(name, each)
        # Of a prompt whose logits are not finite nothing can be said: counts and comparisons would give numbers.
        broken = values["kl"].isnan().cpu()
        return usual, {name: value.double().cpu().masked_fill(broken, torch.nan) for name, value in values.items()}

    @staticmethod
    def _over_blocks(name: str, each: list[Tensor]) -> Tensor:
        stack = torch.stack([value.to(each[0].device) for value in each]).double()
        if name in ROUNDING:
            return stack[:, 0].sum(0) / stack[:, 1].sum(0)
        return stack.amax(0) if name == "massive" else stack.mean(0)

    def _readers(self, full: bool) -> list[tuple[str, Hook]]:
        of_site: dict[HookSite, Callable[[Tensor, int], dict[str, Tensor]]] = {PATTERN: self._attention}
        if full:
            of_site |= {RESID_POST: self._residual, K: self._cached, V: self._cached}
            of_site |= dict.fromkeys((LN1_NORMALIZED, LN2_NORMALIZED, Z, MLP_POST), self._read_by_linear)
        self.weights = {}
        return [
            (site.at(layer), self._reader(read, site, layer))
            for site, read in of_site.items()
            for layer in self.layers
            if (site, layer) in self.there
        ]

    def _reader(self, read: Callable[..., dict[str, Tensor]], site: HookSite, layer: int) -> Hook:
        def hook(act: Tensor, hook: Any) -> None:  # noqa: ARG001
            for name, value in read(self._weighted(act, site, layer), layer).items():
                self.seen.setdefault(name, []).append(value)

        return hook

    def _weighted(self, act: Tensor, site: HookSite, layer: int) -> Tensor:
        """What linear layers read is behind the norm's weight."""
        if site not in (LN1_NORMALIZED, LN2_NORMALIZED):
            return act
        weights = block_weights(self.model, layer)
        weight = weights.ln1_w if site == LN1_NORMALIZED else weights.ln2_w
        return act.float() * weight.detach().float()

    def _attention(self, pattern: Tensor, layer: int) -> dict[str, Tensor]:  # noqa: ARG002
        pattern = metrics.normalised_rows(pattern)[0] if self.shares else pattern
        received = metrics.attention_received(pattern)
        early = received[..., : max(1, 3 * self.length // 4)]
        return {
            "first_share": received[..., 0].mean(-1),
            "largest_share": early.amax(-1).mean(-1),
            "sink_rate": (metrics.alpha(pattern)[..., 0] > EPS).float().mean(-1),
        }

    def _residual(self, x: Tensor, layer: int) -> dict[str, Tensor]:
        found = {
            "massive": metrics.massive_activations(x).flatten(1).sum(1),
            "dominance": metrics.dominance_ratio(x).amax(1),
            "kurtosis": metrics.excess_kurtosis(x.flatten(1)),
        }
        if layer in self.ranked:
            found["effective_rank"] = metrics.effective_rank(x)
        return found | {f"int8_residual_{what}": error for what, error in _int8(x).items()}

    def _read_by_linear(self, x: Tensor, layer: int) -> dict[str, Tensor]:  # noqa: ARG002
        return {f"int8_{what}": error for what, error in _int8(x.flatten(2)).items()}

    def _cached(self, x: Float[Tensor, "prompt pos kv_head d_head"], layer: int) -> dict[str, Tensor]:  # noqa: ARG002
        found = {}
        for bits in (8, 4, 2):
            for what, over in (("channel", (1,)), ("token", (-1,))):
                rounded = metrics.quantised_minmax(x, bits, over)
                found[f"kv_int{bits}_{what}"] = _errors(rounded, x)
        return found


def _int8(x: Float[Tensor, "prompt pos d"]) -> dict[str, Float[Tensor, "2 prompt"]]:
    return {
        what: _errors(metrics.quantised_absmax(x, 8, over), x) for what, over in (("tensor", (1, 2)), ("token", (2,)))
    }


def _errors(
    rounded: Float[Tensor, "prompt *vector d"], x: Float[Tensor, "prompt *vector d"]
) -> Float[Tensor, "2 prompt"]:
    """The sum of the errors of a prompt's vectors, and of how many; those that are zero have none."""
    zero = (x == 0).all(-1)
    error = metrics.relative_error(rounded, x).masked_fill(zero, 0.0)
    return torch.stack([error.flatten(1).sum(1), (~zero).flatten(1).sum(1).to(error)])


def _harm_of(
    log_p: Float[Tensor, "prompt pos d_vocab"],
    usual: Float[Tensor, "prompt pos d_vocab"],
    tokens: Int[Tensor, "prompt pos"],
) -> dict[str, Tensor]:
    following = tokens[:, 1:, None].to(log_p.device)
    return {
        "loss": -log_p.gather(-1, following)[..., 0].mean(1),
        "kl": torch.nn.functional.kl_div(log_p, usual, log_target=True, reduction="none").sum(-1).mean(1),
        "top1": (log_p.argmax(-1) == usual.argmax(-1)).float().mean(1),
    }
