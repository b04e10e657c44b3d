"""A run is reproducible, is taken up where it was left, and its models are models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.errors import InputError
from sinklens.lab import SIZES, BigramBackcopy, Settings
from sinklens.lab.arms import read_tokens
from sinklens.lab.compiling import LossOf
from sinklens.lab.settings import read_variant
from sinklens.lab.watch import row_loss
from sinklens.models.decoder import Decoder
from tests.helpers.lab import curve, interrupted_at, trained


def weights(one):
    return {name: value.detach() for name, value in sl.load_model(one.folder).named_parameters()}


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_a_run_leaves_a_model_its_checkpoints_and_its_curves(run):
    files = {"config.json", "lab.json", "loss.parquet", "model.safetensors", "watch.parquet", "tokenizer.json"}
    assert {path.name for path in run.folder.iterdir()} == files | {"checkpoints", "tokenizer_config.json"}
    assert list(run.checkpoints) == [4, 8, 12]
    assert list(run.loss.columns) == ["step", "tokens", "loss", "lr", "seconds"]
    assert run.loss.step.tolist() == list(range(1, 13))
    assert run.loss.tokens.iloc[-1] == 12 * 8 * 16
    assert sorted(run.watch.step.unique()) == [0, 1, 2, 5, 12]
    record = json.loads((run.folder / "lab.json").read_text())
    assert record["settings"]["lr"] == SIZES["mini"].lr
    assert record["parameters"] == sum(w.numel() for w in weights(run).values())
    assert {"versions", "commit", "command", "decaying", "data", "device", "finished"} <= set(record)


def test_the_model_and_every_checkpoint_open_and_run(run):
    model = sl.load_model(run.folder)
    last = sl.load_model(run.checkpoints[12])
    tokens = torch.from_numpy(BigramBackcopy(16).held_out(4))[:, :-1]
    assert torch.equal(model(tokens), last(tokens))
    assert not torch.equal(model(tokens), sl.load_model(run.checkpoints[4])(tokens))
    batch = sl.prompts.natural(model, n=2, length=12)
    assert batch.tokens[:, 0].tolist() == [0, 0]  # its tokenizer puts BOS in front


def test_what_is_written_is_not_pickled(run):
    names = {path.suffix for path in run.folder.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors", ".parquet"}


def test_only_the_latest_checkpoint_has_what_to_go_on_from(run):
    assert [(path / "optimiser.safetensors").is_file() for path in run.checkpoints.values()] == [False, False, True]


def test_losses_are_those_of_a_loop_by_hand(run):
    """The same in plain torch, from the data's description to the update."""
    model = Decoder(sl.load_model(run.folder).cfg, seed=0).train()
    task = BigramBackcopy(16)
    decay, keep = [], []
    for weight in model.parameters():
        (keep if weight.ndim == 1 else decay).append(weight)
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(1, 13):
        rows = torch.from_numpy(task.rows(0, (step - 1) * 8, 8))
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert float(loss) == pytest.approx(run.loss.loss[step - 1], abs=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            share = 1 if step == 1 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 11)) / 2
            group["lr"] = 1e-2 * share
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"optimiser": "muon"}, {"variant": "head_rmsnorm"}], ids=str)
def test_interrupted_and_started_again_it_has_the_same_curve_and_weights(tmp_path, options):
    whole = trained(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match="stopped at step"):
        interrupted_at(5, tmp_path / "parts", **options)
    parts = trained(tmp_path / "parts", **options)
    assert curve(parts).equals(curve(whole))
    assert parts.watch.equals(whole.watch)
    assert same_weights(parts, whole)


def test_a_finished_run_is_left_as_it_is(run, monkeypatch):
    monkeypatch.setattr("sinklens.lab.training._Run.loop", lambda *_: pytest.fail("trained again"))
    assert curve(trained(run.folder.parent)).equals(curve(run))


@pytest.mark.slow
def test_a_batch_may_be_split(run, tmp_path):
    split = trained(tmp_path, accumulate=4)
    assert np.allclose(split.loss.loss, run.loss.loss, atol=1e-5)


@pytest.mark.slow
def test_arms_of_a_seed_see_the_same_rows_and_start_alike(run, tmp_path):
    other = trained(tmp_path, "head_rmsnorm")
    at = [one.watch[(one.watch.step == 0) & (one.watch.measure == "loss")].value.iloc[0] for one in (run, other)]
    assert at[0] == pytest.approx(at[1], abs=0.02) and at[0] != at[1]
    seed = trained(tmp_path, seed=1)
    assert seed.folder.name == "softmax-1"
    assert seed.loss.loss[0] != run.loss.loss[0]


