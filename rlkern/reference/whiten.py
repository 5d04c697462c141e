# SPDX-License-Identifier: Apache-2.0
"""Masked reductions and whitening in plain torch. Statistics in float64, over everything or along rows.

Rows are the last dimension (`by_row`). A mask's values are weights: a mask of zeros and ones selects. At weight 0 a value is
not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern import check
from rlkern.reference import affine_scan

_BLOCK = 1 << 14  # elements; temporaries of this size stay in the cache, where fresh pages cost more than the arithmetic


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.device.type != "mps" else torch.float32


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _given(values: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=values.device).expand_as(values) if mask is None else mask


def _total(term: Callable[..., tuple[Tensor, Tensor]], by_row: bool, *tensors: Tensor) -> Tensor:
    """The inner product of the pair term(*tensors), of everything or along rows; on the CPU from blocks of rows."""

    def inner(*tensors: Tensor) -> Tensor:
        x, y = term(*tensors)
        return (x * y).sum(-1) if by_row else torch.dot(x.reshape(-1), y.reshape(-1))

    x = tensors[0]
    if x.device.type != "cpu" or x.numel() <= 2 * _BLOCK or (by_row and x.dim() == 1):
        return inner(*tensors)
    step = max(1, _BLOCK * x.shape[0] // x.numel())
    parts = [inner(*blocks) for blocks in zip(*(t.split(step) for t in tensors), strict=True)]
    return torch.cat(parts) if by_row else torch.stack(parts).sum()


def _along(x: Tensor, by_row: bool) -> Tensor:
    """A statistic against the values it came from."""
    return x.unsqueeze(-1) if by_row else x


def _select(values: Tensor, mask: Tensor) -> Tensor:
    """0 where the mask is; what follows may then multiply by the mask. One select: torch's costs as much as ten products."""
    return torch.where(mask != 0, values, 0.0)


