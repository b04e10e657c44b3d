"""Mitigations on a model whose sink was planted: some take it away and others leave it, and so it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens import interventions
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.interventions.harm import BRIEF, QUANTITIES
from sinklens.mitigation import MITIGATIONS, Fitted, Mitigation, MitigationResult, Sample
from sinklens.mitigation.generation import continued, without_cache
from sinklens.mitigation.run import _split
from sinklens.mitigation.texts import HEAD, lead, texts_of
from sinklens.patches import Positions
from sinklens.prompts import PromptBatch, from_tokens
from tests.helpers.planted import MINUS, PLUS, planted_model
from tests.helpers.tiny import hooks_left, tiny_tokens

N = 8
WHAT = ("massive-zero", "massive-mean", "softening", "bias", "value-zero", "eviction", "streaming", "dark")


@pytest.fixture(scope="module")
def model() -> Any:
    return planted_model()


@pytest.fixture(scope="module")
def batch(model: Any) -> PromptBatch:
    """A plus and a minus in front, then pairs of both in either order: the first token alone becomes a sink."""
    pairs = torch.tensor([[PLUS, MINUS], [MINUS, PLUS]])
    drawn = pairs[torch.randint(0, 2, (N, 7), generator=torch.Generator().manual_seed(0))].flatten(1)
    return from_tokens(model, torch.cat([pairs[:1].expand(N, 2), drawn], 1))


@pytest.fixture(scope="module")
def result(model: Any, batch: PromptBatch) -> MitigationResult:
    found = sl.mitigate(model, batch, [*WHAT, "silence"], generate=3)
    assert hooks_left(model) == []
    return found


def test_what_becomes_of_the_planted_sink(result: MitigationResult) -> None:
    """Attention in block 1 follows the outlier dimension: without it, or with another value, the first token has what
    uniform attention gives."""
    share = {name: result.estimate(name, "first_share").value for name in ("untouched", *WHAT)}
    uniform = float(np.mean([np.mean([1 / (q + 1) for q in range(1, 16)])]))
    assert share["massive-zero"] == pytest.approx(uniform, abs=1e-5)
    assert share["value-zero"] == pytest.approx(uniform, abs=1e-5)
    assert share["softening"] == pytest.approx(uniform, abs=1e-5)
    assert share["untouched"] == pytest.approx((1 + uniform) / 2, abs=1e-5)
    assert share["massive-mean"] == pytest.approx(share["untouched"], abs=1e-6)
    assert share["bias"] == pytest.approx(share["untouched"], abs=1e-6)
    assert result.estimate("massive-zero", "massive").value == 0 < result.estimate("untouched", "massive").value
    assert share["eviction"] < share["untouched"] < share["streaming"] + 0.1


def test_controls_leave_the_sink(result: MitigationResult) -> None:
    untouched = result.estimate("untouched", "first_share").value
    for name in ("massive-zero", "massive-mean", "softening", "bias"):
        assert result.estimate(name, "first_share", control=True).value == pytest.approx(untouched, abs=1e-5)


@pytest.mark.slow
def test_the_table(result: MitigationResult) -> None:
    table = result.table.set_index("mitigation")
    assert list(table.index) == ["untouched", *WHAT]
    assert set(table["n"]) == {N - 2}
    assert set(QUANTITIES) <= set(table.columns)
    assert list(table.loc["untouched", ["loss_change", "kl"]]) == [0, 0]
    for name in WHAT:
        loss = result.of(name, "loss") - result.of("untouched", "loss")
        assert table.loc[name, "loss_change"] == pytest.approx(loss.mean())
        assert len(result.of(name, "loss", control=True)) == N - 2
    measured = set(result.values[result.values["control"]]["quantity"])
    assert measured == set(BRIEF)


def test_what_cannot_be_done_is_told(result: MitigationResult, model: Any, batch: PromptBatch) -> None:
    assert set(result.left_out) == {"silence"} and "sink heads" in result.left_out["silence"]
    with pytest.raises(NotApplicableError, match="sink heads"):
        sl.mitigate(model, batch, ["silence"])


@pytest.mark.slow
def test_saved_and_read_back(result: MitigationResult, tmp_path: Path) -> None:
    again = MitigationResult.load(result.save(tmp_path / "out"))
    assert (again.rows, again.said, again.left_out, again.groups) == (
        result.rows,
        result.said,
        result.left_out,
        result.groups,
    )
    assert again.table.equals(result.table)
    with pytest.raises(InputError, match="holds no mitigation.json"):
        MitigationResult.load(tmp_path)
    text = (tmp_path / "out" / "mitigation.json").read_text()
    (tmp_path / "out" / "mitigation.json").write_text(text.replace('"title"', '"titel"', 1))
    with pytest.raises(InputError, match="are damaged"):
        MitigationResult.load(tmp_path / "out")


def test_one_seed_gives_one_result(model: Any, batch: PromptBatch, result: MitigationResult) -> None:
    """And a mitigation alone has what it has among others."""
    alone = sl.mitigate(model, batch, ["softening"], generate=3)
    for control in (False, True):
        assert np.array_equal(
            alone.of("softening", "kl", control=control), result.of("softening", "kl", control=control)
        )
    assert [said.continuation for said in alone.said if said.mitigation == "softening"] == [
        said.continuation for said in result.said if said.mitigation == "softening"
    ]


@pytest.mark.slow
def test_greedy_generation_is_the_model_s_own(tiny_llama: Any) -> None:
    """With a cache and without one."""
    tokens = tiny_tokens(1, 6)
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    hooks = interventions.gate_heads(tiny_llama, {1: [0, 1]})
    for chosen in ([], hooks):
        with tiny_llama.hooks(fwd_hooks=chosen):
            expected = tiny_llama.generate(tokens, max_new_tokens=5, use_past_kv_cache=False, **options)[0, 6:]
        assert torch.equal(continued(tiny_llama, tokens[0], chosen, 5), expected.cpu())
        assert torch.equal(without_cache(tiny_llama, tokens[0], chosen, 5), expected.cpu())


def test_no_text_is_fitted_and_measured(model: Any) -> None:
    tokens = torch.zeros(6, 4, dtype=torch.long)
    grouped = from_tokens(model, tokens, groups=["a", "a", "a", "b", "c", "c"])
    fit, measured = _split(grouped, 2)
    assert (fit.groups, measured.groups) == (("a", "a", "a"), ("b", "c", "c"))
    plain = from_tokens(model, tokens)
    assert [part.n for part in _split(plain, None)] == [1, 5]
    for wanted in (0, 6):
        with pytest.raises(InputError, match="fitted on some prompts and measured on others"):
            _split(plain, wanted)
    with pytest.raises(InputError, match="have 3 tokens, the others 4"):
        _split(plain, from_tokens(model, tokens[:, :3]))


def test_mitigations_of_one_s_own(model: Any, batch: PromptBatch) -> None:
    """It gets the sample and the measured prompts' sinks."""
    seen: list[Any] = []

    def fit(sample: Sample) -> Fitted:
        def hooks(sinks: Positions) -> Any:
            seen.append((sample.batch.n, sinks))
            return interventions.ablate_dims(0, [2], (0,))

        return Fitted(hooks, lambda _: [], "dimension 2", "nothing")

    found = sl.mitigate(model, batch, [Mitigation("mine", "Mine", fit)], generate=0)
    assert seen == [(2, Positions.one_each([0] * 6))]
    assert found.estimate("mine", "massive").value == 0
    assert found.said == ()
    assert (found.estimate("mine", "kl", control=True).value) == 0


