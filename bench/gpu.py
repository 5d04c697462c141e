# SPDX-License-Identifier: Apache-2.0
"""The GPU table: `python -m rlkern.bench.gpu --report DIR`. Device time by events around replays of a CUDA graph.

A graph runs the call once on each of several input sets that together are larger than the L2 cache, so each call finds it
cold; one replay divided by the sets is the time of a call, without the host's part. cuda, triton, torch.compile and eager
take turns. Bytes moved in that time stand against a device-to-device copy measured in the same minute.
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
from rlkern import backends
from rlkern.bench import machine, peers_gpu
from rlkern.bench.gpu_cases import CASES, DTYPES, LARGE, LONG, SHAPES, SMALL, Batch, Call, Case, sets

BACKENDS = ("cuda", "triton")
PEERS: dict[str, peers_gpu.Of] = {"torch.compile": peers_gpu.compiled, "eager": peers_gpu.eager}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest exact value
SMALL_DEVICE, SMALL_HOST = 6, 12  # microseconds, at the small shape
WHITEN_OVER_TRITON, LONG_SHARE = 1.5, 0.60  # of cuda: masked_whiten at the large shape, the scans of few long rows
HOST_CALLS = 200
BUSY = 400_000  # cycles, 0.2 ms


@dataclass
class Row:
    case: str
    op: str
    shape: tuple[int, int]
    dtype: str
    bytes: dict[str, int] = field(default_factory=dict)  # by backend
    seconds: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)  # seconds until a call returns, at the small shape
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    copy_bandwidth: float = 0.0


# ---- time -----------------------------------------------------------------------------------------------------------
def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of `run`, by the device's clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY)  # the device waits for the host's part, not the clock
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


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


def prepared(call: Call, batches: Sequence[Batch], device: torch.device) -> tuple[Callable[[], Any], str]:
    """What runs the call on every set, and how: a call that no graph can hold is timed with the host's part in it."""
    for x in batches[:2]:
        call(x)
    how = "calls"
    if device.type == "cuda":
        try:
            run = _captured(call, batches)
        except Exception as error:  # a peer that syncs: a line of the report
            torch.cuda.synchronize()
            how = f"calls ({type(error).__name__} in capture)"
        else:
            run()
            return run, "graph"
    return lambda: [call(x) for x in batches], how


