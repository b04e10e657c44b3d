"""Models: `load_model`, the registry of models that have a short name, and one view of both TransformerLens backends.

A model is always float weights exactly as published: nothing is folded or centred, so a neuron or a norm weight here is
the one in the checkpoint. Text is tokenised as the model's own tokenizer does it; in particular no BOS is prepended
that the tokenizer would not prepend itself, because an extra first token is an extra sink.
"""

from sinklens.models.digest import weight_digest
from sinklens.models.identities import Identities, block_weights, check_writes_directly, identities
from sinklens.models.load import REGISTRY, ModelListing, ModelSource, list_models, load_model, register_model
from sinklens.models.view import (
    BlockWeights,
    Model,
    ModelShape,
    can_resume,
    check_hook_name,
    forward,
    has_hook,
    is_bridge,
    model_id,
    model_shape,
)

__all__ = [
    "BlockWeights",
    "Identities",
    "Model",
    "ModelListing",
    "ModelShape",
    "ModelSource",
    "REGISTRY",
    "block_weights",
    "can_resume",
    "check_hook_name",
    "check_writes_directly",
    "forward",
    "has_hook",
    "identities",
    "is_bridge",
    "list_models",
    "load_model",
    "model_id",
    "model_shape",
    "register_model",
    "weight_digest",
]
