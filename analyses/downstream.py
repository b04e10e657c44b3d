"""Which heads behind formation use the sink's key, and are they few?

    sinklens analyse downstream

What the super neurons write at the sink's token reaches the keys and values of all later heads. Each of these edges is
run exactly (path patching, Wang et al. 2022; Goldowsky-Dill et al. 2023): one key/value head alone hears what the super
neurons write in the other run, with the norm computed anew, and everybody else hears their own. An effect is a share of
the sink that is made at ``target``: of attention received from later queries, over all heads of the blocks behind
formation. The same of the other neurons of the formation MLP stands in the table.

That keys carry the sink is asked of all their edges at once: are they enough in the run without the sink, and needed in
the run with it? Values of the same heads hear the same in their place; and the keys hear something else of the same
length: what the other neurons of that MLP write at an ordinary token. (Another token's output of the super neurons
themselves is no control: they write along few directions, and at that length it is the sink.) How many heads: those
with the largest edges are put in together, one more at a time, until half of the effect of all is reached.

Pitfalls: the largest edges are chosen on the prompts on which they are counted, which makes them few; equal heads would
take a half. Under grouped queries an edge leads to a key that several query heads share. A key's own pattern is read at
once, so one of twelve can hardly do more than a twelfth; values can only act on blocks that follow, and those of the
last block that is read on nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens.circuits import Edge, Edges, Node
from sinklens.pairs.choice import Direction

CLAIM = "What the super neurons write makes the sink by the keys of later heads, and few of these make most of it."
HALF = 0.5
FEW = 0.3  # ours; heads of equal effect would take a half
KEYS, VALUES, OTHER = "keys", "values", "another token's output in the keys"
CAPTION = (
    "Exact effect of what the super neurons write on the keys of single heads (means over prompts with 95% "
    "intervals): put into the run without the sink (denoise), taken out of that with it (noise)."
)


def run(
    study: sl.Study,
    *,
    target: Annotated[int, "position that is made a sink"] = 10,
    blocks: Annotated[int, "blocks behind formation whose heads are asked", sl.Between(1)] = 4,
    min_gap: Annotated[float, "exclude prompts whose sink is less than this", sl.Between(0)] = 0.01,
) -> sl.Findings:
    (position,) = study.targets((target,))
    edges = Edges.of(sl.Setting.of(study, sl.PairChoice(position), blocks), min_gap=min_gap)
    single, whole = one_by_one(edges), at_once(edges)
    order, grown = growing(edges, single)
    few = how_many(study, grown)
    verdict = sl.analysis.verdict_of(
        CLAIM, [carried(study, whole, "denoise"), carried(study, whole, "noise"), few_heads(few, order)]
    )
    by_set: Any = whole.groupby(["what", "direction"], sort=False)
    numbers: dict[str, sl.Estimate | float] = {
        f"{what} at once ({direction})": study.mean(rows.effect.tolist()) for (what, direction), rows in by_set
    }
    keys = single[(single.sender == super_of(edges).name) & (single.branch == "k")]
    by_key: Any = keys.groupby(["receiver", "direction"], sort=False)
    for (receiver, direction), rows in by_key:
        numbers[f"key of {receiver} ({direction})"] = study.mean(rows.effect.tolist())
    for n, effect in enumerate(grown, start=1):
        numbers[f"the {n} largest keys together (denoise)"] = study.mean(effect)
    return sl.Findings(verdict, pd.concat([single, whole], ignore_index=True), CAPTION, numbers)


def carried(study: sl.Study, whole: Any, direction: Direction) -> sl.analysis.Part:
    """The cause: do all keys at once make the sink, or take it away?"""
    rows = whole[whole.direction == direction].groupby("what")
    keys, values, other = (study.mean(rows.get_group(what).effect.tolist()) for what in (KEYS, VALUES, OTHER))
    enough = direction == "denoise"
    return sl.analysis.judge(
        "cause",
        "enough" if enough else "needed",
        "What later keys hear of the super neurons is enough for the sink."
        if enough
        else "Without what later keys hear of the super neurons there is no sink.",
        statistic=f"effect of the super neurons' edges into all later keys at once ({direction})",
        estimate=keys,
        control="their edges into values in place of keys",
        control_estimate=values,
        rule=f"holds when the whole interval lies above {HALF}, above the control's, and above that of another "
        "token's output of equal length in the same keys",
        conditions=[sl.analysis.above(keys, limit) for limit in (HALF, values, other)],
        detail=f"another token's output: {sl.statistics.estimate_text(other)}",
    )


def few_heads(few: sl.Estimate, order: list[Edge]) -> sl.analysis.Part:
    """The quantity: how many heads make half of it?"""
    sentence = "Few heads make half of what all later keys do."
    if not np.isfinite(few.value):
        return sl.analysis.unmeasured("quantity", "few heads", sentence, "all later keys together make nothing")
    first = ", ".join(edge.receiver.name for edge in order[: max(1, round(few.value * len(order)))])
    return sl.analysis.judge(
        "quantity",
        "few heads",
        sentence,
        statistic="share of the key/value heads behind formation, the largest first, whose edges together make half",
        estimate=few,
        control="heads of equal effect, by construction",
        control_estimate=sl.Estimate(HALF, HALF, HALF, few.n),
        rule=f"holds when the whole interval lies below {FEW}",
        conditions=[sl.analysis.below(few, FEW)],
        detail=f"of {len(order)}; the largest: {first}",
    )


def super_of(edges: Edges) -> Node:
    return Node("super", edges.graph.formation)


def one_by_one(edges: Edges) -> pd.DataFrame:
    """Every edge from the super neurons, and from the others of their MLP, into later keys and values, alone."""
    senders = (super_of(edges), Node("mlp", edges.graph.formation))
    single = [edge for branch in "kv" for edge in into(edges, branch, senders)]
    tables = []
    for direction in edges.measure.setting.pair.directions:
        labels = [label(edge.sender, edge.receiver.name, edge.branch, direction, "one edge") for edge in single]
        tables.append(edges.table([[edge] for edge in single], labels, direction))
    return pd.concat(tables, ignore_index=True)


def label(sender: Node, receiver: str, branch: str, direction: Direction, what: str) -> dict[str, str]:
    """The columns that say what an effect is of."""
    return {"sender": sender.name, "receiver": receiver, "branch": branch, "direction": direction, "what": what}


def into(edges: Edges, branch: str, senders: tuple[Node, ...]) -> tuple[Edge, ...]:
    """Edges into the keys or values of all heads of the blocks behind formation."""
    later = edges.measure.setting.readout_layers
    inputs = [key for layer in later for key in edges.graph.inputs_of(layer) if key[1] == branch]
    return edges.into(inputs, senders)


def at_once(edges: Edges) -> pd.DataFrame:
    """All keys at once, all values, and all keys with another token's output; in both directions."""
    sender = super_of(edges)
    keys, values = (into(edges, branch, (sender,)) for branch in "kv")
    tables = []
    for direction in edges.measure.setting.pair.directions:
        of_keys, of_values, of_other = (
            label(sender, "all", branch, direction, what) for branch, what in (("k", KEYS), ("v", VALUES), ("k", OTHER))
        )
        tables.append(edges.table([keys, values], [of_keys, of_values], direction))
        tables.append(edges.table([keys], [of_other], direction, elsewhere(edges)))
    return pd.concat(tables, ignore_index=True)


