"""A loaded model compared with the Hugging Face model that it was made from.

A conversion that drops a feature of the architecture gives plausible numbers, and nothing else would notice. So logits
and the attention patterns of every block are compared, position by position, on random tokens that reach past every
window and chunk of the config. Three things make it a sharp test:

- it is made in float32, also where weights or the model asked for are in 16 bits, whose rounding would hide a dropped
  bias. A model too large for a float32 copy has its first blocks compared so, at least one of each kind, and is
  compared as a whole, and block by block, in its own precision.
- windows longer than a short prompt are shortened on both sides, in a copy.
- rotary frequencies are compared by themselves: a short prompt hardly turns the slow ones, which are the ones that
  long-context scaling changes.

Pitfall: what only shows beyond these prompts, such as a rotary scaling that switches on at a length, cannot be seen
here, and has to be known (see `check_no_switch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinklens.errors import InputError
from sinklens.models.given import blocks_name, private_copy, text_config
from sinklens.models.view import has_hook, hook_points_kept, hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Largest difference in float32: of logits in their standard deviations, of attention as it is."""
SMALL = 2 << 30
"""Bytes of float32 weights up to which a model is compared as a whole in float32."""
_LENGTH = 24
_SHORT_WINDOW = 10
_LONGEST = 600
_VOCABULARY = 1024
"""Rows of the embedding that the first blocks of a large model are compared with."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "chunk_size")
"""Names of windows and chunks in configs and on modules."""


class DifferenceError(Exception):
    """A loaded model is not the one that was given; the message is a part of a sentence, what is different."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What a model computes on some tokens."""

    logits: Float[Tensor, "pos d_vocab"]
    """Logits in float32, on the CPU."""
    patterns: dict[int, Float[Tensor, "head query key"]]
    """Attention by block, in float32, on the CPU; blocks that show none are left out."""
    states: tuple[Float[Tensor, "pos d_model"], ...] = ()
    """The residual stream in front of each block, in the model's precision, where that was asked for."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A private float32 copy to compare with, and the prompt to do it on."""

    model: PreTrainedModel
    """The copy; it has the given model's weights, all of them or those of its first blocks."""
    tokens: Int[Tensor, "1 pos"]
    """The prompt, longer than every window of the copy."""
    whole: bool
    """Whether the copy has all blocks."""
    windows: dict[str, int]
    """The given model's windows where the copy's are shorter; empty where they are the same."""

    @property
    def as_given(self) -> bool:
        """Whether the copy computes what the given model does in float32."""
        return self.whole and not self.windows


# --- What to compare -------------------------------------------------------------------------------------------------


