"""What is handed to the engine in another form: it works, or one sentence says what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens import edits, sites
from sinklens.attribution import estimate
from sinklens.errors import InputError
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.sweeps import run as swept
from tests.helpers.tiny import BACKENDS, D_MODEL, N_LAYERS, tiny_hf, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

TOKENS = tiny_tokens(3, 12)
LOGIT = Readout("logit", sites.LOGITS, (N_LAYERS,), lambda logits, _: logits[:, -1, 5].float(), lambda x: x[0])


def zero(edit: Any = None, **options: Any) -> Patch:
    return Patch(
        **{"site": sites.RESID_PRE, "layers": (1,), "positions": (3,), "edit": edit or edits.Constant(), **options}
    )


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model("llama", request.param)


def read(model: Any, tokens: Any = TOKENS, patches: Any = None, readouts: Any = None, **options: Any) -> torch.Tensor:
    patches = [zero()] if patches is None else patches
    return sl.run_patches(model, tokens, patches, readouts or [LOGIT], **options).values["logit"]


def attribute(model: Any) -> Any:
    return estimate(model, TOKENS, [zero()], [LOGIT])


@pytest.mark.slow
def test_other_forms_of_the_same(model: Any) -> None:
    expected = read(model)
    for patches in (zero(), (zero(),), (patch for patch in [zero()]), [zero(also=None)]):
        assert torch.equal(read(model, patches=patches), expected)
    assert torch.equal(read(model, readouts=LOGIT), expected)
    for dtype in (torch.uint8, torch.int16, torch.int32):  # uint8 would be taken for a mask
        assert torch.equal(read(model, TOKENS.to(dtype)), expected)
        estimates = [
            estimate(model, tokens, [zero()], [LOGIT]).changes["logit"] for tokens in (TOKENS, TOKENS.to(dtype))
        ]
        assert torch.equal(*estimates)


VALUES = torch.zeros(3, D_MODEL)
WRONG: dict[str, Callable[[Any], Any]] = {
    "patches must be a list .* not of type int": lambda model: read(model, patches=3),
    "patches must each be a Patch, but one is of type str": lambda model: read(model, patches=["zero"]),
    "readouts must each be a Readout, but one is of type str": lambda model: read(model, readouts=["loss"]),
    "give at least one readout": lambda model: sl.run_patches(model, TOKENS, [zero()], []),
    "runs must be a mapping .* not of type list": lambda model: read(model, runs=[]),
    "root patches of the run 'base' must be a list": lambda model: read(model, runs={"base": zero()}),
    "root patches of the run 'base' must each be a Patch": lambda model: read(model, runs={"base": ["x"]}),
    "the site of a patch must be .* not of type str": lambda _: zero(site="resid_pre"),
    "the edit of a patch must be .* not of type function": lambda _: zero(lambda x, source: x + source),
    "the source of a patch must be .* not of type str": lambda _: zero(source="base"),
    "what goes with a patch": lambda _: zero(also=("x",)),
    r"needs values \[d_model=32\], but got \(7,\)": lambda model: read(
        model, patches=[zero(edits.Constant("mine", {1: torch.zeros(7)}))]
    ),
    "has no values for block 1": lambda model: read(model, patches=[zero(edits.Constant("mine", {0: VALUES[0]}))]),
    "values that are tensors": lambda model: read(
        model,
        patches=[zero(edits.Constant("mine", {1: np.zeros(D_MODEL)}))],  # type: ignore[dict-item]
    ),
    "has values of 2 prompts": lambda model: read(model, patches=[zero(edits.PerPrompt("mine", {1: VALUES[:2]}))]),
    "has values of 4 prompts": lambda model: read(
        model, patches=[zero(edits.PerPrompt("mine", {1: torch.zeros(4, D_MODEL)}))]
    ),
    "'mine' has values of 6 prompts": lambda model: estimate(
        model, TOKENS, [zero(edits.PerPrompt("mine", {1: torch.zeros(6, D_MODEL)}))], [LOGIT]
    ),
    "'mine' has values of 5 prompts": lambda model: swept(
        model, stages="resid_pre", layers="1", units=None, edits=edits.PerPrompt("mine", {1: torch.zeros(5, D_MODEL)})
    ),
    r"needs values \[prompt=3 pos=12 d_model=32\], but got \(3, 32\)": lambda model: read(
        model, patches=[zero(edits.PerPosition("mine", {1: VALUES}))]
    ),
    r"needs values \[prompt=3 pos=12 d_model=32\], but got \(3, 11, 32\)": lambda model: read(
        model, patches=[zero(edits.PerPosition("mine", {1: torch.zeros(3, 11, D_MODEL)}))]
    ),
    r"needs values \[d_model=32\], but got \(8,\)": lambda model: read(  # at a place that was looked at before
        model, patches=[zero(), zero(edits.Constant("mine", {1: torch.zeros(8)}))]
    ),
    r"needs values \[d_model=32\], but got \(1,\)": lambda model: read(  # there is one value, and the third is chosen
        model, patches=[zero(edits.Constant("mine", {1: torch.zeros(1)}), units=(3,))]
    ),
    r"needs values \[prompt=3 d_model=32\], but got \(3, 9\)": lambda model: read(
        model, patches=[zero(edits.SameNormScaling("same", edits.PerPrompt("mine", {1: torch.zeros(3, 9)})))]
    ),
    r"needs values \[d_model=32\], but got \(10,\)": lambda model: read(
        model,
        patches=[zero(edits.OfSource("of", edits.Constant("mine", {1: torch.zeros(10)})), source=Source("base"))],
    ),
    r"needs values \[d_model=32\], but got \(6,\)": lambda model: read(
        model, patches=[zero(edits.Masked("mine", {1: torch.zeros(6)}), source=Source("base"))]
    ),
    r"needs values \[d_model=32\], but got \(4,\)": lambda model: read(
        model, runs={"base": [zero(also=(zero(edits.Constant("mine", {1: torch.zeros(4)}), positions=(5,)),))]}
    ),
    r"needs values \[prompt=3 query=12 key=12\], but got \(2, 12, 12\)": lambda model: read(
        model, patches=[zero(edits.MaskKeys(keep=torch.ones(2, 12, 12, dtype=torch.bool)), site=sites.PATTERN)]
    ),
    "has values of 4 prompts, and 3 are run": lambda model: read(
        model, patches=[zero(edits.AttendTo(weights=torch.ones(4, 12)), site=sites.PATTERN)]
    ),
    "unknown run 'another' in a root patch of the run 'other'": lambda model: read(
        model, runs={"base": (), "other": [zero(edits.Transplant(), source=Source("another"), run="other")]}
    ),
    r"needs values \[prompt=3 d_model=32\], but got \(2, 32\)": lambda model: read(
        model, patches=[zero(edits.Rescale("mine", {1: VALUES[:2]}, {1: torch.tensor(2.0)}))]
    ),
    "must be a loaded one .* not of type str": lambda _: read("smollm2"),
    "must be a HookedTransformer .* not a LlamaForCausalLM": lambda _: read(tiny_hf("llama")),
    "must be a HookedTransformer .* not a DataParallel": lambda model: read(torch.nn.DataParallel(model)),
    "must be a HookedTransformer .* not a OptimizedModule": lambda model: read(torch.compile(model)),
    "must be a HookedTransformer .* not a Linear": lambda _: attribute(torch.nn.Linear(2, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("told", WRONG)
def test_something_else_is_refused_in_a_sentence(told: str, model: Any) -> None:
    with pytest.raises(InputError, match=told):
        WRONG[told](model)


def test_values_that_fit_are_taken(model: Any) -> None:
    """One number for all, means of one or of each prompt, and edits that need a source."""
    expected = read(model)
    scalar, own = edits.Constant("mine", {1: torch.tensor(0.0)}), edits.PerPrompt("mine", {1: VALUES, 0: VALUES})
    for edit in (scalar, own, edits.Constant("mine", {1: VALUES[0]})):
        assert torch.allclose(read(model, patches=[zero(edit)]), expected, atol=1e-6)
    function = edits.Function("half", lambda x, source: 0 * x + 0 * source)
    assert torch.allclose(read(model, patches=[zero(function, source=Source("base"))]), expected, atol=1e-6)


def test_values_of_every_position_are_those_of_a_run(model: Any) -> None:
    """As a root and as a patch: another run's activations as values are what a transplant from it gives."""
    n_heads, where = model.cfg.n_heads, ((2,), (1, 5), (3,))
    written = cache_of(model, TOKENS, [], {sites.Z.at(1)})[sites.Z.at(1)]
    moved = written.roll(-1, dims=1)  # at every position what the next one has
    values = edits.PerPosition("moved", {1: moved})
    units = (n_heads - 1,)
    from_next = Source("base", tuple(tuple(p + 1 for p in row) for row in where))
    transplant = sl.Patch(sites.Z, (1,), where, edits.Transplant(), units=units, source=from_next)
    mine = sl.Patch(sites.Z, (1,), where, values, units=units)
    root = sl.Patch(sites.Z, (1,), where, values, units=units, run="moved")
    found = sl.run_patches(model, TOKENS, [transplant, mine], [LOGIT], runs={"base": (), "moved": (root,)})
    name = LOGIT.name
    assert torch.allclose(found.values[name][0], found.values[name][1], atol=1e-6)
    assert torch.allclose(found.values[name][0], found.runs["moved"][name], atol=1e-6)
    assert (found.runs["moved"][name] - found.runs["base"][name]).abs().min() > 1e-6
