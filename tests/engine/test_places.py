"""An edit that reads other places, also of earlier blocks, and several edits in one patch: equal to plain hooks.

Every pass is held to it: packed, through TransformerLens (on a HookedTransformer, which resumes in the middle, and on a
bridge, which does not), and the gradients.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import attribution, edits, readouts, sites
from sinklens.engine import run as engine
from sinklens.engine.run import run_patches
from sinklens.errors import EngineError, InputError
from sinklens.interventions import hooks_of
from sinklens.patches import Patch, Positions, Source
from tests.helpers.one_at_a_time import OneAtATime, cache_of
from tests.helpers.tiny import hooks_left, tiny_model, tiny_tokens

N, LENGTH = 3, 9
TRANSPLANT = edits.Transplant()
MLP_OUT_1 = "blocks.1.hook_mlp_out"


@dataclass(frozen=True, eq=False)
class AddRead(edits.SourceEdit):
    """``x + 3 * (what another place holds now)``, and with ``of_source`` minus what it holds in the source run."""

    name: str = "add_read"
    site: sites.HookSite = sites.MLP_OUT
    block: int | None = None
    of_source: bool = False

    @property
    def reads(self) -> tuple[edits.Read, ...]:
        return (self.site if self.block is None else (self.site, self.block),)

    @property
    def uses_source(self) -> bool:
        return self.of_source

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        out = x + 3 * at.read(self.site, self.block)
        return out - at.read_source(self.site, self.block) if self.of_source else out


@dataclass(frozen=True, eq=False)
class Scaled(edits.Edit):
    name: str = "scaled"
    factor: float = 0.5

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        return self.factor * x


SHRINK = Scaled()
RUNS = {"base": (), "other": (Patch(sites.RESID_PRE, (0,), tuple(range(LENGTH)), SHRINK, run="other"),)}
OTHER = Source("other")


def read_1(**options: Any) -> AddRead:
    return AddRead(block=1, **options)


def early(run: str = "base", position: int = 4) -> Patch:
    """An edit in front of what is read: the row is under way there."""
    return Patch(sites.ATTN_OUT, (1,), (position,), Scaled("grown", 5.0), run=run)


def late(run: str = "base", position: int = 4, **options: Any) -> Patch:
    return Patch(sites.RESID_PRE, (3,), (position,), read_1(**options), run=run, source=None)


def patches_that_read() -> list[Patch]:
    """Rows that begin behind what is read, at it, and before it, side by side in one batch."""
    neurons = Patch(sites.MLP_POST, (2,), (6,), edits.Constant(), units=(0, 5), allow_unchanged=True)
    return [
        late(),
        late("other", 5),
        replace(late(), also=(early(),)),
        replace(late("other"), also=(early("other"),)),
        replace(late(position=6), also=(early(position=3), neurons)),
        replace(early(), also=(replace(late(position=4), positions=((4,), (6,), (2, 5))),)),
        replace(late(of_source=True), source=OTHER),
        replace(late("other", of_source=True), source=Source("base", (7,))),
        Patch(sites.RESID_POST, (1, 3), (2, 5), AddRead(site=sites.RESID_PRE, block=0)),
        Patch(sites.MLP_OUT, (2,), (5,), AddRead(site=sites.ATTN_OUT)),
    ]


def measured(n_layers: int) -> list[readouts.Readout]:
    return [
        readouts.attention_received("received", (n_layers - 1,), ((0,), (2,), (4,)), N),
        readouts.vector_readout("norm", sites.RESID_POST, (2, 3), (6,), N, lambda x, _: x.norm(dim=-1)),
        readouts.over_positions(
            "logit", sites.LOGITS, (n_layers,), lambda x, _: x[:, 5].float(), lambda n: torch.ones(N, n)
        ),
    ]


def check(model: Any, patches: list[Patch], runs: Any = RUNS, path: str = "packed", **options: Any) -> None:
    tokens, wanted = tiny_tokens(N, LENGTH), measured(4)
    result = run_patches(model, tokens, patches, wanted, runs=runs, **options)
    assert result.stats.path == path
    slow = OneAtATime(model, tokens, wanted, runs)
    for index, patch in enumerate(patches):
        expected = torch.tensor([slow(patch, prompt) for prompt in range(N)]).T
        values = torch.stack([result.values[readout.name][index] for readout in wanted])
        assert torch.allclose(values.float(), expected, rtol=1e-4, atol=1e-5), patch.describe()
    moved = [
        (result.values["logit"][i] - result.runs[p.run]["logit"]).abs().max() > 1e-4 for i, p in enumerate(patches)
    ]
    assert all(moved)
    assert not hooks_left(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_packed_pass(family: str) -> None:
    model = tiny_model(family, "hooked")
    check(model, patches_that_read())
    check(model, patches_that_read()[::-1], max_rows=4)


@pytest.mark.slow
def test_the_pass_through_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "unpackable", lambda *_, **__: "for this test")
    check(tiny_model("llama", "hooked"), patches_that_read(), path="model")


@pytest.mark.slow
@pytest.mark.backend
def test_a_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "bridge")
    check(model, patches_that_read())
    check(model, patches_that_read()[::-1], max_rows=4)
    monkeypatch.setattr(engine, "unpackable", lambda *_, **__: "for this test")
    check(model, patches_that_read(), path="model")


@pytest.mark.slow
def test_a_root_edit_that_reads_an_earlier_block() -> None:
    """Its run is captured with it, and rows that begin behind what it reads have that from their run."""
    root = Patch(sites.RESID_PRE, (3,), (4,), read_1(), run="other")
    scale = Patch(sites.MLP_OUT, (1,), (4,), Scaled("grown", 4.0), run="other")
    patches = [
        Patch(sites.MLP_OUT, (2,), (4,), TRANSPLANT, run="other", source=Source("base")),
        Patch(sites.ATTN_OUT, (0,), (4,), TRANSPLANT, run="base", source=OTHER, also=(late(),), allow_unchanged=True),
        Patch(sites.ATTN_OUT, (1,), (4,), SHRINK, run="other"),
    ]
    runs = {"base": (), "other": (scale, root)}
    check(tiny_model("llama", "hooked"), patches, runs)
    check(tiny_model("gpt2", "hooked"), patches, runs)


def test_the_value_by_hand() -> None:
    """The residual that enters block 3 is its own plus three times what the MLP of block 1 wrote there."""
    model, tokens = tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH)
    names = {"blocks.3.hook_resid_pre", MLP_OUT_1}
    clean = cache_of(model, tokens, [], names)
    found = cache_of(model, tokens, hooks_of(late()), names)
    expected = clean["blocks.3.hook_resid_pre"].clone()
    expected[:, 4] += 3 * clean[MLP_OUT_1][:, 4]
    assert torch.equal(found["blocks.3.hook_resid_pre"], expected)
    # Under the early edit it reads what that has made of block 1, which is not what the run has there.
    both = replace(late(), also=(early(),))
    found = cache_of(model, tokens, hooks_of(both), names)
    assert not torch.allclose(found[MLP_OUT_1][:, 4], clean[MLP_OUT_1][:, 4])


def test_gradients() -> None:
    """Of an edit that is linear in what it reads the estimate is (what it adds) times the gradient, read at the run."""
    model, tokens = tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH)
    readout = readouts.vector_readout("sum", sites.RESID_PRE, (3,), (4,), N, lambda x, _: x.sum(-1))
    found = attribution.estimate(model, tokens, [late(), replace(late(), also=(early(),))], [readout], runs=RUNS)
    added = 3 * cache_of(model, tokens, [], {MLP_OUT_1})[MLP_OUT_1][:, 4].sum(-1).double()
    assert torch.allclose(found.changes["sum"][0], added, atol=1e-5)
    alone = attribution.estimate(model, tokens, [early()], [readout], runs=RUNS)
    # Two edits are estimated as the sum of their parts.
    assert torch.allclose(found.changes["sum"][1], added + alone.changes["sum"][0], atol=1e-5)


@pytest.mark.parametrize("block", [3, 4])
def test_what_is_not_computed_yet_cannot_be_read(block: int) -> None:
    model, tokens = tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH)
    patch = Patch(sites.RESID_PRE, (2,), (4,), AddRead(block=block))
    with pytest.raises(InputError, match=f"reads block {block}"):
        run_patches(model, tokens, [patch], measured(4))
    same_block = Patch(sites.RESID_PRE, (2,), (4,), AddRead())
    with pytest.raises(EngineError, match="has not computed by then"):
        run_patches(model, tokens, [same_block], measured(4))
    assert not hooks_left(model)


# -- Several edits in one patch ---------------------------------------------------------------------------------------


def several() -> list[Patch]:
    head = Patch(sites.Z, (3,), (5,), TRANSPLANT, units=(1,), source=OTHER)
    neurons = Patch(sites.MLP_POST, (2,), (4,), edits.Constant(), units=(3, 7))
    return [
        replace(head, also=(neurons,)),
        replace(neurons, also=(head,)),
        replace(neurons, also=(replace(head, also=(early(),)),)),
        # At one place they act in their order: 0.5 x + 3 y and 0.5 (x + 3 y) are not the same.
        Patch(sites.RESID_PRE, (3,), (4,), SHRINK, also=(late(),)),
        replace(late(), also=(Patch(sites.RESID_PRE, (3,), (4,), SHRINK),)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_edits_at_the_same_time(family: str) -> None:
    model = tiny_model(family, "hooked")
    check(model, several())
    result = run_patches(model, tiny_tokens(N, LENGTH), several(), measured(4), runs=RUNS)
    values = result.values["logit"]
    assert torch.allclose(values[0], values[1], atol=1e-5) and not torch.allclose(values[3], values[4], atol=1e-3)


@pytest.mark.slow
@pytest.mark.backend
def test_several_edits_on_a_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "bridge")
    check(model, several())
    monkeypatch.setattr(engine, "unpackable", lambda *_, **__: "for this test")
    check(model, several(), path="model")


def test_one_of_several_that_changes_nothing_is_refused() -> None:
    model, tokens = tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH)
    idle = Patch(sites.RESID_POST, (2,), (4,), Scaled("idle", 1.0))
    for patch in (replace(early(), also=(idle,)), replace(idle, also=(early(),))):
        with pytest.raises(EngineError, match="changed nothing, the first is: idle"):
            run_patches(model, tokens, [patch], measured(4))
    meant = replace(early(), also=(replace(idle, allow_unchanged=True),))
    alone = run_patches(model, tokens, [early(), meant], measured(4)).values["logit"]
    assert torch.equal(alone[0], alone[1])


def test_edits_in_two_runs_are_no_patch() -> None:
    patch = replace(early(), also=(late("other"),))
    with pytest.raises(InputError, match="in one run"):
        run_patches(tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH), [patch], measured(4), runs=RUNS)


def test_what_a_patch_of_several_edits_is_called() -> None:
    """Its identity is that of all its parts, whatever their labels; its first block is the first of any."""
    one, other = several()[:2]
    assert one.id == replace(one, label="x").id != other.id
    assert len({patch.id for patch in several()}) == len(several())
    assert one.start == 2 and [part.also for part in one.parts] == [(), ()]
    assert "transplant" in one.describe() and "and zero" in one.describe()


@pytest.mark.parametrize("path", ["packed", "model"])
def test_one_source_position_for_several(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "model":
        monkeypatch.setattr(engine, "unpackable", lambda *_, **__: "for this test")
    model, tokens = tiny_model("llama", "hooked"), tiny_tokens(N, LENGTH)
    one = Patch(sites.RESID_PRE, (2,), (3, 5), TRANSPLANT, source=Source("other", (6,)))
    each = replace(one, source=Source("other", (6, 6)))
    ragged = replace(one, positions=((3, 5), (4,), (2, 3, 6)), source=Source("other", ((7,), (6,), (1,))))
    result = run_patches(model, tokens, [one, each, ragged], measured(4), runs=RUNS)
    assert result.stats.path == path
    values = result.values["logit"]
    assert torch.allclose(values[0], values[1], atol=1e-6) and not torch.allclose(values[0], values[2], atol=1e-3)
    for positions in (((6, 7, 8)), ((6, 7), (6,), (6, 7))):
        with pytest.raises(InputError, match="one source position for each"):
            run_patches(model, tokens, [replace(one, source=Source("other", positions))], measured(4), runs=RUNS)


def test_a_readout_over_positions_cannot_say_two_things() -> None:
    readout = measured(4)[1]
    assert isinstance(readout, readouts.PositionReadout)
    act = torch.rand(N, LENGTH, 32)
    rows = readouts.Rows(torch.arange(N), 2)
    doubled = replace(readout, at=lambda x, tokens: 2 * readout.at(x, tokens))
    assert torch.allclose(doubled.reduce(act, rows), 2 * readout.reduce(act, rows))
    with pytest.raises((TypeError, ValueError)):
        replace(readout, reduce=lambda act, _rows: act.sum())
    pickled = pytest.importorskip("cloudpickle").dumps(replace(readout, at=first_entry, weigh=last_position))
    sent = pickle.loads(pickled)
    assert torch.equal(sent.reduce(act, rows), act[:, -1, 0])


def first_entry(x: Tensor, tokens: readouts.Tokens) -> Tensor:  # noqa: ARG001
    return x[:, 0]


def last_position(length: int) -> Tensor:
    return (torch.arange(length) == length - 1).float().expand(N, -1)


def test_positions() -> None:
    shared, own = Positions.of((3, 5)), Positions.of(((3,), (5, 6)))
    assert shared.at(7) == (3, 5) and own.at(1) == (5, 6)
    assert Positions.of(own) is own and own != shared and hash(own) == hash(Positions.of(((3,), (5, 6))))
    assert repr(shared) == "(3, 5)" and repr(own) == "((3,), (5, 6))"
    assert own.prompts(1, 2) == Positions.of(((5, 6),)) and shared.prompts(1, 2) is shared
    assert Positions.one_each([2, 4]).single(2).tolist() == [2, 4] and Positions.of((3,)).single(2).tolist() == [3, 3]
    with pytest.raises(ValueError, match="exactly one"):
        own.single(2)
    with pytest.raises(ValueError, match="numbers for all prompts, or a tuple for each"):
        Positions.of((1, (2,)))  # pyright: ignore[reportArgumentType]: that is the point
