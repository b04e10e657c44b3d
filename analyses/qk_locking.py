"""Is the sink's key aligned with the principal direction of the queries, and is its score positive where it is?

    python analyses/qk_locking.py

For every query head of the blocks after formation, u1 is the top right singular vector of the queries behind the sink,
all prompts together; its sign makes the product with the mean query positive. A head's alignment is the cosine of the
sink's key with u1; the positive share is how many of these queries have a positive product with that key. Under
grouped-query attention several query heads meet the same key: ``pool`` = group takes one u1 for all of them together.

Queries and keys are those before rotary embedding (and before a norm of their own, where a model has one); ``rope`` =
after takes what scores are made of. The control is the key of an ordinary position, with the queries behind that.

The paper shows single blocks; here the first after formation stands beside all. Is it the cause? The component of the
sink's key along the pooled queries' direction is removed, or one along a random direction; and the key is replaced by
its mean over prompts, or by others of the same norm, of ordinary tokens, and by zero.

Aligned: a cosine above 0.5, so less than 60 degrees (random directions in 64 dimensions have 0 +- 0.125). Almost
always: for more than nine queries in ten.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites, statistics

CLAIM = (
    "The sink's key is aligned with the queries' principal direction, and heads with high alignment give it a positive "
    "score almost always."
)
CAPTION = (
    "Every point is a query head after formation (mean over prompts): the alignment of the sink's key, and of an "
    "ordinary one's, against its share of positive scores and the attention received. Dashed: counts as aligned."
)
SITES = {"before": (sites.Q, sites.K), "after": (sites.ROT_Q, sites.ROT_K)}
TOKENS = ("sink", "ordinary")
SINK, ORDINARY = range(2)
QUANTITIES = ("alignment", "positive share", "attention received")
ALIGNMENT, POSITIVE, ATTENTION = range(3)
ALIGNED, ALMOST_ALWAYS, N_PERMUTATIONS = 0.5, 0.9, 2000

Values = Float[Tensor, "token quantity layer prompt head"]
Queries = Float[Tensor, "layer prompt pos kv_head group d_head"]


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "how many blocks after formation", sl.Between(1)] = 4,
    rope: Annotated[Literal["before", "after"], "queries and keys before or after rotary embedding"] = "before",
    pool: Annotated[Literal["head", "group"], "one u1 for each query head, or for all that share a key head"] = "head",
    centred: Annotated[bool, "subtract the mean query before taking u1"] = False,
    sign: Annotated[Literal["mean_query", "absolute"], "u1 along the mean query, or |cosine|"] = "mean_query",
) -> sl.Findings:
    if rope == "after" and not study.shape.rotary:
        raise sl.NotApplicableError("the model has no rotary embedding: its queries and keys are never rotated")
    layers = study.after_formation(blocks)
    values = token_values(study, layers, rope, pool, centred, sign)
    by_head = values[SINK].mean(2).flatten(1)  # [quantity, layer and head]
    high = by_head[ALIGNMENT] > ALIGNED
    aligned, control = (study.mean(each.mean((0, 2))) for each in values[:, ALIGNMENT])
    positive, ordinary = (study.mean(heads(each)[high].mean(0)) for each in values[:, POSITIVE])
    taus, p_values = rank_correlations(by_head, study.generator("qk_locking/permuted"))
    parts = [alignment(f"mean over {len(high)} heads", "all blocks", aligned, control)]
    if len(layers) > 1:
        first, usual = (study.mean(each[0].mean(-1)) for each in values[:, ALIGNMENT])
        parts.append(alignment(f"mean over heads of block {layers[0]}", f"block {layers[0]}", first, usual))
    parts.append(almost_always_positive(positive, ordinary))
    verdict = sl.analysis.verdict_of(CLAIM, [*parts, *causes(study)])
    axes = {"token": TOKENS, "quantity": QUANTITIES, "layer": layers, "prompt": range(study.batch.n)}
    table = sl.analysis.tidy(values, axes | {"head": range(study.shape.n_heads)})
    numbers = {
        "cosine of the sink's key minus an ordinary key's": study.mean(difference(values[:, ALIGNMENT])),
        f"share of heads with an alignment above {ALIGNED}": float(high.double().mean()),
        "positive share of the sink's scores in these heads": positive,
        "positive share of an ordinary key's scores in these heads": ordinary,
        "positive share of the sink's scores, all heads": study.mean(values[SINK, POSITIVE].mean((0, 2))),
    }
    return sl.Findings(verdict, table, CAPTION, numbers | rank_numbers(taus, p_values))


def alignment(over: str, name: str, aligned: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    """The quantity: does the sink's key point along the queries?"""
    return sl.analysis.judge(
        "quantity",
        name,
        "The sink's key is aligned with the queries' principal direction.",
        statistic=f"cosine of the sink's key with the queries' principal direction, {over}",
        estimate=aligned,
        control="the same of an ordinary position's key",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {ALIGNED} and above the control's",
        conditions=[sl.analysis.above(aligned, ALIGNED), sl.analysis.above(aligned, control)],
    )


def almost_always_positive(positive: sl.Estimate, ordinary: sl.Estimate) -> sl.analysis.Part:
    """The quantity: is the score positive where the key is aligned?"""
    return sl.analysis.judge(
        "quantity",
        "positive scores",
        "Heads with high alignment give the sink a positive score almost always.",
        statistic=f"share of positive scores in the heads whose cosine exceeds {ALIGNED}",
        estimate=positive,
        control="the same of an ordinary position's key",
        control_estimate=ordinary,
        rule=f"holds when the whole interval lies above {ALMOST_ALWAYS} and above the control's",
        conditions=[sl.analysis.above(positive, ALMOST_ALWAYS), sl.analysis.above(positive, ordinary)],
    )


