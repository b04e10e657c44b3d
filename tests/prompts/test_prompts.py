"""Prompts: equal lengths, fixed order, seeds, and one clear sentence for every wrong input."""

import json
import sys
import warnings
from importlib import resources
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinklens import prompts
from sinklens.errors import InputError
from sinklens.prompts.sources import N_PASSAGES

WORDS = [f"w{i}" for i in range(30)]
LINE = " ".join(WORDS[:10])


def passages() -> list[dict[str, str]]:
    text = resources.files("sinklens").joinpath("data/passages.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fake_model(bos: str | None = "<bos>", n_ctx: int = 128) -> Any:
    """What prompts need of a model: ids 0 and 1 are special, 2 to 31 are words, and 32 to 39 exist only in d_vocab."""
    vocab = {"<bos>": 0, "<unk>": 1} | {word: i for i, word in enumerate(WORDS, 2)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]: stub is read-only
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token=bos)
    return SimpleNamespace(cfg=SimpleNamespace(n_ctx=n_ctx, d_vocab=40), tokenizer=tokenizer)


@pytest.fixture
def model():
    return fake_model()


@pytest.fixture
def bare() -> Any:
    return SimpleNamespace(cfg=SimpleNamespace(n_ctx=128, d_vocab=40), tokenizer=None)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- the passages


def test_passages_are_32_distinct_texts():
    rows = passages()
    assert len(rows) == N_PASSAGES == 32
    assert len({row["title"] for row in rows}) == 32
    assert len({row["text"].split()[0].strip('",.').lower() for row in rows}) == 32
    assert all(row["text"].isascii() and len(row["text"].split()) >= 200 for row in rows)


@pytest.mark.smollm2
def test_passages_on_smollm2(smollm2):
    ids = [smollm2.tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in passages()]
    assert min(len(row) for row in ids) >= 260
    assert len({row[0] for row in ids}) == 32
    batch = prompts.natural(smollm2, n=32, length=260)
    assert (batch.n, batch.length, batch.n_skipped) == (32, 260, 0)
    assert batch.tokens.tolist() == [row[:260] for row in ids]
    assert "".join(batch.labels[0]) == smollm2.tokenizer.decode(ids[0][:260])


@pytest.mark.smollm2
def test_random_tokens_on_smollm2_leaves_out_every_special_token(smollm2):
    batch = prompts.random_tokens(smollm2, n=64, length=512)
    assert batch.tokens.min() > 16  # ids 0 to 16 are <|endoftext|> ... <empty_output>
    assert all(label for row in batch.labels for label in row)


# --- PromptBatch


def test_batch_properties_and_digest():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    labels = (("a", "b", "c"), ("d", "e", "f"))
    batch = prompts.PromptBatch(ids, labels, "mine")
    assert (batch.n, batch.length, batch.n_skipped) == (2, 3, 0)
    assert batch.digest() == prompts.PromptBatch(ids.int(), labels, "other").digest()
    reshaped = prompts.PromptBatch(ids.reshape(3, 2), (("a", "b"),) * 3, "mine")
    assert batch.digest() != reshaped.digest()
    assert batch.digest() != prompts.PromptBatch(ids + 1, labels, "mine").digest()
    with pytest.raises(AttributeError):
        batch.source = "changed"  # pyright: ignore[reportAttributeAccessIssue]: the point of the test


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.tensor([1, 2]), "of shape \\[batch, pos\\], not torch.int64 of shape \\[2\\]"),
        (torch.zeros(2, 3), "integers of shape \\[batch, pos\\], not torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), "not torch.bool"),
        (torch.zeros(0, 3, dtype=torch.long), "must be non-empty"),
        ([[1, 2]], "must be a tensor, not of type list"),
        (torch.tensor([[1, 2, 3]]), "one string for each token, 1 rows of 3"),
    ],
)
def test_batch_refuses(tokens, message):
    with pytest.raises(InputError, match=message):
        prompts.PromptBatch(tokens, (("a", "b"),), "mine")


