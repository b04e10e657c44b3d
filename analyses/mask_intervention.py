"""Does a token become a sink when it may attend only to itself?

    python analyses/mask_intervention.py

Early on the first token differs from all others in one thing: it averages no values. Here token k is put in its place
in the blocks up to the formation block, and the attention that it receives after these is read, as a share of what the
natural sink receives in the clean run. Two equal sinks would hold one half each; the bar, a quarter, is half of that.
The control masks another token and reads k; 0.05 is a fifth of the bar.

What of the mask counts? A token that attends to one earlier token alone averages as little as one that attends to
itself: if it is the averaging, either makes a sink, and attending to all but itself as it ordinarily does makes none.

A mask could also act by changing what other tokens average. So the entropy of attention and the number of values
averaged are reported at every query, clean and masked. What changes there cannot be what makes k an outlier, for in
these blocks k reads no other token; and its residual alone, put into the clean run, must do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites
from sinklens.analysis import tidy

CLAIM = "A token that may attend only to itself up to the formation block becomes a sink."
BAR, NOTHING = 0.25, 0.05
CLEAN, MASKED, ANOTHER = "clean", "masked", "another masked"
RECEIVED = "received"
SHARE = "as a share of what the natural sink receives (mean over tokens)"
SPREAD = {"entropy, nats": metrics.attention_entropy, "values averaged": metrics.effective_values}
CARRIED = "residual after formation alone"

Readings = Mapping[str, Float[Tensor, "..."]]
"""``received``: ``[token, prompt, length, key]``; what of every query is read, by name: ``[token, prompt, query]``."""


def run(
    study: sl.Study,
    *,
    positions: Annotated[tuple[int, ...], "tokens to mask, one at a time"] = (5, 10, 20, 40),
    lengths: Annotated[tuple[int, ...], "prompt lengths to read attention at; a quarter, half and all by default"] = (),
    blocks: Annotated[Literal["up_to_formation", "onset", "formation"], "blocks to mask in"] = "up_to_formation",
    breakdown_prompts: Annotated[int, "prompts for the breakdown by block", sl.Between(1)] = 8,
) -> sl.Findings:
    targets, lengths = study.targets(positions), study.lengths((*lengths, study.batch.length) if lengths else ())
    layers = {"up_to_formation": study.up_to_formation, "onset": study.onset}.get(blocks, (study.formation.layer,))
    runs = readings_of_runs(study, targets, lengths, layers)
    received = {name: run[RECEIVED][range(len(targets)), :, :, targets] for name, run in runs.items()}
    sink = runs[CLEAN][RECEIVED][:, range(study.batch.n), :, study.sinks].transpose(0, 1)
    gain = {name: received[name] - received[CLEAN] for name in (MASKED, ANOTHER)}  # [token, prompt, length]
    shares = {name: values / sink for name, values in gain.items()}
    share, control = (study.mean(values[..., -1].mean(0)) for values in shares.values())
    masked = sl.analysis.judge(
        "cause",
        "mask",
        CLAIM,
        statistic=f"attention gained by the masked token, {SHARE}",
        estimate=share,
        control="the same token when another one is masked",
        control_estimate=control,
        rule=f"holds when the share's interval lies above {BAR} and the control's within {NOTHING} of 0",
        conditions=conditions(share, control),
    )
    at_each = rule_at_each(study, shares, targets, lengths)
    verdict = sl.analysis.verdict_of(CLAIM, [sl.analysis.elsewhere(masked, at_each), what_counts(study)])
    k, few = targets[(len(targets) - 1) // 2], study.first(breakdown_prompts)
    single_blocks, carried = by_block(few, k, layers, sink[0, : few.batch.n, -1])
    alone = tidy(carried, {"prompt": range(few.batch.n)}, quantity="share gained", run=CARRIED, token=k)
    axes = {"token": targets, "prompt": range(study.batch.n), "length": lengths}
    by_length = [tidy(values, axes, quantity="share gained", run=name) for name, values in shares.items()]
    table = pd.concat([single_blocks, alone, *by_length, *by_position(runs, targets, lengths)])
    numbers = {f"share gained by token {k} from its {CARRIED}, all else clean": study.mean(carried)}
    for (token, length), values in by_length[0].groupby(["token", "length"]).value:
        numbers[f"share gained by token {token} at {length} tokens"] = study.mean(values.tolist())
    numbers["attention gained by the masked token"] = study.mean(gain[MASKED][..., -1].mean(0))
    return sl.Findings(verdict, table, caption(k), numbers | mixing(study, targets, runs))


def rule_at_each(
    study: sl.Study,
    shares: Mapping[str, Float[Tensor, "token prompt length"]],
    targets: tuple[int, ...],
    lengths: tuple[int, ...],
) -> dict[str, list[sl.analysis.Condition]]:
    """The rule for each token alone, and at each shorter length."""
    places = {f"{n} tokens": (range(len(targets)), i) for i, n in enumerate(lengths[:-1])}
    places |= {f"token {k}": ([i], -1) for i, k in enumerate(targets)} if len(targets) > 1 else {}
    rules = {}
    for place, (tokens, length) in places.items():
        # A token has no later query in prompts that end before it.
        share, control = (study.mean(shares[run][list(tokens), :, length].nanmean(0)) for run in (MASKED, ANOTHER))
        if isfinite(share.value):
            rules[place] = conditions(share, control)
    return rules


def conditions(share: sl.Estimate, control: sl.Estimate) -> list[sl.analysis.Condition]:
    return [sl.analysis.above(share, BAR), *sl.analysis.within(control, NOTHING)]


def what_counts(study: sl.Study) -> sl.analysis.Part:
    """Is it that the token averages nothing, whichever token it attends to?"""
    return sl.analysis.cause(
        study,
        sl.stages.VALUE_AGGREGATION,
        "one_source",
        "all_but_itself",
        name="one source",
        sentence="What makes it a sink is that it averages nothing: one source does, whichever it is.",
        target=None,
    )


def mask(layers: tuple[int, ...], positions: tuple) -> sl.Patch:
    """Each of ``positions`` may attend only to itself."""
    # In a single block the token may attend only to itself already: that is no error, and no effect.
    return sl.Patch(sites.PATTERN, layers, positions, edits.AttendSelf(), allow_unchanged=len(layers) == 1)


def readings_of_runs(
    study: sl.Study, targets: tuple[int, ...], lengths: tuple[int, ...], layers: tuple[int, ...]
) -> dict[str, Readings]:
    """What is read in the clean run, with each target masked, and with another token masked in its place."""
    another = study.ordinary_position("mask/another", (0, *targets))  # position 0 has nothing to mask
    clean = readings(study, lengths)
    masked = [readings(study, lengths, mask(layers, (k,))) for k in targets]
    control = readings(study, lengths, mask(layers, tuple((position,) for position in another.tolist())))
    runs = {CLEAN: [clean] * len(targets), MASKED: masked, ANOTHER: [control] * len(targets)}
    return {run: {name: torch.stack([one[name] for one in each]) for name in clean} for run, each in runs.items()}


def readings(study: sl.Study, lengths: tuple[int, ...], *patches: sl.Patch) -> dict[str, Tensor]:
    """Means over heads and blocks: attention received ``[prompt, length, key]``; of every query ``[prompt, query]``
    what it pays to the natural sink, and how spread its attention is.
    """

    def received(pattern: Tensor, _rows: sl.Rows) -> Tensor:
        return metrics.received_at_lengths(pattern, lengths).mean(1)

    def paid_to_sink(pattern: Tensor, rows: sl.Rows) -> Tensor:
        sinks = study.sinks.to(rows.prompts)[rows.prompts]
        return pattern[range(len(pattern)), :, :, sinks].float().mean(1)

    after = study.after_formation()
    readouts = [
        sl.Readout(RECEIVED, sites.PATTERN, after, received),
        sl.Readout("attention to the natural sink, after formation", sites.PATTERN, after, paid_to_sink),
    ]
    for part, layers in (("up to formation", study.up_to_formation), ("after formation", after)):
        for name, metric in SPREAD.items():
            readouts.append(sl.Readout(f"{name}, {part}", sites.PATTERN, layers, lambda a, _, f=metric: f(a).mean(1)))
    return {name: values.mean(0) for name, values in study.measure(readouts, patches).items()}


def by_block(
    study: sl.Study, k: int, layers: tuple[int, ...], sink: Float[Tensor, " prompt"]
) -> tuple[pd.DataFrame, Float[Tensor, " prompt"]]:
    """Share gained by token k masked in one block alone, and in all blocks from 0 to that; and by no more of the masked
    run than its residual after the formation block, carried into the clean run."""
    blocks = study.up_to_formation
    sets = {"that block alone": [(b,) for b in blocks], "block 0 to that": [blocks[: b + 1] for b in blocks]}
    patches = [mask(layers, (k,)) for each in sets.values() for layers in each]
    carry = sl.Patch(sites.RESID_POST, blocks[-1:], (k,), edits.Transplant(), source=sl.Source(MASKED))
    attention = sl.readouts.attention_received("attention", study.after_formation(), (k,), study.batch.n)
    patches.append(carry)
    result = study.run(patches, [attention], {"base": (), MASKED: (mask(layers, (k,)),)})
    share = result.added(patches, "attention") / sink
    axes = {"run": tuple(sets), "layer": blocks, "prompt": range(study.batch.n)}
    values = share[:-1].view(len(sets), len(blocks), study.batch.n)
    return tidy(values, axes, quantity="by block", token=k), share[-1]


def by_position(runs: Mapping[str, Readings], targets: tuple[int, ...], lengths: tuple[int, ...]) -> list[pd.DataFrame]:
    """All that is read in the clean and the masked run, position by position: means over prompts."""
    tables = []
    for run in (CLEAN, MASKED):
        for name, values in runs[run].items():
            axes = {"token": targets} | ({"length": lengths} if name == RECEIVED else {})
            axes |= {"position": range(values.shape[-1])}
            tables.append(tidy(values.mean(1), axes, quantity=name, run=run))
    return tables


def mixing(study: sl.Study, targets: tuple[int, ...], runs: Mapping[str, Readings]) -> dict[str, sl.Estimate]:
    """What the queries after each token do in the clean run, and how the mask changes it."""
    numbers, after = {}, (torch.arange(study.batch.length) > torch.tensor(targets)[:, None, None]).float()
    for name in [name for name in runs[CLEAN] if name != RECEIVED]:
        clean, masked = (((runs[r][name] * after).sum(-1) / after.sum(-1)).mean(0) for r in (CLEAN, MASKED))
        numbers[f"{name}, at later queries"] = study.mean(clean)
        numbers[f"{name}, at later queries, change by the mask"] = study.mean(masked - clean)
    return numbers


def caption(k: int) -> str:
    return (
        "Attention received after the formation block, by position; the share that token "
        f"{k} gains when single blocks, or all from 0, are masked; the entropy of attention at every query."
    )


def draw(findings: sl.Findings):
    table = findings.table
    blocks = table[table.quantity == "by block"].groupby(["run", "layer", "token"]).value.mean().reset_index()
    k = blocks.token.iloc[0]
    received = table[(table.quantity == RECEIVED) & (table.length == table.length.max())]
    entropy = table[table.quantity.str.startswith("entropy") & (table.token == k)]
    of_token = "attention received, token " + received.token.map(str) + " masked, by position"
    panels = [
        received.assign(panel=of_token, x=received.position),
        blocks.assign(panel=f"share gained by token {k}, by masked block", x=blocks.layer),
        entropy.assign(panel=entropy.quantity + f", by query, token {k} masked", x=entropy.position),
    ]
    titles = {"x": "", "value": ""}
    figure = sl.viz.line(pd.concat(panels), "x", "value", series="run", facet="panel", titles=titles, height=260)
    return figure.update_xaxes(matches=None, showticklabels=True).update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="mask_intervention", title="Masking all but itself", claim=CLAIM, run=run, draw=draw, paper="figures 5 and 19"
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
