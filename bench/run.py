# SPDX-License-Identifier: Apache-2.0
"""One benchmark: check every answer, then time the ones that are right."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlkern.bench import inputs, timing
from rlkern.bench.cases import CASES, FRAMEWORK, Case, calls, peers
from rlkern.bench.inputs import Inputs
from rlkern.bench.peers_eager import Call, Outputs
from rlkern.cli.against import plain
from rlkern.cli.framework import rows_by_label

OURS, EMPTY = "rlkern", "rlkern on empty tensors"
TOLERANCE = 1e-4  # of the largest exact value; every error is in the report
SHAPES = {"core": ((64, 512), (256, 2048), (1024, 8192)), "algorithms": ((256, 2048), (1024, 4096))}


@dataclass(frozen=True)
class Shape:
    """A batch to time on. hot: one set, in cache; cold: rotating sets, in no cache; large: one set, reused outputs."""

    label: str
    kind: str
    make: Callable[[], list[Inputs]]


@dataclass
class Row:
    """One op at one shape and thread count. A name in `problems` was not timed, or must not be compared."""

    op: str
    shape: str
    kind: str
    threads: int
    bytes: int
    elements: int
    seconds: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    bandwidth: float = math.nan
    cache_bandwidth: float = math.nan
    dropped: int = 0

    def ratio(self, name: str) -> float:
        """How many times longer than rlkern `name` takes; NaN unless both answers were right."""
        if OURS not in self.seconds or name not in self.seconds:
            return math.nan
        return self.seconds[name] / self.seconds[OURS]

    def rival(self) -> str | None:
        """The fastest peer, the framework's own path included."""
        others = [name for name in self.seconds if name not in (OURS, EMPTY)]
        return min(others, key=self.seconds.__getitem__) if others else None


def shape_of(rows: int, tokens: int) -> Shape:
    label, elements = f"({rows}, {tokens})", rows * tokens
    if elements <= 1 << 17:
        return Shape(label, "hot", lambda: [inputs.make(rows, tokens)])
    if elements < 1 << 22:
        return Shape(label, "cold", lambda: [inputs.make(rows, tokens, seed) for seed in range(12)])
    return Shape(label, "large", lambda: [inputs.make(rows, tokens).with_out()])


def labels_shape() -> Shape:
    def build() -> list[Inputs]:
        tiny = inputs.make(1, 2)
        return [replace(tiny, uid=inputs.uuids(inputs.LABELS, random.Random(0), shared=False))]

    return Shape(f"{inputs.LABELS} uuid strings", "labels", build)


def batch_shape(batch: Any) -> Shape:
    return Shape(f"batch {batch.shape}", "hot", lambda: [inputs.from_batch(batch)])


# ---- answers --------------------------------------------------------------------------------------------------------
def _answer(case: Case, outputs: Outputs, x: Inputs) -> list[torch.Tensor]:
    """What is compared: inside the mask, where implementations agree on the meaning."""
    if case.compared == "partition":
        ids = outputs[0].tolist()
        first = rows_by_label(ids)
        return [torch.tensor([first[i][0] for i in ids], dtype=torch.float64)]
    found = [y.detach().double() for y in outputs]
    if case.compared == "mask":
        return [torch.where(x.mask != 0, y, 0.0) if y.shape == x.mask.shape else y for y in found]
    return found


def _error(case: Case, call: Call, exact: list[torch.Tensor], x: Inputs) -> float:
    """Largest error as a share of the largest exact value, over all outputs."""
    worst = 0.0
    for got, want in zip(_answer(case, call(x), x), exact, strict=True):
        scale = float(want.abs().max()) or 1.0
        gap = float((got - want).abs().max()) / scale
        worst = max(worst, gap if not math.isnan(gap) else math.inf)
    return worst


def _exact(case: Case, x: Inputs) -> list[torch.Tensor]:
    return _answer(case, calls(plain())[case.name](x.exact()), x)


