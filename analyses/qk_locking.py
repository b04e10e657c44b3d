"""Is the sink's key aligned with the principal direction of the queries, and is its score positive where it is?

    python analyses/qk_locking.py

For every query head of the blocks after formation, u1 is the top right singular vector of the queries behind the sink,
all prompts together; its sign makes the product with the mean query positive. A head's alignment is the cosine of the
sink's key with u1; the positive share is how many of these queries have a positive product with that key. Under
grouped-query attention several query heads meet the same key: ``pool`` = group takes one u1 for all of them together.

Queries and keys are those before rotary embedding (and before a norm of their own, where a model has one); ``rope`` =
after takes what scores are made of. The control is the key of an ordinary position, with the queries behind that.

Aligned: a cosine above 0.5, so less than 60 degrees (random directions in 64 dimensions have 0 +- 0.125). Almost
always: for more than nine queries in ten.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from einops import rearrange
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = (
    "The sink's key is aligned with the queries' principal direction, and heads with high alignment give it a positive "
    "score almost always."
)
SITES = {"before": (sites.Q, sites.K), "after": (sites.ROT_Q, sites.ROT_K)}
QUANTITIES = ("alignment", "positive share", "attention received")
ALIGNED, ALMOST_ALWAYS, N_PERMUTATIONS = 0.5, 0.9, 2000


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "how many blocks after formation"] = 4,
    rope: Annotated[Literal["before", "after"], "queries and keys before or after rotary embedding"] = "before",
    pool: Annotated[Literal["head", "group"], "one u1 for each query head, or for all that share a key head"] = "head",
    centred: Annotated[bool, "subtract the mean query before taking u1"] = False,
    sign: Annotated[Literal["mean_query", "absolute"], "u1 along the mean query, or |cosine|"] = "mean_query",
) -> sl.Findings:
    if rope == "after" and not study.shape.rotary:
        raise sl.NotApplicableError("the model has no rotary embedding: its queries and keys are never rotated")
    layers, (q, k), n_kv_heads = study.after_formation(blocks), SITES[rope], study.shape.n_kv_heads
    found = study.measure(
        [
            sl.Readout("queries", q, layers, lambda act, _rows: act.float().clone()),
            sl.Readout("keys", k, layers, lambda act, _rows: act.float().clone()),
            sl.Readout("attention", sites.PATTERN, layers, lambda act, _rows: metrics.attention_received(act)),
        ]
    )
    queries = rearrange(found["queries"], "l prompt pos (kv group) d -> l prompt pos kv group d", kv=n_kv_heads)
    u1 = principal(queries[:, behind(study, study.sinks)], pool, centred)  # [layer, kv_head, group, d_head]
    tokens = {"sink": study.sinks, "ordinary": study.ordinary_position("qk_locking/ordinary")}
    values = []
    for where in tokens.values():
        key = found["keys"][:, torch.arange(len(where)), where][..., None, :]  # [layer, prompt, kv_head, 1, d_head]
        cosine = metrics.cosine(key, u1[:, None]).flatten(-2)
        asked = behind(study, where)
        positive = (queries * key[:, :, None]).sum(-1).flatten(-2) > 0  # [layer, prompt, pos, head]
        share = (positive & asked[..., None]).sum(2) / asked.sum(1)[:, None]
        attention = found["attention"].take_along_dim(where[None, :, None, None], -1).squeeze(-1)
        values.append(torch.stack([cosine.abs() if sign == "absolute" else cosine, share, attention]))
    both = torch.stack(values)  # [token, quantity, layer, prompt, head]
    by_head = both[0].mean(2).flatten(1)  # [quantity, layer and head]
    high = by_head[0] > ALIGNED
    aligned, control = (study.mean(x.mean((0, 2))) for x in both[:, 0])
    positive, ordinary = (study.mean(x.movedim(1, 2).flatten(0, 1)[high].mean(0)) for x in both[:, 1])
    taus, p_values = rank_correlations(by_head, study.generator("qk_locking/permuted"))
    verdict = sl.verdict(
        CLAIM,
        f"cosine of the sink's key with the queries' principal direction, mean over {len(high)} heads",
        aligned,
        "the same of an ordinary position's key",
        control,
        f"holds when the whole interval lies above {ALIGNED} and above the control's, and in the heads that exceed "
        f"{ALIGNED} that of the positive share above {ALMOST_ALWAYS} and an ordinary key's (p is that of Kendall's tau "
        "of alignment and positive share over heads; it does not decide)",
        holds=aligned.above(max(ALIGNED, control.high)) and positive.above(max(ALMOST_ALWAYS, ordinary.high)),
        p_value=p_values[0],
    )
    numbers = {
        "cosine of the sink's key minus an ordinary key's": study.mean((both[0, 0] - both[1, 0]).mean((0, 2))),
        f"share of heads with an alignment above {ALIGNED}": float(high.double().mean()),
        "positive share of the sink's scores in these heads": positive,
        "positive share of an ordinary key's scores in these heads": ordinary,
        "positive share of the sink's scores, all heads": study.mean(both[0, 1].mean((0, 2))),
    }
    for quantity, tau, p in zip(QUANTITIES[1:], taus, p_values, strict=True):
        numbers |= {f"Kendall's tau over heads, alignment and {quantity}": tau, f"its p ({quantity})": p}
    axes = {"token": tokens, "quantity": QUANTITIES, "layer": layers, "prompt": range(study.batch.n)}
    axes |= {"head": range(study.shape.n_heads)}
    caption = (
        "Every point is a query head after formation (mean over prompts): the alignment of the sink's key, and of an "
        "ordinary one's, against its share of positive scores and the attention received. Dashed: counts as aligned."
    )
    return sl.Findings(verdict, sl.analysis.tidy(both, axes), caption, numbers)


def behind(study: sl.Study, where: Tensor) -> Tensor:
    """Marks the positions after ``where``, the sink's own not among them, ``[prompt, pos]``."""
    positions = torch.arange(study.batch.length)
    return (positions > where[:, None]) & (positions != study.sinks[:, None])


