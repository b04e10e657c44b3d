"""What a terminal gets to see of a result."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sinklens.cli.tables import chain_footer, chain_table, console, formation_tables
from tests.helpers.synthetic import synthetic_result


def test_tables_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_result()
    screen = console()
    screen.print(chain_table(result))
    for line in chain_footer(result):
        print(line)  # noqa: T201
    for table in formation_tables(result.formation):
        screen.print(table)
    text = capsys.readouterr().out
    for part in (
        "value_aggregation",
        "super_neurons",
        "control: other_neurons",
        "0-2",
        "1.01 [1.00, 1.02] (1)",
        "0.11 [0.10, 0.12] (0)",
        "0.020 in the base run, 0.600 in the anchored run",
        "blocks 3-4",
        "3 prompts of 16 tokens",
        "1 skipped as too short; 1 excluded",
        "2 (explained)",
        "no gate",
    ):
        assert part in text, part
    assert "…" not in text


def test_tables_are_never_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_result()
    scores = result.scores.assign(control="random_subspace", effect=-123.456, ci_low=-1234.5, ci_high=1234.5)
    console().print(chain_table(replace(result, scores=scores)))
    text = capsys.readouterr().out
    assert "control: random_subspace" in text and "−123.46 [−1234.50, 1234.50] (1)" in text
    assert "…" not in text