def _count_and_sum(seen: Tensor, mask: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    dtype, axes = wide(seen), (-1,) if by_row else tuple(range(seen.dim()))
    count = mask.sum(axes, dtype=dtype) if mask.is_floating_point() else mask.sum(axes).to(dtype)
    return count, _total(lambda v, m: (v.to(dtype), m.to(dtype)), by_row, seen, mask)


def moments(values: Tensor, mask: Tensor | None, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) over all elements, or along the last dimension (dim=-1); two passes. Of nothing: zeros."""
    by_row, dtype, mask = dim is not None, wide(values), _given(values, mask)
    seen = _select(values, mask)
    count, total = _count_and_sum(seen, mask, by_row)
    some = count != 0
    mean = torch.where(some, total / torch.where(some, count, 1.0), 0.0)

    def term(v: Tensor, m: Tensor, mu: Tensor = mean) -> tuple[Tensor, Tensor]:
        d = v.to(dtype) - mu
        return d * m, d

    rows = (mean.unsqueeze(-1),) if by_row else ()
    return count, mean, _total(term, by_row, seen, mask, *rows)


def merge(shards: Sequence[Tensor]) -> Tensor:
    """Chan's merge of (..., 3) moments in the order given; a shard whose count is 0 changes nothing."""
    count, mean, m2 = shards[0].unbind(-1)
    for shard in shards[1:]:
        n, mu, s = shard.unbind(-1)
        total, empty, first = count + n, n == 0, count == 0
        part = torch.where(empty, torch.zeros_like(n), n / torch.where(total != 0, total, torch.ones_like(total)))
        d = torch.where(empty | first, torch.zeros_like(mean), mu - mean)
        mean = torch.where(first & ~empty, mu, mean + d * part)
        m2 = torch.where(first & ~empty, s, torch.where(empty, m2, m2 + s + d.square() * count * part))
        count = total
    return torch.stack((count, mean, m2), -1)


def _judge(op: str, count: Tensor, unbiased: bool) -> None:
    if count.dim() == 0 and count.device.type == "cpu" and not torch.compiler.is_compiling() and type(count) is Tensor:
        check.valid_tokens(op, float(count.detach()), unbiased)


# ---- reductions: the raw ops _masked_<kind>_fwd and _bwd -------------------------------------------------------------
def reduce(
    kind: str, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, by_row: bool, unbiased: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """(result, moments kept for the backward)."""
    dtype = wide(values) if kind == "moments" else reduced_dtype(kind, values, mask)
    mask, (values,) = _padded(cu_seqlens, mask, values)
    if kind in ("sum", "mean"):
        weight = _given(values, mask)
        count, total = _count_and_sum(_select(values, weight), weight, by_row)
        result = total if kind == "sum" else total / _divisor(count)
        kept = (count, total, torch.zeros_like(total))
    else:
        kept = count, _, m2 = moments(values, mask, -1 if by_row else None)
        if kind == "var" and unbiased:
            _judge("masked_var", count, True)
        spread = variance(count, m2, True) if unbiased else m2 / _divisor(count)
        result = torch.stack(kept, -1) if kind == "moments" else spread
    return result.to(dtype), torch.stack(kept, -1) if save and kind != "moments" else result.new_empty(0, dtype=wide(values))


def _divisor(count: Tensor) -> Tensor:
    """verl adds 1e-8 to a count, in float32, where it shows only if the count is 0: the mean of nothing is 0."""
    return torch.where(count != 0, count, torch.full_like(count, 1e-8))


def reduced_dtype(kind: str, values: Tensor, mask: Tensor | None) -> torch.dtype:
    """What verl's function returns: a count is a float32 unless the mask is floating point."""
    dtype = check.result_dtype(values, mask)
    return dtype if kind == "sum" or mask is None or mask.is_floating_point() else torch.promote_types(dtype, torch.float32)


def reduce_bwd(
    kind: str,
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor | None,
    by_row: bool,
    unbiased: bool,
) -> Tensor:
    """d_values = weight * (level + slope * (v - mean))."""
    like = values
    mask, (values,) = _padded(cu_seqlens, mask, values)
    g, zero = grad.to(wide(values)), torch.zeros((), dtype=wide(values), device=values.device)
    count, mean, _ = kept.unbind(-1) if kept is not None else (zero, zero, zero)
    level, slope = zero, zero
    if kind == "moments":
        level, slope = torch.where(count != 0, g[..., 1] / count, 0.0), 2 * g[..., 2]
    elif kind == "var":
        slope = 2 * (variance(count, g, True) if unbiased else g / _divisor(count))
    else:
        level = g if kind == "sum" else g / _divisor(count)
    level, slope, mean = (_along(x, by_row and x.dim() == 1) for x in (level, slope, mean))
    d_values = _weighted(values, _given(values, mask), level, None if kind in ("sum", "mean") else slope, mean)
    return affine_scan.unrows(cu_seqlens, d_values, like).to(like.dtype)


def _weighted(values: Tensor, mask: Tensor, level: Tensor, slope: Tensor | None, mean: Tensor) -> Tensor:
    """weight * (level + slope * (v - mean)), 0 where the weight is, in the arithmetic dtype."""
    dtype = _arithmetic(values)
    d = level.to(dtype) if slope is None else level.to(dtype) + slope.to(dtype) * _centered(values, mean)
    return torch.where(mask != 0, mask.to(dtype) * d, 0.0)


def _centered(values: Tensor, mean: Tensor) -> Tensor:
    """values - mean, the mean in two parts where the arithmetic is narrower than it is."""
    dtype = _arithmetic(values)
    high = mean.to(dtype)
    d = values.to(dtype) - high
    return d if dtype == mean.dtype else d - (mean - high).to(dtype)


# ---- whitening -------------------------------------------------------------------------------------------------------
def variance(count: Tensor, m2: Tensor, unbiased: bool) -> Tensor:
    """NaN of nothing, also where count - 1 would divide."""
    return m2 / torch.where(count == 0, torch.zeros_like(count), count - 1 if unbiased else count)


def reciprocal_std(var: Tensor, floor: bool, scale: bool, eps: float) -> Tensor:
    return (var.clamp(min=eps) if floor else var + eps).rsqrt() if scale else torch.ones_like(var)


def apply(values: Tensor, mask: Tensor | None, stats: tuple[Tensor, Tensor, Tensor], flags: list[bool], eps: float, by_row: bool) -> Tensor:
    """(v - mean) * rstd; flags (unbiased, floor, shift_mean, scale, mask_output)."""
    unbiased, floor, shift_mean, scale, mask_output = flags
    count, mean, m2 = stats
    rstd = reciprocal_std(variance(count, m2, unbiased), floor, scale, eps)
    mean, rstd = _along(mean, by_row), _along(rstd, by_row)
    valid = mask != 0 if mask_output and mask is not None else None
    # a select before the arithmetic too: after it alone, a NaN would reach gradients
    out = _centered(values if valid is None else torch.where(valid, values, 0.0), mean) * rstd.to(_arithmetic(values))
    if not shift_mean:
        out = out + mean.to(out.dtype)
    return (out if valid is None else torch.where(valid, out, 0.0)).to(values.dtype)


def whiten(op: str, values: Tensor, valid: Tensor | None, flags: list[bool], eps: float) -> Tensor:
    """Whitened by the moments of all valid elements."""
    stats = moments(values, valid)
    _judge(op, stats[0], flags[0])
    return apply(values, valid, stats, flags, eps, False)


def _at_least_one(stats: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Moments about sum / max(count, 1)."""
    count, mean, m2 = stats
    few = count < 1
    lower = torch.where(few, mean * count, mean)
    return torch.where(few, torch.ones_like(count), count), lower, torch.where(few, m2 + count * (mean - lower).square(), m2)


def masked_whiten(
    values: Tensor, mask: Tensor | None, cu_seqlens: None, flags: list[bool], eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    """The raw op `_masked_whiten_fwd`: (out, moments)."""
    stats = moments(values, mask)
    _judge("masked_whiten", stats[0], flags[0])
    return apply(values, mask, stats, flags, eps, False), torch.stack(stats) if save else values.new_empty(0)


def _padded(cu: Tensor | None, mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, list[Any]]:
    """Packed rows side by side, a mask that ends with each; padded ones as they are."""
    if cu is None:
        return mask, list(tensors)
    given = torch.ones_like(tensors[0]) if mask is None else mask
    mask, *found = affine_scan.rows(cu, given, *tensors)
    return mask, found


def masked_normalize(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, flags: list[bool], eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    """The raw op `_masked_normalize_fwd`: row by row, an empty row counting as one element."""
    mask, (rows,) = _padded(cu_seqlens, mask, values)
    stats = moments(rows, mask, -1)
    out = affine_scan.unrows(cu_seqlens, apply(rows, mask, _at_least_one(stats), flags, eps, True), values)
    return out, torch.stack(stats, -1) if save else values.new_empty(0)


def whiten_apply(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, stats: Tensor, flags: list[bool], eps: float, by_row: bool
) -> Tensor:
    """The raw op `_whiten_apply_fwd`."""
    count, mean, m2 = stats.unbind(-1)
    if not by_row:
        _judge("whiten_apply", count, flags[0])
    mask, (rows,) = _padded(cu_seqlens, mask, values)
    return affine_scan.unrows(cu_seqlens, apply(rows, mask, (count, mean, m2), flags, eps, by_row), values)


def _whiten_bwd(
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    flags: list[bool],
    eps: float,
    by_row: bool,
    given: bool,
    at_least_one: bool,
) -> tuple[Tensor, Tensor]:
    """(d_values, d_moments): d_v = rstd * G + weight * (level + slope * (v - mean))."""
    unbiased, floor, shift_mean, scale, mask_output = flags
    dtype, counted, mask = wide(values), stats.unbind(-1), _given(values, mask)
    count, mean, m2 = _at_least_one(counted) if at_least_one else counted  # type: ignore[arg-type]
    g = torch.where(mask != 0, grad, 0.0) if mask_output else grad
    var = variance(count, m2, unbiased)
    rstd = reciprocal_std(var, floor, scale, eps)
    mu = _along(mean, by_row)

    asked = _select(values, g)  # a NaN that G does not ask about stays where it is

    def term(g: Tensor, v: Tensor, mu: Tensor = mu) -> tuple[Tensor, Tensor]:
        return g.to(dtype), v.to(dtype) - mu

    product = _total(term, by_row, g, asked, *((mu,) if by_row else ()))
    total = g.sum(-1 if by_row else tuple(range(g.dim())), dtype=dtype)
    d_mean = torch.where(total != 0, ((0.0 if shift_mean else 1.0) - rstd) * total, 0.0)
    bent = (var >= eps) | var.isnan() if floor else torch.ones_like(var, dtype=torch.bool)
    d_var = torch.where(bent & (product != 0), -0.5 * rstd**3 * product, 0.0) if scale else torch.zeros_like(rstd)
    d_m2 = torch.where(d_var == 0, 0.0, d_var / (count - 1 if unbiased else count))
    d_values = _along(rstd, by_row).to(_arithmetic(values)) * g.to(_arithmetic(values))
    if mask_output:  # 1 / std of a row without a valid element is NaN
        d_values = torch.where(mask != 0, d_values, 0.0)
    if not given:
        residual = counted[0] * (counted[1] - mean)
        level, slope = (_along(x, by_row) for x in ((d_mean - 2 * d_m2 * residual) / count, 2 * d_m2))
        inner = _weighted(values, mask, level, slope, mu)
        d_values = d_values + torch.where((level != 0) | (slope != 0), inner, 0.0)
    return d_values.to(values.dtype), torch.stack((torch.zeros_like(d_mean), d_mean, d_m2), -1)


def masked_whiten_bwd(
    grad: Tensor, values: Tensor, mask: Tensor | None, cu_seqlens: None, stats: Tensor, flags: list[bool], eps: float
) -> Tensor:
    return _whiten_bwd(grad, values, mask, stats, flags, eps, False, False, False)[0]


def masked_normalize_bwd(
    grad: Tensor, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, stats: Tensor, flags: list[bool], eps: float
) -> Tensor:
    mask, (g, rows) = _padded(cu_seqlens, mask, grad, values)
    return affine_scan.unrows(cu_seqlens, _whiten_bwd(g, rows, mask, stats, flags, eps, True, False, True)[0], values)


def whiten_apply_bwd(
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    stats: Tensor,
    flags: list[bool],
    eps: float,
    by_row: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    mask, (g, rows) = _padded(cu_seqlens, mask, grad, values)
    d_values, d_moments = _whiten_bwd(g, rows, mask, stats, flags, eps, by_row, True, False)
    d_values = affine_scan.unrows(cu_seqlens, d_values, values)
    return d_values if needs[0] else values.new_empty(0), d_moments if needs[1] else stats.new_empty(0)
