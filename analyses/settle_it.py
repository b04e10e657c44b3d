"""Does the sink go when the super neurons' down-projections go?

    python analyses/settle_it.py

What would settle the dispute: at the sink's own position the super neurons are silenced (set to zero, or to their mean
over ordinary positions), or write as much as before but in a random direction (their rows of W_out rotated: norms and
mutual angles stay, sparsity goes); nothing else is touched. "Removed" is how much of the sink's attention above that of
ordinary positions is lost. Every one of these edits must remove more than half, and the same edits of as many random
neurons less than a tenth; the strongest other neurons at the sink are a harder control. One rotation differs from the
next by more than one prompt does, so the interval of the dense rows is over rotations.

A model may make its sink in several events, each for the blocks behind it (`sinklens find` lists them). The verdict is
about the one that is explained (`--event`), by its strongest block. Where there are several formation blocks, each
event is taken out in all of its blocks, and all events together, and attention is read behind each, before the next,
and in all blocks behind the last: a sink that an event does not make is told from one that is made anew.

What the edits cost is read too, on a few prompts: the change of the loss, beside that of as many random neurons.

The natural sink decides. A sink that is induced by masking a token is treated alike; and all later blocks are read too,
because a sink that comes back is not removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, readouts, sites

CLAIM = "The sink goes when the super neurons' down-projections are ablated or made dense, all else fixed."
MOST, LITTLE = 0.5, 0.1
GAP = 0.01  # behind some event there may be no sink to remove: prompts with less of one are left out there
SUPER, RANDOM, STRONGEST = "super neurons", "random neurons", "strongest other neurons"
CHANGE = "change of loss"
EDITS = ZERO, MEAN, DENSE = "zero", "mean", "densified"
NATURAL, LATER, INDUCED = "natural sink", "natural sink, all later blocks", "induced sink"
SINKS = [NATURAL, LATER, INDUCED]
KEYS = ["sink", "neurons", "edit"]


@dataclass(frozen=True, eq=False)
class Case:
    """An edit of a set of neurons."""

    neurons: str
    """Which set."""
    edit: edits.Edit
    """What is done to it."""
    site: sl.HookSite
    """Where."""
    units: tuple[int, ...] | None
    """The neurons, at a site that has them as units."""
    draw: int = 0
    """Which of the draws, of random neurons or of a rotation."""

    @property
    def labels(self) -> dict[str, Any]:
        """Its columns in the table."""
        return {"neurons": self.neurons, "edit": self.edit.name, "draw": self.draw}


def run(
    study: sl.Study,
    *,
    scales: Annotated[tuple[float, ...], "factors on the super neurons' activations"] = (0, 0.25, 0.5, 0.75),
    rotations: Annotated[int, "random rotations of the super neurons' rows", sl.Between(1, 1000)] = 10,
    draws: Annotated[int, "sets of random neurons", sl.Between(1, 1000)] = 3,
    positions: Annotated[tuple[int, ...], "positions for the induced sink: the last that fits is taken"] = (5, 10),
    few_prompts: Annotated[int, "prompts for the induced sink, and for all later blocks", sl.Between(1)] = 8,
    event_prompts: Annotated[int, "prompts for the formation events one by one", sl.Between(1)] = 16,
) -> sl.Findings:
    study.require("dense_mlp", (study.formation.layer,))
    kinds, note = edits_that_apply(study)
    cases = [*ablations(study, kinds, rotations, draws), *rescalings(study, scales)]
    of_sinks, left_out = effects_on_sinks(study, study.first(few_prompts), cases, positions)
    of_events, without = effects_of_events(study.first(event_prompts))
    table: Any = pd.concat([of_sinks, *of_events], ignore_index=True)
    removed = {key: estimate(rows, "removed", study.seed, study.groups) for key, rows in table.groupby(KEYS)}
    verdict = sl.analysis.verdict_of(CLAIM, [goes(removed, kinds, sink) for sink in (NATURAL, LATER)])
    numbers = {f"removed, {', '.join(key)}": x for key, x in removed.items() if key[1].startswith((SUPER, STRONGEST))}
    costs = changes_of_loss(study, table)
    numbers |= sizes(study, table, kinds) | {f"{CHANGE}, {', '.join(key)}": x for key, x in costs.items()}
    rotated = f", of {DENSE} super neurons over {rotations} rotations" if DENSE in kinds else ""
    caption = f"What each edit removes of the sink's attention: means with 95% intervals over prompts{rotated}."
    caption += said_of(costs) + note + left_out + without
    return sl.Findings(verdict, table, caption, numbers)


def sizes(study: sl.Study, table: Any, kinds: tuple[str, ...]) -> dict[str, sl.Estimate]:
    """The natural sink's residual norm and massive activations, untouched and under every edit of the super neurons."""
    natural = table[(table.sink == NATURAL) & table.neurons.isin(("none", SUPER))]
    rows = {edit: natural[natural.edit == edit] for edit in ("none", *kinds)}
    return {
        f"{column} of the natural sink, {edit}": estimate(rows[edit], column, study.seed, study.groups)
        for column in ("residual norm", "massive activations")
        for edit in rows
    }


