"""Readouts by name: what a chain, a sweep or an analysis measures in every patched run.

:data:`READOUTS` has them; a new one is a :class:`NamedReadout`, made known with :func:`register_readout`. What is
measured follows from the name and a :class:`Context`: the prompts, where the sink is, the blocks that are read.

The natural sink has no run without it. Its baseline is the same quantity at ordinary positions of the same run, where
there is such a thing: ``logit_diff`` and ``loss`` have none, so they have values there and no effects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.errors import InputError
from sinklens.metrics.sink import EPS
from sinklens.patches import Positions
from sinklens.readouts.base import PositionReadout, Readout, Rows, Tokens
from sinklens.readouts.build import (
    attention_ordinary,
    attention_received,
    next_token_loss,
    over_positions,
    vector_readout,
)
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.registry import check_kind, enter, is_the_package_s
from sinklens.sites import LOGITS, PATTERN, RESID_PRE

Reduce = Callable[[Tensor, Rows], Tensor]
"""``(activation, rows) -> [row]``."""
ORDINARY = "/ordinary"
"""What the name of a readout at ordinary positions ends with."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a readout may know of the prompts that it reads."""

    tokens: Int[Tensor, "prompt pos"]
    """The prompts."""
    target: Positions
    """The sink's position in every prompt."""
    ordinary: Float[Tensor, "prompt pos"]
    """1 at ordinary positions."""
    layers: tuple[int, ...]
    """Blocks that are read."""
    n_layers: int
    """Blocks of the model."""
    answers: tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]] | None = None
    """Answer and alternative of every prompt, for ``logit_diff``."""
    eps: float = EPS
    """Threshold of ``sink_rate``."""
    shares: bool = False
    """Whether ``alpha`` and ``sink_rate`` are of each query's weights over their sum: attention that is no softmax."""
    offset: int = 0
    """Number of the first of these prompts, for readouts that know all prompts."""
    clean: Callable[[], Float[Tensor, "prompt pos d_vocab"]] | None = None
    """Log-probabilities of the untouched model on these prompts, computed when they are asked for; for ``kl``."""


Make = Callable[[str, Context], Readout]
"""The column's name and what is known of the prompts, to the readout."""


@dataclass(frozen=True, eq=False)
class NamedReadout:
    """A quantity that can be asked for by its name, on any prompts."""

    name: str
    """The name."""
    make: Make
    """``(column name, context) -> Readout``."""
    baseline: Make | None = None
    """The same quantity at ordinary positions, for the natural sink; ``None`` where there is no such thing."""
    is_share: bool = False
    """Whether it lies between 0 and 1, so that ``min_gap`` is an absolute difference; else a part of the value."""
    needs_answers: bool = False
    """Whether it compares two tokens, :attr:`Context.answers`."""
    help: str = ""
    """What it is, in a line."""

    def of(self, name: str, context: Context) -> Readout:
        """The readout on these prompts, under a column's name.

        Raises:
            InputError: :attr:`make` makes something else.
        """
        return _made(self, self.make, name, context)

    def ordinary(self, name: str, context: Context) -> Readout | None:
        """The same at ordinary positions; ``None`` where there is no such thing."""
        return None if self.baseline is None else _made(self, self.baseline, name, context)


def _made(named: NamedReadout, make: Make, name: str, context: Context) -> Readout:
    readout = make(name, context)
    if not isinstance(readout, Readout):
        raise InputError(
            f"the readout {named.name!r} must make a Readout, not something of type {type(readout).__name__}"
        )
    return readout if readout.name == name else replace(readout, name=name)


ReadoutLike = str | NamedReadout | Readout | Reduce | Callable[[Tensor], Tensor]
"""A name or what has one, a readout, or a function ``(logits [row pos d_vocab], rows) -> [row]``, of logits alone if it
likes."""

KIND = "a readout"
"""What the registry calls them."""
READOUTS: dict[str, NamedReadout] = {}
"""Readouts by name."""


def register_readout(readout: NamedReadout) -> NamedReadout:
    """Make a readout known by its name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
    check_kind(KIND, readout, NamedReadout)
    return enter(READOUTS, KIND, readout.name, readout)


def named_readout(readout: str | NamedReadout) -> NamedReadout:
    """The readout of that name.

    Raises:
        InputError: there is none.
    """
    if isinstance(readout, NamedReadout):
        return readout
    if readout not in READOUTS:
        raise InputError(f"readout {readout!r} is not known: choose from {', '.join(READOUTS)}")
    return READOUTS[readout]


def _named(readout: ReadoutLike) -> NamedReadout | None:
    """What a readout is known by; ``None`` for one of the user's own that has no name of this kind."""
    return named_readout(readout) if isinstance(readout, (str, NamedReadout)) else None


