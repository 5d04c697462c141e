# SPDX-License-Identifier: Apache-2.0
"""Rollout correction with its metrics: 28 bytes an element (two log-probs 4 each, int64 mask 8, weights 4, modified mask 8)."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("rollout_correction"))
def test_correction(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
