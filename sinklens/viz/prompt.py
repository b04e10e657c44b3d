"""Any prompt of any model, with any hooks: attention, neurons over tokens, the logit lens; and two runs compared.

Every view has a function beside it that gives its numbers. ``hooks`` are TransformerLens's, ``(name, function)``, such
as :mod:`sinklens.interventions` makes; hooks in force on the model (``with model.hooks(...)``) hold as well. With
``against``, other hooks (none: ``()``), it is the difference that is shown: with ``hooks`` less with ``against``.

The logit lens (nostalgebraist 2020) puts the residual behind each block through the final norm and the unembedding:
what the model would say if it ended there. Pitfall: early blocks write in other directions than the last, so what it
says there need not be what they hold.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.engine.capture import capture_runs
from sinklens.engine.store import ActivationStore, Want
from sinklens.errors import InputError, need
from sinklens.models.view import Model, can_resume, device_of, forward, hooked, model_shape, tokenizer_of
from sinklens.patches import CLEAN
from sinklens.prompts import PromptBatch, check_batch, from_tokens
from sinklens.records.ranges import Between, check_number
from sinklens.records.text import number
from sinklens.sites import MLP_POST, PATTERN, RESID_POST, HookSite
from sinklens.viz.charts import need_plotly, styled
from sinklens.viz.circuitsvis import as_text, label, safe

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML
    from plotly.graph_objects import Figure

Hooks = Iterable[tuple[str, Any]]
"""Names of hook points, and functions ``(activation, hook)``."""
ROWS = 4
"""Blocks whose residuals go through the unembedding at a time: logits are large."""


def pattern_of(
    model: Model, batch: Any, layer: int, *, prompt: int = 0, hooks: Hooks = (), against: Hooks | None = None
) -> Float[Tensor, "head query key"]:
    """The attention pattern of a block on one prompt, on the CPU.

    Args:
        model: any that is loaded.
        batch: prompts, or token ids ``[batch pos]``.
        layer: the block.
        prompt: which of the prompts.
        hooks: in force meanwhile.
        against: hooks of another run, which is subtracted.

    Raises:
        InputError: there is no such block or prompt.
    """
    read = partial(_read, model, _one(model, batch, prompt), PATTERN, _block(model, layer))
    return _less(lambda each: PATTERN.from_canonical(read(each))[0], hooks, against)


def neurons_of(
    model: Model,
    batch: Any,
    layer: int,
    neurons: Sequence[int],
    *,
    prompt: int = 0,
    hooks: Hooks = (),
    against: Hooks | None = None,
) -> Float[Tensor, "pos neuron"]:
    """Activations of some neurons of a block on one prompt, on the CPU; see :func:`pattern_of`."""
    shape, chosen = model_shape(model), list(neurons)
    if not chosen or not all(0 <= neuron < (shape.d_mlp or 0) for neuron in chosen):
        raise InputError(f"neurons {chosen} must be at least one of 0..{(shape.d_mlp or 0) - 1}")
    read = partial(_read, model, _one(model, batch, prompt), MLP_POST, _block(model, layer))
    return _less(lambda each: read(each)[0][:, chosen], hooks, against)


def pattern_view(
    model: Model,
    batch: Any,
    layer: int,
    *,
    heads: Sequence[int] | None = None,
    prompt: int = 0,
    hooks: Hooks = (),
    against: Hooks | None = None,
    max_tokens: int = 64,
) -> RenderedHTML:
    """:func:`pattern_of` as a CircuitsVis view: all heads or some, the first ``max_tokens`` tokens.

    A difference is blue where there is more attention, and red where less.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such block, prompt or head.
    """
    one = _one(model, batch, prompt)
    pattern = pattern_of(model, one, layer, hooks=hooks, against=against)[:, :max_tokens, :max_tokens]
    chosen = range(len(pattern)) if heads is None else list(heads)
    if not len(chosen) or not all(0 <= head < len(pattern) for head in chosen):
        raise InputError(f"heads {list(chosen)} are not in 0..{len(pattern) - 1}")
    values = [[[round(x, 3) for x in row] for row in pattern[head].tolist()] for head in chosen]
    tokens = [label(token) for token in one.labels[0][:max_tokens]]
    most = 1.0 if against is None else max(float(pattern[list(chosen)].abs().max()), 1e-3)
    least = 0.0 if against is None else -most
    names = [f"{layer}.{head}" for head in chosen]
    draw = need("circuitsvis.attention").attention_heads
    return safe(draw(values, tokens, names, max_value=most, min_value=least))


def neuron_view(
    model: Model,
    batch: Any,
    layer: int,
    neurons: Sequence[int],
    *,
    prompt: int = 0,
    hooks: Hooks = (),
    against: Hooks | None = None,
    max_tokens: int = 256,
) -> RenderedHTML:
    """:func:`neurons_of` as a CircuitsVis view: tokens coloured by a neuron's activation, one neuron at a time.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such block, prompt or neuron.
    """
    one = _one(model, batch, prompt)
    values = neurons_of(model, one, layer, neurons, hooks=hooks, against=against)[:max_tokens]
    tokens = [as_text(token) for token in one.labels[0][:max_tokens]]
    rounded = torch.tensor([[float(f"{x:.4g}") for x in row] for row in values.tolist()])
    names = [f"neuron {neuron}" for neuron in neurons]
    return safe(need("circuitsvis.tokens").colored_tokens_multi(tokens, rounded, labels=names))


def logit_lens(
    model: Model, batch: Any, *, prompt: int = 0, top: int = 5, hooks: Hooks = (), against: Hooks | None = None
) -> pd.DataFrame:
    """What the model would predict behind every block of one prompt: the residual there, normalised and unembedded.

    Args:
        model: any that is loaded.
        batch: prompts, or token ids ``[batch pos]``.
        prompt: which of the prompts.
        top: tokens to name at every place.
        hooks: in force while the residuals are computed.
        against: hooks of another run, which is subtracted.

    Returns:
        One row for every block and position: layer, position, token (what stands there), following (what comes next),
        p_following (its probability, NaN at the end) and rank_following (0: it is the first choice), predicted (names
        of the ``top`` tokens) and p_predicted (their probabilities). With ``against`` probabilities and ranks are
        differences, and ``predicted`` are the tokens whose probability differs most, in either direction.

    Raises:
        InputError: there is no such prompt, or ``top`` is no number of tokens.
    """
    check_number("top", top, Between(1, 100), whole=True)
    one, n_layers = _one(model, batch, prompt), model_shape(model).n_layers
    stores = [_residuals(model, one, list(each)) for each in (hooks, against) if each is not None]
    rows: list[dict[str, Any]] = []
    for first in range(0, n_layers, ROWS):
        blocks = range(first, min(first + ROWS, n_layers))
        runs = [_probabilities(model, one, store, blocks) for store in stores]
        for layer, *of_block in zip(blocks, *runs, strict=True):
            rows += _places(model, one, layer, of_block, top)
    return pd.DataFrame(rows)


def lens_figure(
    model: Model,
    batch: Any,
    *,
    prompt: int = 0,
    hooks: Hooks = (),
    against: Hooks | None = None,
    first: int = 0,
    last: int = 16,
) -> Figure:
    """:func:`logit_lens` of positions ``first .. last - 1``: the first choices, coloured by their probability.

    With ``against`` a cell has the token whose probability differs most: blue where it is more, and red where less.

    Raises:
        InputError: plotly is not installed, or as :func:`logit_lens`.
    """
    go, _ = need_plotly()
    table: Any = logit_lens(model, batch, prompt=prompt, hooks=hooks, against=against)
    table = table[(table.position >= first) & (table.position < last)]
    if table.empty:
        raise InputError(f"there is no position in {first}..{last - 1}: the prompt has fewer tokens")

    def grid(column: Any) -> list[list[Any]]:
        return [list(rows) for _, rows in column.groupby(table.layer)]

    tokens = table[table.layer == table.layer.min()]
    places = [f"{position} {label(token, 12)}" for position, token in zip(tokens.position, tokens.token, strict=True)]
    trace = go.Heatmap(
        z=grid(table.p_predicted.str[0]),
        x=[html.escape(place, quote=False) for place in places],
        y=[str(layer) for layer in table.layer.unique()],
        text=grid(table.predicted.map(lambda names: html.escape(_seen(names[0]), quote=False))),
        texttemplate="%{text}",
        customdata=grid(table.apply(_hover, axis=1)),
        hovertemplate="%{customdata}<extra></extra>",
        zmin=0 if against is None else -1,
        zmax=1,
        colorscale="Blues" if against is None else "RdBu",
        colorbar={
            "title": {"text": "probability" if against is None else "change"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    )
    shown = "first choice behind every block" if against is None else "what changes most behind every block"
    figure = go.Figure(trace, layout={"title": {"text": f"Logit lens: {shown}"}})
    figure.update_xaxes(title={"text": "token"}, type="category")
    figure.update_yaxes(title={"text": "block"}, type="category")
    return styled(figure, 120 + 24 * table.layer.nunique())


def _one(model: Model, batch: Any, prompt: int) -> PromptBatch:
    """A batch of the prompt that is asked for."""
    prompts = batch if isinstance(batch, PromptBatch) else from_tokens(model, batch)
    check_batch(model, prompts)
    return prompts.subset([prompt])


def _block(model: Model, layer: int) -> int:
    top = model_shape(model).n_layers - 1
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= top:
        raise InputError(f"block {layer} is not in 0..{top}")
    return layer


def _residuals(model: Model, one: PromptBatch, hooks: list[tuple[str, Any]]) -> ActivationStore:
    """What stands behind every block."""
    wants = [Want("base", RESID_POST, layer) for layer in range(model_shape(model).n_layers)]
    with hooked(model, hooks):
        return capture_runs(model, one.tokens, CLEAN, wants, max_rows=1)


def _probabilities(
    model: Model, one: PromptBatch, store: ActivationStore, blocks: Iterable[int]
) -> Float[Tensor, "block pos d_vocab"]:
    residual = torch.cat([store.tensor("base", RESID_POST, layer).to(device_of(model)) for layer in blocks])
    return _unembedded(model, one, residual).softmax(-1)


def _read(model: Model, one: PromptBatch, site: HookSite, layer: int, hooks: Hooks) -> Float[Tensor, "1 pos *rest"]:
    with hooked(model, list(hooks)):
        store = capture_runs(model, one.tokens, CLEAN, [Want("base", site, layer)], max_rows=1)
    return store.tensor("base", site, layer).float().cpu()


def _less(read: Any, hooks: Hooks, against: Hooks | None) -> Tensor:
    value = read(list(hooks))
    return value if against is None else value - read(list(against))


def _unembedded(model: Model, one: PromptBatch, residual: Float[Tensor, "row pos d_model"]) -> Tensor:
    """Logits of residuals, ``[row pos d_vocab]``: put in behind the last block, so that the model itself finishes."""
    last = model_shape(model).n_layers - 1
    tokens = one.tokens.expand(len(residual), -1).to(device_of(model))
    # What the last block itself makes of them is replaced; a model that can begin there need not run the others.
    given, start = (residual, last) if can_resume(model) else (tokens, 0)
    hook = (RESID_POST.at(last), lambda x, hook: residual.to(x))  # noqa: ARG005  (TransformerLens names it)
    with torch.inference_mode(), hooked(model, [hook]):
        return forward(model, given, start_at=start, return_type="logits").float()


def _places(model: Model, one: PromptBatch, layer: int, runs: Sequence[Tensor], top: int) -> list[dict[str, Any]]:
    """The rows of a block, of the probabilities ``[pos d_vocab]`` in one run, or less those in another."""
    labels, ids = one.labels[0], one.tokens[0].tolist()
    shown = _first_less(runs)
    best = (shown if len(runs) == 1 else shown.abs()).topk(top, -1).indices
    chosen, values = best.tolist(), shown.gather(-1, best).tolist()
    rows = []
    for position, token in enumerate(labels):
        row = {"layer": layer, "position": position, "token": token}
        following = ids[position + 1] if position + 1 < len(ids) else None
        given = float("nan") if following is None else float(shown[position, following])
        rank = float("nan") if following is None else float(_first_less([_rank(p[position], following) for p in runs]))
        row |= {"following": "" if following is None else labels[position + 1], "p_following": given}
        row |= {"rank_following": rank, "predicted": [_name(model, i) for i in chosen[position]]}
        rows.append(row | {"p_predicted": values[position]})
    return rows


def _first_less(runs: Sequence[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else runs[0] - runs[1]


def _rank(probability: Float[Tensor, " d_vocab"], token: int) -> Tensor:
    """How many tokens are more probable."""
    return (probability > probability[token]).sum()


def _name(model: Model, token: int) -> str:
    tokenizer: Any = tokenizer_of(model)
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _seen(token: str) -> str:
    """A token in a cell, with blanks that are all of it to be seen."""
    return label(token, 10) if token.strip() else label(token, 10).replace(" ", "␣")


def _hover(row: Any) -> str:
    named = zip(row.predicted, row.p_predicted, strict=True)
    lines = [f"block {row.layer}, position {row.position}"]
    lines += [f"{html.escape(label(name), quote=False)}: {number(p)}" for name, p in named]
    if row.following:
        lines.append(f"next is {html.escape(label(row.following), quote=False)}: {number(row.p_following)}")
    return "<br>".join(lines)
