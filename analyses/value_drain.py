"""Does the small value of the sink keep attention on it?

    sinklens analyse value_drain

Guo et al. (arXiv 2410.13835) call it a *value-state drain*: where attention piles up, the value is small. A head that
learns to be silent gets there from both ends, by looking at the sink and by having the sink say less. Tutorial 8 builds
this stage step by step. If the small value *keeps* attention there, then a token with the sink's value (or with its own
at that small norm) must become a sink, and a sink with an ordinary value must go; if it only comes along, nothing
happens. The key in the value's place is the control that must move attention, the sink's direction at an ordinary norm
the one that must not.

A value is passed on in its block after attention has been computed there: what can move is attention in later blocks.
"""

from __future__ import annotations

import sinklens as sl


def key_instead(setting, stage, direction, _generator):
    """The control that must move attention: the key."""
    return setting.patch(direction, sl.sites.K, stage.layers(setting), sl.edits.Transplant())


def smallness(setting, stage):
    """The readout: one over the value's norm, mean over heads, which rises where the value drains."""
    return setting.readout(stage, lambda value, _layer: 1 / value.float().norm(dim=-1).mean(-1))


STAGE = sl.Stage(
    name="value_drain",
    claim="The sink's value is nearly zero, and that keeps attention on it.",
    site=sl.sites.V,
    layers=lambda setting: setting.through_readout,
    experiments=(
        sl.stages.TRANSPLANT,
        sl.stages.ELSEWHERE,
        sl.Experiment("transplant", key_instead, predicted=sl.stages.ISOLATED, control="key"),
        sl.Experiment("small_norm", sl.stages.edited(sl.edits.NORM_ONLY), predicted=sl.stages.ISOLATED),
        sl.Experiment(
            "small_norm",
            sl.stages.edited(sl.edits.DIRECTION_ONLY),
            predicted=sl.stages.NOTHING,
            control="direction_only",
        ),
    ),
    readout=smallness,
)


ANALYSIS = sl.of_stage(
    STAGE,
    "The small value of the sink",
    "value-state drains (Guo et al., arXiv 2410.13835)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
