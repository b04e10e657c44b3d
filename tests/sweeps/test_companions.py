"""Companion edits of a sweep: held fixed in every row, and equal to plain hooks that do both edits at once."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.edits import Constant, Edit, Function, Transplant
from sinklens.errors import InputError
from sinklens.pairs.pair import Direction, SinkPair, induced_pair, natural_pair
from sinklens.patches import Patch
from sinklens.readouts.base import Readout
from sinklens.readouts.build import attention_received
from sinklens.sites import ATTN_OUT, MLP_POST, RESID_PRE, HookSite, Z
from sinklens.sweeps import Companion
from sinklens.sweeps.companions import read_companions
from tests.helpers.sweeps import FORMATION, TARGET, edit_of, one_by_one, tiny_batch

COMMON: dict[str, Any] = {"formation": FORMATION, "min_gap": 0.0, "target": TARGET}
SUPER = (MLP_POST, (FORMATION.layer,), FORMATION.neurons)
HEAD = (Z, (2,), (3,))


def held(pair: SinkPair, direction: Direction, place: tuple[HookSite, Any, Any], edit: Edit) -> Patch:
    """A companion by hand."""
    run, source = pair.ends(direction)
    site, layers, units = place
    used = source if edit.uses_source else None
    return Patch(site, layers, pair.target, edit, units, run, used, allow_unchanged=True)


def received(batch: Any, pair: SinkPair, layers: list[int]) -> list[Readout]:
    return [attention_received("attention_received", tuple(layers), pair.target, batch.n)]


@pytest.mark.slow
@pytest.mark.parametrize("natural", [False, True])
def test_two_companions_are_held_in_every_row(tiny_llama: Any, natural: bool) -> None:
    batch = tiny_batch(tiny_llama)
    options = {**COMMON, "target": "natural" if natural else TARGET}
    result = sl.sweep(
        tiny_llama,
        batch,
        stages="attn_out,mlp_out",
        layers="0-2",
        positions=f"{TARGET}-{TARGET + 1}",
        edits="transplant,zero",
        companions="super_neurons:zero z:transplant:2:3",
        group_size=2,
        task_size=7,
        **options,
    )
    alone = sl.sweep(tiny_llama, batch, stages="attn_out", layers="0", **options).table
    pair = natural_pair(batch, FORMATION) if natural else induced_pair(tiny_llama, batch, FORMATION, TARGET)
    readouts = received(batch, pair, result.record["readout_layers"])
    for row in (SimpleNamespace(**record) for record in result.table.iloc[::5].to_dict("records")):
        also = (held(pair, row.direction, SUPER, Constant("zero")), held(pair, row.direction, HEAD, Transplant()))
        site = sl.sites.ATTN_OUT if row.stage == "attn_out" else sl.sites.MLP_OUT
        edit = edit_of(row.edit, site, (row.layer,), tiny_llama, batch, pair)
        slow = one_by_one(tiny_llama, batch, pair, readouts, row, site, edit, also)
        assert row.value == pytest.approx(slow, rel=2e-4, abs=2e-5)
        without = one_by_one(tiny_llama, batch, pair, readouts, row, site, edit)
        assert row.value != pytest.approx(without, rel=1e-5)
    first, mine = alone.groupby("prompt"), result.table.groupby("prompt")
    for run in ("base", "anchored"):  # the runs themselves are as they are without companions
        np.testing.assert_allclose(first[run].first(), mine[run].first(), rtol=1e-6)


def test_a_companion_acts_after_the_swept_edit_where_both_are(tiny_llama: Any) -> None:
    """So it is held fixed there too: whatever is swept, the activation is the companion's."""
    batch = tiny_batch(tiny_llama)
    result = sl.sweep(
        tiny_llama,
        batch,
        stages=RESID_PRE,
        layers="1",
        edits="transplant,zero,mean",
        companions=Companion(RESID_PRE, "transplant", layers=1),
        **COMMON,
    )
    assert result.table.groupby(["direction", "prompt"], observed=True).value.std().max() < 1e-6


