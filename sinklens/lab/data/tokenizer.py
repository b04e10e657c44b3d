"""Tokenizers: characters, one's own BPE, or any of Hugging Face's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sinklens.errors import InputError

BOS, END = "<s>", "<|endoftext|>"
"""What begins a row, and what stands between documents."""


def of_characters(symbols: str) -> PreTrainedTokenizerFast:
    """A token for each symbol, from 1 on, and BOS, which is 0 and put in front of a text; all else becomes a space."""
    core = Tokenizer(models.WordLevel({BOS: 0, **{symbol: i for i, symbol in enumerate(symbols, 1)}}, unk_token=" "))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(f"[^{symbols}]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, clean_up_tokenization_spaces=False)


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (as GPT-2's) of ``size`` tokens; token 0 stands between documents.

    Raises:
        InputError: the texts do not have so many pairs.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != size:
        raise InputError(
            f"the text is too short for a tokenizer of {size} tokens ({core.get_vocab_size()} were found): give more "
            "text, or ask for fewer."
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, clean_up_tokenization_spaces=False)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """One of Hugging Face's, by its name or folder.

    Raises:
        InputError: there is none, it is damaged, or it has no token to put between documents.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except Exception as error:  # whatever is wrong with such files comes up as anything
        raise InputError(
            f"cannot load a tokenizer from {str(name)!r} ({' '.join(str(error).split())[:200]}); give a folder that "
            "holds tokenizer.json, or a Hugging Face id that is cached or reachable."
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise InputError(f"the tokenizer {str(name)!r} has no token to put between documents; give another.")
    return tokenizer


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that is put behind every document."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    assert isinstance(found, int)
    return found


def digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as 16 letters: equal for equal ones."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    text = core.to_str() if core is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