def test_what_makes_no_sense_is_refused(model: Any, batch: PromptBatch, tiny_llama: Any) -> None:
    with pytest.raises(InputError, match="'softness' is not known: choose from massive-zero"):
        sl.mitigate(model, batch, ["softness"])
    with pytest.raises(InputError, match="given twice"):
        sl.mitigate(model, batch, ["bias", "bias"])
    with pytest.raises(InputError, match="no mitigation is given"):
        sl.mitigate(model, batch, [])
    with pytest.raises(NoSinkError):
        sl.mitigate(tiny_llama, from_tokens(tiny_llama, tiny_tokens(4, 8)))


def test_every_mitigation_says_what_it_is() -> None:
    for name, mitigation in MITIGATIONS.items():
        assert mitigation.name == name and mitigation.title and mitigation.source


# --- What people see -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_escapes_what_a_model_says(result: MitigationResult, tmp_path: Path) -> None:
    said = replace(result.said[0], continuation="<script>alert(1)</script>", text="<b>bold</b>")
    row = replace(result.rows[0], said="<img src=x>")
    hostile = replace(result, said=(said, *result.said[1:]), rows=(row, *result.rows[1:]))
    hostile.save(tmp_path / "run")
    page = sl.report(tmp_path / "run").read_text(encoding="utf-8")
    assert "The sink taken away" in page and "What the model says" in page
    assert "<script>alert(1)" not in page and "<img src=x>" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'id="figure-mitigations"' in page
    assert "silence" in page and "sink heads to gate" in page


@pytest.mark.slow
def test_the_figure_has_a_point_for_each_and_for_its_control(result: MitigationResult) -> None:
    drawn = sl.viz.mitigation_points(result.table)
    assert len(drawn) == 2 * len(WHAT)
    left: Any = drawn.set_index(["mitigation", "which"])["left"]
    shares: Any = result.table.set_index("mitigation")["first_share"]
    for name in WHAT:
        assert left[name, "mitigation"] == pytest.approx(shares[name] / shares["untouched"])
    texts = {note.text for note in sl.viz.mitigation_figure(result.table).layout.annotations}  # pyright: ignore[reportAttributeAccessIssue]
    assert set(WHAT) <= texts


@pytest.mark.slow
def test_short_table(result: MitigationResult) -> None:
    lines = texts_of(result)
    assert [line[0] for line in lines] == ["untouched", *WHAT]
    assert all(len(line) == len(HEAD) for line in lines)
    assert "The loss changes least" in lead(result)
