# SPDX-License-Identifier: Apache-2.0
"""Whitening: over everything, row by row, or by given moments."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.moments import as_rows, checked, packed, row_shape, stacked
from rlkern.reference import whiten as reference
from rlkern.types import EpsMode, Moments

_NOTHING = torch.empty(0)


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _whiten_alloc(by_row: bool, values: Tensor, mask: Any, cu: Tensor | None, flags: Any, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    if not save:
        return library.fresh(values), values.new_empty(0)
    return library.fresh(values), values.new_empty((*row_shape(values, cu), 3) if by_row else 3, dtype=reference.wide(values))


def _apply_bwd_alloc(grad: Tensor, values: Tensor, mask: Any, cu: Any, moments: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_values, need_moments = rest[-1]
    return values.new_empty(values.shape if need_values else 0), moments.new_empty(moments.shape if need_moments else 0)


def _judge_whiten(count: float, values: Tensor, mask: Any, cu: Any, flags: list[bool], eps: float, save: bool) -> None:
    check.valid_tokens("masked_whiten", count, flags[0])


def _judge_apply(count: float, values: Tensor, mask: Any, cu: Any, moments: Any, flags: list[bool], eps: float, by_row: bool) -> None:
    if not by_row:
        check.valid_tokens("whiten_apply", count, flags[0])


for _name, _by_row in (("masked_whiten", False), ("masked_normalize", True)):
    library.define(
        f"_{_name}_fwd",
        "(Tensor values, Tensor? mask, Tensor? cu_seqlens, bool[] flags, float eps, bool save) -> (Tensor, Tensor)",
        partial(_whiten_alloc, _by_row),
        getattr(reference, _name),
        None if _by_row else _judge_whiten,
    )
    library.define(
        f"_{_name}_bwd",
        "(Tensor grad, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor moments, bool[] flags, float eps) -> Tensor",
        lambda grad, values, *rest: library.fresh(values),
        getattr(reference, f"{_name}_bwd"),
    )
library.define(
    "_whiten_apply_fwd",
    "(Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor moments, bool[] flags, float eps, bool by_row) -> Tensor",
    lambda values, *rest: library.fresh(values),
    reference.whiten_apply,
    _judge_apply,
)
library.define(
    "_whiten_apply_bwd",
    "(Tensor grad, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor moments, bool[] flags, float eps, bool by_row, bool[] needs)"
    " -> (Tensor, Tensor)",
    _apply_bwd_alloc,
    reference.whiten_apply_bwd,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _Whiten(torch.autograd.Function):
    """masked_whiten and masked_normalize."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor | None, cu: Tensor | None, *rest: Any) -> Tensor:
        op, flags, eps, backend = ctx.rest = rest
        out: Tensor
        out, moments = library.call(f"_{op}_fwd", values, mask, cu, flags, eps, True, backend=backend)
        ctx.save_for_backward(values, mask, cu, moments)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, mask, cu, moments = ctx.saved_tensors
        op, flags, eps, backend = ctx.rest
        if library.wants_double_backward(grad, values):

            def forward(values: Tensor) -> Tensor:
                out: Tensor = getattr(reference, op)(values, mask, cu, flags, eps, False)[0]
                return out

            return (*library.differentiate(forward, (values,), (grad,)), *[None] * 6)
        return (library.call(f"_{op}_bwd", check.inner(grad), values, mask, cu, moments, flags, eps, backend=backend), *[None] * 6)


