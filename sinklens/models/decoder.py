"""A small decoder to be trained with variants of attention: Llama's blocks, with TransformerLens's names for all of it.

    resid_mid  = resid_pre + W_O(variant(norm(resid_pre)))        RMSNorm, rotary positions, grouped heads if asked for
    resid_post = resid_mid + W_out(silu(x W_gate) * (x W_in)),    x = norm(resid_mid)

Hook points, parameters and config have the names and axes that a HookedTransformer has, so that everything which works
on one works here; there is one more, ``attn.hook_aggregated``, in front of what a variant does to a head's output, of
which ``attn.hook_z`` is the end: what W_O reads. With :class:`~sinklens.variants.softmax.Softmax` it is Hugging Face's
Llama.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from sinklens.errors import InputError
from sinklens.models.decoder_config import SAVED, DecoderConfig
from sinklens.models.decoder_parts import Block, Embed, RMSNorm, Unembed
from sinklens.variants import REGISTRY, variant_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURE = "SinklensDecoder"
"""What the config of a saved decoder says that it is."""
WEIGHTS = "model.safetensors"
"""Name of the file with its weights."""


class Decoder(HookedRootModule):
    """The decoder.

    Args:
        cfg: its sizes and plan.
        tokenizer: its tokenizer, or None to work with token tensors.
        seed: of its weights (:func:`initialise`).

    Raises:
        InputError: the config's variant is unknown or does not fit.
    """

    def __init__(self, cfg: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        self.token = nn.Parameter(torch.empty(cfg.d_model)) if variant_kind(cfg.variant).sink_token else None
        self.blocks: Any = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg, self.embed)
        initialise(self, seed)
        self.setup()

    def forward(
        self,
        x: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        return_type: Literal["logits", "loss"] | None = "logits",
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor | None:
        """A forward pass.

        Args:
            x: tokens; or the residual stream that enters block ``start_at_layer``.
            return_type: ``logits [batch pos d_vocab]``, the ``loss`` (mean cross-entropy of every next token, in
                nats), or None for nothing.
            start_at_layer: block to start with.
            stop_at_layer: block to stop in front of; then the residual stream there is returned.

        Raises:
            InputError: the loss is asked for without tokens.
        """
        if return_type not in ("logits", "loss", None):
            raise InputError(f'return_type must be "logits", "loss" or None, not {return_type!r}.')
        tokens, first = x, start_at_layer or 0
        if return_type == "loss" and start_at_layer is not None:
            raise InputError("the loss is that of tokens: give them, without start_at_layer.")
        resid = self.hook_embed(self.embed(x)) if start_at_layer is None else x
        for block, token in zip(self.blocks[first:stop_at_layer], self._tokens(first), strict=False):
            resid = block(resid, token)
        if stop_at_layer is not None:
            return resid
        if return_type is None:
            self.ln_final(resid)  # its hook points are part of a pass
            return None
        logits = self.unembed(self.ln_final(resid))
        return logits if return_type == "logits" else next_token_loss(logits, tokens)

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """What ``to``, ``cuda``, ``double`` and the like do; the config says afterwards what they have done."""
        super()._apply(fn, recurse)
        weight = self.embed.W_E
        self.cfg.device, self.cfg.dtype = str(weight.device), weight.dtype
        return self

    def described(self) -> dict[str, Any]:
        """What a file keeps of its sizes and plan."""
        return self.cfg.saved()

    def stepped(self) -> None:
        """To be called behind every step of training; see :meth:`sinklens.Variant.stepped`."""
        for block in self.blocks:
            block.attn.variant.stepped()  # type: ignore[union-attr, operator]

    def sink_stream(self, layer: int) -> Float[Tensor, "d_model"] | None:
        """The learned token's normed input of block ``layer``; None where the variant has no such token."""
        token = next(self._tokens(layer))
        return None if token is None else self.blocks[layer]._before(1, token)  # type: ignore[operator]

    def _tokens(self, first: int) -> Iterator[Float[Tensor, "d_model"] | None]:
        """The learned token's stream in front of each block from ``first`` on."""
        token = self.token
        for layer, block in enumerate(self.blocks):
            if layer >= first:
                yield token
            token = None if token is None else block.of_token(token)  # type: ignore[operator]

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch pos"],
        max_new_tokens: int = 20,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        do_sample: bool | None = None,
        stop_at_eos: bool = False,
        use_past_kv_cache: bool = False,  # noqa: ARG002
        verbose: bool = False,  # noqa: ARG002
        return_type: Literal["tokens", "input"] = "tokens",
    ) -> Int[Tensor, "batch longer"]:
        """Tokens with more behind them, one after the other, without a cache: hooks see the whole sequence each time.

        Args:
            tokens: what to go on from.
            max_new_tokens: how many to add.
            temperature: of sampling; 0 takes the likeliest.
            seed: of sampling.
            do_sample: whether to sample, at a temperature of 1 where none is given; by default as ``temperature`` says.
            stop_at_eos: cannot be done.
            use_past_kv_cache: there is none, and the tokens are the same with one.
            verbose: there is nothing to tell.
            return_type: tokens it is.

        Raises:
            InputError: text instead of tokens, or for text, or a stop at the end of a text.
        """
        if not isinstance(tokens, Tensor) or return_type not in ("tokens", "input") or stop_at_eos:
            raise InputError(
                "a model that sinklens trained goes on from tokens, to as many tokens as are asked for: give it tokens "
                '(model.tokenizer(text, return_tensors="pt").input_ids), stop_at_eos=False and return_type="tokens"'
            )
        if do_sample is not None:
            temperature = (temperature or 1.0) if do_sample else 0.0
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]
            if temperature:
                chances = (logits / temperature).softmax(-1).cpu()
                new = torch.multinomial(chances, 1, generator=generator).to(tokens)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
        return tokens


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of every next token, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def initialise(model: Decoder, seed: int, sd: float = 0.02) -> None:
    """Weights to start training from: normal with ``sd``, W_O and W_out with ``sd / sqrt(2 n_layers)`` (GPT-2's).

    Each parameter has a draw of its own, that goes by its name: two variants of one seed start from the same weights
    wherever both have them. What a variant brings is drawn as it says (``drawn``), or has been set by it.
    """
    for name, weight in model.named_parameters():
        kind = name.rpartition(".")[2]
        own = variant_kind(model.cfg.variant).drawn if ".variant." in name else None
        if kind == "w" if own is None else kind not in own:
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(key)
        deep = own is None and kind in ("W_O", "W_out")
        size = sd / (2 * model.cfg.n_layers) ** 0.5 if deep else sd if own is None else own[kind]
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * size)


