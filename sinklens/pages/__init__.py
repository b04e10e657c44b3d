"""The HTML report: one self-contained page of whatever is in a folder of runs."""

from sinklens.pages.page import report

__all__ = [
    "report",
]
