# SPDX-License-Identifier: Apache-2.0
"""Triton kernels; installs as rlkern.kernels. Triton is imported on first use, and nothing compiles at import."""

from __future__ import annotations

from typing import Any


def has(op: str) -> bool:
    """Is there a Triton kernel for raw op `op`?"""
    return False


def run(op: str, *args: Any) -> Any:
    """Launch raw op `op`."""
    raise NotImplementedError(f"rlkern.kernels has no kernel for {op}")
