"""What was run: the facts that a report's parts share or differ in, their time, and how to run them again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.discovery import list_analyses
from sinklens.chain.result import METRIC, ChainResult
from sinklens.circuits import Circuit
from sinklens.formation import Formation
from sinklens.mitigation.result import MitigationResult
from sinklens.models.load import REGISTRY
from sinklens.pages.gather import Gathered, Part, Result, kind_of, mapping
from sinklens.pairs.choice import is_natural
from sinklens.prompts import prompts_text
from sinklens.records.printable import isolated
from sinklens.records.ranges import spans
from sinklens.records.text import NONE, bytes_text, number, seconds_text

Facts = list[tuple[str, list[str]]]
"""What it is, and its values: one, or one for every group of parts that has it."""


Read = Callable[[Mapping[str, Any], Mapping[str, Any]], object]
"""A value of a part's config and provenance."""


def facts(gathered: Gathered) -> Facts:
    """The set-up, each fact once where all parts agree, and with the parts' names where they do not."""
    shared = _shared(
        gathered,
        {
            "Model": lambda _, p: p.get("model"),
            "Prompts": _prompts,
            "Seed": lambda c, _: c.get("seed"),
            "Device": lambda _, p: p.get("device"),
            "Dtype": lambda _, p: p.get("dtype"),
        },
    )
    shared.insert(2, ("Formation", _formations(gathered)))
    shared.append(("Versions", [_main_versions(gathered)]))
    shared.append(("Time", [_time(gathered)]))
    return [(name, values) for name, values in shared if any(values)]


def origins(gathered: Gathered) -> Facts:
    """Digests, commit, and versions of Python and the packages."""
    shared = _shared(
        gathered,
        {
            "Digest of the weights": lambda _, p: p.get("weight_digest"),
            "Digest of the prompts": lambda _, p: p.get("prompts_digest"),
            "Commit of sinklens": lambda _, p: p.get("git_commit"),
        },
    )
    return [(name, values) for name, values in shared + _versions(gathered) if values]


def _shared(gathered: Gathered, readers: Mapping[str, Read]) -> Facts:
    sources = _sources(gathered)
    return [(name, _distinct([(who, read(c, p)) for who, c, p in sources])) for name, read in readers.items()]


def _versions(gathered: Gathered) -> Facts:
    sources = [(who, mapping(p.get("versions"))) for who, _, p in _sources(gathered)]
    names = list(dict.fromkeys(str(name) for _, versions in sources for name in versions))
    return [(name, _distinct([(who, versions.get(name)) for who, versions in sources])) for name in names]


def _main_versions(gathered: Gathered) -> str:
    versions = dict(_versions(gathered))
    names = ("sinklens", "torch", "transformer-lens", "transformers", "python")
    return ", ".join(f"{name} {' or '.join(versions[name])}" for name in names if name in versions)


def _sources(gathered: Gathered) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    parts = [(part.name, part.result.config, part.result.provenance) for part in gathered.parts]
    if not parts:
        parts = [("run", mapping(gathered.record.get("config")), mapping(gathered.record.get("provenance")))]
    return [(name, mapping(config), mapping(provenance)) for name, config, provenance in parts]


def _prompts(config: Mapping[str, Any], _provenance: Mapping[str, Any]) -> str | None:
    if "prompts" not in config:
        return None
    return prompts_text(config)


def _distinct(values: Sequence[tuple[str, object]]) -> list[str]:
    """Every value once; where there are several, with the names of the parts that have it."""
    groups: dict[str, list[str]] = {}
    for who, value in values:
        if value is not None:
            groups.setdefault(str(value), []).append(who)
    if len(groups) < 2:
        return list(groups)
    return [f"{value} ({', '.join(map(isolated, who))})" for value, who in groups.items()]


def _formations(gathered: Gathered) -> list[str]:
    formed = [*gathered.chains, *gathered.circuits]
    places: list[tuple[str, object]] = [(part.name, _formed(result.formation)) for part, result in formed]
    if gathered.formation is not None:
        places.append(("formation", _formed(gathered.formation)))
    for part, item in gathered.analyses:
        formation = mapping(item.provenance.get("formation"))
        if formation:
            lists = [formation.get(name) or [] for name in ("sink_positions", "super_neurons", "outlier_dims")]
            places.append((part.name, _place(formation.get("layer"), *lists)))
    return _distinct(places)


