# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the backends of this machine, NaN in fresh buffers, hypothesis without a clock."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

import rlkern
from rlkern import backends, library
from rlkern.testing import through_gpu

# A deadline would measure the machine; the function-scoped fixtures here hold no state that an example could change.
hypothesis.settings.register_profile(
    "rlkern",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rlkern")
collect_ignore = ["frameworks"]  # `make test-frameworks`: with the frameworks, in an environment of their own
torch.set_num_threads(1)  # small tensors all over: a second thread costs more than it gives; test_native asks for more


def reasons(backend: str) -> list[str]:
    """Why no op runs on `backend` on this machine; empty if one does."""
    device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
    found = [backends.why_not(backend, op, device) for op in library.OPS]
    return [] if not all(found) else found[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=backends.NAMES, help="run that backend's tests alone; triton: on the GPU, or interpreted")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("backend")
    if chosen in ("triton", "cuda") and torch.cuda.is_available():
        through_gpu(chosen)
    elif chosen == "cuda":
        _emulate_cuda(config)
    if chosen != "triton" or torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported: it decides what @triton.jit makes
    _hasten_interpreter()


def _emulate_cuda(config: pytest.Config) -> None:
    """Backend "cuda" from here on: csrc/cuda as C++ (tests/cuda_emulator), on CPU tensors, under AddressSanitizer."""
    found = sorted((pathlib.Path(__file__).parents[1] / "build" / "emulated").glob("_C_cuda*.so"))
    if not found:
        raise pytest.UsageError("without a GPU, --backend cuda needs the emulated module: make emulated")
    _under_sanitizer(config)
    spec = importlib.util.spec_from_file_location("rlkern._C_cuda", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backends.cuda, reasons = backends.register(module), backends._cuda_reasons
    backends._cuda_reasons = lambda op, device: reasons(op, "cuda")
    place = library.streams.place

    def clean(device: torch.device) -> tuple[int, int, int, int, torch.Tensor]:
        """A kernel leaves its counters zero: the next one asks whether the last one did."""
        found = place(device)
        if library.streams._memories[device, 0][: library.streams.COUNTERS].any():
            raise AssertionError("a kernel has left a counter that is not 0")
        return found

    library.streams.place = clean
    _hasten_gradcheck()


def _under_sanitizer(config: pytest.Config) -> None:
    """AddressSanitizer must be there before anything allocates: start again with it."""
    libraries = [subprocess.run(["g++", f"-print-file-name={x}"], capture_output=True, text=True, check=True).stdout.strip()
                 for x in ("libasan.so", "libstdc++.so")]  # fmt: skip
    if libraries[0] in os.environ.get("LD_PRELOAD", ""):
        return
    config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
    env = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | env)


def _hasten_gradcheck() -> None:
    """It launches a number of times per element: here random projections of the Jacobian."""
    for name in ("gradcheck", "gradgradcheck"):
        setattr(torch.autograd, name, functools.partial(getattr(torch.autograd, name), fast_mode=True))


def _hasten_interpreter() -> None:
    """The interpreter patches Triton's language at each call of a device function, which takes most of its time; ours see
    the language alone, and the launch has patched that already."""
    import numpy
    from triton.language import core
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__

    def fast(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton's own (tl.sum) see its core, which stays patched once it was
        patched = self.fn.__module__.startswith("rlkern.") or not core.is_builtin(core.load)
        return self.rewrite()(*args, **kwargs) if patched else call(self, *args, **kwargs)

    InterpretedFunction.__call__ = fast
    numpy.seterr(all="ignore")  # it computes by numpy, which would say so at each NaN, infinity and underflow
    _hasten_gradcheck()
    _hasten_scans()
    _fuse()
    _watch()


def _watch() -> None:
    """Every access of a launch lies within one of its tensors, or the launch fails."""
    import numpy
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    starts, ends = numpy.zeros(0, numpy.uint64), numpy.zeros(0, numpy.uint64)

    def bounds(x: torch.Tensor) -> tuple[int, int]:
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal starts, ends
        found = sorted(bounds(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        starts, ends = (numpy.array([x[i] for x in found], numpy.uint64) for i in (0, 1))
        ends = numpy.maximum.accumulate(ends)
        return run(self, *args, **kwargs)

    def check(ptrs: Any, mask: Any) -> None:
        address = numpy.broadcast_to(ptrs.data, numpy.shape(mask.data))[mask.data.astype(bool)]
        i = numpy.searchsorted(starts, address, "right")
        inside = (i > 0) & (address + numpy.uint64(ptrs.get_element_ty().primitive_bitwidth + 7 >> 3) <= ends[i - 1])
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} addresses are outside the launch's tensors")

    def watched(access: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any) -> Any:
            check(args[0], args[place])
            return access(self, *args)

        return wrapper

    run, GridExecutor.__call__ = GridExecutor.__call__, launch
    InterpreterBuilder.create_masked_load = watched(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = watched(InterpreterBuilder.create_masked_store, 2)


def _fuse() -> None:
    """The interpreter's fma rounds twice. Of float32, its product and sum in float64 round once, but for ties."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fma

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != "float32":
            return plain(self, x, y, z)
        return TensorHandle((x.data.astype("float64") * y.data + z.data).astype("float32"), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma


def _hasten_scans() -> None:
    """The interpreter's scan takes an element at a time; in log steps on whole blocks, as here and on the GPU, it is some
    hundred times as fast."""
    import numpy
    from triton.runtime.interpreter import ScanOps

    def scan(self: Any, given: Any) -> Any:
        found, size, k = list(given), given[0].handle.data.size, 1
        while k < size:
            far = [self.to_tensor(numpy.roll(x.handle.data, k), x.dtype) for x in found]
            both = self.combine_fn.rewrite()(*far, *found)
            for near, y in zip(found, both, strict=True):
                y.handle.data[:k] = near.handle.data[:k]
            found, k = list(both), 2 * k
        return found

    ScanOps.generic_scan = scan


def pytest_report_header(config: pytest.Config) -> list[str]:
    missing = {name: why for name in backends.NAMES if (why := reasons(name))}
    lines = [f"rlkern {rlkern.__file__}: backends {', '.join(available(config))}"]
    return lines + [f"  without {name}: {'; '.join(why)}" for name, why in missing.items()]


def available(config: pytest.Config) -> list[str]:
    """The backends to test: the one named, or all that the machine has."""
    only = config.getoption("backend")
    return [only] if only else [name for name in backends.NAMES if not reasons(name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available(metafunc.config), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a backend named, its tests alone; interpreted, float32 and bfloat16 stand for the four dtypes, as a launch is slow."""
    chosen = config.getoption("backend")
    left_out = (torch.float64, torch.float16) if chosen == "triton" and not torch.cuda.is_available() else ()

    def other(item: pytest.Item) -> bool:
        if "backend" not in getattr(item, "fixturenames", ()) and item.path.name != "test_gpu.py":
            return True
        return hasattr(item, "callspec") and item.callspec.params.get("dtype") in left_out

    if chosen:
        others = [item for item in items if other(item)]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend to be tested, in force for the test."""
    with rlkern.use_backend(request.param):
        yield request.param


@pytest.fixture
def backend_number(backend: str) -> int:
    """The backend as raw ops take it."""
    return backends.NAMES.index(backend)


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN, so that an output an op forgets to write shows."""

    def filled(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            x = make(*args, **kwargs)
            if type(x) is torch.Tensor and x.is_floating_point() and x.device.type == "cpu":
                x.detach().fill_(torch.nan)
            return x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
