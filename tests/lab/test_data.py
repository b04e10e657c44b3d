"""Rows are drawn by number; bigram-backcopy is what it says, and its optimum exact; text loses no token."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.errors import InputError
from sinklens.lab import BigramBackcopy, Data, Text, open_data

LENGTH = 24


@pytest.fixture(params=["task", "text"])
def data(request, texts) -> Data:
    return open_data("bigram_backcopy" if request.param == "task" else texts, LENGTH, vocab=300)


def test_rows_do_not_depend_on_how_they_are_asked_for(data):
    whole = data.rows(3, 50, 40)
    assert whole.shape == (40, LENGTH + 1)
    split = [data.rows(3, first, 8) for first in (82, 58, 50, 74, 66)]
    assert np.array_equal(np.sort(np.concatenate(split), 0), np.sort(whole, 0))
    assert np.array_equal(np.concatenate([data.rows(3, 50, 13), data.rows(3, 63, 27)]), whole)
    assert not np.array_equal(data.rows(4, 50, 40), whole)
    assert np.array_equal(open_again(data).rows(3, 50, 40), whole)


def open_again(data: Data) -> Data:
    return Text(data.folder, LENGTH, data.tokenizer) if isinstance(data, Text) else BigramBackcopy(LENGTH)


def test_held_out_rows_are_always_the_same_and_never_trained_on(data):
    held = data.held_out(8)
    assert np.array_equal(held, open_again(data).held_out(8))
    assert np.array_equal(held[:3], data.held_out(3))
    seen = {row.tobytes() for row in data.rows(0, 0, 2000)}
    assert not seen & {row.tobytes() for row in held}


# -- Bigram-backcopy --------------------------------------------------------------------------------------------------


def test_a_trigger_is_followed_by_the_symbol_in_front_of_it():
    task = BigramBackcopy(40)
    rows = task.rows(0, 0, 200)
    at = task.at_triggers(rows)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:] > 0).all()
    assert not at[:, 1].any() and not (at[:, 1:] & at[:, :-1]).any()
    row, place = np.nonzero(at[:, :-1])
    assert len(row) > 500
    assert np.array_equal(rows[row, place + 1], rows[row, place - 1])


@pytest.mark.parametrize("matrix", ["passages", "seed"])
def test_all_other_steps_follow_the_matrix(matrix):
    task = BigramBackcopy(60, matrix=matrix)
    rows = np.concatenate([task.rows(0, 0, 3000)])
    ordinary = ~task.at_triggers(rows)[:, :-1]
    ordinary[:, 0] = False
    a, b = rows[:, :-1][ordinary] - 1, rows[:, 1:][ordinary] - 1
    counts = np.zeros_like(task.transition)
    np.add.at(counts, (a, b), 1)
    seen = counts.sum(1) > 1000
    assert seen.sum() > 10
    assert np.abs(counts[seen] / counts[seen].sum(1, keepdims=True) - task.transition[seen]).max() < 0.06
    assert np.abs(task.transition.sum(1) - 1).max() < 1e-12


def test_the_optimum_is_the_loss_of_the_one_who_knows_the_rule():
    task = BigramBackcopy(30)
    rows = task.rows(1, 0, 6000)
    symbols = rows - 1
    chance = task.transition[symbols[:, 1:-1], symbols[:, 2:]]
    chance = np.where(task.at_triggers(rows)[:, 1:-1], 1, chance)
    losses = -np.log(np.concatenate([task.first[symbols[:, 1]][:, None], chance], 1))
    assert task.optimum == pytest.approx(losses.mean(), abs=4 * losses.mean(1).std() / 6000**0.5)
    assert task.optimum == pytest.approx(losses.mean(), rel=0.01)


def test_the_optimum_by_enumeration():
    """Every row of four tokens, with its probability."""
    task = BigramBackcopy(4, matrix="seed", matrix_seed=5)
    total = 0.0
    open_ = np.flatnonzero(~task.is_trigger)
    for a in open_:
        for b in range(len(task.first)):
            rest = {a: 1.0} if task.is_trigger[b] else dict(enumerate(task.transition[b]))
            for c, chance in rest.items():
                p = task.first[a] * task.transition[a, b] * chance
                row = task.transition[c]
                last = 0.0 if task.is_trigger[c] else -(row * np.log(row)).sum()
                total += p * (-np.log(p) + last) if p else 0
    assert task.optimum == pytest.approx(total / 4, rel=1e-9)


def test_text_is_tokenised_as_symbols():
    tokenizer = BigramBackcopy(8).tokenizer
    ids = tokenizer("The sea!").input_ids
    assert tokenizer.decode(ids) == "<s>the sea "
    assert ids[0] == tokenizer.bos_token_id == 0


# -- Text -------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_trained_token_once_and_no_other(texts):
    data = open_data(texts, LENGTH, vocab=300)
    assert isinstance(data, Text)
    rows = data.rows(0, 0, data.n_rows)
    again = data.rows(0, data.n_rows, data.n_rows)
    assert not np.array_equal(rows, again)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, again))
    assert len(np.unique(rows, axis=0)) == data.n_rows


def test_documents_are_held_out_whole(texts):
    data = open_data(texts, LENGTH, vocab=300)
    assert isinstance(data, Text)
    numbers = np.argsort([data._row(0, 0, place) for place in range(data.n_rows)])
    trained = data.tokenizer.decode(data.rows(0, 0, data.n_rows)[numbers][:, :-1].ravel())
    rows = data.held_out(10_000)
    order = np.argsort(np.random.default_rng(0).permutation(len(rows)))  # they are drawn from all of it
    held = data.tokenizer.decode(rows[order][:, :-1].ravel())
    there = [(text[:300] in trained, text[:300] in held) for text in (p.read_text() for p in texts.glob("*.txt"))]
    assert set(there) == {(True, False), (False, True)}


def test_the_cache_goes_by_content(texts, tmp_path):
    first = open_data(texts, LENGTH, vocab=300)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in texts.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    said: list[str] = []
    assert open_data(copy, LENGTH, vocab=300, step=said.append).folder == first.folder  # type: ignore[attr-defined]
    assert not any("cutting" in text for text in said)
    (copy / "00.txt").write_text("Something else.")
    assert open_data(copy, LENGTH, vocab=300).folder != first.folder  # type: ignore[attr-defined]


def test_what_is_measured_comes_from_all_that_is_held_out(tmp_path):
    """And not from the files that stand first: here every file has a letter of its own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for letter in letters:
        for number in range(20):
            (tmp_path / f"{letter}{number}.txt").write_text(f"{letter * (40 + number)} " * 40)
    data = open_data(tmp_path, LENGTH, vocab=300)

    def found(rows: np.ndarray) -> set[str]:
        return set(data.tokenizer.decode(rows.ravel())) & set(letters)

    everything, some = data.held_out(10_000), data.held_out(12)
    first = everything[np.argsort(np.random.default_rng(0).permutation(len(everything)))][:12]
    assert len(found(some)) > len(found(first)) and found(some) <= found(everything)


