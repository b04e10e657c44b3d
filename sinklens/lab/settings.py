"""What a run is asked for: all that decides its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sinklens.errors import InputError
from sinklens.lab.sizes import size_of
from sinklens.variants import variant_kind

Schedule = Literal["constant", "cosine", "linear"]
Optimiser = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Settings:
    """The settings of one arm; two runs with equal ones on equal data have equal curves on a CPU."""

    variant: str
    """How attention is computed."""
    size: str
    """Name of the sizes."""
    n_ctx: int
    """Tokens of a row."""
    steps: int
    """Updates of the weights."""
    batch: int
    """Rows of a step, over all processes."""
    accumulate: int
    """Parts that each process computes its rows in."""
    seed: int
    """Of the weights and of the order of the data."""
    lr: float
    """Peak learning rate."""
    schedule: Schedule
    """What becomes of it after warm-up."""
    final_lr: float
    """Share of the peak that is left at the end (cosine and linear)."""
    warmup: int
    """Steps in which it rises from nothing."""
    optimiser: Optimiser
    """What turns gradients into updates."""
    weight_decay: float
    """Decay of the matrices."""
    betas: tuple[float, float]
    """AdamW's."""
    clip: float
    """Greatest norm of the gradient; 0 for any."""
    dtype: Literal["float32", "bfloat16"]
    """What matrices are multiplied in; weights, norms, softmax statistics and the loss are float32."""
    compile: bool = False
    """Whether the model is compiled."""
    options: dict[str, Any] = field(default_factory=dict)
    """The variant's options."""

    def __post_init__(self) -> None:
        size_of(self.size)
        variant_kind(self.variant)
        for name in ("n_ctx", "steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.batch % self.accumulate:
            raise InputError(f"a batch of {self.batch} rows cannot be split into {self.accumulate} equal parts.")
        if not 0 < self.lr < 10:
            raise InputError(f"lr must be more than 0 and less than 10, not {self.lr}.")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"warmup must be from 0 to the {self.steps} steps, not {self.warmup}.")
        for name, values in (("schedule", Schedule), ("optimiser", Optimiser)):
            if getattr(self, name) not in values.__args__:
                raise InputError(f"{name} must be one of {', '.join(values.__args__)}, not {getattr(self, name)!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype must be float32 or bfloat16, not {self.dtype!r}.")

    @property
    def tokens_a_step(self) -> int:
        """Tokens that a step predicts."""
        return self.batch * self.n_ctx

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step``, from 1: linear warm-up, then the schedule, which ends at the last step."""
        import math

        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr * (left if self.schedule == "constant" else self.final_lr + (1 - self.final_lr) * left)

    def recorded(self) -> dict[str, Any]:
        """As a record keeps them."""
        return asdict(self) | {"betas": list(self.betas)}


def arm_name(variant: str, options: dict[str, Any], seed: int) -> str:
    """What an arm and its folder are called: ``sigmoid-normalised=true-0``."""
    return f"{variant_text(variant, options)}-{seed}"


def variant_text(variant: str, options: dict[str, Any]) -> str:
    """A variant with its options: ``sigmoid-normalised=true``."""
    return "-".join([variant, *(f"{name}={str(value).lower()}" for name, value in options.items())])


def read_variant(text: str) -> tuple[str, dict[str, Any]]:
    """``sigmoid:normalised=true`` as a name and options.

    Raises:
        InputError: there is no such variant, or an option is not written like that.
    """
    name, *parts = text.strip().split(":")
    name = variant_kind(name).name  # of a file, too
    options: dict[str, Any] = {}
    for part in parts:
        option, is_there, value = part.partition("=")
        if not is_there or not option.isidentifier():
            raise InputError(f"an option of a variant is written name:option=value, not {text!r}.")
        options[option] = _value(value)
    return name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
