"""What the report's tables say: plain rows of text, which the template escapes and lays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sinklens._format import NONE, bytes_text, effect_text, heading, interval_text, number, pretty, seconds_text, spans
from sinklens._verdicts import CLOSE, HALF, Finding, findings
from sinklens.formation import Formation
from sinklens.results import ChainResult
from sinklens.viz import directions

MARKS = {"agrees": "✓", "beyond": "↑", "partly": "≈", "unclear": "?", "against": "✗"}
"""A sign for each verdict, so that colour is never the only difference."""


@dataclass(frozen=True)
class Table:
    """A plain table."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]


def sections(result: ChainResult) -> dict[str, Any]:
    """Everything but the figures and the summary, by the names that the template uses."""
    config, model = result.config, str(result.provenance.get("model", "model"))
    natural = config["pair"] == "natural"
    return {
        "title": f"{model}, {'natural sink' if natural else 'target ' + str(config['target'])}",
        "subtitle": _subtitle(result),
        "natural": natural,
        "directions": directions(result.scores),
        "close": f"{CLOSE:g}",
        "half": f"{HALF:g}",
        "stages": stages(result),
        "matrix_directions": directions(result.matrix),
        "formation": formation(result),
        "checks": checks(result),
        "cost": cost(result),
        "provenance": provenance(result),
        "versions": [(name, str(text)) for name, text in result.provenance.get("versions", {}).items()],
        "config": [(name, _setting(value)) for name, value in config.items() if name != "command"],
        "reproduce": reproduce(result),
    }


def _subtitle(result: ChainResult) -> str:
    config = result.config
    made = "the sink that the data has" if config["pair"] == "natural" else pretty(config["pair"])
    return (
        f"{made[:1].upper()}{made[1:]}; formation block {result.formation.layer}; {config['n_prompts']} prompts of "
        f"{config['length']} tokens from {config['prompts']}; {result.provenance.get('dtype', '')}"
    )


def stages(result: ChainResult) -> list[dict[str, Any]]:
    """Per stage: name, claim, blocks, and a row for every edit and direction with its controls."""
    found, listed = findings(result), []
    for stage, rows in result.scores.groupby("stage", sort=False):
        mine = [item for item in found if item.stage == stage]
        own = [item for item in mine if not item.control]
        transplant = rows[(rows.edit == "transplant") & (rows.control == "")]
        first = (transplant if len(transplant) else rows).iloc[0]
        listed.append(
            {
                "name": heading(stage),
                "claim": result.config.get("claims", {}).get(str(stage), ""),
                "layers": _where(first),
                "edits": [
                    {"name": pretty(edit), "rows": [_row(item, mine) for item in own if item.edit == edit]}
                    for edit in dict.fromkeys(item.edit for item in own)
                ],
            }
        )
    return listed


def _where(row: pd.Series) -> str:
    layers = list(row.layers)
    text = f"block {layers[0]}" if len(layers) == 1 else f"blocks {spans(layers)}"
    units = row.get("units")
    if units is None or not np.ndim(units):
        return text
    shown = ", ".join(str(unit) for unit in list(units)[:8]) + (", …" if len(units) > 8 else "")
    return f"{text}, units {shown}"


def _row(item: Finding, mine: list[Finding]) -> dict[str, Any]:
    controls = [c for c in mine if c.control and (c.edit, c.direction) == (item.edit, item.direction)]
    return {
        **_cell(item),
        "direction": item.direction,
        "controls": [{**_cell(c), "name": pretty(c.control)} for c in controls],
    }


def _cell(item: Finding) -> dict[str, Any]:
    return {
        "effect": effect_text(item.effect),
        "interval": interval_text(item.low, item.high),
        "predicted": number(item.predicted),
        "verdict": item.verdict,
        "mark": MARKS.get(item.verdict, ""),
        "n": item.n,
        "n_excluded": item.n_excluded,
    }


def formation(result: ChainResult) -> dict[str, Any]:
    """Where the sink forms: positions and three tables."""
    found = result.formation
    return {
        "layer": found.layer,
        "positions": spans(sorted(set(found.sink_positions))),
        "tables": [_events(found), _super_neurons(found), _outlier_dims(found)],
    }


