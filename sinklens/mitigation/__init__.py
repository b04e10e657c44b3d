"""What takes a sink away without training, what that costs, and what quantisation gains: one table for all of it.

:mod:`sinklens.mitigation.known` has the mitigations by name, each with its control of equal size;
:mod:`sinklens.mitigation.run` fits them on some prompts and measures them on others.
"""

from sinklens.mitigation.base import Fitted, Mitigation, Sample
from sinklens.mitigation.known import DEFAULT, MITIGATIONS, register_mitigation
from sinklens.mitigation.result import MitigationResult
from sinklens.mitigation.run import mitigate

__all__ = [
    "DEFAULT",
    "Fitted",
    "MITIGATIONS",
    "Mitigation",
    "MitigationResult",
    "Sample",
    "mitigate",
    "register_mitigation",
]
