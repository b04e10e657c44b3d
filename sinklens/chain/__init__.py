"""The main job: per-stage causal-effect scores of the attention-sink chain."""

from sinklens.chain.agree import agreement, run_chains
from sinklens.chain.result import ChainResult
from sinklens.chain.run import run_chain, score_chain

__all__ = [
    "ChainResult",
    "agreement",
    "run_chain",
    "run_chains",
    "score_chain",
]
