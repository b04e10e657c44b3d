"""Formation events on the command line: listed, chosen by number, scored one by one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sinklens import stages
from sinklens.analysis import suite
from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.several import run_all_events
from sinklens.analysis.suite import run_all
from sinklens.chain import run as chain_run
from sinklens.chain.result import ChainResult
from sinklens.cli import of_chain
from sinklens.cli.inputs import Inputs
from sinklens.cli.pages import write_report
from sinklens.errors import InputError, NoSinkError
from sinklens.formation import find_formation
from sinklens.pages.gather import gather
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.command_line import Run, invoke, refused, snapshot
from tests.helpers.planted import planted_twice, prompts

pytest.importorskip("transformer_lens.HookedTransformer")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Commands get the model whose sink is made in blocks 0 and 2, and score one stage of it."""
    monkeypatch.chdir(tmp_path)
    model = planted_twice()
    batch = from_tokens(model, prompts(16)[1:].repeat(3, 1))
    monkeypatch.setattr(Inputs, "load", lambda *_, **__: (model, batch))
    fast = partial(chain_run.run_chain, stages=(stages.SUPER_NEURONS,))
    monkeypatch.setattr("sinklens.chain.run.run_chain", fast)
    monkeypatch.setattr("sinklens.cli.of_chain.run_chain", fast)
    monkeypatch.setattr("sinklens.cli.pages.write_report", lambda _: None)
    return model, batch


def chain(*arguments: str) -> Any:
    return invoke("chain", "--target", "5", "--length", "16", *arguments)


