"""Template of an analysis: copy this file, name your stage, run it.

    python analyses/_template.py

It asks one question about one place: does the *gate* of the super neurons, before its nonlinearity, already carry the
sink? A stage says where the effect should pass (site, blocks, units), which experiments test that, and one number that
says how far it has gone. Pairs, directions, packing, draws, intervals and identity checks come from sinklens, and so do
the command line's options, the saved table, the figure and the verdict. `_from_scratch.py` is no stage.
"""

from __future__ import annotations

import sinklens as sl

PRE = sl.HookSite("blocks.{layer}.mlp.hook_pre", ("batch", "pos", "d_mlp"))


def random_neurons(setting, stage, direction, generator):
    """The control: as many other neurons."""
    units = sl.stages.other_neurons(setting, generator)
    return setting.patch(direction, stage.site, stage.layers(setting), sl.edits.Transplant(), units=units)


def magnitude(setting, stage):
    """The readout: mean magnitude of the super neurons' gates at the target."""
    neurons = list(setting.formation.neurons)
    return setting.readout(stage, lambda x, _layer: x[:, neurons].float().abs().mean(-1))


STAGE = sl.Stage(
    name="gate",
    claim="The super neurons' gates alone carry the sink.",
    site=PRE,
    layers=lambda setting: (setting.formation.layer,),
    units=lambda setting: setting.formation.neurons,
    experiments=(
        sl.stages.TRANSPLANT,
        sl.Experiment("transplant", random_neurons, predicted=sl.stages.NOTHING, control="random_neurons", drawn=True),
    ),
    readout=magnitude,
)


ANALYSIS = sl.of_stage(STAGE, "The gate of the super neurons")

if __name__ == "__main__":
    sl.main(ANALYSIS)
