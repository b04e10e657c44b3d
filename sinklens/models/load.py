"""Models: `load_model`, the registry of models that have a short name, and one view of both TransformerLens backends.

A model is always float weights exactly as published: nothing is folded or centred, so a neuron or a norm weight here is
the one in the checkpoint. Text is tokenised as the model's own tokenizer does it; in particular no BOS is prepended
that the tokenizer would not prepend itself, because an extra first token is an extra sink.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinklens.errors import InputError
from sinklens.models import smollm2 as _smollm2
from sinklens.models.backends import attach_tokenizer, has_hooked_transformer, to_bridge, to_hooked
from sinklens.models.given import blocks_name, check_as_it_stands, has_lost_weights, unwrapped
from sinklens.models.state import in_usual_state
from sinklens.records.registry import check_kind, enter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sinklens.models.decoder import Decoder

logger = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX = "model.safetensors.index.json"
_OLD_BUFFERS = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias")
"""Ends of names of masks and tables that old versions of transformers wrote into checkpoints."""
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
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]] | None = None
    """Gives the Hugging Face model and its tokenizer, fetching them if need be; None where there is a folder."""
    find: Callable[[], Path | None] = lambda: None
    """Where the weights are on this machine, or None; touches neither the network nor the file's contents."""
    folder: Path | None = None
    """Of a decoder that sinklens trained, in place of both."""

    def __post_init__(self) -> None:
        if (self.load is None) is (self.folder is None):
            raise ValueError("a model with a short name has either load= or the folder= of a decoder.")


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
    check_kind("a model", source, ModelSource)
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


def _trained(name: str, attention: str) -> ModelSource:
    """A small model in the package, which sinklens trained."""
    return ModelSource(
        name=name,
        title=name,
        description=f"1.2M parameters, 5 blocks, trained by sinklens on technical documentation with {attention}",
        source="in the package (2.4 MB)",
        licence="Apache-2.0",
        folder=Path(__file__).parent.parent / "data" / name,
    )


register_model(_trained("tiny-sink", "softmax attention"))
register_model(_trained("tiny-normed", "head-wise RMSNorm, all else as in tiny-sink"))


def list_models() -> list[ModelListing]:
    """The registered models, and where each is on this machine."""
    return [ModelListing(s.name, s.description, s.source, s.licence, s.folder or s.find()) for s in REGISTRY.values()]


