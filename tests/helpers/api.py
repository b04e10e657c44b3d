"""The API reference, from the docstrings: `python -m tests.helpers.api build/docs` writes it, a page for every file."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc.render
from pdoc.doc import Module

import sinklens


def write(out: Path) -> None:
    """HTML pages that need no network, an index and a search; files that are there are replaced.

    pdoc itself would leave out what a room does not export, and most of the rooms are no export of the package.
    """
    for name in dir(sinklens):  # pdoc waits for no name that loads on first use
        setattr(sinklens, name, getattr(sinklens, name))
    names = [module.name for module in pkgutil.walk_packages(sinklens.__path__, "sinklens.")]
    modules = {name: Module.from_name(name) for name in ["sinklens", *names] if not name.endswith("__main__")}
    for name, module in modules.items():
        module.submodules = [one for below, one in modules.items() if below.rpartition(".")[0] == name]
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"sinklens {sinklens.__version__}")
    for name, module in modules.items():
        page = out / f"{name.replace('.', '/')}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        # `~sinklens.Study` is a way to write a reference that pdoc does not know.
        page.write_text(pdoc.render.html_module(module, modules).replace("<code>~", "<code>"), encoding="utf-8")
    (out / "index.html").write_text(pdoc.render.html_index(modules), encoding="utf-8")
    (out / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Error parsing type annotation")  # jaxtyping's shapes, shown as written
    write(Path(sys.argv[1]))
