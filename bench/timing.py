# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds in one process, each beside the copy bandwidth of its own moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlkern import backends

COPY = 64 << 20  # bytes per side: far beyond any last-level cache that matters here
COLLAPSED = 0.7  # of the median bandwidth: a neighbour had the machine
# Seconds that a sample lasts; a shorter call is repeated. Data that must be cold comes from rotating sets, so that a longer
# sample leaves it cold while code, allocator and interpreter are as warm as in a loop over micro-batches.
HOT, COLD = 300e-6, 8e-3


class Bandwidth:
    """Copy bandwidth in bytes per second, read and written bytes both counted."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._source = torch.ones(COPY // 4)
        self._target = torch.empty_like(self._source)
        self._stream: Callable[..., Any] | None = getattr(backends.native, "stream_copy", None)
        self.kind = "non-temporal copy" if self._stream else "torch copy_ (ordinary stores: no stream_copy in this build)"

    def _copy(self) -> None:
        if self._stream is None:
            self._target.copy_(self._source)
        else:
            self._stream(self._target.data_ptr(), self._source.data_ptr(), COPY, self.threads)

    def measure(self) -> float:
        best = min(_seconds(self._copy, 1) for _ in range(2))
        return 2 * COPY / best


def cache_bandwidth() -> float:
    """The same for 2 x 128 KiB that stay in one core's own cache; what a call costs by itself is taken off."""
    source, target = np.ones(1 << 15, np.float32), np.empty(1 << 15, np.float32)
    tiny = np.ones(1, np.float32)

    def quickest(a: Any, b: Any) -> float:
        return min(_seconds(lambda: np.copyto(a, b), 200) for _ in range(20))

    gap = quickest(target, source) - quickest(tiny.copy(), tiny)
    return 2.0 * source.nbytes / gap if gap > 0 else float("inf")


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


@dataclass
class Samples:
    """One candidate's seconds per call, and the bandwidth of the same round."""

    seconds: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    spent: float = 0.0
    inner: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def floors(self, size: float) -> float:
        """Median over rounds of time / (size / bandwidth of that round)."""
        return statistics.median(s * b / size for s, b in zip(self.seconds, self.bandwidth, strict=True))


Candidate = Callable[[Any], Any]


def _sample(call: Candidate, sets: Sequence[Any], turn: int, inner: int, hot: bool) -> float:
    """Seconds per call, over `inner` calls on consecutive sets."""
    for _ in range(3 if hot else 0):
        call(sets[0])  # the round's own copies have emptied the caches
    chosen = [sets[(turn * inner + i) % len(sets)] for i in range(inner)]
    start = time.perf_counter()
    for x in chosen:
        call(x)
    return (time.perf_counter() - start) / inner


def _inner(call: Candidate, sets: Sequence[Any], hot: bool) -> int:
    """Warm up, and choose how many calls make a sample."""
    call(sets[0])
    wanted, seconds = HOT if hot else COLD, _seconds(lambda: call(sets[-1]), 1)
    if seconds < wanted:
        seconds = _seconds(lambda: call(sets[0]), 5)
    return max(1, min(int(wanted / max(seconds, 1e-7)), 1000))


def interleave(
    candidates: dict[str, Candidate],
    sets: Sequence[Any],
    bandwidth: Bandwidth,
    rounds: int,
    budget: float,
    hot: bool = False,
) -> tuple[dict[str, Samples], int]:
    """A/B/C/... rounds. A candidate leaves once it has used `budget` seconds, after three samples at least.

    Returns each candidate's samples, and how many rounds were dropped because the bandwidth had collapsed.
    """
    found = {name: Samples(inner=_inner(call, sets, hot)) for name, call in candidates.items()}
    moments: list[tuple[float, dict[str, float]]] = []
    for turn in range(rounds):
        names = list(found)  # a new one first in each round: what follows the copies starts with empty caches
        names = names[turn % len(names) :] + names[: turn % len(names)]
        due = [name for name in names if found[name].spent < budget or turn < 3]
        before = bandwidth.measure()
        taken = {}
        for name in due:
            taken[name] = _sample(candidates[name], sets, turn, found[name].inner, hot)
            found[name].spent += taken[name] * found[name].inner
        moments.append(((before + bandwidth.measure()) / 2, taken))
    usual = statistics.median(b for b, _ in moments)
    for b, taken in moments:
        for name, seconds in taken.items():
            if b >= COLLAPSED * usual:
                found[name].seconds.append(seconds)
                found[name].bandwidth.append(b)
    return found, sum(b < COLLAPSED * usual for b, _ in moments)
