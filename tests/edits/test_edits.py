"""Every edit as a pure function, on small tensors whose results are worked out by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from sinklens import edits
from sinklens.edits import Edit, EditSite
from sinklens.edits.base import WrappingEdit
from sinklens.sites import MLP_POST, RESID_PRE

POST, PRE, PRE_3 = MLP_POST.template, RESID_PRE.template, RESID_PRE.at(3)


def site(pairs: int = 2, **given: Any) -> EditSite:
    """Block 3; pair i is prompt i at position i + 1."""
    at = EditSite(3, torch.arange(pairs), torch.arange(pairs) + 1)
    return replace(at, **given)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(found: Tensor, expected: Tensor | list) -> None:
    expected = expected if isinstance(expected, Tensor) else tensor(expected)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-6, rtol=1e-6)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


X = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # two pairs of three units
Y = tensor([[-1.0, 0.0, 1.0], [7.0, 7.0, 7.0]])
HEADS = tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])  # three heads of two
FIRST_AND_LAST, LAST_AND_FIRST = tensor([[0, 2], [0, 2]]), tensor([[2, 0], [2, 0]])
EACH_ITS_OWN = tensor([[0, 2], [1, 0]])  # as when patches with different units are packed together


def test_transplant():
    equal(edits.Transplant()(X, Y, site()), Y)


def test_constant_is_zero_unless_told():
    equal(edits.Constant()(X, None, site()), [[0.0, 0, 0], [0, 0, 0]])
    equal(edits.Constant()(HEADS[:, :2], None, site(units=FIRST_AND_LAST)), torch.zeros(2, 2, 2))


def test_constant_with_values():
    edit = edits.Constant("mean", {2: tensor([0.0, 0, 0]), 3: tensor([10.0, 20, 30])})
    equal(edit(X, None, site()), [[10.0, 20, 30], [10, 20, 30]])
    equal(edit(X[:, :2], None, site(units=LAST_AND_FIRST)), [[30.0, 10], [30, 10]])
    equal(edit(X[:, :2], None, site(units=EACH_ITS_OWN)), [[10.0, 30], [20, 10]])
    equal(edit(X, None, site(layer=2)), torch.zeros(2, 3))


def test_constant_with_values_of_heads():
    edit = edits.Constant("mean", {3: tensor([[10.0, 11], [20, 21], [30, 31]])})
    equal(edit(HEADS, None, site())[1], [[10.0, 11], [20, 21], [30, 31]])
    equal(edit(HEADS[:, :2], None, site(units=EACH_ITS_OWN)), [[[10.0, 11], [30, 31]], [[20, 21], [10, 11]]])


def test_a_value_for_each_prompt():
    """Chosen by the prompt, not by the place in the batch."""
    edit = edits.PerPrompt("resample", {3: tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])})
    at = site(prompts=tensor([2, 0]))
    equal(edit(X, None, at), [[7.0, 8, 9], [1, 2, 3]])
    equal(edit(X[:, :2], None, replace(at, units=EACH_ITS_OWN)), [[7.0, 9], [2, 1]])


def test_a_value_for_each_prompt_and_head():
    values = torch.arange(18.0).view(3, 3, 2)
    edit = edits.PerPrompt("resample", {3: values})
    at = site(prompts=tensor([2, 0]))
    equal(edit(HEADS, None, at), values[[2, 0]])
    equal(edit(HEADS[:, :2], None, replace(at, units=EACH_ITS_OWN)), [[[12.0, 13], [16, 17]], [[2, 3], [0, 1]]])


def test_a_value_for_each_prompt_and_position():
    values = torch.arange(36.0).view(3, 4, 3)
    edit = edits.PerPosition("written", {3: values})
    at = site(prompts=tensor([2, 0]), positions=tensor([1, 3]))
    equal(edit(X, None, at), values[[2, 0], [1, 3]])
    equal(edit(X[:, :2], None, replace(at, units=EACH_ITS_OWN)), [[27.0, 29], [10, 9]])


def test_rescale_by_a_scalar():
    edit = edits.Rescale("amplify", {3: tensor([1.0, 1, 1])}, {3: tensor(2.0)})
    equal(edit(X, None, site()), [[1.0, 3, 5], [7, 9, 11]])
    equal(edits.Rescale("amplify", {3: tensor([5.0, -3, 1])}, {3: tensor(1.0)})(X, None, site()), X)


def test_rescale_by_a_factor_per_dimension():
    edit = edits.Rescale("match", {3: tensor([1.0, 0, -1])}, {3: tensor([0.0, 2, 0.5])})
    equal(edit(X, None, site()), [[1.0, 4, 1], [1, 10, 2.5]])
    equal(edit(X[:, :2], None, site(units=LAST_AND_FIRST)), [[0.0, 1], [1.5, 1]])


def test_rescale_of_heads():
    """A factor per head and dimension, and one per head that broadcasts over its dimensions."""
    mean = {3: tensor([[1.0, 0], [0, 0], [0, 2]])}
    edit = edits.Rescale("match", mean, {3: tensor([[2.0, 3], [1, 1], [-1, 0]])})
    equal(edit(HEADS, None, site())[0], [[1.0, 6], [3, 4], [-5, 2]])
    equal(edit(HEADS[:, :1], None, site(units=tensor([[2], [0]]))), [[[-1.0, 2]], [[13, 24]]])
    edit = edits.Rescale("match", mean, {3: tensor([[2.0], [1], [0]])})
    equal(edit(HEADS, None, site())[0], [[1.0, 4], [3, 4], [0, 2]])


def test_rescale_around_a_mean_of_each_prompt():
    """Chosen by the prompt, not by the place in the batch."""
    edit = edits.Rescale("amplify", {3: tensor([[0.0, 0, 0], [9, 9, 9], [1, 2, 3]])}, {3: tensor(2.0)})
    at = site(prompts=tensor([2, 0]))
    equal(edit(X, None, at), [[1.0, 2, 3], [8, 10, 12]])
    equal(edit(X[:, :2], None, replace(at, units=EACH_ITS_OWN)), [[1.0, 1], [8, 10]])
    heads = {3: torch.arange(18.0).view(3, 3, 2)}
    found = edits.Rescale("amplify", heads, {3: tensor([[2.0, 3], [1, 1], [-1, 0]])})(HEADS, None, at)
    equal(found[0], [[-10.0, -20], [3, 4], [27, 17]])  # about [[12, 13], [14, 15], [16, 17]]


@pytest.mark.parametrize("axis", ["prompts", "positions", "global"])
def test_amplification_is_about_the_mean_it_names(axis):
    """Two prompts of two positions, one head of one dimension: 1, 5 and 3, 15; the second position times 3."""
    z = tensor([[1.0, 5], [3, 15]])[..., None, None]
    mean = {"prompts": [10, 10], "positions": [3, 9], "global": [6, 6]}[axis]
    edit = edits.amplification({3: z}, 1, 3.0, axis)
    found = edit(z[:, 1], None, site())
    equal(found.flatten(), [m + 3 * (x - m) for m, x in zip(mean, [5.0, 15], strict=True)])
    assert edit.mean[3].ndim == (3 if axis == "positions" else 2)


def test_matching_moments_gives_the_moments():
    """With scale sigma' / sigma the mean over prompts stays and the standard deviation becomes sigma'."""
    x, goal = drawn(50, 4, 3), drawn(4, 3, seed=1).abs() + 0.1
    edit = edits.Rescale("match", {3: x.mean(0)}, {3: goal / x.std(0)})
    found = edit(x, None, site(50))
    close(found.mean(0), x.mean(0))
    close(found.std(0), goal)


def test_same_norm_scaling():
    """3-4-5 and 5-12-13: to norm 10, and to norm 26, along the old direction."""
    x, source = tensor([[3.0, 4], [5, 12]]), tensor([[10.0, 0], [0, -26]])
    edit = edits.SameNormScaling(of=edits.Transplant())
    assert edit.uses_source
    equal(edit(x, source, site()), [[6.0, 8], [10, 24]])


def test_same_norm_scaling_takes_the_norm_over_all_units():
    amplify = edits.Rescale("amplify", {3: torch.ones(3, 2)}, {3: tensor(4.0)})
    edit = edits.SameNormScaling(of=amplify)
    assert not edit.uses_source
    found, goal = edit(HEADS, None, site()), amplify(HEADS, None, site())
    close(found.flatten(1).norm(dim=-1), goal.flatten(1).norm(dim=-1))
    factor = found / HEADS
    close(factor, factor[:, :1, :1].expand_as(factor))
    assert (factor > 1).all()


@pytest.mark.parametrize("goal", [0.5, 100.0])
def test_same_norm_scaling_leaves_zero_alone(goal):
    """A zero vector has no direction to be scaled along: it stays zero, and is not NaN."""
    edit = edits.SameNormScaling(of=edits.Constant("c", {3: torch.full((3,), goal)}))
    equal(edit(torch.zeros(2, 3), None, site()), torch.zeros(2, 3))


def test_same_norm_scaling_reads_what_its_edit_reads():
    edit = edits.SameNormScaling(of=edits.DropDimsBeforeNorm(dims=(0,)))
    assert edit.reads == (RESID_PRE,)


def test_subspace():
    """Only the second and third dimension come from the source; then only the diagonal of the first two."""
    axes = torch.eye(3)[:, 1:]
    equal(edits.Subspace(basis=axes)(X, Y, site()), [[1.0, 0, 1], [4, 7, 7]])
    diagonal = tensor([[1.0], [1], [0]]) / 2**0.5
    # source - x = (-2, -2, -2) and (3, 2, 1): components (-2, -2, 0) and (2.5, 2.5, 0).
    equal(edits.Subspace(basis=diagonal)(X, Y, site()), [[-1.0, 0, 3], [6.5, 7.5, 6]])


def test_subspace_is_idempotent_and_all_of_it_is_a_transplant():
    x, source = drawn(5, 8), drawn(5, 8, seed=1)
    some = edits.Subspace(basis=edits.random_orthonormal(8, 3, torch.Generator().manual_seed(2)))
    once = some(x, source, site(5))
    assert (once - x).abs().max() > 0.1
    close(some(once, source, site(5)), once)
    everything = edits.Subspace(basis=edits.random_orthonormal(8, 8, torch.Generator().manual_seed(2)))
    close(everything(x, source, site(5)), source)
    equal(some(x, x, site(5)), x)
    nothing = edits.Subspace(basis=torch.zeros(8, 0))
    equal(nothing(x, source, site(5)), x)


def test_permute_within():
    """Entry i of the result is entry order[i]."""
    edit = edits.PermuteWithin(permutation=tensor([[1, 2, 0], [0, 1, 2]]))
    x = tensor([[[1.0, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]])
    equal(edit(x, None, site()), [[[2.0, 3, 1], [4, 5, 6]], [[8, 9, 7], [10, 11, 12]]])
    equal(edit(x[:, :1], None, site(units=tensor([[1], [0]]))), [[[1.0, 2, 3]], [[8, 9, 7]]])


def test_permute_within_keeps_variance_and_norm_of_every_head():
    x = drawn(5, 4, 16)
    order = edits.random_permutations(4, 16, torch.Generator().manual_seed(0))
    found = edits.PermuteWithin(permutation=order)(x, None, site(5))
    close(found.var(-1), x.var(-1))
    close(found.norm(dim=-1), x.norm(dim=-1))
    assert (found - x).abs().max() > 0.1


def test_permuting_the_vector_is_permuting_the_rows_of_what_reads_it():
    x, matrix = drawn(5, 4, 16), drawn(4, 16, 7, seed=1)
    order = edits.random_permutations(4, 16, torch.Generator().manual_seed(0))
    permuted = torch.empty_like(matrix)
    for head in range(4):
        permuted[head, order[head]] = matrix[head]
    found = edits.PermuteWithin(permutation=order)(x, None, site(5))
    close(torch.einsum("phd,hdm->pm", found, matrix), torch.einsum("phd,hdm->pm", x, permuted))


def test_remove_direction():
    """Per head: along (0.6, 0.8), and along the second axis."""
    edit = edits.RemoveDirection(directions={3: tensor([[0.6, 0.8], [0, 1]])})
    x = tensor([[[3.0, 4], [5, 6]], [[1, 0], [0, 2]]])
    # (3, 4) . u = 5 and all of it goes; (1, 0) . u = 0.6, which leaves (1 - 0.36, -0.48).
    equal(edit(x, None, site()), [[[0.0, 0], [5, 0]], [[0.64, -0.48], [0, 0]]])
    equal(edit(x[:, :1], None, site(units=tensor([[1], [0]]))), [[[3.0, 0]], [[0.64, -0.48]]])


def test_remove_direction_leaves_no_component():
    directions = torch.nn.functional.normalize(drawn(4, 16), dim=-1)
    x = drawn(6, 4, 16, seed=1)
    found = edits.RemoveDirection(directions={3: directions})(x, None, site(6))
    equal((found * directions).sum(-1), torch.zeros(6, 4))
    # What is left is what was there: the removed part is parallel to the direction.
    close(found + (x * directions).sum(-1, keepdim=True) * directions, x)


def test_attend_self():
    """One-hot at the query's own position, in every head, in the pattern's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        found = edits.AttendSelf()(torch.full((2, 3, 4), 0.25, dtype=dtype), None, site(positions=tensor([2, 0])))
        assert found.dtype == dtype
        equal(found, [[[0.0, 0, 1, 0]] * 3, [[1, 0, 0, 0]] * 3])