@pytest.mark.slow
def test_several_arms(tmp_path):
    options = {"size": "mini", "steps": 2, "device": "cpu", "watch_points": 2, "out": tmp_path}
    arms = ("softmax", "sigmoid:normalised=true")
    first = sl.lab.train(arms, seeds=2, arm=(1, 2), **options)
    assert [one.folder.name for one in first] == ["softmax-0", "sigmoid-normalised=true-0"]
    second = sl.lab.train(arms, seeds=2, **options)
    assert [one.folder.name for one in second][1::2] == ["softmax-1", "sigmoid-normalised=true-1"]
    assert sl.load_model(second[-1].folder).cfg.variant_options["normalised"] is True


@pytest.mark.slow
def test_text(texts, tmp_path):
    one = trained(tmp_path, data=texts)
    model = sl.load_model(one.folder)
    assert model.cfg.d_vocab == 300
    assert one.loss.loss.iloc[-1] < one.loss.loss.iloc[0]
    assert sl.prompts.natural(model, n=2, length=12).n == 2


def test_another_configuration_is_refused_and_says_what_differs(run):
    with pytest.raises(InputError, match=r"another configuration \(batch is 8 there and 16 here; lr is 0.01 "):
        trained(run.folder.parent, lr=0.02, batch=16)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "softmax-0").mkdir()
    (tmp_path / "softmax-0" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no run of this lab"):
        trained(tmp_path)


@pytest.mark.slow
def test_nan_is_refused_and_checkpoints_are_kept(tmp_path, monkeypatch):
    def poisoned(logits, rows):
        return row_loss(logits, rows) * (float("nan") if next(calls) >= 9 else 1)

    calls = iter(range(1000))
    monkeypatch.setattr("sinklens.lab.training.LossOf", lambda model: LossOf(model, poisoned))
    with pytest.raises(InputError, match="the loss is nan at step 10 .*are kept"):
        trained(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "softmax-0/checkpoints").iterdir())
    assert kept == ["step-000004", "step-000008"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted_at(5, tmp_path)
    (latest,) = (tmp_path / "softmax-0").glob("checkpoints/*/optimiser.safetensors")
    latest.write_bytes(latest.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        trained(tmp_path)


@pytest.mark.slow
def test_bfloat16_keeps_weights_in_float32(tmp_path):
    one = trained(tmp_path, dtype="bfloat16")
    assert {w.dtype for w in weights(one).values()} == {torch.float32}
    assert one.loss.loss.iloc[-1] < one.loss.loss.iloc[0]


# -- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "softmix"}, "unknown variant 'softmix'; the known ones are softmax"),
        ({"variant": "sigmoid:normalised"}, "name:option=value"),
        ({"variant": "sigmoid:warm=1"}, "cannot be made"),
        ({"size": "huge"}, "unknown size 'huge'; the known ones are toy"),
        ({"device": "cuda:77"}, "is not there"),
        ({"steps": None, "tokens": "many"}, "such as 200m"),
        ({"tokens": "1m"}, "not both"),
        ({"accumulate": 3}, "equal parts"),
        ({"warmup": 13}, "from 0 to the 12 steps"),
        ({"arm": (3, 2)}, "I/N"),
        ({"data": "nowhere.txt"}, "is not there"),
        ({"schedule": "stairs"}, "constant, cosine, linear"),
        ({"dtype": "float8"}, "float32 or bfloat16"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        trained(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_schedules():
    def lr(step, **options):
        given = {"variant": "softmax", "size": "mini", "n_ctx": 8, "batch": 2, "accumulate": 1, "seed": 0, "lr": 1.0}
        rest = {"optimiser": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "dtype": "float32"}
        return Settings(steps=110, warmup=10, final_lr=0.1, **given, **rest, **options).lr_at(step)

    for schedule, middle in (("constant", 1), ("linear", 0.55), ("cosine", 0.55)):
        got = [lr(step, schedule=schedule) for step in (1, 10, 60, 110)]
        assert got == pytest.approx([0.1, 1, middle, 1 if schedule == "constant" else 0.1])


def test_written_numbers_and_variants():
    assert [read_tokens(text) for text in ("200m", "1.5k", "2B", "70", 70)] == [200_000_000, 1500, 2 * 10**9, 70, 70]
    assert read_variant("sigmoid:normalised=true") == ("sigmoid", {"normalised": True})
    assert read_variant("head_rmsnorm:eps=1e-6") == ("head_rmsnorm", {"eps": 1e-6})


@pytest.mark.parametrize(("name", "least", "most"), [("tiny", 1e6, 1.25e6), ("34m", 33.5e6, 34.5e6)])
def test_sizes_are_what_they_say(name, least, most):
    size = SIZES[name]
    block = 4 * size.d_model**2 + 3 * size.d_model * size.d_mlp + 2 * size.d_model
    ends = (1 if size.tied else 2) * size.vocab * size.d_model + size.d_model
    assert least < size.n_layers * block + ends < most