def _check(case: Case, candidates: dict[str, Call], exact: list[torch.Tensor], x: Inputs, row: Row) -> dict[str, Call]:
    """The candidates whose answer is right; the others' reasons go into the row."""
    right = {}
    for name, call in candidates.items():
        try:
            row.errors[name] = _error(case, call, exact, x)
        except AttributeError as error:
            row.problems[name] = f"missing: {error}"
        except Exception as error:  # a peer that cannot run is a line of the report, not the end of it
            lines = str(error).strip().splitlines()
            row.problems[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        else:
            if row.errors[name] <= TOLERANCE:
                right[name] = call
            else:
                row.problems[name] = f"WRONG: off by {row.errors[name]:.1e} of the largest value"
    return right


# ---- time -----------------------------------------------------------------------------------------------------------
def _empty(case: Case, tokens: int) -> Inputs | None:
    """No rows, or the two tokens that an op needs which refuses an empty mask."""
    tiny = inputs.make(1, 2)
    for x in (inputs.make(0, tokens), replace(tiny, mask=torch.ones_like(tiny.mask))):
        try:
            case.ours(x)
        except Exception:
            continue
        return x
    return None


@dataclass(frozen=True)
class Plan:
    """What to run. `budget` is the seconds that one candidate may use in one row."""

    shapes: Sequence[Shape]
    threads: Sequence[int]
    ops: Sequence[str]
    rounds: int
    budget: float

    def rows(self) -> Iterator[tuple[Shape, Case, int]]:
        for shape in self.shapes:
            for case in CASES:
                if case.name in self.ops and (case.compared == "partition") == (shape.kind == "labels"):
                    for threads in self.threads:
                        yield shape, case, threads


def _time(case: Case, right: dict[str, Call], sets: list[Inputs], row: Row, plan: Plan, bandwidth: Any) -> None:
    hot = row.kind in ("hot", "labels")
    candidates: dict[str, Any] = dict(right)
    if row.kind == "hot" and OURS in right:
        empty = _empty(case, sets[0].shape[1])
        if empty is not None:
            candidates[EMPTY] = lambda x: case.ours(empty)
        row.cache_bandwidth = timing.cache_bandwidth()
    samples, row.dropped = timing.interleave(candidates, sets, bandwidth, plan.rounds, plan.budget, hot)
    used = [b for s in samples.values() for b in s.bandwidth]
    row.bandwidth = sorted(used)[len(used) // 2] if used else math.nan
    for name, s in samples.items():
        if not s.seconds:
            row.problems[name] = "every round was dropped: the machine was too busy"
            continue
        row.seconds[name], row.rounds[name] = s.median, len(s.seconds)
        if row.bytes:
            row.floors[name] = s.floors(row.bytes * row.elements)


def run(plan: Plan, progress: Callable[[str], Any] = lambda text: None) -> tuple[list[Row], dict[str, str]]:
    """Every row of the plan in order, and the notes on peers."""
    found, notes = peers()
    rows: list[Row] = []
    built: tuple[Shape | None, list[Inputs]] = (None, [])
    before = torch.get_num_threads()
    copies: dict[int, timing.Bandwidth] = {}
    answer: tuple[tuple[str, str], list[torch.Tensor]] = (("", ""), [])
    for shape, case, threads in plan.rows():
        if built[0] is not shape:
            built = (None, [])  # the last shape's memory goes first
            built = (shape, shape.make())
        sets = built[1]
        progress(f"{shape.label}, {threads} thread{'s' * (threads > 1)}: {case.title}")
        torch.set_num_threads(threads)
        if "numba" not in notes:
            from rlkern.bench import peers_numba

            peers_numba.threads(threads)
        row = Row(case.name, shape.label, shape.kind, threads, case.bytes, sets[0].mask.numel())
        copy = copies.setdefault(threads, timing.Bandwidth(threads))
        notes["bandwidth"] = copy.kind
        if answer[0] != (shape.label, case.name):
            answer = ((shape.label, case.name), _exact(case, sets[0]))
        right = _check(case, {OURS: case.ours} | found[case.name], answer[1], sets[0], row)
        if right:
            _time(case, right, sets, row, plan, copy)
        rows.append(row)
    torch.set_num_threads(before)
    return rows, notes


def wrong(rows: Sequence[Row]) -> list[str]:
    """rlkern's own failures, a line each."""
    return list(dict.fromkeys(f"{r.op} at {r.shape}: {r.problems[OURS]}" for r in rows if OURS in r.problems))


__all__ = [
    "EMPTY",
    "FRAMEWORK",
    "OURS",
    "SHAPES",
    "Plan",
    "Row",
    "Shape",
    "batch_shape",
    "labels_shape",
    "run",
    "wrong",
]
