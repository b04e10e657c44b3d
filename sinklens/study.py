"""A study: a model, prompts, and what has been found in them. It is what every analysis is given.

It measures (:meth:`Study.measure`: readouts of one run, as they are or under patches), patches (:meth:`Study.run`: many
patches, packed by the engine), captures (:meth:`Study.activations`) and draws (:meth:`Study.generator`: by name, so
that no number depends on what was drawn before).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sinklens import prompts
from sinklens.edits.draws import others
from sinklens.engine.capture import capture_runs
from sinklens.engine.clean import clean_log_probabilities
from sinklens.engine.memory import row_budget
from sinklens.engine.run import PatchResult, PatchRunner, Progress
from sinklens.engine.store import Want
from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation, explained, find_formation
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.models.digest import weight_digest
from sinklens.models.identities import block_weights, is_unnormalised, require
from sinklens.models.view import (
    BlockWeights,
    Model,
    ModelShape,
    bos_token,
    device_of,
    dtype_of,
    model_id,
    model_shape,
)
from sinklens.pairs.choice import target_positions
from sinklens.pairs.pair import ordinary_positions
from sinklens.patches import CLEAN, Patch, Positions, Runs, Where
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.readouts.named import Context, NamedReadout, named_readout
from sinklens.records.provenance import git_commit, versions
from sinklens.records.summaries import html, summary
from sinklens.sites import HookSite
from sinklens.statistics import Estimate, Values, bootstrap_estimate, drawn_estimate, generator, mean_estimate


@dataclass(eq=False)
class Study:
    """A model on prompts, with what is known of its sink."""

    model: Model
    """A ``HookedTransformer`` or ``TransformerBridge``."""
    batch: PromptBatch
    """The prompts."""
    seed: int = 0
    """Fixes every draw."""
    memory_budget: int | None = None
    """Bytes for one forward pass's activations; chosen by device when None."""
    given: dict[str, Any] = field(default_factory=dict)
    """What :func:`sinklens.find_formation` is told (``layer`` or ``event``, ``super_neurons``, ``outlier_dims``,
    thresholds)."""
    progress: Progress | None = None
    """Called with (rows done, rows in all) while patches run."""
    rows: int | None = None
    """Rows for one forward pass, in place of the memory budget."""
    scored: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What analyses have scored on it, which others need not score again."""

    def __post_init__(self) -> None:
        """Make sure of the model and its prompts.

        Raises:
            InputError: see :func:`sinklens.prompts.check_batch`.
        """
        prompts.check_batch(self.model, self.batch)

    def __repr__(self) -> str:
        formation = self.known_formation
        block = "" if formation is None else f"formation block {formation.layer}"
        texts = f"{self.batch.n:,} prompts of {self.batch.length:,} tokens"
        return summary(self, model_id(self.model), texts, block, f"seed {self.seed}")

    def _repr_html_(self) -> str:
        formation = self.known_formation
        return html(repr(self), None if formation is None else [vars(event) for event in formation.events])

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return model_shape(self.model)

    @cached_property
    def max_rows(self) -> int:
        """Rows that fit in one forward pass."""
        return self.rows or row_budget(self.model, self.batch.length, self.memory_budget)

    @cached_property
    def formation(self) -> Formation:
        """Where the sink forms on these prompts: found when it is first asked for, unless it has been set.

        Raises:
            NoSinkError: there is none.
        """
        return find_formation(self.model, self.batch, memory_budget=self.memory_budget, **self.given)

    @classmethod
    def of(
        cls,
        model: Model,
        batch: PromptBatch,
        formation: Formation | None = None,
        **options: Any,
    ) -> Study:
        """A study of which the formation may be known already.

        Args:
            model: the model.
            batch: the prompts.
            formation: where the sink forms; found when it is asked for if not given.
            options: further fields.

        Raises:
            InputError: see :func:`sinklens.prompts.check_batch`; a formation that is none, or of other prompts.
        """
        study = cls(model, batch, **options)
        if formation is not None and not isinstance(formation, Formation):
            raise InputError(f"formation must be what find_formation gives, not of type {type(formation).__name__}")
        if formation is not None:
            formation.check_prompts(batch.n, batch.length)
            study.formation = formation
        return study

    @property
    def known_formation(self) -> Formation | None:
        """:attr:`formation`, where it has been found or set; ``None`` where nothing has asked for it yet."""
        return vars(self).get("formation")

    @cached_property
    def random(self) -> Study:
        """The same study on as many random-token prompts of the same length (no BOS unless these have one)."""
        bos = bos_token(self.model)
        led = bos is not None and bool((self.batch.tokens[:, 0] == bos).all())
        batch = prompts.random_tokens(self.model, self.batch.n, self.batch.length, seed=self.seed, prepend_bos=led)
        given = dict(self.given)
        if given.pop("event", None) is not None:
            given["layer"] = self.formation.layer  # the same event, whatever its number is in other prompts
        return replace(self, batch=batch, given=given)

    def at_block(self, layer: int) -> Study:
        """The same study with the same sink, explained by another of its blocks (see :attr:`Formation.steps`).

        Super neurons and outlier dimensions that are given belong to the block that was explained before: they are
        looked for anew.

        Raises:
            NoSinkError: the block has no super neurons.
        """
        if layer == self.formation.layer:
            return self
        kept = {name: self.given[name] for name in ("neuron_z", "selectivity", "dim_z") if name in self.given}
        formation = explained(self.model, self.batch, self.formation, layer, memory_budget=self.memory_budget, **kept)
        dropped = ("event", "super_neurons", "outlier_dims")
        given = {name: value for name, value in self.given.items() if name not in dropped}
        other = replace(self, given=given | {"layer": layer})
        other.formation = formation
        return other

    def first(self, n: int) -> Study:
        """The same study on its first ``n`` prompts (all, when there are fewer), with the formation found on all."""
        n = min(n, self.batch.n)
        few = replace(self, batch=self.batch.subset(range(n)), given=dict(self.given))
        few.formation = replace(self.formation, sink_positions=self.formation.sink_positions[:n])
        return few

    def disjoint(self, sets: int, n: int | None = None) -> list[Study]:
        """So many studies on disjoint sets of ``n`` of the prompts, each of which finds the formation for itself.

        Raises:
            InputError: there are too few prompts (see :meth:`PromptBatch.disjoint`).
        """
        return [replace(self, batch=batch, given=dict(self.given)) for batch in self.batch.disjoint(sets, n)]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where numbers come from: versions, commit, device, dtype, digests of the model and the prompts."""
        return provenance(self.model, self.batch)

    @property
    def sinks(self) -> Int[Tensor, " prompt"]:
        """The sink position of every prompt."""
        return torch.tensor(self.formation.sink_positions, device="cpu")

    @property
    def sink(self) -> tuple[tuple[int, ...], ...]:
        """The same, as the positions of a patch."""
        return tuple((position,) for position in self.formation.sink_positions)

    @cached_property
    def ordinary(self) -> Bool[Tensor, "prompt pos"]:
        """Marks the ordinary positions: not the sink, and not in the last quarter, which few later queries see."""
        return ordinary_positions(self.batch, self.formation.sink_positions)

    @property
    def up_to_formation(self) -> tuple[int, ...]:
        """The blocks up to the formation block, it included."""
        return self.formation.up_to

    @property
    def onset(self) -> tuple[int, ...]:
        """The blocks up to the first run of formation blocks, where aggregation starts the outlier off."""
        return tuple(range(self.formation.first + 1))

    def after_formation(self, blocks: int | None = READOUT_BLOCKS) -> tuple[int, ...]:
        """The ``blocks`` after the formation block, where attention is read (None: all up to the next event).

        Raises:
            NotApplicableError: the formation block is the last, or the next event begins right behind it.
            InputError: fewer than one block is asked for.
        """
        return self.formation.after(self.shape.n_layers, blocks)

    @property
    def neurons(self) -> tuple[int, ...]:
        """The super neurons.

        Raises:
            NotApplicableError: none are known, as in models without a dense MLP.
        """
        if not self.formation.neurons:
            raise NotApplicableError(
                f"no super neurons are known in block {self.formation.layer}: it has no dense MLP, or none were given"
            )
        return self.formation.neurons

    def require(self, identity: str, layers: Sequence[int]) -> None:
        """Make sure that an identity holds in some blocks (see :mod:`sinklens.models.identities`).

        Raises:
            NotApplicableError: it does not.
        """
        require(self.model, identity, layers)

    def weights(self, layer: int) -> BlockWeights:
        """Weights of a block (see :func:`sinklens.models.identities.block_weights`)."""
        return block_weights(self.model, layer)

    def generator(self, name: str) -> torch.Generator:
        """A generator for the draw called ``name``."""
        return generator(self.seed, name)

    def mean(self, values: Values) -> Estimate:
        """Mean over prompts of one number for each, with its bootstrap interval (over texts, where prompts share one).

        Raises:
            InputError: some prompts share a text, and the numbers are not one for each prompt.
        """
        return mean_estimate(values, self.seed, self.groups)

    def mean_of_draws(self, values: Float[Tensor, "prompt draw"] | np.ndarray) -> Estimate:
        """Mean over prompts and over what else was drawn (directions, heads, targets), both resampled: see
        :func:`sinklens.statistics.drawn_interval`.
        """
        array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
        return drawn_estimate(array, self.seed, self.groups)

    def bootstrap(
        self, statistic: Callable[[np.ndarray], Any], prompts: Iterable[int] | None = None, **options: Any
    ) -> Estimate:
        """A statistic of prompts with its interval: :func:`sinklens.statistics.bootstrap_estimate`, in which prompts
        that share a text are drawn together.

        Args:
            statistic: takes indices into ``prompts`` and gives the number for these.
            prompts: the prompts that it is about; all by default.
            options: further arguments of that function.
        """
        chosen = range(self.batch.n) if prompts is None else list(prompts)
        return bootstrap_estimate(statistic, len(chosen), self.seed, groups=self.groups_of(chosen), **options)

    def groups_of(self, prompts: Iterable[int]) -> list[str] | None:
        """For each of these prompts the text that it is a passage of; None where each is a text of its own."""
        return None if self.groups is None else [self.groups[prompt] for prompt in prompts]

    @property
    def groups(self) -> tuple[str, ...] | None:
        """For each prompt the text that it is a passage of; None where each is a text of its own."""
        return self.batch.groups if self.batch.is_grouped else None

    @cached_property
    def sink_varies(self) -> bool:
        """Whether the sink's token, or what stands before it, differs between prompts: if not (behind one BOS, say),
        nothing that is measured there varies over them, and a variance over prompts cannot be measured.
        """
        return self.varies_at(self.sinks)

    def varies_at(self, positions: Int[Tensor, " prompt"]) -> bool:
        """Whether prompts differ up to these positions, one for each, which they include."""
        rows = zip(self.batch.tokens.tolist(), positions.tolist(), strict=True)
        return len({tuple(row[: end + 1]) for row, end in rows}) > 1

    def draw_neurons(self, drawn: torch.Generator) -> tuple[int, ...]:
        """As many neurons of the formation block as there are super neurons, drawn from the others."""
        neurons = self.neurons
        return others(self.shape.d_mlp, neurons, drawn, len(neurons))

    def draw_dims(self, drawn: torch.Generator) -> tuple[int, ...]:
        """As many residual dimensions as there are outlier dimensions, drawn from the others."""
        dims = self.formation.dims
        return others(self.shape.d_model, dims, drawn, len(dims))

    def other_neurons(self, name: str, draws: int = 1) -> list[tuple[int, ...]]:
        """Sets of neurons drawn for ``name`` (see :meth:`draw_neurons`)."""
        drawn = self.generator(name)
        return [self.draw_neurons(drawn) for _ in range(draws)]

    def other_dims(self, name: str, draws: int = 1) -> list[tuple[int, ...]]:
        """Sets of residual dimensions drawn for ``name`` (see :meth:`draw_dims`)."""
        drawn = self.generator(name)
        return [self.draw_dims(drawn) for _ in range(draws)]

    def ordinary_position(self, name: str, exclude: Sequence[int] = ()) -> Int[Tensor, " prompt"]:
        """One ordinary position of every prompt, none of ``exclude``, drawn for ``name``.

        Raises:
            InputError: a prompt has none left.
        """
        marks = self.ordinary.float().index_fill(1, torch.tensor(list(exclude), dtype=torch.long, device="cpu"), 0)
        if (marks.sum(-1) == 0).any():
            raise InputError(f"{name}: no ordinary position is left to draw from; use longer prompts, or fewer targets")
        return torch.multinomial(marks, 1, generator=self.generator(name)).squeeze(-1)

    def targets(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Those of ``positions`` that fit the prompts: after the first token, with later tokens, and no sink already.

        Raises:
            InputError: when none does.
        """
        allowed = target_positions(self.batch.length)
        fit = tuple(p for p in sorted(set(positions)) if p in allowed and p not in self.formation.sink_positions)
        if not fit:
            raise InputError(
                f"none of the positions {tuple(positions)} will do: give some in 1..{self.batch.length - 2} that are "
                "not the sink's own"
            )
        return fit

    def blocks(self, layers: Sequence[int] = ()) -> tuple[int, ...]:
        """``layers`` in order; by default those in which aggregation starts the outlier off (:attr:`onset`).

        Raises:
            InputError: the model has no such block.
        """
        blocks = tuple(sorted(set(layers)))
        if blocks and not 0 <= blocks[0] <= blocks[-1] < self.shape.n_layers:
            raise InputError(f"blocks {blocks} must be in 0..{self.shape.n_layers - 1}")
        return blocks or self.onset

    def sink_first(
        self, x: Shaped[Tensor, "row pos *rest"], prompts: Int[Tensor, " row"] | None = None
    ) -> Shaped[Tensor, "row pos *rest"]:
        """``x`` with every prompt's sink moved to the front, and its other positions behind in their order.

        Args:
            x: one row a prompt.
            prompts: which prompt each row is, inside a readout (``rows.prompts``); all of them in order by default.
        """
        sinks = self.sinks if prompts is None else self.sinks[prompts.cpu()]
        order = (
            (torch.arange(x.shape[1], device="cpu") != sinks[:, None]).int().argsort(dim=1, stable=True).to(x.device)
        )
        return x[torch.arange(len(x), device=x.device)[:, None], order]

    def lengths(self, lengths: Sequence[int] = ()) -> tuple[int, ...]:
        """Prompt lengths to read attention at: by default a quarter, half and all of the prompts' own.

        Raises:
            InputError: one is longer than the prompts, or shorter than 2.
        """
        full = self.batch.length
        ascending = tuple(sorted(set(lengths or (max(2, full // 4), max(2, full // 2), full))))
        if ascending[0] < 2 or ascending[-1] > full:
            raise InputError(f"lengths {ascending} must be in 2..{full}: use longer prompts (length=)")
        return ascending

    def measure(self, readouts: Sequence[Readout], patches: Sequence[Patch] = ()) -> dict[str, Tensor]:
        """Readouts of one pass over the prompts, under ``patches`` if there are any.

        Returns:
            Readout name to ``[layer, prompt, ...]``, what its ``reduce`` gives in each of its blocks (``combine`` is
            not used), on the CPU in float32.
        """
        return self._measure({"base": tuple(patches)}, readouts)

    def _measure(self, runs: Runs, readouts: Sequence[Readout]) -> dict[str, Tensor]:
        store = capture_runs(self.model, self.batch.tokens, runs, [], readouts, max_rows=self.max_rows)
        run = next(iter(runs))
        return {r.name: torch.stack([store.readings[run, r.name, b] for b in r.layers]).float().cpu() for r in readouts}

    def runner(self, readouts: Sequence[Readout], runs: Runs = CLEAN) -> PatchRunner:
        """What runs patches on these prompts, as often as one likes (see :class:`sinklens.engine.run.PatchRunner`)."""
        limits: dict[str, Any] = {"memory_budget": self.memory_budget, "max_rows": self.rows}
        return PatchRunner(self.model, self.batch, readouts, runs=runs, **limits)

    def run(self, patches: Sequence[Patch], readouts: Sequence[Readout], runs: Runs = CLEAN) -> PatchResult:
        """Every patch on every prompt, packed (see :func:`sinklens.run_patches`)."""
        return self.runner(readouts, runs).run(patches, self.progress)

    def readout(
        self, name: str | NamedReadout, target: Where | None = None, layers: Sequence[int] | None = None
    ) -> Readout:
        """A named readout on these prompts.

        Args:
            name: one of :data:`sinklens.readouts.named.READOUTS`, or a
                :class:`~sinklens.readouts.named.NamedReadout` itself.
            target: the position that it is about, one for every prompt; the sink's own by default.
            layers: blocks that are read; those just after formation by default.

        Raises:
            InputError: an unknown name, or a readout that has to be told two tokens.
        """
        named = self.named_readout(name)
        return named.of(named.name, self.context(self.sink if target is None else target, layers))

    def named_readout(self, name: str | NamedReadout) -> NamedReadout:
        """The readout of that name, if it can do with what a study knows.

        Raises:
            InputError: an unknown name, or a readout that has to be told two tokens.
        """
        named = named_readout(name)
        if named.needs_answers:
            raise InputError(f"readout {named.name!r} compares two tokens: sweep it, and give answers")
        return named

    def context(
        self,
        target: Where,
        layers: Sequence[int] | None = None,
        ordinary: Float[Tensor, "prompt pos"] | None = None,
    ) -> Context:
        """What a named readout may know of these prompts.

        Args:
            target: the position that it is about, one for every prompt.
            layers: blocks that are read; those just after formation by default.
            ordinary: 1 at ordinary positions; :attr:`ordinary` by default.
        """
        return Context(
            tokens=self.batch.tokens,
            target=Positions.of(target),
            ordinary=self.ordinary.float() if ordinary is None else ordinary,
            layers=self.after_formation() if layers is None else tuple(layers),
            n_layers=self.shape.n_layers,
            shares=is_unnormalised(self.model),
            clean=partial(clean_log_probabilities, self.model, self.batch.tokens),
        )

    def activations(self, site: HookSite, layers: Sequence[int], patches: Sequence[Patch] = ()) -> dict[int, Tensor]:
        """Activations of one pass, ``{layer: [prompt, pos, unit, ...]}`` on the model's device, under ``patches``."""
        wants = [Want("base", site, layer) for layer in layers]
        runs = {"base": tuple(patches)}
        store = capture_runs(self.model, self.batch.tokens, runs, wants, max_rows=self.max_rows)
        return {layer: store.tensor("base", site, layer) for layer in layers}


def provenance(model: Model, batch: PromptBatch) -> dict[str, Any]:
    """Versions, git commit, device, dtype, and digests of the model and the prompts."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "device": name,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "model": model_id(model),
        "weight_digest": weight_digest(model),
        "prompts_digest": batch.digest(),
    }
