"""Pure tensor functions: what is measured, one family in each file. They know nothing of models or hooks."""

from sinklens.metrics.alignment import cosine, principal_direction
from sinklens.metrics.constant import constant_share, mean_of_others
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
from sinklens.metrics.gradients import back_through_norm, gradient_flow, gradient_ratio
from sinklens.metrics.norms import vector_norm
from sinklens.metrics.outliers import massive_activations, robust_z
from sinklens.metrics.quantisation import quantised_absmax, quantised_minmax, relative_error
from sinklens.metrics.rank import effective_rank, stable_rank
from sinklens.metrics.secondary import alike, alive
from sinklens.metrics.sink import alpha, attention_received, normalised_rows, received_at_lengths, sink_rate
from sinklens.metrics.variance import first_over_later, position_variance, relative_deviation, relative_to_later

__all__ = [
    "alike",
    "alive",
    "alpha",
    "attention_entropy",
    "attention_received",
    "back_through_norm",
    "constant_share",
    "cosine",
    "dominance_ratio",
    "effective_rank",
    "effective_values",
    "energy_share",
    "excess_kurtosis",
    "first_over_later",
    "gini",
    "gradient_flow",
    "gradient_ratio",
    "kendall_tau",
    "massive_activations",
    "mean_of_others",
    "normalised_rows",
    "position_variance",
    "principal_direction",
    "received_at_lengths",
    "quantised_absmax",
    "quantised_minmax",
    "relative_deviation",
    "relative_error",
    "relative_to_later",
    "robust_z",
    "sink_rate",
    "stable_rank",
    "top1_over_median",
    "top_energy_share",
    "vector_norm",
]