ROWS = tensor([[1.0, 10, 100], [2, 20, 200]])  # what neurons 3 and 1 write into three dimensions
ACTS = tensor([[0.0, 2, 9, 1], [9, 0, 9, 0.5]])
SOURCE_ACTS = tensor([[9.0, 2, 9, 3], [0, 1, 0, 0.5]])


def test_neuron_contribution():
    """Changes of (neuron 3, neuron 1): (2, 0) and (0, 1); so (2, 20, 200) and (2, 20, 200), in two dimensions."""
    edit = edits.NeuronContribution(neurons=(3, 1), rows=ROWS, dims=(0, 2))
    assert edit.reads == (MLP_POST,) and edit.uses_source
    at = site(live={POST: ACTS}, source_live={POST: SOURCE_ACTS})
    equal(edit(X, Y, at), [[3.0, 2, 203], [6, 5, 206]])
    # Activations that do not differ carry nothing over, whatever else does.
    equal(edit(X, Y, site(live={POST: ACTS}, source_live={POST: ACTS})), X)


def test_densify_rows():
    """x + a (rotated - rows), with a = (1, 2) and (0.5, 0) for neurons 3 and 1."""
    rotated = tensor([[10.0, 1, 100], [2, 20, 200]])
    edit = edits.DensifyRows(neurons=(3, 1), rows=ROWS, rotated=rotated)
    assert edit.reads == (MLP_POST,) and not edit.uses_source
    equal(edit(X, None, site(live={POST: ACTS})), [[10.0, -7, 3], [8.5, 0.5, 6]])


