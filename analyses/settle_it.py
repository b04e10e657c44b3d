"""Does the sink go when the super neurons' down-projections go?

    python analyses/settle_it.py

What would settle the dispute: at the sink's own position the super neurons are silenced (set to zero, or to their mean
over ordinary positions), or write as much as before but in a random direction (their rows of W_out rotated: norms and
mutual angles stay, sparsity goes); nothing else is touched. "Removed" is how much of the sink's attention above that of
ordinary positions is lost. The least effective of these edits decides and must remove more than half, while the same
edits of as many random neurons remove less than a tenth. The strongest other neurons at the sink are a harder control.

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
Where = tuple[tuple[int, ...], ...]
Cases = list[tuple[dict[str, Any], sl.Patch]]


def run(
    study: sl.Study,
    *,
    scales: Annotated[tuple[float, ...], "factors on the super neurons' activations"] = (0, 0.25, 0.5, 0.75),
    draws: Annotated[int, "rotations, and sets of random neurons"] = 3,
    positions: Annotated[tuple[int, ...], "positions for the induced sink: the last that fits is taken"] = (5, 10),
) -> sl.Findings:
    near, far, kinds, note = study.after_formation(), study.after_formation(None), EDITS, ""
    try:
        sl.models.check_writes_directly(study.model, study.formation.layer)
    except sl.NotApplicableError:
        kinds, note = (ZERO, MEAN), " The model normalises what its MLPs write, so rows cannot be made dense."
    post = study.activations(sites.MLP_POST, (study.formation.layer,))[study.formation.layer].float().cpu()
    every = cases(study, study.sink, post, kinds, scales, draws)
    few = [x for x in every if x[0]["draw"] == 0 and x[0]["edit"] in kinds and x[0]["neurons"] != STRONGEST]
    tables = [measure(study, study.sink, every, near).assign(sink=NATURAL)]
    tables.append(measure(study, study.sink, few, far).assign(sink=LATER))
    try:
        where = ((study.targets(positions)[-1],),) * study.batch.n
        mask = sl.Patch(sites.PATTERN, study.up_to_formation, where, edits.AttendSelf())
        few = cases(study, where, post, kinds, (), 1)
        tables.append(measure(study, where, few, near, mask).assign(sink=INDUCED))
    except sl.InputError as error:
        note += f" The induced sink is left out: {error}."
    table: Any = pd.concat(tables, ignore_index=True)
    found = {key: study.mean(by_prompt(rows, "removed")) for key, rows in table.groupby(KEYS)}
    removed = min((found[NATURAL, SUPER, edit] for edit in kinds), key=lambda x: x.value)
    control = max((found[NATURAL, RANDOM, edit] for edit in kinds), key=lambda x: x.value)
    verdict = sl.verdict(
        CLAIM,
        f"share of the natural sink's attention removed by the least effective of: {', '.join(kinds)}",
        removed,
        "the most effective of the same edits, of as many random neurons",
        control,
        f"holds when the interval lies above {MOST} and the control's below {LITTLE}",
        holds=removed.above(MOST) and control.below(LITTLE),
    )
    numbers = {f"removed, {', '.join(key)}": x for key, x in found.items() if key[1] in (SUPER, STRONGEST)}
    for column in ("residual norm", "massive activations"):
        for edit in ("none", *kinds):
            rows = table[(table.sink == NATURAL) & table.neurons.isin(("none", SUPER)) & (table.edit == edit)]
            numbers[f"{column} of the natural sink, {edit}"] = study.mean(by_prompt(rows, column))
    caption = "What each edit removes of the sink's attention (mean over prompts, with its 95% interval)." + note
    return sl.Findings(verdict, table, caption, numbers)


def cases(study: sl.Study, where: Where, post: Tensor, kinds: tuple, scales: tuple, draws: int) -> Cases:
    """Every edit at ``where``; ``post`` is the clean run's activations, ``[prompt, pos, d_mlp]``."""
    layer, neurons = study.formation.layer, study.formation.neurons
    at_sink = post[range(study.batch.n), study.sinks].abs().mean(0).index_fill(0, torch.tensor(neurons), -1)
    sets = [(SUPER, i, neurons) for i in range(draws)]
    sets += [(RANDOM, i, units) for i, units in enumerate(study.other_neurons("settle_it/random", draws))]
    sets += [(STRONGEST, 0, tuple(at_sink.topk(len(neurons)).indices.tolist()))]
    mean, origin = post[study.ordinary].mean(0), torch.zeros_like(at_sink)
    found: Cases = []

    def add(who: str, draw: int, units: tuple[int, ...] | None, edit: edits.Edit, site: sl.HookSite) -> None:
        labels = {"neurons": who, "edit": edit.name, "draw": draw}
        found.append((labels, sl.Patch(site, (layer,), where, edit, units, allow_unchanged=True)))

    for who, draw, units in sets:
        rows = study.weights(layer).W_out.detach()[list(units)].float()
        if DENSE in kinds:
            turned = edits.rotate_rows(rows, study.generator(f"settle_it/{who}/{draw}"))
            add(who, draw, None, edits.DensifyRows(DENSE, units, rows, turned), sites.MLP_OUT)
        if who != SUPER or draw == 0:  # of the super neurons only the rotation is drawn
            add(who, draw, units, edits.Constant(ZERO), sites.MLP_POST)
            add(who, draw, units, edits.Constant(MEAN, {layer: mean}), sites.MLP_POST)
    for s in sorted(set(scales) - {0}):
        add(SUPER, 0, neurons, edits.Rescale(f"times {s:g}", {layer: origin}, {layer: torch.tensor(s)}), sites.MLP_POST)
    return found


def measure(study: sl.Study, where: Where, cases: Cases, layers: tuple[int, ...], *roots: sl.Patch) -> pd.DataFrame:
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
    found = study.run([patch for _, patch in cases], measured, {"base": roots})
    untouched = {"base": {"neurons": "none", "edit": "none", "draw": 0}}
    table = sl.analysis.patch_table(found, [labels for labels, _ in cases], untouched)
    before, usual = (found.runs["base"][name].numpy()[table.prompt] for name in ("attention", "ordinary"))
    return table.assign(removed=(before - table.attention) / (before - usual))


def by_prompt(rows: Any, column: str) -> list[float]:
    return rows.groupby("prompt")[column].mean().tolist()


def draw(findings: sl.Findings):
    table: Any = findings.table.query("neurons != 'none'")
    means = {key: sl.statistics.mean_estimate(by_prompt(rows, "removed"), 0) for key, rows in table.groupby(KEYS)}
    rows = [(*key, x.value, x.low, x.high) for key, x in means.items()]
    shown = pd.DataFrame(rows, columns=[*KEYS, "share removed", "low", "high"])
    y = "share removed"
    figure = sl.viz.bars(shown, "edit", y, series="neurons", low="low", high="high", facet="sink", titles={"edit": ""})
    return figure.update_xaxes(categoryorder="array", categoryarray=[*sorted(set(shown.edit) - set(EDITS)), *EDITS])


ANALYSIS = sl.Analysis(
    name="settle_it", title="What would settle it", claim=CLAIM, run=run, draw=draw, paper="a reviewer's question"
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