def changes_of_loss(study: sl.Study, table: Any) -> dict[tuple[str, str], sl.Estimate]:
    """What every edit of the super neurons, and of random ones, adds to the loss, nats per token."""
    read = table[table[CHANGE].notna() & (table.neurons != "none")]
    edited = read.groupby(["neurons", "edit"], sort=False)
    return {key: estimate(rows, CHANGE, study.seed, study.groups) for key, rows in edited}


def said_of(costs: dict[tuple[str, str], sl.Estimate]) -> str:
    """What silencing the super neurons costs, in a sentence."""
    own, control = (sl.statistics.interval_text(costs[neurons, ZERO]) for neurons in (SUPER, RANDOM))
    n = costs[SUPER, ZERO].n
    told = f"the super neurons cost {own} nats per token, as many random neurons {control}"
    return f" Set to zero at the sink {told} ({n} prompts)."


def goes(removed: dict[Any, sl.Estimate], kinds: tuple[str, ...], sink: str) -> sl.analysis.Part:
    """The cause: does every edit of the super neurons remove the sink, and none of random neurons?"""
    of_super, where = [removed[sink, SUPER, edit] for edit in kinds], sink.removeprefix(NATURAL)
    # Random neurons are edited just after formation, where it is decided what reaches the later blocks.
    control = max((removed[NATURAL, RANDOM, edit] for edit in kinds), key=lambda x: x.high)
    return sl.analysis.judge(
        "cause",
        "just after formation" if sink == NATURAL else "all later blocks",
        CLAIM if sink == NATURAL else "The sink does not come back in a later block.",
        statistic=f"share of the natural sink's attention removed{where}, by the edit whose interval reaches lowest: "
        f"{', '.join(kinds)}",
        estimate=min(of_super, key=lambda x: x.low),
        control="the same for as many random neurons, by the edit whose interval reaches highest",
        control_estimate=control,
        rule=f"holds when the intervals of all edits lie above {MOST} and the control's below {LITTLE}",
        conditions=[*(sl.analysis.above(x, MOST) for x in of_super), sl.analysis.below(control, LITTLE)],
    )


def edits_that_apply(study: sl.Study) -> tuple[tuple[str, ...], str]:
    """The edits of the claim that this model can be given, and a note on those that it cannot."""
    try:
        sl.models.check_writes_directly(study.model, study.formation.layer)
    except sl.NotApplicableError as error:
        return (ZERO, MEAN), f" Rows cannot be made dense: {error}."
    return EDITS, ""


def ablations(study: sl.Study, kinds: tuple[str, ...], rotations: int, draws: int) -> list[Case]:
    """Every set of neurons silenced, and writing in a random direction."""
    layer, neurons = study.formation.layer, study.neurons
    post = study.activations(sites.MLP_POST, (layer,))[layer].float().cpu()  # [prompt, pos, d_mlp]
    at_sink = post[range(study.batch.n), study.sinks].abs().mean(0)
    strongest = at_sink.index_fill(0, torch.tensor(neurons), -1).topk(len(neurons)).indices.tolist()
    sets = [(SUPER, i, neurons) for i in range(rotations)] + [(STRONGEST, 0, tuple(strongest))]
    sets += [(RANDOM, i, units) for i, units in enumerate(study.other_neurons("settle_it/random", draws))]
    silent = [edits.Constant(ZERO), edits.Constant(MEAN, {layer: post[study.ordinary].mean(0)})]
    cases = []
    for who, draw, units in sets:
        if who != SUPER or draw == 0:  # of the super neurons only the rotation is drawn
            cases += [Case(who, edit, sites.MLP_POST, units, draw) for edit in silent]
        if DENSE in kinds:
            rows = study.weights(layer).W_out.detach()[list(units)].float()
            rotated = edits.rotate_rows(rows, study.generator(f"settle_it/{who}/{draw}"))
            cases.append(Case(who, edits.DensifyRows(DENSE, units, rows, rotated), sites.MLP_OUT, None, draw))
    return cases


