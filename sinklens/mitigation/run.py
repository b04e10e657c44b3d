"""Fit mitigations on some prompts, measure what they cost on others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.run import Progress
from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation, find_formation
from sinklens.interventions import Hooks
from sinklens.interventions.harm import Harm, measure_harm
from sinklens.mitigation.base import Fitted, Mitigation, Sample
from sinklens.mitigation.generation import continued, told
from sinklens.mitigation.known import DEFAULT, MITIGATIONS
from sinklens.mitigation.result import UNTOUCHED, MitigationResult, Row, Said
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.patches import Positions
from sinklens.prompts import PromptBatch
from sinklens.study import provenance

CONTROL = "/control"


@in_usual_state
def mitigate(
    model: Model,
    batch: PromptBatch,
    what: Sequence[str | Mitigation] = DEFAULT,
    *,
    fit: PromptBatch | int | None = None,
    window: int | None = None,
    generate: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> MitigationResult:
    """Take the sink away in several ways, and measure each in the same way, beside a control of equal size.

    Means, heads and dimensions are fitted on some prompts, and the cost is measured on others. Of the measured prompts
    only where their sinks are is looked for.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        batch: the prompts.
        what: names of :data:`MITIGATIONS`, or mitigations.
        fit: the prompts to fit on, or how many of ``batch`` are taken for it: by default a quarter, the first. No text
            is on both sides.
        window: recent keys that eviction keeps; a quarter of the prompts' length by default.
        generate: tokens to generate after the first half of the first measured prompt; 0 for none.
        seed: fixes what is drawn, and the resamples of intervals.
        progress: called with (prompts done, in all) while they are measured.
        step: called with what is done next.

    Raises:
        InputError: an unknown name, or one that is given twice; too few prompts.
        NoSinkError: there is no sink to take away.
        NotApplicableError: none of them can be done to this model.
    """
    began = time.perf_counter()
    chosen, (fitted_on, measured) = _chosen(what), _split(batch, fit)
    window = max(1, batch.length // 4) if window is None else window
    step("looking for the sink")
    formation = find_formation(model, fitted_on, super_neurons=(), outlier_dims=())
    sinks = _sinks(model, measured, formation)
    sample = Sample(model, fitted_on, formation, window, seed)
    fits, left_out = _fitted(chosen, sample, step)
    hooks = {name: each.hooks(sinks) for name, each in fits.items()}
    hooks |= {name + CONTROL: each.control(sinks) for name, each in fits.items()}
    step(f"measuring {len(fits)} mitigations")
    harms = measure_harm(model, measured, hooks, seed=seed, brief=[name + CONTROL for name in fits], step=progress)
    step("generating")
    said = _said(model, measured, fits, sinks, generate)
    record = batch.record() | {"n_fitted": fitted_on.n, "n_prompts": measured.n, "window": window, "seed": seed}
    record |= {"what": list(chosen), "generate": generate, "fitted_on": fitted_on.source}
    return MitigationResult(
        tuple(
            Row(name, chosen[name].title, chosen[name].source, each.said, each.control_said)
            for name, each in fits.items()
        ),
        _values(harms, fits),
        said,
        left_out,
        measured.groups if measured.is_grouped else None,
        record | {"formation_block": formation.layer},
        provenance(model, measured),
        time.perf_counter() - began,
    )


def _chosen(what: Sequence[str | Mitigation]) -> dict[str, Mitigation]:
    """The mitigations by name.

    Raises:
        InputError: an unknown name, one that is given twice, or none.
    """
    found: dict[str, Mitigation] = {}
    for each in [what] if isinstance(what, str | Mitigation) else what:
        if not isinstance(each, Mitigation) and each not in MITIGATIONS:
            raise InputError(f"mitigation {each!r} is not known: choose from {', '.join(MITIGATIONS)}")
        mitigation = each if isinstance(each, Mitigation) else MITIGATIONS[each]
        if mitigation.name in found or mitigation.name == UNTOUCHED:
            raise InputError(f"mitigation {mitigation.name!r} is given twice, or is none: give each once")
        found[mitigation.name] = mitigation
    if not found:
        raise InputError(f"no mitigation is given: choose from {', '.join(MITIGATIONS)}")
    return found


def _split(batch: PromptBatch, fit: PromptBatch | int | None) -> tuple[PromptBatch, PromptBatch]:
    """The prompts to fit on, and those to measure: no text on both sides.

    Raises:
        InputError: there are too few.
    """
    if isinstance(fit, PromptBatch):
        if fit.length != batch.length:
            raise InputError(f"the prompts to fit on have {fit.length} tokens, the others {batch.length}: give as many")
        return fit, batch
    wanted = max(1, batch.n // 4) if fit is None else fit
    order = list(dict.fromkeys(batch.groups))
    texts: set[str] = set()
    for text in order:
        if sum(group in texts for group in batch.groups) >= wanted:
            break
        texts.add(text)
    inside = [group in texts for group in batch.groups]
    if wanted < 1 or sum(not one for one in inside) < 1 or not any(inside):
        raise InputError(
            f"mitigations are fitted on some prompts and measured on others, of other texts, and {batch.source} has "
            f"{batch.n} of {batch.n_groups}: bring more, or prompts to fit on"
        )
    return batch.subset(inside), batch.subset([not one for one in inside])


def _sinks(model: Model, measured: PromptBatch, formation: Formation) -> Positions:
    """The sink of every prompt that is measured."""
    found = find_formation(model, measured, layer=formation.layer, super_neurons=(), outlier_dims=())
    return Positions.one_each(found.sink_positions)


def _fitted(
    chosen: Mapping[str, Mitigation], sample: Sample, step: Callable[[str], None]
) -> tuple[dict[str, Fitted], dict[str, str]]:
    fits, left_out = {}, {}
    for name, mitigation in chosen.items():
        step(f"fitting {name}")
        try:
            fits[name] = mitigation.fit(sample)
        except NotApplicableError as error:
            left_out[name] = str(error)
    if not fits:
        raise NotApplicableError("; ".join(left_out.values()))
    return fits, left_out


def _values(harms: Mapping[str, Harm], fits: Mapping[str, Fitted]) -> pd.DataFrame:
    first = next(iter(harms.values()))
    measured = [(UNTOUCHED, False, first.before)]
    measured += [(name, False, harms[name].after) for name in fits]
    measured += [(name, True, harms[name + CONTROL].after) for name in fits]
    return pd.DataFrame(
        {"mitigation": name, "control": control, "prompt": prompt, "quantity": quantity, "value": value}
        for name, control, values in measured
        for quantity, each in values.items()
        for prompt, value in enumerate(each.tolist())
    )


def _said(model: Model, batch: PromptBatch, fits: Mapping[str, Fitted], sinks: Positions, n: int) -> tuple[Said, ...]:
    """What follows the first half of the first prompt, as the model is and under each mitigation."""
    if n < 1:
        return ()
    half: Int[Tensor, " pos"] = batch.tokens[0, : max(1, batch.length // 2)]
    there = sinks.prompts(0, 1)
    if there.at(0)[0] >= len(half):
        return ()
    runs: dict[str, Hooks] = {UNTOUCHED: [], **{name: each.hooks(there) for name, each in fits.items()}}
    text = told(model, half)
    return tuple(Said(name, 0, text, told(model, continued(model, half, hooks, n))) for name, hooks in runs.items())
