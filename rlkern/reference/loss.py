# SPDX-License-Identifier: Apache-2.0
"""The value loss in plain torch, and the aggregation that all losses share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern.reference.kl import wide


# ---- one token ------------------------------------------------------------------------------------------------------
def huber(error: Tensor, delta: float) -> Tensor:
    """error^2 / 2 up to an error of size delta, its tangent beyond."""
    half = 0.5 * error.square()
    return half if delta == math.inf else torch.where(error.abs() > delta, delta * (error.abs() - 0.5 * delta), half)


def value_terms(vpreds: Tensor, returns: Tensor, values: Tensor | None, clip: float, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d vpreds, clipped); without values half the squared error, or Huber's."""
    error = vpreds - returns
    slope = error.clamp(-delta, delta)
    if values is None:
        return huber(error, delta), slope, torch.zeros_like(error, dtype=torch.bool)
    inside = torch.maximum(torch.minimum(vpreds, values + clip), values - clip)
    plain, clipped_term = error.square(), (inside - returns).square()
    clipped, moved = clipped_term > plain, inside != vpreds
    grad = torch.where((clipped_term == plain) & moved, 0.5 * slope, slope)
    grad = torch.where(clipped & moved, torch.zeros_like(grad), grad)
    loss = torch.maximum(huber(error, delta), huber(inside - returns, delta))
    return loss, torch.where(loss.isnan(), loss, grad), clipped


def select(valid: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x at valid tokens in `dtype`, 0 elsewhere."""
    return torch.where(valid, x.to(dtype), torch.zeros((), dtype=dtype, device=x.device))


# ---- aggregation ----------------------------------------------------------------------------------------------------
def wide_on(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type != "mps" else torch.float32


def row_ids(x: Tensor, cu: Tensor | None) -> Tensor | None:
    if cu is None:
        return None
    return torch.repeat_interleave(torch.arange(cu.shape[0] - 1, device=x.device), cu.diff(), output_size=x.shape[0])


def row_sums(x: Tensor, ids: Tensor | None, cu: Tensor | None) -> Tensor:
    """(rows,) in the wide type."""
    dtype = wide_on(x.device)
    if ids is not None and cu is not None:
        return torch.zeros(cu.shape[0] - 1, dtype=dtype, device=x.device).index_add(0, ids, x.to(dtype))
    return x.sum(-1, dtype=dtype).reshape(-1)


def agg_weights(mode: str, n: Tensor, numbers: list[float], counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row weights, scale): the loss is scale * sum over rows of row_weight * row_sum.

    `numbers` = dp_size, batch_num_tokens, global_batch_size, loss_scale_factor; NaN is the local count of valid tokens or
    of non-empty rows in `n`, -infinity is in the tensor `counts`.
    """

    def number(i: int, local: Tensor) -> Tensor:
        if numbers[i] == -math.inf and counts is not None:
            return counts[i].to(n.dtype)
        return local if math.isnan(numbers[i]) else torch.full_like(local, numbers[i])

    tokens, sequences = n.sum(), (n > 0).to(n.dtype).sum()
    ones, scale = torch.ones_like(n), number(0, tokens)
    if mode == "token-mean":
        return ones, scale / number(1, tokens)
    if mode == "token-sum":
        return ones, scale
    scale = scale / number(2, sequences)
    if mode == "seq-mean-token-sum-norm":
        return ones, scale / number(3, tokens)
    return (1 / n.clamp(min=1) if mode == "seq-mean-token-mean" else ones), scale


def spread(per_row: Tensor, like: Tensor, ids: Tensor | None) -> Tensor:
    """One value a row, at each of its tokens."""
    return per_row[ids] if ids is not None else per_row.reshape(*like.shape[:-1], 1).expand_as(like)


# ---- raw ops --------------------------------------------------------------------------------------------------------
def scattered(gradient: Tensor, valid: Tensor, of: Tensor, need: bool, keep_wide: bool) -> Tensor:
    """The gradient at valid tokens, 0 elsewhere, in the dtype of a gradient of `of`; empty where not needed."""
    dtype = dtype_of_grad(of.dtype, keep_wide)
    return torch.where(valid, gradient, torch.zeros_like(gradient)).to(dtype) if need else of.new_empty(0, dtype=dtype)


def dtype_of_grad(dtype: torch.dtype, keep_wide: bool) -> torch.dtype:
    return torch.float32 if keep_wide and dtype.itemsize == 2 else dtype


def value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor | None,
    mask: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: float,
    delta: float,
    mode: str,
    numbers: list[float],
    loss_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op `_value_loss_fwd`: (loss, sums, maxes, d_vpreds)."""
    ids, valid, dtype = row_ids(vpreds, cu_seqlens), mask != 0, wide(vpreds, returns, values)
    v, r = select(valid, vpreds, dtype), select(valid, returns, dtype)
    value, grad, clipped = value_terms(v, r, None if values is None else select(valid, values, dtype), clip, delta)
    n = row_sums(valid, ids, cu_seqlens)
    row_weight, scale = agg_weights(mode, n, numbers, counts)
    value = select(valid, value, dtype)
    loss = (row_sums(value, ids, cu_seqlens) * row_weight).sum() * scale
    predictions, bad = row_sums(v, ids, cu_seqlens).sum(), (~value.isfinite()).sum()
    sums = torch.stack([v.to(n.dtype) for v in (n.sum(), (n > 0).sum(), (clipped & valid).sum(), predictions, loss, bad)])
    error = (v - r).abs().nan_to_num(nan=0.0, posinf=math.inf)
    maxes = (error.amax() if error.numel() else error.sum()).to(n.dtype).reshape(1)
    g = spread(row_weight * scale, value, ids)
    return loss.to(loss_dtype), sums, maxes, scattered(grad * g, valid, vpreds, *needs)


def value_loss_smooth(vpreds: Tensor, others: Sequence[Any], settings: Sequence[Any]) -> Tensor:
    """The loss as autograd may differentiate it twice."""
    returns, values, mask, counts, cu = others
    clip, delta, mode, numbers, _ = settings
    ids, valid, dtype = row_ids(vpreds, cu), mask != 0, wide(vpreds, returns, values)
    v, r = select(valid, vpreds, dtype), select(valid, returns, dtype)
    value = value_terms(v, r, None if values is None else select(valid, values, dtype), clip, delta)[0]
    row_weight, scale = agg_weights(mode, row_sums(valid, ids, cu), numbers, counts)
    return (row_sums(select(valid, value, dtype), ids, cu) * row_weight).sum() * scale


def scale(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """The raw op `_scale_fwd`: x * factor in the dtype of `like`; 0 stays 0 whatever the factor is."""
    return torch.where(x == 0, x, x * factor).to(like.dtype)
