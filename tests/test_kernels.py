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


# Triton's own binder makes the keys; a stand-in driver names the GPU; the hook sees each key that is not in the cache and
# keeps Triton from compiling it.
COUNT = """
import collections, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from rlkern import kernels

class Machine:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Machine())
keys = collections.defaultdict(set)
triton.knobs.runtime.jit_cache_hook = lambda **seen: keys[seen["fn"].name.rpartition(".")[2]].add(seen["key"]) or True

def step(T, make):
    lp, ref, mask, out = (make(T) for _ in range(4))
    wide, score = [-20.0, 20.0, -10.0, 10.0], torch.empty(8)
    kernels.launcher("_kl_penalty_fwd")(lp, ref, "k3", wide, out)
    kernels.launcher("_kl_penalty_bwd")(out, lp, ref, "k3", wide, [True, False], torch.empty_like(lp), None)
    kernels.launcher("_shape_rewards_fwd")(lp, None, lp, ref, mask, None, T / 1000, "k3", wide, [-1.0, 1.0], out)
    kernels.launcher("_shape_rewards_fwd")(None, score, lp, ref, mask, None, T / 1000, "k3", wide, [-1.0, 1.0], out)
    kernels.launcher("_shape_rewards_bwd")(out, score, mask, None, [-1.0, 1.0], torch.empty(8))

for T in (1, 2, 15, 16, 17, *range(1000, 1050), 4096):
    step(T, lambda T: torch.empty(8, T))
    step(T, lambda T: torch.empty(8, 5000)[:, :T])
    step(T, lambda T: torch.empty(8, 5001)[:, 1 : T + 1])
print(dict(sorted((name, len(found)) for name, found in keys.items())))

from rlkern.kernels import kl
keys.clear()
plain = triton.jit(kl.kl_penalty_fwd_kernel.fn)
for T in (1, 16, 17):
    numbers = (T, T, T, T, 1, -20.0, 20.0, -10.0, 10.0)
    plain[(1,)](*(torch.empty(8, T) for _ in range(3)), *numbers, "k3", True, 0, (1, 1, 1), False, 1024)
print(len(keys["kl_penalty_fwd_kernel"]))
"""


def test_kernels_compile_at_most_twice_while_T_changes():
    pytest.importorskip("triton")
    done = run(COUNT)
    assert done.returncode == 0, done.stderr
    counts, plain = done.stdout.splitlines()
    names = [
        "kl_penalty_bwd_kernel",
        "kl_penalty_fwd_kernel",
        "placed_rewards_fwd_kernel",
        "shape_rewards_bwd_kernel",
        "shape_rewards_fwd_kernel",
    ]
    assert counts == str(dict.fromkeys(names, 2))
    assert int(plain) == 3  # the count sees it where a kernel is specialised on T


CHECK = f"""
import sys; sys.path.insert(0, {str(ROOT / "tools")!r})
import sass_check
from rlkern.kernels import kl
variant = next(v for v in kl.VARIANTS if v.dtype == "fp32")
for bad in ({{}}, {{"registers": (8, 8)}}, {{"loads": ("log_prob", "ref_log_prob", "log_prob")}}, {{"stores": ("value", "value")}}):
    planned = variant._replace(plan=variant.plan._replace(**bad))
    print("BREACHES", sass_check.check([planned], {{"sm_90": sass_check.TARGETS["sm_90"]}}))
"""


def test_kernels_sass_check_catches():
    """A right plan passes; a wrong one is a breach, aligned and not."""
    pytest.importorskip("triton")
    done = run(CHECK)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("BREACHES")] == ["0", "2", "2", "2"]
    for words in ("registers, planned 8", "loads 4 x 128 bit, planned 6 x 128 bit", "stores 2 x 128 bit, planned 4 x 128 bit"):
        assert words in done.stdout
