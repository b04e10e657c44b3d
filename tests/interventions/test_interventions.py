"""Ready-made hooks against hooks written by hand, and against models whose weights were changed for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import edits, interventions, sites
from sinklens.errors import InputError
from sinklens.interventions import Hook, Hooks, hooks_of
from sinklens.models.families import D_HEAD, D_MLP, D_MODEL, N_HEADS
from sinklens.models.identities import block_weights
from sinklens.models.load import load_model
from sinklens.patches import Patch, Source
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.tiny import each_once, hooks_left, slow_but, tiny_hf, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH, POSITION = 3, 10, 4
ALL = slice(None)
WAYS = ["run_with_hooks", "hooks"]
MODELS = each_once(
    {
        "llama": ("llama", "auto"),  # grouped-query: 4 query heads, 2 key/value heads
        "llama_bridge": ("llama", "bridge"),
        "gpt2": ("gpt2", "auto"),
        "gpt2_bridge": ("gpt2", "bridge"),
    }
)


@pytest.fixture(scope="module", params=slow_but("llama", "gpt2_bridge", of=MODELS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_model(*MODELS[request.param])


@pytest.fixture
def model(named: tuple[str, Any]) -> Iterator[Any]:
    yield named[1]
    assert hooks_left(named[1]) == []


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens(N, LENGTH)


@pytest.fixture(scope="module")
def cache(named: tuple[str, Any]) -> Any:
    """Another run's activations, as TransformerLens gives them."""
    with torch.no_grad():
        return named[1].run_with_cache(tiny_tokens(N, LENGTH, seed=1))[1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, tokens: Tensor, hooks: Hooks, way: str = "run_with_hooks") -> Tensor:
    with torch.no_grad():
        if way == "run_with_hooks":
            return model.run_with_hooks(tokens, fwd_hooks=hooks)
        with model.hooks(fwd_hooks=hooks):
            return model(tokens)