class _WhitenApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, moments: Tensor, mask: Tensor | None, cu: Tensor | None, *rest: Any) -> Tensor:
        flags, eps, by_row, backend = ctx.rest = rest
        ctx.save_for_backward(values, moments, mask, cu)
        out: Tensor = library.call("_whiten_apply_fwd", values, mask, cu, moments, flags, eps, by_row, backend=backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, moments, mask, cu = ctx.saved_tensors
        flags, eps, by_row, backend = ctx.rest
        if library.wants_double_backward(grad, values, moments):

            def forward(values: Tensor, moments: Tensor) -> Tensor:
                return reference.whiten_apply(values, mask, cu, moments, flags, eps, by_row)

            return (*library.differentiate(forward, (values, moments), (grad,)), *[None] * 6)
        needs = list(ctx.needs_input_grad[:2])
        args = (check.inner(grad), values, mask, cu, moments, flags, eps, by_row, needs)
        found = library.call("_whiten_apply_bwd", *args, backend=backend)
        return (*[x if need else None for x, need in zip(found, needs, strict=True)], *[None] * 6)


# ---- arguments ------------------------------------------------------------------------------------------------------
def _flags(op: str, eps_mode: EpsMode, unbiased: bool, shift_mean: bool, scale_by_std: bool, mask_output: bool) -> list[bool]:
    check.word(op, "eps_mode", eps_mode, ("add", "floor"))
    return [bool(unbiased), eps_mode == "floor", bool(shift_mean), bool(scale_by_std), bool(mask_output)]


def _out(op: str, out: Tensor | None, values: Tensor, grad: bool) -> Tensor | None:
    """`out` as the same rows that as_rows makes of values."""
    if out is None:
        return None
    same = type(out) is Tensor and out.shape == values.shape and out.dtype is values.dtype and out.device == values.device
    if same and out.is_contiguous() and not grad:
        return as_rows(out)  # at small shapes the checks cost as much as the kernel
    check.out_tensors(op, out, values, [values.dtype], grad)
    if out.dim() not in (1, 2) and not out.is_contiguous():
        raise check.fail(
            op, "out", "be contiguous unless it has one or two dimensions", check.describe(out), "Use torch.empty_like(values)."
        )
    return as_rows(out)


def _whitened(
    op: str, values: Tensor, mask: Tensor | None, flags: list[bool], eps: float, out: Tensor | None, cu_seqlens: Tensor | None = None
) -> Tensor:
    values, mask = checked(op, values, mask)
    cu = None if cu_seqlens is None else packed(op, values, cu_seqlens)
    eps = check.number(op, "eps", eps, 0.0)
    shape, grad = values.shape, check.wants_grad(values)
    into = _out(op, out, values, grad)
    values, mask = as_rows(values), None if mask is None else as_rows(mask)
    backend = pick(f"_{op}_fwd", values)
    result: Tensor
    if out is not None:
        library.call(f"_{op}_fwd", values, mask, cu, flags, eps, False, backend=backend, out=(into, _NOTHING))
        return out
    if grad:
        result = _Whiten.apply(values, mask, cu, op, flags, eps, backend)  # type: ignore[no-untyped-call]
    else:
        result = library.call(f"_{op}_fwd", values, mask, cu, flags, eps, False, backend=backend)[0]
    return result if len(shape) in (1, 2) else result.reshape(shape)


# ---- public ops -----------------------------------------------------------------------------------------------------
def masked_whiten(
    values: Tensor,
    mask: Tensor | None,
    shift_mean: bool = True,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_mode: EpsMode = "add",
    scale_by_std: bool = True,
    mask_output: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Values shifted and scaled to mean 0 and variance 1 over the mask.

    (v - mu) rsqrt(var + eps), with mu and var over all elements where the mask is not 0; plus mu if not shift_mean.

    Args:
        values: any shape, floating point. Where the mask is 0 a value enters no statistic, only its own output.
        mask: like values, bool, integer or float; its values are weights. None = all ones.
        shift_mean: leave the mean at 0, or put it back.
        unbiased: divide by N - 1 (verl, TRL) or by N (OpenRLHF, NeMo); N = sum(mask).
        eps: what keeps the root from 0.
        eps_mode: "add": rsqrt(var + eps). "floor": rsqrt(max(var, eps)) (OpenRLHF).
        scale_by_std: False: only the shift.
        mask_output: 0 where the mask is 0, and nothing read there. False (verl): (v - mu) rsqrt(...) there too.
        out: a tensor to write into; not with values that require grad.

    Returns:
        Tensor like values.

    Gradient:
        To values, through the mean and the variance. A NaN at a masked value whose gradient is 0 stays at its place.

    Numerics:
        Moments in float64; the mean is subtracted in two parts, so that a large one costs no digits. verl's 1e-8 beside N,
        which float32 rounds away, is left out.

    Raises:
        ValueError: the mask's sum is 0, or 1 if unbiased (on the CPU; elsewhere the result is NaN). Shapes, devices, eps < 0.
        TypeError: dtypes that do not fit.

    Example:
        >>> rlkern.masked_whiten(torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.tensor([1, 1, 1, 0]))
        tensor([-1.,  0.,  1.,  0.])

    Source:
        verl and TRL masked_whiten; OpenRLHF's global advantage normalisation (unbiased=False, eps_mode="floor").
    """
    flags = _flags("masked_whiten", eps_mode, unbiased, shift_mean, scale_by_std, mask_output)
    return _whitened("masked_whiten", values, mask, flags, eps, out)


def masked_normalize(
    values: Tensor,
    mask: Tensor | None,
    *,
    unbiased: bool = False,
    eps: float = 1e-8,
    eps_mode: EpsMode = "floor",
    scale_by_std: bool = True,
    mask_output: bool = True,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Each row shifted and scaled to mean 0 and variance 1 over its mask.

    Over the last dimension, with c = max(sum(m), 1): mu = sum(m v) / c, var = sum(m (v - mu)^2) / c,
    out = (v - mu) rsqrt(max(var, eps)), and 0 where the mask is 0.

    Args:
        values: any shape, floating point; rows are the last dimension, or those of packed (N,). Where the mask is 0 they
            are not read (unless mask_output is False: then for their own output).
        mask: like values, bool, integer or float; its values are weights. None = all ones.
        unbiased, eps, eps_mode, scale_by_std, mask_output, out: as `masked_whiten`; the defaults are OpenRLHF's.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Tensor like values. A row without a valid element is 0.

    Gradient:
        To values, through each row's mean and variance.

    Numerics:
        As `masked_whiten`. OpenRLHF multiplies by the mask where this op selects: equal for masks of zeros and ones.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit. No count is refused; a row of one valid
            element is NaN if unbiased.

    Example:
        >>> rlkern.masked_normalize(torch.tensor([[1.0, 3.0, 5.0], [7.0, 8.0, 9.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]))
        tensor([[-1.,  1.,  0.],
                [ 0.,  0.,  0.]])

    Source:
        OpenRLHF masked_normalize.
    """
    flags = _flags("masked_normalize", eps_mode, unbiased, True, scale_by_std, mask_output)
    return _whitened("masked_normalize", values, mask, flags, eps, out, cu_seqlens)


def whiten_apply(
    values: Tensor,
    moments: Moments | Tensor,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_mode: EpsMode = "add",
    scale_by_std: bool = True,
    mask_output: bool = False,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Values whitened by given moments: the last of the three steps of sharded whitening.

    (v - mean) rsqrt(m2 / (count - 1) + eps), and the other forms of `masked_whiten`.

    Args:
        values: any shape, or packed (N,), floating point. With mask_output not read where the mask is 0.
        moments: 0-dim, for all values (merged over the shards), or one a row: the shape of values without its last dimension,
            (rows,) for packed rows.
        mask: like values; read with mask_output only.
        shift_mean, unbiased, eps, eps_mode, scale_by_std, mask_output, out: as `masked_whiten`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Tensor like values.

    Gradient:
        To values (the moments held fixed) and to moments.mean and moments.m2, by which it reaches every shard's values.

    Numerics:
        masked_whiten(v, m) = whiten_apply(v, masked_moments(v, m)), to the bit.

    Raises:
        ValueError: a 0-dim count of 0, or 1 if unbiased (on the CPU; elsewhere, and for rows, the result is NaN). Shapes.
        TypeError: dtypes that do not fit.

    Example:
        >>> v, m = torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.tensor([1, 1, 1, 0])
        >>> rlkern.whiten_apply(v, rlkern.merge_moments([rlkern.masked_moments(v, m)]))
        tensor([-1.,  0.,  1.,  0.])

    Source:
        The accurate form of slime's distributed_masked_whiten.
    """
    op = "whiten_apply"
    values, mask = checked(op, values, mask)
    flags = _flags(op, eps_mode, unbiased, shift_mean, scale_by_std, mask_output)
    eps = check.number(op, "eps", eps, 0.0)
    stats, shape = stacked(op, moments), values.shape
    by_row, cu = stats.dim() > 1, None if cu_seqlens is None else packed(op, values, cu_seqlens)
    if stats.device != values.device or (by_row and stats.shape[:-1] != row_shape(values, cu)):
        must = f"be 0-dim or {tuple(row_shape(values, cu))}, on {values.device}"
        raise check.fail(op, "moments", must, check.describe(stats[..., 0]), "One for all, or one a row.")
    grad = check.wants_grad(values, stats)
    into = _out(op, out, values, grad)
    values, mask = as_rows(values), as_rows(mask) if mask is not None and mask_output else None
    stats, cu = (stats.reshape(-1, 3), cu) if by_row else (stats, None)  # moments for all see no rows
    backend = pick("_whiten_apply_fwd", values)
    if grad:
        result: Tensor = _WhitenApply.apply(values, stats, mask, cu, flags, eps, by_row, backend)  # type: ignore[no-untyped-call]
    else:
        result = library.call("_whiten_apply_fwd", values, mask, cu, stats, flags, eps, by_row, backend=backend, out=into)
    return out if out is not None else result.reshape(shape)
