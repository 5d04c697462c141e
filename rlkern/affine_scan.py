# SPDX-License-Identifier: Apache-2.0
"""The affine recurrence beneath every scan, differentiable in its decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.reference import affine_scan as reference


def _affine_bwd_alloc(
    grad: Tensor, decay: Tensor | None, decay_row: Tensor | None, y: Tensor, initial: Any, cu: Tensor | None, *rest: Any
) -> Any:
    need_x, need_decay, need_initial = rest[-1]
    of = decay if decay is not None else decay_row
    d_decay = of.new_empty(of.shape) if need_decay and of is not None else grad.new_empty(0)
    return grad.new_empty(grad.shape if need_x else 0), d_decay, grad.new_empty(check.rows_of(grad, cu) if need_initial else 0)


library.define(
    "_affine_scan_fwd",
    "(Tensor? decay, Tensor? decay_row, Tensor x, Tensor? initial, Tensor? cu_seqlens, float decay_value, bool reverse) -> Tensor",
    lambda decay, decay_row, x, *rest: library.fresh(x),
    reference.affine_scan,
)
library.define(
    "_affine_scan_bwd",
    "(Tensor grad, Tensor? decay, Tensor? decay_row, Tensor y, Tensor? initial, Tensor? cu_seqlens, float decay_value,"
    " bool reverse, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _affine_bwd_alloc,
    reference.affine_scan_bwd,
)


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor | None, decay_row: Tensor | None, x: Tensor, initial: Tensor | None, *rest: Any) -> Tensor:
        cu, decay_value, reverse, backend = rest
        y: Tensor = library.call("_affine_scan_fwd", decay, decay_row, x, initial, cu, decay_value, reverse, backend=backend)
        ctx.rest = rest
        ctx.save_for_backward(decay, decay_row, x, initial, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        decay, decay_row, x, initial, y = ctx.saved_tensors
        cu, decay_value, reverse, backend = ctx.rest
        if library.wants_double_backward(grad, decay, decay_row):

            def forward(*inputs: Any) -> Tensor:
                d, row, x, initial = inputs
                return reference.affine_scan(d, row, x, initial, cu, decay_value, reverse)

            return (*library.differentiate(forward, (decay, decay_row, x, initial), (grad,)), *[None] * 4)
        need, need_row, need_x, need_initial = ctx.needs_input_grad[:4]
        needs = [need_x, need or need_row, need_initial]
        args = (check.inner(grad), decay, decay_row, y, initial, cu, decay_value, reverse, needs)
        d_x, d_decay, d_initial = library.call("_affine_scan_bwd", *args, backend=backend)
        found = (d_decay if need else None, d_decay if need_row else None, d_x if need_x else None, d_initial if need_initial else None)
        return (*found, *[None] * 4)


def affine_scan(
    decay: float | Tensor,
    x: Tensor,
    *,
    reverse: bool = True,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""The affine recurrence under every scan here: y_t = x_t + decay_t y_{t+1}.

    With `reverse=False`, y_t = x_t + decay_t y_{t-1}. Past the end (or the start) y is `initial`, 0 by default.

    Args:
        decay: a number, (B,) or (B, 1): one a row, or a tensor like x: one a token. It has no unit and no mask.
        x: (B, T) or packed (N,), floating point.
        reverse: right to left (the direction of returns) or left to right.
        initial: (B,), the y that the first step reads.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor to write into; not with inputs that require grad.

    Returns:
        Tensor like x.

    Gradient:
        To x, to a tensor decay, to initial.

    Numerics:
        Arithmetic in float32 (float64 for float64). A decay of 0 starts anew.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> rlkern.affine_scan(0.5, torch.tensor([[1.0, 1.0, 1.0]]))
        tensor([[1.7500, 1.5000, 1.0000]])

    Source:
        Blelloch 1990, "Prefix sums and their applications": the associative form (c1, x1) o (c2, x2) = (c1 c2, x1 + c1 x2).
    """
    op = "affine_scan"
    check.batch(op, "x", x, cu_seqlens)
    (x,) = check.tensors(op, x, x=x)
    cu = check.lengths(op, cu_seqlens, x)
    rows = check.rows_of(x, cu)
    value, per_token, per_row = 0.0, None, None
    if not isinstance(decay, Tensor):
        value = check.number(op, "decay", decay)
    elif decay.shape == x.shape and decay.shape not in ((rows,), (rows, 1)):
        (per_token,) = check.tensors(op, x, decay=decay)
    else:
        per_row = check.per_row(op, "decay", decay, rows, x)
    initial = check.per_row(op, "initial", initial, rows, x)
    backend = pick("_affine_scan_fwd", x)
    grad = check.wants_grad(per_token, per_row, x, initial)
    if out is not None:
        out = check.out_tensors(op, out, x, [x.dtype], grad)
    if grad:
        result: Tensor = _AffineScan.apply(per_token, per_row, x, initial, cu, value, reverse, backend)  # type: ignore[no-untyped-call]
        return result
    y: Tensor = library.call("_affine_scan_fwd", per_token, per_row, x, initial, cu, value, reverse, backend=backend, out=out)
    return y
