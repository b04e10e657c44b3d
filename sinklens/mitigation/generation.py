"""What a model says under each mitigation: the most likely token, again and again."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.interventions import Hooks
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, device_of, forward, hooked, tokenizer_of


@in_usual_state
def continued(model: Model, tokens: Int[Tensor, " pos"], hooks: Hooks, n: int) -> Int[Tensor, " new"]:
    """The ``n`` tokens that follow greedily.

    Each is said by a pass over all that came before, without a key-value cache: what a hook does to a prompt it does
    to these tokens too, with every backend and every kind of positions.
    """
    text = tokens[None].to(device_of(model))
    for _ in range(n):
        with hooked(model, hooks):
            logits = forward(model, text, return_type="logits")
        text = torch.cat([text, logits[:, -1:].argmax(-1).to(text)], 1)
    return text[0, len(tokens) :].cpu()


def told(model: Model, tokens: Int[Tensor, " pos"]) -> str:
    """Tokens as text; as their numbers where the model has no tokenizer."""
    tokenizer = tokenizer_of(model)
    ids = tokens.tolist()
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
