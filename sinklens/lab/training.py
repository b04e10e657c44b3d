"""Training one arm: data, model, optimiser, loop, watching, saving; from top to bottom.

    for step 1 .. steps:
        rows      = data.rows(seed, (step - 1) batch, batch)          the same for every arm of a seed
        gradient  = mean over rows of d loss / d weights, clipped to a norm of ``clip``
        weights  -= lr(step) x AdamW (decay on matrices alone)

Everything that is random goes by the seed: weights (each parameter by its name) and the order of the rows. There is no
dropout. So a run that is stopped and started again has the curve that it would have had: bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sinklens.errors import InputError
from sinklens.lab.checkpoint import checkpoints, restore, write_checkpoint, write_final
from sinklens.lab.compiling import LossOf, compiled
from sinklens.lab.data import Data
from sinklens.lab.optimiser import Optimiser
from sinklens.lab.processes import Processes
from sinklens.lab.record import Curves, begin, finish, is_finished
from sinklens.lab.settings import Settings, arm_name
from sinklens.lab.sizes import size_of
from sinklens.lab.stopping import Stopping
from sinklens.lab.watch import as_table, held_out_loss, measured, watch_steps
from sinklens.models.decoder import Decoder, DecoderConfig

HELD_OUT = 256
"""Held-out rows of which the loss is measured."""
CHECK = 20
"""Steps between looks at the loss: each makes a GPU wait."""

Report = Callable[[str, int, int], None]
"""Is told what is being done, and how many of how many steps are."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    folder: Path
    """Where it is: :func:`sinklens.load_model` opens it."""
    loss: pd.DataFrame
    """``step, tokens, loss, lr, seconds`` of every step."""
    watch: pd.DataFrame
    """``step, tokens, measure, layer, position, value``; see :mod:`sinklens.lab.watch`."""

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Folders of models by step."""
        return checkpoints(self.folder)

    def held_out(self) -> float:
        """Loss on the held-out rows at the end, nats a token."""
        return float(self.watch.loc[self.watch.measure == "loss", "value"].iloc[-1])


def train_arm(
    settings: Settings,
    data: Data,
    out: Path,
    *,
    device: torch.device,
    command: str = "",
    checkpoint_every: int = 0,
    watch_points: int = 40,
    report: Report = lambda _text, _done, _total: None,
) -> Trained:
    """Train one arm into ``out / arm``; one that is there is finished, or left as it is when it is.

    Args:
        settings: all that decides its numbers.
        data: what it is trained on.
        out: folder of the arm's folder.
        device: where.
        command: for the record.
        checkpoint_every: steps between checkpoints; 0 for a tenth of the run.
        watch_points: about how many times it is measured.
        report: is told of progress.

    Raises:
        InputError: the folder is of another configuration, the loss is not finite, or there is no room to write.
        KeyboardInterrupt: it was interrupted; a checkpoint was written.
    """
    name = arm_name(settings.variant, settings.options, settings.seed)
    folder, processes = out / name, Processes(device)
    # Model
    model = Decoder(_config(settings, data, name), data.tokenizer, seed=settings.seed).to(device)
    # Optimiser
    optimiser = Optimiser(model, settings)
    begin(folder, settings, data, model, optimiser.decaying, {"command": command, **processes.described()})
    curves = Curves(folder)
    if is_finished(folder):
        return Trained(folder, curves.loss(), curves.watch())
    state = restore(folder, model, optimiser) or {"step": 0, "seconds": 0.0}
    curves.cut(state["step"])
    # Loop
    run = _Run(settings, data, folder, model, optimiser, processes, curves, report, seconds=state["seconds"])
    every = checkpoint_every or max(1, settings.steps // 10)
    watched = watch_steps(settings.steps, watch_points)
    run.loop(state["step"], every, watched)
    # Saving
    if processes.first:
        write_final(folder, model)
        finish(folder, run.seconds, settings.steps * settings.tokens_a_step)
    processes.wait()
    return Trained(folder, curves.loss(), curves.watch())


def _config(settings: Settings, data: Data, name: str) -> DecoderConfig:
    size = size_of(settings.size)
    return DecoderConfig(
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        d_head=size.d_model // size.n_heads,
        d_mlp=size.d_mlp,
        d_vocab=data.n_vocab,
        n_ctx=settings.n_ctx,
        tied=size.tied,
        variant=settings.variant,
        variant_options=settings.options,
        model_name=name,
        tokenizer_prepends_bos=data.prepends_bos,
    )


@dataclass
class _Run:
    """What the loop works on."""

    settings: Settings
    data: Data
    folder: Path
    model: Decoder
    optimiser: Optimiser
    processes: Processes
    curves: Curves
    report: Report
    seconds: float
    """Spent on training so far."""

    def loop(self, done: int, every: int, watched: tuple[int, ...]) -> None:
        """Steps ``done + 1`` to the last."""
        settings, total = self.settings, self.settings.steps
        loss_of = self.processes.wrapped(self._compiled() if settings.compile else LossOf(self.model))
        pending: list[tuple[int, Tensor]] = []
        with Stopping(self.processes) as stopping:
            if done == 0:
                self._watch(0)
            began, spent = time.perf_counter(), self.seconds
            for step in range(done + 1, total + 1):
                pending.append((step, self._step(loss_of, step)))
                stop = stopping.asked(step)
                looks = step % CHECK == 0 or step % every == 0 or step in watched or step == total or stop
                if not looks:
                    continue
                losses = self.processes.mean(torch.stack([loss for _, loss in pending])).tolist()  # waits for a GPU
                self.seconds = spent + time.perf_counter() - began
                self._take([step for step, _ in pending], losses)
                pending.clear()
                if step in watched:
                    self._watch(step)
                if step % every == 0 or step == total or stop:
                    self._checkpoint(step)
                began, spent = time.perf_counter(), self.seconds
                if stop:
                    raise KeyboardInterrupt(f"stopped at step {step} of {total} of {self.folder}")

    def _compiled(self) -> LossOf:
        rows = self.settings.batch // self.processes.count // self.settings.accumulate
        return compiled(self.model, self.settings, self.data, rows)

    def _step(self, loss_of: nn.Module, step: int) -> Tensor:
        """One update; the loss before it, of this process's rows."""
        settings, processes = self.settings, self.processes
        first, own = processes.rows((step - 1) * settings.batch, settings.batch)
        rows = _sent(torch.from_numpy(self.data.rows(settings.seed, first, own)), processes.device)
        self.model.train()
        parts = rows.chunk(settings.accumulate)
        losses = []
        for i, part in enumerate(parts):
            with processes.alone(loss_of) if i + 1 < len(parts) else nullcontext():
                with torch.autocast(processes.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                    loss = loss_of(part)
                (loss * (len(part) / len(rows))).backward()
            losses.append(loss.detach() * (len(part) / len(rows)))
        if settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimiser.step(settings.lr_at(step))
        self.model.stepped()
        return torch.stack(losses).sum()

    def _take(self, steps: list[int], losses: list[float]) -> None:
        """Write down the losses of the last steps.

        Raises:
            InputError: one is not finite.
        """
        settings = self.settings
        for step, loss in zip(steps, losses, strict=True):
            if not loss < float("inf"):
                raise InputError(
                    f"the loss is {loss} at step {step} (learning rate {settings.lr_at(step):.2g}): take a smaller one "
                    f"(lr=) or a longer warm-up (warmup=); the checkpoints in {self.folder} are kept."
                )
            self.curves.add_loss(step, step * settings.tokens_a_step, loss, settings.lr_at(step), self.seconds)
        pace = steps[-1] * settings.tokens_a_step / max(self.seconds, 1e-9)
        self.report(f"{self.folder.name}: loss {losses[-1]:.3f}, {pace:,.0f} tokens/s", steps[-1], settings.steps)

    def _watch(self, step: int) -> None:
        """Measure, in the first process."""
        if not self.processes.first:
            return
        self.model.eval()
        rows = torch.from_numpy(self.data.held_out(HELD_OUT)).to(self.processes.device)
        tokens = step * self.settings.tokens_a_step
        self.curves.add_watch(as_table(step, tokens, held_out_loss(self.model, rows), measured(self.model, rows)))

    def _checkpoint(self, step: int) -> None:
        if self.processes.first:
            self.curves.write()
            state: dict[str, Any] = {"seconds": self.seconds, "tokens": step * self.settings.tokens_a_step}
            write_checkpoint(self.folder, self.model, self.optimiser, step, state)


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on a device; a GPU goes on meanwhile."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
