"""Is the sink's normalised input nearly a constant along its outlier dimensions, and does attention need more of it?

    python analyses/rmsnorm_filter.py

With one dominating dimension c, ``RMSNorm(x) ~ sign(x_c) sqrt(d) e_c``: whatever else the token carries is divided
away, and every prompt's sink has nearly the same key. Two questions, in the blocks after formation:
* Constancy: the cosine of the sinks' normalised inputs (before the norm's weight) in different prompts. Pairs of
  prompts that agree up to their sink are left out: there a causal model gives the same vector anyway. A cosine of 0.9
  leaves a fifth of the energy to differ (1 - 0.9^2).
* Cause: at ``ln1.hook_normalized`` the sink's input keeps its outlier dimensions alone, rescaled to its norm, in all of
  these blocks. Of the attention that it received, more than half has to be left, and less when as many other dimensions
  are kept. This changes its query, key and value; *key alone* puts only the keys that come of it into the clean model.

Pitfall: a key of zero has scores of 0, which beat negative ones, so that a control may not fall below what *nothing*
(an input of zero) leaves; an *ordinary input*, of another position, shows how far it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, readouts, sites

CLAIM = "RMSNorm makes the sink nearly a constant along its outlier dimensions, and attention needs no more of it."
CAPTION = (
    "Attention to the sink that is left, and cosine of its key with the real one, by what its normalised input "
    "keeps in the blocks after formation: mean over prompts, and the range of 95% of them (and of the draws)."
)
OUTLIER, OTHER = "outlier dimensions", "other dimensions"
LEFT, REAL = "share of the attention left", "cosine of the key with the real one"
KEPT, CONSTANT = 0.5, 0.9

Inputs = Float[Tensor, "layer prompt d_model"]


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "how many blocks after formation", sl.Between(1)] = 4,
    draws: Annotated[int, "sets of as many other dimensions to keep instead", sl.Between(1, 1000)] = 5,
) -> sl.Findings:
    layers, dims, pairs = study.after_formation(blocks), study.formation.dims, distinct_pairs(study)
    clean = readings(study, layers)
    inputs = inputs_to_try(study, clean["inputs"], clean["elsewhere"], draws)
    patches = [replace(study, sites.LN1_NORMALIZED, layers, values) for _, values in inputs]
    keys = study.measure([readout_at("keys", sites.K, layers, study.sinks)], patches[:1])["keys"]
    patches.append(replace(study, sites.K, layers, keys))
    names = np.array([*(name for name, _ in inputs), "outliers, key alone"])
    outcome = outcomes(study, patches, clean["keys"])  # [quantity, patch, prompt]
    left, real = (
        {name: study.mean(values[names == name].mean(0)) for name in dict.fromkeys(names)} for values in outcome
    )
    share, control, constant = left[OUTLIER], left[OTHER], constancy(study, clean["inputs"], pairs)
    place = f"blocks {layers[0]} to {layers[-1]}", f"{len(dims)} of {study.shape.d_model}", draws
    few = along_outlier_dims(share, control, *place)
    verdict = sl.analysis.verdict_of(CLAIM, [few, *is_constant(study, constant)])
    numbers = {
        "cosine between the normalised inputs of different prompts' sinks": constant,
        "the same of ordinary positions": constancy(study, clean["elsewhere"], ~np.eye(study.batch.n, dtype=bool)),
        "cosine between the keys of different prompts' sinks": constancy(study, clean["keys"], pairs),
        "the outlier dimensions' share of the energy": study.mean(metrics.energy_share(clean["inputs"], dims).mean(0)),
        f"{REAL}: {OUTLIER}": real[OUTLIER],
    }
    numbers |= {f"{LEFT}: {name}": estimate for name, estimate in left.items()}
    axes = {"quantity": (LEFT, REAL), "patch": range(len(names)), "prompt": range(study.batch.n)}
    table = sl.analysis.tidy(outcome, axes)
    return sl.Findings(verdict, table.assign(kept=names[table["patch"]]), CAPTION, numbers)


def along_outlier_dims(
    share: sl.Estimate, control: sl.Estimate, blocks: str, kept: str, draws: int
) -> sl.analysis.Part:
    """Do the outlier dimensions do alone what the whole input does?"""
    return sl.analysis.judge(
        "cause",
        "along the outlier dimensions",
        "Attention to the sink needs no more of its normalised input than the outlier dimensions.",
        statistic=f"share of the attention to the sink that is left in {blocks} when its "
        f"normalised input keeps nothing but its outlier dimensions ({kept})",
        estimate=share,
        control=f"as many other dimensions kept, {draws} draws",
        control_estimate=control,
        rule=f"holds when the whole interval of the share lies above {KEPT} and the control's below",
        conditions=[sl.analysis.above(share, KEPT), sl.analysis.below(control, KEPT)],
    )


def is_constant(study: sl.Study, cosine: sl.Estimate) -> list[sl.analysis.Part]:
    """Is the input nearly a constant vector, and does a constant one do as well?"""
    sentence = "The norm turns the sink's input into nearly a constant vector."
    stage = sl.stages.RMSNORM_FILTER
    return [
        sl.analysis.judge(
            "quantity",
            "nearly constant",
            sentence,
            statistic="cosine between the normalised inputs of different prompts' sinks, mean over pairs and blocks",
            estimate=cosine,
            rule=f"holds when the whole interval lies above {CONSTANT}",
            conditions=[sl.analysis.above(cosine, CONSTANT)],
        ),
        sl.analysis.cause(study, stage, "constant_input", "ordinary_input", name="constant input", sentence=sentence),
        sl.analysis.cause(
            study,
            stage,
            "largest_dims",
            "other_dims",
            name="largest dimensions",
            sentence="Of that vector a few dimensions are enough, those that attention weighs most.",
        ),
    ]


def readout_at(name: str, site: sl.HookSite, layers: tuple[int, ...], where: Int[Tensor, " prompt"]) -> sl.Readout:
    """The activation at one position of every prompt."""
    return sl.Readout(name, site, layers, lambda act, rows: readouts.at_position(act, site, rows, where).float())


def readings(study: sl.Study, layers: tuple[int, ...]) -> dict[str, Float[Tensor, "layer prompt *unit d"]]:
    """In the clean run the normalised inputs and the keys of the sinks, and the inputs of ordinary positions."""
    study.require("norm_before_attention", layers)
    ordinary = study.ordinary_position("rmsnorm_filter/ordinary")
    return study.measure(
        [
            readout_at("inputs", sites.LN1_NORMALIZED, layers, study.sinks),
            readout_at("elsewhere", sites.LN1_NORMALIZED, layers, ordinary),
            readout_at("keys", sites.K, layers, study.sinks),
        ]
    )


def inputs_to_try(study: sl.Study, x: Inputs, elsewhere: Inputs, draws: int) -> list[tuple[str, Inputs]]:
    """What the sink's normalised input is replaced by, and its name; that of the verdict comes first."""
    dims = study.formation.dims
    return [
        (OUTLIER, keep(x, dims)),
        ("strongest one", keep(x, dims[:1])),
        ("nothing", torch.zeros_like(x)),
        ("all but outliers", keep(x, dims, but=True)),
        ("ordinary input", elsewhere),
        ("mean over prompts", x.mean(1, keepdim=True).expand_as(x)),
        *((OTHER, keep(x, other)) for other in study.other_dims("rmsnorm_filter/others", draws)),
    ]


