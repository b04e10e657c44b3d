"""Does the sink go when the super neurons' down-projections go?

    python analyses/settle_it.py

What would settle the dispute: at the sink's own position the super neurons are silenced (set to zero, or to their mean
over ordinary positions), or write as much as before but in a random direction (their rows of W_out rotated: norms and
mutual angles stay, sparsity goes); nothing else is touched. "Removed" is how much of the sink's attention above that of
ordinary positions is lost. Every one of these edits must remove more than half, and the same edits of as many random
neurons less than a tenth; the strongest other neurons at the sink are a harder control. One rotation differs from the
next by more than one prompt does, so the interval of the dense rows is over rotations.

The natural sink decides. A sink that is induced by masking a token is treated alike; and all later blocks are read too,
because a sink that comes back is not removed.
"""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, readouts, sites

CLAIM = "The sink goes when the super neurons' down-projections are ablated or made dense, all else fixed."
MOST, LITTLE = 0.5, 0.1
SUPER, RANDOM, STRONGEST = "super neurons", "random neurons", "strongest other neurons"
EDITS = ZERO, MEAN, DENSE = "zero", "mean", "densified"
NATURAL, LATER, INDUCED = "natural sink", "natural sink, all later blocks", "induced sink"
KEYS = ["sink", "neurons", "edit"]
Case = tuple[dict[str, Any], sl.HookSite, edits.Edit, tuple[int, ...] | None]


def run(
    study: sl.Study,
    *,
    scales: Annotated[tuple[float, ...], "factors on the super neurons' activations"] = (0, 0.25, 0.5, 0.75),
    rotations: Annotated[int, "random rotations of the super neurons' rows"] = 10,
    draws: Annotated[int, "sets of random neurons"] = 3,
    positions: Annotated[tuple[int, ...], "positions for the induced sink: the last that fits is taken"] = (5, 10),
    few_prompts: Annotated[int, "prompts for the induced sink, and for all later blocks"] = 8,
) -> sl.Findings:
    layer, near, kinds, note = study.formation.layer, study.after_formation(), EDITS, ""
    try:
        sl.models.check_writes_directly(study.model, layer)
    except sl.NotApplicableError:
        kinds, note = (ZERO, MEAN), " The model normalises what its MLPs write, so rows cannot be made dense."
    every, few = cases(study, kinds, scales, rotations, draws), study.first(few_prompts)
    own = [case for case in every if case[0]["neurons"] == SUPER]
    tables = [measure(study, study.sink, every, near).assign(sink=NATURAL)]
    tables += [measure(few, few.sink, own, study.after_formation(None)).assign(sink=LATER)]
    try:
        where = ((study.targets(positions)[-1],),) * few.batch.n
        mask = sl.Patch(sites.PATTERN, study.up_to_formation, where, edits.AttendSelf())
        tables.append(measure(few, where, every, near, mask).assign(sink=INDUCED))
    except sl.InputError as error:
        note += f" The induced sink is left out: {error}."
    table: Any = pd.concat(tables, ignore_index=True)
    found = {key: estimate(rows, "removed", study.seed) for key, rows in table.groupby(KEYS)}
    removed = [found[NATURAL, SUPER, edit] for edit in kinds]
    control = max((found[NATURAL, RANDOM, edit] for edit in kinds), key=lambda x: x.high)
    verdict = sl.verdict(
        CLAIM,
        f"share of the natural sink's attention removed, by the edit whose interval reaches lowest: {', '.join(kinds)}",
        min(removed, key=lambda x: x.low),
        "the same for as many random neurons, by the edit whose interval reaches highest",
        control,
        f"holds when the intervals of all edits lie above {MOST} and the control's below {LITTLE}",
        holds=all(x.above(MOST) for x in removed) and control.below(LITTLE),
    )
    numbers = {f"removed, {', '.join(key)}": x for key, x in found.items() if key[1] in (SUPER, STRONGEST)}
    for column in ("residual norm", "massive activations"):
        for edit in ("none", *kinds):
            rows = table[(table.sink == NATURAL) & table.neurons.isin(("none", SUPER)) & (table.edit == edit)]
            numbers[f"{column} of the natural sink, {edit}"] = estimate(rows, column, study.seed)
    caption = "What each edit removes of the sink's attention (means with 95% intervals)." + note
    return sl.Findings(verdict, table, caption, numbers)


