"""Does a token become a sink when it may attend only to itself?

    python analyses/mask_intervention.py

Early on the first token differs from all others in one thing: it averages no values. Here token k is put in its place
in the blocks up to the formation block, and the attention that it receives after these is read, as a share of what the
natural sink receives in the clean run. Two equal sinks would hold one half each; the bar, a quarter, is half of that.
The control masks another token and reads k; 0.05 is a fifth of the bar.

A mask could also act by changing what other tokens average. So the entropy of attention and the number of values
averaged are reported at every query, clean and masked. What changes there cannot be what makes k an outlier, for in
these blocks k reads no other token; and its residual alone, put into the clean run, must do the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites
from sinklens.analysis.base import tidy

CLAIM = "A token that may attend only to itself up to the formation block becomes a sink."
BAR, NOTHING = 0.25, 0.05
SPREAD = {"entropy, nats": metrics.attention_entropy, "values averaged": metrics.effective_values}
CARRIED = "residual after formation alone"


def run(
    study: sl.Study,
    *,
    positions: Annotated[tuple[int, ...], "tokens to mask, one at a time"] = (5, 10, 20, 40),
    lengths: Annotated[tuple[int, ...], "prompt lengths to read attention at; a quarter, half and all by default"] = (),
    blocks: Annotated[Literal["up_to_formation", "onset", "formation"], "blocks to mask in"] = "up_to_formation",
    breakdown_prompts: Annotated[int, "prompts for the breakdown by block"] = 8,
) -> sl.Findings:
    targets, lengths = study.targets(positions), study.lengths((*lengths, study.batch.length) if lengths else ())
    layers = {"up_to_formation": study.up_to_formation, "onset": study.onset}.get(blocks, (study.formation.layer,))
    drawn = study.ordinary_position("mask/another", (0, *targets))  # position 0 has nothing to mask
    looks = {
        "clean": [look(study, lengths)] * len(targets),
        "masked": [look(study, lengths, mask(layers, (k,))) for k in targets],
        "another masked": [look(study, lengths, mask(layers, tuple((p,) for p in drawn.tolist())))] * len(targets),
    }
    runs = {r: {name: torch.stack([x[name] for x in each]) for name in each[0]} for r, each in looks.items()}
    n, full = study.batch.tokens.shape
    own = {r: x["received"][range(len(targets)), :, :, targets] for r, x in runs.items()}  # [token, prompt, length]
    sink = {r: x["received"][:, range(n), :, study.sinks].transpose(0, 1) for r, x in runs.items()}
    gain = {r: (own[r] - own["clean"]) / sink["clean"] for r in ("masked", "another masked")}
    share, control = (study.mean(gain[r][..., -1].mean(0)) for r in gain)
    verdict = sl.verdict(
        CLAIM,
        "attention gained by the masked token, as a share of what the natural sink receives (mean over tokens)",
        share,
        "the same token when another one is masked",
        control,
        f"holds when the share's interval lies above {BAR} and the control's within {NOTHING} of 0",
        holds=share.above(BAR) and control.below(NOTHING) and control.above(-NOTHING),
    )
    k = targets[(len(targets) - 1) // 2]
    single, carried = by_block(study.first(breakdown_prompts), k, layers, sink["clean"][0, :, -1])
    axes = {"token": targets, "prompt": range(n), "length": lengths}
    shares = {r: tidy(values, axes, quantity="share gained", run=r) for r, values in gain.items()}
    alone = tidy(carried, {"prompt": range(len(carried))}, quantity="share gained", run=CARRIED, token=k)
    rows = [single, alone, *shares.values()]
    for r in ("clean", "masked"):
        for name, values in runs[r].items():
            axes = {"token": targets} | ({"length": lengths} if name == "received" else {}) | {"position": range(full)}
            rows.append(tidy(values.mean(1), axes, quantity=name, run=r))
    found = {f"share gained by token {k} from its {CARRIED}, all else clean": study.mean(carried)}
    for (token, length), each in shares["masked"].groupby(["token", "length"]).value:
        found[f"share gained by token {token} at {length} tokens"] = study.mean(each.tolist())
    found["attention gained by the masked token"] = study.mean((own["masked"] - own["clean"])[..., -1].mean(0))
    caption = (
        "Attention received after the formation block, by position; the share that token "
        f"{k} gains when single blocks, or all from 0, are masked; the entropy of attention at every query."
    )
    return sl.Findings(verdict, pd.concat(rows), caption, found | mixing(study, targets, runs))


def mixing(study: sl.Study, targets: tuple[int, ...], runs: dict[str, dict[str, Tensor]]) -> dict[str, sl.Estimate]:
    """What the queries after each token do in the clean run, and how the mask changes it."""
    found, after = {}, (torch.arange(study.batch.length) > torch.tensor(targets)[:, None, None]).float()
    for name in [name for name in runs["clean"] if name != "received"]:
        later = {r: ((x[name] * after).sum(-1) / after.sum(-1)).mean(0) for r, x in runs.items()}
        found[f"{name}, at later queries"] = study.mean(later["clean"])
        found[f"{name}, at later queries, change by the mask"] = study.mean(later["masked"] - later["clean"])
    return found


def mask(layers: tuple[int, ...], positions: tuple) -> sl.Patch:
    # In a single block the token may attend only to itself already: that is no error, and no effect.
    return sl.Patch(sites.PATTERN, layers, positions, edits.AttendSelf(), allow_unchanged=len(layers) == 1)


def look(study: sl.Study, lengths: tuple[int, ...], *patches: sl.Patch) -> dict[str, Tensor]:
    """Means over heads and blocks: attention received ``[prompt, length, key]``; of every query ``[prompt, query]``
    what it pays to the natural sink, and how spread its attention is.
    """
    after = study.after_formation()
    seen = lambda a, _: metrics.received_at_lengths(a, lengths).mean(1)  # noqa: E731
    to_sink = lambda a, at: a[range(len(a)), :, :, study.sinks.to(at.prompts)[at.prompts]].float().mean(1)  # noqa: E731
    readouts = [sl.Readout("received", sites.PATTERN, after, seen)]
    readouts.append(sl.Readout("attention to the natural sink, after formation", sites.PATTERN, after, to_sink))
    for part, layers in (("up to formation", study.up_to_formation), ("after formation", after)):
        for name, metric in SPREAD.items():
            readouts.append(sl.Readout(f"{name}, {part}", sites.PATTERN, layers, lambda a, _, f=metric: f(a).mean(1)))
    return {name: values.mean(0) for name, values in study.measure(readouts, patches).items()}


def by_block(study: sl.Study, k: int, layers: tuple[int, ...], sink: Tensor) -> tuple[pd.DataFrame, Tensor]:
    """Share gained by token k masked in one block alone, and in all blocks from 0 to that; and by no more of the masked
    run than its residual after the formation block, carried into the clean run."""
    blocks, n = study.up_to_formation, study.batch.n
    sets = {"that block alone": [(b,) for b in blocks], "block 0 to that": [blocks[: b + 1] for b in blocks]}
    patches = [mask(layers, (k,)) for each in sets.values() for layers in each]
    carry = sl.Patch(sites.RESID_POST, blocks[-1:], (k,), edits.Transplant(), source=sl.Source("masked"))
    seen = sl.readouts.attention_received("k", study.after_formation(), (k,), n)
    found = study.run([*patches, carry], [seen], {"base": (), "masked": (mask(layers, (k,)),)})
    share = (found.values["k"] - found.runs["base"]["k"]) / sink[:n]
    axes = {"run": tuple(sets), "layer": blocks, "prompt": range(n)}
    return tidy(share[:-1].view(2, len(blocks), n), axes, quantity="by block", token=k), share[-1]


def draw(findings: sl.Findings):
    table = findings.table
    blocks = table[table.quantity == "by block"].groupby(["run", "layer", "token"]).value.mean().reset_index()
    k = blocks.token.iloc[0]
    seen = table[(table.quantity == "received") & (table.length == table.length.max())]
    entropy = table[table.quantity.str.startswith("entropy") & (table.token == k)]
    panels = [
        seen.assign(panel="attention received, token " + seen.token.map(str) + " masked, by position", x=seen.position),
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
    sl.analysis.main(ANALYSIS)
