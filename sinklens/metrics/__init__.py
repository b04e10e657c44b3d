"""Pure tensor functions: what is measured, one family in each file. They know nothing of models or hooks."""

from sinklens.metrics.alignment import cosine, principal_direction
from sinklens.metrics.dominance import dominance_ratio, energy_share
from sinklens.metrics.entropy import attention_entropy, effective_values
from sinklens.metrics.outliers import robust_z
from sinklens.metrics.sink import attention_received, sink_rate
from sinklens.metrics.variance import relative_deviation

__all__ = [
    "attention_entropy",
    "attention_received",
    "cosine",
    "dominance_ratio",
    "effective_values",
    "energy_share",
    "principal_direction",
    "relative_deviation",
    "robust_z",
    "sink_rate",
]
