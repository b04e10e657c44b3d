"""Ready-made causal hooks, for ``model.run_with_hooks(tokens, fwd_hooks=...)`` and ``with model.hooks(...)``.

Every function returns a list of ``(hook point name, function)`` pairs; the functions are plain ``(tensor, hook)`` hooks
that return new tensors, and they work on ``HookedTransformer`` and on ``TransformerBridge``::

    with model.hooks(sl.interventions.block_aggregation(position=10, layers=range(12))):
        logits = model(tokens)

They are built from the same edits as the engine's patches. Use them for single runs, exploration and
generation (positions count from the prompt's first token, with a key-value cache too), and :func:`sinklens.run_patches`
for sweeps.
"""

from sinklens.interventions.eviction import evict, eviction_patch
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
from sinklens.interventions.massive_activations import Massive, find_massive, massive_activations, massive_patch
from sinklens.interventions.patched import Hook, Hooks, hooks_of

__all__ = [
    "Hook",
    "Hooks",
    "Massive",
    "Mode",
    "ablate_dims",
    "ablate_heads",
    "ablate_neurons",
    "amplify_variance",
    "block_aggregation",
    "densify_down_projection",
    "evict",
    "eviction_patch",
    "find_massive",
    "hooks_of",
    "massive_activations",
    "massive_patch",
    "permute_z",
    "transplant",
    "transplant_attention_output",
    "transplant_keys",
    "transplant_values",
]
