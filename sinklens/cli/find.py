"""``sinklens find``."""

from __future__ import annotations

import json

from sinklens.cli.common import (
    Backend,
    BackendOption,
    BlockOption,
    Bos,
    BosOption,
    CountOption,
    DatasetOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    EventOption,
    JsonOption,
    LengthOption,
    ModelOption,
    NeuronsOption,
    PromptsOption,
    SeedOption,
    errors,
    given_formation,
    load,
    progress,
)


def find(
    model: ModelOption = "smollm2",
    length: LengthOption = 64,
    n: CountOption = 16,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find where the sink forms: blocks, super neurons, outlier dimensions."""
    with errors():
        given = given_formation(block, super_neurons, outlier_dims, event)
        with progress() as (step, _rows):
            loaded, batch = load(
                step,
                model=model,
                device=device,
                dtype=dtype,
                backend=backend,
                prompts=prompts,
                dataset=dataset,
                n=n,
                length=length,
                bos=bos,
                seed=seed,
            )
            from sinklens.formation import find_formation

            step("finding the formation block")
            formation = find_formation(loaded, batch, **given)
        from sinklens.cli.fitting import show
        from sinklens.cli.tables import console, formation_tables
        from sinklens.formation import formation_to_json
        from sinklens.prompts import prompts_text
        from sinklens.records.plain import to_plain

        if as_json:
            data = {**formation_to_json(formation), **batch.record()}
            print(json.dumps(to_plain(data), indent=1))  # noqa: T201  (the command's output)
            return
        show(console(), *formation_tables(formation))
        console().print(prompts_text(batch.record()), markup=False)