def keep(x: Inputs, dims: Sequence[int], but: bool = False) -> Inputs:
    """``x`` with some dimensions alone (``but``: without them), scaled to its own norm (zero where these are)."""
    marks = torch.full(x.shape[-1:], float(but)).index_fill(0, torch.tensor(dims), float(not but))
    return torch.nn.functional.normalize(x * marks, dim=-1) * x.norm(dim=-1, keepdim=True)


def replace(study: sl.Study, site: sl.HookSite, layers: tuple[int, ...], values: Tensor) -> sl.Patch:
    """Put ``values`` ``[layer, prompt, ...]`` at the sink."""
    edit = edits.PerPrompt("kept", dict(zip(layers, values, strict=True)))
    return sl.Patch(site, layers, study.sink, edit, allow_unchanged=True)


def outcomes(
    study: sl.Study, patches: Sequence[sl.Patch], keys: Float[Tensor, "layer prompt kv_head d_head"]
) -> Float[Tensor, "quantity patch prompt"]:
    """Share of the attention that is left, and cosine of the key with ``keys``."""
    layers = patches[0].layers

    def cosine(act: Tensor, rows: sl.Rows) -> Tensor:
        key = readouts.at_position(act, sites.K, rows, study.sinks)
        return metrics.cosine(key, keys[layers.index(rows.layer)].to(key.device)[rows.prompts]).mean(-1)

    attention = readouts.attention_received("attention", layers, study.sink, study.batch.n)
    effects = study.run(patches, [attention, sl.Readout("cosine", sites.K, layers, cosine)])
    return torch.stack([effects.values["attention"] / effects.runs["base"]["attention"], effects.values["cosine"]])


def distinct_pairs(study: sl.Study) -> Bool[np.ndarray, "prompt prompt"]:
    """Marks the pairs of prompts that differ up to their sinks."""
    starts = [tuple(row[: sink + 1].tolist()) for row, sink in zip(study.batch.tokens, study.sinks, strict=True)]
    pairs = np.array([[a != b for a in starts] for b in starts])
    if not pairs.any():
        raise sl.NotApplicableError("all prompts are the same up to their sink (BOS?), so its constancy says nothing")
    return pairs


def constancy(
    study: sl.Study, x: Float[Tensor, "layer prompt *unit d"], pairs: Bool[np.ndarray, "prompt prompt"]
) -> sl.Estimate:
    """Mean cosine over pairs of prompts, blocks and heads."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1).flatten(2)
    similarity = (unit @ unit.mT).mean(0).numpy() / x[0, 0, ..., 0].numel()  # mean over heads, where there are some

    def statistic(prompts: np.ndarray) -> float:
        block = np.ix_(prompts, prompts)
        return float(similarity[block][pairs[block]].mean()) if pairs[block].any() else np.nan

    return study.bootstrap(statistic)


def draw(findings: sl.Findings):
    bars = sl.analysis.mean_and_range(findings.table, ["quantity", "kept"])
    titles = {"kept": "what it keeps", "mean": "share, cosine", "quantity": ""}
    return sl.viz.bars(bars, "kept", "mean", series="quantity", low="low", high="high", titles=titles)


ANALYSIS = sl.Analysis(
    name="rmsnorm_filter",
    title="RMSNorm as a directional filter",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="its account of how the norm makes the sink's key nearly constant",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
