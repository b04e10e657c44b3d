"""What makes a sweep another one: everything that its numbers follow from, wherever that stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.edits import Edit, EditSite, Function
from sinklens.models.load import load_model
from sinklens.pairs import EDITS, NamedEdit, register_edit
from sinklens.readouts import READOUTS, NamedReadout, register_readout
from sinklens.readouts.build import vector_readout
from sinklens.sites import RESID_POST, RESID_PRE, SITES, register_site
from sinklens.stages import STAGES, register
from sinklens.sweeps import Companion
from tests.helpers.sweeps import run
from tests.helpers.tiny import tiny_hf

A = 3
VECTOR = torch.zeros(101)
GENERATOR = torch.Generator()
SMALL: dict[str, Any] = {"stages": "resid_pre", "units": None, "layers": "1"}


def helper(x: Any) -> Any:
    return x * A


class Times(Edit):
    """An edit whose class is the user's."""

    def __call__(self, x: Any, source: Any, at: EditSite) -> Any:  # noqa: ARG002
        return helper(x)


def mix(x: Any, source: Any, a: float) -> Any:
    return (1 - a) * x + a * source


def first_dim(name: str, context: Any) -> Any:
    return vector_readout(
        name, RESID_PRE, context.layers, context.target, len(context.tokens), lambda x, _: x[..., 0] * A
    )


READ: dict[str, Any] = {
    "a global": lambda logits, _: logits[:, -1, A],
    "a helper": lambda logits, _: helper(logits[:, -1, 0]),
    "a vector": lambda logits, _: logits[:, -1] @ VECTOR,
    "a named readout": NamedReadout("first_dim", first_dim),
}
EDIT: dict[str, Any] = {
    "a function": Function("helped", lambda x, source: helper(x) + 0 * source),
    "a partial": Function("mixed", partial(mix, a=0.5)),
    "a class": Times("times"),
    "a named edit": NamedEdit("named", lambda _: Times("times")),
}


