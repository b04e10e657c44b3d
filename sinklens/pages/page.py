"""One self-contained HTML page of a run, to read, to keep and to send: it needs no network and no other file.

The page holds plotly.js and CircuitsVis once each. Everything that comes from the data is escaped; the page forbids
itself (by a content security policy) to fetch anything and to run any script but its own, which are named by their
digests; and the CircuitsVis views sit in sandboxed frames.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.corrections import parts_table
from sinklens.chain.result import ChainResult
from sinklens.chain.stage_verdicts import stages_in_words
from sinklens.chain.verdicts import CLOSE, HALF, summary
from sinklens.circuits import Circuit
from sinklens.errors import InputError, need
from sinklens.mitigation.result import MitigationResult
from sinklens.pages import circuit as of_circuit
from sinklens.pages.agreement import agreement_section
from sinklens.pages.chain import sections, subtitle
from sinklens.pages.claims import Claim, Corrected, by_outcome, claim, counted
from sinklens.pages.figures import chain_figures, from_disk
from sinklens.pages.gather import Gathered, Missing, Part, Result, gather, of_result
from sinklens.pages.mitigation import mitigation_section
from sinklens.pages.run import cost, facts, origins, parts, reproduce, settings, whole_command
from sinklens.pages.views import frames, has_views
from sinklens.records.files import write_text
from sinklens.records.printable import clip, templates
from sinklens.viz.circuitsvis import check_version, frame_script, frame_style, library
from sinklens.viz.diagram import chain_diagram


def report(run: str | Path | Result, out: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: a folder that holds a chain, a circuit, an analysis, mitigations, or any number of folders that do; or a
            result.
        out: file to write; ``report.html`` in the folder by default. A result that has no folder needs it.

    Returns:
        The file written. It appears as a whole or not at all.

    Raises:
        InputError: the folder holds nothing to report, the file cannot be written, or plotly or circuitsvis is missing.
    """
    if isinstance(run, (ChainResult, Circuit, AnalysisResult, MitigationResult)):
        if out is None:
            raise InputError("a result has no folder of its own: say where to write with report(result, 'report.html')")
        page, path = render(run), Path(out)
    else:
        page, path = _of_folder(Path(run)), Path(out) if out is not None else Path(run) / "report.html"
    if path.is_dir():
        path = path / "report.html"
    write_text(path, page)
    return path


def _of_folder(folder: Path) -> str:
    gathered = gather(folder)
    try:
        return render(gathered)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"the run in {folder} is damaged ({type(error).__name__}: {reason}): run it again") from error


def render(run: Gathered | Result) -> str:
    """The page as text.

    Raises:
        InputError: plotly or circuitsvis is missing, or of a version that is not known.
    """
    gathered = run if isinstance(run, Gathered) else of_result(run)
    plotly = need("plotly.offline").get_plotlyjs()
    framed = any(has_views(result) for _, result in gathered.chains)
    framed |= any(len(result.by_token) or result.attention for _, result in gathered.circuits)
    if framed:
        check_version()  # what is wrong with the installation must not look like a damaged chain
    figures: dict[str, str] = {}
    chains = _chains(gathered, figures)
    circuits = _circuits(gathered, figures)
    claims = _claims(gathered, figures)
    mitigations = _mitigations(gathered, figures)
    texts = {"plotly": plotly, "page": data_of("report.js")}
    texts |= {"paper": data_of("paper.js"), "circuitsvis": library(), "frame": frame_script()} if framed else {}
    template = templates("sinklens.pages").get_template("report.html.j2")
    return template.render(
        frame_style=frame_style() if framed else "",
        **_head(gathered, chains, circuits, claims),
        chains=chains,
        circuits=circuits,
        claims=claims,
        mitigations=mitigations,
        counted=counted(claims),
        outcomes=by_outcome(claims),
        facts=facts(gathered),
        parts=parts(gathered),
        origins=origins(gathered),
        missing=gathered.missing,
        agreement=agreement_section(gathered.agreement),
        runs=gathered.runs,
        command=whole_command(gathered),
        figures=figures,
        texts=texts,
        policy=" ".join(f"'sha256-{digest_of(text)}'" for text in texts.values()),
        close=f"{CLOSE:g}",
        half=f"{HALF:g}",
    )


def _head(
    gathered: Gathered, chains: list[dict[str, Any]], circuits: list[dict[str, Any]], claims: list[Claim]
) -> dict[str, Any]:
    """What the page is called, and what it has."""
    models = next((values for name, values in facts(gathered) if name == "Model"), [])
    kinds = ["attention-sink chain" if len(chains) == 1 else f"{len(chains)} attention-sink chains"] if chains else []
    if circuits:
        kinds.append("circuit" if len(circuits) == 1 else f"{len(circuits)} circuits")
    if claims:
        kinds.append(claims[0].title if len(claims) == 1 and not kinds else f"{len(claims)} analyses")
    kinds += ["mitigations"] if gathered.mitigations else []
    if gathered.runs:
        kinds.append(f"{len(gathered.runs)} runs of everything")
    parts = [*chains, *circuits]
    lines = [part["subtitle"] for part in parts] if len(parts) == 1 else []
    prompts = next((values for name, values in facts(gathered) if name == "Prompts"), [])
    return {
        "title": clip(models[0] if len(models) == 1 else f"{len(models)} models" if models else "A run", 160),
        "kicker": "Report of " + (" and ".join(kinds) or "a run"),
        "subtitle": "; ".join([*lines, *(f"{text}" for text in prompts[:1] if len(prompts) == 1)]),
    }