RESID = tensor([[3.0, 100, -1, 0], [1, 2, 3, 4]])


def test_dims_dropped_before_rms_norm():
    """What torch's RMSNorm makes of the zeroed input."""
    norm = torch.nn.RMSNorm(4, eps=1e-5)
    edit = edits.DropDimsBeforeNorm(dims=(1,), eps=1e-5)
    assert edit.reads == (RESID_PRE,) and not edit.uses_source
    zeroed = tensor([[3.0, 0, -1, 0], [1, 0, 3, 4]])
    close(edit(norm(RESID), None, site(live={PRE: RESID})), norm(zeroed))


def test_dims_dropped_before_layer_norm():
    norm = torch.nn.LayerNorm(4, eps=1e-3, elementwise_affine=False)
    edit = edits.DropDimsBeforeNorm(dims=(1, 2), eps=1e-3, centred=True)
    zeroed = tensor([[3.0, 0, 0, 0], [1, 0, 0, 4]])
    close(edit(norm(RESID), None, site(live={PRE: RESID})), norm(zeroed))


def test_no_dims_dropped_is_the_norm_itself():
    for norm, centred in ((torch.nn.RMSNorm(4, eps=0.1), False), (torch.nn.LayerNorm(4, eps=0.1), True)):
        for only in (False, True):
            edit = edits.DropDimsBeforeNorm(dims=(), eps=0.1, centred=centred, denominator_only=only)
            close(edit(RESID, None, site(live={PRE: RESID})), norm(RESID).detach())


