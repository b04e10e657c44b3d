"""The benchmark: equal weights, equal numbers before any time, the arithmetic counted right, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sinklens.cli.tables import console
from sinklens.errors import EngineError, InputError
from sinklens.models.load import load_model
from tests.benchmark import cases, flops, hf_peers, measure, peers, record, run, shapes, workload
from tests.benchmark.__main__ import app as benchmark
from tests.benchmark.calls import REST, TOTAL, Clock

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FAST = measure.Limits(repeats=2, seconds=0.01)


@pytest.fixture(scope="module")
def models() -> shapes.Models:
    return shapes.load_models("tiny", CPU, torch.float32)


@pytest.fixture(scope="module")
def late(models: shapes.Models) -> workload.Workload:
    """Two prompts, every cell of the first five blocks, read in the last but one."""
    return workload.make_workload(160, workload.grid(range(5), range(16)), 16, (4,), models.sizes.d_vocab)


@pytest.fixture(scope="module")
def chain(models: shapes.Models) -> workload.Workload:
    """One position, two blocks, read in the three blocks after: many prompts."""
    return workload.make_workload(
        16, workload.grid(range(2), range(10, 11)), 16, (2, 3, 4), models.sizes.d_vocab, target=10
    )


def test_the_twin_has_the_weights_that_load_model_gives(models: shapes.Models) -> None:
    theirs, ours = load_model(models.hf, device="cpu").state_dict(), models.hooked.state_dict()
    weights = [name for name in theirs if not name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos"))]
    assert len(weights) > 6 * 9
    for name in weights:
        assert torch.equal(theirs[name], ours[name]), name


def test_weights_follow_from_the_seed_and_are_not_shared(models: shapes.Models) -> None:
    again = shapes.random_weights(shapes.CONFIGS["tiny"], CPU, torch.float32)
    other = shapes.random_weights(shapes.CONFIGS["tiny"], CPU, torch.float32, seed=1)
    assert torch.equal(again.lm_head.weight, models.hf.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, other.lm_head.weight)


def test_a_wrong_twin_is_refused(models: shapes.Models) -> None:
    other = shapes.random_weights(shapes.CONFIGS["tiny"], CPU, torch.float32, seed=1)
    with pytest.raises(EngineError, match="two forms of tiny differ"):
        shapes.check_twins(shapes.Models("tiny", "random", other, models.hooked))


def test_a_number_of_patches_comes_out_exactly() -> None:
    cells = workload.grid(range(5), range(16))
    for n, prompts in ((64, 1), (80, 1), (128, 2), (1024, 16)):
        work = workload.make_workload(n, cells, 16, (4,), 101)
        assert (work.n_patches, work.n_prompts) == (n, prompts)
        assert len(set(work.cells)) == len(work.cells) and set(work.cells) <= set(cells)
        assert list(work.cells) == sorted(work.cells)
    assert torch.equal(work.clean.sort(1).values, work.corrupt.sort(1).values)
    assert not torch.equal(work.clean, work.corrupt)
    part = work.part(7, seed=3)
    assert len(part.cells) == 7 and set(part.cells) <= set(work.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_lens", "sinklens", "nnsight", "pyvene"])
@pytest.mark.parametrize("sweep", ["late", "chain"])
def test_peers_agree_with_one_run_with_hooks_for_each_patch(
    name: str, sweep: str, models: shapes.Models, request: pytest.FixtureRequest
) -> None:
    work: workload.Workload = request.getfixturevalue(sweep)
    found, left_out = measure.make_peers([name], models)
    if left_out:
        pytest.skip(left_out[name])
    reference = peers.RunWithHooks(models)
    expected = reference.run(work, 0)
    for rows in found[0].rows[-2:] or (0,):
        found[0].prepare(work)
        values = found[0].run(work, rows)
        assert values.shape == (len(work.cells), work.n_prompts)
        assert measure.difference(values, expected, reference.clean(work)) < 1e-4


def test_the_reference_by_hand(models: shapes.Models, chain: workload.Workload) -> None:
    """One patch with nothing but Hugging Face's modules, its own eager attention included."""
    layer, position = chain.cells[1]
    source = hf_peers.residuals(models.hf.model, chain.corrupt, [layer])[layer]
    inner = hf_peers.own_modules(models.hf.model)
    inner.set_attn_implementation("eager")

    def patch(_module: Any, args: tuple) -> tuple:
        new = args[0].clone()
        new[:, position] = source[:, position]
        return (new, *args[1:])

    inner.layers[layer].register_forward_pre_hook(patch)
    patterns = inner(input_ids=chain.clean, use_cache=False, output_attentions=True).attentions
    by_hand = torch.stack([patterns[block][:, :, 11:, 10].mean((1, 2)) for block in chain.readouts]).mean(0)
    torch.testing.assert_close(peers.RunWithHooks(models).run(chain, 0)[1].float(), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_peer_that_patches_nothing_differs_by_one(models: shapes.Models, late: workload.Workload) -> None:
    reference = peers.RunWithHooks(models)
    expected, clean = reference.run(late, 0), reference.clean(late)
    assert measure.difference(clean.expand_as(expected), expected, clean) == pytest.approx(1)
    assert (expected - clean).abs().max() > 1e-3


class OffByOne(peers.RunWithHooks):
    """Patches the position before the one that it should."""

    name: ClassVar[str] = "off_by_one"
    calls: ClassVar[int] = 0

    def run(self, work: workload.Workload, rows: int) -> torch.Tensor:
        type(self).calls += 1
        cells = tuple((layer, max(0, position - 1)) for layer, position in work.cells)
        return super().run(workload.Workload(work.clean, work.corrupt, cells, work.readouts, work.target), rows)


def run_with(names: list[str], models: shapes.Models, out: Path) -> record.Record:
    todo = cases.make_cases(cases.Plan(patches=(32,), length=16), "tiny", models.sizes, 64)
    return run.run_benchmark(models, todo, names, FAST, out, settings={}, screen=console())


@pytest.mark.slow
def test_an_unequal_peer_is_refused_before_it_is_timed(
    models: shapes.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(measure.PEERS, "off_by_one", f"{__name__}:OffByOne")
    monkeypatch.setattr(OffByOne, "calls", 0)
    done = run_with(["off_by_one", "sinklens"], models, tmp_path)
    assert OffByOne.calls == 1  # to compare, and never again
    assert set(done.table.peer) == {"sinklens"}
    assert "differ" in done.left_out["off_by_one"]
    assert "off_by_one is left out" in capsys.readouterr().out


class SlightlyOff(peers.RunWithHooks):
    """Wrong by less than bfloat16 rounds."""

    name: ClassVar[str] = "slightly_off"

    def run(self, work: workload.Workload, rows: int) -> torch.Tensor:
        right, clean = super().run(work, rows), self.clean(work)
        return clean + 1.1 * (right - clean)


@pytest.mark.slow
def test_in_bfloat16_code_is_held_to_float32_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.PEERS, "slightly_off", f"{__name__}:SlightlyOff")
    coarse = shapes.load_models("tiny", CPU, torch.bfloat16)
    done = run_with(["run_with_hooks", "slightly_off", "sinklens"], coarse, tmp_path)
    assert set(done.table.peer) == {"run_with_hooks", "sinklens"}
    assert "by 0.1 of" in done.left_out["slightly_off"]


@pytest.mark.slow
def test_wrong_numbers_of_sinklens_stop_everything(
    models: shapes.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peers.Sinklens.run
    monkeypatch.setattr(peers.Sinklens, "run", lambda *given: right(*given) + 0.1)
    with pytest.raises(EngineError, match="must not be timed"):
        run_with(["run_with_hooks", "sinklens"], models, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_sentence(models: shapes.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnsight", None)
    found, left_out = measure.make_peers(["nnsight", "sinklens"], models)
    assert [peer.name for peer in found] == ["sinklens"]
    assert left_out == {"nnsight": "nnsight is not installed: pip install nnsight"}


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_flops_against_pytorchs_counter(layer: int, models: shapes.Models) -> None:
    """At the first position everything is computed, and PyTorch's counter counts without the causal mask."""
    length, readout, inner = 24, 4, hf_peers.own_modules(models.hf.model)
    inner.set_attn_implementation("eager")  # not every kernel of the others is known to the counter
    x = torch.randn(1, length, models.sizes.d_model)
    with FlopCounterMode(display=False) as rotations:  # a matrix product in some versions, and not what is counted
        angles = inner.rotary_emb(x, position_ids=torch.arange(length)[None])
    with FlopCounterMode(display=False) as counter:
        for block in range(layer, readout):
            x = inner.layers[block](x, attention_mask=None, position_embeddings=angles)
        hf_peers.pattern(inner, readout, x)
    expected = flops.patch_flops(models.sizes, length, (layer, 0), readout, causal=False)
    assert counter.get_total_flops() - rotations.get_total_flops() == expected


def test_flops_of_later_positions_by_hand() -> None:
    sizes = flops.Sizes(n_layers=3, d_model=2, n_heads=2, n_kv_heads=1, d_head=3, d_mlp=5, d_vocab=7)
    # Position 2 of 4: two positions, with 3 and 4 keys. One whole block, then the readout's queries, keys and scores.
    block = 2 * (2 * 2 * (6 + 3 + 3 + 6)) + 2 * 2 * 6 * 7 + 2 * 3 * (2 * 2 * 5)
    readout = 2 * (2 * 2 * (6 + 3)) + 2 * 6 * 7
    assert flops.patch_flops(sizes, 4, (1, 2), 2) == block + readout
    assert flops.patch_flops(sizes, 4, (2, 2), 2) == readout
    assert flops.patch_flops(sizes, 4, (2, 2), 1) == 0
    work = workload.make_workload(2, ((1, 2), (2, 2)), 4, (2,), 7)
    assert flops.needed_flops(sizes, work) == block / 2 + readout


def test_the_ceiling_is_a_speed() -> None:
    assert 1e8 < flops.matmul_ceiling(CPU, torch.float32, size=256, repeats=3) < 1e14


def command(*arguments: str, out: Path) -> int:
    """The exit code of ``python -m tests.benchmark``, run here."""
    with pytest.raises(SystemExit) as stopped:
        benchmark([*arguments, "--out", str(out)])
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


@pytest.mark.slow
def test_the_command_leaves_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command(
        *("--model", "tiny", "--device", "cpu", "--length", "16", "--patches", "8,32", "--lengths", "16,32"),
        *("--blocks", "2", "--chain", "--count", "16", "--repeats", "2", "--seconds", "0.01"),
        *("--peers", "transformer_lens,run_with_hooks,sinklens"),
        out=tmp_path,
    )
    assert code == 0
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert tuple(table.columns) == record.COLUMNS
    assert table.groupby(["axis", "value"]).peer.agg(list).map(len).eq(3).all()
    assert set(zip(table.axis, table.value, strict=True)) == {
        ("patches", 8),
        ("patches", 32),
        ("length", 16),
        ("length", 32),
        ("blocks", 2),
        ("chain", 32),
    }
    assert (table.ms_min <= table.ms_median).all() and (table.ms_median <= table.ms_max).all()
    assert (table.difference < 1e-3).all() and (table.gflop_needed > 0).all() and table.peak_bytes.isna().all()
    ratio = table[table.peer == "transformer_lens"].set_index(["axis", "value"]).ms_median
    ours = table[table.peer == "sinklens"].set_index(["axis", "value"])
    assert (ratio / ours.ms_median).to_dict() == pytest.approx(ours.speedup.to_dict())
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["weights"] == "random"
    assert found["peers"]["transformer_lens"]["version"] and len(found["cases"]) == len(table)
    assert "plotly" in (tmp_path / "figure.html").read_text() and "run_with_hooks" in capsys.readouterr().out
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_figure_has_a_line_for_each_peer_on_logarithmic_axes(models: shapes.Models, tmp_path: Path) -> None:
    done = run_with(["transformer_lens", "sinklens"], models, tmp_path)
    table = done.table
    figure = record.draw(table, "title")
    lines: Any = figure.data
    assert [line.name for line in lines[:-1]] == ["transformer_lens", "sinklens"]
    assert list(lines[-1].y) == pytest.approx([table.gflop_needed[0] / (done.ceiling / 1e12)])
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    for line in lines[:-1]:
        mine = table[table.peer == line.name]
        assert list(line.x) == mine.value.tolist() and list(line.y) == mine.ms_median.tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "gpt9"), "not known"),
        (("--model", "tiny", "--peers", "sinklens,nonsense"), "nonsense"),
        (("--model", "tiny", "--peers", "sinklens,sinklens"), "twice"),
        (("--model", "tiny", "--length", "4096"), "4096 tokens"),
        (("--model", "tiny", "--length", "16", "--blocks", "9"), "--blocks 9"),
        (("--model", "tiny", "--length", "16", "--readout", "6"), "--readout 6"),
        (("--model", "tiny", "--length", "16", "--patches", "many"), "--patches"),
        (("--model", "tiny", "--length", "16", "--patches", "0"), "at least 1 patch"),
        (("--model", "tiny", "--length", "16", "--chain", "--formation", "5"), "--formation 5"),
        (("--model", "tiny", "--length", "16", "--device", "abacus"), "abacus"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments, out=tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sinklens: ") and says in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_peer_without_a_name_is_refused() -> None:
    with pytest.raises(InputError):
        measure.peer_names("sinklens,,nnsight")


# --- Whole calls -----------------------------------------------------------------------------------------------------


def test_phases_inside_one_another_are_counted_once() -> None:
    synchronized: list[int] = []
    clock = Clock(lambda: synchronized.append(1))
    with clock.whole() as times:
        with clock.phase("outer"):
            time.sleep(0.02)
            with clock.phase("inner"):
                time.sleep(0.03)
        with pytest.raises(ValueError, match="inside"), clock.phase("outer"):
            raise ValueError("inside")
    assert set(times) == {TOTAL, REST, "outer", "inner"} and synchronized
    assert times["outer"] >= 0.02 and times["inner"] >= 0.03
    assert times[TOTAL] == pytest.approx(times["outer"] + times["inner"] + times[REST])
    with clock.whole() as again:
        pass
    assert set(again) == {TOTAL, REST}, "each time is of what is done within"


@pytest.mark.slow
def test_calls_and_commands_are_timed_in_processes_of_their_own(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.benchmark.calls", "--model", "tiny", "--what", "calls", "--n", "2"]
    words += ["--length", "16", "--repeats", "1", "--out", str(tmp_path / "times.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "times.json").read_text())["medians"].values()
    assert list(found) == ["load_model", "run_chain", "sl.sweep", "run_chain, again", "sl.sweep, again"]
    for call, times in found.items():
        assert times[TOTAL] == pytest.approx(sum(times.values()) - times[TOTAL]), call
    assert found["load_model"]["load"] > 0.5 * found["load_model"][TOTAL]
    assert min(found["run_chain"][phase] for phase in ("capture", "patches", "statistics")) > 0
    assert "| run_chain, again | transformer-lens" in done.stdout
