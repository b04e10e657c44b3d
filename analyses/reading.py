"""Who writes what the super neurons read: attention, or the MLPs before, and in which blocks.

    python analyses/reading.py

The gate and the linear branch of the super neurons read a few directions of the residual stream that enters their MLP.
In the run in which the target is a sink that residual differs from the base run's by what attention and the MLPs of the
blocks up to formation have written differently; the rest (the embedding) is the same in both. *Amount*: how much of the
difference, seen through the norm of the run with the sink and each neuron's own weights, every writer makes. *Effect*:
what that part of the difference alone, in the directions that are read, does to attention when it is put into the base
run at the formation block.

The paper's account has W_O write what the super neurons read. The statistic is attention's share of the amount.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import pandas as pd
from torch import Tensor

import sinklens as sl
from sinklens import edits, sites

CLAIM = "What the super neurons read of a token that is a sink, W_O has written."
ATTENTION, MLPS, ALL = "attention", "MLPs", "all blocks"
SITES = {ATTENTION: sites.ATTN_OUT, MLPS: sites.MLP_OUT}
HALF = 0.5

Writers = dict[tuple[str, int], sl.HookSite]
"""By kind and block, where it writes."""


def run(
    study: sl.Study,
    *,
    target: Annotated[int, "position that is made a sink"] = 10,
    top: Annotated[int, "blocks to name, those that write most", sl.Between(1)] = 3,
) -> sl.Findings:
    (position,) = study.targets((target,))
    setting = sl.Setting.of(study, sl.PairChoice(position))
    check(setting)
    writers = writers_of(setting)
    amounts = amounts_of(setting, writers)
    table = pd.concat([amounts, effects_of(setting, writers)], ignore_index=True)
    of_attention, of_mlps = (share_of(study, amounts, kind) for kind in SITES)
    verdict = sl.analysis.verdict_of(CLAIM, [written_by_attention(of_attention, of_mlps), acts(study, table)])
    caption = "What every block writes of the difference that super neurons read, and what that part alone does."
    return sl.Findings(verdict, table, caption, numbers(study, table, top))


def written_by_attention(of_attention: sl.Estimate, of_mlps: sl.Estimate) -> sl.analysis.Part:
    """The quantity: whose is most of what is read?"""
    return sl.analysis.judge(
        "quantity",
        "amount",
        CLAIM,
        statistic="attention's share of what the super neurons read of the difference between the runs",
        estimate=of_attention,
        control="the share of the MLPs before",
        control_estimate=of_mlps,
        rule=f"holds when the interval of attention's share lies above {HALF:g}",
        conditions=[sl.analysis.above(of_attention, HALF)],
    )


def acts(study: sl.Study, table: Any) -> sl.analysis.Part:
    """The cause: does what attention has written make a sink by itself?"""
    rows = table[(table.quantity == "effect") & (table.block == ALL)]
    of_attention, of_mlps = (study.mean(rows[rows.writer == kind].value.tolist()) for kind in SITES)
    return sl.analysis.judge(
        "cause",
        "effect",
        "What W_O has written into these directions makes the token a sink.",
        statistic="effect of attention's part of the difference alone, put into the base run",
        estimate=of_attention,
        control="the part of the MLPs before",
        control_estimate=of_mlps,
        rule=f"holds when the interval of attention's effect lies above {HALF:g}",
        conditions=[sl.analysis.above(of_attention, HALF)],
    )


def share_of(study: sl.Study, amounts: Any, kind: str) -> sl.Estimate:
    """The share that one kind of writer has in the sum over all, neurons and branches together."""
    by_prompt = amounts.pivot_table(index="prompt", columns="writer", values="value", aggfunc="sum")
    total, of_kind = by_prompt.sum(axis=1).to_numpy(), by_prompt.get(kind, 0.0 * by_prompt.iloc[:, 0]).to_numpy()
    return study.bootstrap(lambda chosen: of_kind[chosen].sum() / total[chosen].sum(), by_prompt.index)


def check(setting: sl.Setting) -> None:
    """Make sure that the sums are what the super neurons read.

    Raises:
        NotApplicableError: they are not in this model.
    """
    for identity in ("neurons_read", "norm_before_mlp"):
        setting.study.require(identity, (setting.formation.layer,))
    setting.study.require("attention_adds", setting.up_to_formation)


def writers_of(setting: sl.Setting) -> Writers:
    """All that writes between the embedding and the formation block's MLP."""
    before = setting.up_to_formation[:-1]
    if before:
        setting.study.require("mlp_adds", before)
    blocks = {ATTENTION: setting.up_to_formation, MLPS: before}
    return {(kind, block): SITES[kind] for kind, layers in blocks.items() for block in layers}


