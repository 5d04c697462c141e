# SPDX-License-Identifier: Apache-2.0
"""k3 KL: 12 bytes an element (log_prob 4, ref 4, KL 4)."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("kl_k3"))
def test_kl(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