def host_seconds(call: Call, batches: Sequence[Batch], device: torch.device) -> float:
    """Until a call returns, while the device has time to follow."""
    found = []
    for i in range(HOST_CALLS):
        start = time.perf_counter()
        call(batches[i % len(batches)])
        found.append(time.perf_counter() - start)
        if device.type == "cuda" and i % 16 == 15:
            torch.cuda.synchronize()
    return statistics.median(found)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes read and written a second by a device-to-device copy."""
    size = size if device.type == "cuda" else 1 << 24
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(_seconds(lambda: target.copy_(source), device) for _ in range(10))


# ---- rows -----------------------------------------------------------------------------------------------------------
def _error(found: Sequence[Tensor], exact: Sequence[Tensor], x: Batch) -> float:
    worst = 0.0
    for y, want in zip(found, exact, strict=True):
        inside = x.mask != 0 if want.shape == x.mask.shape else torch.ones_like(want, dtype=torch.bool)
        gap = torch.where(inside, (y.double() - want).abs(), 0.0).max() / torch.where(inside, want.abs(), 0.0).max()
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf)))
    return worst


def sides(case: Case, names: Sequence[str]) -> dict[str, Call]:
    """Each with its backend: one named is one that runs, or says why it cannot."""

    def on(backend: str) -> Call:
        def call(x: Batch) -> Sequence[Tensor]:
            with rlkern.use_backend(backend):
                return case.ours(x)

        return call

    def peer(of: peers_gpu.Of) -> Call:
        return lambda x: case.peer(x, of)

    return {name: peer(PEERS[name]) if name in PEERS else on(name) for name in names}


def measure(case: Case, shape: tuple[int, int], dtype: torch.dtype, batches: Sequence[Batch], names: Sequence[str], times: int) -> Row:
    x, device = batches[0], batches[0].mask.device
    row = Row(
        case.name, case.op, shape, str(dtype).removeprefix("torch."), {name: case.bytes(x, name) for name in names if name not in PEERS}
    )
    exact = [y.detach() for y in sides(case, ["torch"])["torch"](x.exact())]
    runs: dict[str, Callable[[], Any]] = {}
    for name, call in sides(case, names).items():
        try:
            row.errors[name] = _error(call(x), exact, x)
            if row.errors[name] > TOLERANCE[dtype]:
                row.problems[name] = f"WRONG: off by {row.errors[name]:.1e} of the largest value"
                continue
            runs[name], row.how[name] = prepared(call, batches, device)
            if shape == SMALL and name not in PEERS:
                with rlkern.use_backend(name):
                    row.host[name] = host_seconds(case.ours, batches, device)
        except Exception as error:  # what cannot run is a line of the report, not the end of it
            row.problems[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):  # in turns: what else the machine does meets all
        for name, run in runs.items():
            found[name].append(_seconds(run, device) / len(batches))
    row.seconds = {name: statistics.median(seconds) for name, seconds in found.items()}
    row.copy_bandwidth = copy_bandwidth(device)
    return row


def _missed(case: Case, row: Row, name: str) -> list[str]:
    mine, missed = row.seconds[name], []
    if row.shape == SMALL:
        if name == "cuda" and mine * 1e6 > SMALL_DEVICE:
            missed.append(f"over {SMALL_DEVICE} us")
        if name == "cuda" and row.host.get(name, 0.0) * 1e6 > SMALL_HOST:
            missed.append(f"host over {SMALL_HOST} us")
        return missed
    aim = LONG_SHARE if row.shape == LONG and name == "cuda" else case.of_copy.get(name, 0.0)
    if row.bytes[name] / mine / row.copy_bandwidth < aim:
        missed.append(f"under {aim:.0%}")
    if "torch.compile" in row.seconds and row.seconds["torch.compile"] / mine < case.compiled:
        missed.append(f"under {case.compiled:g}x torch.compile")
    whitens = name == "cuda" and case.name == "masked_whiten" and row.shape == LARGE and row.dtype == "float32"
    if whitens and row.seconds.get("triton", 0) / mine < WHITEN_OVER_TRITON:
        missed.append(f"under {WHITEN_OVER_TRITON:g}x triton")
    return missed


def lines(case: Case, row: Row) -> str:
    """A row of the table a backend, with the aims missed."""
    found = []
    for name in row.bytes:
        cells = [f"{row.case:22}{row.shape[0]:>5} x {row.shape[1]:<7}{row.dtype:9}{name:7}"]
        mine = row.seconds.get(name)
        if mine is None:
            found.append(cells[0] + row.problems.get(name, ""))
            continue
        cells.append(f"{mine * 1e6:9.1f} us {row.bytes[name] / mine / row.copy_bandwidth:5.0%} of copy")
        cells += [f"{seconds / mine:6.2f}x {other}" for other, seconds in row.seconds.items() if other != name]
        cells += [f"host {row.host[name] * 1e6:.1f} us"] if name in row.host else []
        missed = _missed(case, row, name)
        found.append("  ".join(cells) + (f"  MISSED: {', '.join(missed)}" if missed else ""))
    found += [f"  {name}: {why}" for name, why in row.problems.items() if name in PEERS]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for gpu.json")
    parser.add_argument("--ops", nargs="*", default=[c.name for c in CASES])
    parser.add_argument("--shapes", nargs="*", default=[f"{b}x{t}" for b, t in SHAPES], help="BxT")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="*", default=[b for b in BACKENDS if b != "cuda" or backends.cuda is not None])
    parser.add_argument("--times", type=int, default=25, help="replays, of which the median counts")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no further row is begun")
    given = parser.parse_args()
    device, began = torch.device(given.device), time.monotonic()
    about: dict[str, Any] = dict(machine.describe())
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        about |= {"gpu": p.name, "arch": f"sm_{p.major}{p.minor}"}
    print(json.dumps(about))
    rows: list[Row] = []
    left: list[str] = []

    def keep() -> None:
        """After each row: what ends this run loses none."""
        if given.report:
            given.report.mkdir(parents=True, exist_ok=True)
            found = {"machine": about, "rows": [asdict(row) for row in rows], "left_out": left}
            (given.report / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")

    for shape in (tuple(map(int, text.split("x"))) for text in given.shapes):
        for dtype in (DTYPES[name] for name in given.dtypes):
            batches = sets(shape, dtype, device)  # type: ignore[arg-type]
            for case in (c for c in CASES if c.name in given.ops):
                if time.monotonic() - began > given.budget:
                    left.append(f"{case.name} {shape} {dtype}")
                    continue
                rows.append(measure(case, shape, dtype, batches, [*given.backends, *PEERS], given.times))  # type: ignore[arg-type]
                print(lines(case, rows[-1]), flush=True)
                keep()
    print(f"copy: {statistics.median(r.copy_bandwidth for r in rows) / 1e9:.0f} GB/s" if rows else "no row was measured")
    print(f"left out for want of time: {', '.join(left)}" if left else "every row was measured")
    keep()


if __name__ == "__main__":
    main()
