"""A model, prompts, and what was found in them."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens import sites, statistics
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.formation import explained
from sinklens.prompts import from_tokens
from sinklens.readouts.base import Readout
from sinklens.study import Study
from tests.helpers.analyses import GIVEN, study
from tests.helpers.planted import OUTLIER, SUPER, planted_twice, prompts
from tests.helpers.sweeps import FORMATION
from tests.helpers.tiny import BACKENDS, tiny_model, tiny_tokens


def test_measuring_is_what_a_cache_holds():
    here = study()
    _, cache = here.model.run_with_cache(here.batch.tokens)
    norms = here.measure([Readout("norm", sites.RESID_POST, (0, 2), lambda a, _: a.norm(dim=-1))])["norm"]
    expected = torch.stack([cache[f"blocks.{b}.hook_resid_post"].norm(dim=-1) for b in (0, 2)])
    torch.testing.assert_close(norms, expected, atol=1e-5, rtol=0)
    kept = here.activations(sites.MLP_POST, (1,))[1]
    torch.testing.assert_close(kept, cache["blocks.1.mlp.hook_post"], atol=1e-6, rtol=0)


def test_targets_and_lengths_fit_the_prompts_or_are_refused():
    here = study()
    sink = here.formation.sink_positions[0]
    assert here.targets((5, sink, 99, 0)) == ((5,) if sink != 5 else ())
    with pytest.raises(InputError, match=r"none of the positions \(0, 15, 40\)"):
        here.targets((0, 15, 40))
    assert here.lengths() == (4, 8, 16)
    with pytest.raises(InputError, match="must be in 2..16"):
        here.lengths((8, 17))


@pytest.mark.parametrize("led", [False, True])
def test_random_prompts_begin_with_a_bos_when_the_given_ones_do(led):
    here = study()
    model: Any = here.model
    model.tokenizer = types.SimpleNamespace(
        bos_token_id=1,
        all_special_ids=[1],
        added_tokens_decoder={},
        get_vocab=lambda: {str(i): i for i in range(101)},
        decode=lambda ids, **_: str(ids[0]),
    )
    if led:
        here.batch.tokens[:, 0] = 1
    random = here.random.batch
    assert (random.n, random.length) == (3, 16)
    assert bool((random.tokens[:, 0] == 1).all()) is led
    assert not (random.tokens[:, 1:] == 1).any()


def test_controls_are_as_many_others():
    here = study()
    for drawn in here.other_neurons("x", 5):
        assert len(set(drawn)) == 2 and not set(drawn) & {3, 7}
    assert here.other_dims("y", 3) == here.other_dims("y", 3) != here.other_dims("z", 3)


def test_a_study_of_the_last_block_has_no_later_ones():
    with pytest.raises(NotApplicableError, match="block 3 is the model's last"):
        study(given=GIVEN | {"layer": 3}).after_formation()


def test_another_event_of_the_same_sink():
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = planted_twice()
    batch = from_tokens(model, prompts(16)[1:].repeat(3, 1))
    here = Study(model, batch, given={"super_neurons": (3,), "neuron_z": 4.0})
    assert (here.formation.layer, here.neurons) == (2, (3,))
    assert here.at_block(2) is here  # what is given of the block that is explained stays
    other = here.at_block(0)
    assert (other.formation.layer, other.neurons, other.formation.dims) == (0, (SUPER,), (OUTLIER,))
    assert other.given == {"neuron_z": 4.0, "layer": 0} and other.sinks.tolist() == here.sinks.tolist()
    assert (other.after_formation(), here.after_formation()) == ((1,), (3,))
    with pytest.raises(NoSinkError, match="no super neuron in block 1"):
        here.at_block(1)


def test_random_prompts_have_the_same_event_whatever_its_number_there():
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = planted_twice()
    here = Study(model, from_tokens(model, prompts(16)[1:].repeat(3, 1)), given={"event": 2})
    assert here.formation.layer == 2
    assert here.random.given == {"layer": 2} and here.given == {"event": 2}


# --- what several prompts of one text, and one token in all prompts, mean for what is measured


def _grouped(groups: str, *, same: bool = False) -> Any:
    model = tiny_model("llama")
    tokens = tiny_tokens(len(groups), 8)
    if same:
        tokens[:, 0] = 5
    return Study(model, from_tokens(model, tokens, groups=groups), seed=3)


@pytest.mark.slow
def test_a_study_draws_texts_where_prompts_share_one() -> None:
    values = [0.0, 0.1, 0.5, 0.6, 1.0]
    grouped, plain = _grouped("aabbc"), _grouped("abcde")
    assert grouped.mean(values) == statistics.mean_estimate(values, 3, list("aabbc"))
    assert plain.mean(values) == statistics.mean_estimate(values, 3) and plain.groups is None
    array = np.array(values)
    found = grouped.bootstrap(lambda chosen: float(array[chosen].mean()))
    assert (found.n, found.n_groups) == (5, 3)
    assert plain.bootstrap(len) == statistics.bootstrap_estimate(len, 5, 3)
    drawn = np.stack([array, array + 1], axis=1)
    assert grouped.mean_of_draws(drawn) == statistics.drawn_estimate(drawn, 3, list("aabbc"))
    with pytest.raises(InputError, match="name a text for 5 prompts, and there are 4"):
        grouped.mean(values[:4])
    assert plain.mean(values[:4]).n == 4


@pytest.mark.parametrize(("same", "at", "varies"), [(False, 0, True), (True, 0, False), (True, 1, True)])
def test_whether_anything_varies_at_the_sink(same: bool, at: int, varies: bool) -> None:
    here = _grouped("abc", same=same)
    assert here.varies_at(torch.tensor([at] * 3)) == varies
    here.formation = types.SimpleNamespace(sink_positions=(at,) * 3)
    assert here.sink_varies == varies


ENTRIES: dict[str, Callable[..., Any]] = {
    "find_formation": sl.find_formation,
    "Study": Study,
    "run_chain": sl.run_chain,
    "run_chains": lambda model, batch: sl.run_chains(model, batch, targets=[4]),
    "make_pair": lambda model, batch: sl.make_pair(sl.PairChoice(4), model, batch, FORMATION),
    "sweep": lambda model, batch: sl.sweep(model, batch, stages="resid_pre", formation=FORMATION),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_the_model_cannot_read_is_refused_at_once(entry: str, backend: Any):
    """On a bridge prompts longer than its context run, to numbers that mean nothing."""
    model, other = tiny_model("llama", backend), tiny_model("llama", max_position_embeddings=128, vocab_size=150)
    long = from_tokens(other, tiny_tokens(3, 80))
    strange = from_tokens(other, tiny_tokens(3, 12) + 40)
    for batch, match in (
        (long, "at most 64 tokens"),
        (strange, r"must lie in 0\.\.100"),
        (long.tokens, "must be a PromptBatch .* not of type Tensor"),
        (["a text"], "must be a PromptBatch .* not of type list"),
    ):
        with pytest.raises(InputError, match=match):
            ENTRIES[entry](model, batch)
    with pytest.raises(InputError, match=r"must be a loaded one \(load_model\), not of type str"):
        ENTRIES[entry]("tiny-sink", from_tokens(model, tiny_tokens(3, 12)))


def test_things_of_another_kind_are_refused_where_they_enter():
    here = study()
    with pytest.raises(InputError, match="formation must be what find_formation gives, not of type str"):
        sl.run_chain(here.model, here.batch, formation="block 3")  # type: ignore[arg-type]
    for analysis, of in (("onset", here), (None, here.model)):
        with pytest.raises(InputError, match="give an Analysis .* and a Study"):
            sl.run_analysis(analysis, of)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="texts must be a list of strings, not of type NoneType"):
        sl.prompts.from_texts(here.model, None, length=8)  # type: ignore[arg-type]


def test_a_formation_of_other_prompts_is_one_sentence():
    """Wherever one is given: it would be an error of torch's, or the sink of other prompts."""
    model, shorter = tiny_model("llama"), from_tokens(tiny_model("llama"), tiny_tokens(3, 4))
    batch = from_tokens(model, tiny_tokens(3, 12))
    fewer = replace(FORMATION, sink_positions=(0, 0))
    later = replace(FORMATION, sink_positions=(0, 0, 5))
    calls = {
        "run_chain": lambda batch, known: sl.run_chain(model, batch, target=2, formation=known),
        "sweep": lambda batch, known: sl.sweep(model, batch, target=2, formation=known),
        "induced_pair": lambda batch, known: sl.induced_pair(model, batch, known, 2),
        "natural_pair": lambda batch, known: sl.natural_pair(batch, known),
        "explained": lambda batch, known: explained(model, batch, known, 0),
    }
    for call in calls.values():
        with pytest.raises(InputError, match="was found on 2 prompts, and there are 3: call find_formation on these"):
            call(batch, fewer)
        with pytest.raises(InputError, match="has a sink at position 5, and the prompts have 4 tokens: call find_form"):
            call(shorter, later)
