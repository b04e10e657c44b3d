"""The engine: many patches in one forward pass.

From the public function to the tensor that is written, on the fast pass:

    run_patches -> PatchRunner.run -> PackedJob.forward -> PackedPass.run -> Points.visit -> apply

TODO hops
"""

from sinklens.engine.run import EngineStats, PatchResult, PatchRunner, Progress, run_patches

__all__ = [
    "EngineStats",
    "PatchResult",
    "PatchRunner",
    "Progress",
    "run_patches",
]
