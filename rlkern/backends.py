# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs an op: torch (the reference), cpp, triton, cuda; `auto` picks, a name insists."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlkern.measured import CUDA_FIRST

NAMES = ("torch", "cpp", "triton", "cuda")
TORCH, CPP, TRITON, CUDA = range(4)
VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DTYPES = [*VALUE_DTYPES, torch.bool, torch.uint8, torch.int32, torch.int64]  # the order of enum Dtype in csrc/args.h
_TORCH = tuple(int(x) for x in torch.__version__.split(".")[:2])

logger = logging.getLogger("rlkern")


def register(module: ModuleType) -> ModuleType:
    """Tell a native module what a tensor is; it links no torch."""
    module.register_torch(_DTYPES, Tensor, torch.nn.Parameter, getattr(Tensor, "__dlpack_c_exchange_api__", None))
    return module


# A module that is not there, or does not load, is a reason that `rlkern info` and `why_not` give.
native: ModuleType | None = None
native_error = ""
try:
    native = register(importlib.import_module("rlkern._C"))
except ImportError as error:
    native_error = f"the native module is not there ({error}); install with a C++17 compiler and without RLKERN_NATIVE=0"
cuda: ModuleType | None = None
cuda_error = "the CUDA module is not built (RLKERN_CUDA=1)"
try:
    cuda = register(importlib.import_module("rlkern._C_cuda"))
except ModuleNotFoundError:
    pass
except ImportError as error:
    cuda_error = f"the CUDA module does not load ({error})"


class BackendError(RuntimeError):
    """A backend was named that cannot run the op here; the message holds every reason."""


# A plain dict: Dynamo traces and guards it, which it does for neither a ContextVar nor a lock.
_choice: dict[str, str] = {"backend": "auto"}
_picked: dict[tuple[str, str, torch.device, torch.dtype], int] = {}
_logged: set[str] = set()


def _parse(name: str) -> tuple[str, str]:
    backend, _, isa = name.strip().lower().partition(":")
    if backend not in ("auto", *NAMES) or (isa and backend != "cpp"):
        raise BackendError(
            f"rlkern.use_backend: name must be one of auto, {', '.join(NAMES)}, or cpp:<isa>; got {name!r}. "
            "RLKERN_BACKEND takes the same words."
        )
    return backend, isa


def set_backend(name: str) -> None:
    """Choose the backend for this process: `auto`, `torch`, `cpp` (or `cpp:avx2`, `cpp:base`), `triton`, `cuda`."""
    backend, isa = _parse(name)
    if native is not None and not native.set_isa(isa):
        usable = [k for k, ok in native.isas().items() if ok]
        raise BackendError(f"rlkern.use_backend: isa must be one of {usable}; got {isa!r}. Leave it out for the widest.")
    if isa and native is None:
        raise BackendError(f"rlkern.use_backend: backend must exist here; got {name!r}, but {native_error}")
    _choice["backend"] = backend if not isa else f"cpp:{isa}"
    _picked.clear()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`with rlkern.use_backend("torch"):` runs the ops inside on that backend; a named one that cannot run raises."""
    before = _choice["backend"]
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def current_backend() -> str:
    return _choice["backend"]


def _triton_reasons(op: str, device: str) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed (pip install rlkern[triton])")
    if _TORCH < (2, 8):  # asked of torch: why_not is traced, and `import triton` cannot be
        reasons.append(f"torch is {torch.__version__}; the kernels need Triton 3.4 or newer, which torch brings from 2.8 on")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("tensors are on the CPU; Triton runs there only under TRITON_INTERPRET=1")
    if device not in ("cpu", "cuda"):  # ROCm's is "cuda" too
        reasons.append(f"tensors are on {device}; the Triton kernels run on CUDA and ROCm")
    if not reasons:
        from rlkern import kernels

        if not kernels.has(op):
            reasons.append(f"rlkern.kernels has no kernel for {op} yet")
    return reasons


def _cuda_reasons(op: str, device: str) -> list[str]:
    reasons = []
    if cuda is None:
        reasons.append(cuda_error)
    elif not hasattr(cuda, op):
        reasons.append(f"the CUDA module has no kernel for {op} yet")
    if device != "cuda" or torch.version.hip is not None:
        reasons.append(f"tensors are on {'ROCm' if device == 'cuda' else device}; the CUDA kernels run on NVIDIA's GPUs")
    return reasons


def why_not(backend: str, op: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Every reason why `backend` cannot run raw op `op` on tensors of that device and dtype; empty if it can."""
    reasons = []
    if dtype not in VALUE_DTYPES:
        reasons.append(f"values must be float32, float64, float16 or bfloat16, not {dtype}")
    if backend == "cpp":
        if native is None:
            reasons.append(native_error)
        elif not hasattr(native, op):
            reasons.append(f"the native module has no kernel for {op}")
        if device != "cpu":
            reasons.append(f"tensors are on {device}; the C++ kernels run on the CPU")
    elif backend == "triton":
        reasons += _triton_reasons(op, device)
    elif backend == "cuda":
        reasons += _cuda_reasons(op, device)
    return reasons


