"""What the library says, in the words of the command line: ``force=True`` is ``--force`` there.

Messages name arguments as Python has them, ``backend="bridge"`` or ``out=``. Which of them the command has as options,
and how these are called, is read off the command itself; a few functions stand for an option too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

OTHERWISE = {"prepend_bos": "bos", "layer": "block"}
"""Arguments that have another name as options."""
FUNCTIONS = {
    "choose another folder (out=)": "choose another --out",
    "choose another file (out=)": "choose another --out",
    "bring more prompts with from_file or random_tokens": "bring more prompts with --prompts FILE or --prompts random",
    "use random_tokens or from_tokens": "use --prompts random",
    'leave prepend_bos at "auto" or "never"': "leave --bos at auto or never",
}
"""What is said shorter, or of an option where Python has a function."""
_ARGUMENT = re.compile(r"""(?<![\w./?&-])(\w+)=(?:(["']?)([\w.:-]*\w)\2)?""")


_FLAGS: ContextVar[Mapping[str, str] | None] = ContextVar("options of the command that runs", default=None)


@contextlib.contextmanager
def words_of(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside, messages are told in the words of a command with these parameters (typer's)."""
    # The longest way of writing an option, by the argument's name.
    flags = {str(one.name): max(one.opts, key=len) for one in parameters if one.opts[0].startswith("-")}
    token = _FLAGS.set(flags | {name: flags[other] for name, other in OTHERWISE.items() if other in flags})
    try:
        yield
    finally:
        _FLAGS.reset(token)


def in_own_words(sentence: str) -> str:
    """A message of the library as the command that runs would say it; as it is where none does."""
    flags = _FLAGS.get()
    if flags is None:
        return sentence
    for python, written in FUNCTIONS.items():
        sentence = sentence.replace(python, written)
    return _ARGUMENT.sub(lambda found: _option(found, flags), _subject(sentence, flags))


def _option(found: re.Match[str], flags: Mapping[str, str]) -> str:
    name, _, value = found.groups()
    if name not in flags:
        return found[0]
    return flags[name] if value in (None, "True") else f"{flags[name]} {value}"


def _subject(sentence: str, flags: Mapping[str, str]) -> str:
    """``min_gap -1 must be ...``: an argument that the sentence begins with, unless it may be a word of English."""
    first, _, rest = sentence.partition(" ")
    return f"{flags[first]} {rest}" if "_" in first and rest and first in flags else sentence