@pytest.mark.parametrize("name", READ)
def test_a_readout_that_a_global_changes(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options: dict[str, Any] = {**SMALL, "readouts": READ[name], "readout_layers": "3"}
    first = run(tiny_llama, tmp_path, **options)
    assert run(tiny_llama, tmp_path, **options).table.equals(first.table)
    monkeypatch.setitem(globals(), "A", 5)
    monkeypatch.setitem(globals(), "VECTOR", torch.ones(101))
    with pytest.raises(sl.InputError, match="holds another sweep .readouts was"):
        run(tiny_llama, tmp_path, **options)
    assert not np.array_equal(run(tiny_llama, **options).table.value, first.table.value)


@pytest.mark.parametrize("companion", [False, True])
@pytest.mark.parametrize("name", EDIT)
def test_an_edit_that_a_global_changes(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, companion: bool
) -> None:
    options: dict[str, Any] = {**SMALL, "edits": EDIT[name]}
    if companion:
        options = {**SMALL, "companions": Companion("mlp_out", EDIT[name], layers="1")}
    run(tiny_llama, tmp_path, **options)
    run(tiny_llama, tmp_path, **options)
    monkeypatch.setitem(globals(), "A", 5)
    monkeypatch.setitem(globals(), "mix", lambda x, source, a: (1 - a) * x - a * source)
    if name == "a partial":  # the cell that makes it is run again
        again = Function("mixed", partial(globals()["mix"], a=0.5))
        options = {key: again if key == "edits" else value for key, value in options.items()}
        if companion:
            options["companions"] = replace(options["companions"], edit=again)
    with pytest.raises(sl.InputError, match="holds another sweep"):
        run(tiny_llama, tmp_path, **options)


@pytest.fixture
def names() -> Iterator[None]:
    yield
    for known, name in ((SITES, "here"), (STAGES, "mine"), (EDITS, "named"), (READOUTS, "first_dim")):
        known.pop(name, None)


@pytest.mark.slow
@pytest.mark.usefixtures("names")
def test_a_name_that_means_something_else(tiny_llama: Any, tmp_path: Path) -> None:
    """A site, a stage, an edit or a readout that was registered anew."""
    stage = replace(STAGES["value_aggregation"], name="mine", layers=lambda _: (1,), units=lambda _: (0,))
    newer = replace(stage, units=lambda _: (1,))
    each: list[tuple[dict[str, Any], Any, Any]] = [
        ({"stages": "here"}, lambda: register_site("here", RESID_PRE), lambda: register_site("here", RESID_POST)),
        ({"stages": "mine"}, lambda: register(stage), lambda: register(newer)),
        ({"companions": "mine:zero"}, lambda: register(stage), lambda: register(newer)),
        (
            {"edits": "named"},
            lambda: register_edit(EDIT["a named edit"]),
            lambda: register_edit(NamedEdit("named", lambda _: Times("other"))),
        ),
        (
            {"readouts": "first_dim", "readout_layers": "3"},
            lambda: register_readout(READ["a named readout"]),
            lambda: register_readout(replace(READ["a named readout"], is_share=True)),
        ),
    ]
    for number, (options, before, after) in enumerate(each):
        out, options = tmp_path / str(number), {**SMALL, **options}
        for _ in range(2):
            before()
            run(tiny_llama, out, **options)
        after()
        with pytest.raises(sl.InputError, match="holds another sweep"):
            run(tiny_llama, out, **options)


def test_what_cannot_be_told_again_is_refused_with_a_folder_alone(tiny_llama: Any, tmp_path: Path) -> None:
    def noisy(logits: Any, _rows: Any) -> Any:
        return logits[:, -1, 0] + GENERATOR.initial_seed()

    edit = Function("noise", lambda x, source: x + 0 * source + GENERATOR.initial_seed())
    each: list[tuple[str, dict[str, Any]]] = [
        ("readout 'noisy'", {"readouts": noisy}),
        ("edit 'noise'", {"edits": edit}),
    ]
    for what, options in each:
        assert len(run(tiny_llama, **SMALL, **options)) > 0
        with pytest.raises(sl.InputError, match=f"the {what} uses GENERATOR, a Generator of random numbers"):
            run(tiny_llama, tmp_path / "run", **SMALL, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bridge"])
def test_hooks_on_the_model_are_refused_with_a_folder(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_: Any = request.getfixturevalue(model)
    plain = run(model_, **SMALL).table

    def double(act: Any, hook: Any) -> Any:  # noqa: ARG001
        return act * 2

    with model_.hooks([("blocks.0.hook_mlp_out", double)]):
        hooked = run(model_, **SMALL).table
        with pytest.raises(sl.InputError, match="there are hooks on the model, and a folder .out. knows nothing"):
            run(model_, tmp_path, **SMALL)
    assert not np.allclose(hooked.value, plain.value)
    handle = next(m for m in model_.modules() if isinstance(m, torch.nn.Module) and m is not model_)
    handle = handle.register_forward_hook(lambda _module, _args, out: out)
    try:
        with pytest.raises(sl.InputError, match="there are hooks on the model"):
            run(model_, tmp_path, **SMALL)
    finally:
        handle.remove()
    assert np.array_equal(run(model_, tmp_path, **SMALL).table.value, plain.value)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"sliding_window": 6}, {"rms_norm_eps": 0.1}, {"hidden_act": "relu"}])
def test_the_same_weights_under_another_config_are_another_model(config: dict[str, Any], tmp_path: Path) -> None:
    """A window, an epsilon or an activation function changes every number and no weight."""
    first, second = tiny_hf("mistral", sliding_window=None), tiny_hf("mistral", **{"sliding_window": None, **config})
    second.load_state_dict(first.state_dict())
    one, other = (load_model(hf, device="cpu") for hf in (first, second))
    assert sl.models.weight_digest(one) == sl.models.weight_digest(load_model(first, device="cpu"))
    assert sl.models.weight_digest(one) != sl.models.weight_digest(other)
    run(one, tmp_path, **SMALL)
    with pytest.raises(sl.InputError, match=r"holds another sweep \(weight_digest"):
        run(other, tmp_path, **SMALL)
