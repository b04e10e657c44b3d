"""What a function takes from files and from the process while it runs: nothing tells whether that will be the same.

A function of a package is known by the name that it has there, whatever the user calls it: ``from torch import load as
x``. Of what is called on something that is not known before (``path.read_text()``) there is but the name.

Pitfall: it is told by names. A package's function that reads a file and does not say so is not seen.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from sinklens.records.callables import Read, is_library

_READS = re.compile(
    r"(^|_)(load|read|open|connect|download|memmap)(_(?!state_dict)|$)"  # np.load, pq.read_pandas, safe_open
    r"|^(loadtxt|genfromtxt|loadmat|loadarff)$|^(imread|mmread|mminfo|readsav|urlopen|urlretrieve|popen|fdopen)$"
    r"|^scan_|^from_(file|pretrained|url|uri|disk)$|^from(file|regex)$"
    r"|^(input_stream|memory_map|environb?|getenvb?|argv|import_module|__import__)$"
    r"|^(listdir|scandir|exists|isfile|isdir|getmtime|getsize)$"
    r"|File(IO)?$|^(HDFStore|ParquetDataset)$"
)
"""Names of a package's functions and classes that say that it reads from outside."""
_MODULES = {"subprocess", "socket", "requests", "httpx", "sqlite3", "linecache", "fileinput", "shelve", "dbm", "glob"}
"""Modules all of whose functions do."""
_PYTHONS = {"eval", "exec", "compile", "globals", "open", "input", "__import__"}
"""Python's own."""
_METHODS = {
    *("environ", "getenv", "argv", "import_module"),
    *("open", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt", "load_file", "safe_open"),
    *("read_csv", "read_table", "read_json", "read_pickle", "read_parquet", "read_feather", "read_excel"),
    *("read_pandas", "read_hdf", "loadmat", "load_npz", "mmread", "imread", "urlopen"),
    *("from_pretrained", "load_dataset", "iterdir", "readline", "readlines"),
}
"""Names of methods of what is not known before."""


def reads_outside(module: str, name: str) -> bool:
    """Whether a package's function or class of that name takes something from a file or from the process.

    Args:
        module: where it is written.
        name: its name there, with that of its class in front.
    """
    root, last = module.partition(".")[0], name.rpartition(".")[2]
    if root == "sinklens":  # whose functions also read options and tables
        return re.match(r"load_|from_file$|from_pretrained$", last) is not None
    if root in _MODULES or (module, last) == ("sys", "modules"):
        return True
    if root == "builtins" and last in _PYTHONS:
        return True
    return is_library(module) and _READS.search(last) is not None


def outside_of(read: Read, modules: Iterable[str]) -> str | None:
    """What a function takes from files or from the process while it runs, so far as its names alone tell.

    Args:
        read: its names.
        modules: modules of packages of which any name may be used.
    """
    named = {name for name in read.names if may_read(name)}
    for module in modules:
        known = sys.modules.get(module)
        used = read.names if known is None else (read.names | read.texts) & vars(known).keys()
        named |= {name for name in used if reads_outside(module, name)}
    return min(named, default=None)


def may_read(name: str) -> bool:
    """Whether a name is one that nothing else has than what reads from outside, whatever it is looked up in."""
    return name in _METHODS
