"""What a model says under each mitigation: the most likely token, again and again."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.interventions import Hooks
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, device_of, forward, generation_of, hooked, model_shape, tokenizer_of


@in_usual_state
def continued(model: Model, tokens: Int[Tensor, " pos"], hooks: Hooks, n: int) -> Int[Tensor, " new"]:
    """The ``n`` tokens that follow greedily, with a key-value cache where the model's own generation is right with one.

    Otherwise each is said by a pass over all that came before: where positions are learned (TransformerLens 3.9 gets
    these wrong), in decoders of the lab, with caches that keep a sliding window alone.
    """
    generate = generation_of(model)
    if generate is not None and model_shape(model).rotary:
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
        try:
            with hooked(model, hooks):
                return generate(tokens[None].to(device_of(model)), max_new_tokens=n, **options)[0, len(tokens) :].cpu()
        except InputError:  # the cache does not say where a pass begins
            pass
    return without_cache(model, tokens, hooks, n)


def without_cache(model: Model, tokens: Int[Tensor, " pos"], hooks: Hooks, n: int) -> Int[Tensor, " new"]:
    """The same by a pass over everything for each token."""
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
