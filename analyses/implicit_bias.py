"""Is the sink a bias in disguise: a key and a value that are the same in every prompt?

    sinklens analyse implicit_bias

Sun et al. (COLM 2024) read the sink as an implicit bias of attention: whatever the prompt, the sink offers every head
one key and one value, and a model that is given such a pair as parameters (``softmax(Q [K k']) [V; v']``) needs no
sink. So how much of the sink's key and value is a constant? Here of each prompt's own the mean over *the other* prompts
is taken away: what that leaves of the squared norm is what the prompt itself has to say. An ordinary position has a
mean too, and is the control.

The cause is asked of the loss: behind the formation block the sink gets, in every head, the other prompts' mean key and
value. If all that counts is a bias, nothing is lost. What there is to lose is what the same constants of an ordinary
position cost in its place.

Pitfalls: prompts that begin with one token (BOS) have a constant sink by construction, and there is nothing to ask.
Keys are taken before they are rotated, so that a sink that stands elsewhere in another prompt has its own position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites

CLAIM = "The sink's key and value are constants, and constants in their place do no harm."
MOST = 0.9  # ours
HARM = 0.02  # ours, nats a token: about the spread of a loss between seeds in pre-training studies
WHAT = {"key": sites.K, "value": sites.V}
SINK, ORDINARY = "sink", "ordinary"
CAPTION = (
    "Share of the squared norm of the sink's key and value, and of an ordinary position's, that is the mean over the "
    "other prompts, block by block: mean over heads and prompts, and the range of 95% of the prompts. The dashed line "
    "is the formation block."
)

Vectors = Mapping[int, Float[Tensor, "prompt kv_head d_head"]]


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "blocks behind formation in which constants are put; 0: all up to the next event"] = 0,
) -> sl.Findings:
    sl.analysis.check_sink_varies(study)
    layers = study.after_formation(blocks or None)
    other = study.ordinary_position("implicit_bias/ordinary")
    places = {SINK: study.sinks, ORDINARY: other}
    everywhere = tuple(range(study.shape.n_layers))
    vectors = {name: at(study, site, everywhere, places) for name, site in WHAT.items()}
    shares = {(name, who): share(vectors[name][who]) for name in WHAT for who in places}  # [layer prompt head]
    late = {key: study.mean(x[list(layers)].mean((0, 2))) for key, x in shares.items()}
    parts = [constant(name, late[name, SINK], late[name, ORDINARY]) for name in WHAT]
    added = losses(study, layers, vectors)
    verdict = sl.analysis.verdict_of(CLAIM, [*parts, harmless(study, added)])
    numbers = {f"loss added, nats a token: {name}": study.mean(x) for name, x in added.items()}
    axes = {"layer": everywhere, "prompt": range(study.batch.n)}
    formation = study.formation.layer
    tables = [
        sl.analysis.tidy(x.mean(-1), axes, what=name, token=who, formation=formation)
        for (name, who), x in shares.items()
    ]
    return sl.Findings(verdict, pd.concat(tables, ignore_index=True), CAPTION, numbers)


def at(study: sl.Study, site: sl.HookSite, layers: tuple[int, ...], places: Mapping[str, Tensor]) -> dict[str, Vectors]:
    """One position of every prompt, in every block."""
    vectors: dict[str, dict[int, Tensor]] = {who: {} for who in places}
    for layer, act in study.activations(site, layers).items():
        for who, positions in places.items():
            vectors[who][layer] = act[torch.arange(len(act), device=act.device), positions.to(act.device)].float()
    return dict(vectors)


def share(vectors: Vectors) -> Float[Tensor, "layer prompt kv_head"]:
    """How much of each is the mean over the other prompts."""
    return torch.stack([metrics.constant_share(x) for x in vectors.values()]).cpu()


def constant(name: str, estimate: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        name,
        f"The sink's {name} is a constant.",
        statistic=f"share of the squared norm of the sink's {name} that is the mean over the other prompts, behind the "
        "formation block",
        estimate=estimate,
        control="the same at an ordinary position",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {MOST} and above the control's",
        conditions=[sl.analysis.above(estimate, MOST), sl.analysis.above(estimate, control)],
    )


def losses(
    study: sl.Study, layers: tuple[int, ...], vectors: Mapping[str, Mapping[str, Vectors]]
) -> dict[str, Float[Tensor, " prompt"]]:
    """What each constant at the sink adds to the loss."""

    def patch(name: str, who: str) -> sl.Patch:
        values = {layer: metrics.mean_of_others(vectors[name][who][layer]) for layer in layers}
        return sl.Patch(WHAT[name], layers, study.sink, edits.PerPrompt(f"{who} {name}", values))

    def both(who: str) -> sl.Patch:
        key = patch("key", who)
        return sl.Patch(key.site, key.layers, key.positions, key.edit, also=(patch("value", who),))

    patches = {
        f"the others' {name} of the {who} position": patch(name, who) for who in (SINK, ORDINARY) for name in WHAT
    }
    patches |= {f"the others' key and value of the {who} position": both(who) for who in (SINK, ORDINARY)}
    result = study.run(list(patches.values()), [study.readout("loss")])
    return dict(zip(patches, result.added(list(patches.values()), "loss"), strict=True))


def harmless(study: sl.Study, added: Mapping[str, Tensor]) -> sl.analysis.Part:
    """The cause: do constants do what the sink does?"""
    constants, control = (
        study.mean(added[f"the others' key and value of the {who} position"]) for who in (SINK, ORDINARY)
    )
    return sl.analysis.judge(
        "cause",
        "in its place",
        "A constant key and value in the sink's place do no harm.",
        statistic="loss added when the sink has the others' mean key and value in every head behind the formation "
        "block, nats a token",
        estimate=constants,
        control="the same with the mean key and value of an ordinary position",
        control_estimate=control,
        rule=f"holds when the whole interval lies below {HARM} and the control's above",
        conditions=[sl.analysis.below(constants, HARM), sl.analysis.above(control, HARM)],
    )


def draw(findings: sl.Findings):
    lines = sl.analysis.mean_and_range(findings.table, ["what", "token", "layer"])
    titles = {"layer": "block", "mean": "share that is a constant", "token": ""}
    figure = sl.viz.line(lines, "layer", "mean", series="token", low="low", high="high", facet="what", titles=titles)
    return sl.viz.mark(figure, x=int(findings.table.formation.iloc[0]))


ANALYSIS = sl.Analysis(
    name="implicit_bias",
    title="A bias in disguise",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="an implicit bias of attention (Sun et al., COLM 2024)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
