"""Runs whose roots take from other runs: as with plain hooks that put there what a plain forward pass had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens import edits, sites
from sinklens.attribution import estimate
from sinklens.attribution.estimation import Attributor
from sinklens.engine.capture import capture_runs, without_sources
from sinklens.engine.run import PatchRunner
from sinklens.engine.store import Want
from sinklens.errors import InputError
from sinklens.interventions import Hooks, hooks_of
from sinklens.patches import Patch, Runs, Source
from sinklens.readouts.base import Readout
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.tiny import BACKENDS, D_MODEL, N_HEADS, N_LAYERS, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH = 3, 12
TOKENS = tiny_tokens(N, LENGTH)
LOGIT = Readout("logit", sites.LOGITS, (N_LAYERS,), lambda logits, _: logits[:, -1, 5].float(), lambda x: x[0])
MID = Readout("mid", sites.RESID_POST, (1,), lambda act, _: act[:, 6].float().norm(dim=-1))
BASE = Source("base")
OFF = Patch(sites.MLP_OUT, (2,), (5,), edits.Constant(), run="mixed")


def root(edit: edits.Edit | None = None, **options: Any) -> Patch:
    given: dict[str, Any] = {"site": sites.RESID_PRE, "layers": (1,), "positions": (5,), "source": BASE, "run": "mixed"}
    given |= {"edit": edit or edits.Transplant(), **options}
    return Patch(**given)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model("llama", request.param)


def basis(rank: int = 4) -> Tensor:
    return torch.linalg.qr(torch.randn(D_MODEL, rank, generator=torch.Generator().manual_seed(0)))[0]


def names_of(patch: Patch) -> set[str]:
    read = {place.site.at(place.layer) for layer in patch.layers for place in patch.edit.reads_in(layer)}
    return {patch.site.at(layer) for layer in patch.layers} | read


def put(act: Tensor, **places: Any) -> Tensor:
    """A copy, with other values at positions that are given for all prompts or for each."""
    new = act.clone()
    rows = torch.arange(N)[:, None]
    new[rows, places["at"]] = places["values"]
    return new


def read(model: Any, hooks: Hooks) -> Tensor:
    return cache_of(model, TOKENS, hooks, set())["logits"][:, -1, 5]


def check(model: Any, runs: Runs, hooks: Hooks, *patched: tuple[Patch, Hooks]) -> None:
    """The run ``mixed`` and patches in it, against plain hooks."""
    patches = [patch for patch, _ in patched]
    found = sl.run_patches(model, TOKENS, patches, [LOGIT], runs=runs)
    expected = read(model, hooks)
    assert torch.allclose(found.runs["mixed"]["logit"].float(), expected, atol=1e-5)
    assert not torch.allclose(expected, read(model, []), atol=1e-3)
    for values, (_, own) in zip(found.values["logit"], patched, strict=True):
        assert torch.allclose(values.float(), read(model, [*hooks, *own]), atol=1e-5)


WHERE = torch.tensor([[5], [2], [9]])


def test_it_is_what_plain_hooks_put_there(model: Any) -> None:
    """From another position of the clean run, one of each prompt's own; and patches in that run."""
    name = "blocks.1.hook_resid_pre"
    kept = cache_of(model, TOKENS, [], {name})[name]
    taken = kept[torch.arange(N)[:, None], WHERE - 1]
    hooks: Hooks = [(name, lambda act, hook: put(act, at=WHERE, values=taken))]  # noqa: ARG005
    off: Hooks = [("blocks.2.hook_mlp_out", lambda act, hook: put(act, at=torch.tensor([[5]] * N), values=0))]  # noqa: ARG005
    where, source = (tuple((int(p),) for p in places) for places in (WHERE, WHERE - 1))
    runs = {"mixed": [root(positions=where, source=Source("base", source))], "base": ()}
    check(model, runs, hooks, (OFF, off))


ROOTS = {
    "halfway": root(edits.Interpolate("halfway", 0.5), source=Source("base", (2,))),
    "one source for several positions": root(positions=(5, 8, 3), source=Source("base", (1,)), layers=(0, 2)),
    "other numbers of positions": root(
        positions=((5, 6), (3,), (2, 7)), source=Source("base", ((1, 2), (8,), (4, 0))), layers=(2,)
    ),
    "heads": root(site=sites.Z, units=(2, 0), source=Source("base", (7,)), layers=(1, 2)),
    "rows of the pattern": root(site=sites.PATTERN, units=(1,), source=Source("base", (2,))),
    "an edit of the source": root(edits.OfSource("of", edits.Constant("zero"))),
    "other places": root(
        edits.WrittenBy("written", basis(), ((sites.ATTN_OUT, 0), (sites.MLP_OUT, 1))),
        source=Source("base", (2,)),
        layers=(2,),
    ),
    "its own site elsewhere": root(
        edits.WrittenBy("written", basis(), ((sites.RESID_PRE, 0),)), source=Source("base", (2,)), layers=(2,)
    ),
    "the user's own": root(edits.Function("mine", lambda x, source: x - 2 * source), source=Source("base", (2,))),
}


