# SPDX-License-Identifier: Apache-2.0
"""The optimal token baseline: scans of each row, then the columns of each group, then its rows again.

Rewards to go G and accumulated path variances W come from the scans. By token, both are packed: the valid tokens of a row side
by side, zeros behind them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import aggregation, launch, math, moments_math
from rlkern.kernels.affine_scan import affine_scan_fwd
from rlkern.kernels.discounted_returns import discounted_returns_fwd
from rlkern.kernels.launch import ROW, TOKENS, Block, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
COLUMNS = Block(512, 4)  # a group's columns a program, with two float64 sums each
_PARTS = 16  # programs a group of packed rows, whose longest only the device knows


@launch.kernel
def path_variance_kernel(
    old_log_prob, sum_pi_squared, weights, mask, out,
    old_log_prob_stride: tl.int64, sum_pi_squared_stride: tl.int64, weights_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64,
    T: tl.int64, blocks: tl.int64, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    valid = launch.load(mask, mask_stride, row, first, inside, INNER[3], ALIGNED) != 0
    old = moments_math.widened(launch.load(old_log_prob, old_log_prob_stride, row, first, inside, INNER[0], ALIGNED), A)
    squares = moments_math.widened(launch.load(sum_pi_squared, sum_pi_squared_stride, row, first, inside, INNER[1], ALIGNED), A)
    w = tl.fma(tl.full((), -2, A), math.exp_of(old), tl.full((), 1, A)) + squares  # twin of path_variance in csrc/math/group.h
    if weights is not None:
        rho = moments_math.widened(launch.load(weights, weights_stride, row, first, inside, INNER[2], ALIGNED), A)
        w = w * (rho * rho)
    launch.store(out, out_stride, row, first, tl.where(valid, w, 0.0), inside, ALIGNED)


_OLD = ("old_log_prob", "sum_pi_squared")
_PLAN = Plan(loads=(*_OLD, "mask"), stores=("out",), registers=(64, 64))
VARIANTS += variants(path_variance_kernel, TOKENS, _PLAN, {"A": tl.float32}, mask="i64", out="fp32")
_PLAN = _PLAN._replace(loads=(*_OLD, "weights", "mask"))
VARIANTS += variants(path_variance_kernel, TOKENS, _PLAN, {"A": tl.float32}, mask="i64", out="fp32")


@triton.jit
def places(mask, stride, start, first, inside, before, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """A block's valid tokens, their numbers in the row, and how many there are up to its end."""
    valid = (launch.load(mask, stride, start, first, inside, INNER, ALIGNED) != 0) & inside
    one = valid.to(tl.int32)
    return valid, before + tl.cumsum(one, 0) - one, before + tl.sum(one, 0)


