"""The first prompt of a circuit in CircuitsVis: what its heads attend to, and what each token adds to super neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sinklens.circuits import Circuit
from sinklens.errors import InputError, need
from sinklens.viz.circuit import check_circuit
from sinklens.viz.circuitsvis import as_text, label, safe

if TYPE_CHECKING:
    from circuitsvis.utils.render import RenderedHTML


def circuit_heads(circuit: Circuit, run: str) -> list[str]:
    """The heads whose attention was kept of a run, as nodes are called.

    Raises:
        InputError: there is no attention of such a run.
    """
    check_circuit(circuit)
    heads = [name.removeprefix(f"{run}/") for name in circuit.attention if name.startswith(f"{run}/")]
    if not heads:
        there = ", ".join(dict.fromkeys(name.partition("/")[0] for name in circuit.attention)) or "none"
        raise InputError(f"no attention of a run {run!r}: this circuit has {there}")
    return sorted(heads, key=lambda name: [int(part) for part in name.partition(" ")[2].split(".")])


def circuit_attention_view(
    circuit: Circuit, run: str, heads: Sequence[str] | None = None, max_tokens: int = 64
) -> RenderedHTML:
    """Attention of the circuit's heads on the first prompt in one run, as a CircuitsVis view.

    Args:
        circuit: what was found.
        run: a run of the pair.
        heads: which, such as ``head 3.5``; all that the circuit has by default.
        max_tokens: show the first so many tokens.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such run or head.
    """
    there = circuit_heads(circuit, run)
    chosen = there if heads is None else list(heads)
    if not chosen or not set(chosen) <= set(there):
        raise InputError(f"heads {', '.join(map(str, chosen)) or 'none'} are not among {', '.join(there)}")
    patterns = [circuit.attention[f"{run}/{name}"][:max_tokens, :max_tokens].float().tolist() for name in chosen]
    values = [[[round(x, 3) for x in row] for row in pattern] for pattern in patterns]
    tokens = [label(token) for token in circuit.tokens[:max_tokens]]
    names = [name.removeprefix("head ") for name in chosen]
    return safe(need("circuitsvis.attention").attention_heads(values, tokens, names, max_value=1.0, min_value=0.0))


def contributed(circuit: Circuit, run: str, branch: str) -> Float[np.ndarray, " pos"]:
    """What every token of the first prompt adds to an input of the super neurons, by all heads; NaN where none did.

    Raises:
        InputError: there is no such run or input.
    """
    check_circuit(circuit)
    every: Any = circuit.by_token
    rows = every[(every.run == run) & (every.branch == branch)]
    if rows.empty:
        known = dict.fromkeys(zip(every.run, every.branch, strict=True))
        there = ", ".join(f"{run} {branch}" for run, branch in known) or "none"
        raise InputError(f"nothing is known of tokens in {run} {branch}: this circuit has {there}")
    values = np.full(len(circuit.tokens), np.nan)
    values[rows.position.to_numpy(dtype=int)] = rows.value.to_numpy(dtype=float)
    return values


def circuit_token_view(
    circuit: Circuit, run: str, branch: str, max_tokens: int = 256, most: float | None = None
) -> RenderedHTML:
    """:func:`contributed` as a CircuitsVis view: blue what adds to the input, red what takes from it.

    Args:
        circuit: what was found.
        run: a run of the pair.
        branch: ``gate``, ``linear`` or ``in``.
        max_tokens: show the first so many tokens.
        most: value of the strongest colours; by default the largest of any run, so that runs can be compared.

    Raises:
        InputError: CircuitsVis is not installed, or there is no such run or input.
    """
    values = contributed(circuit, run, branch)[:max_tokens]
    every: Any = circuit.by_token
    top = most or float(every[every.branch == branch].value.abs().max()) or 1.0
    chosen = [(as_text(token), float(f"{x:.4g}")) for token, x in zip(circuit.tokens, values, strict=False) if x == x]
    tokens, numbers = [token for token, _ in chosen], [x for _, x in chosen]
    return safe(need("circuitsvis.tokens").colored_tokens(tokens, numbers, min_value=-top, max_value=top))
