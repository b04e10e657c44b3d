"""Equal numbers first, then time.

A peer whose numbers differ from one ``run_with_hooks`` for each patch is refused before anything is timed. The others
are timed in one process, in turns: every repeat runs each peer once, in another order, so that a slow minute of the
machine falls on all of them. Where all patches would take too long, a peer runs a random part of the cells; what a
patch costs on average is the same. A peer with a cost that all patches share runs all of them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

from sinklens.engine.memory import is_out_of_memory, release_cached
from sinklens.errors import EngineError, InputError
from tests.benchmark.flops import synchronize
from tests.benchmark.peers import ROWS, Peer, RunWithHooks, Sinklens, Values
from tests.benchmark.shapes import Models
from tests.benchmark.workload import Workload

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Largest root mean square difference from the reference: in float32 in units of the patches' root mean square effect
(a peer that patches nothing differs by 1), in bfloat16 in units of the readout itself. There implementations that round
in another order differ by much of the effect of one patch in a random model, so the same code is held to the float32
tolerance first, on a small model."""

PEERS: dict[str, str] = {
    "transformer_lens": "tests.benchmark.peers:GenericActivationPatch",
    "run_with_hooks": "tests.benchmark.peers:RunWithHooks",
    "nnsight": "tests.benchmark.hf_peers:Nnsight",
    "pyvene": "tests.benchmark.hf_peers:Pyvene",
    "sinklens": "tests.benchmark.peers:Sinklens",
}
"""Peers by name; looked up when they are asked for, because two of them need packages of their own."""


@dataclass(frozen=True)
class Limits:
    """How long to measure."""

    repeats: int = 5
    """Timed runs of every peer."""
    seconds: float = 2.0
    """About the longest that one of these may take; more cells than fit in it are not run."""


@dataclass(frozen=True)
class Timing:
    """What one peer needed for one workload."""

    peer: str
    """Its name."""
    rows: int
    """The best batch size; 0 where the library chose."""
    patches: int
    """Patches in each timed run."""
    seconds: tuple[float, ...]
    """Wall-clock time of each."""
    peak_bytes: float
    """Most memory allocated on the GPU beyond what was before the run; NaN on a CPU."""
    error: float
    """Difference from the reference, as in :data:`TOLERANCE`."""

    @property
    def milliseconds(self) -> tuple[float, ...]:
        """Milliseconds a patch, for every run."""
        return tuple(1000 * seconds / self.patches for seconds in self.seconds)


def peer_names(text: str) -> list[str]:
    """The peers in a comma-separated list.

    Raises:
        InputError: a name that is not known, or twice there.
    """
    names = text.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown or len(set(names)) < len(names):
        what = f"{unknown[0]!r} is not known" if unknown else "a name is there twice"
        raise InputError(f"--peers {text}: {what}; choose from {', '.join(PEERS)}")
    return names


def make_peers(names: Sequence[str], models: Models) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names, and for those that cannot run here a sentence that says why."""
    peers: list[Peer] = []
    left_out = {}
    for name in names:
        module, _, kind = PEERS[name].partition(":")
        try:
            peers.append(getattr(importlib.import_module(module), kind)(models))
        except ModuleNotFoundError as error:
            left_out[name] = f"{error.name} is not installed: pip install {error.name}"
        except Exception as error:  # whatever somebody else's package does with this version of transformers
            left_out[name] = _told(error)
    return peers, left_out


def version(peer: Peer | type[Peer]) -> str:
    """The version of a peer's package, also where it was only put on the path."""
    try:
        return metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return getattr(importlib.import_module(peer.package.replace("-", "_")), "__version__", "unknown")


