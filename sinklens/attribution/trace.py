"""A run with its gradients: activations x, and dM/dx of every readout M, from one forward pass.

The gradient is taken *at the run*: its root edits are in force, and where a root edit writes, x is the edited
activation. The graph starts at the earliest activation that a gradient is asked for, so that nothing is kept of the
blocks before it, and the model's parameters take no part in it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.hooks import Program, check_fired, hook_points, readouts_in, root_ops
from sinklens.engine.trust import checked_combined, read
from sinklens.errors import EngineError, InputError
from sinklens.models.state import backward_hooks, one_pass, without_inference
from sinklens.models.view import Model, check_hook_name, device_of, forward, hooked, model_shape, parameters_of
from sinklens.patches import Patch
from sinklens.readouts.base import Readout, Rows
from sinklens.sites import ATTN_OUT, LOGITS, MLP_OUT, HookSite

Hook = Callable[[Tensor, object], Tensor | None]


class Node(NamedTuple):
    """An activation of a run."""

    site: HookSite
    """Where."""
    layer: int
    """Block."""
    before: bool = False
    """As the model computed it, before the run's root edits at this very place."""


@dataclass(eq=False)
class Trace:
    """What one pass of a run over some prompts left behind; tensors are laid out as ``[prompt, pos, unit, ...]``."""

    acts: dict[Node, Float[Tensor, "prompt pos *rest"]] = field(default_factory=dict)
    """Activations."""
    grads: dict[tuple[str, Node], Float[Tensor, "prompt pos *rest"]] = field(default_factory=dict)
    """``(readout, node)`` to the gradient; a node that cannot move the readout is not there."""
    readings: dict[str, Float[Tensor, " prompt"]] = field(default_factory=dict)
    """The run's own readouts."""


def trace_run(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    prompts: Int[Tensor, " prompt"],
    roots: Sequence[Patch],
    readouts: Sequence[Readout],
    *,
    keep: set[Node],
    wrt: set[Node],
    drops: Sequence[int] = (),
) -> Trace:
    """One forward pass of a run, and one backward pass for every readout if ``wrt`` is not empty.

    Args:
        model: the model; it is left without hooks, its parameters as they were.
        tokens: the prompts of this pass.
        prompts: their indices, for edits and readouts that look prompts up.
        roots: the run's root patches.
        readouts: what is measured and differentiated.
        keep: activations to keep.
        wrt: activations to keep with their gradients.
        drops: blocks that are left out of the backward pass, one at a time: gradients under :func:`without`, besides
            the full one.

    Raises:
        InputError: a readout that does not pass gradients on, or somebody's backward hooks on the model.
        EngineError: a hook that does not exist or never fired, a gradient that is not finite.
    """
    if wrt and backward_hooks(model):
        raise InputError(
            "there are backward hooks on the model, which may change the gradients that estimates are made of: take "
            "them off, or run the patches exactly"
        )
    last = max([layer for r in readouts for layer in r.layers] + [node.layer for node in keep | wrt])
    pass_ = _Pass(model, prompts.to(device_of(model)), keep, wrt, drops)
    program = pass_.program(roots, readouts, last)
    with torch.set_grad_enabled(bool(wrt)):
        _run(model, tokens, program, pass_, last)
        values = {readout.name: _combined(readout, program) for readout in readouts}
        trace = Trace(
            acts={
                node: node.site.to_canonical(act.detach()).to(pass_.prompts.device) for node, act in pass_.live.items()
            },
            readings={name: value.detach() for name, value in values.items()},
        )
        acts = {node: act for node, act in pass_.live.items() if node in wrt}
        _differentiate(readouts, values, acts, trace)
        for pass_.dropped in drops:
            _differentiate(readouts, values, acts, trace, pass_.dropped)
    return trace


