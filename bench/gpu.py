# SPDX-License-Identifier: Apache-2.0
"""The GPU table: `python -m rlkern.bench.gpu --report DIR`. Device time by events around replays of a CUDA graph.

A graph runs the call once on each of several input sets that together are larger than the L2 cache, so each call finds it
cold; one replay divided by the sets is the time of a call, without the host's part. Bytes moved in that time stand against
a device-to-device copy measured in the same minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.bench import machine, peers_gpu
from rlkern.bench.inputs import GAMMA, LAM, PER_PROMPT

SHAPES = ((64, 512), (1024, 8192), (4096, 16384), (8, 131072))
SMALL = (64, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES = 3  # the sets together hold this many times the L2 cache
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest exact value


@dataclass(frozen=True)
class Batch:
    """One set of inputs on the device."""

    rewards: Tensor
    values: Tensor
    old: Tensor
    new: Tensor
    advantages: Tensor
    mask: Tensor
    group: rlkern.GroupIndex
    tokens: int
    count: Tensor  # the same on the device, for the peer: a new number would be a new graph

    def exact(self) -> Batch:
        doubles = {k: v.double() for k, v in self.__dict__.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return Batch(**{**self.__dict__, **doubles})


Call = Callable[[Batch], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """`values` and `masks`: how many values and int64 masks a token moves. Aims: share of the copy's bandwidth at the large
    shapes, times faster than torch.compile, microseconds at (64, 512)."""

    name: str
    values: int
    masks: int
    ours: Call
    peer: Call
    aims: tuple[float, float, float]

    def bytes(self, x: Batch) -> int:
        return x.mask.numel() * (self.values * x.rewards.element_size() + self.masks * x.mask.element_size())


def _loss(x: Batch) -> Sequence[Tensor]:
    found = rlkern.policy_loss_and_grad(x.old, x.new, x.advantages, x.mask, batch_num_tokens=x.tokens)
    return found.loss, found.d_log_prob


CASES = [
    Case("policy_loss_and_grad", 4, 1, _loss, peers_gpu.policy_loss, (0.85, 1.5, 10)),
    Case("gae", 4, 1, lambda x: rlkern.gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAM), peers_gpu.gae, (0.80, 2, 10)),
    Case(
        "discounted_returns", 2, 1,
        lambda x: (rlkern.discounted_returns(x.rewards, x.mask, gamma=GAMMA),), peers_gpu.discounted_returns, (0.80, 2, 10),
    ),
    Case(
        "gae_whiten", 6, 1,  # advantages are read back and written again
        lambda x: rlkern.advantages.gae(x.rewards, x.values, x.mask, GAMMA, LAM), peers_gpu.gae_whiten, (0.75, 3, 15),
    ),
    Case(
        "reinforce_plus_plus", 4, 2,  # returns and mask are read again
        lambda x: rlkern.advantages.reinforce_plus_plus(x.rewards, x.mask, GAMMA), peers_gpu.reinforce_plus_plus, (0.75, 3, 15),
    ),
    Case("masked_whiten", 3, 1, lambda x: (rlkern.masked_whiten(x.values, x.mask),), peers_gpu.masked_whiten, (0.85, 1.2, 10)),
    Case("grpo", 2, 1, lambda x: rlkern.advantages.grpo(x.rewards, x.mask, x.group)[:1], peers_gpu.grpo, (0.80, 1.3, 15)),
    Case("rloo", 2, 1, lambda x: rlkern.advantages.rloo(x.rewards, x.mask, x.group)[:1], peers_gpu.rloo, (0.80, 1.3, 15)),
]  # fmt: skip


@dataclass
class Row:
    case: str
    shape: tuple[int, int]
    dtype: str
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    copy_bandwidth: float = 0.0


# ---- inputs ---------------------------------------------------------------------------------------------------------
def make(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Batch:
    """Lengths of 10 to 100 % of T, rewards and values on valid tokens; drawn on the device."""
    rows, tokens = shape
    g = torch.Generator(device).manual_seed(seed)
    lengths = torch.randint(max(tokens // 10, 1), tokens + 1, (rows,), generator=g, device=device)
    mask = (torch.arange(tokens, device=device)[None] < lengths[:, None]).long()

    def noise(scale: float) -> Tensor:
        return (torch.randn(rows, tokens, generator=g, device=device) * scale).to(dtype)

    old = noise(0.5) - 1
    group = rlkern.group_index(torch.arange(rows, device=device) // PER_PROMPT)
    count = mask.sum()
    return Batch(noise(0.1) * mask, noise(1.0) * mask, old, old + noise(0.15), noise(1.0), mask, group, int(count), count)


def sets(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Batch]:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    a_set = shape[0] * shape[1] * (4 * dtype.itemsize + 8)
    return [make(shape, dtype, device, seed) for seed in range(max(2, -(-CACHES * l2 // a_set)))]


# ---- time -----------------------------------------------------------------------------------------------------------
def _events(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Median seconds of `run`, by the device's clock."""
    found = []
    for _ in range(times):
        if device.type != "cuda":
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
            continue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return statistics.median(found)