def amounts_of(setting: sl.Setting, writers: Writers) -> pd.DataFrame:
    """Per writer, neuron, branch and prompt: what it adds to the branch's input in the run with the sink, over base."""
    written = {kind: tuple(block for name, block in writers if name == kind) for kind in SITES}
    asked = [(SITES[kind], blocks) for kind, blocks in written.items()]
    for run_name in setting.pair.runs:  # one pass of each
        setting.keep(run_name, [(sites.RESID_MID, (setting.formation.layer,)), *asked])
    read, scale = branches(setting), norm_scale(setting)
    rows = []
    for kind, blocks in written.items():
        if not blocks:
            continue
        site = SITES[kind]
        sink, base = (setting.at(run, site, blocks) for run in (setting.pair.with_sink, setting.pair.without))
        for block in blocks:
            difference = centred(setting, sink[block] - base[block]).cpu() / scale[:, None]
            for (neuron, branch), weights in read.items():
                rows.append(
                    pd.DataFrame(
                        {"prompt": range(len(difference)), "quantity": "amount", "writer": kind, "block": str(block)}
                        | {"neuron": neuron, "branch": branch, "value": (difference @ weights).tolist()}
                    )
                )
    return pd.concat(rows, ignore_index=True)


def branches(setting: sl.Setting) -> dict[tuple[int, str], Tensor]:
    """What each branch of each super neuron reads behind the norm, ``[d_model]``, the norm's weight included."""
    weights, read = setting.weights, {}
    gain = weights.ln2_w.detach().float().cpu()
    for branch, matrix in (("gate", weights.W_gate), ("linear", weights.W_in)):
        if matrix is None:
            continue
        for neuron in setting.neurons:
            read[neuron, branch] = matrix[:, neuron].detach().float().cpu() * gain
    return read


def centred(setting: sl.Setting, x: Tensor) -> Tensor:
    """What a LayerNorm leaves of ``x`` before it divides; an RMSNorm takes it as it is."""
    return x - x.mean(-1, keepdim=True) if setting.shape.norm == "layer" else x


def norm_scale(setting: sl.Setting) -> Tensor:
    """What the norm divides by at the target in the run with the sink, ``[prompt]``."""
    block = setting.formation.layer
    resid = setting.at(setting.pair.with_sink, sites.RESID_MID, (block,))[block]
    return (centred(setting, resid).pow(2).mean(-1) + setting.shape.norm_eps).sqrt().cpu()


def effects_of(setting: sl.Setting, writers: Writers) -> pd.DataFrame:
    """Per writer and block, and for all blocks of a kind, the effect of its part alone (denoise), by prompt."""
    basis, block = sl.stages.reading_subspace(setting), (setting.formation.layer,)
    sets: dict[tuple[str, str], tuple[tuple[sl.HookSite, int], ...]] = {}
    for (kind, written), site in writers.items():
        sets[kind, str(written)] = ((site, written),)
        sets[kind, ALL] = (*sets.get((kind, ALL), ()), (site, written))
    patches = []
    for (kind, _), chosen in sets.items():
        patch = setting.patch("denoise", sites.RESID_MID, block, edits.WrittenBy(kind, basis, chosen))
        patches.append(replace(patch, allow_unchanged=True))
    labels = [{"writer": kind, "block": name} for kind, name in sets]
    table = sl.analysis.effect_table(setting, patches, labels).rename(columns={"effect": "value"})
    return table.assign(quantity="effect", neuron=-1, branch="").drop(columns="attention")


def numbers(study: sl.Study, table: Any, top: int) -> dict[str, sl.Estimate]:
    """Effects of all of attention and of all MLPs, and the blocks that write most."""
    lines = {}
    effects = table[table.quantity == "effect"]
    for kind in SITES:
        rows = effects[(effects.writer == kind) & (effects.block == ALL)]
        if len(rows):
            lines[f"effect of what {kind} wrote (denoise)"] = study.mean(rows.value.tolist())
    amounts = table[table.quantity == "amount"]
    by_writer: Any = amounts.groupby(["writer", "block", "prompt"]).value.mean()
    strongest = by_writer.groupby(level=[0, 1]).mean().abs().sort_values(ascending=False).index[:top]
    for writer, block in strongest:
        lines[f"amount of {writer}, block {block} (mean over branches)"] = study.mean(by_writer[writer, block].tolist())
    return lines


def draw(findings: sl.Findings):
    table: Any = findings.table[findings.table.block != ALL]
    means: Any = table.groupby(["quantity", "writer", "block"], sort=False).value.mean().reset_index()
    names = {"amount": "amount read (mean over branches)", "effect": "effect alone (denoise)"}
    shown = means.assign(panel=means.quantity.map(names))
    figure = sl.viz.bars(shown, "block", "value", series="writer", facet="panel", titles={"value": ""})
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="reading", title="Who writes what the super neurons read", claim=CLAIM, run=run, draw=draw, paper="its step 2"
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
