"""When a sink emerges: over checkpoints, by hand and by a second computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import sinklens as sl
from sinklens.analysis.run import load_analysis
from sinklens.cli import app
from sinklens.models.decoder import Decoder, DecoderConfig, save_decoder

EMERGENCE = load_analysis("emergence")
SIZES = DecoderConfig(d_model=16, n_layers=2, n_heads=2, d_head=8, d_mlp=24, d_vocab=40, n_ctx=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four checkpoints, the steps of which do not sort as text."""
    run = tmp_path_factory.mktemp("softmax-0")
    for number, step in enumerate((0, 5, 20, 100)):
        model = Decoder(SIZES, seed=1)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + 3 * number
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        save_decoder(model, folder)
    return run


def test_a_correlation_is_spearman_s() -> None:
    module = EMERGENCE.run.__globals__
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (6, 5)).astype(float), rng.normal(size=(6, 5))
    spearman: Any = stats.spearmanr
    expected = [spearman(a[:, i], b[:, i]).statistic for i in range(5)]
    assert module["together"](a, b) == pytest.approx(expected)
    assert module["together"](np.ones((6, 1)), b[:, :1]) == [0]


def test_every_checkpoint_is_measured(trained: Path) -> None:
    last = sl.load_model(trained / "checkpoints" / "step-000100")
    tokens = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(last(tokens, return_type="loss"))
    found = EMERGENCE.run(sl.Study(last, sl.prompts.from_tokens(last, tokens)), models=(str(trained),))
    table = found.table[(found.table.step == 100)].set_index(["token", "quantity"]).value
    _, cache = last.run_with_cache(tokens)
    pattern = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1)])
    assert table["first", "attention"] == pytest.approx(float(pattern[..., 0].mean()), rel=1e-5)
    norms = torch.stack([cache[f"blocks.{layer}.hook_resid_post"].norm(dim=-1) for layer in (0, 1)])
    ratio = (norms[..., 0] / norms[..., 1:].mean(-1)).amax(0).mean()
    assert table["first", "norm"] == pytest.approx(float(ratio), rel=1e-5)
    assert table["all", "loss"] == pytest.approx(loss, rel=1e-5)
    assert list(dict.fromkeys(found.table.step)) == [0, 5, 20, 100]


@pytest.mark.slow
def test_the_command_says_what_it_lacks(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step-000100"
    words = ["analyse", "emergence", "--model", str(checkpoint), "--prompts", "random", "--n", "2", "--length", "12"]
    few = CliRunner().invoke(app, [*words, "--models", str(checkpoint), "--out", str(tmp_path / "few")])
    assert "1 checkpoints were named" in few.output
    told = CliRunner().invoke(app, [*words, "--models", str(trained), "--out", str(tmp_path / "all")])
    assert told.exit_code == 0, told.output
    assert "rank correlation" in told.output


def test_it_is_run_by_its_name_alone() -> None:
    assert "emergence" not in sl.analysis.list_analyses()
    assert "emergence" in sl.analysis.list_analyses(alone=True)
