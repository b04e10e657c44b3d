"""What the untouched model says of every next token, for readouts that compare with it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.memory import row_budget
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, device_of, forward


@in_usual_state
def clean_log_probabilities(model: Model, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_vocab"]:
    """Log-probabilities of the next token after every position, on the model's device, in float32.

    They take four bytes for every prompt, position and word: 0.4 GB for 32 prompts of 64 tokens of SmolLM2.
    """
    rows = row_budget(model, tokens.shape[1], None, logits=True)
    parts = [forward(model, part.to(device_of(model)), return_type="logits") for part in tokens.split(rows)]
    return torch.cat([part.float().log_softmax(-1) for part in parts])