def test_dims_dropped_from_the_denominator_only():
    """RMS of (3, 0, -1, 0) is sqrt(10 / 4); the outlier stays in the numerator."""
    edit = edits.DropDimsBeforeNorm(dims=(1,), eps=0.0, denominator_only=True)
    found = edit(torch.zeros(2, 4), None, site(live={PRE: RESID}))
    close(found, torch.stack([RESID[0] / 2.5**0.5, RESID[1] / 6.5**0.5]))


def test_dims_dropped_from_the_denominator_of_layer_norm():
    """The whole vector is centred by its own mean, and divided by the zeroed one's standard deviation."""
    edit = edits.DropDimsBeforeNorm(dims=(1,), eps=0.0, centred=True, denominator_only=True)
    found = edit(torch.zeros(2, 4), None, site(live={PRE: RESID}))
    zeroed = tensor([[3.0, 0, -1, 0], [1, 0, 3, 4]])
    close(found, (RESID - RESID.mean(-1, keepdim=True)) / zeroed.std(-1, unbiased=False, keepdim=True))


def test_of_source_edits_the_source():
    """Twice the source's deviation from 1, whatever x is."""
    inner = edits.Rescale("amplify", {3: torch.ones(3)}, {3: tensor(2.0)})
    edit = edits.OfSource("amplified", inner)
    assert edit.uses_source
    equal(edit(X, Y, site()), [[-3.0, -1, 1], [13, 13, 13]])


def test_of_source_can_edit_some_units_and_transplant_the_rest():
    edit = edits.OfSource("ablated", edits.Constant(), background=(2, 0))
    equal(edit(X, Y, site()), [[0.0, 0, 0], [0, 7, 0]])
    mean = edits.Constant("mean", {3: tensor([10.0, 20, 30])})
    equal(edits.OfSource("mean", mean, background=(2,))(X, Y, site()), [[-1.0, 0, 30], [7, 7, 30]])
    equal(edits.OfSource("mean", mean, background=(2, 0))(X, Y, site()), [[10.0, 0, 30], [10, 7, 30]])


def test_of_source_with_background_and_a_value_for_each_prompt():
    inner = edits.PerPrompt("resample", {3: torch.arange(9.0).view(3, 3)})
    edit = edits.OfSource("resample", inner, background=(1, 2))
    equal(edit(X, Y, site(prompts=tensor([2, 1]))), [[-1.0, 7, 8], [7, 4, 5]])


def test_of_source_reads_the_source_s_other_sites():
    """The inner edit's live activations are those of the source run."""
    inner = edits.DensifyRows(neurons=(3, 1), rows=ROWS, rotated=torch.zeros(2, 3))
    edit = edits.OfSource("densified", inner)
    assert edit.reads == (MLP_POST,)
    # Source activations (3, 2) and (0.5, 1) of neurons 3 and 1 no longer write.
    found = edit(X, Y, site(live={POST: ACTS}, source_live={POST: SOURCE_ACTS}))
    equal(found, [[-1.0 - 7, -70, 1 - 700], [7 - 2.5, 7 - 25, 7 - 250]])


def test_of_source_drops_dims_of_the_source_s_residual():
    inner = edits.DropDimsBeforeNorm(dims=(0,), eps=0.0)
    found = edits.OfSource("dropped", inner)(
        torch.zeros(1, 2),
        torch.ones(1, 2),
        site(1, live={PRE: tensor([[5.0, 6]])}, source_live={PRE: tensor([[7.0, -8]])}),
    )
    equal(found, [[0.0, -(2**0.5)]])


def test_attenuate():
    """Half of the first dimension goes; then half of each vector's own largest, with and without weights."""
    x = tensor([[4.0, -8, 2], [1, 0, -2]])
    equal(edits.Attenuate(amount=0.5, dims=(0,))(x, None, site()), [[2.0, -8, 2], [0.5, 0, -2]])
    equal(edits.Attenuate(amount=0.5, k=1)(x, None, site()), [[4.0, -4, 2], [1, 0, -1]])
    weighted = edits.Attenuate(k=1, weights={3: tensor([1.0, 0.25, 10])})
    equal(weighted(x, None, site()), [[4.0, -8, 0], [1, 0, 0]])


