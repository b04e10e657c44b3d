"""Several targets, and several disjoint sets of prompts, on the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sinklens import stages
from sinklens.analysis import suite
from sinklens.analysis.base import Analysis, AnalysisResult, Findings, verdict
from sinklens.chain import run as chain_run
from sinklens.chain.result import ChainResult
from sinklens.cli.command import spelt_out
from sinklens.cli.inputs import Inputs
from sinklens.cli.of_analysis import run_command
from sinklens.prompts import from_tokens
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.command_line import QUICK, invoke, refused
from tests.helpers.planted import MINUS, PLUS, planted_model, prompts

pytest.importorskip("transformer_lens.HookedTransformer")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Commands get the planted model and six prompts, and score one stage; gives the sizes of the batches scored."""
    monkeypatch.chdir(tmp_path)
    model = planted_model()
    tokens = prompts(16).repeat(3, 1)
    tokens[:, -1] = torch.tensor([MINUS, MINUS, PLUS, PLUS, MINUS, PLUS])  # no two sets are the same
    batch = from_tokens(model, tokens)
    monkeypatch.setattr(Inputs, "load", lambda *_, **__: (model, batch))
    monkeypatch.setattr("sinklens.cli.pages.write_report", lambda _: None)
    sizes, run = [], partial(chain_run.run_chain, stages=(stages.SUPER_NEURONS,))

    def counted(model: Any, batch: Any, **options: Any) -> ChainResult:
        sizes.append(batch.n)
        return run(model, batch, **options)

    monkeypatch.setattr("sinklens.chain.run.run_chain", counted)
    monkeypatch.setattr("sinklens.cli.of_chain.run_chain", counted)
    monkeypatch.setattr("sinklens.chain.agree.run_chain", counted)
    return sizes


def chain(*arguments: str) -> Any:
    return invoke("chain", "--length", "16", *arguments)


# -- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--bos", "--bos always"),
        ("--no-bos", "--bos never"),
        ("--bos --n 3", "--bos always --n 3"),
        ("--bos auto", "--bos auto"),
        ("--bos never --n 3", "--bos never --n 3"),
        ("--bos maybe", "--bos maybe"),
        ("--n 3", "--n 3"),
        ("", ""),
    ],
)
def test_a_bos_may_be_asked_for_as_before(written: str, read: str) -> None:
    assert spelt_out(written.split()) == read.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ((), "no BOS, as the model's tokenizer does"),
        (("--bos",), "a BOS in front, as asked for"),
        (("--no-bos",), "no BOS, as asked for"),
    ],
)
def test_what_was_done_is_said(sweep: Any, tiny_folder: Path, written: tuple[str, ...], said: str) -> None:
    assert f"2 prompts of 16 tokens: file:texts.txt; {said}\n" in sweep("--stages", "z", *written).out
    found = invoke("find", "--model", str(tiny_folder), *QUICK, *written)
    assert f"; {said}\n" in found.out
    told = json.loads(invoke("find", "--model", str(tiny_folder), *QUICK, *written, "--json").out)
    assert told["has_bos"] == ("a BOS" in said)


def test_a_word_for_the_bos_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(invoke("find", "--bos", "maybe"), "--bos", "'maybe' is not one of 'auto', 'always', 'never'")


# -- Several targets --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_targets_have_a_folder_each_and_a_line(planted: list[int]) -> None:
    done = chain("--target", "5,7", "--out", "run")
    assert done.code == 0, done.err
    assert {path.name for path in Path("run").iterdir()} == {
        "target-5", "target-7", "run.json", "agreement.json", "agreement.parquet"
    }  # fmt: skip
    assert [ChainResult.load(Path("run") / f"target-{t}").config["target"] for t in (5, 7)] == [5, 7]
    assert planted == [6, 6]
    assert done.out.index("Target 5") < done.out.index("Target 7") < done.out.index("verdicts are the same for targets")
    table = pd.read_parquet("run/agreement.parquet")
    assert set(table.n_runs) == {2} and {"verdict: 5", "value: 7"} <= set(table)


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_one_target_is_a_run_as_ever() -> None:
    told = json.loads(chain("--target", "5", "--out", "run", "--json").out)
    assert told["config"]["target"] == 5 and Path("run/chain.json").is_file()
    assert (told["config"]["bos"], told["config"]["has_bos"]) == ("given", False)
    assert "loss_change" not in told["scores"][0]


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_the_loss_is_read_where_it_is_asked_for() -> None:
    done = chain("--target", "5", "--loss", "--out", "run")
    assert done.code == 0, done.err
    assert "loss, nats" in done.out and "Ablating the super neurons in the run with the sink costs" in done.out
    scores = ChainResult.load(Path("run")).scores
    assert scores.loss_change.notna().all() and (scores.loss_change_low <= scores.loss_change_high).all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--target", "5,5"], ["target 5 is named twice"]),
        (["--target", "5,99"], ["target 99 must be in 1..14"]),
        (["--target", "5,"], ["target '' must be a position"]),
        (["--target", "5,7", "--event", "all"], ["one of the three"]),
        (["--target", "5,7", "--replicate", "2"], ["one of the three"]),
        (["--replicate", "1"], ["--replicate"]),
    ],
)
@pytest.mark.usefixtures("planted")
def test_what_cannot_be_asked(arguments: list[str], parts: list[str]) -> None:
    refused(chain(*arguments, "--out", "run"), *parts)
    assert not Path("run").exists()


