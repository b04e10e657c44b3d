"""What is made known by a name: found by it everywhere, refused twice, and sent along to other processes."""

from __future__ import annotations

from collections.abc import Iterator
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
from sinklens.pairs import EDITS, NamedEdit, register_edit
from sinklens.readouts import READOUTS, NamedReadout, register_readout
from sinklens.readouts.build import vector_readout
from sinklens.sites import RESID_PRE, SITES, HookSite, register_site
from tests.helpers.sweeps import TARGET, run, tiny_batch

TEN = NamedEdit("ten", lambda _: Constant("ten", {layer: torch.full((32,), 10.0) for layer in range(4)}))
HOOK = HookSite("blocks.{layer}.hook_resid_mid", ("batch", "pos", "d_model"))


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


@pytest.mark.usefixtures("known")
def test_a_name_means_one_thing() -> None:
    register_readout(FIRST)  # the same once more is no mistake
    register_edit(TEN)
    register_site("mid", HOOK)
    with pytest.raises(ValueError, match="named 'first_dim' is already registered"):
        register_readout(replace(FIRST))
    with pytest.raises(ValueError, match="named 'ten' is already registered"):
        register_edit(replace(TEN))
    with pytest.raises(ValueError, match="named 'mid' is already registered"):
        register_site("mid", RESID_PRE)
    assert sites.site_name(HOOK) == "mid"


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

    with torch.no_grad(), tiny_llama.hooks([("blocks.2.hook_resid_mid", ten)]):
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
