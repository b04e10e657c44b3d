"""Words that options choose from: typer lists them in the help, and refuses any other."""

from __future__ import annotations

from enum import StrEnum


class Bos(StrEnum):
    """Who decides whether a beginning-of-sequence token stands in front of the prompts."""

    auto = "auto"
    always = "always"
    never = "never"


class Dtype(StrEnum):
    """Floating-point formats a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Pair(StrEnum):
    """How a sink is made at the target."""

    block_aggregation = "block_aggregation"
    amplify_variance = "amplify_variance"


class Backend(StrEnum):
    """TransformerLens classes."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"
