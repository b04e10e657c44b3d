"""Which sink is asked for: one that is made at a position, and how, or the one that the data has.

All that can be wrong with it whatever the model is told here, once, for chain, sweep and command line alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from sinklens.edits import MeanAxis
from sinklens.errors import InputError
from sinklens.records.integers import whole_number, whole_numbers

NATURAL = "natural"
"""The target that stands for the sink that the data has; also how such a pair is called."""
InducedKind = Literal["block_aggregation", "amplify_variance"]
"""How a sink is made."""
PairKind = Literal["block_aggregation", "amplify_variance", "natural"]
"""How a sink came about."""
Direction = Literal["denoise", "noise"]
"""Into which of a pair's runs activations of the other are put: into the one without the sink, or the one with it."""
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
Target: TypeAlias = int | Literal["natural"]
"""A position, or ``natural``."""

STRENGTH = 8.0
"""Lambda of ``amplify_variance`` by default."""


@dataclass(frozen=True)
class PairChoice:
    """A choice of two runs, before any model is there."""

    target: Target = 10
    """Position that is made a sink, or ``natural`` for the sink that the data has."""
    kind: InducedKind = "block_aggregation"
    """How the sink is made there: ``block_aggregation`` or ``amplify_variance``; not looked at for the natural sink."""
    strength: float = STRENGTH
    """Lambda of ``amplify_variance``."""
    layers: tuple[int, ...] | None = None
    """Blocks of the intervention; by default all up to the formation block, and for ``amplify_variance`` up to the
    first formation blocks (while the first token's values still have the higher variance)."""
    axis: MeanAxis = "prompts"
    """What the mean that ``amplify_variance`` leaves in place is taken over (see
    :func:`sinklens.edits.amplification`)."""

    def __post_init__(self) -> None:
        """Numbers of NumPy and torch, and any kind of sequence of blocks, as Python's own.

        Raises:
            InputError: blocks that are no whole numbers, a strength that is no number.
        """
        if not isinstance(self.target, str):
            object.__setattr__(self, "target", _position(self.target))
        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers(self.layers, "block"))
        try:
            object.__setattr__(self, "strength", float(self.strength))
        except (TypeError, ValueError):
            raise InputError(f"strength {self.strength!r} must be a finite number") from None

    @property
    def is_natural(self) -> bool:
        """Whether the sink is the one that the data has."""
        return isinstance(self.target, str) and self.target == NATURAL

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions in which patches can be run."""
        return directions_of(NATURAL if self.is_natural else self.kind)

    @property
    def amplification(self) -> float | None:
        """Lambda, where the pair has one: of an induced ``amplify_variance``."""
        return self.strength if not self.is_natural and self.kind == "amplify_variance" else None

    @property
    def position(self) -> int:
        """The position that is made a sink.

        Raises:
            InputError: the sink is the one that the data has.
        """
        if isinstance(self.target, str):
            raise InputError(f"target {self.target!r} is no position: a sink is made at one such as 10")
        return self.target

    def check(self, length: int | None = None) -> None:
        """Refuse what is wrong whatever the model, given the ``length`` of the prompts where it is known.

        Raises:
            InputError: a target that is neither a position nor ``natural``, or that has no earlier or no later tokens;
                an unknown kind; a strength that is not finite.
        """
        if self.kind not in get_args(InducedKind):
            raise InputError(f"unknown pair {self.kind!r}: {' or '.join(get_args(InducedKind))}")
        if not math.isfinite(self.strength):
            raise InputError(f"strength {self.strength} must be a finite number")
        if not self.is_natural:
            check_target(self.target, length)

    def record(self) -> dict[str, Any]:
        """The choice as JSON holds it in records of chains and sweeps."""
        return {
            "target": self.target,
            "pair": NATURAL if self.is_natural else self.kind,
            "strength": self.amplification,
            "pair_layers": None if self.layers is None else list(self.layers),
            **({} if self.axis == "prompts" else {"pair_axis": self.axis}),
        }


def _position(target: Any) -> Any:
    """A whole number as Python's own; all else as it is, for :meth:`PairChoice.check` to refuse."""
    try:
        return whole_number(target, "target")
    except InputError:
        return target


def directions_of(kind: PairKind) -> tuple[Direction, ...]:
    """The directions in which patches of a pair can be run: there is no run without the natural sink to denoise."""
    return ("noise",) if kind == NATURAL else DIRECTIONS


def is_natural(record: Mapping[str, Any]) -> bool:
    """Whether a record of a chain or sweep (its ``config``) is of the sink that the data has."""
    return record["pair"] == NATURAL


def target_positions(length: int) -> range:
    """The positions of a prompt that can be made a sink: with tokens before to aggregate, and after to attend."""
    return range(1, length - 1)


def target_from_text(text: str) -> Target:
    """``10`` as 10 and ``natural`` as it is; other text too, for :meth:`PairChoice.check` to refuse."""
    try:
        return int(text)
    except ValueError:
        return cast(Target, text)


def check_targets(targets: Sequence[Target], length: int) -> None:
    """Refuse targets that prompts of ``length`` tokens do not have.

    Raises:
        InputError: there is none, one does not fit, or one is named twice.
    """
    if not targets:
        raise InputError("give at least one target, such as 10")
    for target in targets:
        PairChoice(target).check(length)
    twice = [target for target, times in Counter(targets).items() if times > 1]
    if twice:
        raise InputError(f"target {twice[0]} is named twice: give each once")


def check_target(target: object, length: int | None = None) -> None:
    """Make sure that a sink can be made at ``target``.

    Raises:
        InputError: it is no position, lies outside the sequence, or has no earlier or no later tokens.
    """
    if not isinstance(target, int) or isinstance(target, bool):
        raise InputError(f"target {target!r} must be a position such as 10, or {NATURAL}")
    if target == 0:
        raise InputError(f"target 0 has no earlier tokens to aggregate: choose a later position, or target {NATURAL}")
    if length is None:
        return
    if not target_positions(length):
        raise InputError(f"prompts of {length} tokens must be at least 3 long: a target needs earlier and later tokens")
    if target not in target_positions(length):
        raise InputError(
            f"target {target} must be in 1..{length - 2}: prompts have {length} tokens, and a sink needs "
            "later tokens that attend to it"
        )
