"""The command line: one sentence and exit code 2 for every bad input, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer.main
from safetensors.torch import load_file, save_file

import sinklens
from sinklens import cli
from sinklens.cli import choices
from sinklens.cli.display import progress
from sinklens.errors import EngineError, InputError, WriteError
from sinklens.models import smollm2 as _smollm2
from sinklens.models.families import N_CTX
from sinklens.models.load import Backend
from sinklens.pairs.choice import InducedKind
from sinklens.readouts.named import READOUTS
from tests.helpers.command_line import LINE, NOTE, Run, environment, invoke, process, refused, snapshot
from tests.helpers.folders import earlier_run
from tests.helpers.synthetic import synthetic_result

# -- Bad input, said before the model is loaded -----------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--target", "16"], ["target 16 must be in 1..14", "16 tokens"]),
        (["--target", "15"], ["target 15 must be in 1..14", "later tokens"]),  # nobody comes after the last
        (["--target", "-1"], ["target -1 must be in 1..14"]),
        (["--target", "0"], ["target 0 has no earlier tokens", "choose a later position"]),
        (["--target", "first"], ["target 'first' must be a position such as 10, or natural"]),
        (["--target", "1.5"], ["target '1.5' must be a position"]),
        (["--target", "1", "--length", "2"], ["prompts of 2 tokens must be at least 3 long"]),
        (["--n", "1"], ["needs at least 2", "--n is 1"]),
        (["--n", "1", "--pair", "amplify_variance"], ["variances over prompts", "--n is 1"]),
        (["--prompts", "missing.txt"], ["--prompts 'missing.txt' is neither", "check the path"]),
        (["--prompts", "x" * 300], ["is neither passages nor random nor a file"]),
        (["--memory-budget", "0"], ["--memory-budget 0.0 must be"]),
        (["--memory-budget", "nan"], ["--memory-budget nan must be"]),
        (["--memory-budget", "inf"], ["--memory-budget inf must be"]),
        (["--min-gap", "nan"], ["--min-gap nan must be a finite number"]),
        (["--min-gap", "-1"], ["--min-gap -1.0 must be", "0.0 or more"]),
        (["--pair-layers", "all"], ["--pair-layers 'all' must be whole numbers such as 0-2"]),
        (["--pair-layers", "2-1"], ["--pair-layers '2-1' must be"]),
        (["--strength", "inf"], ["--strength inf must be a finite number"]),
        # What the command-line parser itself finds is told in the same way.
        (["--length", "long"], ["--length", "valid integer", "chain --help"]),
        (["--dtype", "int8"], ["--dtype", "'float32', 'bfloat16', 'float16'"]),
        (["--pair", "magic"], ["--pair", "'block_aggregation', 'amplify_variance'"]),
        (["--readout-blocks", "0"], ["--readout-blocks", "1"]),
        (["--control-draws", "0"], ["--control-draws", "1"]),
        (["--colour"], ["--colour", "--help"]),
        (["--target"], ["--target", "requires an argument"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
def test_bad_arguments(chain: Run, arguments: list[str], parts: list[str]) -> None:
    refused(chain(*arguments), *parts)


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_output_that_cannot_be_used(chain: Run, here: Path) -> None:
    earlier_run(here / "run")
    (here / "notes").mkdir()
    (here / "notes" / "thesis.txt").write_text("years of work")
    refused(chain("--out", "run"), "run exists already", "--force")
    refused(chain("--out", "notes"), "notes exists already")
    refused(chain("--out", "notes", "--force"), "not the folder of an earlier run")
    refused(chain("--out", "texts.txt"), "texts.txt is a file: give a folder")
    refused(chain("--out", "texts.txt", "--force"), "texts.txt is a file: give a folder")
    refused(chain("--out", "texts.txt/run"), "cannot be written (Not a directory)", "choose another --out")
    refused(chain("--out", "x" * 300), "cannot be written (File name too long)")


def test_a_mistyped_command(here: Path) -> None:
    refused(invoke("chian"), "chian", "--help")
    refused(invoke("--colour"), "--colour", "--help")
    refused(invoke("models", "surplus"), "surplus", "--help")
    assert snapshot(here).keys() == {"texts.txt"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "line, parts",
    [
        ("chain --seed -1", ["--seed", "0"]),
        ("find --seed 9223372036854775808", ["--seed"]),
        ("chain --control-draws 9223372036854775807", ["--control-draws", "1000"]),
        ("chain --memory-budget 1e300", ["--memory-budget 1e+300", "at most 1,048,576"]),
        ("chain --pair-layers 0-999999999999", ["--pair-layers '0-999999999999' must be whole numbers"]),
        ("find --super-neurons 1-99999999999999", ["--super-neurons", "must be whole numbers"]),
        ("all --only ,", ["--only is empty: name at least one"]),
        ("all --seed -1", ["--seed", "0"]),
        ("analyse settle_it --rotations -1", ["--rotations", "1"]),
        ("analyse super_neurons --draws 9223372036854775807", ["--draws"]),
        ("analyse down_projection --draws 0", ["--draws"]),
        ("analyse output_gate --scale nan", ["--scale nan must be a finite number"]),
        ("sweep --shard ²/³", ["--shard '²/³' must be I/N"]),
        ("sweep --seed -1", ["--seed", "0"]),
        ("sweep --min-gap nan", ["--min-gap nan must be a finite number, 0 or more"]),
        ("sweep --positions 0-999999999999", ["positions '0-999999999999' goes beyond 9999999"]),
        (f"chain --n {'9' * 5000}", ["--n"]),
        (f"analyse {'x' * 300}", ["there is no analysis"]),
        (f"analyse {'x' * 300}.py", ["there is no file"]),
        (f"report {'x' * 300}", ["cannot be read (File name too long)"]),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_numbers_and_names_beyond_all_measure(here: Path, line: str, parts: list[str]) -> None:
    before = snapshot(here)
    outcome = invoke(*line.split())
    refused(outcome, *parts)
    assert len(outcome.err) < 600 and snapshot(here) == before


def test_a_line_end_in_a_name(here: Path) -> None:
    refused(invoke("report", "a\nb"), "there is no folder a b: give")
    refused(invoke("gather", "a\r\nb", "--out", "rows"), "a b holds no sweep.json")
    assert snapshot(here).keys() == {"texts.txt"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_load")
def test_everything_refuses_a_block_as_the_chain_does(here: Path, tiny_folder: Path) -> None:
    before = snapshot(here)
    options = ["--model", str(tiny_folder), "--prompts", "texts.txt", "--length", "16", "--n", "2", "--device", "cpu"]
    for command in ("chain", "all", "find"):
        refused(invoke(command, *options, "--block", "99"), "block [99] is not in 0..3")
    assert snapshot(here) == before


def test_a_file_that_is_no_analysis(here: Path) -> None:
    for text, part in (
        ("1 +", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such", ""),
    ):
        (here / "mine.py").write_text(text)
        refused(invoke("analyse", "mine.py"), "mine.py cannot be run", part)


def test_the_version() -> None:
    outcome = invoke("--version")
    assert (outcome.code, outcome.err) == (0, "")
    told = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert told["sinklens"] == sinklens.__version__ and told["torch"] == torch.__version__
    assert told["transformer-lens"][0].isdecimal()


def test_the_package_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sinklens", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("sinklens", run_name="__main__")
    assert not stopped.value.code and capsys.readouterr().out.startswith(f"sinklens {sinklens.__version__}")


def test_the_choices_are_the_librarys() -> None:
    assert {*choices.Pair} == {*get_args(InducedKind)}
    assert {*choices.Backend} == {*get_args(Backend)}


def test_the_metrics_that_are_offered_are_those_that_a_chain_takes() -> None:
    commands: Any = typer.main.get_command(cli.app)
    (metric,) = (option for option in commands.commands["chain"].params if option.name == "metric")
    offered = re.findall(r"\w+", metric.help.partition(":")[2].partition(";")[0].replace(" or ", " "))
    assert offered == [name for name, readout in READOUTS.items() if not readout.needs_answers]


# -- Bad input that the model or the files show -----------------------------------------------------------------------


def test_a_model_without_a_sink(chain: Run) -> None:
    # With all that was measured: how much attention, in which block, against what, and the norm.
    outcome = chain("--prompts", "random", "--length", "32", "--out", "new/folder/run")
    refused(outcome, "no attention sink in this model on these prompts", "no head exceeds 0.3")
    assert outcome.err.count("\n") == 1
    numbers = r"receives at most 0\.\d+ \(block \d; others 0\.\d+\), and its norm is at most \d+\.\d+ times"
    assert re.search(numbers, outcome.sentence)
    refused(chain("--prompts", "random", "--length", "32", "--target", "natural"), "no attention sink")


def test_an_unknown_model(chain: Run) -> None:
    refused(chain("--model", "no-such-model"), "cannot load the model 'no-such-model'", "smollm2", "a local folder")
    refused(chain("--model", "./missing"), "missing", "is not a folder")


def test_a_folder_without_a_model(chain: Run, here: Path) -> None:
    (here / "empty").mkdir()
    refused(chain("--model", "./empty"), "no config.json")


def test_a_damaged_model_folder(chain: Run, here: Path, tiny_folder: Path) -> None:
    (here / "cut").mkdir()
    for path in tiny_folder.iterdir():
        content = path.read_bytes()
        (here / "cut" / path.name).write_bytes(
            content[: len(content) // 2] if path.suffix == ".safetensors" else content
        )
    refused(chain("--model", "./cut"), "cut")


def test_a_corrupted_download(chain: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF" + bytes(5000))
    monkeypatch.setenv("SINKLENS_CACHE", str(here / "cache"))
    monkeypatch.setattr(_smollm2, "_PACKAGE", "no_such_package_for_sinklens")
    refused(chain("--model", "smollm2"), str(file), "is corrupted (SHA-256", "delete it")


def spoil(model: Path, folder: Path, value: float) -> None:
    """A copy of the model with one row of one weight overwritten."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("command", ["chain", "find"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(here: Path, tiny_folder: Path, command: str, value: float) -> None:
    spoil(tiny_folder, here / "bad", value)
    before = snapshot(here)
    outcome = invoke(command, "--model", "./bad", "--prompts", "texts.txt", "--length", "16", "--device", "cpu")
    refused(outcome, "weight", "blocks.2.mlp.W_out", "NaN or infinite", "get the model again")
    assert snapshot(here) == before


