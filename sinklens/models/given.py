"""The Hugging Face model that was given: whether its weights can be taken as they stand, and private copies of it.

A conversion reads parameters. What a model computes with besides them (scales of quantised weights, adapters, hooks,
weights that lie elsewhere) would be lost without a word, so a model that has such things is refused here, with what to
do about it. Everything else works on private copies, whose modules are their own and whose weights are shared, so that
the caller's object keeps its modes, hooks, flags and config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinklens.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_a", "ia3_l", "hada_w1_a", "lokr_w1", "vera_lambda_b")
"""Names that adapters give to their weights."""
_QUANTISERS = (
    *("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "quant_state", "scb"),
    *("_packed_params", "_weight_bias", "gate_up_proj_blocks", "gate_up_proj_scale_inv", "down_proj_scale_inv"),
)
"""Names that quantisers give to what they keep beside a weight."""
_OWN_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")
"""Hooks of transformers itself, which change no value."""


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers that change where or how fast it runs, not what it computes.

    These are ``torch.compile``, `DataParallel` and `DistributedDataParallel`.

    Raises:
        InputError: it is an adapter's wrapper, or a shard.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, nn.Module):
        kind = type(model)
        if isinstance(model, parallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        elif kind.__module__.split(".")[0] == "peft":
            raise InputError(f"{kind.__name__} is {_ADAPTED}")
        elif kind.__name__ == "FullyShardedDataParallel":
            raise InputError("the model is sharded; gather it in one process and give the plain model.")
        else:
            break
    return model


_ADAPTED = (
    "a model with adapters, which a conversion of its weights would leave out; merge them first "
    "(peft: model.merge_and_unload()) and give the result."
)


def check_as_it_stands(hf_model: PreTrainedModel) -> None:
    """Make sure that the model's parameters, with its config, are all that it computes with.

    Raises:
        InputError: they are not; the message says what to do.
    """
    name = type(hf_model).__name__
    architecture_of(hf_model)
    if getattr(hf_model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder with a decoder; sinklens needs a decoder alone, as causal models are.")
    if getattr(hf_model, "main_input_name", "input_ids") != "input_ids":
        raise InputError(f"{name} reads {hf_model.main_input_name}, not tokens; sinklens needs a language model.")
    if getattr(hf_model, "_hf_peft_config_loaded", False):
        raise InputError(f"{name} is {_ADAPTED}")
    for place, module in hf_model.named_modules():
        own = {*module._parameters, *module._buffers, *module._modules, *vars(module)}
        if own.intersection(_ADAPTERS) or type(module).__module__.split(".")[0] == "peft":
            raise InputError(f"{name} is {_ADAPTED}")
        if own.intersection(_QUANTISERS) or type(module).__module__.startswith("torch.ao.nn."):
            raise InputError(_quantised(name, f"{place} is a {type(module).__name__}"))
        hook = next(_hooks_of(module), None)
        if hook is not None:
            raise InputError(
                f"{name} carries a torch hook ({hook} on {place or 'the model'}), which no conversion keeps; remove it "
                "(weight_norm, pruning: make them permanent), and add it to the loaded model as a TransformerLens one."
            )
        replaced = _own_forward(module)
        if replaced is not None and getattr(replaced, "__self__", None) is not module:
            raise InputError(
                f"the forward of {place or name} was replaced on the object by a function that may belong to another "
                "one, which no copy keeps; make it a method of a class of its own."
            )
    for place, parameter in hf_model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"weights of {name} are not in memory ({place} is on the meta device, as offloaded weights are); load "
                "the model without device_map, or with one device that holds all of it."
            )
        if parameter.dtype not in _FLOATS:
            raise InputError(_quantised(name, f"{place} is {str(parameter.dtype).removeprefix('torch.')}"))
        if type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data).__name__
            raise InputError(
                f"{place} of {name} is a {kind}, not a plain tensor; dequantise or gather the weights (for a quantised "
                "model: model.dequantize()) and give the result."
            )


def _own_forward(module: nn.Module) -> Any:
    """A forward that was set on the object and not on its class, without what accelerate and torch.compile add."""
    own = vars(module)
    if "_orig_mod" in module._modules:
        return None
    forward = own.get("_old_forward") if "_hf_hook" in own else own.get("forward")
    return getattr(forward, "_torchdynamo_orig_callable", forward)


def _quantised(name: str, why: str) -> str:
    return (
        f"{name} holds quantised weights ({why}), whose scales a conversion would lose; load it unquantised, or call "
        "model.dequantize() and give the result."
    )


def _hooks_of(module: nn.Module) -> Iterator[str]:
    """Names of hooks that somebody registered on a module."""
    for kind in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for hook in kind.values():
            name = getattr(hook, "__qualname__", type(hook).__name__)
            if not name.endswith(_OWN_HOOKS):
                yield name


def architecture_of(hf_model: PreTrainedModel) -> str:
    """Name of the nearest class of transformers itself, which is what TransformerLens knows architectures by.

    Raises:
        InputError: the model's class derives from none.
    """
    for kind in type(hf_model).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind.__name__
    raise InputError(
        f"{type(hf_model).__name__} derives from no model class of transformers, so its architecture is not known."
    )


def text_config(hf_model: PreTrainedModel) -> Any:
    """The config of the language model, also where it is a part of a larger one."""
    return hf_model.config.get_text_config()


def blocks_name(hf_model: PreTrainedModel) -> str:
    """Name of the list of the model's blocks; empty where it has none that could be told."""
    count = getattr(text_config(hf_model), "num_hidden_layers", None)
    lists = ((name, module) for name, module in hf_model.named_modules() if isinstance(module, nn.ModuleList))
    return next((name for name, module in lists if len(module) == count), "")


