"""Running an analysis, and finding one by its name or file."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.analysis.base import Analysis, AnalysisResult, Findings, Verdict
from sinklens.analysis.discovery import folder, list_analyses
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.models.state import usual_state
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.plain import to_plain
from sinklens.records.provenance import code_digest
from sinklens.records.ranges import check_arguments, check_seed, shown
from sinklens.records.user_module import run_file
from sinklens.study import Study


def run_analysis(analysis: Analysis, study: Study, **options: Any) -> AnalysisResult:
    """Run an analysis; a model that it does not apply to, or that has no sink, gives *not measurable* and the reason.

    Raises:
        InputError: an option that does not exist, or does not fit the model and prompts.
        EngineError: a patch did nothing, or a readout is not finite.
    """
    if not isinstance(analysis, Analysis) or not isinstance(study, Study):
        given = f"{type(analysis).__name__} and {type(study).__name__}"
        raise InputError(f"give an Analysis (load_analysis) and a Study(model, prompts), not {given}")
    unknown = set(options) - set(analysis.options)
    if unknown:
        known = ", ".join(analysis.options) or "none"
        raise InputError(f"{analysis.name} has no option {', '.join(sorted(unknown))}: its options are {known}")
    options = analysis.options | options
    check_arguments(analysis.run, options)
    check_seed(study.seed)
    began = time.perf_counter()
    figure = None
    try:
        with usual_state(study.model, gradients=True):
            findings = analysis.run(study, **options)
    except (NoSinkError, NotApplicableError) as error:
        findings = Findings(Verdict("not measurable", analysis.claim, reason=str(error)), pd.DataFrame())
    else:
        figure = _figure(analysis, findings)
    return AnalysisResult(
        name=analysis.name,
        title=analysis.title,
        paper=analysis.paper,
        findings=findings,
        figure=figure,
        config=config_of(analysis, study, options),
        provenance={**study.provenance, **_formation(study)},
        seconds=time.perf_counter() - began,
    )


def _formation(study: Study) -> dict[str, Any]:
    """Where the sink forms, if the analysis asked for it."""
    formation = study.known_formation
    if formation is None:
        return {}
    return {
        "formation": {
            "layer": formation.layer,
            "super_neurons": list(formation.neurons),
            "outlier_dims": list(formation.dims),
            "sink_positions": sorted(set(formation.sink_positions)),
        }
    }


def config_of(analysis: Analysis, study: Study, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides an analysis's numbers, as JSON can hold it: equal configurations need not be run twice."""
    batch = study.batch
    return to_plain(
        {
            "options": {name: _told(value) for name, value in options.items()},
            "seed": study.seed,
            "given": study.given,
            **{name: value for name, value in batch.record().items() if name != "n_skipped"},
            "code": code_digest(analysis.code or analysis.run),
        }
    )


def _told(value: Any) -> Any:
    """An option as JSON can hold it; a function, a tensor and the like by its name and what it consists of."""
    try:
        json.dumps(to_plain(value))
    except TypeError:
        return [getattr(value, "__name__", type(value).__name__), fingerprint_of(value)]
    return value


def _figure(analysis: Analysis, findings: Findings) -> dict[str, Any] | None:
    if importlib.util.find_spec("plotly") is None:
        return None
    return json.loads(analysis.draw(findings).to_json() or "null")


def load_analysis(name: str | Path) -> Analysis:
    """The analysis of that name, or in that file.

    Raises:
        InputError: there is none.
    """
    path = folder() / f"{name}.py"
    if str(name).endswith(".py"):
        path = Path(name).expanduser()
    elif str(name) not in (known := list_analyses(alone=True)):
        raise InputError(f"there is no analysis {shown(str(name))!r}: the analyses are {', '.join(known)}")
    module = run_file(path, "sinklens_analysis")
    found = getattr(module, "ANALYSIS", None)
    if not isinstance(found, Analysis):
        raise InputError(f"{path} has no ANALYSIS: name the sinklens.Analysis in it so")
    return found


def main(analysis: Analysis) -> None:
    """What ``python analyses/NAME.py`` does: the same as ``sinklens analyse NAME``."""
    import sinklens

    sinklens.main(analysis)
