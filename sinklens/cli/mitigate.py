"""``sinklens mitigate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.common import (
    Backend,
    BackendOption,
    Bos,
    BosOption,
    CountOption,
    DatasetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ForceOption,
    JsonOption,
    LengthOption,
    ModelOption,
    PromptsOption,
    SeedOption,
    command_line,
    errors,
    fail,
    load,
    progress,
    results_line,
    write_report,
)
from sinklens.records.ranges import names


def mitigate(
    what: Annotated[
        str | None,
        typer.Option(help="Mitigations, such as `softening,bias`, or `all`; seven that need no search by default."),
    ] = None,
    model: ModelOption = "smollm2",
    length: LengthOption = 128,
    n: CountOption = 32,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    fit: Annotated[
        int | None, typer.Option(min=1, help="Prompts to fit on, which are not measured; a quarter by default.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Recent keys that eviction keeps; a quarter of the length by default.")
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate under each; 0 for none.")] = 24,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/mitigate"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take the sink away without training, in several ways, and measure what each costs and what quantisation gains."""
    with errors():
        from sinklens.mitigation.known import DEFAULT, MITIGATIONS
        from sinklens.records.files import check_out

        chosen = DEFAULT if what is None else tuple(MITIGATIONS) if what == "all" else names("--what", what)
        unknown = [name for name in chosen if name not in MITIGATIONS]
        if unknown:
            fail(f"--what {unknown[0]!r} is not known: choose from {', '.join(MITIGATIONS)}")
        check_out(out, force=force)
        with progress() as (step, rows):
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
            from sinklens.mitigation.run import mitigate as run

            options = {"fit": fit, "window": window, "generate": generate, "seed": seed}
            result = run(loaded, batch, chosen, progress=rows, step=step, **options)
        result.config["command"] = command_line()
        result.save(out, force=force)
        _print(result, out, as_json)


def _print(result, out: Path, as_json: bool) -> None:  # noqa: ANN001  (imported with torch)
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console
    from sinklens.cli.tables_mitigate import mitigation_table

    if as_json:
        sys.stdout.write((out / "mitigation.json").read_text(encoding="utf-8") + "\n")
    else:
        show(console(), mitigation_table(result))
    for name, reason in result.left_out.items():
        typer.echo(f"sinklens: note: {name} is left out: {reason}", err=True)
    sys.stdout.flush()
    page = write_report(out)
    if not as_json:
        console().print(results_line(out, page), markup=False, soft_wrap=True)