@pytest.mark.usefixtures("planted")
def test_find_lists_events_and_marks_the_one_that_is_explained() -> None:
    for arguments, marked in (([], "2 (explained)"), (["--event", "1"], "0 (explained)")):
        rows = [line.split("│") for line in invoke("find", *arguments).out.splitlines() if line.startswith("│")]
        events = [[cell.strip() for cell in row[1:3]] for row in rows[:2]]
        assert [row[0] for row in events] == ["1", "2"]
        assert marked in [row[1] for row in events]
    told = json.loads(invoke("find", "--event", "1", "--json").out)
    assert told["event"] == 1 and told["layer"] == 0
    assert told["steps"] == [{"number": 1, "blocks": [0], "layer": 0}, {"number": 2, "blocks": [2], "layer": 2}]


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_one_event_is_a_run_as_ever() -> None:
    told = json.loads(chain("--event", "1", "--out", "run", "--json").out)
    assert told["formation"]["event"] == 1 and told["config"]["readout_layers"] == [1]
    assert ChainResult.load("run").formation.layer == 0


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_all_events_have_a_folder_each() -> None:
    outcome = chain("--event", "all", "--out", "run")
    assert outcome.code == 0
    assert "Event 1 (block 0), explained by block 0" in outcome.out and "Results: run/event-2" in outcome.out
    layers = [ChainResult.load(f"run/event-{event}").config["readout_layers"] for event in (1, 2)]
    assert layers == [[1], [3]]
    record = json.loads(Path("run/run.json").read_text())
    assert {name: part["status"] for name, part in record["parts"].items()} == {"event-1": "done", "event-2": "done"}
    refused(chain("--event", "all", "--out", "run"), "run exists already", "--force")
    told = json.loads(chain("--event", "all", "--out", "run", "--force", "--json").out)
    assert [item["formation"]["event"] for item in told] == [1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_an_event_that_cannot_be_scored_is_named_and_the_others_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    real = of_chain.explained
    refusal: list[int] = [0]

    def explained(model: Any, batch: Any, found: Any, layer: int, **options: Any) -> Any:
        if layer in refusal and options.get("super_neurons") is None:
            raise NoSinkError(f"no super neuron in block {layer}")
        return real(model, batch, found, layer, **options)

    monkeypatch.setattr(of_chain, "explained", explained)
    outcome = chain("--event", "all", "--out", "run")
    assert outcome.code == 0
    assert "note: event 1 (block 0) is left out: no super neuron in block 0" in outcome.err
    assert sorted(path.name for path in Path("run").iterdir()) == ["event-2", "run.json"]
    part = json.loads(Path("run/run.json").read_text())["parts"]["event-1"]
    assert (part["status"], part["reason"]) == ("not measurable", "no super neuron in block 0")
    refusal.append(2)
    before = snapshot(Path())
    outcome = chain("--event", "all", "--out", "none")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == "sinklens: no super neuron in block 0"
    assert snapshot(Path()) == before


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_an_option_that_fits_one_event_alone() -> None:
    """The pair's blocks end at the formation block: 0 to 2 will do for the second event, and not for the first."""
    outcome = chain("--event", "all", "--pair-layers", "0-2", "--out", "run")
    assert outcome.code == 0
    assert "event 1 (block 0) is left out: the pair's blocks" in outcome.err
    assert json.loads(Path("run/run.json").read_text())["parts"]["event-1"]["status"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_an_analysis_of_an_event() -> None:
    assert invoke("analyse", "onset", "--event", "1", "--out", "run").code == 0
    found = AnalysisResult.load("run")
    assert found.config["given"] == {"event": 1} and found.provenance["formation"]["layer"] == 0


@pytest.mark.slow
def test_everything_of_an_event(planted: Any, tmp_path: Path) -> None:
    study = Study(*planted, given={"event": 1})
    result = run_all(study, tmp_path / "run", target=5, only=("formation", "onset"))
    assert {part.status for part in result.parts.values()} == {"done"}
    assert json.loads((tmp_path / "run" / "formation.json").read_text())["event"] == 1
    with pytest.raises(InputError, match="there is no event 3"):
        run_all(Study(*planted, given={"event": 3}), tmp_path / "other", target=5)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_everything_of_every_event_has_a_folder_each_and_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    ask = ("all", "--event", "all", "--target", "5", "--length", "16", "--only", "formation,onset", "--out", "run")
    real = suite.run_analysis

    def interrupted(analysis: Any, study: Study, **options: Any) -> Any:
        if study.given == {"event": 2}:
            raise KeyboardInterrupt
        return real(analysis, study, **options)

    monkeypatch.setattr("sinklens.cli.pages.write_report", write_report)  # which other tests do without
    # Else what is put in the place of the package's own counts as other code.
    monkeypatch.setattr("sinklens.analysis.run.code_digest", lambda *_: "the same")
    monkeypatch.setattr(suite, "run_analysis", interrupted)
    assert invoke(*ask).code == 130
    monkeypatch.setattr(suite, "run_analysis", real)
    done = invoke(*ask)
    assert done.code == 0, done.err
    assert "event-1 [2/2] onset: unchanged, kept" in done.err and "event-2 [2/2] onset: done" in done.err
    assert "Event 1 (block 0), explained by block 0" in done.out and "for events 1 and 2" in done.out
    layers = [json.loads(Path(f"run/event-{event}/formation.json").read_text())["layer"] for event in (1, 2)]
    assert layers == [0, 2]
    assert AnalysisResult.load("run/event-1/onset").provenance["formation"]["layer"] == 0
    assert Path("run/report.html").is_file(), done.err
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert 'href="event-1/report.html"' in page and "Event 2 (block 2), explained by block 2" in page
    assert "verdicts are the same for events 1 and 2" in page and Path("run/event-2/report.html").is_file()
    assert [item["parts"]["onset"]["key"]["given"] for item in json.loads(invoke(*ask, "--json").out)] == [
        {"event": 1},
        {"event": 2},
    ]
    refused(invoke("all", "--length", "16", "--out", "run"), "not the folder of an earlier run")
    refused(invoke(*ask[:-1], "run/event-1"), "not the folder of an earlier run of every event")


@pytest.mark.slow
def test_every_event_is_one_event_with_its_number(planted: Any, tmp_path: Path) -> None:
    """What is found for all events is what is found for each: the same part, kept and not made again."""
    names = ("formation", "onset")
    results = run_all_events(Study(*planted), tmp_path / "run", target=5, only=names)
    for event in (1, 2):
        one = Study(*planted, given={"event": event})
        assert results[f"event-{event}"].folder == tmp_path / "run" / f"event-{event}"
        again = run_all(one, tmp_path / "run" / f"event-{event}", target=5, only=names)
        assert all(part.reused for part in again.parts.values())
        found = find_formation(*planted, event=event)
        assert (one.formation.layer, one.formation.neurons) == (found.layer, found.neurons)
    with pytest.raises(InputError, match="explained by its own super neurons"):
        run_all_events(Study(*planted, given={"layer": 0}), tmp_path / "other")


@pytest.mark.slow
def test_an_event_that_cannot_be_explained_is_left_out_of_everything(planted: Any, tmp_path: Path) -> None:
    from sinklens.analysis import several

    with pytest.MonkeyPatch.context() as patch:
        real = several.explained

        def explained(model: Any, batch: Any, found: Any, layer: int, **options: Any) -> Any:
            if layer == 0:
                raise NoSinkError("no super neuron in block 0")
            return real(model, batch, found, layer, **options)

        patch.setattr(several, "explained", explained)
        results = run_all_events(Study(*planted), tmp_path / "run", target=5, only=("formation",))
        assert list(results) == ["event-2"]
        gathered = gather(tmp_path / "run")
    assert [(item.name, item.reason) for item in gathered.missing] == [("event-1", "no super neuron in block 0")]
    assert [run.place for run in gathered.runs] == ["event-2"]


@pytest.mark.usefixtures("no_model")
def test_everything_of_every_event_on_several_sets(tmp_path: Path) -> None:
    ask = ("all", "--event", "all", "--out", str(tmp_path / "run"))
    refused(invoke(*ask, "--replicate", "2"), "give --event all or --replicate, one of the two")
    refused(invoke(*ask, "--block", "2"), "explains each event by its own super neurons")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--event", "first"], ["--event 'first' must be the number of an event, such as 1, or all"]),
        (["--event", "0"], ["--event '0' must be"]),
        (["--event", "9" * 50], ["--event", "must be"]),
        (["--event", "1", "--block", "2"], ["give --block 2 or --event 1, not both"]),
        (["--event", "all", "--block", "2"], ["--event all explains each event by its own super neurons"]),
        (["--event", "all", "--super-neurons", "3"], ["leave out --block, --super-neurons and --outlier-dims"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value[0].startswith("--") else "",
)
def test_events_that_cannot_be_meant(chain: Run, arguments: list[str], parts: list[str]) -> None:
    refused(chain(*arguments), *parts)


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_an_event_that_is_not_there() -> None:
    for command in (["find"], ["chain", "--target", "5", "--length", "16"], ["analyse", "onset"]):
        refused(invoke(*command, "--event", "7"), "there is no event 7", "1 (block 0), 2 (block 2)")


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_the_result_is_printed_before_the_page_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "(the page is written)"
    monkeypatch.setattr("sinklens.cli.pages.write_report", lambda _: print(page))  # noqa: T201
    out = chain("--event", "1", "--out", "run").out
    assert out.index("super_neurons") < out.index(page) < out.index("Results: run")