def test_subset(model):
    batch = prompts.random_tokens(model, n=4, length=3)
    for indices in ([2, 0], np.array([2, 0]), torch.tensor([2, 0]), (-2, -4)):
        part = batch.subset(indices)
        assert torch.equal(part.tokens, batch.tokens[[2, 0]])
        assert part.labels == (batch.labels[2], batch.labels[0])
    mask = [True, False, True, False]
    for indices in (mask, torch.tensor(mask), range(0, 4, 2)):
        assert torch.equal(batch.subset(indices).tokens, batch.tokens[[0, 2]])


@pytest.mark.parametrize("indices", [[], [0.5], [True], [False] * 4, 1])
def test_subset_refuses_what_selects_nothing(model, indices):
    with pytest.raises(InputError, match="by integers, or by 4 booleans"):
        prompts.random_tokens(model, n=4, length=3).subset(indices)


@pytest.mark.parametrize("index", [4, -5])
def test_subset_out_of_range(model, index):
    with pytest.raises(InputError, match="numbered 0..3"):
        prompts.random_tokens(model, n=4, length=3).subset([index])


# --- natural


def test_natural_is_the_first_passages_in_order():
    model = fake_model()
    batch = prompts.natural(model, n=3, length=5)
    assert (batch.n, batch.length, batch.source) == (3, 5, "passages")
    assert batch.digest() == prompts.natural(model, n=5, length=5).subset(range(3)).digest()


def test_natural_with_a_seed(model, monkeypatch):
    seen = []
    tokenizer = model.tokenizer
    monkeypatch.setattr(model, "tokenizer", Recorder(tokenizer, seen))
    prompts.natural(model, n=32, length=5, seed=1)
    first, seen[:] = list(seen), []
    prompts.natural(model, n=32, length=5, seed=1)
    assert seen == first
    texts = [row["text"] for row in passages()]
    assert sorted(first) == sorted(texts) and first != texts
    seen.clear()
    prompts.natural(model, n=32, length=5, seed=2)
    assert seen != first


