"""The first prompt of a chain in CircuitsVis: attention patterns of single heads, and numbers as colours of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sinklens.errors import InputError, need
from sinklens.viz.chain import check_chain
from sinklens.viz.circuitsvis import as_text, label, safe
from sinklens.viz.circuitsvis import views_html as attention_html

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML

    from sinklens.chain.result import ChainResult

__all__ = ["attention_html", "attention_view", "sink_heads", "token_values", "token_view"]

Quantity = Literal["received", "neurons"]


def attention_view(
    result: ChainResult, run: str, heads: Sequence[int] | None = None, max_tokens: int = 64
) -> RenderedHTML:
    """Attention of the block after the formation block, on the first prompt in one run, as a CircuitsVis view.

    Args:
        result: a chain's result.
        run: name of the run: ``base`` or ``anchored``, or ``natural``.
        heads: heads to show; all by default.
        max_tokens: show the first so many tokens: a view's size grows with their square.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such run or head.
    """
    pattern = _of_run(result.attention, run, "attention")[:, :max_tokens, :max_tokens]
    heads = range(len(pattern)) if heads is None else heads
    if not len(heads) or not all(0 <= head < len(pattern) for head in heads):
        raise InputError(f"heads {list(heads)} are not in 0..{len(pattern) - 1}")
    # Three decimals are all that a colour can show, and keep a page with many heads small.
    values = [[[round(x, 3) for x in row] for row in pattern[head].tolist()] for head in heads]
    tokens = [label(token) for token in result.tokens[0][:max_tokens]]
    return safe(need("circuitsvis.attention").attention_heads(values, tokens, [f"H{h}" for h in heads], max_value=1.0))


def sink_heads(result: ChainResult, most: int = 6) -> list[int]:
    """The heads that attend most to the target on the first prompt (in all runs together), in their order."""
    check_chain(result)
    key = target_position(result)
    received = [p[0, :, key + 1 :, key].float().mean(-1) for p in result.attention.values()]
    total = torch.stack(received).sum(0)
    return sorted(total.topk(min(most, len(total))).indices.tolist())


def target_position(result: ChainResult) -> int:
    """Position of the sink in the prompt that is shown."""
    target = result.config["target"]
    return target if isinstance(target, int) else result.formation.sink_positions[0]


def token_values(result: ChainResult, run: str, quantity: Quantity = "received") -> Tensor:
    """A number for every token of the first prompt in one run.

    ``received`` is the attention it receives from later queries, mean over heads and the blocks in which attention is
    measured; NaN for the last token, which no later query sees. ``neurons`` is the magnitude of the super neurons'
    activations, mean over these.

    Raises:
        InputError: there is no such run, or no such number in a result of an earlier version.
    """
    if quantity == "received":
        return _of_run(result.received, run, "attention received")
    return _of_run(result.neurons, run, "super neurons").abs().mean(-1)


def token_view(
    result: ChainResult, run: str, quantity: Quantity = "received", max_tokens: int = 256, top: float | None = None
) -> RenderedHTML:
    """The first prompt in one run, its tokens coloured by :func:`token_values`, as a CircuitsVis view.

    Args:
        result: a chain's result.
        run: name of the run.
        quantity: ``received`` or ``neurons``.
        max_tokens: show the first so many tokens. Tokens without a value are left out: the last receives nothing.
        top: value of the strongest colour; by default the largest of any run, so that runs can be compared.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such run.
    """
    values = token_values(result, run, quantity)[:max_tokens]
    everywhere = [token_values(result, name, quantity)[:max_tokens] for name in getattr(result, quantity)]
    top = top or float(torch.stack(everywhere).nan_to_num(0).max()) or 1.0
    chosen = [(as_text(token), float(x)) for token, x in zip(result.tokens[0], values, strict=False) if x.isfinite()]
    tokens, numbers = [token for token, _ in chosen], [float(f"{x:.4g}") for _, x in chosen]
    return safe(need("circuitsvis.tokens").colored_tokens(tokens, numbers, min_value=0.0, max_value=top))


def _of_run(values: dict[str, Tensor], run: str, what: str) -> Tensor:
    if run not in values:
        raise InputError(f"no {what} of a run {run!r}: this result has {', '.join(values) or 'none'}")
    return values[run][0].float()
