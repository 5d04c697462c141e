# SPDX-License-Identifier: Apache-2.0
"""Policy loss with its gradient: 24 bytes an element (old, new, advantages 4 each, int64 mask 8, gradient 4)."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("policy_loss_and_grad", "policy_loss"))
def test_loss(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