def by_hand(name: str, change: Callable[[Tensor], None]) -> tuple[str, Hook]:
    def hook(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        act = act.clone()
        change(act)
        return act

    return name, hook


def put(name: str, index: tuple, value: Tensor | float) -> tuple[str, Hook]:
    def change(act: Tensor) -> None:
        act[index] = value

    return by_hand(name, change)


def same(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


def same_as_by_hand(model: Any, tokens: Tensor, way: str, hooks: Hooks, hand: Hooks) -> None:
    """The hooks move the logits, and to where the ones written by hand move them."""
    found, expected = logits_of(model, tokens, hooks, way), logits_of(model, tokens, hand)
    assert (expected - logits_of(model, tokens, [])).abs().max() > 1e-3, "the test would not notice a missing hook"
    same(found, expected)


def test_block_aggregation_equals_masking_the_scores(model, tokens, way):
    def mask(scores: Tensor) -> None:
        scores[:, :, POSITION, :POSITION] = -torch.inf

    hooks = interventions.block_aggregation(POSITION, range(3))
    hand = [by_hand(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in range(3)]
    same_as_by_hand(model, tokens, way, hooks, hand)


def test_amplified_variance_is_the_formula(model, tokens, way):
    """Around the mean over the prompts of the batch, at that position, per head and dimension."""

    def amplify(z: Tensor) -> None:
        mean = z[:, POSITION].mean(0)
        z[:, POSITION] = mean + 5 * (z[:, POSITION] - mean)

    hooks = interventions.amplify_variance(POSITION, [0, 2], 5.0)
    hand = [by_hand(f"blocks.{layer}.attn.hook_z", amplify) for layer in (0, 2)]
    same_as_by_hand(model, tokens, way, hooks, hand)


@pytest.mark.parametrize(("axis", "over"), [("positions", (1,)), ("global", (0, 1))])
def test_amplified_variance_around_other_means(model, tokens, way, axis, over):
    def amplify(z: Tensor) -> None:
        mean = z.mean(over, keepdim=True)[:, 0]
        z[:, POSITION] = mean + 5 * (z[:, POSITION] - mean)

    hooks = interventions.amplify_variance(POSITION, [0, 2], 5.0, axis=axis)
    hand = [by_hand(f"blocks.{layer}.attn.hook_z", amplify) for layer in (0, 2)]
    for batch in (tokens, tokens[:1]):  # no other prompt is needed
        same_as_by_hand(model, batch, way, hooks, hand)


def test_amplified_variance_around_a_given_mean(model, tokens, way):
    """One mean for every block; then a single prompt will do."""
    mean = {layer: drawn(N_HEADS, D_HEAD, seed=layer) for layer in (1, 2)}
    hooks = interventions.amplify_variance(POSITION, [1, 2], 3.0, mean)

    def hand(layer: int) -> tuple[str, Hook]:
        def amplify(z: Tensor) -> None:
            z[:, POSITION] = mean[layer] + 3 * (z[:, POSITION] - mean[layer])

        return by_hand(f"blocks.{layer}.attn.hook_z", amplify)

    for batch in (tokens, tokens[:1]):
        same_as_by_hand(model, batch, way, hooks, [hand(1), hand(2)])


def test_amplification_by_one_changes_nothing(model, tokens, way):
    clean = logits_of(model, tokens, [])
    for norm_only in (False, True):
        hooks = interventions.amplify_variance(POSITION, range(4), 1.0, norm_only=norm_only)
        same(logits_of(model, tokens, hooks, way), clean)


def test_norm_only_has_the_amplified_norm_and_the_old_direction(model, tokens):
    name = "blocks.1.attn.hook_z"
    clean = cache_of(model, tokens, [], {name})[name]
    amplified, scaled = (
        cache_of(model, tokens, interventions.amplify_variance(POSITION, [1], 6.0, norm_only=only), {name})[name]
        for only in (False, True)
    )
    before, goal, after = (z[:, POSITION].flatten(1) for z in (clean, amplified, scaled))
    same(after.norm(dim=-1), goal.norm(dim=-1))
    same(after / after.norm(dim=-1, keepdim=True), before / before.norm(dim=-1, keepdim=True))
    assert (goal.norm(dim=-1) / before.norm(dim=-1) - 1).abs().min() > 0.1
    for z in (amplified, scaled):
        others = [p for p in range(LENGTH) if p != POSITION]
        assert torch.equal(z[:, others], clean[:, others])


def test_the_mean_of_a_batch_needs_two_prompts(model, tokens, way):
    with pytest.raises(InputError, match="at least two"):
        logits_of(model, tokens[:1], interventions.amplify_variance(POSITION, [0], 2.0), way)


ABLATIONS = {
    "neurons": (interventions.ablate_neurons, "blocks.2.mlp.hook_post", [3, 40], (D_MLP,)),
    "dims": (interventions.ablate_dims, "blocks.2.hook_resid_post", [1, 30], (D_MODEL,)),
    "heads": (interventions.ablate_heads, "blocks.2.attn.hook_z", [0, 3], (N_HEADS, D_HEAD)),
}


@pytest.mark.parametrize("positions", [(), (2, 5)], ids=["everywhere", "two_positions"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("kind", ABLATIONS)
def test_ablations(model, tokens, way, kind, mode, positions):
    ablate, name, units, shape = ABLATIONS[kind]
    values = {"zero": None, "mean": drawn(*shape), "resample": drawn(N, *shape)}[mode]
    hooks = ablate(2, units, positions, mode, values)

    def new(prompt: int, unit: int) -> Tensor | int:
        if values is None:
            return 0
        return values[unit] if mode == "mean" else values[prompt, unit]

    def change(act: Tensor) -> None:
        for prompt in range(N):
            for position in positions or range(LENGTH):
                for unit in units:
                    act[prompt, position, unit] = new(prompt, unit)

    same_as_by_hand(model, tokens, way, hooks, [by_hand(name, change)])


def test_dimensions_of_another_site_can_be_ablated(model, tokens, way):
    hooks = interventions.ablate_dims(1, [7, 9], [POSITION], site=sites.MLP_OUT)
    same_as_by_hand(model, tokens, way, hooks, [put("blocks.1.hook_mlp_out", (ALL, POSITION, [7, 9]), 0)])


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_ablations_other_than_to_zero_need_values(mode):
    for ablate, _, units, _ in ABLATIONS.values():
        with pytest.raises(InputError, match=f"{mode} ablation needs values"):
            ablate(2, units, mode=mode)


def test_an_unknown_mode_is_refused():
    for ablate, _, units, shape in ABLATIONS.values():
        with pytest.raises(InputError, match="unknown mode 'median': zero, mean or resample"):
            ablate(2, units, mode="median", values=drawn(N, *shape))  # type: ignore[arg-type]


def changed_copy(name: str, change: Callable[[Any], None]) -> Any:
    """The model of ``named`` after ``change`` to its Hugging Face weights."""
    arch, backend = MODELS[name]
    hf = tiny_hf(arch)
    with torch.no_grad():
        change(hf)
    return load_model(hf, backend=backend, device="cpu")  # type: ignore[arg-type]


def hf_w_out(hf: Any, layer: int) -> Tensor:
    """``[d_mlp, d_model]``, a view of the weight."""
    llama = hasattr(hf, "model")
    return hf.model.layers[layer].mlp.down_proj.weight.T if llama else hf.transformer.h[layer].mlp.c_proj.weight


def hf_w_o(hf: Any, layer: int) -> Tensor:
    """``[head, d_head, d_model]``, a view of the weight."""
    if hasattr(hf, "model"):
        return hf.model.layers[layer].self_attn.o_proj.weight.T.unflatten(0, (N_HEADS, D_HEAD))
    return hf.transformer.h[layer].attn.c_proj.weight.unflatten(0, (N_HEADS, D_HEAD))


def rotated(rows: Tensor, seed: int = 0) -> Tensor:
    """The rows with orthonormal vectors, those of a Gaussian matrix, in place of their own orthonormal basis."""
    gaussian = drawn(D_MODEL, len(rows), seed=seed).double()
    basis = gaussian @ torch.linalg.cholesky(gaussian.T @ gaussian).T.inverse()
    return (torch.linalg.cholesky(rows.double() @ rows.double().T) @ basis.T).float()


def test_densified_rows_equal_rotated_weights(named, model, tokens, way):
    neurons = [5, 0, 31]

    def rotate(hf: Any) -> None:
        rows = hf_w_out(hf, 1)
        rows[neurons] = rotated(rows[neurons], seed=7)

    expected = logits_of(changed_copy(named[0], rotate), tokens, [])
    assert (expected - logits_of(model, tokens, [])).abs().max() > 1e-3
    same(logits_of(model, tokens, interventions.densify_down_projection(model, 1, neurons, seed=7), way), expected)
    other = logits_of(model, tokens, interventions.densify_down_projection(model, 1, neurons, seed=8), way)
    assert (other - expected).abs().max() > 1e-3


def test_densified_at_one_position_only(named, model, tokens, way):
    """The chosen position's MLP output is that of the changed model, all others are the model's own."""

    def rotate(hf: Any) -> None:
        rows = hf_w_out(hf, 1)
        rows[[4]] = rotated(rows[[4]])

    name = "blocks.1.hook_mlp_out"
    expected = cache_of(model, tokens, [], {name})[name]
    expected[:, POSITION] = cache_of(changed_copy(named[0], rotate), tokens, [], {name})[name][:, POSITION]
    hooks = interventions.densify_down_projection(model, 1, [4], [POSITION])
    same_as_by_hand(model, tokens, way, hooks, [put(name, (ALL,), expected)])


def test_densifying_sees_what_earlier_hooks_did_to_the_neurons(model, tokens):
    """Neurons that are ablated first have nothing to write in any direction."""
    ablated = interventions.ablate_neurons(1, [4, 9])
    both = [*ablated, *interventions.densify_down_projection(model, 1, [4, 9])]
    same(logits_of(model, tokens, both), logits_of(model, tokens, ablated))


def test_permuted_z_equals_permuted_weights(named, model, way):
    """At position 0, whose residual depends on no other token, in every block at once."""
    tokens = tiny_tokens(N, 1)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(D_HEAD, generator=generator) for _ in range(N_HEADS)]

    def permute(hf: Any) -> None:
        for layer in range(4):
            weight = hf_w_o(hf, layer)
            old = weight.clone()
            for head, order in enumerate(orders):
                for i in range(D_HEAD):
                    weight[head, order[i]] = old[head, i]

    expected = logits_of(changed_copy(named[0], permute), tokens, [])
    assert (expected - logits_of(model, tokens, [])).abs().max() > 1e-3
    same(logits_of(model, tokens, interventions.permute_z(model, 0, range(4), seed=3), way), expected)


def test_permuted_z_elsewhere(model, tokens):
    """A permutation in each head, of that position alone: variance and norm stay."""
    name = "blocks.2.attn.hook_z"
    clean = cache_of(model, tokens, [], {name})[name]
    found = cache_of(model, tokens, interventions.permute_z(model, POSITION, [2]), {name})[name]
    assert torch.equal(found[:, POSITION].sort(-1).values, clean[:, POSITION].sort(-1).values)
    assert not torch.equal(found[:, POSITION], clean[:, POSITION])
    others = [p for p in range(LENGTH) if p != POSITION]
    assert torch.equal(found[:, others], clean[:, others])


TRANSPLANTS = {
    "keys": (interventions.transplant_keys, "blocks.{}.attn.hook_k"),
    "values": (interventions.transplant_values, "blocks.{}.attn.hook_v"),
    "attention_output": (interventions.transplant_attention_output, "blocks.{}.hook_attn_out"),
}


@pytest.mark.parametrize("kind", TRANSPLANTS)
def test_transplants(model, tokens, way, cache, kind):
    transplant, template = TRANSPLANTS[kind]
    names = [template.format(layer) for layer in (1, 2)]
    hand = [put(name, (ALL, POSITION), cache[name][:, POSITION]) for name in names]
    same_as_by_hand(model, tokens, way, transplant(cache, POSITION, [1, 2]), hand)


@pytest.mark.parametrize(
    ("site", "units"),
    [(sites.K, [1]), (sites.V, [0]), (sites.Z, [0, 3]), (sites.MLP_POST, [47, 2]), (sites.RESID_PRE, [5])],
    ids=["kv_head_of_k", "kv_head_of_v", "heads", "neurons", "dims"],
)
def test_units_can_be_transplanted(model, tokens, way, cache, site, units):
    name = site.at(2)
    hand = [put(name, (ALL, POSITION, units), cache[name][:, POSITION, units])]
    same_as_by_hand(model, tokens, way, interventions.transplant(site, cache, POSITION, [2], units), hand)


def test_all_units_are_transplanted_by_default(model, tokens, way, cache):
    hooks = interventions.transplant(sites.RESID_POST, cache, POSITION, [1])
    hand = [put("blocks.1.hook_resid_post", (ALL, POSITION), cache["blocks.1.hook_resid_post"][:, POSITION])]
    same_as_by_hand(model, tokens, way, hooks, hand)


def test_a_patch_with_positions_of_each_prompt(model, tokens, way, cache):
    """Prompt i is edited at its own positions, from its own positions in the source; the run is ignored."""
    to, source_at = ((1,), (4,), (2,)), ((7,), (0,), (2,))
    patch = Patch(sites.Z, (1,), to, edits.Transplant(), run="any", source=Source("any", source_at))
    name = "blocks.1.attn.hook_z"

    def change(z: Tensor) -> None:
        for prompt in range(N):
            z[prompt, to[prompt][0]] = cache[name][prompt, source_at[prompt][0]]

    same_as_by_hand(model, tokens, way, hooks_of(patch, cache), [by_hand(name, change)])


def test_a_patch_that_reads_another_site(model, tokens, way, cache):
    """What neurons write into some dimensions, from the source: arithmetic on weights and two caches."""
    neurons, dims = (3, 8), (0, 11)
    rows = block_weights(model, 2).W_out.detach()[list(neurons)]
    edit = edits.NeuronContribution("outlier_dims", neurons, rows, dims)
    post, out = "blocks.2.mlp.hook_post", "blocks.2.hook_mlp_out"
    clean = cache_of(model, tokens, [], {post, out})
    expected = clean[out].clone()
    for prompt in range(N):
        for dim in dims:
            for neuron, row in zip(neurons, rows, strict=True):
                more = cache[post][prompt, POSITION, neuron] - clean[post][prompt, POSITION, neuron]
                expected[prompt, POSITION, dim] += more * row[dim]
    hooks = hooks_of(Patch(sites.MLP_OUT, (2,), (POSITION,), edit), cache)
    same_as_by_hand(model, tokens, way, hooks, [put(out, (ALL,), expected)])


def test_a_patch_that_edits_the_source_reads_it_too(model, tokens, way, cache):
    """The source's output with a neuron's row taken away, put in place of this run's."""
    row = block_weights(model, 2).W_out.detach()[[6]]
    edit = edits.OfSource("less", edits.DensifyRows("less", (6,), row, torch.zeros_like(row)))
    post, out = "blocks.2.mlp.hook_post", "blocks.2.hook_mlp_out"
    expected = cache[out][:, POSITION] - cache[post][:, POSITION, [6]] * row
    hooks = hooks_of(Patch(sites.MLP_OUT, (2,), (POSITION,), edit), cache)
    same_as_by_hand(model, tokens, way, hooks, [put(out, (ALL, POSITION), expected)])


def test_a_patch_that_needs_a_source_says_so(model, tokens, way):
    patch = Patch(sites.Z, (1,), (POSITION,), edits.Transplant())
    with pytest.raises(InputError, match="'transplant' needs the source"):
        logits_of(model, tokens, hooks_of(patch), way)


def every_hook(model: Any, cache: Any) -> dict[str, Hooks]:
    mean = {layer: drawn(N_HEADS, D_HEAD) for layer in (1, 2)}
    return {
        "block_aggregation": interventions.block_aggregation(POSITION, [1, 2]),
        "amplify_variance": interventions.amplify_variance(POSITION, [1, 2], 2.0),
        "amplify_variance_mean": interventions.amplify_variance(POSITION, [1, 2], 2.0, mean),
        "amplify_variance_norm": interventions.amplify_variance(POSITION, [1, 2], 2.0, norm_only=True),
        "ablate_neurons": interventions.ablate_neurons(1, [2, 5]),
        "ablate_dims": interventions.ablate_dims(1, [2, 5], [POSITION]),
        "ablate_heads": interventions.ablate_heads(1, [0, 2]),
        "densify": interventions.densify_down_projection(model, 1, [2, 5]),
        "permute_z": interventions.permute_z(model, POSITION, [1, 2]),
        "transplant": interventions.transplant(sites.RESID_POST, cache, POSITION, [1, 2]),
        "transplant_keys": interventions.transplant_keys(cache, POSITION, [1, 2]),
        "transplant_values": interventions.transplant_values(cache, POSITION, [1, 2]),
        "transplant_attention_output": interventions.transplant_attention_output(cache, POSITION, [1, 2]),
    }


def test_hooks_return_new_tensors(model, tokens, cache):
    """Called by hand on a run's activations: those are as before, and the cache that is transplanted is too."""
    for name, hooks in every_hook(model, cache).items():
        sites_used = {point for point, _ in hooks}
        acts = {point: act for point, act in cache_of(model, tokens, [], sites_used).items() if point in sites_used}
        given = {point: cache[point].clone() for point in sites_used}
        for point, hook in hooks:
            before = acts[point].clone()
            found = hook(acts[point], None)
            assert torch.equal(acts[point], before), name
            if found is not None:
                assert not torch.equal(found, before), name
                assert found.data_ptr() != before.data_ptr(), name
                assert found.data_ptr() not in (acts[point].data_ptr(), cache[point].data_ptr()), name
        for point, act in given.items():
            assert torch.equal(cache[point], act), name


def test_hooks_keep_the_dtype(model, tokens, cache):
    for name, hooks in every_hook(model, cache).items():
        acts = cache_of(model, tokens, [], {point for point, _ in hooks})
        for point, hook in hooks:
            found = hook(acts[point].bfloat16(), None)
            assert found is None or found.dtype == torch.bfloat16, name


class Boom(Exception):
    pass


def test_an_exception_leaves_no_hook(model, tokens, way, cache):
    def boom(act: Tensor, hook: Any) -> None:  # noqa: ARG001
        raise Boom

    clean = logits_of(model, tokens, [])
    for hooks in every_hook(model, cache).values():
        with pytest.raises(Boom):
            logits_of(model, tokens, [*hooks, ("blocks.3.hook_mlp_out", boom)], way)
        assert hooks_left(model) == []
    assert torch.equal(logits_of(model, tokens, []), clean)


@pytest.mark.slow
def test_hooks_can_be_used_again(model, tokens, cache):
    """On another batch, of another size and length, too: nothing of the first run is kept."""
    for name, hooks in every_hook(model, cache).items():
        first = logits_of(model, tokens, hooks)
        logits_of(model, tiny_tokens(N, LENGTH - 2, seed=2), hooks)
        assert torch.equal(logits_of(model, tokens, hooks), first), name


def test_what_makes_no_sense_is_refused(tiny_llama):
    with pytest.raises(InputError, match="axis 'zzz': choose prompts, positions, global"):
        interventions.amplify_variance(5, [1], 4.0, axis="zzz")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="strength nan must be a finite number"):
        interventions.amplify_variance(5, [1], float("nan"))
    for neurons in ([3, 3, 7], [9999], [-1]):
        with pytest.raises(InputError, match=r"must be different ones in 0\.\."):
            interventions.densify_down_projection(tiny_llama, 1, neurons)
    with pytest.raises(InputError, match="whole number"):
        interventions.densify_down_projection(tiny_llama, 1, [3.0])  # type: ignore[list-item]


BEYOND: dict[str, Callable[[], Hooks]] = {
    "position 99, but the run has positions 0..9": lambda: interventions.block_aggregation(99, [1]),
    "position 99 is not in 0..9": lambda: interventions.amplify_variance(99, [1], 4.0),
    "position 12, but": lambda: interventions.ablate_heads(1, [0], [3, 12]),
    r"unit 999, but there are \d+ \(d_mlp\)": lambda: interventions.ablate_neurons(1, [3, 999], [5]),
    r"unit 999, but there are \d+ \(d_model\)": lambda: interventions.ablate_dims(1, [999], [5]),
    r"unit 99, but there are \d+ \(head\)": lambda: interventions.ablate_heads(1, [99], [5]),
    r"needs values \[d_mlp=\d+\], but got \(1,\)": lambda: interventions.ablate_neurons(
        1, [3], [5], mode="mean", values=torch.ones(1)
    ),
    r"needs values \[prompt=3 head=\d+ d_head=\d+\], but got \(2, 9\)": lambda: interventions.ablate_heads(
        1, [0], [5], mode="resample", values=torch.ones(2, 9)
    ),
    r"needs values \[prompt=3 pos=10 d_model=\d+\], but got \(4, 10, \d+\)": lambda: interventions.hooks_of(
        Patch(sites.MLP_OUT, (1,), (3,), edits.PerPosition("mine", {1: torch.zeros(4, 10, D_MODEL)}))
    ),
    r"needs values \[query=10 key=10\], but got \(10, 1\)": lambda: interventions.hooks_of(
        Patch(sites.PATTERN, (1,), (3,), edits.MaskKeys(keep=torch.ones(1, 10, 1, dtype=torch.bool)))
    ),
    "positions for 2 prompts, but the batch has 3": lambda: interventions.hooks_of(
        Patch(sites.MLP_OUT, (1,), ((3,), (4,)), edits.Constant())
    ),
}
"""What a run does not have: what is said, and the hooks that ask for it."""


@pytest.mark.parametrize("told", BEYOND)
def test_what_a_run_does_not_have_is_one_sentence(model, tokens, way, told):
    before = logits_of(model, tokens, [])
    with pytest.raises(InputError, match=told):
        logits_of(model, tokens, BEYOND[told](), way)
    assert torch.equal(logits_of(model, tokens, []), before)


def test_what_is_no_place_is_refused_at_once(tiny_llama):
    with pytest.raises(InputError, match="position True must be a whole number"):
        interventions.block_aggregation(True, [1])
    with pytest.raises(InputError, match=r"position 2\.5 must be a whole number"):
        interventions.permute_z(tiny_llama, 2.5, [1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"layers 1\.5 must be a whole number"):
        interventions.block_aggregation(5, [1.5])  # type: ignore[list-item]
    with pytest.raises(InputError, match="zero ablation takes no values"):
        interventions.ablate_neurons(1, [0], mode="zero", values=torch.ones(3))
    with pytest.raises(InputError, match="mean has no block 2"):
        interventions.amplify_variance(5, [1, 2], 4.0, {1: torch.ones(4, 8)})


def test_a_source_of_another_size_is_refused(model, tokens, cache, way):
    """One prompt of a cache would be taken for all, and a shorter one has no such position."""
    short = {name: act[:, :4] if act.ndim > 1 else act for name, act in cache.items()}
    few = {name: act[:2] for name, act in cache.items()}
    for source, told in ((short, "positions"), (few, "prompts"), ({}, "has no 'blocks.1.hook_attn_out'")):
        with pytest.raises(InputError, match=told):
            logits_of(model, tokens, interventions.transplant_attention_output(source, 5, [1]), way)
