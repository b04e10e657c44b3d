"""Do gradients pile up on the sink, and does its norm keep them out of the residual stream?

    sinklens analyse gradient_sinks

Chen, Lin and Yao (arXiv 2603.17771) see a sink from behind: every query that looks at the sink sends the gradient of
its value there, so that at the output of the norm in front of attention the sink's gradient is many times an ordinary
token's (``R_GS``). On its way back into the residual stream it is divided by the sink's norm, since the Jacobian of a
norm goes with ``1 / |h|``; that, they say, is what the norm grows for.

Both can be asked of any finished model. *By way of values*: the values of the sink are held at what they are, so that
the forward pass is the same and no gradient passes through them. What is left of R_GS is what does not come by them;
with the keys held instead it must stay. *By its norm*: the gradient that comes out of a block's norm is worked out for
the same hidden state at the norm of an ordinary token, and Change, the factor by which the block lengthens the gradient
of the residual stream, is compared with what it is.

Pitfalls: a finished model says nothing of what made the norm grow in training. Gradients here are of the mean loss of a
prompt, whose scale cancels in every ratio. A model that passes no gradients on (a quantised one, say) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites
from sinklens.attribution.trace import Node, Trace, trace_run
from sinklens.models.identities import identities
from sinklens.models.view import has_hook
from sinklens.sites import ATTN_OUT, LN1_NORMALIZED, RESID_PRE

CLAIM = "Gradients pile up on the sink by way of its values, and its norm keeps them out of the residual stream."
LEAST = 2.0  # ours: twice an ordinary token's gradient
HALF = 0.5  # ours
GROWN = 1.5  # ours
LN1_OUT = sl.HookSite("blocks.{layer}.ln1.hook_out", LN1_NORMALIZED.axes)
"""The output with its weight, which a bridge has; in a HookedTransformer the weight comes behind the last hook."""
SINK, ORDINARY = "sink", "ordinary"
FREE, VALUES, KEYS = "R_GS", "R_GS without the gradient of its values", "R_GS without the gradient of its keys"
AS_ORDINARY = "Change at an ordinary norm"
CAPTION = (
    "Block by block, of the sink and of an ordinary token: R_GS, the gradient at the output of the norm before "
    "attention over that of other tokens; Bloat, Compress and Change of that norm. Medians over prompts. The dashed "
    "line is the formation block."
)

Flow = dict[tuple[str, str], Float[Tensor, "layer prompt"]]
"""By quantity and token."""


def run(
    study: sl.Study,
    *,
    prompts: Annotated[int, "prompts that are run at once: a graph is kept of each", sl.Between(1)] = 8,
) -> sl.Findings:
    layers = tuple(range(study.shape.n_layers))
    for identity in ("norm_before_attention", "attention_adds"):
        study.require(identity, layers)
    for site in (sites.V, sites.K):  # a gradient is taken by position: the axes must be what the sites say
        identities(study.model).check_layout(site.template, layers)
    flow = gradients(study, layers, prompts)
    late = list(study.after_formation(None))

    def typical(quantity: str, token: str = SINK) -> Float[Tensor, " prompt"]:
        """The median over the blocks behind formation, for every prompt."""
        return flow[quantity, token][late].quantile(0.5, dim=0)

    piled, elsewhere = (study.mean(typical(FREE, token)) for token in (SINK, ORDINARY))
    left, control = (study.mean(typical(name) / typical(FREE)) for name in (VALUES, KEYS))
    as_ordinary, change = (study.mean(typical(name)) for name in (AS_ORDINARY, "Change"))
    verdict = sl.analysis.verdict_of(
        CLAIM, [piles(piled, elsewhere), by_values(left, control), damped(as_ordinary, change)]
    )
    numbers = {f"{name}, {token}": study.mean(typical(name, token)) for name, token in flow}
    axes = {"layer": layers, "prompt": range(study.batch.n)}
    formation = study.formation.layer
    tables = [sl.analysis.tidy(x, axes, quantity=q, token=t, formation=formation) for (q, t), x in flow.items()]
    return sl.Findings(verdict, pd.concat(tables, ignore_index=True), CAPTION, numbers)


def piles(ratio: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "pile up",
        "Gradients pile up on the sink.",
        statistic="R_GS of the sink: its gradient at the output of the norm before attention over the mean of other "
        "tokens', median over the blocks behind formation",
        estimate=ratio,
        control="the same of an ordinary token",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {LEAST:g} and above the control's",
        conditions=[sl.analysis.above(ratio, LEAST), sl.analysis.above(ratio, control)],
    )


def by_values(left: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "by way of values",
        "They come by way of the sink's values.",
        statistic="share of R_GS that is left when no gradient passes through the sink's values",
        estimate=left,
        control="the same of its keys",
        control_estimate=control,
        rule=f"holds when the interval lies below {HALF} and below the control's",
        conditions=[sl.analysis.below(left, HALF), sl.analysis.below(left, control)],
    )


def damped(as_ordinary: sl.Estimate, change: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "damped by its norm",
        "Its norm keeps them out of the residual stream.",
        statistic="Change of the sink if its hidden state had an ordinary norm: by what factor a block's attention "
        "would lengthen the gradient of its residual stream, median over the blocks behind formation",
        estimate=as_ordinary,
        control="Change as it is",
        control_estimate=change,
        rule=f"holds when the interval lies above {GROWN} and the control's below",
        conditions=[sl.analysis.above(as_ordinary, GROWN), sl.analysis.below(change, GROWN)],
    )


def gradients(study: sl.Study, layers: Sequence[int], at_once: int) -> Flow:
    """Every quantity, a few prompts at a time."""
    ordinary = study.ordinary_position("gradient_sinks/ordinary")
    flows: list[Flow] = []
    for first in range(0, study.batch.n, at_once):
        prompts = torch.arange(first, min(first + at_once, study.batch.n))
        where = {SINK: study.sinks[prompts], ORDINARY: ordinary[prompts]}
        flows.append(of_some(study, prompts, layers, where))
    return {key: torch.cat([flow[key] for flow in flows], 1) for key in flows[0]}


def of_some(study: sl.Study, prompts: Tensor, layers: Sequence[int], where: dict[str, Tensor]) -> Flow:
    """The same of these prompts: one backward pass as it is, one with the sink's values held, one with its keys."""
    normed = norm_site(study)
    nodes = [Node(site, layer) for site in (RESID_PRE, ATTN_OUT, normed) for layer in layers]
    held = [Node(site, layer) for site in (sites.V, sites.K) for layer in layers]
    whole = traced(study, prompts, (), {*nodes}, {*held})
    flow = {}
    for token, at in where.items():
        flow |= {(name, token): x for name, x in flow_at(study, whole, layers, at).items()}
    for name, site in ((VALUES, sites.V), (KEYS, sites.K)):
        vectors = {
            layer: all_prompts(study, prompts, one_of(whole.acts[Node(site, layer)], where[SINK])) for layer in layers
        }
        root = sl.Patch(site, tuple(layers), study.sink, edits.PerPrompt("held", vectors), allow_unchanged=True)
        trace = traced(study, prompts, (root,), {node for node in nodes if node.site == normed}, set())
        ratios = [metrics.gradient_ratio(at_norm(study, trace, layer), where[SINK]) for layer in layers]
        flow[name, SINK] = torch.stack(ratios).cpu()
    return flow


