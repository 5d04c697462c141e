# SPDX-License-Identifier: Apache-2.0
"""Raw ops: one `define` each gives torch.library its schema, its fake and its implementations.

A raw op's arguments are tensors, numbers, strings and, last, the backend's number; torch, cpp and interpreted Triton all
run on CPU tensors, Triton and CUDA on a GPU's, so the dispatcher's keys cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import backends, streams

_LIBRARY = torch.library.Library("rlkern", "DEF")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list, torch.dtype))
_HUGE = 4 << 20  # bytes; smaller outputs come from the allocator's own pages


class Op(NamedTuple):
    """`alloc(*args)` gives the empty outputs: the fake, and what a kernel fills. `reference(*args)` computes them.

    `judge(count, *args)` raises for what only the data can show (an all-zero mask); None where nothing can.
    """

    name: str
    alloc: Callable[..., Any]
    reference: Callable[..., Any]
    judge: Callable[..., None] | None


OPS: dict[str, Op] = {}


def define(
    name: str,
    schema: str,
    alloc: Callable[..., Any],
    reference: Callable[..., Any],
    judge: Callable[..., None] | None = None,
) -> None:
    """Register raw op `name`; `schema` is "(args) -> results" without the backend, which comes last."""
    arguments, _, results = schema.rpartition("->")
    arguments = arguments.strip().removesuffix(")")
    op = OPS[name] = Op(name, alloc, reference, judge)
    _LIBRARY.define(f"{name}{arguments}, int backend) -> {results.strip()}")
    _LIBRARY.impl(name, lambda *args: run(op, args[:-1], args[-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlkern::{name}", lambda *args: alloc(*args[:-1]), lib=_LIBRARY)


def raw_ops(op: str) -> list[str]:
    """The raw ops behind a public name: `gae` -> `_gae_fwd`, `_gae_bwd`."""
    found = [name for name in OPS if name == op or name.strip("_").rsplit("_", 1)[0] == op]
    if not found:
        public = sorted({name.strip("_").rsplit("_", 1)[0] for name in OPS})
        raise ValueError(f"rlkern.explain: op must be one of {', '.join(public)}; got {op!r}.")
    return found


def run(op: Op, args: Sequence[Any], backend: int, out: Any = None) -> Any:
    """The op on real tensors. `out` is what `alloc` would give, or None."""
    if backend == backends.CPP:
        return _run_native(op, args, out)
    if backend == backends.TRITON:
        return _run_triton(op, args, out)
    if backend == backends.CUDA:
        return _run_cuda(op, args, out)
    first = next(a for a in args if isinstance(a, Tensor))
    backends.log_fallback(op.name, first.device, first.dtype)
    result = op.reference(*args)
    if out is None:
        return result
    if isinstance(out, Tensor):
        return out.copy_(result)
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out


def fresh(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor of that shape; the plain call takes half the time of the others."""
    if (dtype is None or like.dtype is dtype) and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _run_native(op: Op, args: Sequence[Any], out: Any) -> Any:
    native: Any = backends.native
    outs = op.alloc(*args) if out is None else out
    filled = []
    for x in (outs,) if isinstance(outs, Tensor) else outs:
        size = x.nbytes
        if size >= _HUGE and out is None:
            native.huge_pages(x.data_ptr(), size)
        filled.append(x if size else None)
    count = getattr(native, op.name)(*args, *filled, torch.get_num_threads())
    if op.judge is not None:
        op.judge(count, *args)
    return outs


def _run_triton(op: Op, args: Sequence[Any], out: Any) -> Any:
    """Like the native call; but what only a device knows stays there: its count is judged on CPU tensors alone."""
    from rlkern import kernels

    outs = op.alloc(*args) if out is None else out
    flat = (outs,) if isinstance(outs, Tensor) else outs
    count = kernels.launcher(op.name)(*args, *[x if x.numel() else None for x in flat])
    if op.judge is not None and flat[0].device.type == "cpu":
        op.judge(float(count), *args)
    return outs


def _run_cuda(op: Op, args: Sequence[Any], out: Any) -> Any:
    outs = op.alloc(*args) if out is None else out
    flat = (outs,) if isinstance(outs, Tensor) else outs
    device = flat[0].device
    count = getattr(backends.cuda, op.name)(*args, *[x if x.numel() else None for x in flat], streams.place(device))
    if op.judge is not None and device.type == "cpu":  # emulated
        op.judge(count, *args)
    return outs


def call(name: str, *args: Any, backend: int, out: Any = None) -> Any:
    """The raw op: through the dispatcher where someone listens (tracing, fake tensors, modes), else directly.

    At small shapes the layers are the cost, not the kernel.
    """
    if out is None and not unheard(args):
        return getattr(torch.ops.rlkern, name)(*args, backend)
    return run(OPS[name], args, backend, out)


def unheard(args: Sequence[Any]) -> bool:
    """Does nobody listen to the dispatcher: no tracing, no mode, no tensor subclass?"""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return _PLAIN.issuperset(map(type, args))


def differentiate(forward: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Any]:
    """Gradients that can themselves be differentiated: the reference path under autograd (double backward)."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with torch.enable_grad():
        outputs = forward(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = iter(torch.autograd.grad(outputs[: len(grads)], wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def wants_double_backward(*grads: Tensor | None) -> bool:
    """Is the backward itself being recorded (create_graph=True)?"""
    return torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads)
