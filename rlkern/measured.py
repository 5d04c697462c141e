# SPDX-License-Identifier: Apache-2.0
"""Where `auto` takes a CUDA kernel before its Triton twin: as committed results show (`python -m rlkern.bench.adopt`)."""

from __future__ import annotations

# By architecture ("sm_90"), raw ops that were at least as fast in every row of bench/results/*/gpu.json. None is measured yet.
CUDA_FIRST: dict[str, frozenset[str]] = {}
