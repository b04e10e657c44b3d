"""Attribution patching: gradients screen patches of every neuron, head and position in a few passes.

:func:`estimate` gives the first-order change of readouts under any list of patches, :func:`attribution_map` that of
every unit at every position of a site, and :func:`grad_drop` sizes that do not cancel. :class:`Attributor` keeps the
gradients for many lists of patches. A sweep verifies what they find: it runs those that look largest exactly, and a
random sample, by which the estimates are judged (:mod:`sinklens.attribution.screening`).
"""

from sinklens.attribution.estimation import Attribution, Attributor, attribution_map, estimate, grad_drop
from sinklens.attribution.runner import AttributionRunner

__all__ = [
    "Attribution",
    "AttributionRunner",
    "Attributor",
    "attribution_map",
    "estimate",
    "grad_drop",
]