class Recorder:
    """A tokenizer that notes the texts that it is given."""

    def __init__(self, inner, seen):
        self.inner, self.seen = inner, seen

    def __call__(self, text, **kwargs):
        self.seen.append(text)
        return self.inner(text, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_natural_passes_over_short_passages():
    lengths = [len(row["text"].split()) for row in passages()]
    length = sorted(lengths)[16]
    with pytest.warns(UserWarning, match="of 32 prompts have"):
        batch = prompts.natural(fake_model(n_ctx=1024), n=32, length=length)
    assert batch.n_skipped == sum(n < length for n in lengths) > 0
    assert batch.n + batch.n_skipped == 32


def test_natural_errors(model, bare):
    with pytest.raises(InputError, match="There are 32 built-in passages and 33 were asked for.*from_file"):
        prompts.natural(model, n=33)
    with pytest.raises(InputError, match="No text in passages has 1000 tokens: the longest has \\d+; use a length of"):
        prompts.natural(fake_model(n_ctx=1024), n=2, length=1000)
    with pytest.raises(InputError, match="no tokenizer, so it cannot read text; use random_tokens"):
        prompts.natural(bare)


# --- sizes, the same for every source


@pytest.mark.parametrize("make", [prompts.natural, prompts.random_tokens])
@pytest.mark.parametrize(
    "size, message",
    [
        ({"n": 0}, "n must be at least 1, and it is 0"),
        ({"n": 1.5}, "n must be an integer, and it is 1.5"),
        ({"length": 1}, "length must be at least 2, and it is 1"),
        ({"length": 129}, "reads at most 128 tokens.*not 129"),
        ({"length": "64"}, "length must be an integer, and it is '64'"),
    ],
)
def test_sizes(model, make, size, message):
    with pytest.raises(InputError, match=message):
        make(model, **size)


# --- random tokens


def test_random_tokens_are_seeded_and_leave_the_global_state(model):
    state = torch.get_rng_state()
    batch = prompts.random_tokens(model, n=8, length=16, seed=3)
    prompts.natural(model, n=8, length=16, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.digest() == prompts.random_tokens(model, n=8, length=16, seed=3).digest()
    assert batch.digest() != prompts.random_tokens(model, n=8, length=16, seed=4).digest()
    assert batch.source == "random_tokens(seed=3)"


def test_random_tokens_cover_the_vocabulary_without_special_or_unused_ids(model):
    batch = prompts.random_tokens(model, n=50, length=100)
    assert set(batch.tokens.flatten().tolist()) == set(range(2, 32))
    assert batch.labels[0][0] == f"w{int(batch.tokens[0, 0]) - 2}"


def test_random_tokens_without_a_tokenizer(bare):
    batch = prompts.random_tokens(bare, n=50, length=100)
    assert set(batch.tokens.flatten().tolist()) == set(range(40))
    assert batch.labels[0][0] == str(int(batch.tokens[0, 0]))


def test_prepend_bos_counts_within_the_length(model):
    for batch in (
        prompts.random_tokens(model, n=2, length=4, prepend_bos=True),
        prompts.from_texts(model, [LINE], length=11, prepend_bos=True),
    ):
        assert (batch.tokens[:, 0] == 0).all() and (batch.tokens[:, 1:] > 1).all()
        assert batch.labels[0][0] == "<bos>"
    assert batch.length == 11


def test_prepend_bos_without_such_a_token(bare):
    for model in (fake_model(bos=None), bare):
        with pytest.raises(InputError, match="no beginning-of-sequence token"):
            prompts.random_tokens(model, prepend_bos=True)


# --- texts and tokens


def test_from_texts_cuts_skips_and_counts(model):
    batch = prompts.from_texts(model, [LINE, "w1 w2", "  ", "w9 w8 w7 w6", LINE], length=4)
    assert batch.tokens.tolist() == [[2, 3, 4, 5], [11, 10, 9, 8], [2, 3, 4, 5]]
    assert batch.labels[1] == ("w9", "w8", "w7", "w6")
    assert batch.n_skipped == 1  # the blank text is not a prompt


def test_from_texts_errors(model):
    with pytest.raises(InputError, match="is a single string; put it in a list"):
        prompts.from_texts(model, LINE, length=4)
    with pytest.raises(InputError, match="Text 2 must be a string, and it is of type int"):
        prompts.from_texts(model, [LINE, 3], length=4)  # pyright: ignore[reportArgumentType]: the point of the test
    with pytest.raises(InputError, match="Text 1 is not valid Unicode"):
        prompts.from_texts(model, ["w1 \ud800"], length=4)
    with pytest.raises(InputError, match="There is no text in texts; give at least one line of 4 tokens"):
        prompts.from_texts(model, [], length=4)
    with pytest.raises(InputError, match="the longest has 1; use longer texts"):
        prompts.from_texts(model, ["w1"], length=4)


def test_labels_of_bytes_that_are_no_character(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **_: {2: "\ufffd", 3: ""}.get(ids[0], " ok"))
    assert prompts.from_tokens(model, [[2, 3, 4, 39]]).labels == (("w0", "w1", " ok", " ok"),)


def test_from_tokens_copies(model):
    ids = torch.tensor([[2, 3, 4]])
    batch = prompts.from_tokens(model, ids)
    ids[0, 0] = 9
    assert batch.tokens.tolist() == [[2, 3, 4]] and batch.labels == (("w0", "w1", "w2"),)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([[1, 2], [3]], "integers in equally long rows"),
        ([1, 2], "of shape \\[batch, pos\\]"),
        ([[1.0, 2.0]], "not torch.float32"),
        ([], "non-empty"),
        ([[1, 40]], "must lie in 0..39, and these lie in 1..40"),
        ([[-1, 4]], "these lie in -1..4"),
        ([[1]], "length must be at least 2"),
        ([[1] * 129], "reads at most 128 tokens"),
    ],
)
def test_from_tokens_errors(model, tokens, message):
    with pytest.raises(InputError, match=message):
        prompts.from_tokens(model, tokens)


