"""The main job: per-stage causal-effect scores of the attention-sink chain."""

from sinklens.chain.result import ChainResult
from sinklens.chain.run import run_chain, score_chain

__all__ = [
    "ChainResult",
    "run_chain",
    "score_chain",
]
