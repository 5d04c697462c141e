# SPDX-License-Identifier: Apache-2.0
"""Masked sums, means, variances and moments; the merge of moments over shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.reference import whiten as reference
from rlkern.types import Moments


# ---- raw ops --------------------------------------------------------------------------------------------------------
def row_shape(values: Tensor, cu: Tensor | None) -> tuple[int, ...]:
    return values.shape[:-1] if cu is None else (cu.shape[0] - 1,)


def _reduce_alloc(
    kind: str, values: Tensor, mask: Tensor | None, cu: Tensor | None, by_row: bool, unbiased: bool, save: bool
) -> tuple[Tensor, Tensor]:
    shape, wide = row_shape(values, cu) if by_row else (), reference.wide(values)
    kept = values.new_empty((*shape, 3) if save or kind == "moments" else 0, dtype=wide)
    if kind == "moments":
        return kept, values.new_empty(0, dtype=wide)
    return values.new_empty(shape, dtype=reference.reduced_dtype(kind, values, mask)), kept


def _judge_var(count: float, values: Tensor, mask: Any, cu: Any, by_row: bool, unbiased: bool, save: bool) -> None:
    if unbiased:
        check.valid_tokens("masked_var", count, True)


for _kind in ("sum", "mean", "var", "moments"):
    library.define(
        f"_masked_{_kind}_fwd",
        "(Tensor values, Tensor? mask, Tensor? cu_seqlens, bool by_row, bool unbiased, bool save) -> (Tensor, Tensor)",
        partial(_reduce_alloc, _kind),
        partial(reference.reduce, _kind),
        _judge_var if _kind == "var" else None,
    )
    library.define(
        f"_masked_{_kind}_bwd",
        "(Tensor grad, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? kept, bool by_row, bool unbiased) -> Tensor",
        lambda grad, values, *rest: library.fresh(values),
        partial(reference.reduce_bwd, _kind),
    )


# ---- autograd -------------------------------------------------------------------------------------------------------
class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor | None, cu: Tensor | None, *rest: Any) -> Tensor:
        kind, by_row, unbiased, backend = ctx.rest = rest
        result: Tensor
        result, kept = library.call(f"_masked_{kind}_fwd", values, mask, cu, by_row, unbiased, kind != "sum", backend=backend)
        ctx.save_for_backward(values, mask, cu, None if kind == "sum" else result if kind == "moments" else kept)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, mask, cu, kept = ctx.saved_tensors
        kind, by_row, unbiased, backend = ctx.rest
        if library.wants_double_backward(grad, values):

            def forward(values: Tensor) -> Tensor:
                return reference.reduce(kind, values, mask, cu, by_row, unbiased, False)[0]

            return (*library.differentiate(forward, (values,), (grad,)), *[None] * 6)
        kept = kept if kept is None else kept.detach()
        args = (grad.contiguous(), values, mask, cu, kept, by_row, unbiased)
        return (library.call(f"_masked_{kind}_bwd", *args, backend=backend), *[None] * 6)


# ---- arguments ------------------------------------------------------------------------------------------------------
def checked(op: str, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both, of one shape, with rows of stride 1."""
    check.no_transforms(op, values)
    if not isinstance(values, Tensor):
        raise check.fail(op, "values", "be a torch.Tensor", check.describe(values), "Convert it with torch.as_tensor.", TypeError)
    if mask is not None and isinstance(mask, Tensor) and mask.requires_grad:
        check.detached(op, mask=mask)
    found_values, found_mask = check.tensors(op, values, values=values, mask=mask)
    return found_values, found_mask


def as_rows(x: Tensor) -> Tensor:
    """Any shape as rows: (N, T), or (N,), one row."""
    if x.dim() in (1, 2):
        return x
    if x.dim() == 0:
        return x.reshape(1)
    rows: Tensor = check.inner(x.reshape(x.shape[:-1].numel(), x.shape[-1]))  # type: ignore[assignment]
    return rows


def _axes(op: str, axis: int | tuple[int, ...] | None, dims: int) -> tuple[int, ...]:
    """The axes to reduce, none twice; all of them for None and for ()."""
    if axis is None:
        return tuple(range(dims))
    given = axis if isinstance(axis, tuple) else (axis,)
    if not all(type(a) is int for a in given):
        raise check.fail(op, "axis", "be None, an int or a tuple of ints", repr(axis), "Name the dimensions to reduce.", TypeError)
    found = tuple(a + dims if a < 0 else a for a in given)
    if any(a < 0 or a >= max(dims, 1) for a in found) or len(set(found)) < len(found):
        raise check.fail(op, "axis", f"name different dimensions of {dims}", repr(axis), "They count from 0, or back from -1.")
    return found if found and dims else tuple(range(dims))