# --- what is in the tokens


def chat_model(d_vocab: int = 40, **special: str) -> Any:
    """The model above with the special tokens that are asked for, ids 32 and on."""
    model = fake_model(bos=None)
    vocab = {**model.tokenizer.get_vocab(), "<eos>": 32, "<pad>": 33, "<turn>": 34, "far": 41}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]: stub is read-only
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", **special)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model.cfg.d_vocab = d_vocab
    return model


def said(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_refused(side):
    model = chat_model(pad_token="<pad>")
    model.tokenizer.padding_side = side
    padded = model.tokenizer(["w1 w2 w3", "w1 w2"], padding=True, return_tensors="pt", add_special_tokens=False)
    with pytest.raises(InputError, match="1 of 2 rows begin or end with the padding token '<pad>'.*equal length"):
        prompts.from_tokens(model, padded["input_ids"])
    for given in (padded, dict(padded), {name: value.tolist() for name, value in padded.items()}):
        with pytest.raises(InputError, match="The attention mask marks padding"):
            prompts.from_tokens(model, given)
    whole = model.tokenizer(["w1 w2 w3", "w4 w5 w6"], padding=True, add_special_tokens=False)
    assert prompts.from_tokens(model, whole).tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match='has no "input_ids"'):
        prompts.from_tokens(model, {"ids": [[1, 2]]})
    assert prompts.from_tokens(model, [[3, 33, 4]]).n == 1  # inside a row it is whatever the user means by it


@pytest.mark.parametrize(
    "pad, rows, warns",
    [
        ("<eos>", [[3, 4, 5], [32, 3, 4]], True),
        ("<eos>", [[3, 4, 32], [3, 32, 32]], True),
        ("<unk>", [[1, 1, 5]], True),
        ("<eos>", [[32, 4, 5], [32, 3, 4]], False),  # in front of every row: that is no padding
        ("<eos>", [[3, 32, 5], [3, 4, 5]], False),
    ],
)
def test_a_padding_token_with_another_use_is_told(pad, rows, warns):
    model = chat_model(pad_token=pad)
    messages = said(lambda: prompts.from_tokens(model, rows))
    assert len(messages) == warns
    assert all(f"begin or end with the padding token '{pad}'" in message for message in messages)


def test_special_tokens_in_texts_are_counted_once():
    model = chat_model()
    texts = ["w1 <turn> w2 <eos>", "<turn> w1 w2 w3", "w1 w2 w3 what <turn>"]
    messages = said(lambda: prompts.from_texts(model, texts, length=4))
    assert messages == ["texts: 3 special tokens are written in the texts (<eos>, <turn>), and are taken as such."]
    assert said(lambda: prompts.from_texts(model, ["w1 what w2"], length=3)) == []  # an unknown word is none


def test_a_bos_that_the_tokenizer_does_not_have():
    model = chat_model()
    model.tokenizer.bos_token = model.tokenizer.eos_token  # as TransformerLens fills it in
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        prompts.from_texts(model, [LINE], length=4, prepend_bos=True)
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        prompts.random_tokens(model, length=4, prepend_bos=True)
    gpt2 = chat_model(bos_token="<eos>")  # one token for both, by its own settings
    assert prompts.from_texts(gpt2, [LINE], length=4, prepend_bos=True).tokens[0, 0] == 32


