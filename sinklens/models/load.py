"""Models: `load_model`, the registry of models that have a short name, and one view of both TransformerLens backends.

A model is always float weights exactly as published: nothing is folded or centred, so a neuron or a norm weight here is
the one in the checkpoint. Text is tokenised as the model's own tokenizer does it; in particular no BOS is prepended
that the tokenizer would not prepend itself, because an extra first token is an extra sink.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinklens.errors import InputError
from sinklens.models import smollm2 as _smollm2
from sinklens.models.backends import has_hooked_transformer, to_bridge, to_hooked
from sinklens.records.registry import enter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class ModelSource:
    """A model with a short name."""

    name: str
    """The short name that `load_model` takes."""
    title: str
    """The model's full name, as reports give it."""
    description: str
    """One line for `sinklens models`."""
    source: str
    """Where the weights come from."""
    licence: str
    """SPDX identifier of the weights' licence."""
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]
    """Gives the Hugging Face model and its tokenizer, fetching them if need be."""
    find: Callable[[], Path | None]
    """Where the weights are on this machine, or None; touches neither the network nor the file's contents."""


@dataclass(frozen=True)
class ModelListing:
    """One row of `sinklens models`."""

    name: str
    """The short name."""
    description: str
    """One line about the model."""
    source: str
    """Where the weights come from."""
    licence: str
    """SPDX identifier of the weights' licence."""
    path: Path | None
    """Where the weights are on this machine; None when they would have to be fetched."""


REGISTRY: dict[str, ModelSource] = {}