def probe(hf_model: PreTrainedModel) -> Probe:
    """A copy of ``hf_model`` that is small enough to be compared in float32, where its weights lie, with a prompt.

    Raises:
        InputError: the model cannot be copied.
    """
    count = sum(parameter.numel() for parameter in hf_model.parameters())
    whole = 4 * count <= SMALL
    copied = _with_floats(hf_model) if whole else _first_blocks(hf_model)
    windows = windows_of(copied)
    longest = max(windows.values(), default=0)
    if longest > _LONGEST or longest * count > 5e10:
        _shorten(copied, windows)
        longest = _SHORT_WINDOW
    else:
        windows = {}
    limit = context_of(copied.config) or _LONGEST
    length = min(max(_LENGTH if whole else _LENGTH // 2, longest + 8), limit)
    return Probe(copied, prompt(copied, length), whole, windows)


def prompt(hf_model: PreTrainedModel, length: int) -> Int[Tensor, "1 pos"]:
    """Random tokens from the whole vocabulary, the same ones every time."""
    size = _rows(hf_model.get_input_embeddings())
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(min(3, size - 1), size, (1, length), generator=generator, device="cpu")


def _rows(embedding: Any) -> int:
    return int(embedding.weight.shape[0])


def context_of(config: Any) -> int | None:
    """Length of a model's context by its config; None where nothing limits it."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    return next((size for name in names if isinstance(size := getattr(config, name, None), int) and size > 0), None)


def windows_of(hf_model: PreTrainedModel) -> dict[str, int]:
    """Windows and chunks of the config that are shorter than its context, by name."""
    config, limit = text_config(hf_model), context_of(hf_model.config)
    found = {name: getattr(config, name, None) for name in _WINDOWS}
    return {
        name: size
        for name, size in found.items()
        if isinstance(size, int) and not isinstance(size, bool) and 0 < size < (limit or size + 1)
    }


def _shorten(copied: PreTrainedModel, windows: dict[str, int]) -> None:
    """Make the windows of a private copy short, in its config and wherever a module has a copy of them."""
    config = text_config(copied)
    for name in windows:
        setattr(config, name, _SHORT_WINDOW)
    for module in copied.modules():
        for name, size in windows.items():
            if vars(module).get(name) == size:
                setattr(module, name, _SHORT_WINDOW)


def _with_floats(hf_model: PreTrainedModel) -> PreTrainedModel:
    places = {parameter.device for parameter in hf_model.parameters()}
    together = next(iter(places)) if len(places) == 1 else "cpu"  # several: as device_map leaves it
    return private_copy(hf_model, dtype=torch.float32, device=together)


def _first_blocks(hf_model: PreTrainedModel) -> PreTrainedModel:
    """The first blocks in float32, as many as it takes to have one of each kind (two at least), with fewer tokens.

    The first ones and not some, because rules of a config such as "every fourth block" count from the start.
    """
    copied = private_copy(hf_model)
    config = text_config(copied)
    name = blocks_name(copied)
    if not name:
        raise InputError(f"{type(hf_model).__name__} has no list of blocks, so a part of it cannot be compared.")
    blocks: Any = copied.get_submodule(name)
    kinds = [_kind(block, config, index) for index, block in enumerate(blocks)]
    keep = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    sizes = [4 * sum(p.numel() for p in block.parameters()) for block in blocks]
    while keep > 1 and sum(sizes[:keep]) > 3 * SMALL:
        keep -= 1
    copied.set_submodule(name, nn.ModuleList(list(blocks)[:keep]))
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(kinds):
            setattr(config, key, value[:keep])
    config.num_hidden_layers = keep
    _fewer_tokens(copied)
    return _with_floats(copied)


def _kind(block: nn.Module, config: Any, index: int) -> tuple[Any, ...]:
    types = getattr(config, "layer_types", None) or ()
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return (types[index] if index < len(types) else None, shapes)


def _fewer_tokens(copied: PreTrainedModel) -> None:
    """Cut the embedding of a private copy, and the unembedding with it."""
    embedding: Any = copied.get_input_embeddings()
    head: Any = copied.get_output_embeddings()
    size = _rows(embedding)
    if size <= _VOCABULARY or head is None or getattr(head, "weight", None) is None:
        return
    cut: dict[int, nn.Parameter] = {}
    for module in (embedding, head):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape[0] == size:
                shorter = nn.Parameter(parameter.detach()[:_VOCABULARY], requires_grad=False)
                module._parameters[name] = cut.setdefault(id(parameter), shorter)
        for attribute in ("num_embeddings", "out_features"):
            if getattr(module, attribute, None) == size:
                setattr(module, attribute, _VOCABULARY)
    embedding.padding_idx = None
    text_config(copied).vocab_size = _VOCABULARY


# --- Looking at both -------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(hf_model: PreTrainedModel, tokens: Int[Tensor, "1 pos"], *, states: bool = False) -> Sight:
    """What a Hugging Face model computes; give a private copy, on which this leaves hooks.

    Args:
        hf_model: the model.
        tokens: the prompt.
        states: whether to keep the residual stream.

    Raises:
        InputError: the model cannot be run.
    """
    at = next(hf_model.parameters()).device
    try:
        options = {"output_attentions": True, "output_hidden_states": states, "use_cache": False}
        output = hf_model(input_ids=tokens.to(at), **options)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(f"{type(hf_model).__name__} itself does not run on tokens ({_reason(error)}).") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise InputError(f"{type(hf_model).__name__} gives no logits by token; sinklens needs a language model.")
    attentions = getattr(output, "attentions", None) or ()
    shown = {layer: one[0].float().cpu() for layer, one in enumerate(attentions) if isinstance(one, Tensor)}
    patterns: dict[int, Tensor] = {layer: one for layer, one in shown.items() if one.ndim == 3}
    # Weights that are not finite make patterns of NaN everywhere, which is another fault.
    if any(bool((one.triu(1) > 0).any()) for one in patterns.values() if one.shape[-1] == one.shape[-2]):
        raise InputError(f"{type(hf_model).__name__} attends to later tokens too; sinklens needs a causal model.")
    kept: tuple[Tensor, ...] = tuple(one[0].cpu() for one in output.hidden_states or ()) if states else ()
    return Sight(logits[0].float().cpu(), patterns, kept)


@torch.no_grad()
def look_loaded(model: Any, tokens: Int[Tensor, "1 pos"], layers: list[int]) -> Sight:
    """What a HookedTransformer or TransformerBridge computes: what its hooks of the pattern show, in ``layers``.

    Raises:
        DifferenceError: it does not run, or a hook of the pattern acts more than once or not at all in a pass.
    """
    at = next(model.parameters()).device
    try:
        with hook_points_kept(model):
            shown: dict[int, list[Tensor]] = {layer: [] for layer in layers if has_hook(model, _pattern(layer))}
            with hooked(model, [(_pattern(layer), _keeps(seen)) for layer, seen in shown.items()]):
                logits = model(tokens.to(at), return_type="logits")
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise DifferenceError(f"it does not run: {_reason(error)}") from error
    for layer, seen in shown.items():
        if len(seen) != 1:
            raise DifferenceError(f"block {layer} shows {len(seen)} attention patterns in one pass instead of one")
    return Sight(logits[0].float().cpu(), {layer: seen[0][0].float().cpu() for layer, seen in shown.items()})


def _pattern(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def _keeps(seen: list[Tensor]) -> Any:
    def hook(pattern: Tensor, hook: Any) -> None:  # noqa: ARG001 -- TransformerLens passes it by name
        seen.append(pattern.detach().clone())

    return hook


# --- Judging ---------------------------------------------------------------------------------------------------------


def check_same(model: Any, theirs: Sight, tokens: Int[Tensor, "1 pos"], *, tolerance: float = TOLERANCE) -> None:
    """Make sure that ``model``, in float32, computes ``theirs``.

    Raises:
        DifferenceError: it does not.
    """
    if not theirs.logits.isfinite().all():
        return  # the weights are at fault, not their conversion; whoever runs the model will be told
    ours = look_loaded(model, tokens, list(theirs.patterns))
    if ours.logits.shape != theirs.logits.shape:
        shapes = " instead of ".join(str(tuple(one.logits.shape)) for one in (ours, theirs))
        raise DifferenceError(f"its logits have the shape {shapes}")
    off = (ours.logits - theirs.logits).abs().max().item()
    worst, what, place = off / _spread(theirs.logits), "logits", -1
    for layer, pattern in ours.patterns.items():
        if pattern.shape != theirs.patterns[layer].shape:
            raise DifferenceError(f"its attention in block {layer} has the shape {tuple(pattern.shape)}")
        off = (pattern - theirs.patterns[layer]).abs().max().item()
        if not off <= tolerance:  # written so that NaN fails too; the first wrong block says more than the logits
            worst, what, place = off, "attention", layer
            break
    if not worst <= tolerance:
        if what == "logits":
            raise DifferenceError(f"its logits are {worst:.2g} standard deviations from Hugging Face's")
        raise DifferenceError(f"its attention in block {place} is up to {worst:.2g} from Hugging Face's")


def _spread(values: torch.Tensor) -> float:
    """What differences are measured by: the standard deviation; a share of their size, of values that are all the same.

    An unembedding that is still zero, as many begin training with, gives such logits.
    """
    wide = values.float()
    return max(wide.std().item(), 1e-4 * wide.abs().max().item()) or 1.0


@torch.no_grad()
def check_rotary(model: Any, hf_model: PreTrainedModel) -> None:
    """Make sure that a HookedTransformer turns queries and keys at the speeds of ``hf_model``, both in float32.

    Raises:
        DifferenceError: it does not.
    """
    speeds = [
        buffer for name, buffer in hf_model.named_buffers() if name.endswith("inv_freq") and "original" not in name
    ]
    known = {tuple(sorted(one.float().flatten().tolist())) for one in speeds}
    for layer, block in enumerate(model.blocks):
        sin, cos = getattr(block.attn, "rotary_sin", None), getattr(block.attn, "rotary_cos", None)
        if not known or sin is None or cos is None or sin.shape[0] < 2:
            continue
        turned = torch.atan2(sin[1].float(), cos[1].float()).cpu().sort().values[::2]  # every speed is there twice
        if not any(len(one) == len(turned) and torch.allclose(turned, torch.tensor(one), rtol=1e-4) for one in known):
            cast = {str(one.dtype).removeprefix("torch.") for one in speeds} - {"float32"}
            why = f", which a cast of the model has rounded to {cast.pop()}" if cast else ""
            raise DifferenceError(f"block {layer} turns queries and keys at other speeds than Hugging Face's{why}")


def check_no_switch(hf_model: PreTrainedModel) -> None:
    """Make sure that the rotary embeddings do not change with the length of the prompt.

    Raises:
        DifferenceError: they do.
    """
    scaling = getattr(text_config(hf_model), "rope_parameters", None) or {}
    nested = [one for one in scaling.values() if isinstance(one, dict)] if isinstance(scaling, dict) else []
    for one in nested or [scaling]:
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind in ("dynamic", "longrope"):
            raise DifferenceError(f"its rotary scaling ({kind}) depends on the length of the prompt")


@torch.no_grad()
def check_in_precision(model: Any, given: Sight, exact: Sight | None, tokens: Int[Tensor, "1 pos"]) -> None:
    """Make sure that ``model`` computes what the given model does, up to the rounding of its dtype.

    Args:
        model: the loaded model.
        given: what the given model computes, if need be in another precision.
        exact: what it computes in float32, where that is known; its own rounding is then the measure.
        tokens: the prompt.

    Raises:
        DifferenceError: it does not.
    """
    if not given.logits.isfinite().all():
        return
    weight = next(model.parameters())
    ours = look_loaded(model, tokens, list(given.patterns))
    if ours.logits.shape != given.logits.shape:
        raise DifferenceError(f"its logits have the shape {tuple(ours.logits.shape)}")
    allowed = 0.3
    if exact is not None:
        in_float32 = weight.dtype == torch.float32
        # On a GPU, TF32 may be on.
        allowed = (0.002 if weight.is_cpu else 0.01) if in_float32 else 0.02 + 3 * _off(given.logits, exact.logits)
    off = _off(ours.logits, (exact or given).logits)
    if not off <= allowed:  # written so that NaN fails too
        kind = str(weight.dtype).removeprefix("torch.")
        raise DifferenceError(f"in {kind} its logits are {off:.2g} standard deviations from Hugging Face's")


def can_check_blocks(model: Any, given: Sight) -> bool:
    """Whether the residual stream in front of every block is known, and finite."""
    return len(given.states) == len(model.blocks) + 1 and all(state.isfinite().all() for state in given.states)


def check_blocks(model: Any, given: Sight) -> None:
    """Make sure of every block of a HookedTransformer by itself: what it adds to the given model's residual stream.

    A model that is too large for float32 is compared so, because in 16 bits the rounding of all blocks together hides
    what is wrong in one. It is one forward pass of the model, a block at a time.

    Raises:
        DifferenceError: a block adds something else, or does not run in this dtype.
    """
    try:
        _check_blocks(model, given)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise DifferenceError(f"it does not run: {_reason(error)}") from error


@torch.no_grad()
def _check_blocks(model: Any, given: Sight) -> None:
    count = len(model.blocks)
    weight = next(model.parameters())
    precise = {weight.dtype, given.states[0].dtype} == {torch.float32}
    allowed, eps = (1e-3, 1e-6) if precise else (0.1, 2 * torch.finfo(weight.dtype).eps)
    for layer, (before, after) in enumerate(pairwise(given.states[:-1])):
        entered = before[None].to(next(model.blocks[layer].parameters()).device, weight.dtype)
        left = model(entered, start_at_layer=layer, stop_at_layer=layer + 1)[0]
        theirs, ours = after.float() - before.float(), left.float().cpu() - entered[0].float().cpu()
        off = (ours - theirs).norm(dim=-1) / (theirs.norm(dim=-1) + 1e-30)
        if not (off <= allowed + eps * before.float().norm(dim=-1) / (theirs.norm(dim=-1) + 1e-30)).all():
            raise DifferenceError(f"what its block {layer} adds is up to {off.max().item():.2g} of itself off")
    # After the last block transformers keeps the normed residual stream, so that block is seen in the logits.
    entered = given.states[-2][None].to(next(model.blocks[-1].parameters()).device, weight.dtype)
    logits = model(entered, start_at_layer=count - 1, return_type="logits")[0].float().cpu()
    if not _off(logits, given.logits) <= allowed / 2:
        raise DifferenceError(f"its last block gives logits {_off(logits, given.logits):.2g} standard deviations off")


def _off(ours: Tensor, theirs: Tensor) -> float:
    """Root of the mean squared difference, in standard deviations."""
    return (ours - theirs).square().mean().sqrt().item() / _spread(theirs)


@torch.no_grad()
def check_same_weights(model: Any, reference: Any) -> None:
    """Make sure that a model in 16 bits has the weights of ``reference``, which was compared in float32.

    Parameters are matched by name; those of blocks that ``reference`` does not have are left out.

    Raises:
        DifferenceError: it does not.
    """
    known = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        if (other := known.get(name)) is not None and other.shape == weight.shape:
            rounded = other.to(
                weight.device, model.cfg.dtype
            ).float()  # experts stay float32, with rounded values in them
            off = ((weight.float() - rounded).abs().max() / rounded.abs().max().clamp_min(1e-30)).item()
            if not off <= 2 * torch.finfo(model.cfg.dtype).eps:
                raise DifferenceError(f"its weight {name} is not the one that was given")


@torch.no_grad()
def check_same_settings(model: Any, reference: Any, *, tables: bool = True) -> None:
    """Make sure that a model computes with the same settings as ``reference``, which was compared in float32: numbers
    and functions of every module and of the config, and tables such as masks and rotary cosines.

    In 16 bits a scale that is slightly off hides in the rounding of the logits. Modules are matched by name.

    Args:
        model: the model.
        reference: the one that was compared, in another dtype, or with fewer blocks.
        tables: whether the tables are the same; not where the reference has shorter windows.

    Raises:
        DifferenceError: it does not.
    """
    known = dict(reference.named_modules())
    pairs = [("config", model.cfg, reference.cfg)]
    pairs += [(name, module, known[name]) for name, module in model.named_modules() if name in known]
    for name, ours, theirs in pairs:
        for key, value in vars(ours).items():
            other = vars(theirs).get(key, value)
            number = isinstance(value, float) and isinstance(other, float) and value != other
            named = isinstance(value, FunctionType | BuiltinFunctionType) and not key.startswith("_")
            if number or (named and _title(value) != _title(other)):
                raise DifferenceError(f"its {key} of {name or 'the model'} is another one than in float32")
    held = dict(reference.named_buffers()) if tables else {}
    for name, table in model.named_buffers():
        other = held.get(name)
        if other is not None and other.shape == table.shape:
            eps = torch.finfo(table.dtype).eps if table.is_floating_point() else 0.0
            if not torch.allclose(table.float(), other.float().to(table.device), rtol=2 * eps, atol=2 * eps):
                raise DifferenceError(f"its table {name} is another one than in float32")


def _title(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def check_same_windows(model: Any, reference: Any, windows: dict[str, int]) -> None:
    """Make sure that a HookedTransformer has the windows for which ``reference`` was compared with shorter ones.

    Raises:
        DifferenceError: it does not.
    """
    if not windows:
        return
    cfg, short = model.cfg, reference.cfg
    same = bool(cfg.use_local_attn) == bool(short.use_local_attn)
    shared = min(cfg.n_layers, short.n_layers)
    types = list(cfg.attn_types or [])[:shared] == list(short.attn_types or [])[:shared]
    if not (same and types and (not cfg.use_local_attn or cfg.window_size in windows.values())):
        raise DifferenceError(f"its window is not the {' or '.join(map(str, windows.values()))} tokens of the config")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
