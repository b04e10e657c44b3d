"""Figures: of a chain, a circuit, a sweep, any tidy table; attention in CircuitsVis.

Every function returns its figure and shows nothing. What a figure shows is computed by functions of its own
(``score_rows``, ``onset_profile``, ``chain_matrix``), which need no plotting library.
"""

from sinklens.viz.attention import attention_view, sink_heads, token_values, token_view
from sinklens.viz.chain import chain_matrix, matrix_figure, onset_figure, onset_profile, score_rows, scores_figure
from sinklens.viz.charts import bars, histogram, line, mark, points, styled
from sinklens.viz.circuit import circuit_edges, circuit_figure, circuit_nodes
from sinklens.viz.circuit_charts import contributions_figure, interactions_figure, pruning_figure, tests_figure
from sinklens.viz.circuit_views import circuit_attention_view, circuit_heads, circuit_token_view, contributed
from sinklens.viz.circuitsvis import views_html as attention_html
from sinklens.viz.diagram import chain_diagram
from sinklens.viz.heatmap import heatmap
from sinklens.viz.mitigation import mitigation_figure, mitigation_points
from sinklens.viz.prompt import lens_figure, logit_lens, neuron_view, neurons_of, pattern_of, pattern_view
from sinklens.viz.saving import save

__all__ = [
    "attention_html",
    "attention_view",
    "bars",
    "chain_diagram",
    "chain_matrix",
    "circuit_attention_view",
    "circuit_edges",
    "circuit_figure",
    "circuit_heads",
    "circuit_nodes",
    "circuit_token_view",
    "contributed",
    "contributions_figure",
    "heatmap",
    "histogram",
    "interactions_figure",
    "lens_figure",
    "line",
    "logit_lens",
    "mark",
    "matrix_figure",
    "neuron_view",
    "neurons_of",
    "mitigation_figure",
    "mitigation_points",
    "onset_figure",
    "onset_profile",
    "pattern_of",
    "pattern_view",
    "points",
    "pruning_figure",
    "save",
    "score_rows",
    "scores_figure",
    "sink_heads",
    "styled",
    "token_values",
    "tests_figure",
    "token_view",
]