def _formed(formation: Formation) -> str:
    return _place(formation.layer, formation.sink_positions, formation.neurons, formation.dims)


def _place(block: object, positions: Sequence[int], neurons: Sequence[int], dims: Sequence[int]) -> str:
    named = [", ".join(map(str, items[:6])) + (", …" if len(items) > 6 else "") or NONE for items in (neurons, dims)]
    where = spans(sorted(set(positions)))
    return f"block {block}; sink at position {where}; super neurons {named[0]}; outlier dimensions {named[1]}"


def _seconds(part: Part) -> float:
    result = part.result
    timed = isinstance(result, (AnalysisResult, MitigationResult))
    seconds = result.seconds if timed else result.engine.get("seconds")
    return total_seconds(seconds)


def total_seconds(seconds: object) -> float:
    """Seconds, also where they are told for every step; NaN where they are not known."""
    each = list(seconds.values()) if isinstance(seconds, Mapping) else [seconds]
    known = [float(x) for x in each if isinstance(x, (int, float))]
    return sum(known) if known else float("nan")


def _time(gathered: Gathered) -> str:
    each = [_seconds(part) for part in gathered.parts]
    recorded = [mapping(entry).get("seconds") for entry in mapping(gathered.record.get("parts")).values()]
    whole = sum(x for x in recorded if isinstance(x, (int, float))) or sum(x for x in each if x == x)
    text = seconds_text(whole)
    return f"{text} for {len(each)} parts" if len(each) > 1 else text


def parts(gathered: Gathered) -> list[list[str]]:
    """A row for every part: name, what it is, prompts, seconds."""
    rows = []
    for part in gathered.parts:
        kind = part.result.title if isinstance(part.result, AnalysisResult) else kind_of(part.result)
        rows.append(
            [part.name, str(kind), _prompts(mapping(part.result.config), {}) or NONE, seconds_text(_seconds(part))]
        )
    return rows


def cost(result: ChainResult) -> Facts:
    """What a chain took."""
    engine = result.engine
    seconds = float(engine["seconds"])
    rate = f"{number(engine['n_rows'] / seconds)} rows per second" if seconds > 0 else NONE
    return [
        ("Patches", [f"{engine['n_patches']:,}"]),
        ("Patched rows", [f"{engine['n_rows']:,}"]),
        ("Forward passes", [f"{engine['n_forwards']:,}"]),
        ("Time", [f"{seconds_text(seconds)} ({rate})"]),
        ("Peak memory", [bytes_text(engine.get("peak_bytes"))]),
        ("Forward pass", [_path(engine)]),
    ]


def _path(engine: Mapping[str, Any]) -> str:
    """Which pass the patches ran through, and why if it was the slower one; earlier versions did not note it."""
    names = {"packed": "sinklens's own", "model": "TransformerLens's, more slowly"}
    why = f": {engine['reason']}" if engine.get("reason") else ""
    return names.get(str(engine.get("path")), NONE) + why


def settings(config: Mapping[str, Any]) -> Facts:
    """Everything that was chosen."""
    return [(str(name), [_setting(value)]) for name, value in config.items() if name not in ("command", "options")] + [
        (str(name), [_setting(value)]) for name, value in mapping(config.get("options")).items()
    ]


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        numbers = bool(value) and all(isinstance(item, int) for item in value)
        return spans(value) if numbers else ", ".join(str(item) for item in value) or NONE
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_setting(item)}" for name, item in value.items()) or NONE
    return NONE if value is None else str(value)


def whole_command(gathered: Gathered) -> str:
    """The command that made the run as a whole; empty where none is known."""
    record = gathered.record
    return str(record.get("command") or mapping(record.get("config")).get("command") or "")


def reproduce(result: ChainResult | Circuit | AnalysisResult) -> str:
    """The command that made a result, or what does the same when it was not made by a command of its own."""
    if result.config.get("command"):
        return str(result.config["command"])
    if isinstance(result, Circuit):
        return _circuit_code(result)
    return _chain_code(result) if isinstance(result, ChainResult) else _analysis_command(result)


