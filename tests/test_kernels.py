# SPDX-License-Identifier: Apache-2.0
"""The Triton floor without a GPU: what importing it imports, how often a kernel compiles, machine code against its plan."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlkern import backends, kernels, library

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in which Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, cwd=tempfile.gettempdir())


def test_kernels_are_of_raw_ops():
    for family, ops in kernels.FAMILIES.items():
        assert set(ops) <= set(library.OPS), family


def test_kernels_import_is_light():
    code = "import sys, rlkern, rlkern.kernels as k; k.has('_gae_fwd'); print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    assert run(code).stdout.strip() == "[]"


def test_kernels_refuse_an_old_triton(monkeypatch):
    monkeypatch.setattr(backends, "_TORCH", (2, 7))
    assert any("need Triton 3.4" in why for why in backends.why_not("triton", "_kl_penalty_fwd", "cuda"))


CHECK = f"""
import sys; sys.path.insert(0, {str(ROOT / "tools")!r})
import sass_check
from rlkern.kernels import kl
variant = next(v for v in kl.VARIANTS if v.dtype == "fp32")
for bad in ({{}}, {{"registers": (8, 8)}}, {{"loads": ("log_prob", "ref_log_prob", "log_prob")}}, {{"stores": ("value", "value")}}):
    planned = variant._replace(plan=variant.plan._replace(**bad))
    for aligned in (True, False):
        print(sass_check.measured(planned, sass_check.TARGETS["sm_90"], aligned)[1])
"""


def test_kernels_sass_check_catches():
    """A right plan passes; a wrong one is a breach, aligned and not."""
    pytest.importorskip("triton")
    done = run(CHECK)
    assert done.returncode == 0, done.stderr
    assert [line != "[]" for line in done.stdout.splitlines()] == [False] * 2 + [True] * 6
    for words in ("registers, planned 8", "loads 4 x 128 bit, planned 6 x 128 bit", "stores 2 x 128 bit, planned 4 x 128 bit"):
        assert words in done.stdout
