"""Callers' edits, readouts and places: what plain hooks give, or one sentence that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens import edits, readouts, sites
from sinklens.attribution import estimate
from sinklens.engine import trust
from sinklens.engine.run import run_patches
from sinklens.errors import EditError, EngineError, InputError
from sinklens.models.families import random_model
from sinklens.patches import Patch, Positions, Source
from sinklens.readouts.base import PositionReadout, Readout
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import N_KV_HEADS, hooks_left, tiny_tokens

pytestmark = pytest.mark.slow

N, LENGTH, AT = 3, 12, 5
TOKENS = tiny_tokens(N, LENGTH)
RUNS = {"base": (), "other": (Patch(sites.PATTERN, (0, 1), (AT,), edits.AttendSelf(), run="other"),)}


@pytest.fixture(scope="module", params=["hooked", "bridge", "hooked bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    """Both passes; half precision."""
    backend, _, dtype = request.param.partition(" ")
    return sl.load_model(random_model("llama"), backend=backend, dtype=dtype or "float32", device="cpu")


def norm(act: Tensor, _rows: object) -> Tensor:
    return act[:, AT].float().norm(dim=-1)


NORM = Readout("norm", sites.RESID_POST, (3,), norm)
RECEIVED = readouts.attention_received("received", (3,), (AT,), N)


def patched(edit: Callable[[Tensor, Tensor], Any], **options: Any) -> Patch:
    given = {"site": sites.Z, "layers": (2,), "positions": (AT,), "source": Source("other")}
    return Patch(edit=edits.Function("mine", edit), **(given | options))  # pyright: ignore[reportArgumentType]


def run(model: Any, patches: list[Patch], wanted: tuple[Readout, ...] = (NORM, RECEIVED), **options: Any) -> Any:
    return run_patches(model, TOKENS, patches, wanted, runs=RUNS, **options)


def agrees(model: Any, patches: list[Patch]) -> None:
    """The engine's numbers are those of one patch and one prompt at a time."""
    slow, half = OneAtATime(model, TOKENS, [NORM, RECEIVED], RUNS), model.cfg.dtype != torch.float32
    expected = {id(patch): [slow(patch, prompt) for prompt in range(N)] for patch in patches}
    options: dict[str, Any]
    # What one has written another must not find: neither in one batch, nor in small ones, in another order.
    for options, ordered in (({}, patches), ({"max_rows": 2}, patches[::-1])):
        found = run(model, ordered, **options).values
        for number, patch in enumerate(ordered):
            for prompt in range(N):
                got = [float(found[name][number, prompt]) for name in ("norm", "received")]
                tolerance = 0.05 if half else 1e-4
                assert np.allclose(got, expected[id(patch)][prompt], rtol=tolerance, atol=tolerance)


# --- Edits ----------------------------------------------------------------------------------------------------------


def in_place(x: Tensor, source: Tensor) -> Tensor:  # noqa: ARG001
    x.mul_(0.5)
    return x


def in_place_and_nothing(x: Tensor, source: Tensor) -> None:  # noqa: ARG001
    x[...] = 0


def into_the_source(x: Tensor, source: Tensor) -> Tensor:
    source += x
    return source


EDITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": in_place,
    "in place, without a return": in_place_and_nothing,
    "into the source": into_the_source,
    "in float64": lambda x, source: (x + source).double(),
    "in integers": lambda x, source: source.round().int() + 1,  # noqa: ARG005
    "expanded": lambda x, source: torch.zeros(1).to(x).expand_as(x),  # noqa: ARG005
    "a view": lambda x, source: source.flip(0).flip(0),  # noqa: ARG005
    "with a gradient": lambda x, source: x * torch.nn.Parameter(torch.tensor(0.5)).to(x),  # noqa: ARG005
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_do_as_plain_hooks_would(model: Any, name: str) -> None:
    edit = EDITS[name]
    patches = [patched(edit), patched(edit, positions=(7,), units=(1,)), patched(edit, site=sites.RESID_PRE)]
    agrees(model, patches)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "mixes rows": (lambda x, source: x + x.mean(0, keepdim=True), "other rows lie beside it"),  # noqa: ARG005
    "mixes source rows": (lambda x, source: source - source.mean(0), "other rows lie beside it"),  # noqa: ARG005
    "turns rows round": (lambda x, source: 2 * x.flip(0) + source, "other rows lie beside it"),
    "scales by the batch": (lambda x, source: x / x.abs().max() + 0 * source, "other rows lie beside it"),
    "draws": (lambda x, source: x + torch.randn_like(x), "draw nothing at random"),  # noqa: ARG005
    "counts": (lambda x, source: x * (1 + len(x)), "other rows lie beside it"),  # noqa: ARG005
    "nothing": (lambda x, source: None, "returned nothing"),  # noqa: ARG005
    "numpy": (lambda x, source: x.float().numpy(), "ndarray, not a tensor"),  # noqa: ARG005
    "a number": (lambda x, source: 0.0, "float, not a tensor"),  # noqa: ARG005
    "complex": (lambda x, source: x.float() * 1j, "complex"),  # noqa: ARG005
    "meta": (lambda x, source: x.to("meta"), "meta"),  # noqa: ARG005
    "one row": (lambda x, source: x[:1].mean(-1), "returned shape"),  # noqa: ARG005
    "NaN": (lambda x, source: x * torch.nan, "not finite"),  # noqa: ARG005
    "NaN in one row": (lambda x, source: x / (x - x), "not finite"),  # noqa: ARG005
}


AT_SITES = {"z": sites.Z, "k": sites.K, "pattern": sites.PATTERN}
EACH_SOMEWHERE = [
    pytest.param(name, AT_SITES[key], id=f"{name}-{key}")
    for number, name in enumerate(REFUSED)
    for key in (AT_SITES if name in ("mixes rows", "draws", "NaN") else list(AT_SITES)[number % 3 :][:1])
]
"""Some at every site, the others at one, in turn."""


@pytest.mark.parametrize(("name", "site"), EACH_SOMEWHERE)
def test_edits_that_cannot_be_are_refused(model: Any, name: str, site: sites.HookSite) -> None:
    edit, match = REFUSED[name]
    options: dict[str, Any]
    for options in ({}, {"max_rows": 1}):
        with pytest.raises(InputError, match=match) as raised:
            run(model, [patched(edit, site=site)], **options)
        assert isinstance(raised.value, EngineError) and "mine" in str(raised.value)
    assert not hooks_left(model)


def test_a_single_row_is_enough_to_find_a_mixing_edit(model: Any) -> None:
    mixing = patched(lambda x, source: x * 2 - x.mean(0) + 0 * source)
    with pytest.raises(EditError, match="'mine'"):
        run_patches(model, TOKENS[:1], [mixing], [NORM], runs=RUNS)


@dataclass(frozen=True)
class Centred:
    """A function of the caller's that is a dataclass."""

    share: float = 1.0

    def __call__(self, x: Tensor, source: Tensor) -> Tensor:
        return 2 * x - self.share * x.mean(0) + 0 * source


@torch.jit.script
def scripted(x: Tensor, source: Tensor) -> Tensor:
    return 2 * x - x.mean(0) + 0 * source


class AroundTheMean(torch.nn.Module):
    def forward(self, stack: Tensor) -> Tensor:
        return stack[0] - stack[0].mean()


@pytest.mark.parametrize(
    "edit",
    [
        Centred(),
        scripted,
        lambda x, source: 2 * x.cumsum(0) + 0 * source,
        lambda x, source: x / (1 + x.abs().amax()) + 0 * source,
        lambda x, source: torch.cat([3 * x[:1], 2 * x[1:]]) + 0 * source,
    ],
    ids=["dataclass", "scripted", "running sum", "largest", "the first"],
)
def test_functions_of_any_kind_that_mix_rows_are_refused(model: Any, edit: Callable[..., Any]) -> None:
    for prompts in (TOKENS, TOKENS[:1]):  # with a single row, too, which is beside others in the next batch
        with pytest.raises(EditError, match="other rows lie beside it"):
            run_patches(model, prompts, [patched(edit)], [NORM], runs=RUNS)
    assert not trust.is_ours(edits.Function("mine", edit))


