"""Every number of a sweep: against one patch at a time with plain hooks, and against what must be exactly 0 or 1."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sinklens as sl
from sinklens.edits import Function, PerPrompt
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.families import D_MLP, N_HEADS, N_LAYERS
from sinklens.pairs.ablations import draw_places
from sinklens.pairs.pair import induced_pair, natural_pair
from sinklens.readouts.base import Readout, Rows
from sinklens.readouts.build import over_positions
from sinklens.readouts.named import READOUTS, Context, build
from sinklens.sites import LOGITS, RESID_PRE, SITES, Z
from sinklens.statistics import generator
from sinklens.sweeps.places import find_place
from tests.helpers import planted
from tests.helpers.sweeps import (
    FORMATION,
    LENGTH,
    TARGET,
    N,
    edit_of,
    in_order,
    one_by_one,
    ordinary_activations,
    tiny_batch,
)

QUICK = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ANSWERS = ([5, 6, 7], [8, 9, 10])
COMMON: dict[str, Any] = {"formation": FORMATION, "min_gap": 0.0, "answers": ANSWERS}


ASKED = sorted({*READOUTS} - {"kl"})
"""Readouts by name; kl, which compares with the untouched model, has a test of its own."""


def readouts_of(batch: Any, pair: Any, layers: tuple[int, ...], names: list[str]) -> list[Readout]:
    answers = (torch.tensor(ANSWERS[0]), torch.tensor(ANSWERS[1]))
    context = Context(batch.tokens, pair.target, pair.ordinary, layers, N_LAYERS, answers)
    return [build(name, context) for name in names]


def check_rows(model: Any, batch: Any, pair: Any, result: Any, chosen: list[int]) -> None:
    """Some rows against one patch at a time, and every effect against its definition."""
    table = result.table
    names = list(dict.fromkeys(table.readout))
    readouts = readouts_of(batch, pair, tuple(result.record["readout_layers"]), names)
    for row in table.iloc[chosen].itertuples():
        site = SITES[row.site]
        edit = edit_of(row.edit, site, tuple(range(row.layer, row.window + 1)), model, batch, pair)
        slow = one_by_one(model, batch, pair, readouts, row, site, edit)
        assert row.value == pytest.approx(slow, rel=2e-4, abs=2e-5), row
    denoise = (table.value - table.base) / (table.anchored - table.base)
    noise = (table.anchored - table.value) / (table.anchored - table.base)
    expected = np.where(table.direction == "denoise", denoise, noise)
    same = table.base == table.anchored
    np.testing.assert_allclose(table.effect[~same], expected[~same], rtol=1e-9, atol=1e-12)
    assert table.effect[same].isna().all()


@pytest.mark.slow
@QUICK
@given(data=st.data())
def test_every_cell_is_what_one_patch_at_a_time_gives(tiny_llama: Any, data: st.DataObject) -> None:
    batch = tiny_batch(tiny_llama)
    window = data.draw(st.integers(1, 2))
    natural = data.draw(st.booleans())
    numbers = st.lists(st.integers(0, N_LAYERS - window), min_size=1, max_size=2, unique=True)
    options: dict[str, Any] = {
        "stages": data.draw(st.lists(st.sampled_from(sorted(SITES)), min_size=1, max_size=2, unique=True)),
        "layers": data.draw(numbers),
        "window": window,
        "positions": data.draw(st.lists(st.integers(0, LENGTH - 2), min_size=1, max_size=2, unique=True)),
        "edits": data.draw(
            st.lists(st.sampled_from(["transplant", "zero", "mean"]), min_size=1, max_size=2, unique=True)
        ),
        "target": "natural" if natural else TARGET,
        "readouts": data.draw(st.lists(st.sampled_from(ASKED), min_size=1, max_size=2, unique=True)),
        "readout_layers": data.draw(st.sampled_from(["formation", "last", "1-2"])),
        "units": data.draw(st.sampled_from([None, "heads", "0,2"])),
        "group_size": data.draw(st.integers(1, N)),
        "task_size": data.draw(st.sampled_from([1, 5, 1000])),
    }
    if "dominance" in options["readouts"]:
        options["edits"] = ["transplant"]  # a residual stream that is all zeros has none
    if options["units"] == "heads" and not any(site in ("q", "k", "v", "z", "pattern") for site in options["stages"]):
        options["units"] = None
    if options["units"] == "0,2" and {"k", "v"} & set(options["stages"]):
        options["units"] = "0,1"  # of key/value heads there are two
    result = sl.sweep(tiny_llama, batch, **options, **COMMON)
    pair = natural_pair(batch, FORMATION) if natural else induced_pair(tiny_llama, batch, FORMATION, TARGET)
    rows = st.lists(st.integers(0, len(result.table) - 1), min_size=1, max_size=6)
    check_rows(tiny_llama, batch, pair, result, data.draw(rows))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["tiny_gpt2", "tiny_neox", "tiny_bridge"])
def test_other_models(request: pytest.FixtureRequest, arch: str) -> None:
    model = request.getfixturevalue(arch)
    batch = tiny_batch(model)
    options: dict[str, Any] = {"stages": ["z", "mlp_out"], "layers": "0-2:2", "positions": "2,5", "units": "heads"}
    result = sl.sweep(model, batch, target=TARGET, readouts=["attention_received", "loss"], **options, **COMMON)
    pair = induced_pair(model, batch, FORMATION, TARGET)
    check_rows(model, batch, pair, result, list(range(0, len(result.table), 37)))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["block_aggregation", "amplify_variance", "natural"])
def test_groups_of_prompts_and_tasks_change_nothing(tiny_llama: Any, pair: str) -> None:
    batch = tiny_batch(tiny_llama)
    options = everything(pair)
    whole = in_order(sl.sweep(tiny_llama, batch, **options, task_size=10_000, group_size=N).table)
    cut = in_order(sl.sweep(tiny_llama, batch, **options, task_size=17, group_size=2).table)
    assert len(whole) == len(cut)
    for name in ("stage", "site", "layer", "window", "position", "unit", "edit", "direction", "prompt", "readout"):
        assert whole[name].equals(cut[name])
    np.testing.assert_allclose(cut.value, whole.value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cut[["base", "anchored"]], whole[["base", "anchored"]], rtol=1e-5, atol=1e-6)
    assert cut.task.nunique() == 2 * -(-len(whole) // (len(READOUTS) * N) // 17)


def everything(pair: str) -> dict[str, Any]:
    """A sweep over every edit and readout."""
    options: dict[str, Any] = {
        "stages": ["value_aggregation", "mlp_post"],
        "layers": "0-2",
        "positions": "2-5",
        "units": "heads",
        "edits": ["transplant", "mean", "resample"],
        "target": TARGET,
        "readouts": list(READOUTS),
        **COMMON,
    }
    return options | ({"target": "natural", "positions": "target"} if pair == "natural" else {"pair": pair})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pair", ["block_aggregation", "amplify_variance", "natural"])
def test_a_gpu_gives_the_same(tiny_llama: Any, pair: str) -> None:
    batch = tiny_batch(tiny_llama)
    expected = in_order(sl.sweep(tiny_llama, batch, **everything(pair)).table)
    model = copy.deepcopy(tiny_llama).to("cuda")
    found = in_order(sl.sweep(model, batch, **everything(pair), group_size=2, task_size=100).table)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-3, atol=1e-4)
    assert found[["position", "prompt", "layer"]].equals(expected[["position", "prompt", "layer"]])


def test_resample_puts_an_ordinary_activation_of_some_prompt(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    options: dict[str, Any] = {"stages": ["z"], "layers": [1], "positions": [5], "target": TARGET, **COMMON}
    result = sl.sweep(tiny_llama, batch, edits=["resample"], seed=3, group_size=1, **options)
    pair = induced_pair(tiny_llama, batch, FORMATION, TARGET, seed=3)
    places = draw_places(pair.ordinary, generator(3, "sweep/resample"))
    assert pair.ordinary[places[:, 0], places[:, 1]].all()
    stacked = ordinary_activations(tiny_llama, batch, pair, Z, 1)
    values = []
    for prompt, position in places.tolist():
        values.append(stacked[prompt][int(pair.ordinary[prompt, :position].sum())])
    edit = PerPrompt("resample", {1: torch.stack(values)})
    readouts = readouts_of(batch, pair, tuple(result.record["readout_layers"]), ["attention_received"])
    for row in result.table.itertuples():
        slow = one_by_one(tiny_llama, batch, pair, readouts, row, Z, edit)
        assert row.value == pytest.approx(slow, rel=1e-4)  # pyright: ignore[reportAttributeAccessIssue]: a column
    other = sl.sweep(tiny_llama, batch, edits=["resample"], seed=4, **options)
    assert not np.allclose(other.table.value, result.table.value)


# -- What must be exactly 0 or 1 --------------------------------------------------------------------------------------


def test_the_root_transplanted_in_all_blocks_carries_everything(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"layers": [0], "window": FORMATION.layer + 1, "target": TARGET, **COMMON}
    result = sl.sweep(tiny_llama, batch, stages="value_aggregation", readouts=", ".join(READOUTS), **given)
    table = result.table[result.table.readout != "sink_rate"]  # which the pair does not move on a random model
    assert len(table) == 2 * N * (len(READOUTS) - 1)
    np.testing.assert_allclose(table.effect, 1, atol=1e-3)
    half = sl.sweep(tiny_llama, batch, stages=["value_aggregation"], **{**given, "window": 1})
    assert (half.table.effect - 1).abs().min() > 1e-3  # so that the 1 above is no accident


def test_a_patch_after_all_that_is_read_does_nothing(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"stages": ["mlp_out"], "target": TARGET, "readout_layers": "2", **COMMON}
    late = sl.sweep(tiny_llama, batch, layers="2-3", **given).table
    assert (late[late.layer == 3].effect == 0).all()
    np.testing.assert_allclose(late.effect, 0, atol=1e-5)  # in the block itself the pattern comes before the MLP
    assert (sl.sweep(tiny_llama, batch, layers="1", **given).table.effect != 0).all()


def test_a_patch_where_the_runs_do_not_differ_does_nothing(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    result = sl.sweep(tiny_llama, batch, stages=["resid_pre"], positions=f"0-{TARGET}", target=TARGET, **COMMON)
    before = result.table[(result.table.position < TARGET) | (result.table.layer == 0)]
    np.testing.assert_allclose(before.effect, 0, atol=1e-4)
    assert (result.table[(result.table.position == TARGET) & (result.table.layer == 2)].effect.abs() > 1e-3).all()


def test_the_planted_model(request: pytest.FixtureRequest) -> None:
    """Neuron 0 of block 0 makes the sink by itself, and no other neuron does anything."""
    del request
    model = planted.planted_model()
    batch = sl.prompts.from_tokens(model, planted.prompts())
    formation = Formation(0, (1, 0), (replace_neuron(planted.SUPER),), ())
    given: dict[str, Any] = {"target": 5, "formation": formation}
    result = sl.sweep(model, batch, stages=["mlp_post"], layers=[0], units="neurons", **given)
    tensor = result.to_tensor().mean("prompt").squeeze()
    assert tensor.axes == ("unit", "direction") and len(tensor.coords["unit"]) == planted.D_MLP
    np.testing.assert_allclose(tensor.select(unit=planted.SUPER).values, 1, atol=1e-3)
    others = [unit for unit in tensor.coords["unit"] if unit != planted.SUPER]
    assert max(float(tensor.select(unit=unit).values.abs().max()) for unit in others) < 1e-3
    together = sl.sweep(model, batch, stages=["super_neurons"], **given).table
    np.testing.assert_allclose(together.effect, 1, atol=1e-3)
    assert together.unit.isna().all() and set(together.layer) == {0}


def replace_neuron(index: int) -> Any:
    return replace(FORMATION.super_neurons[0], index=index)


@pytest.mark.smollm2
def test_the_formation_block_of_the_real_model(smollm2: Any) -> None:
    """The MLP of block 11 carries the sink, that of no later block does, and nowhere else but at the target."""
    batch = sl.prompts.natural(smollm2, n=2, length=32)
    result = sl.sweep(smollm2, batch, stages="mlp_out", layers="11-13", positions="9-11", target=10)
    assert result.formation.layer == 11
    effect = result.to_tensor().mean("prompt").squeeze()
    assert effect.axes == ("layer", "position", "direction")
    assert effect.select(layer=11, position=10, direction="denoise").values > 0.9
    for place in ({"layer": 12}, {"layer": 13}, {"position": 9}, {"position": 11}):
        assert effect.select(**place).values.abs().max() < 0.1


# -- Stages, units, readouts ------------------------------------------------------------------------------------------


def test_a_stage_with_units_of_its_own(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"stages": ["super_neurons"], "target": TARGET, **COMMON}
    each = sl.sweep(tiny_llama, batch, units="neurons", **given).table
    assert set(each.layer) == {FORMATION.layer} and set(each.unit) == {3, 7}
    numbers = sl.sweep(tiny_llama, batch, units="0-1", layers="0-2", **given).table
    assert set(numbers.layer) == {0, 1, 2} and set(numbers.unit) == {0, 1}
    with pytest.raises(InputError, match="the units of super_neurons are those of block 1"):
        sl.sweep(tiny_llama, batch, layers="2-3", **given)


def test_units_of_every_site(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"stages": ["z", "k", "mlp_post"], "layers": [1], "target": TARGET, **COMMON}
    table = sl.sweep(tiny_llama, batch, units="all", **given).table
    counts = table.groupby("stage", observed=True).unit.nunique()
    assert dict(counts) == {"z": N_HEADS, "k": 2, "mlp_post": D_MLP}
    heads = sl.sweep(tiny_llama, batch, units="heads", **given).table
    assert heads[heads.stage == "mlp_post"].unit.isna().all()
    with pytest.raises(InputError, match=r"units 0, 1, 2, 3: the units \(kv_head\) of k are 0-1|units 2, 3"):
        sl.sweep(tiny_llama, batch, units="0-3", **given)


def test_edits_and_readouts_of_ones_own(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    seen: list[int] = []

    def last_logit(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        seen.extend(rows.prompts.tolist())
        return logits[:, -1, 5] + 100 * rows.prompts  # says which prompt it was told

    mine = over_positions(
        "norm",
        RESID_PRE,
        (3,),
        lambda x, tokens: x.norm(dim=-1) + 100 * tokens.prompts,
        lambda length: torch.eye(length)[TARGET].expand(N, -1),
    )
    halfway = Function("halfway", lambda x, source: (x + source) / 2)
    result = sl.sweep(
        tiny_llama,
        batch,
        stages=[RESID_PRE],
        layers=[1],
        edits=[halfway],
        readouts=[last_logit, mine],
        group_size=1,
        target=TARGET,
        **COMMON,
    )
    assert set(seen) == {0, 1, 2}
    pair = induced_pair(tiny_llama, batch, FORMATION, TARGET)
    readouts = [Readout("last_logit", LOGITS, (N_LAYERS,), last_logit), mine]
    for row in result.table.itertuples():
        slow = one_by_one(tiny_llama, batch, pair, readouts, row, RESID_PRE, halfway)
        assert row.value == pytest.approx(slow, abs=1e-3)  # pyright: ignore[reportAttributeAccessIssue]: a column


def test_small_gaps_have_no_effect(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"readouts": ["attention_received", "loss"], "target": TARGET, "formation": FORMATION}
    table = sl.sweep(tiny_llama, batch, layers=[1], min_gap=0.02, **given).table
    gap = (table.anchored - table.base).abs()
    share = table.readout == "attention_received"
    least = np.where(share, 0.02, 0.02 * np.maximum(table.base, table.anchored))
    assert table.effect.isna().equals(gap < least)
    assert 0 < table.effect.isna().mean() < 1


def test_a_cell_that_is_not_finite_does_not_end_the_sweep(tiny_llama: Any) -> None:
    """A residual stream that is all zeros has no dominance ratio: 0 / 0."""
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"stages": "resid_pre", "positions": f"{TARGET}-{TARGET + 1}", "target": TARGET, **COMMON}
    given |= {"layers": "2", "edits": "zero,mean", "readout_layers": "2"}
    result = sl.sweep(tiny_llama, batch, readouts="dominance,residual_norm", **given)
    table = result.table
    odd = (table.edit == "zero") & (table.position == TARGET) & (table.readout == "dominance")
    assert (table.value.isna() == odd).all() and (table.effect.isna() == odd).all()
    assert result.n_nonfinite() == odd.sum() == 2 * N
    alone = sl.sweep(tiny_llama, batch, readouts="dominance,residual_norm", **{**given, "edits": "mean"}).table
    np.testing.assert_allclose(alone.value, table[table.edit == "mean"].value, rtol=1e-6)


def test_names_that_are_not_known(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    for options, message in (
        ({"stages": ["resid_prey"]}, "stage 'resid_prey' is not known: did you mean resid_pre"),
        ({"stages": []}, "stages must be a list with at least one entry"),
        ({"stages": " , "}, "stages must be a list with at least one entry"),
        ({"stages": ["z", "z"]}, "stages: z is given twice"),
        ({"edits": ["swap"]}, "edit 'swap' is not known: choose from transplant, zero, mean, resample"),
        ({"readouts": ["kld"]}, "readout 'kld' is not known: choose from attention_received"),
        ({"directions": ["sideways"]}, "direction 'sideways': choose denoise or noise"),
        ({"directions": ["denoise"], "target": "natural"}, "target natural can only be noised"),
        ({"target": "first"}, "target 'first' must be a position such as 10, or natural"),
        ({"target": LENGTH - 1}, r"target 11 must be in 1\.\.10"),
        ({"layers": "0-9"}, "layers 4, 5, 6, 7 and 2 more: the model's blocks are 0-3"),
        ({"layers": "3", "window": 2}, "layers 3: a window of 2 blocks from there goes beyond the model's last block"),
        ({"window": 5}, "window 5: it must be 1-4 blocks"),
        ({"positions": "12"}, "positions 12: the positions of prompts of 12 tokens are 0-11"),
        ({"units": "heads"}, "units heads: resid_pre, attn_out, mlp_out has none of these"),
        ({"units": "feet"}, "units 'feet': choose heads, neurons, dims, all, or numbers"),
        ({"method": "magic"}, "method 'magic'"),
        ({"engine": "steam"}, "engine 'steam'"),
        ({"shard": (3, 2)}, "shard 3/2: write I/N"),
        ({"answers": ([1], [2])}, "answers must be two lists of 3 token ids"),
    ):
        with pytest.raises(InputError, match=message):
            sl.sweep(tiny_llama, batch, **{"formation": FORMATION, "target": TARGET, **options})


def test_every_site_is_found() -> None:
    assert all(find_place(name) == site for name, site in SITES.items())
