"""What runs on which architecture: every stage and every analysis, on a small random model of each family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sinklens import statistics
from sinklens.analysis.capabilities import Capabilities, Capability, grouped, parts
from sinklens.analysis.capabilities_page import Measured, from_json, markdown, measure, page, to_json
from sinklens.analysis.discovery import list_analyses
from sinklens.models.families import FAMILIES
from sinklens.models.fidelity import Fidelity

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "sinklens" / "models" / "README.md"
SOME = ("llama", "gpt2", "gemma2", "olmo2", "olmoe")
"""One of each kind; `make capabilities` measures all."""


@pytest.fixture(scope="module")
def found() -> dict[str, Measured]:
    with pytest.MonkeyPatch.context() as patch:  # what runs is asked, and not how sure it is
        patch.setattr(statistics.bootstrap_estimate, "__defaults__", (20,))
        return {family: measure(family) for family in SOME}


@pytest.mark.parametrize("family", SOME)
def test_everything_runs_or_says_why_not(found, family):
    here = found[family].runs
    assert here is not None
    assert [item.part for item in here.found] == [*parts(), *grouped()]
    for item in here.found:
        assert item.runs or item.reason
        assert not item.reason.startswith("failed"), f"{item.part}: {item.reason}"


@pytest.mark.parametrize("family", SOME)
def test_what_is_loaded_is_near(found, family):
    for near in found[family].near:
        if not near.refused:
            assert near.logits < (1e-3 if near.dtype == "float32" else 3 * near.rounding)
            assert near.patterns is not None and near.patterns < (1e-3 if near.dtype == "float32" else 0.5)
    assert any(not near.refused for near in found[family].near)


def test_everything_runs_on_what_the_claim_is_about(found):
    assert all(item.runs and not item.reason for item in found["llama"].runs.found)


@pytest.mark.parametrize("family", SOME)
def test_attention_and_residual_analyses_run_everywhere(found, family):
    runs = {item.part for item in found[family].runs.found if item.runs}
    assert {"stage: value_aggregation", "stage: qk_locking", "onset", "mask_intervention", "effective_rank"} <= runs
    assert {"variance_decay", "variance_amplification", "head_imbalance", "qk_locking", "residual_direction"} <= runs


def test_the_committed_page_is_what_was_found(found):
    """The rows of these families, footnotes apart; the page has all families."""
    pytest.importorskip("transformer_lens.HookedTransformer")

    def rows(text: str) -> dict[str, str]:
        section = text.split("## What runs\n")[1].split("### With")[0].split("## The other sinks")[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        return {line.split(" | ")[0]: re.sub(r" \[\d+\]", "", line) for line in lines}

    committed, fresh = rows(PAGE.read_text(encoding="utf-8")), rows(page(list(found.values())))
    assert {name: committed[name] for name in fresh} == fresh, "write it anew: make capabilities"
    assert all(f"| {family.title} |" in PAGE.read_text(encoding="utf-8") for family in FAMILIES.values())


def test_the_table_has_a_column_for_every_part_and_each_reason_once():
    names = parts()
    items = tuple(Capability(name, number != 0, "no gate" if number < 2 else "") for number, name in enumerate(names))
    near = (Fidelity("llama", "hooked", "float32", "3.9.0", 2e-6, 1e-7, 0.0, fails=("mlp_adds",)),)
    one = Measured("llama", near, Capabilities("A", "HookedTransformer", items))
    two = Measured("gpt2", near, Capabilities("B", "", items))
    text = markdown([one, two])
    assert "| A | Hooked | no [1] | yes [1] | yes |" in text and "| B | – | no [1] | yes [1] | yes |" in text
    assert text.count("no gate") == 1
    assert len(names) == 6 + len(list_analyses())
    assert from_json(to_json([one, two])) == [one, two]
    whole = page([one])
    assert "| Llama | < 1e-5 |" in whole and "| Llama | hooked, 3.9 | `mlp_adds` |  |" in whole
