"""What is made known by a name: found by it everywhere, refused twice, and sent along to other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sinklens as sl
from sinklens import sites
from sinklens.edits import Constant
from sinklens.errors import InputError
from sinklens.models import REGISTRY
from sinklens.pairs import EDITS, NamedEdit, register_edit
from sinklens.readouts import READOUTS, NamedReadout, register_readout
from sinklens.readouts.build import vector_readout
from sinklens.sites import RESID_PRE, SITES, HookSite, register_site
from sinklens.stages import STAGES
from tests.helpers.sweeps import FORMATION, TARGET, run, tiny_batch

TEN = NamedEdit("ten", lambda _: Constant("ten", {layer: torch.full((32,), 10.0) for layer in range(4)}))
HOOK = HookSite("blocks.{layer}.ln2.hook_normalized", ("batch", "pos", "d_model"))


def first_dim(name: str, context: Any) -> Any:
    def first(x: Any, _: int) -> Any:
        return x[..., 0]

    return vector_readout(name, RESID_PRE, context.layers, context.target, len(context.tokens), first)


FIRST = NamedReadout("first_dim", first_dim)


@pytest.fixture
def known() -> Iterator[None]:
    """The names, for one test."""
    register_readout(FIRST)
    register_edit(TEN)
    register_site("mid", HOOK)
    yield
    del READOUTS["first_dim"], EDITS["ten"], SITES["mid"]


STAGE = replace(STAGES["value_aggregation"], name="mine")
SOURCE = replace(REGISTRY["smollm2"], name="mine")
REGISTER = """
from sinklens.sites import register_site
from sinklens.stages import register
from sinklens.models import register_model
from sinklens.pairs import register_edit
from sinklens.readouts import register_readout
"""
EACH: list[tuple[str, Any, Any, Callable[[Any], Any]]] = [
    ("register_readout(thing)", READOUTS, FIRST, replace),
    ("register_edit(thing)", EDITS, TEN, replace),
    ("register_site('mid', thing)", SITES, HOOK, lambda _: RESID_PRE),
    ("register(thing)", STAGES, STAGE, lambda thing: replace(thing, claim="another")),
    ("register_model(thing)", REGISTRY, SOURCE, lambda thing: replace(thing, title="another")),
]


@pytest.mark.parametrize("function", [register_readout, register_edit, sl.register, sl.register_model])
def test_what_is_of_another_kind_gets_no_name(function: Any) -> None:
    for thing in (lambda logits: logits, RESID_PRE, Constant("zero"), None):
        with pytest.raises(InputError, match="with a name must be a .*, not of type"):
            function(thing)
    with pytest.raises(InputError, match="a variant must be a class made of Variant, with a name, not"):
        sl.register_variant(Constant)  # type: ignore[arg-type]


def test_a_readout_has_the_column_s_name_whatever_its_maker_says(tiny_llama: Any) -> None:
    """A chain calls its metric ``sink``, and a sweep calls it by its name."""
    named = NamedReadout("certain", lambda _, context: first_dim("another", context))
    batch, options = tiny_batch(tiny_llama), {"target": TARGET, "formation": FORMATION, "progress": False}
    swept = sl.sweep(tiny_llama, batch, stages="z", layers="1", readouts=named, **options)
    assert set(swept.table.readout) == {"certain"}
    chain = sl.run_chain(tiny_llama, batch, stages=["value_aggregation"], metric=named, min_gap=0, **options)
    assert chain.config["metric"] == "certain"
    wrong = NamedReadout("wrong", lambda *_: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="the readout 'wrong' must make a Readout, not something of type int"):
        sl.sweep(tiny_llama, batch, stages="z", layers="1", readouts=wrong, **options)


@pytest.mark.usefixtures("known")
def test_a_name_means_one_thing() -> None:
    register_readout(FIRST)  # the same once more is no mistake
    register_edit(TEN)
    register_site("mid", HOOK)
    assert sites.site_name(HOOK) == "mid"


@pytest.mark.parametrize("call, known_things, thing, another", EACH)
@pytest.mark.parametrize("place", [{"__name__": "__main__"}, {"__name__": "mine", "__file__": "/home/me/mine.py"}])
def test_a_cell_can_be_run_again(
    call: str, known_things: dict[str, Any], thing: Any, another: Any, place: dict[str, Any]
) -> None:
    """The newest counts; from elsewhere the name is taken, but for the very same thing."""
    name = "mid" if "'mid'" in call else thing.name
    exec(REGISTER, place)
    try:
        for _ in range(2):
            exec(call, place | {"thing": thing})
        newer = another(thing)
        exec(call, place | {"thing": newer})
        assert known_things[name] is newer
        exec(REGISTER + call, {"__name__": "elsewhere", "thing": newer})
        exec(call, place | {"thing": newer})
        with pytest.raises(ValueError, match=f"named '{name}' is already registered, in "):
            exec(REGISTER + call, {"__name__": "elsewhere", "thing": thing})
        assert known_things[name] is newer
    finally:
        known_things.pop(name, None)


@pytest.mark.parametrize("call, known_things, thing, another", EACH)
def test_names_of_the_package_stay_what_they_are(
    call: str, known_things: dict[str, Any], thing: Any, another: Any
) -> None:
    # Other tests may have left models of their own.
    own = {name: mine for name, mine in known_things.items() if known_things is not REGISTRY or name == "smollm2"}
    for name, mine in own.items():
        taken = mine if isinstance(mine, HookSite) else replace(mine)
        with pytest.raises(ValueError, match=f"named '{name}' is already registered"):
            exec(REGISTER + call.replace("'mid'", repr(name)), {"__name__": "__main__", "thing": taken})
    assert own.items() <= known_things.items() and thing is not another(thing)


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_registered_names_are_swept(tiny_llama: Any) -> None:
    found = run(tiny_llama, stages="mid", units=None, edits="ten", readouts="first_dim", readout_layers="3")
    objects = run(tiny_llama, stages=(HOOK,), units=None, edits=(TEN,), readouts=(FIRST,), readout_layers="3")
    assert np.array_equal(found.table.value, objects.table.value)
    assert set(found.table.edit) == {"ten"} and set(found.table.readout) == {"first_dim"}
    tokens = tiny_batch(tiny_llama).tokens

    def ten(act: Any, hook: Any) -> Any:  # noqa: ARG001
        act[:, TARGET] = 10.0
        return act

    with torch.no_grad(), tiny_llama.hooks([("blocks.2.ln2.hook_normalized", ten)]):
        _, cache = tiny_llama.run_with_cache(tokens)
    expected = cache["blocks.3.hook_resid_pre"][:, TARGET, 0].numpy()
    here = found.table.query(f"layer == 2 and position == {TARGET} and direction == 'denoise'")
    np.testing.assert_allclose(here.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("known")
def test_a_sweep_with_another_meaning_of_a_name_is_another_sweep(tiny_llama: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"units": None, "edits": "ten", "stages": "resid_pre"}
    run(tiny_llama, tmp_path, **options)
    EDITS["ten"] = NamedEdit("ten", lambda _: Constant("ten", {layer: torch.ones(32) for layer in range(4)}))
    with pytest.raises(sl.InputError, match="holds another sweep"):
        run(tiny_llama, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_other_processes_are_sent_what_was_registered(tiny_folder: Path) -> None:
    pytest.importorskip("ray")
    model = sl.load_model(tiny_folder, device="cpu")
    options: dict[str, Any] = {"stages": "mid", "units": None, "edits": "ten", "readouts": "first_dim"}
    here = run(model, **options).table
    there = run(model, **options, engine="ray", workers=1).table
    pd.testing.assert_frame_equal(here, there, check_categorical=False, rtol=0, atol=1e-6)
