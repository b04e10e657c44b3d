"""Readouts by name, each against a second way to the same number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sinklens as sl
from sinklens.cli import app
from sinklens.readouts.named import READOUTS
from tests.helpers.sweeps import FORMATION, TARGET, N, tiny_batch


def test_answers_are_the_two_most_probable_tokens(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    result = sl.sweep(tiny_llama, batch, readouts=["logit_diff"], target=TARGET, formation=FORMATION, layers=[1])
    top = tiny_llama(batch.tokens)[:, -1].topk(2)
    assert result.record["answers"] == top.indices.T.tolist()
    base = result.table.groupby("prompt").base.first()
    np.testing.assert_allclose(base, (top.values[:, 0] - top.values[:, 1]).detach(), rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_cross_entropy(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    result = sl.sweep(tiny_llama, batch, readouts=["loss"], target=TARGET, formation=FORMATION, layers=[1])
    logits = tiny_llama(batch.tokens)
    for prompt in range(N):
        loss = torch.nn.functional.cross_entropy(logits[prompt, :-1], batch.tokens[prompt, 1:])
        assert result.table[result.table.prompt == prompt].base.iloc[0] == pytest.approx(loss.item(), rel=1e-5)


def test_the_loss_of_late_tokens_is_that_of_their_positions_alone(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    last, n_layers = batch.length - 2, tiny_llama.cfg.n_layers
    logits = tiny_llama(batch.tokens)
    for begin in (0, 3, last):
        readout = sl.readouts.next_token_loss("late", batch.tokens, n_layers, begin)
        late = sl.Study(tiny_llama, batch).measure([readout])["late"][0]
        for prompt in range(N):
            loss = torch.nn.functional.cross_entropy(logits[prompt, begin:-1], batch.tokens[prompt, begin + 1 :])
            assert late[prompt].item() == pytest.approx(loss.item(), rel=1e-5)
    for begin in (-1, last + 1):
        with pytest.raises(sl.InputError, match=f"from position {begin} on"):
            sl.readouts.next_token_loss("late", batch.tokens, n_layers, begin)


def test_sink_rate_is_the_share_of_heads_above_the_threshold(tiny_llama: Any) -> None:
    batch = tiny_batch(tiny_llama)
    given: dict[str, Any] = {"readouts": ["alpha", "sink_rate"], "target": TARGET, "layers": [1], "eps": 0.1}
    given |= {"formation": FORMATION, "min_gap": 0.0}
    result = sl.sweep(tiny_llama, batch, readout_layers="2-3", **given)
    cache = tiny_llama.run_with_cache(batch.tokens)[1]
    alpha = torch.stack([cache["pattern", layer][:, :, TARGET:, TARGET].mean(-1) for layer in (2, 3)])
    base = result.table.groupby(["readout", "prompt"], observed=True).base.first()
    np.testing.assert_allclose(base["alpha"], alpha.mean((0, 2)).detach(), rtol=1e-4)
    np.testing.assert_allclose(base["sink_rate"], (alpha > 0.1).float().mean((0, 2)), rtol=1e-6)
    assert 0 < base["sink_rate"].mean() < 1


def test_kl_is_that_of_the_untouched_model_s_next_token(tiny_llama: Any) -> None:
    """Nothing in the run as it is; in the anchored one, and under a patch, what plain hooks give."""
    batch = tiny_batch(tiny_llama)
    options: dict[str, Any] = {"target": TARGET, "formation": FORMATION, "stages": "mlp_out", "layers": [1]}
    result = sl.sweep(tiny_llama, batch, readouts=["kl"], edits=["zero"], directions="denoise", **options)
    with torch.no_grad():
        clean = tiny_llama(batch.tokens)[:, :-1].double().log_softmax(-1)

    def kl(hooks: Any) -> torch.Tensor:
        with torch.no_grad():
            found = tiny_llama.run_with_hooks(batch.tokens, fwd_hooks=hooks)[:, :-1].double().log_softmax(-1)
        return (clean.exp() * (clean - found)).sum(-1).mean(1)

    rows = result.table.sort_values("prompt")
    assert rows.base.to_numpy() == pytest.approx(0, abs=1e-6)
    anchored = kl(sl.interventions.block_aggregation(TARGET, range(FORMATION.layer + 1)))
    assert rows.anchored.to_numpy() == pytest.approx(anchored.numpy(), rel=1e-3, abs=1e-6)
    patch = sl.Patch(sl.sites.MLP_OUT, (1,), (TARGET,), sl.edits.Constant())
    study = sl.Study.of(tiny_llama, batch, FORMATION)
    found = study.run([patch], [study.readout("kl")]).values["kl"][0]
    assert found.numpy() == pytest.approx(kl(sl.interventions.hooks_of(patch)).numpy(), rel=1e-3, abs=1e-6)


def test_every_name_is_told_where_one_is_asked_for():
    """A readout that is added shows in the table of sweeps' page and in the options' help."""
    root = Path(__file__).parents[2] / "sinklens"
    page = (root / "sweeps" / "README.md").read_text(encoding="utf-8")
    told = {name: readout.help.replace("|", r"\|") for name, readout in READOUTS.items()}  # a cell's end, otherwise
    rows = [f"| `{name}` | {text} |" for name, text in told.items()]
    assert "\n".join(rows) in page and all(readout.help for readout in READOUTS.values())
    for command in ("chain", "sweep"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
        assert [name for name in READOUTS if name not in shown.output] == []
