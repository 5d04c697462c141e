# SPDX-License-Identifier: Apache-2.0
"""The one error budget, and what the tests of every op share: masks, shapes, ragged batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (rows, tokens, why). A vector holds 4 to 16 floats.
SHAPES: list[tuple[int, int, str]] = [
    (0, 5, "no rows"),
    (3, 0, "no tokens"),
    (1, 1, "one element"),
    (5, 1, "one column"),
    (1, 7, "one row, less than a vector"),
    (4, 16, "exactly one vector of 16 floats"),
    (3, 33, "whole vectors and a ragged end"),
    (2, 300, "past one flush of the moment lanes"),
    (36, 33, "more rows than columns"),
    (2, 17000, "past one fixed chunk of a row-agnostic reduction"),
]


def mask_kinds() -> list[torch.dtype]:
    """Every dtype a mask may have."""
    return [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16]


def ragged_mask(rows: int, tokens: int, holes: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """Lengths of 10 to 100 % of `tokens`, as a rollout has them; a share of `holes` inside, as tool turns make them."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(tokens // 10, min(1, tokens)), tokens + 1, (rows,), generator=g)
    mask = torch.arange(tokens)[None] < lengths[:, None]
    return (mask & (torch.rand(rows, tokens, generator=g) >= holes)).to(dtype)


def error(value: Tensor | float, exact: Tensor | float) -> float:
    """max |value - exact|; infinite where one is NaN (or another infinity) and the other is not. 0 if empty."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (value, exact))
    if a.shape != b.shape:
        raise ValueError(f"rlkern.testing.error: value must have the shape of exact, {tuple(b.shape)}; got {tuple(a.shape)}.")
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return float(gap.nan_to_num(nan=math.inf).max())


def budget(framework: Tensor | float, exact: Tensor | float, dtype: torch.dtype, scale: Tensor | float) -> float:
    """What a kernel's error may be: 2 * the framework's own error in `dtype`, plus 4 eps * scale.

    `scale` is the largest sum of the absolute terms that any one result adds up.
    """
    own = error(framework, exact)
    if not math.isfinite(own):
        own = 0.0  # a framework that fails gives no room
    largest = torch.as_tensor(scale).detach().double().abs()
    largest = largest[largest.isfinite()]
    return 2.0 * own + 4.0 * torch.finfo(dtype).eps * (float(largest.max()) if largest.numel() else 0.0)


def whitened_scale(x: Tensor, terms: Tensor, mask: Tensor) -> Tensor:
    """Whitening x, whose elements are sums of `terms`: each feels its own error and the mean's, times 1 / std, and that of
    1 / std itself, whose share is the mean of |x - mean| times the terms, over the variance."""
    weights = (mask != 0).to(x.dtype)

    def mean_of(y: Tensor) -> Tensor:
        return torch.where(mask != 0, y, 0.0).sum() / weights.sum().clamp(min=1)

    mean, centre = mean_of(terms), mean_of(x)
    var = mean_of((x - centre).square()) * weights.sum() / (weights.sum() - 1).clamp(min=1)
    rstd, gap = torch.rsqrt(var + 1e-8), (x - centre).abs()
    share = mean_of(gap * (terms + mean)) / var.clamp(min=1e-8)
    return (2 * (terms + mean) + gap * share) * rstd


def assert_within(kernel: Tensor | float, framework: Tensor | float, exact: Tensor | float, scale: Tensor | float, what: str = "") -> None:
    """Raise unless the kernel's error is within the budget of its own dtype."""
    dtype = kernel.dtype if isinstance(kernel, Tensor) and kernel.is_floating_point() else torch.float64
    allowed, found = budget(framework, exact, dtype, scale), error(kernel, exact)
    if not found <= allowed:
        raise AssertionError(f"{what}: error {found:.3e} against float64 is over the budget {allowed:.3e} ({dtype})")


def _on_gpu(x: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def _sent(op: str, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The call on the GPU: each argument goes there with its strides and comes back; an input that a kernel has written is an
    error."""
    schema = getattr(torch.ops.rlkern, op).default._schema
    inputs = len(schema.arguments) - 1  # less the backend
    moved = [_on_gpu(x.detach()) if isinstance(x, Tensor) else x for x in args]
    count = run(*moved)
    for i, (x, there) in enumerate(zip(args, moved, strict=True)):
        if isinstance(x, Tensor):
            back = there.cpu()
            if i >= inputs:
                x.copy_(back)
            elif x.numel() and not torch.equal(_bits(back), _bits(x)):
                raise AssertionError(f"{op} has written its argument {schema.arguments[i].name}")
    return count


def judged(op: str, args: tuple[Any, ...]) -> float:
    """What a kernel on the CPU gives to be judged: how much is valid, its weights added up by the ops that weigh; as
    given moments say; of pass@k, the groups of one row."""
    given = dict(zip((x.name for x in getattr(torch.ops.rlkern, op).default._schema.arguments), args, strict=False))
    if given.get("baseline") == "second_best":
        return float((given["offsets"].diff() == 1).sum())
    if given.get("moments") is not None:
        return float(given["moments"].flatten()[0])
    mask = given.get("mask", given.get("response_mask"))
    if mask is None:
        return float(args[0].numel())
    return float(mask.double().sum() if op.startswith(("_masked", "_whiten")) else (mask != 0).sum())


def through_gpu(backend: str) -> None:
    """From now on "triton", or "cuda", runs CPU tensors on the GPU: the tests of every op then exercise the compiled kernels."""
    from rlkern import backends, kernels, streams

    def at_home(args: tuple[Any, ...]) -> bool:
        return not any(isinstance(x, Tensor) and x.device.type == "cpu" for x in args)

    if backend == "triton":
        launch, reasons = kernels.launcher, backends._triton_reasons
        kernels.launcher = lambda op: lambda *args: launch(op)(*args) if at_home(args) else _sent(op, launch(op), args)  # type: ignore[assignment]
        backends._triton_reasons = lambda op, device: reasons(op, "cuda")
        return
    module, cuda_reasons = backends.cuda, backends._cuda_reasons

    class Sending:
        def __getattr__(self, op: str) -> Any:
            kernel = getattr(module, op)
            if not op.startswith("_"):
                return kernel

            def run(*given: Any) -> Any:
                args = given[:-1]
                if at_home(args):
                    return kernel(*given)
                _sent(op, lambda *moved: kernel(*moved, streams.place(torch.device("cuda", 0))), args)
                return judged(op, args)

            return run

    backends.cuda = Sending()  # type: ignore[assignment]
    backends._cuda_reasons = lambda op, device: cuda_reasons(op, "cuda")


def _bits(x: Tensor) -> Tensor:
    """The bits of a tensor, by which NaN equals itself."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