def _batch(config: Mapping[str, Any]) -> str:
    n, length, source = config.get("n_prompts"), config.get("length"), str(config.get("prompts"))
    bos = "" if _bos(config) is None else f", prepend_bos={_bos(config)!r}"
    if source == "passages":
        return f"sl.prompts.natural(model, n={n}, length={length}{bos})"
    if source.startswith("random_tokens("):
        return f"sl.prompts.random_tokens(model, n={n}, length={length}, seed={config.get('seed')}{bos})"
    return f"...  # {n} prompts of {length} tokens: {source!r}"


def _bos(config: Mapping[str, Any]) -> str | None:
    """What has to be asked of the BOS for the same prompts; None where that is the default."""
    asked = config.get("bos")
    return asked if asked in ("always", "never") else None


def _setup(result: Result) -> str:
    provenance = result.provenance
    dtype = str(provenance.get("dtype", "float32"))
    return (
        "import sinklens as sl\n\n"
        f"model = sl.load_model({_model(str(provenance.get('model', '')))!r}, dtype={dtype!r})\n"
        f"batch = {_batch(result.config)}\n"
    )


def _model(title: str) -> str:
    """What ``load_model`` calls the model of that title."""
    return next((name for name, source in REGISTRY.items() if source.title == title), title)


def _chain_code(result: ChainResult) -> str:
    config = result.config
    options = {"target": config["target"]}
    if not is_natural(config):
        options |= {"pair": config["pair"], "pair_layers": config["pair_layers"]}
        options |= {"strength": config["strength"]} if config["strength"] is not None else {}
    options |= {} if result.metric == METRIC else {"metric": result.metric}
    names = ["control_draws", "min_gap", "seed"]
    options |= {"readout_blocks": len(config["readout_layers"])} | {name: config[name] for name in names}
    options |= {"loss": True} if config.get("loss") else {}
    arguments = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    return f"{_setup(result)}result = sl.run_chain(\n    model,\n    batch,\n{arguments})"


def _circuit_code(result: Circuit) -> str:
    config = result.config
    names = ["target", "share", "steps", "sample", "control_draws", "min_gap", "seed"]
    arguments = "".join(f"    {name}={config[name]!r},\n" for name in names if name in config)
    return f"{_setup(result)}circuit = sl.circuit(\n    model,\n    batch,\n{arguments})"


def _analysis_command(result: AnalysisResult) -> str:
    config = result.config
    options, given = mapping(config.get("options")), mapping(config.get("given"))
    source = str(config.get("prompts"))
    prompts = "random" if source.startswith("random_tokens(") else source
    known = {"layer": "block", "super_neurons": "super-neurons", "outlier_dims": "outlier-dims"}
    plain = prompts in ("passages", "random") and set(given) <= set(known)
    if not (plain and result.name in list_analyses(alone=True)):
        return _analysis_code(result, options, given)
    words = ["sinklens", "analyse", result.name, "--model", _model(str(result.provenance.get("model", "")))]
    named = {
        "n": config.get("n_prompts"),
        "length": config.get("length"),
        "prompts": prompts,
        "seed": config.get("seed"),
        **({} if _bos(config) is None else {"bos": _bos(config)}),
    }
    named |= {known[name]: value for name, value in given.items()} | {"dtype": result.provenance.get("dtype")}
    for name, value in {**named, **{name.replace("_", "-"): value for name, value in options.items()}}.items():
        words += _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
    return [f"--{name}", text] if text else []


def _analysis_code(result: AnalysisResult, options: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    arguments = "".join(f", {name}={_literal(value)}" for name, value in options.items())
    where = result.name if result.name in list_analyses(alone=True) else f"{result.name}.py"
    extra = f", given={dict(given)!r}" if given else ""
    return (
        f"{_setup(result)}study = sl.Study(model, batch, seed={result.config.get('seed')!r}{extra})\n"
        f"analysis = sl.analysis.load_analysis({where!r})\n"
        f"result = sl.run_analysis(analysis, study{arguments})"
    )


def _literal(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else repr(value)
