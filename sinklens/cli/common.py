"""Where the benchmark and the tests of figures look for these."""

from sinklens.cli.command import Commands
from sinklens.cli.display import progress
from sinklens.cli.mistakes import errors
from sinklens.cli.pages import write_report

__all__ = ["Commands", "errors", "progress", "write_report"]
