"""From a Hugging Face model to a `HookedTransformer` or a `TransformerBridge`, with the weights untouched.

`HookedTransformer.from_pretrained` knows its models by name and refuses a local folder or an unknown id, although its
converters only need an architecture. So the config is translated from a scratch copy of the model's own `config.json`,
the weights go through TransformerLens' converter, and nothing is folded or centred. What came out is then compared with
the Hugging Face model on a few tokens: a converter that drops a feature of the architecture gives plausible numbers,
and nothing else would notice.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinklens.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Every block of a HookedTransformer holds rotary tables of n_ctx rows: 128k of them would be gigabytes.
_LONGEST_CONTEXT = 8192
# Largest allowed difference from Hugging Face's logits, in standard deviations of the logits.
_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}


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
) -> Any:
    """A HookedTransformer with the weights of `hf_model`, which is left as it is.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer, or None to work with token tensors.
        name: what the model is called in reports.
        device: where the result lives.
        dtype: the result's dtype.
        devices: CUDA devices over which its blocks are spread, from ``device`` on.

    Raises:
        InputError: TransformerLens has no HookedTransformer for this architecture, or its conversion is wrong.
    """
    # Checked in the dtype that the weights came in: rounding to 16 bits moves a model that has outlier dimensions by
    # more than many a wrong conversion would.
    with _quiet_transformer_lens():
        model = _convert(hf_model, hf_model.dtype)
        _compare(hf_model, model, name)
        if dtype != hf_model.dtype:
            model = _convert(hf_model, dtype)
    model.cfg.model_name = name
    _attach_tokenizer(model, tokenizer)
    model.eval()
    if devices > 1:
        return _spread(model, device, devices)
    return model.to(
        str(device), print_details=False
    )  # as a string: given a torch.device, TransformerLens drops its index


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
) -> Any:
    """A TransformerBridge around `hf_model`, which the bridge takes over: its modules are replaced in place.

    Args:
        hf_model: the Hugging Face model; give a copy to keep yours.
        tokenizer: its tokenizer, or None to work with token tensors.
        name: what the model is called in reports.
        device: where the result lives.
        dtype: the result's dtype.

    Raises:
        InputError: TransformerLens has no adapter for this architecture.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model.set_attn_implementation("eager")  # the only one that computes the pattern which the hooks stand on
    torch.nn.Module.to(hf_model, device)
    for parameter in hf_model.parameters():  # not the buffers: rotary frequencies in bfloat16 would shift positions
        parameter.data = parameter.data.to(dtype)
    hf_model.eval()
    architecture = type(hf_model).__name__
    try:
        with _quiet_transformer_lens():
            model = build_bridge_from_module(
                hf_model, architecture, hf_config=hf_model.config, device=device, model_name=name
            )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"TransformerLens cannot bridge the architecture {architecture} ({_reason(error)})."
        ) from error
    _attach_tokenizer(model, tokenizer)
    _give_weights_to_norms(model)
    model.eval()
    return model


def _give_weights_to_norms(model: Any) -> None:
    """Let norms without a weight (OLMo's) be edited: what a bridge makes of an edit is multiplied by a weight."""
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    for module in model.modules():
        if isinstance(module, NormalizationBridge) and getattr(module.original_component, "weight", None) is None:
            module.weight = 1.0


def _convert(hf_model: PreTrainedModel, dtype: torch.dtype) -> Any:
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer

    architecture = type(hf_model).__name__
    config = _config_for_transformer_lens(hf_model)
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
            state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
            model = HookedTransformer(cfg)
            state = {key: value.to(device="cpu", dtype=dtype) for key, value in state.items()}
            # Not load_and_process_state_dict: with nothing to process, it is this call once per tensor, and slow.
            model.load_state_dict(model.fill_missing_keys(state), strict=False)
    except InputError:
        raise
    except (
        NotImplementedError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        TypeError,
        AssertionError,
    ) as error:
        raise InputError(
            f'HookedTransformer cannot load {architecture} ({_reason(error)}); use backend="bridge" for this model.'
        ) from error
    return model


def _correct_sizes(cfg: Any, config: Any) -> None:
    """Put the model's own sizes where TransformerLens writes an architecture's usual ones."""
    cfg.tokenizer_name = None  # or the constructor looks for a tokenizer in the scratch folder
    if getattr(config, "n_inner", None):  # GPT-2, GPT-J: taken to be four times d_model
        cfg.d_mlp = config.n_inner
    longest = getattr(config, "max_position_embeddings", None)
    if cfg.positional_embedding_type == "rotary" and longest:  # Mistral, Qwen3: taken to be 2048
        cfg.n_ctx = min(longest, _LONGEST_CONTEXT)


def _config_for_transformer_lens(hf_model: PreTrainedModel) -> Any:
    """A copy of the model's config with the fields that TransformerLens reads where transformers used to keep them."""
    config = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]
    if not hasattr(config, "n_ctx") and hasattr(config, "n_positions"):  # GPT-2
        config.n_ctx = config.n_positions
    return config


@torch.no_grad()
def _compare(hf_model: PreTrainedModel, model: Any, name: str) -> None:
    """Refuse a conversion whose logits are not Hugging Face's."""
    tokens = torch.arange(3, 3 + min(8, model.cfg.n_ctx)).remainder(model.cfg.d_vocab)[None]
    was_training = hf_model.training
    hf_model.eval()
    try:
        theirs = hf_model(tokens.to(hf_model.device)).logits.float().cpu()
    finally:
        hf_model.train(was_training)
    if not theirs.isfinite().all():
        return  # the weights are at fault, not their conversion; whoever runs the model will be told
    ours = model(tokens, return_type="logits").float()
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    if not difference <= _TOLERANCE.get(hf_model.dtype, 0.5):  # written so that NaN fails too
        raise InputError(
            f"HookedTransformer computes {name} wrongly (its logits are {difference:.2g} standard deviations from "
            'Hugging Face\'s); use backend="bridge" for this model.'
        )


def _attach_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
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
