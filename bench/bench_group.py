# SPDX-License-Identifier: Apache-2.0
"""GRPO, RLOO, REINFORCE++-baseline: 16 bytes an element (rewards 4, int64 mask 8, advantages 4); labels by row."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("grpo", "rloo", "reinforce_plus_plus_baseline", "group_index"))
def test_group(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
