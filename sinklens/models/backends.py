"""From a Hugging Face model to a `HookedTransformer` or a `TransformerBridge`, with the weights untouched.

`HookedTransformer.from_pretrained` knows its models by name and refuses a local folder or an unknown id, although its
converters only need an architecture. So the config is translated from a scratch copy of the model's own `config.json`,
the weights go through TransformerLens' converter, and nothing is folded or centred. What came out, of this and of a
bridge alike, is compared with the Hugging Face model (`sinklens.models.compare`) before anybody gets it.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinklens.errors import InputError
from sinklens.models import compare
from sinklens.models.given import architecture_of, lose_weights, private_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def has_hooked_transformer() -> bool:
    """Whether the installed TransformerLens still has HookedTransformer (3.x has, 4.x has not); imports nothing."""
    spec = importlib.util.find_spec("transformer_lens")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "HookedTransformer.py").is_file() for folder in folders or [])


def to_hooked(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    devices: int = 1,
    take: bool = False,
) -> Any:
    """A HookedTransformer with the weights of `hf_model`, which is left as it is.

    Tensors are converted one after the other, from the device where they lie to the one where they are to be, and what
    is compared is compared where the given weights lie.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer, or None to work with token tensors.
        name: what the model is called in reports.
        device: where the result lives.
        dtype: the result's dtype.
        devices: CUDA devices over which its blocks are spread, from ``device`` on.
        take: whether `hf_model` may lose its weights (see :func:`~sinklens.models.given.lose_weights`).

    Raises:
        InputError: TransformerLens has no HookedTransformer for this architecture, or its conversion is wrong.
    """
    probe = compare.probe(hf_model)
    theirs = compare.look(probe.model, probe.tokens)
    reference = _reference(hf_model, probe, theirs, device, dtype)
    with _quiet_transformer_lens(), _says_wrong("HookedTransformer", name, 'use backend="bridge" for this model.'):
        compare.check_no_switch(probe.model)
        checked = _convert(probe.model, torch.float32, _place_of(probe.model))
        compare.check_rotary(checked, probe.model)
        compare.check_same(checked, theirs, probe.tokens)
        if dtype == torch.float32 and probe.as_given:
            model = checked
        else:
            copied = private_copy(hf_model)
            if take:
                lose_weights(hf_model)
            model = _convert(copied, dtype, device if devices == 1 else torch.device("cpu"))
            compare.check_same_weights(model, checked)
            compare.check_same_windows(model, checked, probe.windows)
            compare.check_same_settings(model, checked, tables=not probe.windows)
        model.eval()
        model.cfg.model_name = name
        attach_tokenizer(model, tokenizer)
        model = _spread(model, device, devices) if devices > 1 else _moved(model, device)
        if not probe.whole and compare.can_check_blocks(model, reference):
            compare.check_blocks(model, reference)
        elif model is not checked or device != _place_of(probe.model):
            compare.check_in_precision(model, reference, theirs if probe.as_given else None, probe.tokens)
    return model


def _place_of(model: Any) -> torch.device:
    """The device of a model, or of a copy that has lost its weights."""
    return next(model.parameters()).device


def _moved(model: Any, device: torch.device) -> Any:
    return model.to(str(device), print_details=False)  # given a torch.device, TransformerLens drops its index


def _reference(
    hf_model: PreTrainedModel, probe: compare.Probe, theirs: compare.Sight, device: torch.device, dtype: torch.dtype
) -> compare.Sight:
    """What the given model computes in the precision that was asked for; a large one in its own, where it is."""
    if probe.as_given and dtype == torch.float32:
        return theirs
    if probe.whole:
        return compare.look(private_copy(hf_model, dtype=dtype, device=device), probe.tokens)
    spread = len({parameter.device for parameter in hf_model.parameters()}) > 1  # as device_map leaves it
    return compare.look(private_copy(hf_model, device="cpu" if spread else None), probe.tokens, states=True)


@contextmanager
def _says_wrong(backend: str, name: str, cure: str) -> Iterator[None]:
    """Makes a sentence of what a comparison found."""
    try:
        yield
    except compare.DifferenceError as error:
        raise InputError(f"{backend} computes {name} wrongly ({error}); {cure}") from error


def _spread(model: Any, device: torch.device, devices: int) -> Any:
    """The blocks on several devices, as HookedTransformer's own forward pass expects them: in parts of equal number.

    ``move_model_modules_to_device`` goes by free memory instead, and the two need not agree.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    first = torch.device(device.type, device.index or 0)
    model.cfg.device, model.cfg.n_devices = str(first), devices
    for name, module in model.named_children():
        if name == "blocks":
            for index, block in enumerate(module):
                torch.nn.Module.to(block, get_device_for_block_index(index, model.cfg))
        else:
            at_end = name in ("ln_final", "unembed", "hook_final")
            torch.nn.Module.to(module, torch.device(first.type, first.index + (devices - 1) * at_end))
    return model