def test_a_bos_that_the_tokenizer_adds():
    model = fake_model()
    assert said(lambda: prompts.from_texts(model, [LINE], length=4)) == []
    model.cfg.tokenizer_prepends_bos = True  # as it is on every model that is loaded
    makes = {
        "texts": lambda bos: prompts.from_texts(model, [LINE], length=4, prepend_bos=bos),
        "random": lambda bos: prompts.random_tokens(model, n=2, length=4, prepend_bos=bos),
        "natural": lambda bos: prompts.natural(model, n=2, length=4, prepend_bos=bos),
        "tokens": lambda bos: prompts.from_tokens(model, [[0, 3, 4]] if bos else [[3, 4, 5]]),
    }
    for name, make in makes.items():
        assert said(lambda make=make: make(True)) == [], name
        (message,) = said(lambda make=make: make(False))
        assert "in front of every text, and these prompts have none" in message
    (message,) = said(lambda: prompts.from_tokens(model, [[0, 3, 4], [3, 4, 5]]))
    assert "1 of 2 prompts begin with" in message
    assert any(
        "twice" in m for m in said(lambda: prompts.from_texts(model, [f"<bos> {LINE}"], length=4, prepend_bos=True))
    )


def test_a_tokenizer_that_does_not_fit_the_vocabulary(tmp_path, monkeypatch):
    model, line = chat_model(), "w1 w2 far w3"
    fake_datasets(monkeypatch, lambda *_args, **_kwargs: {"text": [line]})
    path = write(tmp_path / "texts.txt", line)
    for make in (
        lambda: prompts.from_texts(model, [line], length=4),
        lambda: prompts.from_file(model, path, length=4),
        lambda: prompts.from_dataset(model, n=1, length=4),
    ):
        with pytest.raises(InputError, match="must lie in 0..39, and these lie in 3..41; the tokenizer must be the mo"):
            make()
    assert prompts.from_texts(model, [line], length=2).n == 1  # what is cut off does no harm
    small = chat_model(d_vocab=30, bos_token="<eos>")
    assert prompts.random_tokens(small, n=20, length=20).tokens.max() < 30
    for make in (prompts.random_tokens, prompts.natural):
        with pytest.raises(InputError, match="must lie in 0..29"):
            make(small, n=2, length=8, prepend_bos=True)


