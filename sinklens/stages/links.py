"""Two optional stages between W_O and the super neurons: what carries attention's write to what they read.

The chain says that W_O passes the aggregated value on to the super neurons. Attention's output reaches them through the
residual stream, and so does what the MLPs of the blocks before have made of it: these stages take the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Generator, Tensor

from sinklens import edits
from sinklens.errors import NotApplicableError
from sinklens.models.identities import identities
from sinklens.pairs.pair import Direction
from sinklens.patches import Patch, Source
from sinklens.sites import ATTN_OUT, MLP_OUT, RESID_MID, HookSite
from sinklens.stages.base import ISOLATED, NOTHING, Build, Experiment, Need, Prediction, Setting, Stage
from sinklens.stages.controls import ELSEWHERE, TRANSPLANT, other_positions
from sinklens.stages.w_o_alignment import all_read, in_subspace, read_readout


def _before_formation(setting: Setting) -> tuple[int, ...]:
    """The blocks before the formation block that have an MLP.

    Raises:
        NotApplicableError: there are none.
    """
    fired = identities(setting.model).fired
    blocks = tuple(block for block in setting.up_to_formation[:-1] if MLP_OUT.at(block) in fired)
    if not blocks:
        raise NotApplicableError("no MLP stands before the formation block: nothing can lie between")
    return blocks


def _exchanged(site: HookSite, held: HookSite, *, elsewhere: bool = False) -> Build:
    """Exchange what one of attention and the early MLPs write, and hold what the other writes in the patched run."""

    def build(setting: Setting, _stage: Stage, direction: Direction, generator: Generator) -> Patch:
        blocks = {ATTN_OUT: setting.up_to_formation, MLP_OUT: _before_formation(setting)}
        where = other_positions(setting, generator) if elsewhere else None
        exchanged = setting.patch(direction, site, blocks[site], edits.Transplant(), positions=where)
        kept = setting.patch(direction, held, blocks[held], edits.Transplant(), positions=where)
        own = Source(exchanged.run, None if where is None else where)
        return replace(exchanged, allow_unchanged=elsewhere, also=(replace(kept, source=own, allow_unchanged=True),))

    return build


EARLY_MLPS = Stage(
    name="early_mlps",
    claim="What attention writes reaches the super neurons through what the MLPs before make of it.",
    site=MLP_OUT,
    layers=_before_formation,
    needs=(Need("attention_adds"), Need("mlp_adds")),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        *(
            Experiment(name, _exchanged(site, held, elsewhere=bool(control)), predicted, control)
            for name, site, held, says in (
                ("mlps_alone", MLP_OUT, ATTN_OUT, ISOLATED),
                ("attention_alone", ATTN_OUT, MLP_OUT, NOTHING),
            )
            for control, predicted in (("", says), ("other_position", NOTHING))
        ),
    ),
    readout=read_readout,
)
"""Between W_O and the super neurons: what the early MLPs write at the target."""


# The runs may differ in nothing but what is read, or in nothing of it that one writer has written.
_read = partial(in_subspace, may_be_nothing=True)


def _written_by(name: str, site: HookSite) -> Callable[[Setting, Tensor], edits.Edit]:
    def make(setting: Setting, basis: Tensor) -> edits.Edit:
        blocks = setting.up_to_formation if site == ATTN_OUT else _before_formation(setting)
        return edits.WrittenBy(name, basis, tuple((site, block) for block in blocks))

    return make


def _all_the_rest(_setting: Setting, basis: Tensor) -> edits.Edit:
    return edits.OutsideSubspace("reading_subspace", basis)


def _of_writer(name: str, site: HookSite, predicted: Prediction, need: Need) -> tuple[Experiment, Experiment]:
    make = _written_by(name, site)
    return (
        Experiment(name, _read(make), predicted, needs=(need,)),
        Experiment(name, _read(make, at_random=True), NOTHING, control="random_subspace", drawn=True, needs=(need,)),
    )


READING = Stage(
    name="reading",
    claim="Of the residual stream that enters the MLP of the formation block, only what the super neurons read counts.",
    site=RESID_MID,
    layers=lambda setting: (setting.formation.layer,),
    needs=(Need("neurons_read"),),
    experiments=(
        TRANSPLANT,
        ELSEWHERE,
        Experiment("reading_subspace", _read(all_read), ISOLATED),
        Experiment("reading_subspace", _read(all_read, at_random=True), NOTHING, "random_subspace", drawn=True),
        Experiment("reading_subspace", _read(_all_the_rest), NOTHING, control="all_the_rest"),
        *_of_writer("read_of_mlps", MLP_OUT, ISOLATED, Need("mlp_adds", _before_formation)),
        *_of_writer("read_of_attention", ATTN_OUT, NOTHING, Need("attention_adds", lambda s: s.up_to_formation)),
    ),
    readout=read_readout,
)
"""Between the early MLPs and the super neurons: what the latter read, split by who wrote it."""