def to_bridge(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    take: bool = False,
) -> Any:
    """A TransformerBridge around `hf_model`, or around a copy of it.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer, or None to work with token tensors.
        name: what the model is called in reports.
        device: where the result lives.
        dtype: the result's dtype.
        take: whether the result may use the memory of `hf_model`'s weights; without, `hf_model` stays independent.

    Raises:
        InputError: TransformerLens has no adapter for this architecture, or its adapter is wrong.
    """
    probe = compare.probe(hf_model)
    theirs = compare.look(probe.model, probe.tokens)
    reference = _reference(hf_model, probe, theirs, device, dtype)
    cure = "give a model of another architecture, or look whether a newer transformer-lens has it right."
    with _quiet_transformer_lens(), _says_wrong("TransformerBridge", name, cure):
        checked = _build_bridge(probe.model, name)
        compare.check_same(checked, theirs, probe.tokens)
        model = _build_bridge(private_copy(hf_model, dtype=dtype, device=device, shared=take), name)
        compare.check_same_weights(model, checked)
        compare.check_same_settings(model, checked, tables=False)  # which grow with the prompts that were run
        del checked
        compare.check_in_precision(model, reference, theirs if probe.as_given else None, probe.tokens)
    model.cfg.n_ctx = compare.context_of(hf_model.config) or model.cfg.n_ctx  # MPT: taken to be 2048
    attach_tokenizer(model, tokenizer)
    _give_weights_to_norms(model)
    model.eval()
    return model


