"""Training: one arm, or several that are to be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from sinklens.errors import InputError
from sinklens.lab.data import BIGRAM_BACKCOPY, open_data
from sinklens.lab.processes import Processes, local_device
from sinklens.lab.settings import Optimiser, Schedule, Settings, read_variant
from sinklens.lab.sizes import size_of
from sinklens.lab.training import Report, Trained, train_arm
from sinklens.models.load import find_device
from sinklens.records.explained import explained
from sinklens.records.ranges import Between

TOKENS_OF_TASK = 800_000
"""How many tokens bigram-backcopy is trained on where nothing is said: less than a minute on a CPU."""


@explained
def train(
    variant: Annotated[
        str | Sequence[str], "Ways of computing attention, with options as name:option=value: the arms."
    ] = "softmax",
    *,
    size: Annotated[str, "The model's size: toy, tiny, 34m, 60m or 150m."] = "toy",
    data: Annotated[
        str | Path, "`bigram_backcopy`, a text file, a folder of text files, or `dataset:NAME[:CONFIG]`."
    ] = BIGRAM_BACKCOPY,
    tokens: Annotated[int | str | None, "Tokens to train on, such as 200m; or give the steps."] = None,
    steps: Annotated[int | None, "Updates of the weights; or give the tokens.", Between(1)] = None,
    seed: Annotated[int, "Of the weights and the order of the data.", Between(0, 2**31 - 1)] = 0,
    seeds: Annotated[int, "Train every variant with so many seeds, from `seed` on.", Between(1, 1000)] = 1,
    out: Annotated[str | Path, "Folder in which every arm has one of its own."] = "runs/lab",
    tokenizer: Annotated[str | Path | None, "A folder or Hugging Face id; without it one is made of the text."] = None,
    vocab: Annotated[int | None, "Tokens of that one; the size's own without it.", Between(257, 2**20)] = None,
    n_ctx: Annotated[int | None, "Tokens of a row; the size's own without it.", Between(4, 2**17)] = None,
    batch: Annotated[int | None, "Rows of a step, over all processes; the size's own without it.", Between(1)] = None,
    accumulate: Annotated[int, "Parts that a process computes its rows in.", Between(1)] = 1,
    lr: Annotated[float | None, "Peak learning rate; the size's own without it.", Between(0, 10)] = None,
    schedule: Annotated[Schedule, "What becomes of the learning rate after warm-up."] = "cosine",
    final_lr: Annotated[float, "Share of the peak at the end.", Between(0, 1)] = 0.1,
    warmup: Annotated[int | None, "Steps of warm-up; 200, or a tenth of the run.", Between(0)] = None,
    optimiser: Annotated[Optimiser, "adamw; or muon for the blocks' matrices."] = "adamw",
    weight_decay: Annotated[
        float | None, "Of matrices, nothing else decays; the size's own without it.", Between(0, 1000)
    ] = None,
    beta1: Annotated[float, "AdamW's.", Between(0, 1)] = 0.9,
    beta2: Annotated[float, "AdamW's.", Between(0, 1)] = 0.95,
    clip: Annotated[float, "Greatest norm of the gradient; 0 for any.", Between(0)] = 1.0,
    device: Annotated[str, "`auto`, `cpu`, `cuda` or `cuda:1`."] = "auto",
    dtype: Annotated[str, "bfloat16 or float32; `auto` is bfloat16 on a GPU. Weights are float32 in both."] = "auto",
    compile: Annotated[bool, "Compile the model, if its first steps are those of eager."] = False,
    arm: Annotated[tuple[int, int] | None, "I/N: train every N-th arm only, from the I-th on."] = None,
    checkpoint_every: Annotated[int, "Steps between checkpoints; 0 for a tenth of the run.", Between(0)] = 0,
    watch_points: Annotated[int, "About how many times it is measured.", Between(2, 10_000)] = 40,
    command: str = "sinklens.lab.train",
    report: Report = lambda _text, _done, _total: None,
) -> list[Trained]:
    """Train small models with variants of attention: one arm for each variant and seed, each in a folder of its own.

    All arms of a seed see the same rows in the same order and start from the same weights wherever both have them. An
    arm that is there is gone on with from its latest checkpoint, or left as it is when it is finished. Started by
    torchrun, several processes share every batch.

    Returns:
        The arms, in the order of the variants, and of the seeds within one.

    Raises:
        InputError: an argument is out of range, the data are missing or too short, a folder holds another
            configuration, the loss is not finite, there is no room to write.
        KeyboardInterrupt: it was interrupted; a checkpoint was written.
    """
    given = dict(locals())
    sizes, where = size_of(size), local_device(find_device(device))
    variants = [read_variant(one) for one in ([variant] if isinstance(variant, str) else variant)]
    length = n_ctx or sizes.n_ctx
    a_step = (batch or sizes.batch) * length
    wanted = _steps(steps, tokens, a_step, data)
    common: dict[str, Any] = {name: given[name] for name in _PASSED} | {
        "n_ctx": length,
        "steps": wanted,
        "batch": batch or sizes.batch,
        "lr": sizes.lr if lr is None else lr,
        "weight_decay": sizes.weight_decay if weight_decay is None else weight_decay,
        "warmup": min(200, wanted // 10) if warmup is None else warmup,
        "betas": (beta1, beta2),
        "dtype": ("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype,
    }
    arms = [
        Settings(variant=name, options=options, seed=each, **common)
        for name, options in variants
        for each in range(seed, seed + seeds)
    ]
    processes = Processes(where)
    processes.rows(0, arms[0].batch)
    report("preparing the data", 0, wanted)
    with processes.first_alone():
        stream = open_data(
            data,
            length,
            tokenizer=tokenizer,
            vocab=vocab or sizes.vocab,
            most_tokens=wanted * a_step,
            step=lambda text: report(text, 0, wanted),
        )
    return [
        train_arm(
            settings,
            stream,
            Path(out),
            device=where,
            command=command,
            checkpoint_every=checkpoint_every,
            watch_points=watch_points,
            report=report,
        )
        for settings in _own(arms, arm)
    ]


_PASSED = ("size", "accumulate", "schedule", "final_lr", "optimiser", "clip", "compile")
"""Arguments that are settings as they are."""


def _own(arms: list[Settings], arm: tuple[int, int] | None) -> Iterator[Settings]:
    """The arms that ``I/N`` leaves to this process."""
    which, of = arm or (1, 1)
    if not 1 <= which <= of:
        raise InputError(f"arm must be I/N with I from 1 to N, not {which}/{of}.")
    yield from arms[which - 1 :: of]


def _steps(steps: int | None, tokens: int | str | None, a_step: int, data: str | Path) -> int:
    """The number of steps, from either."""
    if steps is not None and tokens is not None:
        raise InputError("give the steps or the tokens, not both.")
    if steps is not None:
        return steps
    if tokens is None:
        if str(data) != BIGRAM_BACKCOPY:
            raise InputError("say how long to train: tokens, such as 200m, or steps.")
        tokens = TOKENS_OF_TASK
    return max(1, math.ceil(read_tokens(tokens) / a_step))


def read_tokens(text: int | str) -> int:
    """``200m`` as a number of tokens; ``k``, ``m`` and ``b`` stand for thousands, millions and billions.

    Raises:
        InputError: it is no such number.
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    written = str(text).strip().lower()
    try:
        unit = units.get(written[-1:], 1)
        number = float(written[:-1] if unit > 1 else written) * unit
    except ValueError:
        number = math.nan
    if not 1 <= number < 1e15:
        raise InputError(f"tokens must be a number such as 200m or 50000, not {text!r}.")
    return round(number)