def test_remove_subspace():
    edit = edits.RemoveSubspace(basis=tensor([[1.0], [1], [0]]) / 2**0.5)
    equal(edit(tensor([[3.0, 1, 5]]), None, site()), [[1.0, -1, 5]])


def scaled_by(factor: float | Tensor) -> edits.Function:
    return edits.Function("mixed", lambda x, source: x + factor * (source - x))


def test_function():
    """A quarter of the way to the source."""
    edit = scaled_by(0.25)
    assert edit.uses_source and edit.reads == ()
    equal(edit(X, Y, site()), [[0.5, 1.5, 2.5], [4.75, 5.5, 6.25]])


def test_the_direction_or_the_norm_alone():
    """By head: lengths 5 and 0 of the activation, 10 and 2 of the source."""
    x, source = tensor([[[3.0, 4.0], [0.0, 0.0]]]), tensor([[[0.0, 10.0], [2.0, 0.0]]])
    equal(edits.DIRECTION_ONLY(x, source, site()), [[[0.0, 5.0], [0.0, 0.0]]])
    equal(edits.NORM_ONLY(x, source, site()), [[[6.0, 8.0], [0.0, 0.0]]])


def test_functions_are_told_apart_by_what_they_do():
    """Equal code is equal wherever it was made; another constant, closed-over value or default is not."""
    found = scaled_by(0.25).fingerprint()
    assert found == scaled_by(0.25).fingerprint() != scaled_by(0.5).fingerprint()
    assert scaled_by(tensor([0.25])).fingerprint() != scaled_by(tensor([0.5])).fingerprint()
    others: list[Any] = [
        lambda x, _source: x * 2,
        lambda x, _source: x * 3,
        lambda x, _source: x / 3,
        lambda _x, source: source * 3,
        lambda x, _source, by=2: x * by,
        lambda x, _source, by=3: x * by,
        lambda x, _source, *, by=2: x * by,
        lambda x, _source, *, by=3: x * by,
        lambda x, _source: (lambda y: y * 2)(x),
        lambda x, _source: (lambda y: y * 3)(x),
        lambda x, _source: x.sin(),
        lambda x, _source: x.cos(),
    ]
    prints = [edits.Function("f", function).fingerprint() for function in others]
    assert [prints.index(item) for item in prints] == list(range(len(prints)))


HALF = {3: torch.full((3,), 0.5)}
EVERY_EDIT: dict[str, Edit] = {
    "transplant": edits.Transplant(),
    "function": edits.Function("function", lambda x, source: (x + source) / 2),
    "zero": edits.Constant(),
    "mean": edits.Constant("mean", HALF),
    "resample": edits.PerPrompt("resample", {3: torch.full((2, 3), 0.5)}),
    "per_position": edits.PerPosition("per_position", {3: torch.full((2, 8, 3), 0.5)}),
    "rescale": edits.Rescale("rescale", HALF, {3: tensor(2.0)}),
    "same_norm": edits.SameNormScaling(of=edits.Constant("mean", HALF)),
    "subspace": edits.Subspace("subspace", torch.eye(3)[:, :1]),
    "permuted": edits.PermuteWithin("permuted", tensor([[1, 0], [1, 0], [1, 0]])),
    "direction": edits.RemoveDirection("direction", {3: tensor([[1.0, 0], [1, 0], [1, 0]])}),
    "of_source": edits.OfSource("of_source", edits.Constant()),
    "of_source_units": edits.OfSource("of_source", edits.Constant(), (1,)),
    "attend_self": edits.AttendSelf(),
    "contribution": edits.NeuronContribution("contribution", (3, 1), ROWS, (0,)),
    "densify": edits.DensifyRows("densify", (3, 1), ROWS, ROWS.flip(0)),
    "interpolate": edits.Interpolate(amount=0.25),
    "outside": edits.OutsideSubspace("outside", torch.eye(3)[:, :1]),
    "masked": edits.Masked("masked", {3: tensor([0.0, 1, 0])}),
    "written_by": edits.WrittenBy("written_by", torch.eye(3)[:, :1], ((RESID_PRE, 3),)),
    "attend_to": edits.AttendTo("attend_to", torch.full((2, 2), 0.5)),
    "mask_keys": edits.MaskKeys(keep=torch.tensor([[[True, False], [True, True], [False, True]]])),
    "drop_dims": edits.DropDimsBeforeNorm("drop_dims", (1,)),
    "evicted": edits.KeepKeys(window=0),
    "attenuated": edits.Attenuate(dims=(0,), weights={3: torch.ones(3)}),
    "subspace_removed": edits.RemoveSubspace("subspace_removed", torch.eye(3)[:, :1]),
    "massive": edits.ReplaceMassive(dims=(0, 2), limit=2.0),
}


WIDE = ("permuted", "direction", "attend_self", "attend_to", "evicted", "mask_keys")
"""Edits of an activation with several units."""