def elsewhere(edges: Edges) -> Float[Tensor, "sender prompt d_model"]:
    """The super neurons say what the other neurons of their MLP write at an ordinary token, at their own length."""
    number, said = edges.graph.number, edges.other_token.clone()
    super_neurons, other_neurons = number[super_of(edges)], number[Node("mlp", edges.graph.formation)]
    said[super_neurons] = sl.edits.resized(said[other_neurons], edges.change[super_neurons])
    return said


def growing(edges: Edges, single: Any) -> tuple[list[Edge], Float[np.ndarray, "n prompt"]]:
    """Edges into keys by their effects, the largest first; and what the first 1, 2, ... of them do together."""
    rows = single[(single.sender == super_of(edges).name) & (single.branch == "k") & (single.direction == "denoise")]
    size = rows.groupby("receiver").effect.mean()
    order = sorted(into(edges, "k", (super_of(edges),)), key=lambda edge: -size[edge.receiver.name])
    return order, edges.at_once([order[:n] for n in range(1, len(order) + 1)], "denoise")


def how_many(study: sl.Study, grown: Float[np.ndarray, "n prompt"]) -> sl.Estimate:
    """Share of the heads, the largest first, that make half of what all make together; NaN where all make nothing."""
    there = np.nonzero(np.isfinite(grown[-1]))[0]

    def share(chosen: np.ndarray) -> float:
        together = grown[:, there[chosen]].mean(1)
        reached = together >= HALF * together[-1]
        return (1 + int(reached.argmax())) / len(grown) if together[-1] > 0 else np.nan

    return study.bootstrap(share, there.tolist())


def draw(findings: sl.Findings):
    rows = [
        {"head": name.split(" (")[0].removeprefix("key of "), "effect": x.value, "low": x.low, "high": x.high}
        | {"direction": name.split(" (")[1].removesuffix(")")}
        for name, x in findings.numbers.items()
        if isinstance(x, sl.Estimate) and name.startswith("key of ")
    ]
    titles = {"head": "", "effect": "effect of the edge into its key"}
    return sl.viz.points(
        pd.DataFrame(rows), "head", "effect", series="direction", low="low", high="high", titles=titles
    )


ANALYSIS = sl.Analysis(
    name="downstream",
    title="Who uses the sink's key",
    claim=CLAIM,
    run=run,
    draw=draw,
    group="circuits",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
