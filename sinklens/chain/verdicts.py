"""What a run's numbers say about the claim, in words: every sentence is computed, none is a foregone conclusion.

An effect *agrees* with its prediction when it is within ``CLOSE`` of it, agrees *partly* up to ``HALF``, and speaks
*against* it beyond that: it is then nearer to the opposite outcome. An effect that overshoots a predicted 1 is *beyond*
it. When the 95% interval has one end that speaks against and one that does not, the verdict is *unclear*. The two
limits are choices; the numbers stand beside every verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.chain.result import METRIC, OF_LOSS, ChainResult, is_transplant
from sinklens.pairs.choice import is_natural
from sinklens.records.printable import isolated
from sinklens.records.ranges import spans
from sinklens.records.text import change_text, effect_text, join, number, pretty
from sinklens.stages.base import ExperimentKind, experiment_kind

CLOSE, HALF = 0.25, 0.5
"""Distances from the prediction: up to the first an effect agrees, above the second it speaks against."""
GOOD = ("agrees", "beyond")
"""Verdicts in favour of the claim."""
EXACT = 1e-3
"""An effect this close to 1 in its whole interval is exact up to rounding."""
ORDER = ("agrees", "beyond", "partly", "unclear", "against", "no prediction", "not measured")
"""Verdicts; of several the later one counts."""


@dataclass(frozen=True)
class Finding:
    """One effect and what it says."""

    stage: str
    """Stage."""
    edit: str
    """Edit."""
    control: str
    """What it is a control by; empty for the effect itself."""
    direction: str
    """Denoise or noise."""
    effect: float
    """Mean over prompts."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    predicted: float
    """What the claim predicts; NaN when it does not say."""
    n: int
    """Prompts in the mean."""
    n_excluded: int
    """Prompts left out."""
    loss_change: float = np.nan
    """What it does to the loss, nats per token, mean over all prompts; NaN where that was not read."""
    loss_low: float = np.nan
    """Lower end of its 95% interval."""
    loss_high: float = np.nan
    """Upper end."""

    @property
    def kind(self) -> ExperimentKind:
        """Of a transplant or of a mechanism edit; a control is of the kind of what it controls."""
        return experiment_kind(self.edit)

    @property
    def short_of(self) -> float:
        """How far the effect is from the prediction (:func:`short_of`)."""
        return short_of(self.effect, self.predicted)

    @property
    def verdict(self) -> str:
        """Agrees, beyond, partly, unclear, against, no prediction or not measured."""
        return verdict(self.effect, self.low, self.high, self.predicted)


Groups = dict[tuple[str, str], list[Finding]]
"""Findings by stage and edit."""


def verdict(effect: float, low: float, high: float, predicted: float) -> str:
    """What an effect says about a prediction (see the module's docstring)."""
    if not np.isfinite(effect):
        return "not measured"
    if not np.isfinite(predicted):
        return "no prediction"
    ends = [_against(end, predicted) for end in (low, high) if np.isfinite(end)]
    if any(ends) and not all(ends):
        return "unclear"
    if _against(effect, predicted):
        return "against"
    if predicted > 0 and effect > predicted + CLOSE:
        return "beyond"
    return "agrees" if abs(effect - predicted) <= CLOSE else "partly"


def _against(effect: float, predicted: float) -> bool:
    return short_of(effect, predicted) > HALF


def short_of(effect: float, predicted: float) -> float:
    """How far an effect is from its prediction; doing more than all that was predicted does not speak against it."""
    return predicted - effect if predicted > 0 else abs(effect - predicted)


def findings(result: ChainResult) -> list[Finding]:
    """Every score as a finding, in the run's order."""
    names = ("effect", "ci_low", "ci_high", "predicted", *OF_LOSS)
    found = []
    for row in result.scores.to_dict("records"):
        effect, low, high, predicted, *loss = (np.nan if row.get(name) is None else float(row[name]) for name in names)
        stage, edit, control, direction = (str(row[name]) for name in ("stage", "edit", "control", "direction"))
        n, excluded = int(row["n"]), int(row["n_excluded"])
        found.append(Finding(stage, edit, control, direction, effect, low, high, predicted, n, excluded, *loss))
    return found


