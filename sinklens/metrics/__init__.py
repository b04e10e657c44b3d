"""Pure tensor functions: what is measured, one family in each file. They know nothing of models or hooks."""

from sinklens.metrics.alignment import cosine, principal_direction
from sinklens.metrics.correlation import kendall_tau
from sinklens.metrics.dominance import (
    dominance_ratio,
    energy_share,
    excess_kurtosis,
    gini,
    top1_over_median,
    top_energy_share,
)
from sinklens.metrics.entropy import attention_entropy, effective_values
from sinklens.metrics.norms import vector_norm
from sinklens.metrics.outliers import massive_activations, robust_z
from sinklens.metrics.rank import effective_rank
from sinklens.metrics.sink import alpha, attention_received, normalised_rows, received_at_lengths, sink_rate
from sinklens.metrics.variance import first_over_later, position_variance, relative_deviation, relative_to_later

__all__ = [
    "alpha",
    "attention_entropy",
    "attention_received",
    "cosine",
    "dominance_ratio",
    "effective_rank",
    "effective_values",
    "energy_share",
    "excess_kurtosis",
    "first_over_later",
    "gini",
    "kendall_tau",
    "massive_activations",
    "normalised_rows",
    "position_variance",
    "principal_direction",
    "received_at_lengths",
    "relative_deviation",
    "relative_to_later",
    "robust_z",
    "sink_rate",
    "top1_over_median",
    "top_energy_share",
    "vector_norm",
]
