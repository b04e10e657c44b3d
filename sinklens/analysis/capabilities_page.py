"""The page of what runs on what: ``sinklens/models/README.md``.

python -m sinklens.analysis.capabilities_page measure FILE [FAMILY ...]    # with the transformer-lens installed
python -m sinklens.analysis.capabilities_page write FILE ...               # the page, from all these files
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sinklens.analysis.capabilities import Capabilities, Capability, capabilities, parts
from sinklens.analysis.discovery import list_analyses, list_groups
from sinklens.models.families import FAMILIES
from sinklens.models.fidelity import Fidelity, fidelity

HEAD = """# What runs on what

Models are HookedTransformer (transformer-lens 3.9) or TransformerBridge (3.9 and 4.3), with weights as published. All
of this page was measured on small random models of each family, and written, by

```
make capabilities
```

`sinklens models --capabilities M` tries every stage and analysis on any model.
"""
NEAR = """## How near to Hugging Face

Largest difference of the logits, in their standard deviations, at any position of a prompt that is longer than every
window; in bfloat16 from Hugging Face in bfloat16, whose own distance from float32 is in brackets. What is refused is
loaded in no other way: `load_model` takes a bridge where a HookedTransformer is not right, and refuses a bridge that is
not.
"""
HOLDS = """## What does not hold

Identities that fail in a model ([`identities.py`](identities.py) has their equations), and hook points at which edits
are refused, because the model does not go on with what is written there, or only in part, or because the activation has
other axes than its site says. A patch of `hook_resid_mid` runs all the same where attention's output is what is added:
it is written there, which all that follows sees.
"""
RUNS = """## What runs

