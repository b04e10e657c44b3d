"""Explicit biases in place of the sink: its key and value become constants, or its value becomes zero.

If the sink is an implicit bias of attention (Sun et al., COLM 2024: softmax(Q [K k']^T / sqrt d) [V; v'] trains
without massive activations), then what stands at the sink's position does not depend on the prompt, and in every head

    k_sink <- k' = mean over data of k_sink,    v_sink <- v' = mean over data of v_sink

changes nothing. ``value="zero"`` asks whether it is a no-op, whose value does not count (the key stays). Keys are taken
before their rotation, so that the constant is at home at whichever position the sink has.

The control does the same to one ordinary position of every prompt, whose key and value are no constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sinklens import edits
from sinklens.engine.capture import capture_runs
from sinklens.engine.memory import row_budget
from sinklens.errors import InputError
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.models.identities import identities
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_shape
from sinklens.patches import CLEAN, Patch, Positions, Where
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout, Rows
from sinklens.readouts.build import at_position
from sinklens.sites import HookSite, K, V

BiasedValue = Literal["mean", "zero"]


@dataclass(frozen=True, eq=False)
class KeyValueBias:
    """Keys and values at one position of every prompt, as their means over prompts."""

    keys: Mapping[int, Float[Tensor, "kv_head d_head"]]
    """Per block, k'."""
    values: Mapping[int, Float[Tensor, "kv_head d_head"]]
    """Per block, v'."""


@in_usual_state
def find_bias(model: Model, batch: PromptBatch, positions: Where = (0,)) -> KeyValueBias:
    """Means over prompts of the keys (before their rotation) and values at one position of each.

    Raises:
        InputError: not one position for each prompt.
        NotApplicableError: keys and values that are not laid out by head.
    """
    layers = tuple(range(model_shape(model).n_layers))
    for site in (K, V):
        identities(model).check_layout(site.template, layers)
    where, rows = Positions.of(positions).single(batch.n), row_budget(model, batch.length, None)

    def there(site: HookSite) -> Readout:
        def reduce(act: Tensor, rows: Rows) -> Tensor:
            return at_position(act, site, rows, where)

        return Readout(site.template, site, layers, reduce)

    store = capture_runs(model, batch.tokens, CLEAN, [], [there(K), there(V)], max_rows=rows)
    means = [
        {layer: store.readings["base", site.template, layer].float().mean(0) for layer in layers} for site in (K, V)
    ]
    return KeyValueBias(*means)


def bias_keys_values(
    bias: KeyValueBias,
    positions: Where = (0,),
    *,
    layers: Sequence[int] | None = None,
    keys: bool = True,
    value: BiasedValue | None = "mean",
) -> Hooks:
    """Put constants in the place of the keys and values at some positions.

    Args:
        bias: the constants, from :func:`find_bias`.
        positions: where, each prompt's sink.
        layers: blocks; all by default.
        keys: whether keys are replaced.
        value: what values become: the ``mean``, ``zero``, or None for what they are.

    Raises:
        InputError: nothing is replaced, or by something else.
    """
    if value not in (*get_args(BiasedValue), None) or not (keys or value):
        raise InputError(f"value {value!r}: choose mean or zero, or None together with keys=True")
    blocks = tuple(bias.keys) if layers is None else tuple(layers)
    hooks: Hooks = []
    if keys:
        hooks += hooks_of(Patch(K, blocks, positions, edits.Constant("mean_key", bias.keys)))
    if value is not None:
        edit = edits.Constant("zero_value") if value == "zero" else edits.Constant("mean_value", bias.values)
        hooks += hooks_of(Patch(V, blocks, positions, edit))
    return hooks
