"""What the library says, in the words of the command line: ``force=True`` is ``--force`` there.

Messages name arguments as Python has them, ``backend="bridge"`` or ``out=``, and often begin with one: ``strength inf
must be ...``. Which of them the command has as options, and how these are called, is read off the command itself; a few
functions stand for an option too, and what only Python can be given is not said.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

OTHERWISE = {"prepend_bos": "bos", "layer": "block", "readout": "metric"}
"""Arguments that have another name as options."""
FUNCTIONS = {
    "choose another folder (out=)": "choose another --out",
    "choose another file (out=)": "choose another --out",
    "bring more prompts with from_file or random_tokens": "bring more prompts with --prompts FILE or --prompts random",
    "use random_tokens or from_tokens": "use --prompts random",
    'leave prepend_bos at "auto" or "never"': "leave --bos at auto or never",
    "needs workers: ": "needs --workers: ",
    "choose engine ray": "choose --engine ray",
    ", or give an Edit": "",
    ", or give a Companion": "",
    ": say which (column=)": ": write the one with the prompts to a file, and give that to --prompts",
    ": sweep it, and give answers": ": sinklens sweep measures it, with --readouts",
    "give the result, or the folder that it is saved in": "give the folder that the result is saved in",
}
"""What is said shorter, or of an option where Python has a function."""
NOUNS = ("block", "event", "layer", "readout")
"""Arguments whose names are words of most messages: ``block 3 is the model's last``."""
_OF_OPTION = re.compile(
    r"(: | must | is empty| is for | ['\"\[(]| -?(\d|inf|nan)| natural can | \S+(:| must | needs | is not ))"
)
"""What follows the name of an option: something that is said of it, or a value."""
_LISTED = re.compile(r" ('[^']*'|\"[^\"]*\"|\[[^]]*\])(: | must | is not (known|in)\b)")
"""What follows the name of one thing of an option's list: a value, and that it is wrong."""
_TUPLE = re.compile(r"\((-?[\d.]+),\)")
"""One number as Python writes it where there may be several."""
_UNEXPECTED = re.compile(r"\w+\.__init__\(\) got an unexpected keyword argument ")
"""What Python says of an option that a variant does not have."""
_LEFT_OUT = re.compile(r"\bleave (\w+)(?: and (\w+))? out\b")
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
    sentence = _UNEXPECTED.sub("it has no option ", _TUPLE.sub(r"\1", sentence))
    sentence = _LEFT_OUT.sub(lambda found: _left_out(found, flags), _subject(sentence, flags))
    return _ARGUMENT.sub(lambda found: _option(found, flags), sentence)


def _option(found: re.Match[str], flags: Mapping[str, str]) -> str:
    name, _, value = found.groups()
    if name not in flags:
        return found[0]
    return flags[name] if value in (None, "True") else f"{flags[name]} {value}"


def _left_out(found: re.Match[str], flags: Mapping[str, str]) -> str:
    """``leave compile out``; of several arguments those that the command has."""
    options = [flags[name] for name in found.groups() if name in flags]
    return f"leave {' and '.join(options)} out" if options else found[0]


def _subject(sentence: str, flags: Mapping[str, str]) -> str:
    """``min_gap -1 must be ...``, ``edit 'none' is not known``: the argument that a sentence begins with, or one of the
    things that it lists, unless it may be a word of English.
    """
    (name,) = re.findall(r"\A\w*", sentence)
    rest = sentence.removeprefix(name)
    if name in flags:
        words = _LISTED if name in NOUNS else _OF_OPTION
        return flags[name] + rest if words.match(rest) or ("_" in name and rest.startswith(" ")) else sentence
    listed = flags.get(f"{name}s")
    return listed + rest if listed is not None and _LISTED.match(rest) else sentence