def _architecture(device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)  # what Dynamo folds into a constant
    return f"sm_{p.major}{p.minor}"


def _order(op: str, device: torch.device) -> tuple[str, ...]:
    """What `auto` tries before torch: Triton first, but for ops that a results file shows to be at least as fast on CUDA."""
    if device.type == "cpu":
        return ("cpp",)
    first = CUDA_FIRST and cuda is not None and op in CUDA_FIRST.get(_architecture(device), ())
    return ("cuda", "triton") if first else ("triton", "cuda")


def _pick(choice: str, op: str, device: torch.device, dtype: torch.dtype) -> int:
    backend = choice.partition(":")[0]
    if backend != "auto":
        reasons = why_not(backend, op, device.type, dtype)
        if reasons:
            raise BackendError(
                f"rlkern.{op.strip('_')}: backend {backend!r} must be able to run here; got: {'; '.join(reasons)}. "
                "Use backend 'auto' to let rlkern choose."
            )
        return NAMES.index(backend)
    return next((NAMES.index(b) for b in _order(op, device) if not why_not(b, op, device.type, dtype)), TORCH)


def pick(op: str, x: Tensor) -> int:
    """The backend for raw op `op` on tensor `x`, as the number the raw ops take."""
    key = (_choice["backend"], op, x.device, x.dtype)
    found = _picked.get(key)
    if found is None:
        found = _pick(key[0], op, x.device, x.dtype)
        if not torch.compiler.is_compiling():
            _picked[key] = found
    return found


def log_fallback(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say once per op that `auto` took the reference path, and why. Called where the op runs, never while tracing."""
    if _choice["backend"] != "auto" or op in _logged:
        return
    _logged.add(op)
    reasons = [f"{b}: {r}" for b in _order(op, device) for r in why_not(b, op, device.type, dtype)]
    logger.warning("rlkern: %s runs on the torch backend (correct, slower): %s", op.strip("_"), "; ".join(reasons))


def explain(op: str, *tensors: Tensor) -> str:
    """Print, and return, which backend `op` would take for these tensors, and what keeps the others from running."""
    from rlkern import library

    x = tensors[0] if tensors else torch.empty(0)
    lines = []
    for raw in library.raw_ops(op):
        taken = NAMES[_pick(_choice["backend"], raw, x.device, x.dtype)]
        lines.append(f"{raw.strip('_')} on {x.device.type}, {x.dtype}: {taken}")
        for name in NAMES:
            reasons = why_not(name, raw, x.device.type, x.dtype)
            lines.append(f"  {name:7}{'ok' if not reasons else '; '.join(reasons)}")
    for i, t in enumerate(tensors):
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) not in (0, 1):
            lines.append(f"  tensor {i} has inner stride {t.stride(-1)}: it is copied once, to rows of stride 1")
    text = "\n".join(lines)
    print(text)
    return text


def environment_backend() -> None:
    """Read RLKERN_BACKEND, the one environment variable, at import."""
    value: Any = os.environ.get("RLKERN_BACKEND")
    if value:
        set_backend(value)
