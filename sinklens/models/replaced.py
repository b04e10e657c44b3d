"""Code that somebody has put in place of a model's own: weights and settings do not say what such a model computes.

A function may be replaced on a module (``module.forward = ...``), on its class (``Attention.forward = ...``), in the
file that the class is written in (``modeling_llama.apply_rotary_pos_emb = ...``), or among the ways to attend that
transformers knows by name.

Pitfall: what is replaced in torch itself is not seen (``torch.softmax = ...``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch

from sinklens.models.view import Model, is_bridge, named_modules_of
from sinklens.records.callables import is_library, is_users_code, users_entries


def replaced_code(model: Model) -> list[tuple[str, object]]:
    """What of a model's code is not as it was written, each with where it is."""
    found: list[tuple[str, object]] = []
    bridge = is_bridge(model)
    kinds: dict[type, None] = {}
    for name, module in named_modules_of(model):
        kinds[type(module)] = None
        for attribute, item in vars(module).items():
            if attribute[0] == "_" or not callable(item) or isinstance(item, torch.nn.Module):
                continue
            if callable(getattr(type(module), attribute, None)) and not (bridge and _wired(item)):
                found.append((f"{name or 'the model'}.{attribute}", item))
    bases = [base for base in {base: None for kind in kinds for base in kind.__mro__} if is_library(base.__module__)]
    found += users_entries(bases).items()
    found += [(f"{base.__qualname__}.forward", item) for base in bases if (item := _taken_over(base)) is not None]
    for name in dict.fromkeys(base.__module__ for base in bases):
        inside = vars(sys.modules[name]) if name in sys.modules else {}
        found += [(f"{name}.{entry}", item) for entry, item in inside.items() if is_users_code(item)]
    return [*dict(found).items(), *_ways_to_attend(model)]


def _wired(item: object) -> bool:
    """Whether TransformerLens or transformers has put a function onto a module of a bridge itself."""
    function = getattr(item, "__func__", item)
    written_in = function.__globals__.get("__name__") if isinstance(function, FunctionType) else None
    return is_of_libraries(written_in) and not is_users_code(function)


def is_of_libraries(module: str | None) -> bool:
    """Whether a module of that name is one of those that models are made of, TransformerLens and transformers."""
    return module is not None and module.partition(".")[0] in ("transformer_lens", "transformers")


def _taken_over(base: type) -> object | None:
    """A class's forward where it is another one's."""
    forward = vars(base).get("forward")
    if forward is None or base is torch.nn.Module:
        return None
    own = isinstance(forward, FunctionType) and forward.__qualname__ == f"{base.__qualname__}.forward"
    return None if own and forward.__module__ == base.__module__ else forward


def _ways_to_attend(model: Any) -> Iterator[tuple[str, object]]:
    """The function that transformers calls by the name in the config, where it is the user's."""
    config = getattr(vars(model).get("original_model"), "config", None)
    if config is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None)
    if is_users_code(function := ALL_ATTENTION_FUNCTIONS.get(name)):
        yield f"attention {name}", function