# -- Several sets of prompts ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sets_of_prompts_are_disjoint_and_taken_up_again(planted: list[int]) -> None:
    ask = ("--target", "5", "--n", "2", "--replicate", "3", "--out", "run")
    done = chain(*ask)
    assert done.code == 0, done.err
    assert planted == [2, 2, 2]
    digests = {ChainResult.load(Path("run") / f"set-{i}").provenance["prompts_digest"] for i in (1, 2, 3)}
    assert len(digests) == 3
    assert "verdicts are the same for 3 disjoint sets of 2 prompts" in done.out
    assert set(pd.read_parquet("run/agreement.parquet").n_runs) == {3}
    Path("run/set-2/chain.json").write_text("{")
    assert chain(*ask).code == 0 and planted == [2] * 4  # the one that is damaged
    assert chain(*ask).code == 0 and planted == [2] * 4
    assert chain(*ask, "--min-gap", "0.02").code == 0 and planted == [2] * 7
    assert chain(*ask, "--min-gap", "0.02", "--force").code == 0 and planted == [2] * 10


@pytest.mark.usefixtures("planted")
def test_too_few_prompts_for_so_many_sets() -> None:
    ask = ("--target", "5", "--n", "4", "--replicate", "2", "--out", "run")
    refused(chain(*ask), "2 disjoint sets of 4 prompts need 8")
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_a_folder_of_something_else_is_left_alone() -> None:
    assert chain("--target", "5", "--out", "run").code == 0
    refused(chain("--target", "5", "--n", "2", "--replicate", "2", "--out", "run"), "choose another --out")


def _analysis(name: str = "length") -> Analysis:
    def run(study: Study) -> Findings:
        total = float(study.batch.tokens.double().mean())
        said = verdict("So.", "mean", Estimate(total), "none", None, "above 1", holds=total > 1)
        return Findings(said, pd.DataFrame({"total": [total]}))

    return Analysis(name, name, "So.", run, lambda _: pytest.importorskip("plotly.graph_objects").Figure())


@pytest.mark.usefixtures("planted")
def test_an_analysis_on_several_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(_analysis(), ["--n", "3", "--replicate", "2", "--length", "16", "--out", "run"])
    assert ended.value.code == 0
    results = [AnalysisResult.load(Path("run") / f"set-{i}") for i in (1, 2)]
    assert [result.config["n_prompts"] for result in results] == [3, 3]
    assert "for 2 disjoint sets of 3 prompts" in capsys.readouterr().out
    (row,) = pd.read_parquet("run/agreement.parquet").to_dict("records")
    assert (row["part"], row["what"], row["n_runs"]) == ("length", "verdict", 2)
    values = [result.findings.table.total[0] for result in results]
    assert row["spread"] == pytest.approx(max(values) - min(values))


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_everything_on_several_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "list_analyses", lambda: {"length": ""})
    monkeypatch.setattr(suite, "load_analysis", _analysis)
    ask = ("all", "--length", "16", "--n", "3", "--replicate", "2", "--only", "length", "--out", "run")
    done = invoke(*ask)
    assert done.code == 0, done.err
    assert "set-2 [1/1] length: done" in done.err and "Do the runs agree?" in done.out
    assert set(pd.read_parquet("run/agreement.parquet").part) == {"length"}
    assert "unchanged, kept" in invoke(*ask).err
    assert len(json.loads(invoke(*ask, "--json").out)) == 2
    refused(invoke("all", "--length", "16", "--out", "run"), "not the folder of an earlier run")