def test_activations_that_are_not_finite(chain: Run, here: Path, tiny_folder: Path) -> None:
    spoil(tiny_folder, here / "bad", 3e38)  # finite itself, and beyond float32 once it is multiplied
    refused(chain("--model", "./bad"), "activations are not finite", "check the weights")


def test_a_device_that_is_not_there(chain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(chain("--device", "cuda"), "device 'cuda' is not there (0 CUDA devices found)", "use cpu or auto")
    refused(chain("--device", "cuda:7"), "'cuda:7' is not there")
    refused(chain("--device", "mps"), "mps is refused", "use cpu")
    refused(chain("--device", "abacus"), "unknown device 'abacus'", "choose")


def test_a_length_over_the_context(chain: Run) -> None:
    refused(chain("--length", str(N_CTX + 1)), f"at most {N_CTX} tokens", f"not {N_CTX + 1}")
    refused(chain("--length", str(N_CTX + 1), "--prompts", "random"), f"at most {N_CTX} tokens")


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["is empty; write one prompt on each line"]),
        (b"\n \n\t\n", ["is empty"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ["is not a UTF-8 text file"]),
        ("w4 caf\u00e9 w5".encode("latin-1"), ["is not a UTF-8 text file; save it as plain text in UTF-8"]),
        (LINE.encode("utf-16-le"), ["line 1 has a NUL character", "in UTF-8"]),  # with a mark it could be read
        (b"w4 w5 w6\nw4\n", ["has 16 tokens: the longest has 3", "use a length of 3 or less"]),  # none is left
    ],
    ids=["empty", "blank", "binary", "latin-1", "utf-16", "short"],
)
def test_a_prompt_file_that_cannot_be_used(chain: Run, here: Path, content: bytes, parts: list[str]) -> None:
    (here / "bad.txt").write_bytes(content)
    outcome = chain("--prompts", "bad.txt")
    refused(outcome, "bad.txt", *parts)
    assert outcome.err.count("\n") == 1


