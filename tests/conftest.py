# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the backends of this machine, NaN in fresh buffers, hypothesis without a clock."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

import rlkern
from rlkern import backends, library

# A deadline would measure the machine; the function-scoped fixtures here hold no state that an example could change.
hypothesis.settings.register_profile(
    "rlkern",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rlkern")
torch.set_num_threads(1)  # small tensors all over: a second thread costs more than it gives; test_native asks for more


def reasons(backend: str) -> list[str]:
    """Why no op runs on `backend` on this machine; empty if one does."""
    device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
    found = [backends.why_not(backend, op, device) for op in library.OPS]
    return [] if not all(found) else found[0]


MISSING = {name: why for name in backends.NAMES if (why := reasons(name))}
AVAILABLE = [name for name in backends.NAMES if name not in MISSING]


def pytest_report_header() -> list[str]:
    lines = [f"rlkern {rlkern.__file__}: backends {', '.join(AVAILABLE)}"]
    return lines + [f"  without {name}: {'; '.join(why)}" for name, why in MISSING.items()]


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend the machine has, in force for the test."""
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