def traced(study: sl.Study, prompts: Tensor, roots: tuple[sl.Patch, ...], wrt: set[Node], keep: set[Node]) -> Trace:
    """The loss of some prompts, differentiated.

    Raises:
        NotApplicableError: the model passes no gradients on.
    """
    try:
        return trace_run(
            study.model, study.batch.tokens[prompts], prompts, roots, [study.readout("loss")], keep=keep, wrt=wrt
        )
    except sl.EngineError as error:
        raise sl.NotApplicableError(f"there are no gradients of this model: {error}") from error


def at_norm(study: sl.Study, trace: Trace, layer: int) -> Float[Tensor, "prompt pos d_model"]:
    """``g2``: the gradient at the output of the norm, its weight applied."""
    if (site := norm_site(study)) == LN1_OUT:
        return trace.grads["loss", Node(site, layer)].float()
    weight = study.weights(layer).ln1_w.detach().float()
    if bool((weight == 0).any()):
        raise sl.NotApplicableError(f"the norm of block {layer} has weights of zero: no gradient is known behind these")
    return trace.grads["loss", Node(LN1_NORMALIZED, layer)].float() / weight


def norm_site(study: sl.Study) -> sl.HookSite:
    return LN1_OUT if has_hook(study.model, LN1_OUT.at(0)) else LN1_NORMALIZED


