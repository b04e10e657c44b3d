"""Said once for a model: what runs through TransformerLens, more slowly, and why."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from sinklens.models.view import Model

logger = logging.getLogger(__name__)
_TOLD: WeakKeyDictionary[Model, set[str]] = WeakKeyDictionary()


def say_slow(model: Model, why: str) -> None:
    """A warning that a model's patches and runs go through TransformerLens; the second time for a reason, silence."""
    told = _TOLD.setdefault(model, set())
    if why and why not in told:
        told.add(why)
        logger.warning("this runs through TransformerLens, several times more slowly: %s", why)