def _build_bridge(hf_model: PreTrainedModel, name: str) -> Any:
    """A bridge around a private copy, which it takes apart."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = architecture_of(hf_model)
    device = next(hf_model.parameters()).device
    options = {"hf_config": hf_model.config, "device": device, "model_name": name}
    try:
        adapt = _own_adapter(hf_model, architecture)
        return build_bridge_from_module(hf_model, architecture, post_adapter_hook=adapt, **options).eval()
    except (
        ValueError,
        LookupError,
        NotImplementedError,
        AttributeError,
        RuntimeError,
        TypeError,
        AssertionError,
    ) as error:
        raise InputError(
            f"TransformerLens cannot bridge the architecture {architecture} ({_reason(error)})."
        ) from error


def _own_adapter(hf_model: PreTrainedModel, architecture: str) -> Callable[[Any], None] | None:
    """What puts TransformerLens' adapter of an architecture right, where a version of it is wrong; None elsewhere.

    Cohere turns neighbouring dimensions together, and its tables of cosines have every entry twice in a row.
    TransformerLens 3.9 takes them for tables of two equal halves. It can turn neighbours, from tables of halves, so
    that is what it is given. (4.3 has an option of its own for this.)
    """
    if architecture not in ("CohereForCausalLM", "Cohere2ForCausalLM"):
        return None

    def adapt(adapter: Any) -> None:
        if not getattr(adapter.cfg, "rotary_interleaved_cos_sin", False):
            adapter.cfg.rotary_adjacent_pairs = True
            inner: Any = hf_model.model
            inner.rotary_emb = _InHalves(inner.rotary_emb)

    return adapt


class _InHalves(torch.nn.Module):
    """Rotary tables with every entry twice in a row, as tables of two equal halves."""

    def __init__(self, tables: torch.nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([table[..., ::2], table[..., ::2]], -1) for table in self.tables(*args, **kwargs))


def _give_weights_to_norms(model: Any) -> None:
    """Let norms without a weight (OLMo's) be edited: what a bridge makes of an edit is multiplied by a weight."""
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    for module in model.modules():
        if isinstance(module, NormalizationBridge) and getattr(module.original_component, "weight", None) is None:
            norm: Any = module.original_component
            if "weight" in norm._parameters:  # torch's own norm, which takes tensors only
                some = next(model.parameters())
                del norm._parameters["weight"]
                norm.weight = torch.ones(norm.normalized_shape, dtype=some.dtype, device=some.device)
            else:
                module.weight = 1.0


def _convert(copied: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Any:
    """A HookedTransformer on ``device``, made from a private copy, which loses its weights one after the other."""
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer

    architecture = architecture_of(copied)
    config = _config_for_transformer_lens(copied)
    try:
        with tempfile.TemporaryDirectory(prefix="tl-") as folder, torch.no_grad():
            if any(word in folder.lower() for word in ("llama", "gemma")):
                # TransformerLens takes the architecture from such a word anywhere in the path, before reading the
                # config.
                raise InputError(
                    f"the temporary folder {folder} misleads TransformerLens; set TMPDIR to one without that word."
                )
            config.save_pretrained(folder)
            cfg = loading.get_pretrained_model_config(
                folder, hf_cfg=config.to_dict(), device="cpu", dtype=dtype, default_prepend_bos=False
            )
            _correct_sizes(cfg, config)
            state = loading.get_pretrained_state_dict(folder, cfg, copied, dtype=dtype)
            state = {key: value.detach() for key, value in state.items()}  # no parameters, which are to be emptied
            lose_weights(copied)
            # Nothing is written to its weights, so they take no memory.
            model = HookedTransformer(cfg)
            _fill(model, state, dtype, device)
            if cfg.positional_embedding_type == "alibi":
                model.pos_embed.W_pos.zero_()  # unused and never written: what was in memory would be in the digest
    except InputError:
        raise
    except (
        NotImplementedError,
        ValueError,
        LookupError,
        AttributeError,
        RuntimeError,
        TypeError,
        AssertionError,
    ) as error:
        raise InputError(
            f'HookedTransformer cannot load {architecture} ({_reason(error)}); use backend="bridge" for this model.'
        ) from error
    return _moved(model, device)  # with what is no weight


def _fill(model: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Put new tensors on ``device`` in place of the model's own, and empty ``state``, most of which is views of others.

    Entries are rounded to ``dtype``, and held in the dtype that TransformerLens gives the weight: experts in float32.
    """
    held = model.state_dict()
    model.fill_missing_keys({key: held.get(key) for key in state})  # says what weight is missing
    filled = {}
    while state:
        key, value = state.popitem()
        like = held.get(key, value)
        filled[key] = torch.empty(value.shape, dtype=like.dtype, device=device).copy_(value.to(dtype))
    model.load_state_dict(filled, strict=False, assign=True)


def _correct_sizes(cfg: Any, config: Any) -> None:
    """Put the model's own sizes where TransformerLens writes an architecture's usual ones."""
    cfg.tokenizer_name = None  # or the constructor looks for a tokenizer in the scratch folder
    if getattr(config, "n_inner", None):  # GPT-2, GPT-J: taken to be four times d_model
        cfg.d_mlp = config.n_inner
    longest = compare.context_of(config)
    if longest and cfg.positional_embedding_type in ("rotary", "alibi"):  # Mistral, Qwen3: taken to be 2048
        cfg.n_ctx = longest  # tables of rotary embeddings grow with the prompts


def _config_for_transformer_lens(hf_model: PreTrainedModel) -> Any:
    """A copy of the model's config with the fields that TransformerLens reads where transformers used to keep them."""
    config = copy.deepcopy(hf_model.config)
    config.architectures = [architecture_of(hf_model)]
    if not hasattr(config, "n_ctx") and hasattr(config, "n_positions"):  # GPT-2
        config.n_ctx = config.n_positions
    return config


def attach_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the model a tokenizer that encodes text as the model's own does.

    TransformerLens' own setter loads a second tokenizer with `add_bos_token=True`, from the name that the first one
    carries, which fails for a tokenizer that came from a GGUF file or an object. Its two settings are made here
    instead.
    """
    model.cfg.default_prepend_bos = False
    if tokenizer is None:
        model.tokenizer = None
        return
    tokenizer = copy.deepcopy(tokenizer)  # the special tokens below are filled in on our copy, not on the user's object
    tokenizer.padding_side = "right"
    fallback = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None and fallback is not None:
        tokenizer.pad_token = fallback
    if tokenizer.bos_token is None and fallback is not None:
        tokenizer.bos_token = fallback
    model.tokenizer = tokenizer  # once: a bridge takes a second assignment through TransformerLens' own setter
    encoded = tokenizer.encode("a")
    prepends = len(encoded) > 1 and encoded[0] in (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None))
    model.cfg.tokenizer_prepends_bos = prepends
    model.cfg.default_prepend_bos = prepends


@contextmanager
def _quiet_transformer_lens() -> Iterator[None]:
    """TransformerLens does not announce the end of HookedTransformer in here; all other warnings stay."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        yield


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