class _Pass:
    """The hooks of one pass, and the activations that they collect, still part of the graph."""

    def __init__(
        self, model: Model, prompts: Tensor, keep: set[Node], wrt: set[Node], drops: Sequence[int] = ()
    ) -> None:
        self.model, self.prompts, self.wrt, self.drops = model, prompts, wrt, drops
        self.dropped: int | None = None
        self.live: dict[Node, Tensor] = {}
        self.nodes: dict[str, list[Node]] = defaultdict(list)
        for node in keep | wrt:
            self.nodes[node.site.at(node.layer)].append(node)
        for name in self.nodes:
            check_hook_name(model, name)

    def program(self, roots: Sequence[Patch], readouts: Sequence[Readout], last: int) -> Program:
        checked = [
            Readout(readout.name, readout.site, readout.layers, _passes_gradients(readout), readout.combine)
            for readout in readouts
        ]
        program = Program(self.prompts, readouts=readouts_in(checked, 0))
        pairs = [(row, int(prompt)) for row, prompt in enumerate(self.prompts)]
        for root in (part for patch in roots for part in patch.parts):
            program.ops += root_ops(root, pairs, [layer for layer in root.layers if layer <= last], self.prompts.device)
        return program

    def hooks(self, program: Program) -> tuple[dict, list[tuple[str, Hook]]]:
        """Hook points, and hooks in the order in which they fire: the start of the graph, root edits, captures."""
        points = hook_points(program)
        starts = [(name, self._before(name)) for name in self.nodes]
        ends = [(name, self._after(name)) for name in self.nodes]
        gates = [(site.at(layer), self._gate(layer)) for layer in self.drops for site in (ATTN_OUT, MLP_OUT)]
        return points, [*starts, *points.items(), *ends, *gates]

    def _gate(self, layer: int) -> Hook:
        """Stops the gradient at what a block writes, while that block is dropped."""

        def gate(act: Tensor, hook: object) -> Tensor | None:  # noqa: ARG001
            if not act.requires_grad:
                return None
            act = act.view_as(act)  # so that an activation that is read here keeps the gradient that it had
            act.register_hook(lambda grad: torch.zeros_like(grad) if self.dropped == layer else grad)
            return act

        return gate

    def _before(self, name: str) -> Hook:
        def start(act: Tensor, hook: object) -> Tensor | None:  # noqa: ARG001
            if not act.requires_grad and any(node in self.wrt for node in self.nodes[name]):
                act = act.detach().requires_grad_()
            return self._keep(act, name, before=True)

        return start

    def _after(self, name: str) -> Hook:
        def end(act: Tensor, hook: object) -> Tensor | None:  # noqa: ARG001
            return self._keep(act, name, before=False)

        return end

    def _keep(self, act: Tensor, name: str, *, before: bool) -> Tensor | None:
        for node in self.nodes[name]:
            if node.before is before:
                act = self._once(act, node) if node in self.wrt else act
                # Kept for its value alone it is cloned: later in-place operations of the model must not reach it.
                self.live[node] = act if node in self.wrt else act.detach().clone()
        # A bridge gives hooks a view that the model does not go on with, unless the hook returns it.
        return act if act.requires_grad else None

    def _once(self, act: Tensor, node: Node) -> Tensor:
        """The one activation that stands for all at a hook point which is passed several times.

        A HookedTransformer norms its residual stream for queries, for keys and for values one after the other: kept one
        by one, the last alone would have a gradient, that of the values.
        """
        first = self.live.get(node)
        if first is None or first is act:
            return act
        if not torch.equal(first, act):
            name = node.site.at(node.layer)
            raise EngineError(f"{name} is passed several times with other activations: it has no one gradient")
        return first


def _passes_gradients(readout: Readout) -> Callable[[Tensor, Rows], Tensor]:
    def reduce(act: Tensor, rows: Rows) -> Tensor:
        value = read(
            readout, rows.layer, act, lambda act, some: readout.reduce(act, Rows(rows.prompts[some], rows.layer))
        )
        _require_gradient(readout, act, value)
        return value

    return reduce


def _combined(readout: Readout, program: Program) -> Float[Tensor, " row"]:
    device = program.prompts.device  # the blocks of one model may lie on several
    stack = torch.stack([program.readings[readout.name, layer].to(device) for layer in readout.layers])
    value = checked_combined(readout, stack)
    _require_gradient(readout, stack, value)
    return value


def _require_gradient(readout: Readout, given: Tensor, value: Tensor) -> None:
    if given.requires_grad and not value.requires_grad:
        raise InputError(f"readout {readout.name!r} has no gradient: run these patches exactly instead")


def _run(model: Model, tokens: Tensor, program: Program, pass_: _Pass, last: int) -> None:
    points, hooks = pass_.hooks(program)
    for name in points:
        check_hook_name(model, name)
    n_layers = model_shape(model).n_layers
    logits = last >= n_layers
    alone = (one_pass(model), without_inference(model), frozen(model))
    with alone[0], alone[1], alone[2], warnings.catch_warnings(), hooked(model, hooks):
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
        stop = None if logits else last + 1
        out = forward(model, tokens.to(pass_.prompts.device), stop_at=stop, return_type="logits" if logits else None)
    check_fired(points)
    for readout, layer in program.readouts:
        if readout.site == LOGITS:
            assert out is not None
            program.readings[readout.name, layer] = readout.reduce(out, Rows(program.prompts.to(out.device), layer))


def _differentiate(
    readouts: Sequence[Readout],
    values: dict[str, Tensor],
    acts: dict[Node, Tensor],
    trace: Trace,
    dropped: int | None = None,
) -> None:
    """The gradient of every readout; prompts are independent, so the gradient of the sum holds each prompt's own."""
    for readout in readouts:
        value, last = values[readout.name], max(readout.layers)
        if not acts or not value.requires_grad:
            continue
        found = torch.autograd.grad(value.sum(), list(acts.values()), retain_graph=True, allow_unused=True)
        for node, grad in zip(acts, found, strict=True):
            name = f"readout {readout.name!r} with respect to {node.site.at(node.layer)}"
            if grad is not None and not torch.isfinite(grad).all():
                raise EngineError(f"the gradient of {name} is not finite")
            if grad is not None:
                trace.grads[without(readout.name, dropped), node] = node.site.to_canonical(grad).to(value.device)
            elif node.layer < last:  # a later place in the readout's own last block is rightly without one
                raise EngineError(f"there is no gradient of {name}: this model does not pass it on there")


def without(readout: str, dropped: int | None) -> str:
    """Name of a readout's gradient when a block is left out of the backward pass."""
    return readout if dropped is None else f"{readout} without block {dropped}"


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """The model's parameters take no gradient inside; afterwards each is as it was."""
    mine = [parameter for parameter in parameters_of(model) if parameter.requires_grad]
    for parameter in mine:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in mine:
            parameter.requires_grad_(True)