def register_model(source: ModelSource) -> None:
    """Give a model a short name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
    enter(REGISTRY, "a model", source.name, source)


register_model(
    ModelSource(
        name="smollm2",
        title=f"{_smollm2.HF_NAME} (Q4_1)",
        description="SmolLM2-135M-Instruct, 30 blocks, Llama architecture, dequantised from 4 bits to float32",
        source=f"the GGUF file in the wheel {_smollm2.REQUIREMENT} (92 MB)",
        licence="Apache-2.0",
        load=_smollm2.load,
        find=_smollm2.find_gguf,
    )
)


def list_models() -> list[ModelListing]:
    """The registered models, and where each is on this machine."""
    return [ModelListing(s.name, s.description, s.source, s.licence, s.find()) for s in REGISTRY.values()]


def load_model(
    model: str | Path | PreTrainedModel = "smollm2",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    backend: Backend = "auto",
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    devices: int = 1,
) -> Any:
    """Load a model for use with every other function here, its weights exactly as published.

    Args:
        model: a registered name (`list_models`), a local folder, a Hugging Face id (cached copies only when
            HF_HUB_OFFLINE is set), or a Hugging Face model object, which is left as it is. Weights must be safetensors;
            nothing is unpickled and no remote code is run.
        device: "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        backend: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge, or "auto" for a HookedTransformer
            where TransformerLens has a correct one (3.x, most architectures), else a bridge. A HookedTransformer can
            resume a forward pass in the middle, so patching is faster on it.
        tokenizer: overrides the tokenizer that comes with the model: an object, a local folder or a Hugging Face id.
        devices: GPUs over which the blocks are spread, one part after the other, for models that are larger than one.

    Returns:
        A HookedTransformer or a TransformerBridge in eval mode, with all that TransformerLens gives it; the type that
        the functions here ask for, `sinklens.models.Model`, is what the two have in common. `tokenizer` is None on it
        where the model has none; token tensors still work.

    Raises:
        InputError: the model is unknown or damaged, the device or dtype is not available, or the backend cannot load
            it.
    """
    target, precision = _device(device), _dtype(dtype)
    if backend not in ("auto", "hooked", "bridge"):
        raise InputError(f'unknown backend {backend!r}; choose "auto", "hooked" or "bridge".')
    if backend == "hooked" and not has_hooked_transformer():
        raise InputError('this TransformerLens has no HookedTransformer (it ended with 3.x); use backend="bridge".')
    with _quiet_loading():
        hf_model, own_tokenizer, name = _resolve(model, precision)
        chosen = own_tokenizer if tokenizer is None else _tokenizer(tokenizer)
        options: dict[str, Any] = {"name": name, "device": target, "dtype": precision}
        if devices != 1:
            _check_devices(devices, target, backend)
            return to_hooked(hf_model, chosen, **options, devices=devices)
        if backend != "bridge" and has_hooked_transformer():
            try:
                return to_hooked(hf_model, chosen, **options)
            except InputError as error:
                if backend == "hooked":
                    raise
                logger.warning("using a TransformerBridge: %s", str(error).split(";")[0])
        # A bridge takes its model apart. One that we loaded is ours to give; the user's object is not.
        return to_bridge(hf_model if isinstance(model, (str, Path)) else copy.deepcopy(hf_model), chosen, **options)


def _resolve(
    model: str | Path | PreTrainedModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """The Hugging Face model, its tokenizer, and the name to report."""
    if isinstance(model, str) and model in REGISTRY:
        source = REGISTRY[model]
        return *source.load(), source.title
    if isinstance(model, (str, Path)):
        path = Path(model).expanduser()
        if isinstance(model, Path) or path.is_dir() or str(model).startswith((".", "/", "~")):
            return *_from_folder(path, dtype), path.resolve().name
        return *_from_hub(model, dtype), model
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(f"load_model takes a name, a folder or a Hugging Face model, not a {type(model).__name__}.")
    return model, None, str(model.config.name_or_path or type(model).__name__)


def _from_folder(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not a folder"
        raise InputError(f"{path} {what}; give a folder written by save_pretrained, or one of: {', '.join(REGISTRY)}.")
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path} has no .safetensors weights, and sinklens never unpickles others; save the model as safetensors."
        )
    loaded = _from_pretrained(str(path), dtype)
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    return loaded, _tokenizer(path) if has_tokenizer else None


def _from_hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    loaded = _from_pretrained(name, dtype)
    try:
        return loaded, _tokenizer(name)
    except InputError as error:
        logger.warning("%s is used without a tokenizer: %s", name, error)
        return loaded, None


def _from_pretrained(name: str, dtype: torch.dtype) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        known = ", ".join(REGISTRY)
        raise InputError(
            f"cannot load the model {name!r} ({_sentence(error)}); give a registered name ({known}), a local folder "
            "with config.json and safetensors weights, or a Hugging Face id that is cached or reachable."
        ) from error


def _tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"cannot load a tokenizer from {str(tokenizer)!r} ({_sentence(error)}).") from error


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f'unknown device {str(device)!r}; choose "auto", "cpu" or "cuda".') from error
    if target.type == "mps":
        raise InputError(
            "mps is refused: TransformerLens gives silently wrong numbers there on some torch versions; use cpu."
        )
    if target.type not in ("cpu", "cuda"):
        raise InputError(f'sinklens runs on cpu and cuda, not on {target.type}; choose "auto", "cpu" or "cuda".')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= count:
        raise InputError(f"device {str(device)!r} is not there ({count} CUDA devices found); use cpu or auto.")
    return target


def _check_devices(devices: int, target: torch.device, backend: Backend) -> None:
    if backend == "bridge" or not has_hooked_transformer():
        raise InputError("only a HookedTransformer can be spread over several devices; use one device.")
    found = torch.cuda.device_count() if target.type == "cuda" else 0
    if not 1 <= devices <= found - (target.index or 0):
        raise InputError(f"{devices} devices were asked for, but {found} CUDA devices can be used; ask for fewer.")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    precision = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if precision not in _DTYPES.values():
        raise InputError(f"unknown dtype {str(dtype)!r}; choose {', '.join(_DTYPES)}.")
    assert precision is not None
    return precision


def _sentence(error: BaseException) -> str:
    """The first sentence of somebody else's long error message."""
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".")[:200] or type(error).__name__


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Transformers' progress bars only where someone is watching, and no diary of the hub's retries."""
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub.utils._http")
    hub_level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)  # what came of the retries is in the error that we raise

    hide = not sys.stderr.isatty() and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logger.setLevel(hub_level)
        if hide:
            transformers_logging.enable_progress_bar()
