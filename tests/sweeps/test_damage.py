"""Damaged folders: every damage of a shard is seen, said and put right; every damage of a record is one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sinklens.errors import InputError
from sinklens.sweeps import SweepResult, Worker, gather
from sinklens.sweeps.seal import KEY, Seal, column_digest
from tests.helpers.sweeps import run, written

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"stages": "z", "layers": "0-1", "positions": "4", "readouts": "attention_received"}


@pytest.fixture(scope="module")
def whole(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of several shards; to be copied."""
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    run(tiny_llama, folder, **SMALL)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def rewritten(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path, Path], None]:
    """A damage that leaves a file which any reader of Parquet takes, the seal included."""

    def damage(path: Path, _other: Path) -> None:
        table = pq.read_table(path)
        frame = change(table.to_pandas())
        changed = pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)

    return damage


def flipped(path: Path, _other: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(200, 240):
        data[place] ^= 1
    path.write_bytes(bytes(data))


def link(path: Path, other: Path) -> None:
    path.unlink()
    os.symlink(other, path)


def without_seal(path: Path, _other: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)


def strange_seal(path: Path, _other: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata({KEY: b"[1]"}), path)


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "a byte": flipped,
    "half of its bytes": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda path, _: path.write_bytes(b""),
    "half of its rows": rewritten(lambda frame: frame.iloc[: len(frame) // 2]),
    "no rows": rewritten(lambda frame: frame.iloc[:0]),
    "doubled rows": rewritten(lambda frame: pd.concat([frame, frame])),
    "one row twice, one missing": rewritten(lambda frame: frame.iloc[[0, *range(len(frame) - 1)]]),
    "shuffled rows": rewritten(lambda frame: frame.sample(frac=1, random_state=1)),
    "no effects": rewritten(lambda frame: frame.assign(effect=np.nan)),
    "one other effect": rewritten(lambda frame: frame.assign(effect=[*frame.effect[:-1], 0.5])),
    "another layer": rewritten(lambda frame: frame.assign(layer=frame.layer + 1)),
    "another unit": rewritten(lambda frame: frame.assign(unit=frame.unit + 1)),
    "other words": rewritten(lambda frame: frame.assign(direction=frame.direction.cat.rename_categories(str.upper))),
    "a copy of another": lambda path, other: shutil.copy(other, path),
    "a link to another": link,
    "no seal": without_seal,
    "a strange seal": strange_seal,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_run_again_and_refused(
    tiny_llama: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    expected = SweepResult.load(folder).table
    shards = sorted((folder / "shards").iterdir())
    DAMAGE[name](shards[2], shards[1])
    for read in (
        lambda: SweepResult.load(folder).table,
        lambda: SweepResult.load(folder).summary(),
        lambda: SweepResult.load(folder).to_tensor(),
        lambda: SweepResult.load(folder).n_nonfinite(),
        lambda: len(SweepResult.load(folder)),
        lambda: gather([folder], tmp_path / "joined.parquet"),
    ):
        with pytest.raises(InputError, match=f"{shards[2].name} is damaged"):
            read()
    assert not (tmp_path / "joined.parquet").exists()
    before = written(folder)
    with caplog.at_level("WARNING"):
        result = run(tiny_llama, folder, **SMALL)
    told = [record.getMessage() for record in caplog.records if "run again" in record.getMessage()]
    assert len(told) == 1 and shards[2].stem in told[0] and str(folder) in told[0]
    now = written(folder)
    assert {key for key in now if now[key] != before[key]} == {shards[2].name} and not shards[2].is_symlink()
    pd.testing.assert_frame_equal(result.table, expected)
    assert gather([folder], tmp_path / "joined.parquet").table.equals(expected)


def test_every_part_of_a_shard_counts(folder: Path) -> None:
    """Whatever byte of a file is changed: it is damaged, or its rows are what they were."""
    path = sorted((folder / "shards").iterdir())[0]
    expected, data = pq.read_table(path).replace_schema_metadata(), path.read_bytes()
    drawn, seen = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(data)
        changed[drawn.integers(len(data))] ^= 1 << int(drawn.integers(8))
        path.write_bytes(bytes(changed))
        try:
            rows = SweepResult.load(folder).shards.read([path.stem])
        except InputError:
            seen += 1
        else:
            assert rows.to_pylist() == expected.to_pylist()  # a name that no row has may be another
    assert seen > 75


def test_sound_shards_are_not_run_again(tiny_llama: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("a finished task was run again"))
    before = written(folder)
    run(tiny_llama, folder, **SMALL)
    assert written(folder) == before


def test_exact_rows_of_a_screened_sweep(tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {**SMALL, "method": "screen", "top": 3, "sample": 3, "stages": "resid_pre", "units": None}
    expected = run(tiny_llama, tmp_path / "a", **options).verified
    run(tiny_llama, tmp_path / "b", **options, seed=1)
    path = tmp_path / "a" / "verified.parquet"
    for damage in (flipped, lambda *_: shutil.copy(tmp_path / "b" / path.name, path), without_seal):
        damage(path, path)
        with pytest.raises(InputError, match="verified.parquet is damaged"):
            _ = SweepResult.load(tmp_path / "a").verified
        caplog.clear()
        again = run(tiny_llama, tmp_path / "a", **options).verified
        assert again is not None and expected is not None
        pd.testing.assert_frame_equal(again, expected)
        assert "it is run again now" in caplog.text


def test_a_gathered_file(folder: Path, tmp_path: Path) -> None:
    """A byte of it, or its rows under another record: refused, or the same rows."""
    out = tmp_path / "joined.parquet"
    expected = gather([folder], out).table
    data, drawn, seen = out.read_bytes(), np.random.default_rng(0), 0
    for number in range(150):
        changed = bytearray(data)
        changed[drawn.integers(len(data))] ^= 1 << int(drawn.integers(8))
        out.write_bytes(bytes(changed[: drawn.integers(len(data))] if number % 3 == 0 else changed))
        try:
            table = SweepResult.load(out).table
        except InputError:
            seen += 1
        else:
            assert table.astype(str).equals(expected.astype(str))
    assert seen > 75
    table = pq.read_table(folder / "shards" / sorted(os.listdir(folder / "shards"))[0])
    pq.write_table(table, out)
    with pytest.raises(InputError, match="is not a file that sinklens gather has written"):
        SweepResult.load(out)


def test_files_of_a_sweep_are_not_overwritten(folder: Path) -> None:
    before = written(folder)
    for out in (folder, folder / "sweep.json", folder / "shards" / "joined.parquet", "", "."):
        with pytest.raises(InputError, match="give (another|a) file"):
            gather([folder], out)
    assert written(folder) == before and SweepResult.load(folder).missing == []


def test_digests_are_of_values_and_not_of_how_they_are_stored() -> None:
    words = ["b", "a", None, "b"]
    plain = pa.chunked_array([pa.array(words).dictionary_encode()])
    pieces = pa.chunked_array([pa.array(words[:1]).dictionary_encode(), pa.array(words[1:]).dictionary_encode()])
    other = pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array([1, 2, None, 1]), ["unused", "b", "a"])])
    found = {column_digest(column.unify_dictionaries()) for column in (plain, pieces, other)}
    assert len(found) == 1
    numbers = [[1.0, 2.0], [2.0, 1.0], [1.0, None], [1.0, 0.0], [1.0, float("nan")], [1.0, -0.0]]
    assert len({column_digest(pa.chunked_array([pa.array(item, pa.float64())])) for item in numbers}) == len(numbers)
    rows = pa.table({"a": [1, 2]})
    assert Seal.of("x", rows) == Seal.of("x", pa.concat_tables([rows[:1], rows[1:]]))


# -- Records ----------------------------------------------------------------------------------------------------------


def values_of(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a record."""
    if where:
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from values_of(item, (*where, key))


def at(record: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        record = record[key]
    return record


OTHERS: tuple[Any, ...] = (None, True, -1, 0, 10**30, 0.5, "", "x", [], [1], {}, {"a": 1}, [[[]]])


def damaged(text: str) -> Iterator[tuple[str, bytes]]:
    """Every key deleted, every value of another type, cut off anywhere, and what no JSON is."""
    record = json.loads(text)
    for where in values_of(record):
        for other in OTHERS:
            changed = json.loads(text)
            if at(changed, where) != other or type(at(changed, where)) is not type(other):
                at(changed, where[:-1])[where[-1]] = other
                yield f"{where} = {other!r}", json.dumps(changed).encode()
        changed = json.loads(text)
        del at(changed, where[:-1])[where[-1]]
        yield f"no {where}", json.dumps(changed).encode()
    for length in range(0, len(text) - 1, 7):
        yield f"{length} characters", text[:length].encode()
    yield "nested", b"[" * 100_000
    yield "nested in a key", json.dumps(record)[:-1].encode() + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    yield "a number of 5,000 digits", json.dumps(record)[:-1].encode() + b', "x": ' + b"9" * 5000 + b"}"
    yield "a key twice", json.dumps(record)[:-1].encode() + b', "format": 2}'
    yield "NaN", json.dumps({**record, "x": float("nan")}).encode()
    yield "not UTF-8", b"\xff\xfe" + text.encode()
    yield "a list", b"[]"
    yield "an older format", json.dumps({k: v for k, v in {**record, "format": 1}.items() if k != "digest"}).encode()


def test_every_damage_of_a_record_is_one_sentence(tiny_llama: Any, folder: Path, tmp_path: Path) -> None:
    path, count = folder / "sweep.json", 0
    text = path.read_text(encoding="utf-8")
    for what, data in damaged(text):
        path.write_bytes(data)
        try:
            result = SweepResult.load(folder)
        except InputError as error:
            assert "\n" not in str(error) and "sweep.json is damaged" in str(error), what
        else:  # where it was made is no part of what it is
            assert "provenance" in what, what
            assert isinstance(result.summary(), pd.DataFrame)
        count += 1
    assert count > 1500
    for data in (b"", b"[]", json.dumps({**json.loads(text), "format": 1}).encode()):
        path.write_bytes(data)
        for use in (lambda: run(tiny_llama, folder, **SMALL), lambda: gather([folder], tmp_path / "joined.parquet")):
            with pytest.raises(InputError, match=r"sweep\.json is damaged"):
                use()
    assert run(tiny_llama, folder, force=True, **SMALL).missing == []


def test_a_record_with_another_provenance_can_be_taken_up(tiny_llama: Any, folder: Path) -> None:
    path = folder / "sweep.json"
    record = json.loads(path.read_text())
    for changed in ({"versions": {}}, {**record["provenance"], "git_commit": None}):
        path.write_text(json.dumps({**record, "provenance": changed}))
        assert run(tiny_llama, folder, **SMALL).missing == []


def test_a_folder_in_place_of_a_file(tiny_llama: Any, folder: Path) -> None:
    shards = sorted((folder / "shards").iterdir())
    shards[0].unlink()
    shards[0].mkdir()
    with pytest.raises(InputError):
        run(tiny_llama, folder, **SMALL)
    shutil.rmtree(folder / "shards")
    (folder / "shards").touch()
    for use in (lambda: run(tiny_llama, folder, **SMALL), lambda: SweepResult.load(folder).missing):
        with pytest.raises(InputError, match="shards cannot be read"):
            use()