def test_a_module_inside_a_module_of_torch_is_not_trusted(model: Any) -> None:
    mixing = Readout("wrong", sites.RESID_POST, (3,), norm, torch.nn.Sequential(AroundTheMean()))
    assert not trust.is_ours(mixing)
    with pytest.raises(EditError, match="combine of the readout 'wrong'"):
        run(model, [patched(in_place)], (mixing,))


def test_edits_that_cannot_be_are_refused_in_estimates_and_runs(model: Any) -> None:
    mixing, _ = REFUSED["mixes rows"]
    with pytest.raises(EditError, match="'mine'"):
        estimate(model, TOKENS, [patched(mixing)], [NORM], runs=RUNS, qk_fix=False)

    class Root(edits.Edit):
        def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
            return x * torch.nan

    for site in (sites.K, sites.Z):
        runs = {"base": (Patch(site, (1,), (AT,), Root("lost")),)}
        with pytest.raises(InputError, match="gives NaN|not finite"):
            run_patches(model, TOKENS, [], [NORM], runs=runs)


def test_the_packages_own_edits_are_not_tried() -> None:
    z = {1: torch.zeros(4, 8)}
    own = [
        edits.Constant(values=z),
        edits.Transplant(),
        edits.OfSource(edit=edits.Constant()),
        edits.AttendSelf(),
        RECEIVED,
        readouts.vector_readout("n", sites.Z, (1,), (AT,), N, torch.norm),
    ]
    assert all(trust.is_ours(thing) for thing in own)
    mine: list[object] = [
        edits.Function("f", lambda x, source: x),  # noqa: ARG005
        edits.Function("f", partial(torch.add, alpha=2)),
        edits.OfSource(edit=edits.Function("f", in_place)),
        edits.SameNormScaling(of=edits.Function("f", in_place)),
        NORM,
        readouts.vector_readout("n", sites.Z, (1,), (AT,), N, lambda x, layer: x.sum((1, 2))),  # noqa: ARG005
    ]
    assert [trust.is_ours(thing) for thing in mine] == [False, True, False, False, False, False]


# --- Readouts -------------------------------------------------------------------------------------------------------


def view_of(act: Tensor, _rows: object) -> Tensor:
    return act[:, AT, 0]


def test_readouts_of_any_real_kind(model: Any) -> None:
    wanted = (
        Readout("view", sites.RESID_POST, (3,), view_of),
        Readout("whole", sites.RESID_POST, (3,), lambda act, _: act, lambda stack: stack[0, :, AT, 0]),
        Readout("integers", sites.RESID_POST, (3,), lambda act, _: act[:, AT].argmax(-1)),
        Readout("yes or no", sites.RESID_POST, (3,), lambda act, _: act[:, AT, 0] > 0),
        Readout("float64", sites.RESID_POST, (3,), lambda act, _: act[:, AT, 0].double()),
    )
    patch = patched(lambda x, source: (x + source) / 2)
    found = run(model, [patch], wanted)
    slow = OneAtATime(model, TOKENS, wanted[:1], RUNS)
    expected = [slow(patch, prompt)[0] for prompt in range(N)]
    tolerance = 1e-4 if model.cfg.dtype == torch.float32 else 0.2
    for name in ("view", "whole", "float64"):
        assert np.allclose(found.values[name][0], expected, rtol=tolerance, atol=tolerance)
    assert found.values["yes or no"].unique().tolist() in ([0, 1], [0], [1])


