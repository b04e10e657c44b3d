"""The mitigations by name, each with a control of equal size. A new one is a :class:`Mitigation`, made known with
:func:`register_mitigation`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from sinklens import interventions as act
from sinklens.errors import NotApplicableError
from sinklens.interventions.massive_activations import MassiveMode
from sinklens.interventions.softening import RATE
from sinklens.mitigation.base import Fitted, Mitigation, Sample, count
from sinklens.models.view import model_id, model_shape
from sinklens.records.registry import check_kind, enter
from sinklens.records.text import number

KIND = "a mitigation"
"""What the registry calls them."""
MITIGATIONS: dict[str, Mitigation] = {}
"""Mitigations by name."""
DEFAULT = ("massive-zero", "massive-mean", "softening", "bias", "eviction", "streaming", "silence")
"""Those that are run when nothing else is asked for: one of every family that takes no search."""
SEARCHED = 4
"""Prompts of the sample that heads are searched on, which costs a pass for each candidate."""


def register_mitigation(mitigation: Mitigation) -> Mitigation:
    """Make a mitigation known by its name.

    Raises:
        ValueError: the name is taken.
    """
    check_kind(KIND, mitigation, Mitigation)
    return enter(MITIGATIONS, KIND, mitigation.name, mitigation)


def _massive(sample: Sample, mode: MassiveMode) -> Fitted:
    found = sample.massive
    becomes = {"zero": "0", "mean": "their mean", "clamp": f"at most {number(found.ordinary)}"}[mode]
    # Entries of median size lie within the clamp: there the control sets them to zero, as "zero" does.
    other: MassiveMode = "zero" if mode == "clamp" else mode
    return Fitted(
        lambda _: act.massive_activations(found, mode),
        lambda _: act.massive_activations(found, other, control=True),
        f"dimensions {', '.join(map(str, found.dims))} behind block {found.layer} become {becomes}",
        f"as many of median size: dimensions {', '.join(map(str, found.median_dims))}",
    )


def _softening(sample: Sample, by: Literal["activation", "weight"]) -> Fitted:
    model, block = sample.model, sample.formation.layer
    soften = partial(act.soften, model, block, seed=sample.seed)
    share = f"{RATE:.0%} of the dimensions"
    return Fitted(
        lambda sinks: soften(sinks, by=by),
        lambda sinks: soften(sinks, by="random"),
        f"{share} of the sink, by {by}, are 0 in front of attention in blocks {block} and later",
        f"{share}, drawn",
    )


def _calibration(sample: Sample, spare: tuple[int, ...]) -> Fitted:
    heads = act.search_heads(sample.model, sample.batch.subset(range(min(SEARCHED, sample.batch.n))), spare=spare)
    if not heads:
        raise NotApplicableError(
            f"{model_id(sample.model)}: no head lowers the loss when its attention is calibrated, so that there are "
            "none to calibrate"
        )
    return Fitted(
        lambda _: act.calibrate(heads, spare=spare),
        lambda _: act.calibrate(heads, spare=spare, control=True, seed=sample.seed),
        f"{count(heads)}" + ("" if spare else ", the first token's attention too"),
        "as many other keys of the same heads, drawn",
    )


def _bias(sample: Sample, keys: bool, value: Literal["mean", "zero"]) -> Fitted:
    bias = act.find_bias(sample.model, sample.batch, sample.sinks)
    ordinary = _ordinary(sample)
    elsewhere = act.find_bias(sample.model, sample.batch, (ordinary,))
    said = "its value is 0" if value == "zero" else "its key and value are their means"
    return Fitted(
        lambda sinks: act.bias_keys_values(bias, sinks, keys=keys, value=value),
        lambda _: act.bias_keys_values(elsewhere, (ordinary,), keys=keys, value=value),
        f"{said} in every head",
        f"the same at position {ordinary}",
    )


def _ordinary(sample: Sample) -> int:
    """A position that is no prompt's sink: a quarter into the prompts, where most later queries see it."""
    sinks, quarter = set(sample.formation.sink_positions), sample.batch.length // 4
    return next(position for position in range(max(1, quarter), sample.batch.length) if position not in sinks)


def _eviction(sample: Sample, first: int) -> Fitted:
    window = sample.window
    evict = partial(act.evict, sample.model)
    # As many keys in the cache: with the first ones, where they go; without them, where they stay.
    if first:
        control, told = lambda _: evict(window + first, 0), "as many keys, all of them recent"
    else:
        control, told = lambda _: evict(max(window - 1, 0), 1), "as many keys, one of them the first"
    kept = f"{first} first keys and " if first else ""
    return Fitted(lambda _: evict(window, first), control, f"{kept}the last {window}", told)


def _silence(sample: Sample) -> Fitted:
    found, gate = sample.sink_heads, partial(act.gate_heads, sample.model)
    return Fitted(
        lambda _: gate(found.heads),
        lambda _: gate(found.others),
        f"{count(found.heads)} write nothing",
        "as many other heads of the same blocks, those that attend to the first token least",
    )


def _dark(sample: Sample) -> Fitted:
    rank = act.dark_basis(sample.model).shape[1]
    remove = partial(act.remove_dark_subspace, sample.model, seed=sample.seed)
    return Fitted(
        lambda _: remove(),
        lambda _: remove(control=True),
        f"the last {rank} of {model_shape(sample.model).d_model} singular directions of the unembedding",
        f"{rank} random directions",
    )


SUN = "Sun et al., COLM 2024"
XIAO = "Xiao et al., ICLR 2024"
for _mitigation in (
    Mitigation("massive-zero", "Massive activations to zero", partial(_massive, mode="zero"), SUN),
    Mitigation("massive-mean", "Massive activations to their mean", partial(_massive, mode="mean"), SUN),
    Mitigation("massive-clamp", "Massive activations clamped", partial(_massive, mode="clamp"), SUN),
    Mitigation("softening", "Softening", partial(_softening, by="activation"), "arXiv 2605.08504, ICML 2026"),
    Mitigation("softening-weight", "Softening by weight", partial(_softening, by="weight"), "the same"),
    Mitigation("act", "Attention calibration", partial(_calibration, spare=(0,)), "Yu et al., ICML 2024"),
    Mitigation("act-first", "Calibration of the first token too", partial(_calibration, spare=()), "ours, after ACT"),
    Mitigation("bias", "Key and value biases", partial(_bias, keys=True, value="mean"), SUN),
    Mitigation("value-zero", "The sink's value to zero", partial(_bias, keys=False, value="zero"), "ours"),
    Mitigation("eviction", "A window of recent keys", partial(_eviction, first=0), XIAO),
    Mitigation("streaming", "A window and the first keys", partial(_eviction, first=4), XIAO),
    Mitigation("silence", "Sink heads silenced", _silence, "Gu et al., ICLR 2025 (the heads)"),
    Mitigation("dark", "The dark subspace removed", _dark, "Cancedda, ACL 2024"),
):
    register_mitigation(_mitigation)