IDS = [[2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize(
    "tokens",
    [
        *(np.array(IDS, dtype=kind) for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64")),
        *(torch.tensor(IDS, dtype=kind) for kind in (torch.uint8, torch.int32, torch.uint16)),
        [torch.tensor(row) for row in IDS],
        tuple(np.array(row) for row in IDS),
        tuple(map(tuple, IDS)),
        [[np.int64(i) for i in row] for row in IDS],
        torch.tensor(IDS).to_sparse(),
        torch.tensor(IDS).T.contiguous().T,
        {"input_ids": torch.tensor(IDS)},
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', '')}",
)
def test_tokens_in_every_form(model, tokens):
    batch = prompts.from_tokens(model, tokens)
    assert batch.tokens.tolist() == IDS and batch.tokens.dtype == torch.int64
    assert prompts.from_tokens(model, batch).digest() == batch.digest()


@pytest.mark.parametrize(
    "tokens",
    [
        np.array(IDS, dtype="float16"),
        np.array(IDS, dtype=object),
        np.array(IDS, dtype=bool),
        torch.tensor(IDS, dtype=torch.bfloat16),
        torch.tensor(IDS, device="meta"),
        [[True, 4]],
        [[None, 4]],
        [["w1", "w2"]],
        "w1 w2",
        [[10**30, 4]],
        [torch.tensor([2, 3]), torch.tensor([2])],
        [[[2, 3]]],
        torch.zeros(0, 4, dtype=torch.long),
        [[]],
        np.array([[2**64 - 1, 4]], dtype="uint64"),
        None,
        3,
        {"input_ids": IDS, "attention_mask": [[1, 1], [1, 1]]},
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', str(tokens)[:12])}",
)
def test_tokens_in_no_form(model, tokens):
    with pytest.raises(InputError) as error:
        prompts.from_tokens(model, tokens)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**5000, 1.5, "one"], ids=["-1", "2**63", "10**5000", "1.5", "one"])
def test_seeds_that_no_generator_takes(model, seed):
    for make in (prompts.random_tokens, prompts.natural):
        with pytest.raises(InputError, match="^seed .* must be a whole number"):
            make(model, n=2, length=4, seed=seed)


def test_more_random_tokens_than_can_be_held(model):
    with pytest.raises(InputError, match="more than can be held"):
        prompts.random_tokens(model, n=10**12, length=4)


def test_the_default_device_does_not_matter(model):
    expected = (
        prompts.random_tokens(model, n=2, length=4).digest(),
        prompts.natural(model, n=2, length=4, seed=1).digest(),
    )
    torch.set_default_device("meta")
    try:
        found = (
            prompts.random_tokens(model, n=2, length=4).digest(),
            prompts.natural(model, n=2, length=4, seed=1).digest(),
        )
        assert prompts.from_tokens(model, IDS).tokens.tolist() == IDS
    finally:
        torch.set_default_device(None)
    assert found == expected


# --- files


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_text_file(model, tmp_path, newline):
    path = write(tmp_path / "texts.txt", newline.join(["\ufeff" + LINE, "", "w1 w2", "  ", "w9 w8 w7"]))
    batch = prompts.from_file(model, path, length=3)
    assert batch.tokens.tolist() == [[2, 3, 4], [11, 10, 9]]
    assert (batch.source, batch.n_skipped) == ("file:texts.txt", 1)
    assert prompts.from_file(model, str(path), length=3, n=1).n == 1
    with pytest.warns(UserWarning, match="2 of 5 prompts have 3 tokens"):
        prompts.from_file(model, path, length=3, n=5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_file_in_every_encoding(model, tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    path = write(tmp_path / "texts.txt", f"{mark}w1 w2\r\nw3\u2028w4\x0c\rw5\x85w6\n".encode(encoding))
    # A line separator inside a text is a character of it, which is here as good as a space.
    assert prompts.from_file(model, path, length=2).tokens.tolist() == [[3, 4], [5, 6], [7, 8]]


def test_jsonl_file(model, tmp_path):
    rows = [{"text": "w1 w2\nw3", "id": 7}, {"text": "w4"}, {"text": ""}, {"text": LINE}]
    path = write(tmp_path / "texts.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    batch = prompts.from_file(model, path, length=3)
    assert batch.tokens.tolist() == [[3, 4, 5], [2, 3, 4]]
    assert batch.n_skipped == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "a.txt is empty; write one prompt on each line"),
        ("a.txt", " \n\n", "a.txt is empty"),
        ("a.txt", b"w1 \xff\xfe w2", "a.txt is not a UTF-8 text file"),
        ("a.txt", b"w1 w2\x00w3", "a.txt, line 1 has a NUL character"),
        ("a.txt", b"w1 w2\r\nw1 w2\rw\x003", "a.txt, line 3 has a NUL character"),
        ("a.txt", "w1\nna\xefve".encode("latin-1"), "a.txt is not a UTF-8 text file; .* \\(line 2 is not\\)"),
        ("a.txt", b"\xff\xfew\x00\x31", "a.txt is not a UTF-8 text file; save it as"),
        ("x" * 300, None, "There is no file x"),
        ("a.txt", "w1 w2\nw1 w2 w3", "No text in file:a.txt has 4 tokens: the longest has 3; use a length of 3"),
        ("a.jsonl", '{"text": "w1"}\n\n{"text": ', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", '{"body": "w1"}', 'a.jsonl, line 1 has no "text" that is a string'),
        ("a.jsonl", '{"text": 3}', 'a.jsonl, line 1 has no "text"'),
        ("a.jsonl", '"w1"', 'a.jsonl, line 1 has no "text"'),
    ],
)
def test_file_errors(model, tmp_path, name, content, message):
    path = name if content is None else write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        prompts.from_file(model, path, length=4)


def test_file_that_is_no_file(model, bare, tmp_path):
    with pytest.raises(InputError, match="There is no file .*missing.txt; check the path"):
        prompts.from_file(model, tmp_path / "missing.txt")
    with pytest.raises(InputError, match="is a folder; name a text file"):
        prompts.from_file(model, tmp_path)
    with pytest.raises(InputError, match="no tokenizer.*use random_tokens"):
        prompts.from_file(bare, write(tmp_path / "a.txt", LINE))


# --- data sets


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_dataset(model, monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return {"text": ["", "w1", LINE, LINE]}

    fake_datasets(monkeypatch, load)
    batch = prompts.from_dataset(model, n=1, length=4)
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert (batch.tokens.tolist(), batch.n_skipped) == ([[2, 3, 4, 5]], 1)
    assert batch.source == "dataset:wikitext[test]"


def test_dataset_errors(model, monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("no route\nto the hub")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(InputError, match="'wikitext' could not be loaded \\(ConnectionError: no route\\); check"):
        prompts.from_dataset(model)
    fake_datasets(monkeypatch, lambda *_args, **_kwargs: {"body": []})
    with pytest.raises(InputError, match="'mine' could not be loaded \\(KeyError: 'text'\\)"):
        prompts.from_dataset(model, "mine")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install 'sinklens\\[datasets\\]'"):
        prompts.from_dataset(model)


# --- who decides of a BOS, and which prompts are of one text


@pytest.mark.parametrize(("adds", "word", "there"), [(True, "auto", True), (False, "auto", False)])
def test_a_bos_is_the_tokenizers_own_affair_by_default(adds, word, there):
    model = fake_model()
    model.cfg.tokenizer_prepends_bos = adds
    for make in (
        lambda **options: prompts.natural(model, n=2, length=4, **options),
        lambda **options: prompts.random_tokens(model, n=2, length=4, **options),
        lambda **options: prompts.from_texts(model, [LINE], length=4, **options),
    ):
        batch = make()
        assert torch.equal(batch.tokens, make(prepend_bos=word).tokens)
        assert torch.equal(batch.tokens, make(prepend_bos=there).tokens)
        assert (batch.bos, batch.has_bos, bool((batch.tokens[:, 0] == 0).all())) == ("auto", there, there)
        assert make(prepend_bos="always").bos == make(prepend_bos=True).bos == "always"
        assert make(prepend_bos="never").bos == make(prepend_bos=False).bos == "never"


def test_what_is_said_of_a_bos(model):
    said = {word: prompts.from_texts(model, [LINE], length=4, prepend_bos=word) for word in ("auto", "always", "never")}
    assert {word: prompts.bos_text(batch.record()) for word, batch in said.items()} == {
        "auto": "no BOS, as the model's tokenizer does",
        "always": "a BOS in front, as asked for",
        "never": "no BOS, as asked for",
    }
    assert "a BOS in front, as asked for" in repr(said["always"])
    assert prompts.prompts_text(said["auto"].record()) == (
        "1 prompts of 4 tokens: texts; no BOS, as the model's tokenizer does"
    )
    assert prompts.bos_text(prompts.from_tokens(model, [[0, 3, 4]]).record()) == "a BOS in front in the given tokens"
    assert prompts.prompts_text({"prompts": "x", "n_prompts": 2, "length": 3}) == "2 prompts of 3 tokens: x"


def test_a_word_for_the_bos_that_there_is_not(model):
    word: Any = "yes"
    with pytest.raises(InputError, match="must be auto, always \\(True\\) or never \\(False\\), and it is 'yes'"):
        prompts.natural(model, n=2, length=4, prepend_bos=word)


def test_auto_without_such_a_token_is_none(bare):
    assert not prompts.random_tokens(bare, n=2, length=4).has_bos
    model = chat_model()
    model.tokenizer.bos_token = model.tokenizer.eos_token  # as TransformerLens fills it in
    model.cfg.tokenizer_prepends_bos = True
    assert not prompts.from_texts(model, [LINE], length=4).has_bos


def test_passages_are_texts_of_their_own(model):
    batch = prompts.natural(model, n=32, length=8)
    assert (batch.n_groups, batch.is_grouped, batch.groups[0]) == (32, False, "tides")
    assert "n_groups" not in batch.record()
    drawn = prompts.natural(model, n=3, length=8, seed=1)
    assert drawn.groups != batch.groups[:3] and set(drawn.groups) < set(batch.groups)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ([{"group": 1}, {"group": 1}, {"group": "b"}], 2),
        ([{"group": 1, "source": "x"}, {"group": 2, "source": "x"}, {"source": "x"}], 3),
        ([{"source": "x"}, {"source": "y"}, {"source": "x"}], 2),
        ([{"source": "web"}] * 3, 3),  # the name of a corpus
        ([{"group": "one"}, {}, {"group": None}], 3),
        ([{}, {}, {}], 3),
    ],
)
def test_a_file_says_which_prompts_are_of_one_text(model, tmp_path, fields, texts):
    lines = [json.dumps({"text": LINE, **each}) for each in fields]
    batch = prompts.from_file(model, write(tmp_path / "texts.jsonl", "\n".join(lines)), length=4)
    assert (batch.n, batch.n_groups) == (3, texts)
    assert batch.record().get("n_groups", 3) == texts


def test_few_texts_are_told(model):
    (message,) = said(lambda: prompts.from_texts(model, [LINE] * 3, length=4, groups="aab"))
    assert "the 3 prompts are passages of 2 texts, and intervals over so few mean little" in message
    assert said(lambda: prompts.from_texts(model, [LINE] * 3, length=4, groups="abc")) == []
    with pytest.raises(InputError, match="there is none for text 3"):
        prompts.from_texts(model, [LINE] * 3, length=4, groups="ab")


def test_groups_go_with_their_prompts(model):
    texts = ["w1", "w2 w3 w4", "w5 w6 w7", "w1 w2 w3"]
    batch = prompts.from_texts(model, texts, length=3, groups=["short", "a", None, "a"])
    assert batch.groups == ("a", "text 3", "a")
    assert batch.subset([2, 1]).groups == ("a", "text 3") and batch.subset([0, 2]).n_groups == 1
    assert prompts.from_tokens(model, batch).groups == batch.groups
    alone = prompts.from_tokens(model, batch.tokens)
    assert alone.groups == ("0", "1", "2")
    assert alone.digest() != batch.digest()
    assert prompts.from_tokens(model, batch.tokens, groups="xyz").digest() == alone.digest()
    with pytest.raises(InputError, match="one text for each of the 3 prompts, not 2"):
        prompts.from_tokens(model, batch.tokens, groups="xy")


def test_a_data_sets_documents(model, monkeypatch):
    rows = [" = First = \n", LINE, " = = Part = = \n", LINE, " = Second = \n", LINE]
    fake_datasets(monkeypatch, lambda *_args, **_kwargs: {"text": rows, "page": list("xyzxyz")})
    with pytest.warns(UserWarning, match="passages of 2 texts"):
        assert prompts.from_dataset(model, n=3, length=8).groups == ("1", "1", "2")
    assert prompts.from_dataset(model, "mine", n=3, length=8).n_groups == 3
    assert prompts.from_dataset(model, "mine", n=3, length=8, group="page").groups == ("y", "x", "z")
    with pytest.raises(InputError, match="KeyError: 'no'"):
        prompts.from_dataset(model, "mine", n=3, length=4, group="no")


def test_disjoint_sets(model):
    batch = prompts.random_tokens(model, n=7, length=4)
    first, second = batch.disjoint(2, 3)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), batch.tokens[:6])
    assert [each.n for each in batch.disjoint(3)] == [2, 2, 2]
    with pytest.raises(
        InputError, match="3 disjoint sets of 3 prompts need 9, and random_tokens.* has 7 that are long"
    ):
        batch.disjoint(3, 3)


def test_no_text_is_in_two_sets(model):
    tokens = prompts.random_tokens(model, n=7, length=4).tokens
    batch = prompts.from_tokens(model, tokens, groups="aaabbca")
    first, second = batch.disjoint(2, 3)
    assert (first.groups, second.groups) == (tuple("aaa"), tuple("bbc"))
    with pytest.raises(InputError, match="has 7 of 3 texts, no text in two sets, that are long enough"):
        batch.disjoint(3, 2)