@pytest.mark.parametrize("name", ROOTS)
def test_any_edit_takes_from_a_run(name: str, model: Any) -> None:
    mine = ROOTS[name]
    source = cache_of(model, TOKENS, [], names_of(mine))
    patched = (OFF, hooks_of(replace(OFF, source=None)))
    check(model, {"base": (), "mixed": [mine]}, hooks_of(replace(mine, source=mine.source), source), patched)


CHAIN: Runs = {  # each takes from the one below it
    "mixed": [root(source=Source("second", (4,)), layers=(2,))],
    "second": [
        root(source=Source("first", (2,)), positions=(4,)),
        root(edits.Constant(), site=sites.ATTN_OUT, source=None),
    ],
    "first": [root(edits.Constant(), site=sites.MLP_OUT, layers=(0,), positions=(2,), source=None)],
}


def chain_hooks(model: Any) -> dict[str, Hooks]:
    found: dict[str, Hooks] = {}
    for run in ("first", "second", "mixed"):
        hooks: Hooks = []
        for patch in CHAIN[run]:
            below = None if patch.source is None else cache_of(model, TOKENS, found[patch.source.run], names_of(patch))
            hooks += hooks_of(patch, below)
        found[run] = hooks
    return found


@pytest.mark.slow
def test_a_chain_of_three_runs_and_patches_between_them(model: Any) -> None:
    hooks = chain_hooks(model)
    check(model, CHAIN, hooks["mixed"], (OFF, hooks_of(OFF)))
    found = sl.run_patches(model, TOKENS, [], [LOGIT], runs=CHAIN)
    for run, mine in hooks.items():
        assert torch.allclose(found.runs[run]["logit"].float(), read(model, mine), atol=1e-5)
    # A patch may take from such a run, as from any.
    patch = Patch(sites.RESID_PRE, (3,), (5,), edits.Transplant(), run="first", source=Source("mixed"))
    values = sl.run_patches(model, TOKENS, [patch], [LOGIT], runs=CHAIN).values["logit"][0]
    above = cache_of(model, TOKENS, hooks["mixed"], names_of(patch))
    assert torch.allclose(values.float(), read(model, [*hooks["first"], *hooks_of(patch, above)]), atol=1e-5)


def test_what_goes_with_a_root_may_take_from_another_run(model: Any) -> None:
    also = root(source=Source("other", (3,)), positions=(8,), layers=(2,))
    runs = {
        "mixed": [root(source=Source("base", (2,)), also=(also,))],
        "other": [root(edits.Constant(), source=None)],
        "base": (),
    }
    caches = [
        cache_of(model, TOKENS, hooks, {"blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"})
        for hooks in ([], hooks_of(runs["other"][0]))
    ]
    first, second = runs["mixed"][0].parts
    check(model, runs, [*hooks_of(first, caches[0]), *hooks_of(second, caches[1])])


@pytest.mark.slow
def test_it_is_the_same_as_giving_the_values(model: Any) -> None:
    """Patched exactly and estimated, one prompt at a time and all at once."""
    held = capture_runs(model, TOKENS, {"base": ()}, [Want("base", sites.RESID_PRE, 1)], max_rows=8)
    values = held.tensor("base", sites.RESID_PRE, 1).roll(2, dims=1)  # position 5 has what 3 had
    given = root(edits.PerPosition("given", {1: values}), source=None)
    patches = [OFF, Patch(sites.RESID_PRE, (2,), (5,), edits.Transplant(), run="mixed", source=BASE)]
    for run in (sl.run_patches, estimate):
        for rows in (1, 64):
            results = [
                run(model, TOKENS, patches, [LOGIT], runs={"base": (), "mixed": [mine]}, max_rows=rows)
                for mine in (given, root(source=Source("base", (3,))))
            ]
            one, other = (getattr(result, "values" if run is sl.run_patches else "changes") for result in results)
            assert torch.allclose(one["logit"], other["logit"], atol=1e-6)
            assert all(
                torch.allclose(results[0].runs["mixed"]["logit"], result.runs["mixed"]["logit"], atol=1e-6)
                for result in results
            )


