# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rlkern
from rlkern import backends

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Installed versions of what takes part, by package."""
    found = {name: version(name) for name in ("numpy", "triton", "numba", "pandas", "verl")}
    mine = {"rlkern": rlkern.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return mine | {name: text for name, text in found.items() if text}


def isa() -> str:
    return str(backends.native.isa()) if backends.native is not None else "none (pure Python)"


def allocator() -> str:
    """How malloc treats large blocks here: fresh pages can cost more than a kernel."""
    if all(os.environ.get(name) == value for name, value in MALLOC.items()):
        return "freed blocks are kept and reused (" + " ".join(f"{k}={v}" for k, v in MALLOC.items()) + ")"
    return "the C library's default (large blocks are fresh pages on every call)"


def commit() -> str | None:
    """The checkout's commit, where the package is one."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def describe() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "isa": isa(),
        "allocator": allocator(),
        "commit": commit(),
    }