def _built(gathered: Gathered, part: Part, build: Callable[[], Any]) -> list[Any]:
    """What ``build`` gives; nothing, and a line among the missing, when the part's data is not what it should be."""
    try:
        return [build()]
    except Exception as error:
        if len(gathered.parts) == 1 and not gathered.missing:
            raise
        reason = f"its data cannot be shown ({type(error).__name__}: {' '.join(str(error).split())})"
        gathered.missing.append(Missing(part.name, "damaged", reason))
        return []


def _chains(gathered: Gathered, figures: dict[str, str]) -> list[dict[str, Any]]:
    chains: list[dict[str, Any]] = []
    for index, (part, result) in enumerate(gathered.chains, start=1):
        anchor = "chain" if index == 1 else f"chain-{index}"

        def build(part: Part = part, result: ChainResult = result, anchor: str = anchor) -> dict[str, Any]:
            chain = _chain(part, result, anchor)
            chain["heading"] = "The chain" if len(gathered.chains) == 1 else f"The chain: {part.name}"
            return chain

        chains += _built(gathered, part, build)
    for chain in chains:
        figures.update({f"{chain['id']}-{name}": text for name, text in chain.pop("drawn").items()})
    return chains


def _chain(part: Part, result: ChainResult, anchor: str) -> dict[str, Any]:
    lead, paragraphs = summary(result)
    paragraphs = [*paragraphs, ("Stages", stages_in_words(result))]
    drawn = chain_figures(result)
    return {
        "id": anchor,
        "name": part.name,
        "subtitle": subtitle(result),
        "lead": lead,
        "paragraphs": paragraphs,
        "diagram": chain_diagram(result),
        "drawn": drawn,
        "figures": list(drawn),
        "frames": frames(result),
        "cost": cost(result),
        "settings": settings(result.config),
        "reproduce": reproduce(result),
        **sections(result),
    }


def _circuits(gathered: Gathered, figures: dict[str, str]) -> list[dict[str, Any]]:
    circuits: list[dict[str, Any]] = []
    for index, (part, result) in enumerate(gathered.circuits, start=1):
        anchor = "circuit" if index == 1 else f"circuit-{index}"

        def build(part: Part = part, result: Circuit = result, anchor: str = anchor) -> dict[str, Any]:
            heading = "The circuit" if len(gathered.circuits) == 1 else f"The circuit: {part.name}"
            return {"id": anchor, "name": part.name, "heading": heading, **of_circuit.sections(result)}

        circuits += _built(gathered, part, build)
    for found in circuits:
        figures.update({f"{found['id']}-{name}": text for name, text in found.pop("drawn").items()})
    return circuits


def _claims(gathered: Gathered, figures: dict[str, str]) -> list[Claim]:
    claims: list[Claim] = []
    taken: set[str] = set()
    corrected = _corrected(gathered)
    for part, result in gathered.analyses:
        anchor = _anchor(part.name, taken)
        rows = _built(gathered, part, lambda: claim(part, result, anchor, corrected))  # noqa: B023  (called here)
        claims += rows
        if rows and result.figure is not None:
            try:
                figures[anchor] = from_disk(result.figure)
            except (InputError, RecursionError) as error:
                gathered.missing.append(Missing(f"figure of {part.name}", "left out", str(error)))
    return claims


def _mitigations(gathered: Gathered, figures: dict[str, str]) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = []
    for number, (part, result) in enumerate(gathered.mitigations, start=1):
        anchor = "mitigations" if number == 1 else f"mitigations-{number}"
        sections += _built(gathered, part, lambda: mitigation_section(part.name, result, anchor))  # noqa: B023
    figures.update({section["id"]: section.pop("drawn") for section in sections})
    return sections


def _corrected(gathered: Gathered) -> Corrected:
    """Corrected p-values by analysis and part; none where there is one analysis alone, or a verdict is damaged."""
    try:
        table = parts_table({part.name: result for part, result in gathered.analyses})
    except (AttributeError, TypeError, ValueError):
        return {}
    if table.analysis.nunique() < 2:
        return {}
    return dict(zip(zip(table.analysis, table.part, strict=True), table.p_holm, strict=True))


def _anchor(name: str, taken: set[str]) -> str:
    """An id for the section of that name, unlike all others."""
    base = "analysis-" + (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "part")
    anchor, number = base, 2
    while anchor in taken:
        anchor, number = f"{base}-{number}", number + 1
    taken.add(anchor)
    return anchor


def data_of(name: str) -> str:
    """A file beside the templates."""
    return resources.files("sinklens.pages").joinpath("templates", name).read_text(encoding="utf-8")


def digest_of(script: str) -> str:
    """What the page's policy knows a script by."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