def readout_name(readout: ReadoutLike) -> str:
    """The name that the table has for a readout."""
    if isinstance(readout, str):
        return readout
    if isinstance(readout, (NamedReadout, Readout)):
        return readout.name
    return getattr(readout, "__name__", type(readout).__name__)


def is_share(readout: ReadoutLike) -> bool:
    """Whether a readout is known to lie between 0 and 1."""
    named = _named(readout)
    return named is not None and named.is_share


def needs_answers(readout: ReadoutLike) -> bool:
    """Whether a readout compares two tokens."""
    named = _named(readout)
    return named is not None and named.needs_answers


def read_readout(readout: ReadoutLike) -> ReadoutLike:
    """What stands for a readout wherever it is used: a name that the package has; for any other the readout itself.

    A name that a user has registered is known in one process only.

    Raises:
        InputError: an unknown name, or neither name nor readout nor function.
    """
    named = _named(readout)
    if named is not None:
        return named.name if is_the_package_s(READOUTS, KIND, named.name, named) else named
    if not isinstance(readout, Readout) and not callable(readout):
        raise InputError(f"readout {readout!r} must be a name, a Readout, or a function of logits and rows")
    if not isinstance(readout, Readout) and not (_takes(readout, 2) or _takes(readout, 1)):
        raise InputError(f"the readout {readout_name(readout)!r} must be a function of logits, or of logits and rows")
    return readout


def _takes(function: Callable[..., Any], n: int) -> bool:
    """Whether a function can be called with so many things."""
    if isinstance(function, torch.nn.Module):
        function = function.forward  # calling a module takes anything
    try:
        inspect.signature(function).bind(*[None] * n)
    except ValueError:  # some functions of C do not say what they take
        return True
    except TypeError:
        return False
    return True


def fingerprint(readout: ReadoutLike) -> object:
    """What tells a readout from another, in plain data."""
    named = _named(readout)
    if named is not None and is_the_package_s(READOUTS, KIND, named.name, named):
        return named.name  # what a name of the package means changes with the version alone
    return [readout_name(readout), fingerprint_of(readout if named is None else replace(named, help=""))]


def build(readout: ReadoutLike, context: Context) -> Readout:
    """The readout of that name; one of the user's own is told the number of each prompt among all."""
    named = _named(readout)
    if named is not None:
        return named.of(named.name, context)
    if not isinstance(readout, Readout):
        function = cast(Callable[..., Tensor], readout)
        reduce = function if _takes(function, 2) else lambda logits, _rows: function(logits)
        readout = Readout(readout_name(readout), LOGITS, (context.n_layers,), reduce)
    if context.offset == 0:
        return readout
    return _shifted(readout, context.offset, len(context.tokens))


def _shifted(readout: Readout, offset: int, n: int) -> Readout:
    reduce = readout.reduce
    if not isinstance(readout, PositionReadout):
        return replace(readout, reduce=lambda act, rows: reduce(act, Rows(rows.prompts + offset, rows.layer)))
    at, weigh = readout.at, readout.weigh

    def weigh_some(length: int) -> Tensor:
        weights = weigh(length)
        return weights if len(weights) == 1 else weights[offset : offset + n]

    return replace(readout, at=lambda act, tokens: at(act, _numbered(tokens, offset)), weigh=weigh_some)  # type: ignore[call-arg]


def _numbered(tokens: Tokens, offset: int) -> Tokens:
    return replace(tokens, prompts=tokens.prompts + offset)


def baseline(readout: ReadoutLike, context: Context) -> Readout | None:
    """The same quantity at ordinary positions; ``None`` where there is no such thing."""
    named = _named(readout)
    if named is None or named.baseline is None:
        return None
    return named.ordinary(f"{named.name}{ORDINARY}", context)


def _received(name: str, context: Context) -> Readout:
    return attention_received(name, context.layers, context.target, len(context.tokens))


def _received_ordinary(name: str, context: Context) -> Readout:
    return attention_ordinary(name, context.layers, context.ordinary)


def _alpha_by_head(context: Context) -> tuple[Callable[[Tensor, Tokens], Tensor], Callable[[int], Tensor]]:
    """Terms ``[token head]`` and weights of ``alpha`` of the target: a mean over the queries from its own on."""
    key = context.target.single(len(context.tokens))

    def at(row: Tensor, tokens: Tokens) -> Tensor:
        own = key.to(row.device)[tokens.prompts]
        row = metrics.normalised_rows(row)[0] if context.shares else row
        return row.take_along_dim(own[:, None, None], dim=-1).squeeze(-1).float()

    def weigh(length: int) -> Tensor:
        seen = (torch.arange(length, device="cpu") >= key[:, None]).float()
        return seen / seen.sum(-1, keepdim=True)

    return at, weigh


def _alpha(name: str, context: Context) -> Readout:
    at, weigh = _alpha_by_head(context)
    return over_positions(name, PATTERN, context.layers, lambda row, tokens: at(row, tokens).mean(1), weigh)