@pytest.mark.slow
def test_gradients_pass_through_such_a_root(model: Any) -> None:
    """A small change before it: what is estimated is what it does."""
    times = edits.Function("times", lambda x, source: x * source)
    runs = {"base": (), "mixed": [root(times, layers=(2,), source=Source("base", (3,)))]}
    nudge = edits.Rescale("nudge", {1: torch.zeros(D_MODEL)}, {1: torch.tensor(1.003)})
    patches = [Patch(sites.RESID_PRE, (1,), (5,), nudge, run="mixed")]
    exact = sl.run_patches(model, TOKENS, patches, [LOGIT], runs=runs)
    estimated = estimate(model, TOKENS, patches, [LOGIT], runs=runs).changes["logit"][0]
    assert torch.allclose(estimated, exact.values["logit"][0] - exact.runs["mixed"]["logit"], rtol=0.05, atol=1e-5)
    assert (estimated > 1e-4).all()


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ({"base": (), "mixed": [root(source=Source("mixed"))]}, "in a circle: 'mixed' takes from 'mixed'"),
        (
            {"base": (), "mixed": [root(source=Source("other"))], "other": [OFF, root(source=Source("mixed"))]},
            "in a circle: 'mixed' takes from 'other' takes from 'mixed'",
        ),
        (
            {"base": (), "mixed": [root(source=Source("nowhere"))]},
            "unknown run 'nowhere' in a root patch of the run 'mixed'",
        ),
        ({"base": (), "mixed": [OFF, root(source=None)]}, "takes from another run, but none is named"),
        ({"base": (), "mixed": [root(source=Source("base", (12,)))]}, r"\(12,\) are not all in 0..11"),
        ({"base": (), "mixed": [root(source=Source("base", ((1,), (2,))))]}, "for 2 prompts, but there are 3"),
        (
            {"base": (), "mixed": [root(edits.Masked("mine", {1: torch.zeros(6)}))]},
            r"needs values \[d_model=32\], but got \(6,\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(runs: Any, told: str, model: Any) -> None:
    for run in (sl.run_patches, estimate):
        with pytest.raises(InputError, match=told) as caught:
            run(model, TOKENS, [OFF], [LOGIT], runs=runs)
        assert "\n" not in str(caught.value)


def test_a_run_alone_has_none_to_take_from(model: Any) -> None:
    with pytest.raises(InputError, match="in a circle: 'base' takes from 'base'"):
        capture_runs(model, TOKENS, {"base": [root()]}, [], [MID], max_rows=8)


def resolved(model: Any, **options: Any) -> Patch:
    runs, _ = without_sources(model, TOKENS, {"base": (), "mixed": [root(**options)]}, max_rows=8)
    return runs["mixed"][0]


def test_only_what_is_used_is_kept_and_tells_one_from_another(model: Any) -> None:
    found = resolved(model, positions=(5, 7), source=Source("base", (2, 3)), layers=(1, 2))
    (table,) = found.edit.tables
    assert {tuple(x.shape) for x in table.values.values()} == {(N, 2, D_MODEL)}  # type: ignore[union-attr]
    assert not found.edit.uses_source and found.source is None
    heads = resolved(model, site=sites.Z, units=(1,))
    assert heads.edit.tables[0].values[1].shape[:3] == (N, 1, N_HEADS)
    same, other = (resolved(model, source=Source("base", (p,))).edit.fingerprint() for p in (5, 4))
    assert resolved(model).edit.fingerprint() == same != other
    runs: Runs = {"base": (), "mixed": [OFF]}
    assert without_sources(model, TOKENS, runs, max_rows=8) == (runs, 0)


@pytest.mark.slow
def test_a_model_that_has_changed_is_captured_anew(model: Any) -> None:
    runs = {"base": (), "mixed": [root(source=Source("base", (3,)))]}
    runner, attributor = PatchRunner(model, TOKENS, [LOGIT], runs=runs), Attributor(model, TOKENS, [LOGIT], runs=runs)
    before = runner.run([OFF]).values["logit"], attributor.estimate([OFF]).changes["logit"]
    hook: Hooks = [("blocks.0.hook_mlp_out", lambda act, hook: act * 3)]  # noqa: ARG005
    with model.hooks(fwd_hooks=hook):
        within = runner.run([OFF]).values["logit"], attributor.estimate([OFF]).changes["logit"]
        fresh = sl.run_patches(model, TOKENS, [OFF], [LOGIT], runs=runs).values["logit"]
        new = estimate(model, TOKENS, [OFF], [LOGIT], runs=runs).changes["logit"]
    assert torch.allclose(within[0], fresh, atol=1e-5) and torch.allclose(within[1], new, atol=1e-5)
    assert not torch.allclose(within[0], before[0], atol=1e-3)
    after = runner.run([OFF]).values["logit"], attributor.estimate([OFF]).changes["logit"]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(before, after, strict=True))
    n_forwards = [sl.run_patches(model, TOKENS, [], [LOGIT], runs=r).stats.n_forwards for r in (runs, {"base": ()})]
    assert n_forwards == [2, 1]