BAD_READOUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "mixes rows": (lambda act, _: act[:, AT].float().norm(dim=-1) - act[:, AT].float().norm(dim=-1).mean(), "beside"),
    "a number": (lambda act, _: float(act[:, AT].sum()), "float, not a tensor"),
    "nothing": (lambda act, _: None, "nothing"),  # noqa: ARG005
    "numpy": (lambda act, _: act[:, AT, 0].float().numpy(), "ndarray"),
    "no rows": (lambda act, _: act[:, AT].float().sum(), "one entry for every row"),
    "other rows": (lambda act, _: act[:1, AT].float().norm(dim=-1), "one entry for every row|beside"),
    "writes": (lambda act, _: act.mul_(2)[:, AT].float().norm(dim=-1), "writes into the activation"),
    "complex": (lambda act, _: act[:, AT, 0].float() * 1j, "complex"),
    "NaN": (lambda act, _: act[:, AT, 0].float() * torch.nan, "not finite"),
}


@pytest.mark.parametrize("name", BAD_READOUTS)
def test_readouts_that_cannot_be_are_refused(model: Any, name: str) -> None:
    reduce, match = BAD_READOUTS[name]
    for options in ({}, {"max_rows": 1}):
        with pytest.raises(InputError, match=match) as raised:
            run(model, [patched(in_place)], (Readout("wrong", sites.RESID_POST, (3,), reduce),), **options)
        assert "'wrong'" in str(raised.value)
    assert not hooks_left(model)


@pytest.mark.parametrize(
    "combine",
    [lambda stack: stack, lambda stack: stack.mean(), lambda stack: (stack - stack.mean())[0], lambda stack: 1.0],  # noqa: ARG005
)
def test_combining_gives_one_number_a_row(model: Any, combine: Callable[[Tensor], Any]) -> None:
    wrong = Readout("wrong", sites.RESID_POST, (2, 3), norm, combine)
    with pytest.raises(EditError, match="combine of the readout 'wrong'"):
        run(model, [patched(in_place)], (wrong,))


def test_readouts_over_positions_that_mix_rows_are_refused(model: Any) -> None:
    mixing = readouts.over_positions(
        "wrong",
        sites.RESID_POST,
        (3,),
        at=lambda act, _: act.float().norm(dim=-1) - act.float().norm(dim=-1).mean(),
        weigh=lambda length: torch.ones(N, length),
    )
    assert isinstance(mixing, PositionReadout)
    with pytest.raises(EditError, match="'wrong'"):
        run(model, [patched(in_place)], (mixing,))
    with pytest.raises(EditError, match="'wrong'"):
        estimate(model, TOKENS, [patched(in_place)], [mixing], runs=RUNS, qk_fix=False)


# --- Places ---------------------------------------------------------------------------------------------------------

mask = np.arange(LENGTH) == AT
WRITTEN: dict[str, list[Any]] = {
    "positions": [
        AT,
        np.int64(AT),
        torch.tensor(AT),
        [AT],
        range(AT, AT + 1),
        np.array([AT]),
        torch.tensor([AT], dtype=torch.int32),
        (np.int32(AT),),
        {AT},
        mask,
        torch.from_numpy(mask),
        mask.tolist(),
        [[AT]] * N,
        np.full((N, 1), AT),
        torch.full((N, 1), AT),
        np.tile(mask, (N, 1)),
        ([AT], (AT,), range(AT, AT + 1)),
    ],
    "layers": [2, [2], range(2, 3), np.array([2]), torch.tensor([2]), np.int64(2), np.arange(4) == 2],
    "units": [1, [1], range(1, 2), np.array([1]), torch.tensor([1]), np.uint8(1), torch.tensor([False, True])],
}