def _last(x: Tensor, kept: list[int], axes: tuple[int, ...]) -> Tensor:
    """(what is kept, what is reduced), by a copy unless the last dimensions are reduced."""
    x = x.permute(*kept, *axes)
    rows: Tensor = check.inner(x.reshape(x.shape[: len(kept)].numel(), x.shape[len(kept) :].numel()))  # type: ignore[assignment]
    return rows


def packed(op: str, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The checked offsets of 1-D values."""
    check.batch(op, "values", values, cu_seqlens)
    return cast(Tensor, check.lengths(op, cu_seqlens, values))


def _reduce(
    kind: str,
    values: Tensor,
    mask: Tensor | None,
    axis: int | tuple[int, ...] | None,
    cu_seqlens: Tensor | None = None,
    unbiased: bool = False,
) -> Tensor:
    op, cu = f"masked_{kind}", None
    values, mask = checked(op, values, mask)
    if cu_seqlens is not None:
        cu = packed(op, values, cu_seqlens)
        if axis is not None and (type(axis) is not int or axis != -1):
            raise check.fail(op, "axis", "be None or -1 with cu_seqlens", repr(axis), "Each packed row is reduced.")
        axis = None
    kept, shape = [0], []
    if type(axis) is not int or values.dim() != 2 or axis not in (-1, 1):  # else they are the rows that a kernel takes
        axes = () if axis is None else _axes(op, axis, values.dim())
        kept = [d for d in range(values.dim()) if d not in axes] if axes else []
        shape = [values.shape[d] for d in kept]
        if kept:
            values, mask = _last(values, kept, axes), None if mask is None else _last(mask, kept, axes)
        else:
            values, mask = as_rows(values), None if mask is None else as_rows(mask)
    backend, by_row = pick(f"_{op}_fwd", values), cu is not None or bool(kept)
    result: Tensor
    if check.wants_grad(values):
        result = _Reduce.apply(values, mask, cu, kind, by_row, unbiased, backend)  # type: ignore[no-untyped-call]
    else:
        result = library.call(f"_{op}_fwd", values, mask, cu, by_row, unbiased, False, backend=backend)[0]
    return result.reshape(*shape, *result.shape[1:]) if len(kept) > 1 else result


def stacked(op: str, moments: Moments | Tensor) -> Tensor:
    """(..., 3), in the wide float type."""
    parts = tuple(moments) if isinstance(moments, Moments) else (moments,)
    if not all(isinstance(x, Tensor) for x in parts) or len({x.shape for x in parts}) > 1:
        raise check.fail(op, "moments", "be three tensors of one shape", type(moments).__name__, "masked_moments gives them.", TypeError)
    x = torch.stack(parts, -1) if isinstance(moments, Moments) else parts[0]
    if x.dim() == 0 or x.shape[-1] != 3:
        raise check.fail(op, "moments", "have count, mean and m2 in the last dimension", check.describe(x), "Moments.stack() gives that.")
    return x.to(reference.wide(x)).contiguous()


# ---- public ops -----------------------------------------------------------------------------------------------------
def masked_sum(
    values: Tensor, mask: Tensor | None, axis: int | tuple[int, ...] | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    r"""Sum of the values under a mask.

    S = sum(m v) over the elements where m != 0.

    Args:
        values: any shape, or packed (N,), floating point. Not read where the mask is 0.
        mask: like values, bool, integer or float. Its values are weights: fractional and negative ones count. None = all ones.
        axis: the dimension or dimensions to reduce; None = all. With cu_seqlens None or -1: each packed row.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Tensor without the reduced dimensions, (rows,) of packed rows, in the promoted dtype of values and a float mask. 0 of
        nothing.

    Gradient:
        To values: m. A mask that requires grad is refused.

    Numerics:
        Accumulated in float64, rounded once; in a fixed order, whatever the number of threads.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, axes or offsets that do not fit.

    Example:
        >>> v, m = torch.tensor([[1.0, 2.0], [4.0, float("nan")]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.masked_sum(v, m, axis=-1)
        tensor([3., 4.])

    Source:
        verl masked_sum.
    """
    return _reduce("sum", values, mask, axis, cu_seqlens)


def masked_mean(
    values: Tensor, mask: Tensor | None, axis: int | tuple[int, ...] | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    r"""Mean of the values under a mask.

    sum(m v) / N with N = sum(m); N = 0 divides by 1e-8.

    Args:
        values, mask, axis, cu_seqlens: as `masked_sum`.

    Returns:
        Tensor without the reduced dimensions, (rows,) of packed rows, in the promoted dtype of values and mask; at least
        float32 under an integer or bool mask, as in verl. 0 of nothing.

    Gradient:
        To values: m / N. A mask that requires grad is refused.

    Numerics:
        As `masked_sum`. verl divides by N + 1e-8, added in float32, where it vanishes beside a count; a float64 mask, under
        which it does not, gives a mean that differs by a relative 1e-8 / N. Half-precision values are not rounded on the way.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, axes or offsets that do not fit.

    Example:
        >>> v, m = torch.tensor([[1.0, 2.0], [4.0, float("nan")]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.masked_mean(v, m, axis=-1)
        tensor([1.5000, 4.0000])

    Source:
        verl masked_mean.
    """
    return _reduce("mean", values, mask, axis, cu_seqlens)


def masked_var(values: Tensor, mask: Tensor | None, unbiased: bool = True) -> Tensor:
    r"""Variance of all values under a mask.

    With N = sum(m) and mu = sum(m v) / N: sum(m (v - mu)^2) / (N - 1) if unbiased, else / N (0 of nothing).

    Args:
        values, mask: as `masked_sum`.
        unbiased: Bessel's correction.

    Returns:
        A 0-dim tensor, in the dtype of `masked_mean`.

    Gradient:
        To values. A mask that requires grad is refused.

    Numerics:
        Deviations from a shift among the values, merged in float64: no cancellation at a large mean. With weights, two passes.

    Raises:
        ValueError: unbiased, and the mask's sum is 0 or 1 (on the CPU; elsewhere the result is NaN). Shapes and devices.
        TypeError: dtypes that do not fit.

    Example:
        >>> rlkern.masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
        tensor(2.)

    Source:
        verl masked_var; Chan, Golub and LeVeque 1979.
    """
    return _reduce("var", values, mask, None, None, bool(unbiased))


def masked_moments(
    values: Tensor, mask: Tensor | None, axis: int | tuple[int, ...] | None = None, *, cu_seqlens: Tensor | None = None
) -> Moments:
    r"""Count, mean and sum of squared deviations under a mask: what shards exchange to whiten as one.

    count = sum(m), mean = sum(m v) / count, m2 = sum(m (v - mean)^2); all 0 of nothing.

    Args:
        values, mask, axis, cu_seqlens: as `masked_sum`.

    Returns:
        Moments(count, mean, m2), float64, without the reduced dimensions, (rows,) of packed rows. `Moments.stack()` is one
        tensor to all_gather.

    Gradient:
        To values from mean and m2.

    Numerics:
        As `masked_var`. An empty shard is legal: its moments are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, axes or offsets that do not fit.

    Example:
        >>> rlkern.masked_moments(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
        Moments(count=tensor(2., dtype=torch.float64), mean=tensor(2., dtype=torch.float64), m2=tensor(2., dtype=torch.float64))

    Source:
        Welford 1962; Chan, Golub and LeVeque 1979.
    """
    return Moments(*_reduce("moments", values, mask, axis, cu_seqlens).unbind(-1))


def merge_moments(moments: Sequence[Moments | Tensor] | Tensor) -> Moments:
    r"""Moments of the union of shards.

    N = Na + Nb, d = mean_b - mean_a: mean = mean_a + d Nb / N, m2 = m2_a + m2_b + d^2 Na Nb / N, shard after shard.

    Args:
        moments: Moments of equal shapes, or tensors (..., 3) as `Moments.stack()` gives, or one tensor (shards, ..., 3).

    Returns:
        Moments of that shape. Of empty shards alone: 0.

    Gradient:
        To every mean and m2.

    Numerics:
        In the order given: the same order gives the same bits on every rank. A shard whose count is 0 changes nothing.

    Raises:
        ValueError, TypeError: no shard, or shapes that do not fit.

    Example:
        >>> v, m = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.merge_moments([rlkern.masked_moments(x, y) for x, y in zip(v, m)]).count
        tensor(3., dtype=torch.float64)

    Source:
        Chan, Golub and LeVeque 1979.
    """
    op = "merge_moments"
    if isinstance(moments, Moments):
        raise check.fail(op, "moments", "be a sequence of Moments", "one Moments", "Put the shards in a list.", TypeError)
    shards = [stacked(op, x) for x in (moments.unbind(0) if isinstance(moments, Tensor) and moments.dim() else moments)]
    if not shards or any(x.shape != shards[0].shape for x in shards):
        got = [tuple(x.shape) for x in shards]
        raise check.fail(op, "moments", "hold at least one shard, all of one shape", got, "Reduce the same dimensions on each rank.")
    return Moments(*reference.merge(shards).unbind(-1))