# --- Files -----------------------------------------------------------------------------------------------------------


def save_decoder(model: Decoder, folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``, which is there.

    What of it may be read by others: ``model.safetensors``, by the names of the parameters, and of what else a variant
    keeps (its persistent buffers).
    """
    from sinklens.records.files import write_json, write_tensors

    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    write_json(folder / "config.json", {"architectures": [ARCHITECTURE], **model.described()})
    write_tensors(folder / WEIGHTS, weights)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def is_decoder_config(config: object) -> bool:
    """Whether a ``config.json`` is that of a saved decoder."""
    return isinstance(config, dict) and config.get("architectures") == [ARCHITECTURE]


def load_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    """A decoder, without its tokenizer, from a folder that :func:`save_decoder` wrote.

    Raises:
        InputError: the files are damaged, do not belong together, or need a variant that is not known here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (absent := [name for name in SAVED if name not in config]) != []:
        raise InputError(f"{folder / 'config.json'} does not say {absent[0]}; save the model again.")
    if config["variant"] not in REGISTRY:
        where = config.get("variant_from", "the file that registers it")
        raise InputError(
            f"{folder} was trained with the variant {config['variant']!r}, which is not known here: import {where}, "
            "which calls register_variant, before you load the model (models bring no code with them)."
        )
    try:
        model = Decoder(_config_of(config))
        weights = load_file(folder / WEIGHTS)
        own = model.state_dict()
        if set(own) != set(weights) or any(own[name].shape != weights[name].shape for name in own):
            name = min(set(own) ^ set(weights), default="one of another shape")
            raise InputError(f"{folder / WEIGHTS} does not fit its config.json ({name}); save the model again.")
        model.load_state_dict(weights)
    except InputError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} holds no decoder that can be read ({error}); save the model again.") from error
    return model.to(dtype).eval()


def _config_of(config: dict[str, Any]) -> DecoderConfig:
    like = DecoderConfig()
    for name in SAVED:
        kinds = int if name == "n_key_value_heads" else type(getattr(like, name))
        value = config[name]
        wrong = isinstance(value, bool) is not (kinds is bool)
        if (wrong or not isinstance(value, (int, float) if kinds is float else kinds)) and (
            value is not None or name != "n_key_value_heads"
        ):
            raise TypeError(f"{name} is {value!r}")
    return DecoderConfig(**{name: config[name] for name in SAVED})