@pytest.mark.parametrize(("place", "number"), [(p, i) for p, ways in WRITTEN.items() for i in range(len(ways))])
def test_places_may_be_written_in_many_ways(tiny_llama: Any, place: str, number: int) -> None:
    given = {"site": sites.K, "layers": (2,), "positions": (AT,), "units": (1,), "source": Source("other")}
    want = Patch(edit=edits.Transplant(), **given)  # type: ignore[arg-type]
    patch = Patch(edit=edits.Transplant(), **(given | {place: WRITTEN[place][number]}))  # type: ignore[arg-type]
    if patch.where.shared:
        assert patch.id == want.id
    one, two = (run(tiny_llama, [each]).values["norm"] for each in (want, patch))
    assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"positions": (AT, AT)}, "repeat"),
        ({"positions": ((AT,), (4, 4), (1,))}, "repeat"),
        ({"positions": ()}, "without positions"),
        ({"positions": np.zeros(LENGTH, dtype=bool)}, "without positions"),
        ({"positions": ((1,), (), (2,))}, "without positions"),
        ({"positions": -1}, "not all in 0.."),
        ({"positions": (4, -1)}, "not all in 0.."),
        ({"positions": 1.0}, "whole number"),
        ({"positions": np.array([1.5])}, "whole number"),
        ({"positions": True}, "whole number"),
        ({"positions": "5"}, "whole number"),
        ({"positions": (1, (2,))}, "a tuple for each"),
        ({"positions": np.full((2, 1), 3)}, "2 prompts"),
        ({"layers": ()}, "blocks"),
        ({"layers": (2, 2)}, "repeat"),
        ({"layers": -1}, "blocks"),
        ({"layers": 2.0}, "whole number"),
        ({"units": ()}, "no units"),
        ({"units": (1, 1)}, "repeat"),
        ({"units": -1}, "not all in 0..1"),
        ({"units": N_KV_HEADS}, "not all in 0..1"),
        ({"units": 0.5}, "whole number"),
        ({"positions": (4,), "source": Source("other", (1, 2))}, "one source position"),
        ({"positions": (4, 5), "source": Source("other", (1, 2, 3))}, "one source position"),
        ({"positions": (4, 5), "source": Source("other", ((1,), (2, 3), (4, 5, 6)))}, "one source position"),
        ({"positions": ((1, 2), (3,), (4, 5)), "source": Source("other", (1, 2))}, "one source position"),
        ({"positions": ((1,), (3,), (4,)), "source": Source("other", ((1,), (2,)))}, "prompts"),
        ({"positions": (4,), "source": Source("other", ())}, "position"),
    ],
)
def test_places_that_cannot_be_are_refused(
    backend: str, options: dict[str, Any], match: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("tiny_llama" if backend == "hooked" else "tiny_bridge")
    given = {"site": sites.K, "layers": (2,), "positions": (AT,), "source": Source("other")} | options
    good = Patch(sites.K, (2,), (4, 5), edits.Transplant(), source=Source("other"))
    for job in (run, lambda model, patches: estimate(model, TOKENS, patches, [NORM], runs=RUNS, qk_fix=False)):
        with pytest.raises(InputError, match=match):
            job(model, [good, Patch(edit=edits.Transplant(), **given)])  # type: ignore[arg-type]


def test_one_source_position_serves_all(model: Any) -> None:
    shared = patched(lambda x, source: source, positions=(4, 6), source=Source("other", 2))  # noqa: ARG005
    sources = Source("other", [[2], [1], [0]])
    ragged = patched(lambda x, source: source, positions=((4, 6), (5,), (3, 4)), source=sources)  # noqa: ARG005
    agrees(model, [shared, ragged])


def test_overlapping_interventions_act_in_their_order(model: Any) -> None:
    first = patched(lambda x, source: x + source, positions=(4, 5))
    second = patched(lambda x, source: 2 * x - source, positions=(5, 6), units=(0, 1))
    both = Patch(**{**vars(first), "also": [second]})  # type: ignore[arg-type]
    agrees(model, [both])


def test_readouts_take_places_as_patches_do() -> None:
    assert Positions.of(np.array([3, 4])) == Positions.of([3, 4]) == Positions(((3, 4),), True)
    with pytest.raises(InputError, match="must not be negative"):
        readouts.attention_received("r", (1,), (-1,), N)
    with pytest.raises(InputError, match="2 prompts, but there are 3"):
        readouts.attention_received("r", (1,), [[1], [2]], N)
    with pytest.raises(InputError, match="whole number"):
        Positions.one_each([1.5])  # type: ignore[list-item]
