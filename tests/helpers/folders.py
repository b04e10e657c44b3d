"""What is in a folder, and a folder of an earlier run."""

from __future__ import annotations

from pathlib import Path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def earlier_run(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "chain.json").write_text(content)
    (folder / "extra.txt").write_text("only in the old one")
    return folder