@in_usual_state
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
            HF_HUB_OFFLINE is set), with a revision as ``id@revision``, or a Hugging Face model object, which is left as
            it is. Weights must be safetensors; nothing is unpickled and no remote code is run.
        device: "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        backend: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge, or "auto" for a HookedTransformer
            where TransformerLens has a correct one (3.x, most architectures), else a bridge. Patches take about as
            long on either, where the packed pass knows the architecture.
        tokenizer: overrides the tokenizer that comes with the model: an object, a local folder or a Hugging Face id.
        devices: GPUs over which the blocks are spread, one part after the other, for models that are larger than one.

    Returns:
        A HookedTransformer or a TransformerBridge in eval mode, with all that TransformerLens gives it, or the decoder
        in a folder that sinklens trained; the type that the functions here ask for, `sinklens.models.Model`, is what
        they have in common. `tokenizer` is None on it where the model has none; token tensors still work.

    Raises:
        InputError: the model is unknown or damaged, the device or dtype is not available, or the backend cannot load
            it.
    """
    target, precision = find_device(device), _dtype(dtype)
    if backend not in ("auto", "hooked", "bridge"):
        raise InputError(f'unknown backend {backend!r}; choose "auto", "hooked" or "bridge".')
    if (folder := _decoder_folder(model)) is not None:
        return _decoder(folder, target, precision, backend, tokenizer, devices)
    if backend == "hooked" and not has_hooked_transformer():
        raise InputError('this TransformerLens has no HookedTransformer (it ended with 3.x); use backend="bridge".')
    with _quiet_loading(), _plain_torch():
        hf_model, own_tokenizer, name = _resolve(model, precision)
        check_as_it_stands(hf_model)
        chosen = own_tokenizer if tokenizer is None else _tokenizer(tokenizer)
        options: dict[str, Any] = {"name": name, "device": target, "dtype": precision}
        # What we read from files is ours to take apart; the user's object, or what a registered function gives, is not.
        read = isinstance(model, (str, Path)) and model not in REGISTRY
        if devices != 1:
            _check_devices(devices, target, backend)
            return to_hooked(hf_model, chosen, **options, devices=devices, take=read)
        if backend != "bridge" and has_hooked_transformer():
            try:
                return to_hooked(hf_model, chosen, **options, take=read)
            except InputError as error:
                if backend == "hooked":
                    raise
                logger.warning("using a TransformerBridge: %s", str(error).split(";")[0])
                if has_lost_weights(hf_model):
                    hf_model = _resolve(model, precision)[0]
        # A bridge keeps what we loaded for it; the user's object stays by itself.
        loaded = to_bridge(hf_model, chosen, **options, take=isinstance(model, (str, Path)))
        if not any(".attn." in point for point in loaded.hook_dict):
            raise InputError(f"{type(hf_model).__name__} has no attention, and so no sink: give another model.")
        return loaded


def _decoder_folder(model: object) -> Path | None:
    """The folder of the decoder that is meant; None where another model is."""
    if isinstance(model, str) and model in REGISTRY:
        return REGISTRY[model].folder
    folder = Path(model).expanduser() if isinstance(model, (str, Path)) else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # which is said where other models are read
    from sinklens.models.decoder import is_decoder_config

    return folder if is_decoder_config(config) else None


def _decoder(
    folder: Path,
    target: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    devices: int,
) -> Decoder:
    if backend != "auto" or devices != 1:
        raise InputError(
            f"{folder} holds a decoder that sinklens trained, which is neither HookedTransformer nor bridge and runs "
            "on one device: leave backend and devices out."
        )
    from sinklens.models.decoder import load_decoder

    own = folder if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None
    given = own if tokenizer is None else tokenizer
    with _quiet_loading(), _plain_torch():
        decoder = load_decoder(folder, dtype)
        attach_tokenizer(decoder, None if given is None else _tokenizer(given))
    return decoder.to(target)


def _resolve(
    model: str | Path | PreTrainedModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """The Hugging Face model, its tokenizer, and the name to report."""
    if isinstance(model, str) and model in REGISTRY:
        source = REGISTRY[model]
        assert source.load is not None  # one with a folder has been loaded from it
        return *source.load(), source.title
    if isinstance(model, (str, Path)):
        path = Path(model).expanduser()
        if isinstance(model, Path) or path.is_dir() or str(model).startswith((".", "/", "~")):
            return *_from_folder(path, dtype), path.resolve().name
        return *_from_hub(model, dtype), model
    from transformers import PreTrainedModel

    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"load_model takes a name, a folder or a Hugging Face model, not a {type(model).__name__}.")
    return model, None, str(model.config.name_or_path or type(model).__name__)


def _from_folder(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not a folder"
        raise InputError(f"{path} {what}; give a folder written by save_pretrained, or one of: {', '.join(REGISTRY)}.")
    if (path / "adapter_config.json").exists():
        raise InputError(
            f"{path} holds adapters beside a model; merge them (peft: model.merge_and_unload()), save the result and "
            "give its folder."
        )
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path} has no .safetensors weights, and sinklens never unpickles others; save the model as safetensors."
        )
    _check_index(path / _INDEX)
    loaded = _from_pretrained(str(path), dtype)
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    return loaded, _tokenizer(path) if has_tokenizer else None


def _check_index(index: Path, *, beside: bool = True) -> None:
    """Make sure that an index of weights, where there is one, points to safetensors and to nothing else.

    Args:
        index: the file.
        beside: whether the weights have to be there already, in the same folder.
    """
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({_sentence(error)}); save the model again.") from error
    for name in sorted(map(str, files)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index} points to {name!r}, which is no safetensors file beside it, and sinklens never unpickles; "
                "save the model as safetensors."
            )
        if beside and not (index.parent / name).is_file():
            raise InputError(f"{index} points to {name!r}, which is not there; fetch or save the model again.")


def _from_hub(given: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from transformers.utils.hub import cached_file

    name, _, revision = given.partition("@")
    revision = revision or "main"
    with _others_errors(f"cannot load the model {given!r}", _what_to_give()):
        index = cached_file(name, _INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index:
        _check_index(Path(index), beside=False)
    loaded = _from_pretrained(name, dtype, revision)
    try:
        return loaded, _tokenizer(name, revision)
    except InputError as error:
        logger.warning("%s is used without a tokenizer: %s", name, error)
        return loaded, None


def _from_pretrained(name: str, dtype: torch.dtype, revision: str = "main") -> PreTrainedModel:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    given = name if revision == "main" else f"{name}@{revision}"
    with _others_errors(f"cannot load the model {given!r}", _what_to_give()):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise InputError(
                f"{name} holds quantised weights ({method or 'of an unknown method'}), whose scales a conversion would "
                "lose; load it with transformers, call model.dequantize() and give the result, or the "
                "folder that it is saved in."
            )
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(
                f"{name} is a {config.model_type}, of which transformers has no model that predicts the next token; "
                "sinklens needs a causal language model."
            )
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # said in our own words below
        both: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, **options)
    loaded, said = both
    _check_complete(name, loaded, said)
    return loaded


def _check_complete(name: str, loaded: PreTrainedModel, said: dict[str, Any]) -> None:
    """Refuse weights that do not fit the config: transformers makes up what is missing, and drops what is left over.

    What is left over is an error where it belongs to a part that the model has (a bias or a scale of a layer, an
    adapter, a block), and is only mentioned where it is a part of its own (a value head).
    """
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(str(key[0] if isinstance(key, (tuple, list)) else key) for key in said.get(kind) or ()):
            what = "are missing in" if kind == "missing_keys" else "have other shapes in"
            raise InputError(
                f"{len(keys)} weights of the architecture {what} the checkpoint {name} ({keys[0]} is one), and "
                "transformers would make them up; give the config that belongs to the weights."
            )
    left = sorted(map(str, said.get("unexpected_keys") or ()))
    modules, inside = dict(loaded.named_modules()), blocks_name(loaded)
    for key in left:
        owner = next((part for part in _parts_of(key) if part in modules), "")
        of_a_part = f"{owner}.".startswith(f"{inside}.") or not any(True for _ in modules[owner].children())
        if of_a_part and not key.endswith(_OLD_BUFFERS):
            raise InputError(
                f"the checkpoint {name} has weights that its config leaves unused ({key} is one of {len(left)}), so "
                "what is computed is not the model that was trained; give the config that belongs to the weights, or "
                "for adapters and quantised weights the merged or dequantised model."
            )
    if left:
        logger.warning("%d weights of %s are no part of the model and are left out (%s, ...)", len(left), name, left[0])


def _parts_of(key: str) -> Iterator[str]:
    """``a.b`` and ``a`` of ``a.b.weight``."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase, revision: str = "main") -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer

    with _others_errors(f"cannot load a tokenizer from {str(tokenizer)!r}", "give another with tokenizer=."):
        return AutoTokenizer.from_pretrained(str(tokenizer), revision=revision, trust_remote_code=False)


def _what_to_give() -> str:
    return (
        f"give a registered name ({', '.join(REGISTRY)}), a local folder with config.json and safetensors weights, or "
        "a Hugging Face id that is cached or reachable."
    )


@contextmanager
def _others_errors(what: str, cure: str) -> Iterator[None]:
    """One sentence for whatever other packages raise on files of which anything may be wrong.

    All that is broken in a config or a tokenizer comes up as whatever Python raises where it is first noticed, and the
    tokenizers package raises bare exceptions and a panic, so nothing narrower would do.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what} ({_sentence(error)}); {cure}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({_sentence(error)}); {cure}") from error


def find_device(device: str | torch.device) -> torch.device:
    """The device of a name, or of "auto".

    Raises:
        InputError: it is not there.
    """
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
def _plain_torch() -> Iterator[None]:
    """Torch as it is when nothing is set: a model is made and compared in float32, on the CPU, with full precision.

    Inference mode is left, or the model could never be differentiated; nor is it loaded in what autocast makes of it.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


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