def difference(values: Values, reference: Values, clean: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Root mean square of ``values - reference``, in the units of :data:`TOLERANCE`."""
    unit = reference - clean if dtype == torch.float32 else reference
    return ((values - reference).square().mean() / unit.square().mean()).sqrt().item()


def check(peers: Sequence[Peer], work: Workload, models: Models) -> tuple[dict[str, float], dict[str, str]]:
    """Each peer's difference from the reference on a random part of the sweep; and why others may not be timed.

    Raises:
        EngineError: when sinklens itself is wrong.
    """
    small = work.first_prompts(2).part(8)
    reference = RunWithHooks(models)
    expected, clean = reference.run(small, 0), reference.clean(small)
    errors, refused = {}, {}
    for peer in peers:
        try:
            found = peer.run(small, min(peer.rows, default=0))
            errors[peer.name] = difference(found, expected, clean, models.dtype)
        except Exception as error:
            if isinstance(peer, Sinklens):
                raise
            refused[peer.name] = _told(error)
            continue
        if not errors[peer.name] <= TOLERANCE[models.dtype]:  # written so that NaN fails too
            unit = "the patches' effect" if models.dtype == torch.float32 else "the readout"
            refused[peer.name] = (
                f"its numbers differ from one run_with_hooks for each patch by {errors[peer.name]:.2g} of {unit}, "
                f"more than {TOLERANCE[models.dtype]:g}"
            )
    if Sinklens.name in refused:
        raise EngineError(f"sinklens must not be timed: {refused[Sinklens.name]}")
    return errors, refused


def best_rows(peer: Peer, work: Workload, device: torch.device, seconds: float) -> tuple[int, float]:
    """The batch size with the least time for a patch, and that time.

    Larger and larger parts of the sweep are run, one full batch each, until one takes longer than ``seconds``.
    """
    trials = [(rows, rows) for rows in peer.rows] or [(0, size) for size in (8, *ROWS[device.type][1:])]
    best, least = trials[0][0], float("inf")
    for rows, size in trials:
        sample = work.part(-(-size // work.n_prompts))
        try:
            taken = min(_timed(peer, sample, rows, device) for _ in range(2))
        except RuntimeError as error:
            if not is_out_of_memory(error) or least == float("inf"):
                raise
            release_cached(device)
            break
        if taken / sample.n_patches < least:
            best, least = rows, taken / sample.n_patches
        if taken > seconds or sample.n_patches == work.n_patches:
            break
    return best, least


def measure(
    peers: Sequence[Peer],
    work: Workload,
    models: Models,
    limits: Limits,
    *,
    rows: Mapping[str, tuple[int, float]],
    errors: Mapping[str, float],
    step: Callable[[str], object] = str,
) -> list[Timing]:
    """Time each peer on the workload, in turns.

    Args:
        peers: which have been checked.
        work: the sweep.
        models: what it runs on.
        limits: how long to measure.
        rows: each peer's best batch size, and about how long it takes for a patch.
        errors: each peer's difference from the reference.
        step: told what is being done.
    """
    parts = {peer.name: work if peer.whole else _part(work, *rows[peer.name], limits) for peer in peers}
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    peaks: dict[str, float] = {}
    for repeat in range(limits.repeats + 1):  # the first is a warm-up
        for i in range(len(peers)):
            peer = peers[(repeat + i) % len(peers)]
            step(peer.name)
            before = _reset_peak(models.device)
            taken = _timed(peer, parts[peer.name], rows[peer.name][0], models.device)
            if repeat:
                seconds[peer.name].append(taken)
                peaks[peer.name] = _peak(models.device) - before
    return [
        Timing(
            peer.name,
            rows[peer.name][0],
            parts[peer.name].n_patches,
            tuple(seconds[peer.name]),
            peaks[peer.name],
            errors[peer.name],
        )
        for peer in peers
    ]


def _part(work: Workload, rows: int, each: float, limits: Limits) -> Workload:
    """As many cells as there is time for, but one full batch at least."""
    fit = max(int(limits.seconds / each), rows)
    return work.part(max(8, -(-fit // work.n_prompts)), seed=1)


def _timed(peer: Peer, work: Workload, rows: int, device: torch.device) -> float:
    peer.prepare(work)
    synchronize(device)
    began = time.perf_counter()
    peer.run(work, rows)
    synchronize(device)
    return time.perf_counter() - began


def _reset_peak(device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else float("nan")


def _told(error: BaseException) -> str:
    """Somebody else's error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
