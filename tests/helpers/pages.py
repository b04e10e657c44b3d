"""The project's pages as the tests read them: links, fenced blocks, tables."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.references import ROOT, files

README = ROOT / "README.md"


def readmes() -> list[Path]:
    """Every page of the project, the first one first."""
    return sorted((path for path in files() if path.name == "README.md"), key=lambda path: (len(path.parts), path))


def links(text: str) -> list[str]:
    """Where a page points to, other sites apart."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def blocks(text: str, language: str = "") -> list[str]:
    """The contents of the fenced blocks in a language."""
    return [
        body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if name == language
    ]


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows below a table's head, by their first cell."""
    body = text[text.index(head) :].split("\n\n")[0].split("\n")[2:]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}