Every stage of the chain and every analysis, on the model as `load_model` loads it, of the families that it was tried
on last.
"""
TITLES = {"other-sinks": "The other sinks", "circuits": "Circuits"}
"""Of the sections of groups of analyses."""


@dataclass(frozen=True)
class Measured:
    """One family with one version of transformer-lens."""

    family: str
    """Key of :data:`sinklens.models.families.FAMILIES`."""
    near: tuple[Fidelity, ...]
    """On every backend, in every dtype."""
    runs: Capabilities | None = None
    """What runs on it; None where that was not tried."""

    @property
    def version(self) -> str:
        """Major and minor version of transformer-lens."""
        return ".".join(self.near[0].transformer_lens.split(".")[:2])


def measure(family: str) -> Measured:
    """Load a family on every backend, and try everything."""
    return Measured(family, tuple(fidelity(family)), capabilities(family))


def measure_near(family: str) -> Measured:
    """Load a family on every backend."""
    return Measured(family, tuple(fidelity(family)))


def page(found: Sequence[Measured]) -> str:
    """The whole page."""
    best: dict[tuple[str, str], Measured] = {}
    for item in found:  # of what was measured twice, that with more
        best[item.version, item.family] = item if item.runs is not None else best.get((item.version, item.family), item)
    found = list(best.values())
    families = list(dict.fromkeys(item.family for item in found))
    tried = [item for item in found if item.runs is not None]
    newest = {item.family: item for item in tried}
    first = list({item.family: item for item in reversed(tried)}.values())[::-1]
    sections = [NEAR + "\n" + _near(found, families), HOLDS + "\n" + _holds(found), RUNS + "\n" + markdown(first)]
    groups = [(_head(group), list(list_analyses(group=group))) for group in list_groups()]
    for title, names in [("", parts()), *groups]:
        known = [item for item in first if set(names) & {one.part for one in _tried(item).found}]
        if title and known:
            sections.append(title + "\n" + markdown(known, names))
        changed = [newest[item.family] for item in known if _cells(newest[item.family], names) != _cells(item, names)]
        if changed:
            where = f"### With transformer-lens {changed[0].version}\n\nWhere it is not the same:\n\n"
            sections.append(where + markdown(changed, names))
    return HEAD + "\n" + "\n\n".join(sections)


def _head(group: str) -> str:
    return f"## {TITLES.get(group, group)}\n\nThe analyses that `sinklens all --with {group}` adds.\n"


def _cells(item: Measured, names: Sequence[str]) -> list[tuple[bool, str]]:
    return [(one.runs, one.reason) for one in _tried(item).found if one.part in names]


def _tried(item: Measured) -> Capabilities:
    assert item.runs is not None
    return item.runs


def _near(found: Sequence[Measured], families: Sequence[str]) -> str:
    """A row for every family, a column for every version, backend and dtype; the reasons of refusals below."""
    every = {(item.version, near.backend, near.dtype, near.family): near for item in found for near in item.near}
    columns = list(dict.fromkeys(key[:3] for key in every))
    reasons: list[str] = []

    def cell(near: Fidelity | None) -> str:
        if near is None:
            return ""
        if near.refused:
            if near.refused not in reasons:
                reasons.append(near.refused)
            return f"refused [{reasons.index(near.refused) + 1}]"
        assert near.logits is not None and near.rounding is not None
        return _bound(near.logits) if near.dtype == "float32" else f"{near.logits:.2g} ({near.rounding:.2g})"

    titles = [f"{backend}, {dtype}, {version}" for version, backend, dtype in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for family in families:
        cells = [cell(every.get((*column, family))) for column in columns]
        lines.append(f"| {FAMILIES[family].title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_numbered(reasons)])


def _bound(difference: float) -> str:
    """The next power of ten: the last digits differ from machine to machine."""
    exponent = next(exponent for exponent in range(-7, 3) if difference < 10.0**exponent)
    return f"< 1e{exponent}"


def _holds(found: Sequence[Measured]) -> str:
    lines = ["| | backend | fails | edits refused at |", "|---|---|---|---|"]
    for item in found:
        for near in item.near:
            if near.dtype == "float32" and (near.fails or near.ignored):
                where = f"{near.backend}, {item.version}"
                fails, ignored = (", ".join(f"`{name}`" for name in names) for names in (near.fails, near.ignored))
                lines.append(f"| {FAMILIES[item.family].title} | {where} | {fails} | {ignored} |")
    return "\n".join(lines)


def markdown(found: Sequence[Measured], names: Sequence[str] = ()) -> str:
    """A row for every family, a column for every part (of ``names``, where they are given), and the reasons below."""
    names, reasons = names or parts(), list[str]()

    def cell(item: Capability) -> str:
        if not item.reason:
            return "yes" if item.runs else "no"
        if item.reason not in reasons:
            reasons.append(item.reason)
        return f"{'yes' if item.runs else 'no'} [{reasons.index(item.reason) + 1}]"

    lines = ["| | loads as | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for one in map(_tried, found):
        backend = one.backend.removeprefix("Transformer").removesuffix("Transformer") or "–"
        cells = [cell(item) for item in one.found if item.part in names]
        lines.append(f"| {one.title} | {backend} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_numbered(reasons)])


def _numbered(reasons: Sequence[str]) -> list[str]:
    return [f"[{number}] {reason}  " for number, reason in enumerate(reasons, start=1)]


def to_json(found: Sequence[Measured]) -> str:
    """What was measured, as a file."""
    return json.dumps([asdict(item) for item in found], indent=1)


def from_json(text: str) -> list[Measured]:
    """The inverse of :func:`to_json`."""
    return [
        Measured(
            item["family"],
            tuple(Fidelity(**{**near, **_tuples(near)}) for near in item["near"]),
            _runs(item["runs"]),
        )
        for item in json.loads(text)
    ]


def _runs(runs: dict[str, Any] | None) -> Capabilities | None:
    if runs is None:
        return None
    return Capabilities(runs["title"], runs["backend"], tuple(Capability(**one) for one in runs["found"]))


def _tuples(near: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(near[name]) for name in ("fails", "ignored")}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "write"))
    parser.add_argument("files", nargs="+", help="the file that is written, and families; or the files that are read")
    parser.add_argument("--workers", type=int, default=2, help="processes that measure")
    parser.add_argument("--near", action="store_true", help="measure how near models are, and not what runs on them")
    given = parser.parse_args()
    if given.action == "write":
        found = [item for file in given.files for item in from_json(Path(file).read_text(encoding="utf-8"))]
        print(page(found))  # noqa: T201  (the command's output)
        return
    file, *families = given.files
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(measure_near if given.near else measure, families or FAMILIES))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
