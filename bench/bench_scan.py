# SPDX-License-Identifier: Apache-2.0
"""GAE 24 bytes an element, with whitening too; discounted returns 16; REINFORCE++ 20 (int64 masks, each output once)."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("gae_whiten", "gae", "discounted_returns", "reinforce_plus_plus"))
def test_scan(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