def principal(queries: Tensor, pool: str, centred: bool) -> Tensor:
    """u1 of every query head, ``[layer, place, kv_head, group, d_head] -> [layer, kv_head, group, d_head]``."""
    target = "l kv group place d" if pool == "head" else "l kv 1 (place group) d"
    chosen = rearrange(queries, f"l place kv group d -> {target}")
    mean = chosen.mean(-2, keepdim=True)
    u1 = metrics.principal_direction(chosen - mean if centred else chosen)
    u1 = torch.where((u1 * mean.squeeze(-2)).sum(-1, keepdim=True) < 0, -u1, u1)
    return u1.expand(-1, -1, queries.shape[3], -1)


def rank_correlations(by_head: Tensor, rng: torch.Generator) -> tuple[list[float], list[float]]:
    """Kendall's tau of the first quantity with each other, ``[quantity, head]``, and p when heads are permuted."""
    alignment, others = by_head[:1], by_head[1:]
    order = torch.rand(N_PERMUTATIONS, alignment.shape[1], generator=rng).argsort(-1)
    tau, null = metrics.kendall_tau(alignment, others)[0], metrics.kendall_tau(alignment[0, order], others)
    return tau.tolist(), [sl.statistics.permutation_p(float(t), x) for t, x in zip(tau, null.T, strict=True)]


def draw(findings: sl.Findings):
    heads = findings.table.pivot_table("value", ["token", "layer", "head"], "quantity", sort=False).reset_index()
    shown = heads.melt(["token", "layer", "head", "alignment"], list(QUANTITIES[1:]), "quantity")
    titles = {"alignment": "cosine of the key with u1", "value": "", "token": ""}
    look = {"series": "token", "facet": "quantity", "titles": titles, "hover": ("layer", "head")}
    figure = sl.viz.points(shown, "alignment", "value", **look).update_yaxes(range=[-0.03, 1.03])
    return sl.viz.mark(figure, x=ALIGNED)


ANALYSIS = sl.Analysis(
    name="qk_locking",
    title="QK locking, head by head",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 12",
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