def overall(found: Sequence[Finding]) -> str:
    """The verdict of several findings: the one that speaks most against the claim."""
    return max((item.verdict for item in found), key=ORDER.index, default="not measured")


def groups(found: Sequence[Finding]) -> Groups:
    """Findings by stage and edit."""
    grouped: Groups = {}
    for item in found:
        grouped.setdefault((item.stage, item.edit), []).append(item)
    return grouped


def summary(result: ChainResult) -> tuple[str, list[tuple[str, list[str]]]]:
    """A lead sentence, and sentences each on the set-up, the transplants, the mechanisms, the controls and, where it
    was read, the loss.
    """
    found = findings(result)
    own = [item for item in found if not item.control]
    transplants = groups([item for item in own if item.kind == "transplant"])
    mechanisms = groups([item for item in own if item.kind == "mechanism"])
    exact = [stage for (stage, _), items in transplants.items() if _exact_by_construction(items, result)]
    parts = [
        ("Set-up", [_setup(result)]),
        ("Transplants", _transplants(transplants, exact)),
        ("Mechanisms", _mechanisms(mechanisms)),
        ("Controls", _controls([item for item in found if item.control])),
        ("Loss", loss_in_words(result)),
    ]
    return _lead(transplants, mechanisms, exact), [(name, text) for name, text in parts if any(text)]


def _lead(transplants: Groups, mechanisms: Groups, exact: Sequence[str]) -> str:
    sentences = []
    if transplants:
        carried = sum(overall(items) in GOOD for items in transplants.values())
        text = f"The effect passes as predicted through {carried} of {_count(len(transplants), 'stage')}"
        sentences.append(text + (f" ({len(exact)} of them by construction)" if exact else ""))
    if mechanisms:
        verdicts = [overall(items) for items in mechanisms.values()]
        good, bad = sum(v in GOOD for v in verdicts), verdicts.count("against")
        sentences.append(
            f"of {_count(len(verdicts), 'edit')} that test the mechanism the claim names, {good} came out as it "
            f"predicts, {bad} spoke against it, and {len(verdicts) - good - bad} lay in between"
        )
    text = "; ".join(sentences) or "no stage was scored"
    return f"{text[:1].upper()}{text[1:]}."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _setup(result: ChainResult) -> str:
    config, runs = result.config, result.runs
    after = f"blocks {spans(config['readout_layers'])}"
    size = f"{_count(config['n_prompts'], 'prompt')} of {config['length']} tokens"
    mean = {run: {name: float(np.mean(v)) for name, v in values.items()} for run, values in runs.items()}
    if is_natural(config):
        values = next(iter(mean.values()), {})
        against = f", ordinary positions {number(values['ordinary'])}" if "ordinary" in values else ""
        where = spans(sorted(set(result.formation.sink_positions)))
        received = f"receives {number(values.get('sink'))} of the attention of later queries in {after}"
        if result.metric != METRIC:
            received = f"has a {_name(result.metric)} of {number(values.get('sink'))} in {after}"
        return (
            f"The sink that these prompts have, at position {where}, {received}{against} (mean over {size}). There is "
            "no run without it, so it can be removed but not restored: only the noise direction exists."
        )
    means = ", ".join(f"{number(values['sink'])} in the {run} run" for run, values in mean.items() if "sink" in values)
    blocks = f" in blocks {spans(config['pair_layers'])}" if config.get("pair_layers") else ""
    measured = "Attention that it receives from later queries"
    if result.metric != METRIC:
        measured = f"Measured, {_name(result.metric)}"
    return (
        f"A sink was made at position {config['target']} by {_name(config['pair'])}{blocks}. {measured} in {after}: "
        f"{means} (mean over {size})."
    )


