"""Template of an analysis: copy this file, name your stage, run it.

    python analyses/_template.py

It asks one question about one place: does the *gate* of the super neurons, before its nonlinearity, already carry the
sink? A stage says where the effect should pass (site, blocks, units), which experiments test that, and one number that
says how far it has gone. Pairs, directions, packing, draws, intervals and identity checks come from sinklens.
"""

from __future__ import annotations

import typer

import sinklens as sl

MODEL = "smollm2"
TARGET = 10

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
        sl.Experiment("transplant", random_neurons, predicted=(0, 0), control="random_neurons", drawn=True),
    ),
    readout=magnitude,
)


def main(model: str = MODEL, target: int = TARGET, n: int = 8, length: int = 64, device: str = "auto") -> None:
    """Score the stage and print its table."""
    loaded = sl.load_model(model, device=device)
    batch = sl.prompts.natural(loaded, n=n, length=length)
    result = sl.run_chain(loaded, batch, target=target, stages=(STAGE,))
    print(result.scores.drop(columns=["layers", "units"]).round(3).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