@pytest.mark.slow
def test_a_long_text_is_several_documents(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i} of many\n" for i in range(20_000)))
    data = open_data(path, LENGTH, vocab=300)
    assert isinstance(data, Text)
    assert data.record["documents"] > 3
    assert data.described()["tokens_held_out"] < data.described()["tokens_trained"]


def test_what_cannot_be_trained_on(tmp_path, texts):
    (tmp_path / "short.txt").write_text("A few words alone.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    for path, words in (
        (tmp_path / "none.txt", "is not there"),
        (tmp_path / "short.txt", "too short for a tokenizer"),
        (tmp_path / "bytes.txt", "no UTF-8"),
        (tmp_path / "empty", "holds no text file"),
        (tmp_path / "bad.jsonl", 'no object with a "text"'),
    ):
        with pytest.raises(InputError, match=words):
            open_data(path, LENGTH, vocab=300)
    with pytest.raises(InputError, match="too few for rows of 100000"):
        open_data(texts, 100_000, vocab=300)
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        open_data(texts, LENGTH, tokenizer=tmp_path / "empty")
    with pytest.raises(InputError, match="of its own"):
        open_data("bigram_backcopy", LENGTH, tokenizer="gpt2")
    with pytest.raises(InputError, match="does not fit"):
        from tests.helpers.tiny import save_tiny

        open_data(texts, LENGTH, tokenizer=save_tiny(tmp_path / "words"))


def test_a_data_set(tmp_path, texts):
    datasets = pytest.importorskip("datasets")
    rows = [path.read_text() for path in sorted(texts.glob("*.txt"))]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "set"))
    data = open_data(f"dataset:{tmp_path / 'set'}", LENGTH, vocab=300)
    assert data.described()["documents"] == len(rows)
    datasets.Dataset.from_dict({"words": rows}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(InputError, match="no column `text` but words"):
        open_data(f"dataset:{tmp_path / 'other'}", LENGTH)
    with pytest.raises(InputError, match="cannot be loaded"):
        open_data(f"dataset:{tmp_path / 'nothing'}", LENGTH)