def test_every_edit_is_listed_here():
    listed = {type(edit) for edit in EVERY_EDIT.values()}
    public = {getattr(edits, name) for name in edits.__all__}
    classes = {item for item in public if isinstance(item, type)} - {Edit, EditSite, edits.SourceEdit}
    assert listed == classes


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_edits_are_pure(name):
    """The inputs stay as they are, and the result has the input's shape and dtype; twice gives the same."""
    edit = EVERY_EDIT[name]
    wide = name in WIDE
    x, source = (HEADS.clone(), HEADS.flip(0).clone()) if wide else (X.clone(), Y.clone())
    live = {POST: ACTS.clone(), PRE: X.clone(), PRE_3: X.clone()}
    source_live = {POST: SOURCE_ACTS.clone(), PRE: Y.clone(), PRE_3: Y.clone()}
    at = site(live=live, source_live=source_live, positions=tensor([0, 1]))
    found = edit(x, source, at)
    again = edit(x, source, at)
    equal(x, HEADS if wide else X)
    equal(source, HEADS.flip(0) if wide else Y)
    equal(live[POST], ACTS)
    equal(live[PRE], X)
    equal(source_live[POST], SOURCE_ACTS)
    equal(source_live[PRE], Y)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert torch.equal(found, again)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("name", [name for name, edit in EVERY_EDIT.items() if edit.uses_source])
def test_edits_that_use_a_source_say_so_without_one(name):
    with pytest.raises(ValueError, match=f"'{EVERY_EDIT[name].name}' needs a source"):
        EVERY_EDIT[name](X, None, site(live={POST: ACTS}))


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_edits_run_in_bfloat16(name):
    """Parameters are float32, activations need not be."""
    edit = EVERY_EDIT[name]
    wide = name in WIDE
    x = (HEADS if wide else X).bfloat16()
    live = {POST: ACTS.bfloat16(), PRE: X.bfloat16(), PRE_3: X.bfloat16()}
    source_live = {POST: SOURCE_ACTS.bfloat16(), PRE: Y.bfloat16(), PRE_3: Y.bfloat16()}
    at = site(live=live, source_live=source_live, positions=tensor([0, 1]))
    source = HEADS.flip(0) if wide else Y
    found = edit(x, source.bfloat16(), at)
    assert found.dtype == torch.bfloat16
    expected = edit(
        x.float(),
        source,
        replace(
            at,
            **{
                "live": {key: act.float() for key, act in live.items()},
                "source_live": {key: act.float() for key, act in source_live.items()},
            },
        ),
    )
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)


