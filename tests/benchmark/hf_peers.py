"""How nnsight and pyvene run the sweep on the Hugging Face model, as an expert would.

Neither packs patches by itself, so rows are batched by hand: many patches, each on its own row, in one forward pass.
Attention runs through ``scaled_dot_product_attention``, faster than the eager attention that returns patterns; the
readout block's pattern is computed outside, from the residual stream that enters it, so that no library pays for more
of that block than queries, keys and scores.
"""

from __future__ import annotations

import copy
import importlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from typing_extensions import override

from tests.benchmark.peers import ROWS, Peer, Values, attention_received
from tests.benchmark.shapes import Models
from tests.benchmark.workload import Workload


class Row(NamedTuple):
    """One patch on one prompt."""

    layer: int
    position: int
    prompt: int
    cell: int


def rows_of(work: Workload) -> list[Row]:
    """All patches on all prompts, in order of blocks."""
    return [
        Row(layer, position, prompt, cell)
        for cell, (layer, position) in enumerate(work.cells)
        for prompt in range(work.n_prompts)
    ]


def pattern(inner: Any, block: int, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row head query key"]:
    """The attention pattern of a block, from the residual stream that enters it."""
    layer, attention = inner.layers[block], inner.layers[block].self_attn
    normed = layer.input_layernorm(x)
    shape = (*x.shape[:2], -1, attention.head_dim)
    q, k = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    cos, sin = inner.rotary_emb(x, position_ids=torch.arange(x.shape[1], device=x.device)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = q @ repeat_kv(k, attention.num_key_value_groups).transpose(-1, -2) * attention.scaling
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32)


def readout(inner: Any, work: Workload, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
    """Attention received, averaged over the readout blocks; ``x`` enters the first of them."""
    found = [attention_received(pattern(inner, work.readouts[0], x), work.target)]
    cos_sin = inner.rotary_emb(x, position_ids=torch.arange(x.shape[1], device=x.device)[None])
    for block in work.readouts[1:]:
        x = inner.layers[block - 1](x, attention_mask=None, position_embeddings=cos_sin)
        found.append(attention_received(pattern(inner, block, x), work.target))
    return torch.stack(found).mean(0)


def residuals(inner: Any, tokens: Int[Tensor, "prompt pos"], layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream entering some blocks, by plain forward hooks; 64 prompts at a time."""
    kept: dict[int, list[Tensor]] = defaultdict(list)
    handles = []
    for layer in layers:

        def keep(_module: nn.Module, args: tuple, layer: int = layer) -> None:
            kept[layer].append(args[0].clone())

        handles.append(inner.layers[layer].register_forward_pre_hook(keep))
    try:
        for part in tokens.split(64):
            inner(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def own_modules(inner: Any, n_blocks: int | None = None) -> Any:
    """The same model in module objects of its own, with the same weights in memory.

    Libraries leave their marks on modules: nnsight wraps each one's forward, pyvene removes all hooks.

    Args:
        inner: the model without its unembedding.
        n_blocks: keep only so many blocks, and give the residual stream after them, not normalised.
    """
    shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
    copied = copy.deepcopy(inner, shared)
    if n_blocks is not None:
        copied.layers, copied.norm = copied.layers[:n_blocks], nn.Identity()
        copied.config.num_hidden_layers = n_blocks
    return copied


class _HuggingFace(Peer):
    """Rows of the sweep in batches, and their readouts put in place."""

    def __init__(self, models: Models) -> None:
        self.inner = own_modules(models.hf.model)
        self.device = models.device
        self.rows = ROWS[models.device.type]

    def _collect(self, work: Workload, batches: Iterator[tuple[list[Row], Tensor]]) -> Values:
        values = torch.zeros(len(work.cells), work.n_prompts, device=self.device)
        for rows, x in batches:
            cells, prompts = self._columns(rows)[2:]
            values[cells, prompts] = readout(self.inner, work, x)
        return values.double().cpu()

    def _columns(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Position, row number, cell and prompt of each row, in one transfer."""
        columns = [[row.position, i, row.cell, row.prompt] for i, row in enumerate(rows)]
        return torch.tensor(columns, device=self.device).unbind(1)  # pyright: ignore[reportReturnType]


class Nnsight(_HuggingFace):
    """nnsight: each trace patches a batch of rows, skips the blocks below the first patched one, and stops early.

    Blocks are skipped by putting in the clean run's residual stream (``skip``), so rows are in order of blocks.
    """

    name: ClassVar[str] = "nnsight"
    package: ClassVar[str] = "nnsight"
    note: ClassVar[str] = "rows batched by hand in one trace, earlier blocks skipped, stopped early, sdpa attention"

    def __init__(self, models: Models) -> None:
        super().__init__(models)
        nnsight = importlib.import_module("nnsight")
        self.save = nnsight.save
        self.traced: Any = nnsight.NNsight(self.inner)

    @override
    @torch.no_grad()
    def run(self, work: Workload, rows: int) -> Values:
        return self._collect(work, self._batches(work, rows))

    def _batches(self, work: Workload, rows: int) -> Iterator[tuple[list[Row], Tensor]]:
        clean, corrupt = work.clean.to(self.device), work.corrupt.to(self.device)
        start, source = self._capture(clean, work.layers), self._capture(corrupt, work.layers)
        everything = rows_of(work)
        for begin in range(0, len(everything), rows):
            batch = everything[begin : begin + rows]
            yield batch, self._trace(batch, clean, start, source, work.readouts[0])

    def _capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        parts = []
        for part in tokens.split(64):
            with self.traced.trace(input_ids=part, use_cache=False) as tracer:
                kept = self.save([])
                for layer in layers:
                    kept.append(self.traced.layers[layer].input.clone())
                tracer.stop()
            parts.append(kept)
        return {layer: torch.cat([part[i] for part in parts]) for i, layer in enumerate(layers)}

    def _trace(self, batch: list[Row], clean: Tensor, start: dict, source: dict, stop: int) -> Tensor:
        positions, numbers, _, prompts = self._columns(batch)
        first = batch[0].layer
        entering = start[first][prompts]
        begins = [i for i, row in enumerate(batch) if i == 0 or row.layer != batch[i - 1].layer]
        spans = [(batch[i].layer, slice(i, j)) for i, j in zip(begins, [*begins[1:], len(batch)], strict=True)]
        with self.traced.trace(input_ids=clean[prompts], use_cache=False) as tracer:
            for below in range(first):
                self.traced.layers[below].skip(entering)
            for layer, span in spans:
                value = source[layer][prompts[span], positions[span]]
                self.traced.layers[layer].input[numbers[span], positions[span]] = value
            x = self.save(self.traced.layers[stop].input)
            tracer.stop()
        return x


class Pyvene(_HuggingFace):
    """pyvene: one intervention a block, each row at its own position, on the model cut off before the readout block.

    An ``IntervenableModel`` patches one place a forward pass, so a batch holds patches of one block; it cannot stop
    early, hence the cut. Building these models is not counted.
    """

    name: ClassVar[str] = "pyvene"
    package: ClassVar[str] = "pyvene"
    note: ClassVar[str] = "rows of one block batched by hand, model cut off before the readout block, sdpa attention"

    def __init__(self, models: Models) -> None:
        super().__init__(models)
        self.pyvene = importlib.import_module("pyvene")
        self.ready: dict[tuple[int, int], Any] = {}
        self.cut: dict[int, Any] = {}

    @override
    def prepare(self, work: Workload) -> None:
        stop = work.readouts[0]
        for layer in work.layers:
            if layer < stop and (layer, stop) not in self.ready:
                kind = self.pyvene.VanillaIntervention
                where = {"layer": layer, "component": "block_input", "intervention_type": kind}
                model = self.pyvene.IntervenableModel([where], model=self._short(stop))
                model.set_device(self.device, set_model=False)
                self.ready[layer, stop] = model

    def _short(self, n_blocks: int) -> Any:
        if n_blocks not in self.cut:
            self.cut[n_blocks] = own_modules(self.inner, n_blocks)
        return self.cut[n_blocks]

    @override
    @torch.no_grad()
    def run(self, work: Workload, rows: int) -> Values:
        self.prepare(work)
        return self._collect(work, self._batches(work, rows))

    def _batches(self, work: Workload, rows: int) -> Iterator[tuple[list[Row], Tensor]]:
        clean, corrupt = work.clean.to(self.device), work.corrupt.to(self.device)
        source = residuals(self.inner, corrupt, work.layers)
        stop = work.readouts[0]
        entering = residuals(self.inner, clean, [stop])[stop] if stop in work.layers else None
        by_layer: dict[int, list[Row]] = defaultdict(list)
        for row in rows_of(work):
            by_layer[row.layer].append(row)
        for layer, mine in by_layer.items():
            for begin in range(0, len(mine), rows):
                batch = mine[begin : begin + rows]
                positions, numbers, _, prompts = self._columns(batch)
                values = source[layer][prompts, positions]
                if layer == stop:  # enters the readout block itself: nothing is left to run
                    assert entering is not None
                    x = entering[prompts]
                    x[numbers, positions] = values
                else:
                    x = self._patched(self.ready[layer, stop], clean[prompts], batch, values)
                yield batch, x

    def _patched(self, model: Any, tokens: Tensor, batch: list[Row], values: Tensor) -> Tensor:
        _, out = model(
            {"input_ids": tokens},
            unit_locations={"sources->base": (None, [[[row.position] for row in batch]])},
            source_representations=values[:, None],
            use_cache=False,
        )
        return out.last_hidden_state
