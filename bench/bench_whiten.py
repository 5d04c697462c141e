# SPDX-License-Identifier: Apache-2.0
"""masked_whiten: 16 bytes an element (values 4, int64 mask 8, whitened 4)."""

from __future__ import annotations

from typing import Any

import pytest

from rlkern.bench.suite import run, sides


@pytest.mark.parametrize(("op", "side"), sides("masked_whiten"))
def test_whiten(benchmark: Any, op: str, side: str) -> None:
    run(benchmark, op, side)