def rescalings(study: sl.Study, scales: tuple[float, ...]) -> list[Case]:
    """The super neurons' activations times each of ``scales``; zero is an ablation already."""
    layer, neurons = study.formation.layer, study.neurons
    zero = {layer: torch.zeros(study.shape.d_mlp)}
    factors = {f"times {scale:g}": torch.tensor(float(scale)) for scale in sorted(set(scales) - {0})}
    rescale = [edits.Rescale(name, zero, {layer: factor}) for name, factor in factors.items()]
    return [Case(SUPER, edit, sites.MLP_POST, neurons) for edit in rescale]


def effects_on_sinks(study: sl.Study, few: sl.Study, cases: list[Case], positions: tuple[int, ...]) -> tuple[Any, str]:
    """A table of every case for the natural sink and, on a few prompts, for an induced one; a note if there is none."""
    near, left_out = study.after_formation(), ""
    later = tuple(range(near[0], study.shape.n_layers))  # beyond the next event, too
    with_loss = [case for case in cases if case.neurons in (SUPER, RANDOM)]
    tables = [measure(study, study.sink, cases, near).assign(sink=NATURAL)]
    tables += [measure(few, few.sink, with_loss, later, loss=True).assign(sink=LATER)]
    try:
        target = ((study.targets(positions)[-1],),) * few.batch.n
        mask = sl.Patch(sites.PATTERN, study.up_to_formation, target, edits.AttendSelf())
        tables += [measure(few, target, cases, near, mask).assign(sink=INDUCED)]
    except sl.InputError as error:
        left_out = f" The induced sink is left out: {error}."
    return pd.concat(tables, ignore_index=True), left_out


def measure(
    study: sl.Study, where: tuple, cases: list[Case], layers: tuple[int, ...], *roots: sl.Patch, loss: bool = False
) -> pd.DataFrame:
    """Attention to the sink and to ordinary tokens, the sink's residual after formation, the loss, in every case."""
    n, block, at, resid = study.batch.n, (study.formation.layer,), torch.tensor(where)[:, 0], sites.RESID_POST
    ordinary = study.ordinary.float().scatter(1, at[:, None], 0)

    def massive(act: Tensor, rows: sl.Rows) -> Tensor:
        return readouts.at_position(metrics.massive_activations(act), resid, rows, at).float().sum(-1)

    measured = [
        readouts.attention_received("attention", layers, where, n),
        readouts.attention_ordinary("ordinary", layers, ordinary),
        readouts.vector_readout("residual norm", resid, block, where, n, lambda x, _: metrics.vector_norm(x)),
        sl.Readout("massive activations", resid, block, massive),
    ]
    measured += [study.readout("loss")] if loss else []
    patches = [sl.Patch(case.site, block, where, case.edit, case.units, allow_unchanged=True) for case in cases]
    effects = study.run(patches, measured, {"base": roots})
    untouched = {"base": {"neurons": "none", "edit": "none", "draw": 0}}
    table = sl.analysis.patch_table(effects, [case.labels for case in cases], untouched)
    before, usual = (sl.analysis.base_reading(effects, table, name) for name in ("attention", "ordinary"))
    table = table.assign(removed=(before - table.attention) / (before - usual))
    return table.assign(**{CHANGE: table.loss - sl.analysis.base_reading(effects, table, "loss")}) if loss else table