def cases(study: sl.Study, kinds: tuple, scales: tuple, rotations: int, draws: int) -> list[Case]:
    """Every edit of every set of neurons, as (labels, site, edit, units)."""
    layer, neurons = study.formation.layer, study.formation.neurons
    post = study.activations(sites.MLP_POST, (layer,))[layer].float().cpu()  # [prompt, pos, d_mlp]
    usual, at_sink = post[study.ordinary].mean(0), post[range(study.batch.n), study.sinks].abs().mean(0)
    strongest = at_sink.index_fill(0, torch.tensor(neurons), -1).topk(len(neurons)).indices.tolist()
    sets = [(SUPER, i, neurons) for i in range(rotations)] + [(STRONGEST, 0, tuple(strongest))]
    sets += [(RANDOM, i, units) for i, units in enumerate(study.other_neurons("settle_it/random", draws))]
    found: list[Case] = []
    for who, draw, units in sets:
        rows = study.weights(layer).W_out.detach()[list(units)].float()
        silent = [edits.Constant(ZERO), edits.Constant(MEAN, {layer: usual})]
        if who != SUPER or draw == 0:  # of the super neurons only the rotation is drawn
            found += [({"neurons": who, "edit": e.name, "draw": draw}, sites.MLP_POST, e, units) for e in silent]
        if DENSE in kinds:
            turned = edits.rotate_rows(rows, study.generator(f"settle_it/{who}/{draw}"))
            edit = edits.DensifyRows(DENSE, units, rows, turned)
            found.append(({"neurons": who, "edit": DENSE, "draw": draw}, sites.MLP_OUT, edit, None))
    for s in sorted(set(scales) - {0}):
        edit = edits.Rescale(f"times {s:g}", {layer: torch.zeros_like(usual)}, {layer: torch.tensor(float(s))})
        found.append(({"neurons": SUPER, "edit": edit.name, "draw": 0}, sites.MLP_POST, edit, neurons))
    return found


def measure(study: sl.Study, where: tuple, cases: list[Case], layers: tuple[int, ...], *roots: sl.Patch) -> Any:
    """Attention to the sink and to ordinary tokens, and the sink's residual after formation, in every case."""
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
    patches = [sl.Patch(site, block, where, edit, units, allow_unchanged=True) for _, site, edit, units in cases]
    found = study.run(patches, measured, {"base": roots})
    untouched = {"base": {"neurons": "none", "edit": "none", "draw": 0}}
    table = sl.analysis.patch_table(found, [case[0] for case in cases], untouched)
    before, usual = (found.runs["base"][name].numpy()[table.prompt] for name in ("attention", "ordinary"))
    return table.assign(removed=(before - table.attention) / (before - usual))


def estimate(rows: Any, column: str, seed: int) -> sl.Estimate:
    """Mean with its interval over prompts; over rotations where these are what differs."""
    rotated = set(rows.edit) == {DENSE} and set(rows.neurons) == {SUPER}
    return sl.statistics.mean_estimate(rows.groupby("draw" if rotated else "prompt")[column].mean().tolist(), seed)


def draw(findings: sl.Findings):
    table: Any = findings.table.query("neurons != 'none'")
    means = {key: estimate(rows, "removed", 0) for key, rows in table.groupby(KEYS, sort=False)}
    ends = [(*key, x.value, x.low, x.high) for key, x in means.items()]
    shown, y = pd.DataFrame(ends, columns=[*KEYS, "share removed", "low", "high"]), "share removed"
    figure = sl.viz.bars(shown, "edit", y, series="neurons", low="low", high="high", facet="sink", titles={"edit": ""})
    order = [*sorted(set(shown.edit) - set(EDITS), reverse=True), *EDITS]
    figure.update_xaxes(categoryorder="array", categoryarray=order, showticklabels=True)
    return sl.viz.mark(figure, y=MOST)


ANALYSIS = sl.Analysis(
    name="settle_it", title="What would settle it", claim=CLAIM, run=run, draw=draw, paper="a reviewer's question"
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
