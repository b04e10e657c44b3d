"""Ready-made causal hooks, for ``model.run_with_hooks(tokens, fwd_hooks=...)`` and ``with model.hooks(...)``.

Every function returns a list of ``(hook point name, function)`` pairs; the functions are plain ``(tensor, hook)`` hooks
that return new tensors, and they work on ``HookedTransformer`` and on ``TransformerBridge``::

    with model.hooks(sl.interventions.block_aggregation(position=10, layers=range(12))):
        logits = model(tokens)

They are built from the same edits as the engine's patches. Use them for single runs, exploration and
generation (positions count from the prompt's first token, with a key-value cache too), and :func:`sinklens.run_patches`
for sweeps.

Those that take a sink away without training have a file each, which gives the equation, the source, the authors'
settings and what is our choice; :func:`harm` measures what any hooks cost.
"""

from sinklens.interventions.calibration import calibrate, search_heads
from sinklens.interventions.dark_subspace import dark_basis, remove_dark_subspace
from sinklens.interventions.eviction import evict, eviction_patch
from sinklens.interventions.gating import SinkHeads, find_sink_heads, gate_heads
from sinklens.interventions.harm import Harm, harm
from sinklens.interventions.hooks import (
    Mode,
    ablate_dims,
    ablate_heads,
    ablate_neurons,
    amplify_variance,
    block_aggregation,
    densify_down_projection,
    permute_z,
    transplant,
    transplant_attention_output,
    transplant_keys,
    transplant_values,
)
from sinklens.interventions.key_value_biases import KeyValueBias, bias_keys_values, find_bias
from sinklens.interventions.massive_activations import Massive, find_massive, massive_activations, massive_patch
from sinklens.interventions.patched import Hook, Hooks, hooks_of
from sinklens.interventions.softening import soften

__all__ = [
    "Harm",
    "Hook",
    "Hooks",
    "KeyValueBias",
    "Massive",
    "Mode",
    "SinkHeads",
    "ablate_dims",
    "ablate_heads",
    "ablate_neurons",
    "amplify_variance",
    "bias_keys_values",
    "block_aggregation",
    "calibrate",
    "dark_basis",
    "densify_down_projection",
    "evict",
    "eviction_patch",
    "find_bias",
    "find_massive",
    "find_sink_heads",
    "gate_heads",
    "harm",
    "hooks_of",
    "massive_activations",
    "massive_patch",
    "permute_z",
    "remove_dark_subspace",
    "search_heads",
    "soften",
    "transplant",
    "transplant_attention_output",
    "transplant_keys",
    "transplant_values",
]