def test_drawn_and_own_edits_as_companions(tiny_llama: Any) -> None:
    """Prompts in groups give what they give together, and an edit of one's own is told apart by its code."""
    batch = tiny_batch(tiny_llama)
    half = Function("half", lambda x, _source: x / 2)
    options: dict[str, Any] = {**COMMON, "stages": "attn_out", "layers": "0-1", "seed": 2}
    options["companions"] = [Companion("z", "resample", "1"), "mlp_post:mean:0:0-5", Companion(ATTN_OUT, half, [2])]
    whole = sl.sweep(tiny_llama, batch, **options)
    cut = sl.sweep(tiny_llama, batch, group_size=1, task_size=3, **options)
    keys = ["layer", "direction", "prompt"]
    values = [result.table.sort_values(keys).value for result in (whole, cut)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
    assert whole.config["companions"] == [
        ["z", "resample", [1], None],
        ["mlp_post", "mean", [0], [0, 1, 2, 3, 4, 5]],
        [[ATTN_OUT.template, list(ATTN_OUT.axes)], ["half", half.fingerprint()], [2], None],
    ]


def test_estimates_add_what_companions_do(tiny_llama: Any) -> None:
    """To first order the change of two edits is the sum of their changes."""
    batch = tiny_batch(tiny_llama)
    options: dict[str, Any] = {**COMMON, "layers": "2", "directions": "denoise", "method": "attribution"}
    both = sl.sweep(tiny_llama, batch, stages="attn_out", companions="mlp_out:transplant:1", **options).table
    one = sl.sweep(tiny_llama, batch, stages="attn_out", **options).table
    other = sl.sweep(tiny_llama, batch, stages="mlp_out", **{**options, "layers": "1"}).table
    np.testing.assert_allclose(both.effect, one.effect + other.effect, rtol=1e-4, atol=1e-6)


def test_a_folder_knows_its_companions(tiny_llama: Any, tmp_path: Path) -> None:
    batch = tiny_batch(tiny_llama)
    options: dict[str, Any] = {**COMMON, "stages": "mlp_out", "layers": "0", "out": tmp_path}
    sl.sweep(tiny_llama, batch, **options)
    assert "companions" not in json.loads((tmp_path / "sweep.json").read_text())["choices"]
    with pytest.raises(InputError, match=r'companions was null, now \[\["super_neurons", "zero", null, null\]\]'):
        sl.sweep(tiny_llama, batch, companions="super_neurons:zero", **options)
    held_one = sl.sweep(tiny_llama, batch, companions="super_neurons:zero", **options, force=True)
    again = sl.sweep(tiny_llama, batch, companions=["super_neurons:zero"], **options)
    assert again.table.equals(held_one.table)


def test_plans_with_companions_can_be_sent(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinklens.sweeps import Worker
    from sinklens.sweeps.run import ENGINES

    def elsewhere(model: Any, plan: Any, sink: Any, pending: Any, **_: Any) -> None:
        worker = Worker(model, pickle.loads(pickle.dumps(plan)))
        for index in pending:
            sink.write(plan.task_id(index), worker.run(index))

    monkeypatch.setitem(ENGINES, "elsewhere", elsewhere)
    batch = tiny_batch(tiny_llama)
    options: dict[str, Any] = {**COMMON, "stages": "mlp_out", "layers": "0-1", "companions": "z:mean:2"}
    here = sl.sweep(tiny_llama, batch, **options)
    assert here.table.equals(sl.sweep(tiny_llama, batch, engine="elsewhere", **options).table)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("z", "companion 'z': write PLACE:EDIT"),
        ("z:zero", "companion z is a site: say in which blocks"),
        ("zz:zero:1", "stage 'zz' is not known"),
        ("z:swap:1", "edit 'swap' is not known"),
        ("z:zero:one", "companion layers 'one' is not a range"),
        ("z:zero:1:2:3", "companion 'z:zero:1:2:3': write PLACE:EDIT"),
        ("z:zero:9", "companion layers 9: the model's blocks are 0-3"),
        ("z:zero:1:9", r"units 9: the units \(head\) of z are 0-3"),
        ("resid_pre:zero:1:all super_neurons:zero:1:999", r"units 999: the units \(d_mlp\) of mlp_post are"),
    ],
)
def test_companions_that_are_refused(tiny_llama: Any, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        sl.sweep(tiny_llama, tiny_batch(tiny_llama), companions=text, **COMMON)


def test_ways_to_write_companions() -> None:
    texts = read_companions("super_neurons:zero z:transplant:12:3")
    assert [(item.place, item.edit, item.layers, item.units) for item in texts] == [
        ("super_neurons", "zero", None, None),
        ("z", "transplant", (12,), (3,)),
    ]
    several = read_companions(["super_neurons:zero", replace(texts[1], layers="12", units=[3])])
    assert [vars(item) for item in several] == [vars(item) for item in texts]
    assert read_companions(()) == ()


@pytest.mark.smollm2
def test_super_neurons_off_and_a_head_transplanted_at_the_same_time(smollm2: Any) -> None:
    """Ablate the super neurons and transplant head 3 of block 12 at once, under a sweep of the formation block."""
    batch = sl.prompts.natural(smollm2, n=2, length=32)
    formation = sl.find_formation(smollm2, batch)
    options: dict[str, Any] = {"stages": "attn_out,mlp_out", "layers": "11", "formation": formation, "target": 10}
    result = sl.sweep(smollm2, batch, companions="super_neurons:zero z:transplant:12:3", **options)
    pair = induced_pair(smollm2, batch, formation, 10)
    readouts = received(batch, pair, result.record["readout_layers"])
    neurons = (MLP_POST, (formation.layer,), formation.neurons)
    for row in (SimpleNamespace(**record) for record in result.table.to_dict("records")):
        edits = ((neurons, Constant("zero")), ((Z, (12,), (3,)), Transplant()))
        also = tuple(held(pair, row.direction, place, edit) for place, edit in edits)
        site = sl.sites.ATTN_OUT if row.stage == "attn_out" else sl.sites.MLP_OUT
        slow = one_by_one(smollm2, batch, pair, readouts, row, site, Transplant(), also)
        assert row.value == pytest.approx(slow, rel=1e-3, abs=1e-5)
    # The ablation takes away a third of the sink, and nothing where the MLP's whole output is put in place after it.
    alone = sl.sweep(smollm2, batch, **options).table
    keys = ["stage", "direction"]
    more = (result.table.set_index(keys).effect - alone.set_index(keys).effect).groupby(keys, observed=True).mean()
    assert more["attn_out", "noise"] > 0.25 and more.drop(("attn_out", "noise")).abs().max() < 0.02