def _sink_rate(name: str, context: Context) -> Readout:
    at, weigh = _alpha_by_head(context)
    eps = context.eps
    return over_positions(name, PATTERN, context.layers, at, weigh, lambda alphas: (alphas > eps).float().mean((0, 2)))


def _alpha_ordinary(name: str, context: Context) -> Readout:
    return _at_ordinary(name, context, PATTERN, lambda act: _alphas(act, context).mean(1))


def _alphas(act: Tensor, context: Context) -> Tensor:
    return metrics.alpha(metrics.normalised_rows(act)[0] if context.shares else act)


def _sink_rate_ordinary(name: str, context: Context) -> Readout:
    return _at_ordinary(name, context, PATTERN, lambda act: (_alphas(act, context) > context.eps).float().mean(1))


def _of_residual(function: Callable[[Tensor], Tensor]) -> Callable[[str, Context], Readout]:
    def make(name: str, context: Context) -> Readout:
        n = len(context.tokens)
        return vector_readout(name, RESID_PRE, context.layers, context.target, n, lambda x, _: function(x))

    return make


def _of_residual_ordinary(function: Callable[[Tensor], Tensor]) -> Callable[[str, Context], Readout]:
    return lambda name, context: _at_ordinary(name, context, RESID_PRE, function)


def _at_ordinary(name, context, site, function) -> Readout:  # noqa: ANN001
    """``function(activation) -> [row pos]``, its mean over each prompt's ordinary positions."""
    ordinary = context.ordinary

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        values = function(act)
        weight = ordinary.to(values)[rows.prompts]
        return torch.where(weight > 0, values * weight, 0).sum(-1) / weight.sum(-1)

    return Readout(name, site, context.layers, reduce)


def _logit_diff(name: str, context: Context) -> Readout:
    assert context.answers is not None
    (answer, other), n = context.answers, len(context.tokens)

    def at(logits: Tensor, tokens: Tokens) -> Tensor:
        chosen = torch.stack([answer, other], -1).to(logits.device)[tokens.prompts]
        of_answer, of_other = logits.float().take_along_dim(chosen, -1).unbind(-1)
        return of_answer - of_other

    def weigh(length: int) -> Tensor:
        return (torch.arange(length, device="cpu") == length - 1).float().expand(n, -1)

    return over_positions(name, LOGITS, (context.n_layers,), at, weigh)


def _loss(name: str, context: Context) -> Readout:
    return next_token_loss(name, context.tokens, context.n_layers)


def _kl(name: str, context: Context) -> Readout:
    if context.clean is None:
        raise InputError(f"readout {name!r} compares with the untouched model, which is not known here")
    clean, n = context.clean(), len(context.tokens)

    def at(logits: Tensor, tokens: Tokens) -> Tensor:
        usual = clean[tokens.prompts.to(clean.device), tokens.positions.to(clean.device)].to(logits.device)
        found = logits.float().log_softmax(-1)
        return torch.nn.functional.kl_div(found, usual, log_target=True, reduction="none").sum(-1)

    def weigh(length: int) -> Tensor:
        return (torch.arange(length, device="cpu") < length - 1).float().expand(n, -1) / (length - 1)

    return over_positions(name, LOGITS, (context.n_layers,), at, weigh)


for _readout in (
    NamedReadout(
        "attention_received",
        _received,
        _received_ordinary,
        is_share=True,
        help="mean attention that the target receives from later queries, over heads and readout blocks",
    ),
    NamedReadout(
        "alpha",
        _alpha,
        _alpha_ordinary,
        is_share=True,
        help="alpha_k of Gu et al. (ICLR 2025): the same with the target's own query counted",
    ),
    NamedReadout(
        "sink_rate",
        _sink_rate,
        _sink_rate_ordinary,
        is_share=True,
        help="Sink^eps_k of one prompt: share of (block, head) in which alpha_k exceeds eps",
    ),
    NamedReadout(
        "residual_norm",
        _of_residual(metrics.vector_norm),
        _of_residual_ordinary(metrics.vector_norm),
        help="Euclidean norm of the residual stream that enters the readout blocks, at the target",
    ),
    NamedReadout(
        "dominance",
        _of_residual(metrics.dominance_ratio),
        _of_residual_ordinary(metrics.dominance_ratio),
        help="max_j |x_j| / mean_j |x_j| of that residual stream",
    ),
    NamedReadout(
        "logit_diff",
        _logit_diff,
        needs_answers=True,
        help="at the last position, logit of the answer minus logit of the alternative",
    ),
    NamedReadout("loss", _loss, help="mean next-token cross entropy, nats"),
    NamedReadout("kl", _kl, help="mean KL(untouched model || patched) of the next token, nats"),
):
    register_readout(_readout)
