# SPDX-License-Identifier: Apache-2.0
"""What the pytest-benchmark files share: one call of one op by one side, at (256, 2048), outputs reused.

They keep a history of absolute times; comparisons come from `rlkern bench`, which interleaves the sides.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from rlkern.bench import inputs
from rlkern.bench.cases import CASES, Case, peers
from rlkern.bench.inputs import Inputs
from rlkern.bench.peers_eager import Call

SHAPE = (256, 2048)


@cache
def _calls() -> dict[str, dict[str, Call]]:
    return peers()[0]


@cache
def _inputs() -> Inputs:
    return inputs.make(*SHAPE).with_out()


def case(op: str) -> Case:
    return next(c for c in CASES if c.name == op)


def sides(*ops: str) -> list[Any]:
    """(op, side) pairs: rlkern first, then each peer."""
    return [pytest.param(op, side, id=f"{op}-{side}") for op in ops for side in ("rlkern", *_calls()[op])]


def run(benchmark: Any, op: str, side: str) -> None:
    """Time it, and write down the bytes that the op must move."""
    chosen, x = case(op), _inputs()
    call = chosen.ours if side == "rlkern" else _calls()[op][side]
    benchmark.group = op
    benchmark.extra_info.update(bytes=chosen.bytes * x.mask.numel(), moved=chosen.moved, shape=SHAPE)
    benchmark.pedantic(call, args=(x,), rounds=5, iterations=1, warmup_rounds=1)
