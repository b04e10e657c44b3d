"""Variants of attention with which a small decoder can be trained, one a file; :mod:`sinklens.lab` trains them."""

from __future__ import annotations

from typing import Any

from sinklens.errors import InputError
from sinklens.records.registry import enter
from sinklens.variants.affine_scaled import AffineScaled
from sinklens.variants.base import AttentionSizes, Slot, Variant, overrides
from sinklens.variants.differential import Differential
from sinklens.variants.gate import Gate
from sinklens.variants.head_rmsnorm import HeadRMSNorm
from sinklens.variants.k_bias import KBias
from sinklens.variants.kv_bias import KVBias
from sinklens.variants.no_positions import NoPositions
from sinklens.variants.norm_placement import PostNorm, SandwichNorm
from sinklens.variants.qk_norm import QKNorm
from sinklens.variants.sigmoid import Sigmoid
from sinklens.variants.sink_logit import SinkLogit
from sinklens.variants.sink_token import SinkToken
from sinklens.variants.softmax import Softmax
from sinklens.variants.softmax_off_by_one import SoftmaxOffByOne
from sinklens.variants.softpick import Softpick
from sinklens.variants.value_scale import ValueScale
from sinklens.variants.window import Window

__all__ = ["REGISTRY", "AttentionSizes", "Slot", "Variant", "make_variant", "overrides", "register_variant"]

REGISTRY: dict[str, type[Variant]] = {}
"""The variants that have a name."""


def register_variant(kind: type[Variant]) -> type[Variant]:
    """Give a variant of one's own its name; usable as a decorator.

    Raises:
        ValueError: the name is taken.
    """
    enter(REGISTRY, "a variant", kind.name, kind)
    return kind


_KNOWN: tuple[type[Variant], ...] = (
    *(Softmax, HeadRMSNorm, Sigmoid, Gate),
    *(SoftmaxOffByOne, SinkLogit, KBias, KVBias, SinkToken, Softpick, AffineScaled, Differential),
    *(Window, QKNorm, ValueScale, SandwichNorm, PostNorm, NoPositions),
)
for _kind in _KNOWN:
    register_variant(_kind)


def variant_kind(name: str) -> type[Variant]:
    """The variant of a name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in REGISTRY:
        raise InputError(f"unknown variant {name!r}; the known ones are {', '.join(REGISTRY)}.")
    return REGISTRY[name]


def make_variant(name: str, sizes: AttentionSizes, options: dict[str, Any] | None = None) -> Variant:
    """One block's attention.

    Args:
        name: which variant.
        sizes: those of the block.
        options: keyword arguments of the variant's constructor.

    Raises:
        InputError: there is no such variant, or it has no such option.
    """
    kind = variant_kind(name)
    try:
        return kind(sizes, **(options or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"the variant {name} cannot be made with the options {options or {}}: {error}.") from error
