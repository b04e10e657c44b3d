"""The digest of a model, and what is kept of it in a folder, where somebody has changed more than its weights."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sinklens.errors import InputError
from sinklens.models.digest import weight_digest
from sinklens.models.load import load_model
from sinklens.models.state import check_bare
from sinklens.models.view import held_tensors_of, named_modules_of
from tests.helpers.tiny import BACKENDS, tiny_model

KINDS: dict[str, Callable[[], Any]] = {
    **{backend: functools.partial(tiny_model, "llama", backend) for backend in BACKENDS},
    "decoder": lambda: load_model("tiny-sink", device="cpu"),
}
pytestmark = pytest.mark.backend


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def attention(model: Any) -> torch.nn.Module:
    """The module of the first block that attends: of a bridge, the one of transformers."""
    wrapped = vars(model).get("original_model")
    return model.blocks[0].attn if wrapped is None else wrapped.model.layers[0].self_attn


def check_seen(model: Any, before: str) -> None:
    assert weight_digest(model) != before
    with pytest.raises(InputError, match="another (forward|function)"):
        check_bare(model, "a folder (out)", "sweep in memory")


def test_every_tensor_that_a_module_holds_counts(model: Any) -> None:
    """Rotary tables, masks, biases that are no parameters: changed in place, with or without a trace."""
    before, seen = weight_digest(model), set()
    for name, held in held_tensors_of(model):
        kind = (name.rpartition(".")[2], held.dtype)
        if kind in seen or not held.numel():
            continue
        seen.add(kind)
        first = held.detach().view(-1)[:1].view(torch.uint8)
        first ^= 1
        assert weight_digest(model) != before, name
        first ^= 1
        assert weight_digest(model) == before
    assert seen
    model.register_buffer("somebody_s", torch.zeros(2))
    assert weight_digest(model) != before


def test_a_pass_changes_nothing_and_neither_does_loading_again(model: Any, request: pytest.FixtureRequest) -> None:
    before = weight_digest(model)
    model(torch.zeros(1, 9, dtype=torch.long))
    assert weight_digest(model) == before
    assert weight_digest(KINDS[request.node.callspec.params["model"]]()) == before
    check_bare(model, "a folder (out)", "sweep in memory")


def test_another_process_finds_the_same() -> None:
    code = (
        "from sinklens.models.digest import weight_digest\n"
        "from sinklens.models.load import load_model\n"
        "from tests.helpers.tiny import BACKENDS, tiny_model\n"
        "for backend in BACKENDS: print(weight_digest(tiny_model('llama', backend)))\n"
        "print(weight_digest(load_model('tiny-sink', device='cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-len(KINDS) :] == [weight_digest(make()) for make in KINDS.values()]


def test_a_forward_on_a_module_or_on_its_class_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, module = weight_digest(model), attention(model)
    kind = type(module)
    theirs = kind.forward

    def mine(self: Any, *args: Any, **options: Any) -> Any:
        return theirs(self, *args, **options)

    on_module = (types.MethodType(mine, module), functools.partial(mine, module), functools.wraps(theirs)(mine))
    for forward in on_module:
        with monkeypatch.context() as patched:
            patched.setitem(vars(module), "forward", forward)
            check_seen(model, before)
    for forward in (mine, functools.wraps(theirs)(mine), torch.no_grad()(mine), torch.nn.Linear.forward):
        with monkeypatch.context() as patched:
            patched.setattr(kind, "forward", forward)
            check_seen(model, before)
    assert weight_digest(model) == before
    check_bare(model, "a folder (out)", "sweep in memory")


def test_two_functions_in_its_place_differ(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(k: int) -> Any:
        return lambda *_args, **_options: k

    found = []
    for k in (1, 1, 2):
        monkeypatch.setattr(type(attention(model)), "forward", times(k))
        found.append(weight_digest(model))
    assert found[0] == found[1] != found[2]


def test_other_code_of_the_model_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other methods, those of base classes, and functions of the file that a class is written in."""
    before, kind = weight_digest(model), type(attention(model))
    file = sys.modules[kind.__module__]
    function = next(name for name, item in vars(file).items() if isinstance(item, types.FunctionType))
    for place, name in ((kind, "extra_repr"), (torch.nn.Module, "__call__"), (file, function)):
        theirs = getattr(place, name)
        with monkeypatch.context() as patched:
            patched.setattr(place, name, lambda *args, theirs=theirs, **options: theirs(*args, **options))
            check_seen(model, before)
    assert weight_digest(model) == before


def test_a_way_to_attend_that_is_the_users_counts() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = KINDS["bridge"]()
    before = weight_digest(model)
    ALL_ATTENTION_FUNCTIONS.register("mine", lambda *args, **_options: args)
    try:
        model.original_model.config._attn_implementation = "mine"
        check_seen(model, before)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["mine"]


def test_what_modules_are_and_are_set_up_by_counts(model: Any) -> None:
    before, found = weight_digest(model), set()
    mlp: Any = next(
        module for name, module in named_modules_of(model) if name.endswith("mlp") and hasattr(module, "act_fn")
    )
    theirs = mlp.act_fn
    others = (
        (torch.nn.ReLU(), torch.nn.Tanh())
        if isinstance(theirs, torch.nn.Module)
        else (lambda x: 2 * x, lambda x: 3 * x, torch.relu)
    )
    for other in others:
        mlp.act_fn = other
        found.add(weight_digest(model))
    mlp.act_fn = theirs
    assert len(found | {before}) == len(others) + 1 and weight_digest(model) == before
    for name, value in (("sliding_window", 3), ("softcap", 0.5), ("attn_type", "local"), ("window", (1, 2))):
        setattr(attention(model), name, value)
        found.add(weight_digest(model))
    assert len(found | {before}) == len(others) + 5