def test_a_folder_is_no_prompt_file(chain: Run, here: Path) -> None:
    (here / "folder").mkdir()
    refused(chain("--prompts", "folder"), "folder is a folder; name a text file in it")


def test_a_broken_jsonl_file(chain: Run, here: Path) -> None:
    (here / "bad.jsonl").write_text(json.dumps({"text": LINE}) + "\n{'text': 'w4'}\n")
    refused(chain("--prompts", "bad.jsonl"), "bad.jsonl, line 2 is not JSON")


def test_too_few_prompts_for_a_variance(chain: Run, here: Path) -> None:
    (here / "one.txt").write_text(f"w4 w5\n{LINE}\n")
    for pair in ("block_aggregation", "amplify_variance"):
        outcome = chain("--prompts", "one.txt", "--pair", pair)
        refused(outcome, "needs at least 2", "only 1 in file:one.txt has 16 tokens or more")
        assert f"{NOTE}file:one.txt: 1 of 16 prompts have 16 tokens" in outcome.err


def test_an_engine_that_cannot_be_trusted_is_exit_code_1(chain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("identity check failed: the scores of this run cannot be trusted")

    monkeypatch.setattr("sinklens.cli.of_chain.run_chain", fail)
    outcome = chain("--n", "2")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "sinklens: identity check failed: the scores of this run cannot be trusted\n"


def test_a_disk_that_is_full_at_the_end(
    chain: Run, fake_chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_parquet", full)
    refused(chain("--n", "2", "--out", "new/run"), "run cannot be written (No space left on device)")
    assert fake_chain


@pytest.mark.usefixtures("fake_chain")
def test_no_room_for_the_report_alone(chain: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> Path:
        raise WriteError("run/report.html cannot be written (No space left on device): make room")

    monkeypatch.setattr(sys.modules["sinklens.pages.page"], "report", full)
    outcome = chain("--out", "run", changes=True)
    assert "Per-stage causal effects" in outcome.out, "the result is printed before the page is written"
    refused(
        replace(outcome, out=""), "report.html cannot be written (No space left", "sinklens report run writes the page"
    )
    assert (here / "run" / "chain.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("line", ["models", "--version"])
def test_no_room_for_the_output(line: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sinklens.cli", line]
        options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment()}
        done = subprocess.run(command, stdout=full, check=False, **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sinklens: the output cannot be written (No space left on device)")


# -- What works -------------------------------------------------------------------------------------------------------


def test_a_run_is_printed_and_saved(chain: Run, here: Path, fake_chain: dict[str, Any]) -> None:
    (here / "mixed.txt").write_text(f"{LINE}\nw4 w5\n\n{LINE} w9\n")
    outcome = chain(
        "--prompts",
        "mixed.txt",
        "--target",
        "5",
        "--seed",
        "7",
        "--strength",
        "3",
        "--pair",
        "amplify_variance",
        "--memory-budget",
        "0.5",
        "--out",
        "runs/first",
        changes=True,
    )
    assert outcome.code == 0
    assert outcome.err == f"{NOTE}file:mixed.txt: 2 of 16 prompts have 16 tokens or more.\n"
    for part in ("value_aggregation", "other_neurons", "1.01 [1.00, 1.02] (1)", "runs/first", "runs/first/report.html"):
        assert part in outcome.out
    tensors = {"attention.safetensors", "tokens.safetensors"}
    files = {"chain.json", "scores.parquet", "effects.parquet", "report.html"} | tensors
    assert {path.name for path in (here / "runs" / "first").iterdir()} == files
    assert {path.name for path in (here / "runs").iterdir()} == {"first"}
    wanted = {"target": 5, "seed": 7, "strength": 3.0, "pair": "amplify_variance", "memory_budget": 2**29}
    assert {name: fake_chain[name] for name in wanted} == wanted
    assert fake_chain["batch"].n == 2 and fake_chain["batch"].n_skipped == 1
    assert "command" in json.loads((here / "runs" / "first" / "chain.json").read_text())["config"]


def test_json_is_all_that_stdout_gets(chain: Run, here: Path, fake_chain: dict[str, Any]) -> None:
    outcome = chain("--target", "natural", "--json", "--out", "run", changes=True)
    assert outcome.code == 0
    assert json.loads(outcome.out) == json.loads((here / "run" / "chain.json").read_text())
    assert fake_chain["target"] == "natural"
    assert "passages" not in outcome.err and outcome.err.count("\n") == 1  # the note on the number of prompts


@pytest.mark.usefixtures("fake_chain")
def test_force_replaces_an_earlier_run(chain: Run, here: Path) -> None:
    earlier_run(here / "run")
    assert chain("--out", "run", "--force", changes=True).code == 0
    assert not (here / "run" / "extra.txt").exists()
    assert json.loads((here / "run" / "chain.json").read_text())["config"]["target"] == 10
    assert {path.name for path in here.iterdir()} == {"run", "texts.txt"}


def test_without_the_report_packages_the_numbers_are_saved(
    chain: Run, here: Path, fake_chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Path:
        raise InputError("plotly is not installed: pip install 'sinklens[viz]'")

    monkeypatch.setattr(sys.modules["sinklens.pages.page"], "report", refuse)
    outcome = chain("--out", "run", "--json", changes=True)
    assert outcome.code == 0 and fake_chain
    assert "no report.html: plotly is not installed" in outcome.err
    assert json.loads(outcome.out) == json.loads((here / "run" / "chain.json").read_text())


def test_models_lists_smollm2() -> None:
    outcome = invoke("models")
    assert (outcome.code, outcome.err) == (0, "")
    assert "smollm2" in outcome.out and "Apache-2.0" in outcome.out


def test_models_as_json() -> None:
    outcome = invoke("models", "--json")
    listed = {row["name"]: row for row in json.loads(outcome.out)}
    assert (outcome.code, outcome.err) == (0, "")
    assert set(listed["smollm2"]) == {"name", "description", "source", "licence", "path"}


@pytest.mark.usefixtures("quick_load")
@pytest.mark.parametrize("as_json", [False, True])
def test_find_prints_a_formation(here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    formation = synthetic_result().formation
    monkeypatch.setattr("sinklens.formation.find_formation", lambda *_, **__: formation)
    arguments = ["--model", str(tiny_folder), "--prompts", "random", "--length", "16", "--device", "cpu"]
    before = snapshot(here)
    outcome = invoke("find", *arguments, *(["--json"] if as_json else []))
    assert (outcome.code, outcome.err) == (0, "")
    assert snapshot(here) == before
    if as_json:
        data = json.loads(outcome.out)
        assert data["layer"] == 2 and [n["index"] for n in data["super_neurons"]] == [7, 3]
        assert data["outlier_dims"][0]["z"] is None and len(data["profile"]) == 3
    else:
        assert "Super neurons of block 2" in outcome.out and "300.0" in outcome.out


@pytest.mark.usefixtures("quick_load")
def test_find_says_that_there_is_no_sink(here: Path, tiny_folder: Path) -> None:
    arguments = ["--model", str(tiny_folder), "--prompts", "random", "--length", "32", "--device", "cpu"]
    refused(invoke("find", *arguments), "no attention sink in this model")
    refused(invoke("find", *arguments, "--layer", "99"), "block [99] is not in 0..3")
    assert snapshot(here).keys() == {"texts.txt"}


# -- The progress bar -------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A stderr that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    # Continuous integration often sets this, and it makes rich take a pipe for a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress() as (step, rows):
        step("scoring the chain")
        rows(3, 17)
    assert ("scoring the chain" in screen.getvalue()) is terminal
    assert ("3/17" in screen.getvalue()) is terminal


# -- In a process of its own ------------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from sinklens.cli import app\n"
        "for arguments in ('--help', 'chain --help', 'find --help', 'models --help', 'chain --no'):\n"
        "    print(CliRunner().invoke(app, arguments.split()).exit_code)\n"
        "print({'torch', 'transformers', 'transformer_lens', 'pandas', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.stdout.splitlines() == ["0", "0", "0", "0", "2", "set()"]
    assert done.stderr == ""


def test_help_shows_the_commands(tmp_path: Path) -> None:
    outcome = process("--help", cwd=tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(command in outcome.out for command in ("chain", "find", "models"))
    bare = process(cwd=tmp_path)
    assert bare.code == 2 and "chain" in bare.out + bare.err and "Traceback" not in bare.err


@pytest.mark.slow
def test_a_pipe_sees_one_sentence_and_nothing_else(here: Path, tiny_folder: Path) -> None:
    before = snapshot(here)
    arguments = ["chain", "--model", str(tiny_folder), "--prompts", "random", "--length", "32", "--device", "cpu"]
    outcome = process(*arguments, cwd=here, FORCE_COLOR="1")
    refused(outcome, "no attention sink in this model")
    assert outcome.err.count("\n") == 1 and "\x1b" not in outcome.err
    assert snapshot(here) == before


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_accident(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sinklens.cli", "models"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment())
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""
