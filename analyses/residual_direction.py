"""Is it the direction or the norm of the sink token's residual that attention locks on to?

    python analyses/residual_direction.py

The formation block makes the residual norm of the sink token a hundred times larger, and that jump is what one sees
first. But RMSNorm divides by the norm: if the chain's account of it as a *directional* filter is right, giving the
target the anchored run's direction at its own old norm should carry the sink over, and giving it the norm alone should
not.
"""

from __future__ import annotations

import sinklens as sl


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
        sl.Experiment("direction_only", sl.stages.edited(sl.edits.DIRECTION_ONLY), predicted=sl.stages.ISOLATED),
        sl.Experiment(
            "direction_only", sl.stages.edited(sl.edits.NORM_ONLY), predicted=sl.stages.NOTHING, control="norm_only"
        ),
    ),
    readout=norm,
)


ANALYSIS = sl.of_stage(STAGE, "Direction or norm of the sink's residual")

if __name__ == "__main__":
    sl.main(ANALYSIS)