def rebuilt(value: Any) -> Any:
    """An equal value that shares no memory."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: rebuilt(item) for key, item in value.items()}
    if isinstance(value, Edit):
        return copied(value)
    return value


def copied(edit: Edit) -> Edit:
    return type(edit)(**{name: rebuilt(value) for name, value in vars(edit).items()})


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_equal_edits_have_equal_fingerprints(name):
    edit = EVERY_EDIT[name]
    assert copied(edit) is not edit
    assert copied(edit).fingerprint() == edit.fingerprint()


def test_different_edits_have_different_fingerprints():
    found = [edit.fingerprint() for edit in EVERY_EDIT.values()]
    assert len(set(found)) == len(found)


def another(value: Any) -> list[Any]:
    """Values that differ from ``value`` in one respect each."""
    if isinstance(value, Tensor) and value.is_floating_point():
        first = value.clone()
        first.view(-1)[0] += 0.25
        return [first, value.bfloat16(), value.double(), value[None]]
    if isinstance(value, Tensor):
        return [value.flip(-1), value.int()]
    if isinstance(value, dict):
        changed = [{**value, key: item} for key in value for item in another(value[key])]
        moved = {key + 1: item for key, item in value.items()}
        return [*changed, moved, {**value, 9: next(iter(value.values()))}]
    if isinstance(value, Edit):
        return variants(value)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [value + "_"]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 2]
    if isinstance(value, tuple):
        return [value[::-1] if len(value) > 1 else (*value, 0), value[:1], (7,)]
    if value is None:
        return [(0,)]
    if callable(value):
        return [lambda x, source: (x + source) / 3]
    return [replace(value, template="elsewhere")]  # a site


def variants(edit: Edit) -> list[Edit]:
    """The edit with one parameter changed, in every way for every parameter."""
    found = []
    for name, value in vars(edit).items():
        if isinstance(edit, edits.Constant) and value is None:
            found += [replace(edit, values={3: torch.zeros(3)})]  # type: ignore[call-arg]
            continue
        found += [replace(edit, **{name: item}) for item in another(value) if not _same(item, value)]
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, (Tensor, dict, Edit)) and a == b


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_any_other_parameter_gives_another_fingerprint(name):
    edit = EVERY_EDIT[name]
    others = variants(edit)
    assert len(others) >= len(vars(edit))
    for other in others:
        assert other.fingerprint() != edit.fingerprint(), other


def test_fingerprints_of_bfloat16_tensors():
    """NumPy has no such type; values one rounding step apart count as different."""
    one, next_one = tensor([1.0, 2.0]).bfloat16(), tensor([1.0078125, 2.0]).bfloat16()
    found = [edits.Constant("mean", {0: values}).fingerprint() for values in (one, next_one, one.clone())]
    assert found[0] == found[2] != found[1]


def test_fingerprints_tell_dtypes_apart_that_have_the_same_bytes():
    zeros = [torch.zeros(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int16)]
    assert len({edits.Constant("mean", {0: values}).fingerprint() for values in zeros}) == 3


def test_fingerprints_do_not_depend_on_layout_or_the_order_of_blocks():
    values = drawn(4, 3)
    strided = values.T.contiguous().T
    assert not strided.is_contiguous()
    assert edits.Subspace(basis=values).fingerprint() == edits.Subspace(basis=strided).fingerprint()
    a, b = {0: values, 1: strided + 1}, {1: strided + 1, 0: values}
    assert edits.Constant("mean", a).fingerprint() == edits.Constant("mean", b).fingerprint()


def test_fingerprints_tell_the_parameters_apart():
    """The same tensors, shared out between two parameters in another way."""
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    one, two = edits.Rescale("r", {0: a, 1: b}, {2: c}), edits.Rescale("r", {0: a}, {1: b, 2: c})
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_random_orthonormal(rank):
    basis = edits.random_orthonormal(12, rank, torch.Generator().manual_seed(3))
    assert basis.shape == (12, rank)
    close(basis.T @ basis, torch.eye(rank))
    assert torch.equal(basis, edits.random_orthonormal(12, rank, torch.Generator().manual_seed(3)))
    assert not torch.equal(basis, edits.random_orthonormal(12, rank, torch.Generator().manual_seed(4)))


def test_random_draws_leave_torch_s_own_state_alone():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    edits.random_orthonormal(4, 2, generator)
    edits.rotate_rows(torch.eye(4), generator)
    edits.random_permutations(2, 4, generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_rotated_rows_keep_norms_and_inner_products_and_lose_sparsity():
    rows = torch.zeros(3, 64)
    rows[0, 5], rows[1, 5], rows[1, 9], rows[2, 63] = 10.0, 3.0, -4.0, 1.0
    found = edits.rotate_rows(rows, torch.Generator().manual_seed(0))
    close(found @ found.T, rows @ rows.T)
    close(found.norm(dim=-1), tensor([10.0, 5.0, 1.0]))
    # A vector in one of 64 dimensions has max / mean = 64; after a rotation, that of a Gaussian one, about 3.5.
    assert (found.abs().amax(-1) / found.abs().mean(-1)).max() < 6
    assert torch.equal(found, edits.rotate_rows(rows, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, edits.rotate_rows(rows, torch.Generator().manual_seed(1)))
    assert edits.rotate_rows(rows.bfloat16(), torch.Generator().manual_seed(0)).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [1, 3, 16, 20])
def test_few_rows_are_rotated_by_few_draws(n):
    """Numbers for as many vectors as there are rows, whatever their width; rows that are no basis included."""
    rows = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    rows[n // 2] = 2 * rows[0]
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    found = edits.rotate_rows(rows, generator)
    close(found @ found.T, rows @ rows.T)
    torch.randn(16, min(n, 16), generator=same)
    assert torch.equal(generator.get_state(), same.get_state())
    close(edits.rotate_rows(torch.zeros(n, 16), generator), torch.zeros(n, 16))


@pytest.mark.slow
def test_random_rotations_lean_to_no_side():
    """Means over draws of the entries and of their products are those of a uniform rotation: 0, and 1 / d."""
    generator = torch.Generator().manual_seed(5)
    bases = torch.stack([edits.random_orthonormal(4, 3, generator) for _ in range(2000)])
    assert bases.mean(0).abs().max() < 0.06  # 5 standard errors
    assert (bases.square().mean(0) - 0.25).abs().max() < 0.03
    rows = tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    turned = torch.stack([edits.rotate_rows(rows, generator) for _ in range(2000)])
    assert turned.mean(0).abs().max() < 0.09
    assert (turned.square().mean(0) - tensor([[0.25] * 4, [0.5] * 4])).abs().max() < 0.06
    close(torch.einsum("nij,nkj->nik", turned, turned), tensor([[1.0, 1], [1, 2]]).expand(2000, 2, 2))


def test_random_permutations():
    found = edits.random_permutations(5, 16, torch.Generator().manual_seed(0))
    assert torch.equal(found.sort(-1).values, torch.arange(16).expand(5, 16))
    assert len({tuple(row) for row in found.tolist()}) == 5  # one for each, not one for all
    assert torch.equal(found, edits.random_permutations(5, 16, torch.Generator().manual_seed(0)))


def test_interpolation_ends_at_the_source_exactly():
    for amount, expected in ((0.0, X), (1.0, Y), (0.5, (X + Y) / 2), (1.25, X + 1.25 * (Y - X))):
        edit = edits.Interpolate(amount=amount)
        equal(edit(X, Y, site()), expected)
        assert edit.strength == amount
    assert torch.equal(edits.Interpolate(amount=1.0)(X, 3e8 * Y, site()), 3e8 * Y)  # also where x + (y - x) is not y


def test_a_subspace_and_the_rest_of_it_make_the_whole():
    basis = edits.random_orthonormal(3, 1, torch.Generator().manual_seed(0))
    inside, outside = edits.Subspace("in", basis), edits.OutsideSubspace("out", basis)
    close(outside(inside(X, Y, site()), Y, site()), Y)
    close((outside(X, Y, site()) - X) @ basis, torch.zeros(2, 1))


def test_masks_are_of_the_block_and_follow_the_units():
    edit = edits.Masked("masked", {2: tensor([1.0, 1, 1]), 3: tensor([0.0, 1, 0])})
    equal(edit(X, Y, site()), [[1.0, 0, 3], [4, 7, 6]])
    equal(edit(X, Y, site(layer=2)), Y)
    equal(edit(X[:, :2], Y[:, :2], site(units=EACH_ITS_OWN)), [[1.0, 2], [7, 5]])
    equal(edit(HEADS, -HEADS, site())[0], [[1.0, 2], [-3, -4], [5, 6]])


def test_what_writers_wrote_differently_is_carried_over():
    """Two writers; of the sum of their differences only what lies in the basis, here dimension 1."""
    first, second = (MLP_POST, 1), (RESID_PRE, 2)
    live = {MLP_POST.at(1): X, RESID_PRE.at(2): Y}
    source = {MLP_POST.at(1): X + 1, RESID_PRE.at(2): Y + tensor([[0.0, 2, 5], [0, 4, 5]])}
    basis = tensor([[0.0], [1], [0]])
    edit = edits.WrittenBy("written", basis, (first, second))
    assert [place.layer for place in edit.reads_in(3)] == [1, 2]
    equal(edit(X, Y, site(live=live, source_live=source)), X + tensor([[0.0, 3, 0], [0, 5, 0]]))


def test_attention_as_it_is_told_in_every_head():
    weights = tensor([[0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]])
    pattern = torch.rand(2, 4, 3)
    found = edits.AttendTo(weights=weights)(pattern, None, site(prompts=tensor([2, 0])))
    equal(found, weights[[2, 0]][:, None].expand(2, 4, 3))


def test_a_query_does_without_keys():
    """By hand, and as scores of minus infinity would have it; each prompt has keys of its own, or all share them."""
    keep = torch.ones(3, 2, 3, dtype=torch.bool)
    keep[2, 1, 0] = False
    pattern = tensor([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]).expand(2, 2, 3)
    at = site(prompts=tensor([2, 0]), positions=tensor([1, 1]))
    found = edits.MaskKeys(keep=keep)(pattern, None, at)
    assert torch.allclose(found[0], tensor([[0, 0.5, 0.5], [0, 0.75, 0.25]]))
    assert torch.allclose(found[1], pattern[1])
    assert torch.allclose(edits.MaskKeys(keep=keep[2:])(pattern, None, at)[1], found[0])
    scores = torch.randn(2, 2, 3)
    masked = scores.masked_fill(~keep[[2, 0]][:, None, 1], -torch.inf).softmax(-1)
    assert torch.allclose(edits.MaskKeys(keep=keep)(scores.softmax(-1), None, at), masked, atol=1e-6)


def test_strengths():
    rescale = edits.Rescale("r", {3: torch.zeros(3)}, {3: tensor([1.0, 2, 6])})
    assert rescale.strength == edits.SameNormScaling(of=rescale).strength == edits.OfSource("o", rescale).strength == 3
    assert torch.isnan(tensor(edits.Transplant().strength))


def every_class(of: type) -> set[type]:
    """A class and all that are made of it, of the package's own."""
    own = {of} if of.__module__.startswith("sinklens.") else set()
    return own.union(*(every_class(made) for made in of.__subclasses__()))


