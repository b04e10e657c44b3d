"""What a mitigation is: a name, what it does, and how its hooks and those of its control are made from some prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sinklens.formation import Formation
from sinklens.interventions import Hooks, Massive, SinkHeads, find_massive, find_sink_heads
from sinklens.models.view import Model
from sinklens.patches import Positions
from sinklens.prompts import PromptBatch
from sinklens.records.ranges import spans


@dataclass(eq=False)
class Sample:
    """The prompts that mitigations are fitted to, and what several of them need to know of these."""

    model: Model
    """The model."""
    batch: PromptBatch
    """The prompts, which are not measured."""
    formation: Formation
    """Where the sink forms on them."""
    window: int
    """Recent keys that eviction keeps."""
    seed: int = 0
    """Fixes what is drawn."""

    @cached_property
    def massive(self) -> Massive:
        """Their massive activations, where they first appear."""
        return find_massive(self.model, self.batch)

    @cached_property
    def sink_heads(self) -> SinkHeads:
        """The heads that attend to the first token."""
        return find_sink_heads(self.model, self.batch)

    @property
    def sinks(self) -> Positions:
        """The sink position of every prompt."""
        return Positions.one_each(self.formation.sink_positions)


Make = Callable[[Positions], Hooks]
"""The sink of every prompt that is run, to the hooks for these prompts."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A mitigation that has seen its sample."""

    hooks: Make
    """Its hooks."""
    control: Make
    """Those of its control."""
    said: str
    """What was fitted: blocks, dimensions, heads."""
    control_said: str
    """What the control is."""


@dataclass(frozen=True, eq=False)
class Mitigation:
    """Something that takes a sink away, or a part of what makes it, without training."""

    name: str
    """The name that it is asked for by."""
    title: str
    """What it does, in a few words."""
    fit: Callable[[Sample], Fitted]
    """``(sample) -> what is run``; raises NotApplicableError on a model that it cannot be done to."""
    source: str = field(default="")
    """Where it was published."""


def count(heads: Mapping[int, Sequence[int]]) -> str:
    """``3 heads in blocks 1-2`` of heads by block."""
    n = sum(map(len, heads.values()))
    return f"{n} head{'s' * (n != 1)} in block{'s' * (len(heads) != 1)} {spans(sorted(heads))}"
