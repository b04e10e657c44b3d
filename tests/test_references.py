"""What texts mention exists: the check itself, on texts made for it."""

from __future__ import annotations

import ast

import pytest

from sinklens import patches, study
from tests.helpers.references import dotted, resolves, roles_in


@pytest.mark.parametrize("name", ["sinklens.run_chain", "sinklens.engine.packed", "Study.run", "Study", "run()"])
def test_a_name_is_looked_for_in_the_class_the_module_and_the_package(name):
    assert resolves(name, study, "Study")


@pytest.mark.parametrize("name", ["{}.capture", "{}.run_links", "Study.measures", "nobody", "{}.a.b"])
def test_a_name_that_nobody_has_is_broken(name):
    assert not resolves(name.format("sinklens"), study, "Study")


def test_fields_without_a_default_count():
    assert resolves("Patch.layers", patches) and not resolves("Patch.layer", patches)


def test_roles_are_found_below_fields_and_in_classes_with_their_lines():
    text = '''"""Of :func:`a`."""
class One:
    """First.

    Then :meth:`b`.
    """
    field: int = 1
    """As :attr:`~c`."""
'''
    found = [(item.line, item.name, item.scope) for item in roles_in(ast.parse(text))]
    assert found == [(1, "a", ""), (5, "b", "One"), (8, "c", "One")]


def test_dotted_names_are_those_of_the_package():
    line = (
        "sl.viz.heatmap(x), sinklens.sweep; not self.sl.x, sinklens/cli.py, sinklens.html or https://x.org/sinklens.y"
    )
    assert dotted(line) == ["sinklens.viz.heatmap", "sinklens.sweep"]