def causes(study: sl.Study) -> list[sl.analysis.Part]:
    """Does the key act along that direction, and is a constant one all there is?"""
    asked = (
        (
            "query direction",
            "query_direction_removed",
            "random_direction",
            "The key is a sink's by its component along the queries' principal direction.",
        ),
        (
            "constant key",
            "constant_key",
            ("random_key", "ordinary_key", "zero"),
            "The sink's key is locked: the same one in every prompt does as well, and no other does.",
        ),
    )
    stage = sl.stages.QK_LOCKING
    return [
        sl.analysis.cause(study, stage, edit, control, name=name, sentence=sentence)
        for name, edit, control, sentence in asked
    ]


def token_values(study: sl.Study, layers: tuple[int, ...], rope: str, pool: str, centred: bool, sign: str) -> Values:
    """Alignment, positive share and attention received, of the sink's key and of an ordinary position's."""
    query_site, key_site = SITES[rope]
    readings = study.measure(
        [
            sl.Readout("queries", query_site, layers, lambda q, _: q.float().clone()),
            sl.Readout("keys", key_site, layers, lambda k, _: k.float().clone()),
            sl.Readout("attention", sites.PATTERN, layers, lambda a, _: metrics.attention_received(a)),
        ]
    )
    by_group = "layer prompt pos (kv group) d -> layer prompt pos kv group d"
    queries = rearrange(readings["queries"], by_group, kv=study.shape.n_kv_heads)
    u1 = principal(queries[:, behind(study, study.sinks)], pool, centred)
    values = []
    for where in (study.sinks, study.ordinary_position("qk_locking/ordinary")):
        key = readings["keys"][:, torch.arange(len(where)), where][..., None, :]  # [layer, prompt, kv_head, 1, d_head]
        cosine = metrics.cosine(key, u1[:, None]).flatten(-2)
        alignment = cosine.abs() if sign == "absolute" else cosine
        attention = readings["attention"].take_along_dim(where[None, :, None, None], -1).squeeze(-1)
        values.append(torch.stack([alignment, positive_share(queries, key, behind(study, where)), attention]))
    return torch.stack(values)


def positive_share(
    queries: Queries, key: Float[Tensor, "layer prompt kv_head 1 d_head"], asked: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "layer prompt head"]:
    """Share of the queries that are asked whose product with the key is positive."""
    positive = (queries * key[:, :, None]).sum(-1).flatten(-2) > 0  # [layer, prompt, pos, head]
    return (positive & asked[..., None]).sum(2) / asked.sum(1)[:, None]


def behind(study: sl.Study, where: Int[Tensor, " prompt"]) -> Bool[Tensor, "prompt pos"]:
    """Marks the positions after ``where``, the sink's own not among them."""
    positions = torch.arange(study.batch.length)
    return (positions > where[:, None]) & (positions != study.sinks[:, None])


def principal(
    queries: Float[Tensor, "layer place kv_head group d_head"], pool: str, centred: bool
) -> Float[Tensor, "layer kv_head group d_head"]:
    """u1 of every query head."""
    pooled = "l kv group place d" if pool == "head" else "l kv 1 (place group) d"
    rows = rearrange(queries, f"l place kv group d -> {pooled}")
    mean = rows.mean(-2, keepdim=True)
    u1 = metrics.principal_direction(rows - mean if centred else rows)
    u1 = torch.where((u1 * mean.squeeze(-2)).sum(-1, keepdim=True) < 0, -u1, u1)
    return u1.expand(-1, -1, queries.shape[3], -1)


def difference(values: Float[Tensor, "token layer prompt head"]) -> Float[Tensor, " prompt"]:
    """The sink's minus an ordinary position's, mean over heads."""
    return (values[SINK] - values[ORDINARY]).mean((0, 2))


def heads(values: Float[Tensor, "layer prompt head"]) -> Float[Tensor, "layer_and_head prompt"]:
    return values.movedim(1, 2).flatten(0, 1)


def rank_correlations(by_head: Float[Tensor, "quantity head"], rng: torch.Generator) -> tuple[list[float], list[float]]:
    """Kendall's tau of the alignment with each other quantity, and p when heads are permuted."""
    alignment, others = by_head[:1], by_head[1:]
    orders = statistics.random_orders((N_PERMUTATIONS, alignment.shape[1]), rng)
    tau, null = metrics.kendall_tau(alignment, others)[0], metrics.kendall_tau(alignment[0, orders], others)
    return tau.tolist(), [statistics.permutation_p(float(t), draws) for t, draws in zip(tau, null.T, strict=True)]


def rank_numbers(taus: list[float], p_values: list[float]) -> dict[str, float]:
    lines = {}
    for quantity, tau, p in zip(QUANTITIES[1:], taus, p_values, strict=True):
        lines |= {f"Kendall's tau over heads, alignment and {quantity}": tau, f"its p ({quantity})": p}
    return lines


def draw(findings: sl.Findings):
    wide = findings.table.pivot_table("value", ["token", "layer", "head"], "quantity", sort=False).reset_index()
    points = wide.melt(["token", "layer", "head", "alignment"], list(QUANTITIES[1:]), "quantity")
    titles = {"alignment": "cosine of the key with u1", "value": "", "token": ""}
    figure = sl.viz.points(
        points, "alignment", "value", series="token", facet="quantity", titles=titles, hover=("layer", "head")
    )
    return sl.viz.mark(figure.update_yaxes(range=[-0.03, 1.03]), x=ALIGNED)


ANALYSIS = sl.Analysis(
    name="qk_locking",
    title="QK locking, head by head",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 12",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
