# SPDX-License-Identifier: Apache-2.0
"""Choosing a backend: by name, by context, by environment; refusing with every reason; saying once why `auto` fell back."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

import rlkern
from rlkern import backends, library
from rlkern.bench.adopt import cuda_first
from rlkern.measured import CUDA_FIRST

needs_native = pytest.mark.skipif(backends.native is None, reason=backends.native_error)


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, away from the checkout, whose rlkern/ has no native module."""
    full = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=full, timeout=120, check=False, cwd=tempfile.gettempdir()
    )


def gae():
    x = torch.randn(2, 5)
    return rlkern.gae(x, x, gamma=0.9, lam=0.9).advantages


def test_backends_use_backend_is_a_context():
    assert backends.current_backend() == "auto"
    with rlkern.use_backend("torch"):
        assert backends.current_backend() == "torch"
        assert backends.pick("_gae_fwd", torch.zeros(1)) == backends.TORCH
    assert backends.current_backend() == "auto"
    with pytest.raises(RuntimeError, match="on purpose"), rlkern.use_backend("torch"):
        raise RuntimeError("on purpose")
    assert backends.current_backend() == "auto"


@needs_native
def test_backends_no_isa_named_is_the_widest():
    with rlkern.use_backend("cpp:"):
        assert gae().isfinite().all()


@pytest.mark.parametrize("name", ["fast", "torch:avx2", ""])
def test_backends_unknown_names(name):
    with pytest.raises(rlkern.BackendError, match=r"rlkern\.use_backend"):
        backends.set_backend(name)


def test_backends_a_named_backend_refuses_with_every_reason():
    with rlkern.use_backend("cuda"), pytest.raises(rlkern.BackendError, match=r"rlkern\.gae_fwd: backend 'cuda' must.*not built"):
        gae()
    with rlkern.use_backend("triton"), pytest.raises(rlkern.BackendError, match="triton"):
        gae()
    assert len(backends.why_not("cpp", "_gae_fwd", "cuda", torch.int64)) >= 2


@needs_native
def test_backends_auto_takes_the_kernel_on_the_cpu():
    for op in library.OPS:
        assert backends.why_not("cpp", op, "cpu") == [], op
        assert backends.pick(op, torch.zeros(1)) == backends.CPP


def test_backends_auto_says_once_why_it_fell_back(monkeypatch, caplog):
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(backends, "native_error", "the native module is not there (test)")
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(backends, "_picked", {})
    with caplog.at_level(logging.WARNING, logger="rlkern"):
        gae()
        gae()
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1
    assert "gae_fwd runs on the torch backend" in lines[0]
    assert "the native module is not there (test)" in lines[0]
    backends._picked.clear()


def test_backends_explain(capsys):
    x = torch.randn(5, 8).t()
    text = rlkern.explain("gae", x)
    assert capsys.readouterr().out.strip() == text
    for word in ("gae_fwd", "gae_bwd", "torch", "cpp", "triton", "cuda", "inner stride 8"):
        assert word in text
    with pytest.raises(ValueError, match=r"rlkern\.explain: op must be one of .*gae"):
        rlkern.explain("gea")


def test_backends_environment_variable():
    ask = "import rlkern; print(rlkern.backends.current_backend())"
    assert run(ask, RLKERN_BACKEND="torch").stdout.strip() == "torch"
    assert run(ask, RLKERN_BACKEND=" Torch ").stdout.strip() == "torch"
    if backends.native is not None:
        isa = "import rlkern; print(rlkern.backends.native.isa())"
        assert run(isa, RLKERN_BACKEND="cpp:base").stdout.strip() == "base"
    wrong = run(ask, RLKERN_BACKEND="warp")
    assert wrong.returncode != 0
    assert "rlkern.use_backend: name must be one of auto" in wrong.stderr


def test_backends_import_is_light():
    code = "import sys, rlkern; print([m for m in ('triton', 'typer', 'rich', 'safetensors', 'numba') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "rlkern._C_cuda":
            raise ImportError("libcuda.so.1: cannot open shared object file")
sys.meta_path.insert(0, Finder())
import rlkern
print(rlkern.backends.why_not("cuda", "_kl_penalty_fwd", "cuda"))
"""


def test_backends_a_cuda_module_that_does_not_load_is_a_reason():
    done = run(BROKEN)
    assert done.stdout.strip() == "['the CUDA module does not load (libcuda.so.1: cannot open shared object file)']", done.stderr


def test_backends_auto_prefers_what_was_measured(monkeypatch):
    """Where no results file speaks for them the CUDA kernels come second on a GPU; they come before the reference."""
    tried = []
    monkeypatch.setattr(backends, "why_not", lambda backend, op, device, dtype: tried.append(backend) or ["no"])
    monkeypatch.setattr(backends, "cuda", object())
    monkeypatch.setattr(backends, "CUDA_FIRST", {"sm_90": frozenset({"_gae_fwd"})})
    gpu = torch.device("cuda")
    for arch, op, first in (("sm_90", "_gae_fwd", "cuda"), ("sm_90", "_scale_fwd", "triton"), ("sm_80", "_gae_fwd", "triton")):
        monkeypatch.setattr(backends, "_architecture", lambda device, arch=arch: arch)
        assert backends._pick("auto", op, gpu, torch.float32) == backends.TORCH
        assert tried == [first, "triton" if first == "cuda" else "cuda"]
        tried.clear()


def test_backends_measured_is_what_results_show(tmp_path):
    """The committed table is that of the committed results; an op is in it by every row, or not at all."""
    results = sorted((pathlib.Path(__file__).parents[1] / "bench" / "results").glob("*/gpu.json"))
    assert cuda_first(results) == CUDA_FIRST

    def row(op, cuda, triton):
        return {"op": op, "seconds": {k: v for k, v in (("cuda", cuda), ("triton", triton)) if v}}

    rows = [row("_a", 1, 1), row("_a", 1, 2), row("_b", 1, 2), row("_b", 3, 2), row("_c", 1, None), row("_d", None, 1)]
    made = tmp_path / "gpu.json"
    made.write_text(json.dumps({"machine": {"arch": "sm_90"}, "rows": rows}))
    assert cuda_first([made]) == {"sm_90": frozenset({"_a"})}
    made.write_text(json.dumps({"bench": {"machine": {"arch": "sm_90"}, "rows": [row("_a", 3, 2)]}}))
    assert cuda_first([made]) == {}


def test_backends_fake_tensors_go_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3, 7)
        result = rlkern.gae(x, x, gamma=0.9, lam=0.9)
    assert result.advantages.shape == (3, 7)
    assert type(result.advantages) is not torch.Tensor


def test_backends_compiled_code_follows_the_choice():
    def step(x):
        return rlkern.discounted_returns(x, gamma=0.9, masked=None)

    compiled, x = torch.compile(step, fullgraph=True, backend="aot_eager"), torch.randn(2, 6)
    for name in ("torch", "auto"):
        with rlkern.use_backend(name):
            assert torch.equal(compiled(x), step(x))
