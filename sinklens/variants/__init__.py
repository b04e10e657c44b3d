"""Variants of attention with which a small decoder can be trained, one a file; :mod:`sinklens.lab` trains them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sinklens.errors import InputError
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.registry import enter, is_the_package_s
from sinklens.records.user_module import run_file
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

KIND = "a variant"
"""What the registry calls them."""
REGISTRY: dict[str, type[Variant]] = {}
"""The variants that have a name."""


def register_variant(kind: type[Variant]) -> type[Variant]:
    """Give a variant of one's own its name; usable as a decorator.

    Raises:
        ValueError: the name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, Variant) and isinstance(getattr(kind, "name", None), str)):
        raise InputError(f"a variant must be a class made of Variant, with a name, not {kind!r}")
    return enter(REGISTRY, KIND, kind.name, kind)


_KNOWN: tuple[type[Variant], ...] = (
    *(Softmax, HeadRMSNorm, Sigmoid, Gate),
    *(SoftmaxOffByOne, SinkLogit, KBias, KVBias, SinkToken, Softpick, AffineScaled, Differential),
    *(Window, QKNorm, ValueScale, SandwichNorm, PostNorm, NoPositions),
)
for _kind in _KNOWN:
    register_variant(_kind)


def variant_kind(name: str) -> type[Variant]:
    """The variant of a name; or, by its path, that of a Python file which registers one.

    Raises:
        InputError: there is none of that name, or the file registers none.
    """
    if name.endswith(".py"):
        return _of_file(Path(name).expanduser())
    if name not in REGISTRY:
        raise InputError(
            f"unknown variant {name!r}; the known ones are {', '.join(REGISTRY)}, or give a Python file that registers "
            "one (analyses/_variant_template.py)."
        )
    return REGISTRY[name]


def _of_file(path: Path) -> type[Variant]:
    module = run_file(path, "sinklens_variant")
    found = [kind for kind in REGISTRY.values() if kind.__module__ == module.__name__]
    if not found:
        raise InputError(f"{path} registers no variant: put @sl.register_variant in front of its class")
    return found[-1]


def variant_code(name: str) -> str | None:
    """What tells a variant of the user's own from another of its name: a digest of its code; None for the package's.

    Raises:
        InputError: there is none of that name.
    """
    kind = variant_kind(name)
    return None if is_the_package_s(REGISTRY, KIND, name, kind) else fingerprint_of(kind)


def variant_place(name: str) -> str:
    """The file, or for a notebook the module, in which a variant was written."""
    module = variant_kind(name).__module__
    return str(getattr(sys.modules.get(module), "__file__", None) or module)


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
