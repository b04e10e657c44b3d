"""The engine: many patches in few forward passes (:mod:`sinklens.engine.run` says how, and what it promises).

From :func:`sinklens.run_chain` to the tensor that is written it is eight calls:

1. ``run.PatchRunner.run`` takes the list of patches, and captures what is needed of the unpatched runs (``capture``);
2. ``run.PatchRunner._batches`` runs as many rows at a time as fit (``memory``, ``pace``);
3. ``packed.job.PackedJob.forward`` makes one batch (``packed.rows``: which rows; ``packed.layout``: where they lie);
4. ``packed.blocks.PackedPass.run`` goes from block to block;
5. ``packed.blocks.PackedPass._block`` is one block,
6. ``packed.blocks.PackedPass._attention`` or ``_mlp`` a half of it;
7. ``packed.points.Points.visit`` does all that happens at one hook point;
8. ``apply.apply_edit`` gathers, calls the edit, checks what it gives, and writes.

Patches become index arrays in ``places``, before any of this. Models that the packed pass does not know run through
TransformerLens: ``plain.PlainJob.forward`` in step 3, then ``hooks`` instead of steps 4 to 7, and the same step 8.
"""

from sinklens.engine.run import EngineStats, PatchResult, PatchRunner, Progress, run_patches

__all__ = [
    "EngineStats",
    "PatchResult",
    "PatchRunner",
    "Progress",
    "run_patches",
]