def test_an_edit_that_applies_another_is_asked_for_what_that_one_has() -> None:
    """Also one that is yet to be written: an edit in an edit that is none of these has values that nobody looks at."""
    import sinklens.engine.residual  # noqa: F401
    import sinklens.engine.sources  # noqa: F401
    import sinklens.pairs.subset  # noqa: F401

    hints = {edit: {item.name: item.type for item in fields(edit)} for edit in every_class(Edit)}
    with_one = {edit for edit, types in hints.items() if "Edit" in types.values()}
    assert with_one == {edit for edit in every_class(WrappingEdit) if edit is not WrappingEdit} and len(with_one) == 5
    inner = edits.NeuronContribution("contribution", (3, 1), ROWS, (0,))
    mask = edits.MaskKeys(keep=torch.ones(2, 3, 3, dtype=torch.bool))
    for edit in with_one:
        name = next(name for name, hint in hints[edit].items() if hint == "Edit")
        options = {"values": {}, "places": torch.zeros(0, 0), "site": RESID_PRE}
        others = {field: value for field, value in options.items() if field in hints[edit]}
        around = edit(**{"name": "around", **others, name: inner})
        assert {place.key for place in inner.reads_in(3)} <= {place.key for place in around.reads_in(3)}
        assert around.uses_source is (edit.__name__ != "OfRun")  # which brings along what it takes
        around = edit(**{"name": "around", **others, name: mask})
        assert set(mask.needs) <= set(around.needs) and mask.tables[0] in around.tables