def effects_of_events(study: sl.Study) -> tuple[list[pd.DataFrame], str]:
    """A table for each event behind it, and for all later blocks: what goes with each and with all; and a note."""
    steps, n_layers = study.formation.steps, study.shape.n_layers
    if sum(len(step.blocks) for step in steps) < 2:
        return [], ""  # there is nothing that the other rows do not say
    known, left_out = {}, ""
    for layer in (layer for step in steps for layer in step.blocks):
        try:
            study.require("dense_mlp", (layer,))
            known[layer] = study.at_block(layer)
        except (sl.NoSinkError, sl.NotApplicableError) as error:
            left_out += f" Block {layer} is left out of its event: {error}."
    cases = {f"event {step}": [known[layer] for layer in step.blocks if layer in known] for step in steps}
    cases = {name: found for name, found in cases.items() if found}
    if len(cases) > 1:
        cases["all events"] = list(known.values())
    ends = [step.blocks[-1] for step in steps if step.blocks[-1] + 1 < n_layers]
    seen = [replace(study.formation, layer=last).after(n_layers) for last in ends]
    seen += [tuple(range(last + 1, n_layers)) for last in ends[-1:]]
    tables = measure_events(study, cases, list(dict.fromkeys(seen))) if seen and cases else []
    for table in tables:
        if n_out := int((table.groupby("prompt").removed.count() == 0).sum()):
            left_out += f" {table.sink[0]}: {n_out} of {study.batch.n} prompts have too little of a sink there."
    return [table.dropna(subset="removed") for table in tables], left_out


def measure_events(
    study: sl.Study, cases: dict[str, list[sl.Study]], blocks: list[tuple[int, ...]]
) -> list[pd.DataFrame]:
    """Attention to the natural sink in each of ``blocks`` with the neurons of each case, or as many others, at zero."""
    labels, patches = [], []
    for name, found in cases.items():
        own = [(at.formation.layer, at.neurons) for at in found]
        random = [(at.formation.layer, at.other_neurons(f"settle_it/event/{at.formation.layer}")[0]) for at in found]
        for who, chosen in ((SUPER, own), (RANDOM, random)):
            labels.append({"neurons": f"{who} of {name}", "edit": ZERO, "draw": 0})
            first, *more = (
                sl.Patch(sites.MLP_POST, (layer,), study.sink, edits.Constant(ZERO), units, allow_unchanged=True)
                for layer, units in chosen
            )
            patches.append(replace(first, also=tuple(more)))
    measured = []
    for i, layers in enumerate(blocks):
        measured.append(readouts.attention_received(f"attention {i}", layers, study.sink, study.batch.n))
        measured.append(readouts.attention_ordinary(f"ordinary {i}", layers, study.ordinary.float()))
    effects = study.run(patches, measured)
    whole, tables = sl.analysis.patch_table(effects, labels, {}), []
    for i, layers in enumerate(blocks):
        before, usual = (sl.analysis.base_reading(effects, whole, f"{name} {i}") for name in ("attention", "ordinary"))
        seen = {"attention": whole[f"attention {i}"], "ordinary": whole[f"ordinary {i}"]}
        gap = np.where(before - usual < GAP, np.nan, before - usual)
        seen |= {"removed": (before - seen["attention"]) / gap}
        tables.append(whole[["prompt", *KEYS[1:], "draw"]].assign(sink=read_in(layers), **seen))
    return tables


def read_in(layers: tuple[int, ...]) -> str:
    """How the table calls the natural sink in these blocks."""
    first, last = min(layers), max(layers)
    return f"{NATURAL}, blocks {first}-{last}" if first < last else f"{NATURAL}, block {first}"


def estimate(rows: Any, column: str, seed: int, groups: Sequence[str] | None = None) -> sl.Estimate:
    """Mean with its interval over prompts (or the texts that these are of); over rotations where these differ."""
    rotated = set(rows.edit) == {DENSE} and set(rows.neurons) == {SUPER}
    means = rows.groupby("draw" if rotated else "prompt")[column].mean()
    texts = None if rotated or groups is None else [groups[prompt] for prompt in means.index]
    return sl.statistics.mean_estimate(means.tolist(), seed, texts, over="rotations" if rotated else "prompts")


def draw(findings: sl.Findings):
    table: Any = findings.table.query("neurons != 'none' and sink in @SINKS")
    means = {key: estimate(rows, "removed", 0) for key, rows in table.groupby(KEYS, sort=False)}
    ends = [(*key, x.value, x.low, x.high) for key, x in means.items()]
    bars = pd.DataFrame(ends, columns=[*KEYS, "share removed", "low", "high"])
    figure = sl.viz.bars(
        bars, "edit", "share removed", series="neurons", low="low", high="high", facet="sink", titles={"edit": ""}
    )
    order = [*sorted(set(bars.edit) - set(EDITS), reverse=True), *EDITS]
    figure.update_xaxes(categoryorder="array", categoryarray=order, showticklabels=True)
    return sl.viz.mark(figure, y=MOST)


ANALYSIS = sl.Analysis(
    name="settle_it", title="What would settle it", claim=CLAIM, run=run, draw=draw, paper="a reviewer's question"
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