def flow_at(
    study: sl.Study, trace: Trace, layers: Sequence[int], at: Tensor
) -> dict[str, Float[Tensor, "layer prompt"]]:
    """R_GS, Bloat, Compress and Change at one position of every prompt."""
    quantities: dict[str, list[Tensor]] = {}
    for layer in layers:
        h = trace.acts[Node(RESID_PRE, layer)].float()
        before = one_of(trace.grads["loss", Node(ATTN_OUT, layer)].float(), at)
        behind = at_norm(study, trace, layer)
        here, upstream = one_of(h, at), one_of(behind, at) * study.weights(layer).ln1_w.detach().float()
        usual = metrics.vector_norm(h).quantile(0.5, dim=1) / metrics.vector_norm(here)
        as_is, scaled = (through(study, x, upstream) for x in (here, here * usual[:, None]))
        flow = metrics.gradient_flow(before, one_of(behind, at), as_is)
        values = {FREE: metrics.gradient_ratio(behind, at), "Bloat": flow.bloat, "Compress": flow.compress}
        values |= {"Change": flow.change, AS_ORDINARY: metrics.gradient_flow(before, upstream, scaled).change}
        for name, x in values.items():
            quantities.setdefault(name, []).append(x.cpu())
    return {name: torch.stack(values) for name, values in quantities.items()}


def through(study: sl.Study, h: Tensor, upstream: Tensor) -> Tensor:
    return metrics.back_through_norm(h, upstream, study.shape.norm_eps, centred=study.shape.norm == "layer")


def one_of(x: Float[Tensor, "prompt pos *rest"], at: Tensor) -> Float[Tensor, "prompt *rest"]:
    return x[torch.arange(len(x), device=x.device), at.to(x.device)]


def all_prompts(study: sl.Study, prompts: Tensor, values: Tensor) -> Tensor:
    """Values of some prompts in a tensor with room for all: an edit finds its own by the prompt's number."""
    room = values.new_zeros(study.batch.n, *values.shape[1:])
    room[prompts.to(room.device)] = values
    return room


def draw(findings: sl.Findings):
    table = findings.table[findings.table.quantity.isin((FREE, "Bloat", "Compress", "Change"))]
    lines = table.groupby(["quantity", "token", "layer"], sort=False).value.median().reset_index()
    titles = {"layer": "block", "value": "", "token": ""}
    figure = sl.viz.line(
        lines, "layer", "value", series="token", facet="quantity", titles=titles, log_y=True, height=260
    )
    figure.update_yaxes(matches=None, showticklabels=True)
    return sl.viz.mark(figure, x=int(findings.table.formation.iloc[0]))


ANALYSIS = sl.Analysis(
    name="gradient_sinks",
    title="Gradients that pile up",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="R_GS of token 0: 15.5 (0.1B), 106.7 (Qwen3-8B) (Chen, Lin and Yao, arXiv 2603.17771)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