def _captured(call: Call, batches: Sequence[Batch]) -> Callable[[], Any]:
    """A graph of the call on every set. Its results stay alive inside: no call writes where another has just read."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in batches[:3]:
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(x) for x in batches]

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def timed(call: Call, batches: Sequence[Batch], device: torch.device, times: int) -> tuple[float, str]:
    """Seconds per call, and how they were taken: a call that no graph can hold is timed with the host's part in it."""
    for x in batches[:2]:
        call(x)
    if device.type == "cuda":
        try:
            run = _captured(call, batches)
        except Exception as error:  # a peer that syncs: a line of the report
            torch.cuda.synchronize()
            how = f"calls ({type(error).__name__} in capture)"
        else:
            run()
            return _events(run, times, device) / len(batches), "graph"
    else:
        how = "calls"
    return _events(lambda: [call(x) for x in batches], times, device) / len(batches), how


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes read and written a second by a device-to-device copy."""
    size = size if device.type == "cuda" else 1 << 24
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / _events(lambda: target.copy_(source), 10, device)


# ---- rows -----------------------------------------------------------------------------------------------------------
def _error(found: Sequence[Tensor], exact: Sequence[Tensor], x: Batch) -> float:
    worst = 0.0
    for y, want in zip(found, exact, strict=True):
        inside = x.mask != 0 if want.shape == x.mask.shape else torch.ones_like(want, dtype=torch.bool)
        gap = torch.where(inside, (y.double() - want).abs(), 0.0).max() / torch.where(inside, want.abs(), 0.0).max()
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf)))
    return worst


def measure(case: Case, shape: tuple[int, int], dtype: torch.dtype, batches: Sequence[Batch], backend: str, times: int) -> Row:
    x, device = batches[0], batches[0].mask.device
    row = Row(case.name, shape, str(dtype).removeprefix("torch."), case.bytes(x))
    with rlkern.use_backend("torch"):
        exact = [y.detach() for y in case.ours(x.exact())]
    for name, call in (("rlkern", case.ours), ("torch.compile", case.peer)):
        with rlkern.use_backend(backend):
            try:
                row.errors[name] = _error(call(x), exact, x)
                if row.errors[name] > TOLERANCE[dtype]:
                    row.problems[name] = f"WRONG: off by {row.errors[name]:.1e} of the largest value"
                    continue
                row.seconds[name], row.how[name] = timed(call, batches, device, times)
            except Exception as error:  # what cannot run is a line of the report, not the end of it
                row.problems[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    row.copy_bandwidth = copy_bandwidth(device)
    return row


def line(case: Case, row: Row) -> str:
    """A row of the table, with the aims missed."""
    ours, peer = row.seconds.get("rlkern"), row.seconds.get("torch.compile")
    cells = [f"{row.case:22}", f"{row.shape[0]:>5} x {row.shape[1]:<7}", f"{row.dtype:9}"]
    if ours is None:
        return " ".join([*cells, row.problems.get("rlkern", "")])
    share = row.bytes / ours / row.copy_bandwidth
    missed = []
    if row.shape == SMALL:
        cells += [f"{ours * 1e6:9.1f} us"]
        missed += [f"over {case.aims[2]:g} us"] * (ours * 1e6 > case.aims[2])
    else:
        cells += [f"{ours * 1e6:9.1f} us {share:5.0%} of copy"]
        missed += [f"under {case.aims[0]:.0%}"] * (share < case.aims[0])
    if peer is not None:
        cells.append(f"{peer / ours:6.2f}x torch.compile")
        missed += [f"under {case.aims[1]:g}x"] * (row.shape != SMALL and peer / ours < case.aims[1])
    else:
        cells.append(row.problems.get("torch.compile", ""))
    return " ".join(cells) + (f"  MISSED: {', '.join(missed)}" if missed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for gpu.json")
    parser.add_argument("--ops", nargs="*", default=[c.name for c in CASES])
    parser.add_argument("--shapes", nargs="*", default=[f"{b}x{t}" for b, t in SHAPES], help="BxT")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--times", type=int, default=25, help="replays, of which the median counts")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no further row is begun")
    given = parser.parse_args()
    device, began = torch.device(given.device), time.monotonic()
    about = machine.describe() | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
    print(json.dumps(about))
    rows, left = [], []
    for shape in (tuple(map(int, text.split("x"))) for text in given.shapes):
        for dtype in (DTYPES[name] for name in given.dtypes):
            batches = sets(shape, dtype, device)  # type: ignore[arg-type]
            for case in (c for c in CASES if c.name in given.ops):
                if time.monotonic() - began > given.budget:
                    left.append(f"{case.name} {shape} {dtype}")
                    continue
                rows.append(measure(case, shape, dtype, batches, given.backend, given.times))  # type: ignore[arg-type]
                print(line(case, rows[-1]), flush=True)
    print(f"copy: {statistics.median(r.copy_bandwidth for r in rows) / 1e9:.0f} GB/s" if rows else "no row was measured")
    print(f"left out for want of time: {', '.join(left)}" if left else "every row was measured")
    if given.report:
        given.report.mkdir(parents=True, exist_ok=True)
        found = {"machine": about, "rows": [asdict(row) for row in rows], "left_out": left}
        (given.report / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