@launch.kernel
def pack_tokens_kernel(
    returns, variance, mask, returns_stride: tl.int64, variance_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens,
    packed_returns, packed_variance, packed_stride: tl.int64,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    (
        _row,
        start,
        T,
    ) = launch.row_of(T, cu_seqlens, ALIGNED)
    count, first = T - T, T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid, j, count = places(mask, mask_stride, start, first, inside, count, INNER[2], ALIGNED)
        at = start * packed_stride + j
        tl.store(packed_returns + at, launch.load(returns, returns_stride, start, first, inside, INNER[0], ALIGNED), mask=valid)
        tl.store(packed_variance + at, launch.load(variance, variance_stride, start, first, inside, INNER[1], ALIGNED), mask=valid)
        first += BLOCK


_FLOATS = {"returns": "fp32", "variance": "fp32"}
_PLAN = Plan(("mask", "returns", "variance"), (), (96, 112), row_stores=("packed_returns", "packed_variance") * 8)
VARIANTS += [
    v
    for v in variants(pack_tokens_kernel, ROW, _PLAN, {}, mask="i64", **_FLOATS, packed_returns="fp32", packed_variance="fp32")
    if v.dtype == "fp32"
]


@launch.kernel
def unpack_tokens_kernel(
    mask, out, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, cu_seqlens, packed, packed_stride: tl.int64,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    (
        _row,
        start,
        T,
    ) = launch.row_of(T, cu_seqlens, ALIGNED)
    count, first = T - T, T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid, j, count = places(mask, mask_stride, start, first, inside, count, INNER[0], ALIGNED)
        value = tl.load(packed + start * packed_stride + j, mask=valid, other=0)
        launch.store(out, out_stride, start, first, value, inside, ALIGNED)
        first += BLOCK


_PLAN = Plan(("mask",), ("out",), (96, 96), row_loads=("packed",) * 8)
VARIANTS += variants(unpack_tokens_kernel, ROW, _PLAN, {}, mask="i64", packed="fp32")


# ---- columns --------------------------------------------------------------------------------------------------------
@triton.jit
def row_at(order, i, T, cu_seqlens):
    """Row i of the order: itself, what row strides multiply, its length."""
    row = tl.load(order + i)
    start = row
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row)
        T = tl.load(cu_seqlens + row + 1) - start
    return row, start, T


@triton.jit
def lengths_of(order, begin, end, counts, T, cu_seqlens, BY_TOKEN: tl.constexpr):
    """Of a group: its members, valid tokens of the longest and of the second longest, tokens of the longest row."""
    members, longest, second = tl.full((), 0, tl.int32), tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
    width, i = T - T, begin
    while i < end:
        row, _start, length = row_at(order, i, T, cu_seqlens)
        n = tl.load(counts + row).to(tl.int64)
        if BY_TOKEN:
            n = tl.where(n == 0, -1, n)
        members += (n >= 0).to(tl.int32)
        second = tl.where(n > longest, longest, tl.maximum(second, n))
        longest, width = tl.maximum(longest, n), tl.maximum(width, length)
        i += 1
    return members, longest, second, width


@launch.kernel
def token_baseline_kernel(
    returns, variance, mask, out, returns_stride: tl.int64, variance_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64,
    T: tl.int64, cu_seqlens, order, offsets, counts, parts: tl.int32, eps: tl.float64,
    BY_TOKEN: tl.constexpr, ZERO_TAIL: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of a group: the weighted means of its rows, taken off each. Without a mask W is 0 where nothing is."""
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    if ALIGNED:
        T = T * 16
    begin, end = tl.load(offsets + g), tl.load(offsets + g + 1)
    members, longest, second, width = lengths_of(order, begin, end, counts, T, cu_seqlens, BY_TOKEN)
    first = part.to(tl.int64) * BLOCK
    while first < width:
        total, weight = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        i = begin
        while i < end:
            _row, start, length = row_at(order, i, T, cu_seqlens)
            inside = launch.within(first, length, ALIGNED, BLOCK)
            w = launch.load(variance, variance_stride, start, first, inside, INNER[1], ALIGNED)
            y = launch.load(returns, returns_stride, start, first, inside, INNER[0], ALIGNED)
            if mask is not None:
                valid = (launch.load(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0) & inside
                w, y = tl.where(valid, w, 0.0), tl.where(valid, y, 0.0)
            total += (y * w).to(tl.float64)
            weight += w.to(tl.float64)
            i += 1
        base = launch.rounded(tl.where(members > 1, total / (weight + eps), 0.0), returns.dtype.element_ty)
        cut = tl.where(first + tl.arange(0, BLOCK) < second, base, 0.0)
        i = begin
        while i < end:
            row, start, length = row_at(order, i, T, cu_seqlens)
            inside = launch.within(first, length, ALIGNED, BLOCK)
            y = launch.load(returns, returns_stride, start, first, inside, INNER[0], ALIGNED)
            if ZERO_TAIL:
                alone = (tl.load(counts + row).to(tl.int64) == longest) & (longest > second)
                y = y - tl.where(alone, cut, base)
            else:
                y = y - base
            if mask is not None:
                valid = (launch.load(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0) & inside
                y = tl.where(valid, y, 0.0)
            launch.store(out, out_stride, start, first, y, inside, ALIGNED)
            i += 1
        first += BLOCK * parts.to(tl.int64)


_INDEX = {"order": "i64", "offsets": "i64", "counts": "fp64"}
_WALK = ("offsets",) * 2 + ("order", "counts") * 8 + ("order",) * 3  # loops over rows, unrolled
_PLAN = Plan(("returns", "variance", "mask", "returns", "mask"), ("out",), (72, 72), row_loads=_WALK)
_FORMS = {"BY_TOKEN": False, "ZERO_TAIL": True}
VARIANTS += variants(token_baseline_kernel, COLUMNS, _PLAN, _FORMS, mask="i64", **_INDEX, **_FLOATS)


# ---- launchers ------------------------------------------------------------------------------------------------------
def _columns(
    tensors: Any, cu_seqlens: Tensor | None, order: Tensor, offsets: Tensor, counts: Tensor, eps: float, choice: dict[str, bool]
) -> None:
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    tokens = tensors[0].shape[-1]
    parts = triton.cdiv(tokens, COLUMNS.size)
    parts = max(1, parts if cu_seqlens is None else min(parts, _PARTS))
    rest = (cu_seqlens, order, offsets, counts, parts, eps)
    launch.over((offsets.shape[0] - 1) * parts, COLUMNS, token_baseline_kernel, layout, tensors, *rest, **choice)


def optimal_token_baseline_fwd(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    old_log_prob: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    by_token: bool,
    zero_tail: bool,
    eps: float,
    advantages: Tensor | None,
    returns: Tensor | None,
) -> None:
    if advantages is None or returns is None:
        return
    given = (old_log_prob, sum_pi_squared, rollout_is_weights)
    A = launch.arithmetic(token_level_rewards, response_mask, *given)
    wide = A is tl.float64
    dtype = torch.float64 if wide else torch.float32

    def empty() -> Tensor:
        return torch.empty(token_level_rewards.shape, dtype=dtype, device=returns.device)

    to_go, w, variance = returns if returns.dtype == dtype else empty(), empty(), empty()
    rewards = token_level_rewards.to(dtype) if wide else token_level_rewards
    zero = ("zero", 1.0, 0.0, "none", [0.0] * 4, None, 0.0, None)
    discounted_returns_fwd(rewards, response_mask, None, None, None, cu_seqlens, *zero, to_go)
    if to_go is not returns:
        returns.copy_(to_go)
    tensors = (*given, response_mask, w)
    launch.over_tokens(path_variance_kernel, launch.rows(tensors, flat=True), tensors, A=A)
    affine_scan_fwd(None, None, w, None, cu_seqlens, 1.0, False, variance)
    rows = ids.shape[0]
    counts = torch.empty(rows, dtype=torch.float64, device=returns.device)
    layout = launch.rows((response_mask,), cu_seqlens=cu_seqlens)
    launch.over(rows, TOKENS, aggregation.count_mask_kernel, layout, (response_mask,), cu_seqlens, 1, counts)
    choice = {"BY_TOKEN": by_token, "ZERO_TAIL": zero_tail}
    if not by_token:
        _columns((to_go, variance, response_mask, advantages), cu_seqlens, order, offsets, counts, eps, choice)
        return
    packed, packed_variance = torch.zeros_like(w), torch.zeros_like(w)
    stride = 1 if cu_seqlens is not None else w.shape[-1]
    rows_of = (to_go, variance, response_mask)
    launch.over_rows(pack_tokens_kernel, launch.rows(rows_of, cu_seqlens=cu_seqlens), rows_of, cu_seqlens, packed, packed_variance, stride)
    _columns(
        (packed, packed_variance, None, packed), cu_seqlens, order, offsets, counts, eps, choice
    )  # in place: a program alone has its columns
    both = (response_mask, advantages)
    launch.over_rows(unpack_tokens_kernel, launch.rows(both, cu_seqlens=cu_seqlens), both, cu_seqlens, packed, stride)