def private_copy(
    hf_model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shared: bool = True,
) -> PreTrainedModel:
    """A copy that is free to be changed: in eval mode, with eager attention, without wrappers inside.

    Args:
        hf_model: the model, which is left as it is.
        dtype: what its parameters are cast to; buffers (rotary frequencies) keep theirs.
        device: where its tensors are moved.
        shared: whether weights that need no cast and no move are the model's own memory, not to be written to.

    Raises:
        InputError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for parameter in hf_model.parameters():
            own = parameter.detach().to(dtype=dtype or parameter.dtype, device=device or parameter.device)
            if parameter.is_inference() or (not shared and own.data_ptr() == parameter.data_ptr()):
                own = own.clone()  # tensors that inference mode made stay without a gradient for ever
            memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
        for buffer in hf_model.buffers():
            moved = buffer.detach().to(device=device or buffer.device)
            same = moved.data_ptr() == buffer.data_ptr()
            memo[id(buffer)] = moved.clone() if buffer.is_inference() or (same and not shared) else moved
    kept = list(memo.values())  # a memo's entries are looked up by id, so what they stand for must stay alive
    try:
        copied = copy.deepcopy(hf_model, memo)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"{type(hf_model).__name__} cannot be copied ({' '.join(str(error).split())[:200]})."
        ) from error
    del kept
    _unwrap_inside(copied)
    copied.eval()
    if getattr(copied.config, "quantization_config", None) is not None:
        delattr(copied.config, "quantization_config")  # noqa: B043 -- weights are plain floats; it is declared nowhere
    copied.set_attn_implementation("eager")  # the only one that computes the pattern which the hooks stand on
    return copied


def lose_weights(model: nn.Module) -> None:
    """Let go of a model's weights: their memory is free when nothing else looks at it. Its buffers stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def has_lost_weights(model: nn.Module) -> bool:
    """Whether :func:`lose_weights` has been called on it."""
    return all(parameter.numel() == 0 for parameter in model.parameters())


def _unwrap_inside(model: nn.Module) -> None:
    """Take accelerate's and torch.compile's wrappers off the submodules of a private copy."""
    for module in model.modules():
        own, forward = vars(module), _own_forward(module)
        if "_orig_mod" in module._modules:
            continue
        for name in ("_hf_hook", "_old_forward", "forward"):
            own.pop(name, None)
        if forward is not None and forward.__func__ is not type(module).forward:
            own["forward"] = forward.__func__.__get__(module)
        own.pop("_compiled_call_impl", None)
        for name, child in list(module._modules.items()):
            if child is not None and "_orig_mod" in child._modules:
                module._modules[name] = child._modules["_orig_mod"]
