"""What is known of a model is asked of the view: nobody else looks at a model's own attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sinklens.models.hooked import Rotary, attention_weights, can_take_apart
from sinklens.models.state import foreign_hooks
from sinklens.models.view import (
    Model,
    backend_name,
    bos_token,
    bytes_of,
    can_resume,
    context_length,
    damaged_weight,
    device_of,
    devices_of,
    dtype_of,
    moved_to,
    tokenizer_of,
    vocabulary_size,
)
from tests.helpers.tiny import D_VOCAB, N_CTX, hooks_left, tiny_model, tiny_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    def _both_are_models(hooked: HookedTransformer, bridge: TransformerBridge) -> tuple[Model, Model]:
        """For the type checker: the protocol takes both classes."""
        return hooked, bridge


ROOT = Path(__file__).parents[2]
OUTSIDE = sorted(
    path
    for folder in ("sinklens", "analyses")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "sinklens" / "models")
    # The lab trains decoders that are ours: it makes them, moves them and takes their parameters.
    and not path.is_relative_to(ROOT / "sinklens" / "lab")
)

PROTOCOL = {"hooks", "run_with_hooks", "run_with_cache"}
"""What may be called on a model anywhere."""
INNER = {
    "cfg",
    "hook_dict",
    "mod_dict",
    "original_model",
    "unembed",
    "ln_final",
    "pos_embed",
    "W_E",
    "W_U",
    "attn",
    "mlp",
    "b_U",
    "rotary_cos",
    "rotary_sin",
    "named_parameters",
    "to_tokens",
    "to_str_tokens",
    "add_hook",
    "reset_hooks",
}
"""Names that mean a model's own attribute wherever they stand."""
OF_A_MODEL = {
    "blocks",
    "tokenizer",
    "embed",
    "parameters",
    "buffers",
    "named_buffers",
    "state_dict",
    "modules",
    "to",
    "eval",
    "train",
    "device",
    "dtype",
    "generate",
}
"""Names that mean one on a model, and something else on other things."""
BACKENDS = {"is_bridge", "HookedTransformer", "TransformerBridge"}
"""What may not be imported: code outside asks what a model can do, not which it is."""


def looks_into_a_model(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines, and what they look at."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in INNER or (node.attr in OF_A_MODEL and _is_model(node.value)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in ("getattr", "hasattr", "setattr", "vars") and _is_model(node.args[0]):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"import {alias.name}") for alias in node.names if alias.name in BACKENDS)


def _is_model(node: ast.AST) -> bool:
    """``model``, ``self.model``, ``setting.study.model``, ..."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in ("model", "loaded")


def test_there_is_something_to_look_through() -> None:
    assert len(OUTSIDE) > 100


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_looks_into_a_model(path: Path) -> None:
    found = [f"line {line}: {what}" for line, what in looks_into_a_model(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, f"ask sinklens.models.view instead, which may need one more function: {'; '.join(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "model.cfg.d_model",
        "self.model.blocks[0]",
        "study.model.tokenizer",
        "block.attn.W_Q",
        "next(setting.study.model.parameters())",
        "getattr(model, 'tokenizer', None)",
        "for name, weight in loaded.named_parameters(): pass",
        "model.to('cpu')",
        "point = hooked.hook_dict['hook_embed']",
        "from sinklens.models.view import Model, is_bridge",
    ],
)
def test_a_look_is_noticed(line: str) -> None:
    assert list(looks_into_a_model(ast.parse(line)))


def test_what_is_called_on_a_model_is_no_look() -> None:
    calls = "\n".join(f"model.{name}(tokens)" for name in sorted(PROTOCOL))
    assert not list(looks_into_a_model(ast.parse(f"model(tokens)\n{calls}\nstage.blocks(study)\nx.to(device)")))


# --- What the view says ----------------------------------------------------------------------------------------------


@pytest.mark.backend
def test_what_both_backends_answer(tiny_llama: Any, tiny_bridge: Any) -> None:
    for model in (tiny_llama, tiny_bridge):
        assert vocabulary_size(model) == D_VOCAB and context_length(model) == N_CTX
        assert tokenizer_of(model) is None and bos_token(model) is None
        assert dtype_of(model) == torch.float32 and device_of(model) == torch.device("cpu")
        assert devices_of(model) == {torch.device("cpu")}
        assert moved_to(model, "cpu") is model
        weights = sum(parameter.numel() for parameter in model.parameters())
        assert bytes_of(model) >= 4 * weights
        assert can_resume(model) == can_take_apart(model)
        assert backend_name(model) == type(model).__name__
        assert not foreign_hooks(model)
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):  # noqa: ARG005
            assert foreign_hooks(model)
        assert hooks_left(model) == [] and not foreign_hooks(model)
    assert not can_resume(tiny_bridge)


@pytest.mark.backend
@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_damaged_weight_is_named(backend: Any) -> None:
    model = tiny_model("llama", backend)
    assert damaged_weight(model) is None
    name, weight = list(model.named_parameters())[5]
    with torch.no_grad():
        weight.view(-1)[3] = torch.nan
    found = damaged_weight(model)
    assert found == name.replace("._original_component", "")


@pytest.mark.parametrize("arch", ["llama", "gptj", "qwen3"])
@torch.no_grad()
def test_attention_taken_apart_places_queries_as_the_model_does(arch: str) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    model, tokens = tiny_model(arch, "hooked"), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    attn = attention_weights(model, 1, tokens.shape[1])
    q = cache["blocks.1.attn.hook_q"].flatten(0, 1)
    q = q if attn.q_norm is None else attn.q_norm(q)
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens))
    assert attn.rotary is not None and attn.rotary.adjacent == (arch == "gptj")
    turned = attn.rotary.turned(q, positions)
    torch.testing.assert_close(turned, cache["blocks.1.attn.hook_rot_q"].flatten(0, 1))


def test_a_rotation_by_hand() -> None:
    """A quarter turn takes (1, 2) to (-2, 1), in pairs of neighbours or of halves; what is beyond stays."""
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    x, at = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), torch.tensor([0])
    assert Rotary(zeros, ones, adjacent=True).turned(x, at).tolist() == [[[-2, 1, -4, 3, 5]]]
    assert Rotary(zeros, ones, adjacent=False).turned(x, at).tolist() == [[[-3, -4, 1, 2, 5]]]
