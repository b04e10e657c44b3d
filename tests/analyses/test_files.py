"""The analyses, run on the planted model, whose numbers are known, and what the template promises."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinklens.chain.run import run_chain
from sinklens.formation import find_formation
from sinklens.prompts import from_tokens
from tests.helpers.planted import OUTLIER, SUPER, planted_model, prompts
from tests.helpers.tiny import tiny_model

pytest.importorskip("transformer_lens.HookedTransformer")

FOLDER = Path(__file__).parents[2] / "analyses"
FILES = sorted(FOLDER.glob("*.py"))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"analyses.{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def planted_scores(stage: Any) -> Any:
    model = planted_model()
    batch = from_tokens(model, prompts(16))
    formation = find_formation(model, batch, layer=0, super_neurons=[SUPER], outlier_dims=[OUTLIER])
    result = run_chain(model, batch, target=5, stages=(stage,), formation=formation, readout_blocks=1)
    return result.scores.set_index(["edit", "control", "direction"]).effect


def functions(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file, in its order, those within others left out."""
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]


def lines_of(function: ast.FunctionDef) -> int:
    """Source lines from ``def`` to the last: signature, comments and blank lines count, the docstring does not."""
    first = function.body[0]
    doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) and first.end_lineno else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_analysis_imports_and_its_functions_are_short(path):
    assert load(path.stem).__doc__
    assert {function.name: lines_of(function) for function in functions(path) if lines_of(function) > 40} == {}


@pytest.mark.parametrize("path", [path for path in FILES if "def run(" in path.read_text()], ids=lambda path: path.stem)
def test_every_run_reads_from_the_question_to_the_findings(path):
    """It comes before its helpers, reaches one verdict, and returns the findings at its end."""
    run = functions(path)[0]
    assert run.name == "run"
    calls = [ast.unparse(node.func) for node in ast.walk(run) if isinstance(node, ast.Call)]
    assert calls.count("sl.verdict") + calls.count("sl.analysis.verdict_of") == 1
    assert isinstance(run.body[-1], ast.Return)
    assert ast.unparse(run.body[-1]).startswith("return sl.Findings(verdict, ")


def test_the_house_style_is_shown_by_files_that_exist():
    named = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert (
        {"onset.py", "residual_direction.py", "_template.py", "_from_scratch.py"}
        <= set(named)
        <= {path.name for path in FILES}
    )


def test_a_new_stage_takes_less_than_thirty_lines():
    """Everything that the template adds to make a stage: site, control, readout and the stage itself."""
    template = load("_template")
    lines = sum(len(inspect.getsource(part).splitlines()) for part in (template.random_neurons, template.magnitude))
    text = inspect.getsource(template)
    stage = text[text.index("STAGE = ") : text.index("ANALYSIS = ")].strip().splitlines()
    assert lines + len(stage) + 1 < 30


def test_the_template_s_stage_on_the_planted_model():
    """The gate is 0 without the sink: putting it back silences the neuron, so it is necessary, to the last bit.

    It is not sufficient where the linear branch is zero too (prompt 0: the value is 0), and is in prompt 1 (it is not).
    """
    scores = planted_scores(load("_template").STAGE)
    assert scores["transplant", "", "noise"] == pytest.approx(1, abs=1e-3)
    assert scores["transplant", "", "denoise"] == pytest.approx(0.5, abs=1e-3)
    for direction in ("denoise", "noise"):
        assert scores["transplant", "random_neurons", direction] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_the_residual_s_direction_carries_the_planted_sink():
    """A key is read off the normalised residual, so its direction is all that counts, and its norm nothing."""
    scores = planted_scores(load("residual_direction").STAGE)
    for direction in ("denoise", "noise"):
        assert scores["transplant", "", direction] == pytest.approx(1, abs=1e-3)
        assert scores["direction_only", "", direction] == pytest.approx(1, abs=1e-3)
        assert scores["direction_only", "norm_only", direction] == pytest.approx(0, abs=1e-3)


def test_the_example_from_scratch_by_hand():
    """Queries 2 to 6 give key 1 1, 2, 3, 4 and 5 hundredths: of an odd number the one in the middle is left out."""
    import torch

    attention = torch.zeros(2, 7, 7)
    attention[0, 2:, 1] = torch.arange(1, 6) / 100
    ratios = load("_from_scratch").late_over_early(attention, torch.tensor([1, 6]))
    assert ratios[0] == pytest.approx((4 + 5) / (1 + 2)) and np.isnan(ratios[1])


@pytest.mark.slow
def test_the_example_from_scratch_on_the_planted_model():
    """There every later query gives the sink the same, and no verdict is needed where nothing is diluted."""
    import sinklens as sl

    study = sl.Study(planted_model(), from_tokens(planted_model(), prompts(16)))
    found = sl.run_analysis(load("_from_scratch").ANALYSIS, study)
    assert set(found.findings.table.token) == {"sink", "ordinary"} and len(found.findings.table) == 2 * study.batch.n
    assert found.findings.verdict.outcome in ("holds", "undecided", "does not hold")
    assert found.figure is not None


def test_the_names_that_options_cannot_have_are_those_that_are_told():
    """The page names all that the command line refuses, and no other."""
    from sinklens.cli import of_analysis
    from sinklens.cli.signature import flags_of

    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", text.split("These names are taken")[1].split("\n\n")[0]))
    common = inspect.signature(of_analysis._run, eval_str=True).parameters.values()
    flags = {flag[2:].replace("-", "_") for one in common for flag in flags_of(one)}
    own = {"analysis", "options"}  # what the function is given besides
    assert told == (flags | {one.name for one in common} | {"help"}) - own


def test_the_readme_s_stage_runs():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```python\n")[1:] if "STAGE = sl.Stage(" in part).split("```")[0]
    import sinklens as sl

    names: dict[str, Any] = {"sl": sl}
    exec(block[: block.index("result = ")], names)
    scores = planted_scores(names["STAGE"])
    # Half of an outlier is still by far the largest dimension, and the norm divides by it.
    assert scores["halfway", "", "denoise"] == pytest.approx(1, abs=1e-3)
    assert scores["transplant", "", "noise"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_new_stage_shows_up_in_the_table_of_a_random_model():
    model = tiny_model("llama")
    generator = np.random.default_rng(0)
    import torch

    batch = from_tokens(model, torch.tensor(generator.integers(3, model.cfg.d_vocab, (3, 16))))
    formation = find_formation(model, batch, layer=1, super_neurons=[3, 7], outlier_dims=[2, 5])
    stage = load("_template").STAGE
    result = run_chain(model, batch, target=4, stages=(stage,), formation=formation, min_gap=1e-6)
    assert set(result.scores.stage) == {"gate"}
    assert result.scores.effect.notna().all()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_intervals_are_over_texts_where_prompts_share_one(path: Path) -> None:
    """A study knows which prompts are of one text: what it is not asked about would be drawn prompt by prompt."""
    source = path.read_text(encoding="utf-8")
    calls = re.findall(r"(?:bootstrap_estimate|bootstrap_interval|mean_estimate|drawn_\w+)\([^\n]*", source)
    assert [call for call in calls if "texts" not in call] == []
