"""What runs on which architecture: every stage and every analysis, on a small random model of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinklens.analysis.capabilities import SHOWN, Capabilities, Capability, capabilities, markdown, page, parts
from sinklens.analysis.discovery import list_analyses

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "sinklens" / "models" / "README.md"


@pytest.fixture(scope="module")
def found() -> dict[str, Capabilities]:
    return {family: capabilities(family) for family in SHOWN}


@pytest.mark.parametrize("family", SHOWN)
def test_everything_runs_or_says_why_not(found, family):
    here = found[family]
    assert [item.part for item in here.found] == parts()
    for item in here.found:
        assert item.runs or item.reason
        assert not item.reason.startswith("failed"), f"{item.part}: {item.reason}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_everything_runs_on_what_the_claim_is_about(found, family):
    assert all(item.runs and not item.reason for item in found[family].found)


@pytest.mark.parametrize("family", [family for family in SHOWN if family != "olmo2"])
def test_most_runs_everywhere(found, family):
    runs = {item.part for item in found[family].found if item.runs}
    assert {"onset", "variance_decay", "mask_intervention", "super_neurons", "dominance"} <= runs


def test_the_committed_table_is_what_was_found(found):
    pytest.importorskip("transformer_lens.HookedTransformer")
    fresh = page([found[family] for family in SHOWN])
    assert PAGE.read_text(encoding="utf-8") == f"{fresh}\n", "write it anew, as the page says"


def test_the_table_has_a_row_for_every_part_and_each_reason_once():
    names = parts()
    items = tuple(Capability(name, number != 0, "no gate" if number < 2 else "") for number, name in enumerate(names))
    text = markdown([Capabilities("A", "HookedTransformer", items), Capabilities("B", "", items)])
    assert f"| {names[0]} | no [1] | no [1] |" in text and f"| {names[1]} | yes [1] | yes [1] |" in text
    assert text.count("no gate") == 1 and "| loads as | Hooked | – |" in text
    assert len(names) == 6 + len(list_analyses())
