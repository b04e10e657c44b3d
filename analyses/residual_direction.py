"""Is it the direction or the norm of the sink token's residual that attention locks on to?

    python analyses/residual_direction.py

The formation block makes the residual norm of the sink token a hundred times larger, and that jump is what one sees
first. But RMSNorm divides by the norm: if the chain's account of it as a *directional* filter is right, giving the
target the anchored run's direction at its own old norm should carry the sink over, and giving it the norm alone should
not.
"""

from __future__ import annotations

import sinklens as sl


def scaled(direction, norm):
    """``direction`` at the length of ``norm``."""
    return direction * (norm.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True))


DIRECTION_ONLY = sl.edits.Function("direction_only", lambda x, source: scaled(source, x))
NORM_ONLY = sl.edits.Function("norm_only", lambda x, source: scaled(x, source))


def apply(edit):
    """Build the patch that puts ``edit`` on the residual after the formation block."""
    return lambda setting, stage, direction, _generator: setting.patch(
        direction, stage.site, stage.layers(setting), edit
    )


def norm(setting, stage):
    """The readout: the residual norm itself."""
    return setting.readout(stage, lambda x, _layer: x.float().norm(dim=-1))


STAGE = sl.Stage(
    name="residual_direction",
    claim="Attention after the formation block depends on the direction of the residual, not on its norm.",
    site=sl.sites.RESID_POST,
    layers=lambda setting: (setting.formation.layer,),
    experiments=(
        sl.stages.TRANSPLANT,
        sl.stages.ELSEWHERE,
        sl.Experiment("direction_only", apply(DIRECTION_ONLY), predicted=sl.stages.ISOLATED),
        sl.Experiment("direction_only", apply(NORM_ONLY), predicted=sl.stages.NOTHING, control="norm_only"),
    ),
    readout=norm,
)


ANALYSIS = sl.of_stage(STAGE, "Direction or norm of the sink's residual")

if __name__ == "__main__":
    sl.main(ANALYSIS)