def _events(found: Formation) -> Table:
    rows = [
        [
            f"{e.layer} (explained)" if e.layer == found.layer else str(e.layer),
            *map(number, (e.norm_before, e.norm_after, e.ratio_before, e.ratio_after, e.mlp_norm, e.attn_norm)),
        ]
        for e in found.events
    ]
    head = ["Block", "Norm before", "Norm after", "Ratio before", "Ratio after", "MLP output", "Attention output"]
    return Table(
        "Formation blocks", "Norms of the sink token, and their ratio to the median of the others.", head, rows
    )


def _super_neurons(found: Formation) -> Table:
    rows = [
        [
            str(n.index),
            "no gate" if n.gate_z is None else number(n.gate_z),
            *map(number, (n.up_z, n.activation_sink, n.activation_other)),
        ]
        for n in found.super_neurons
    ]
    head = ["Neuron", "z of |W_gate|", "z of |W_up|", "On the sink", "On others (95%)"]
    return Table(
        f"Super neurons of block {found.layer}", "Robust z of their weight norms, and their activations.", head, rows
    )


def _outlier_dims(found: Formation) -> Table:
    rows = [[str(dim.index), number(dim.written), number(dim.z)] for dim in found.outlier_dims]
    caption = "What the super neurons write there on the sink token."
    return Table("Outlier dimensions", caption, ["Dimension", "Written", "Robust z"], rows)


def checks(result: ChainResult) -> dict[str, Any]:
    """What else the pair changes: a row for every quantity, a column for every place and run."""
    table = result.checks
    runs = [name for name in table.columns if name not in ("quantity", "where", "layers")]
    places = list(dict.fromkeys(table["where"])) if len(table) else []
    rows = []
    for quantity, group in table.groupby("quantity", sort=False) if len(table) else ():
        found = {record["where"]: record for record in group.to_dict("records")}
        values = [number(found[place][run]) if place in found else NONE for place in places for run in runs]
        rows.append([heading(quantity), spans(group.iloc[0].layers), *values])
    return {"runs": [pretty(run) for run in runs], "places": [heading(place) for place in places], "rows": rows}


def cost(result: ChainResult) -> list[tuple[str, str]]:
    """What the run took."""
    engine = result.engine
    seconds = float(engine["seconds"])
    rate = f"{number(engine['n_rows'] / seconds)} rows per second" if seconds > 0 else NONE
    return [
        ("Patches", f"{engine['n_patches']:,}"),
        ("Patched rows", f"{engine['n_rows']:,}"),
        ("Forward passes", f"{engine['n_forwards']:,}"),
        ("Time", f"{seconds_text(seconds)} ({rate})"),
        ("Peak memory", bytes_text(engine.get("peak_bytes"))),
    ]


def provenance(result: ChainResult) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    named = {
        "model": "Model", "weight_digest": "Digest of the weights", "prompts_digest": "Digest of the prompts",
        "device": "Device", "dtype": "Dtype", "git_commit": "Commit of sinklens",
    }  # fmt: skip
    return [(text, str(result.provenance.get(key) or NONE)) for key, text in named.items()]


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        numbers = all(isinstance(item, int) for item in value)
        return spans(value) if numbers else ", ".join(str(item) for item in value)
    return NONE if value is None else str(value)


def reproduce(result: ChainResult) -> str:
    """The command that made the run, or the same in Python when it was not made by a command."""
    config = result.config
    if config.get("command"):
        return str(config["command"])
    source, model = str(config["prompts"]), result.provenance.get("model", "")
    makers = {
        "passages": f"sl.prompts.natural(model, n={config['n_prompts']}, length={config['length']})",
    }
    batch = makers.get(source, f"...  # {config['n_prompts']} prompts of {config['length']} tokens: {source!r}")
    names = ["control_draws", "min_gap", "seed"]
    given = {"target": config["target"]}
    if config["pair"] != "natural":
        given |= {"pair": config["pair"], "pair_layers": config["pair_layers"]}
        given |= {"strength": config["strength"]} if config["strength"] is not None else {}
    given |= {"readout_blocks": len(config["readout_layers"])} | {name: config[name] for name in names}
    arguments = "".join(f"    {name}={value!r},\n" for name, value in given.items())
    return (
        "import sinklens as sl\n\n"
        f"model = sl.load_model({str(model)!r}, dtype={result.provenance.get('dtype', 'float32')!r})\n"
        f"batch = {batch}\n"
        f"result = sl.run_chain(\n    model,\n    batch,\n{arguments})"
    )
