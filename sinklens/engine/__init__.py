"""The engine: many patches in few forward passes (:mod:`sinklens.engine.run` says how, and what it promises).

From :func:`sinklens.run_chain` to the tensor that is written it is eight calls:

1. ``chain.score_chain`` has the stages make their patches;
2. ``run.PatchRunner.run`` takes them, makes index arrays of their places (``places``), and captures what is needed of
   the unpatched runs (``capture``);
3. ``run.PatchRunner._batches`` runs as many rows at a time as fit (``memory``, ``pace``);
4. ``packed.job.PackedJob.forward`` makes one batch (``packed.rows``: which rows; ``packed.layout``: where they lie);
5. ``packed.blocks.PackedPass.run`` goes from block to block;
6. ``packed.blocks.PackedPass._attention`` and ``_mlp`` are the halves of one (scores and pattern, of which only some
   queries may be needed, are a call further: ``_in_pieces`` or ``_explicit``);
7. ``packed.points.Points.visit`` does all that happens at one hook point (of some queries: ``visit_queries``);
8. ``apply.apply_edit`` gathers, calls the edit, checks what it gives, and writes.

Models that the packed pass does not know run through TransformerLens: ``plain.PlainJob.forward`` in step 4, then
``hooks`` instead of steps 5 to 7, and the same step 8. What root patches take from other runs is captured in step 2,
before the runs are (``sources``).
"""

from sinklens.engine.run import EngineStats, PatchResult, PatchRunner, Progress, run_patches

__all__ = [
    "EngineStats",
    "PatchResult",
    "PatchRunner",
    "Progress",
    "run_patches",
]