def _transplants(grouped: Groups, exact: Sequence[str]) -> list[str]:
    if not grouped:
        return []
    carried = [_name(stage) for (stage, _), items in grouped.items() if overall(items) in GOOD]
    short = [item for items in grouped.values() for item in items if item.verdict not in GOOD]
    beyond = [item for items in grouped.values() for item in items if item.verdict == "beyond"]
    texts = ["Through no stage does the effect pass as predicted."]
    if carried:
        texts = [f"The effect passes as predicted through {join(carried)}."]
    if short:
        texts.append(f"Not as predicted: {_listed(short)}.")
    if beyond:
        texts.append(f"More than the whole: {_listed(beyond)}.")
    if exact:
        texts.append(
            f"In {join([_name(stage) for stage in exact])} it is exactly 1 because the intervention that makes the "
            "sink acts there or just before: that checks the machinery, and is no evidence for the claim."
        )
    return texts


def _exact_by_construction(items: Sequence[Finding], result: ChainResult) -> bool:
    root = set(result.config.get("pair_layers") or ())
    rows = result.scores[(result.scores.stage == items[0].stage) & is_transplant(result.scores)]
    covers = bool(root) and root <= set(rows.iloc[0].layers)
    return covers and all(abs(x - 1) < EXACT for item in items for x in (item.effect, item.low, item.high))


def _mechanisms(grouped: Groups) -> list[str]:
    texts = []
    for wanted, lead in (
        (("against",), "Against the claim"),
        (("unclear",), "Unclear, the interval reaches over the halfway mark"),
        (("partly",), "In part as predicted"),
        (GOOD, "As predicted"),
        (("not measured", "no prediction"), "Not tested"),
    ):
        chosen = [(key, items) for key, items in grouped.items() if overall(items) in wanted]
        named = [f"{_name(edit)} of {_name(stage)} ({_numbers(items)})" for (stage, edit), items in chosen]
        if named:
            texts.append(f"{lead}: {join(named, '; ')}.")
    return texts


def _controls(found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    off = [item for item in found if item.verdict != "agrees"]
    text = f"{len(found) - len(off)} of {len(found)} controls came out as they should."
    if off:
        named = [f"{_name(i.control)} for {_name(i.edit)} of {_name(i.stage)} ({_numbers([i])})" for i in off]
        text += f" Not so: {join(named, '; ')}. Read the effects that they belong to with that in mind."
    return [text]


def loss_in_words(result: ChainResult) -> list[str]:
    """What ablating the super neurons costs, and which edit costs most; nothing where the loss was not read."""
    found = [item for item in findings(result) if np.isfinite(item.loss_change)]
    own = [item for item in found if not item.control]
    if not own:
        return []
    of_super = ("super_neurons", "mechanism", "noise")
    ablated = [item for item in own if (item.stage, item.kind, item.direction) == of_super]
    sentences = []
    if ablated:
        costs = join([_loss_and_controls(item, found) for item in ablated], "; ")
        sentences.append(f"Ablating the super neurons in the run with the sink costs, in nats per token: {costs}.")
    most = max(own, key=lambda item: item.loss_change)
    if most not in ablated:
        what = f"{_name(most.edit)} of {_name(most.stage)} ({most.direction})"
        sentences.append(f"Of all edits {what} costs most, in nats per token: {_loss_and_controls(most, found, '')}.")
    return sentences


def _loss_and_controls(item: Finding, found: Sequence[Finding], name: str | None = None) -> str:
    """``zero +1.020 [0.800, 1.300] (random neurons +0.001 [−0.002, 0.003])``."""
    keys = (item.stage, item.edit, item.direction)
    controls = [other for other in found if other.control and (other.stage, other.edit, other.direction) == keys]
    beside = join([f"{_name(control.control)} {_loss_text(control)}" for control in controls])
    text = f"{_name(item.edit) if name is None else name} {_loss_text(item)}".strip()
    return f"{text} ({beside})" if beside else text


def _loss_text(item: Finding) -> str:
    return change_text(item.loss_change, item.loss_low, item.loss_high)


def _listed(found: Sequence[Finding]) -> str:
    return join([f"{_name(item.stage)} ({_numbers([item])})" for item in found], "; ")


def _numbers(found: Sequence[Finding]) -> str:
    effects = ", ".join(f"{item.direction} {effect_text(item.effect)}" for item in found)
    predicted = [number(item.predicted) for item in found if np.isfinite(item.predicted)]
    return f"{effects}; predicted {' and '.join(predicted)}" if predicted else effects


def _name(name: object) -> str:
    return isolated(pretty(name))
