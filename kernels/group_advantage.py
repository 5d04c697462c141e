# SPDX-License-Identifier: Apache-2.0
"""Outcome advantages: the sum of each row's rewards, what its group makes of it, and that broadcast over the row's mask.

Rows are swept in chunks where they are few, so that long ones fill a GPU. A row's valid tokens are equal, so a batch is
whitened by one value a row, weighted by the number of its valid tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import aggregation, group_values, launch, moments_math
from rlkern.kernels.launch import GROUP, NARROW, Plan, Variant, variants
from rlkern.kernels.whiten import masked_whiten_fwd

VARIANTS: list[Variant] = [*group_values.VARIANTS]  # what tools/sass_check.py compiles
_PROGRAMS = 512  # at least so many, if rows are long enough: about four on each of a large GPU's multiprocessors


@launch.kernel
def group_scores_kernel(
    rewards, mask, rewards_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens, chunks: tl.int32, parts,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the sum of the rewards, and the number of valid tokens where a mask is given."""
    _row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    sum, count = tl.full((), 0, tl.float64), T - T
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        sum += tl.sum(moments_math.weights_of(rewards, rewards_stride, start, first, inside, tl.float64, INNER[0], ALIGNED), 0)
        if mask is not None:
            valid = launch.load(mask, mask_stride, start, first, inside, INNER[1], ALIGNED) != 0
            count += tl.sum(tl.where(inside, tl.where(valid, 1, 0), 0), 0)
        first += BLOCK
    aggregation.leave(parts, 0, sum)
    if mask is not None:
        aggregation.leave(parts, 1, count)


_PLAN = Plan(loads=("rewards",), stores=(), row_stores=("parts",), registers=(64, 64))
VARIANTS += variants(group_scores_kernel, NARROW, _PLAN, {}, parts="fp64")
_PLAN = _PLAN._replace(loads=("rewards", "mask"), row_stores=("parts", "parts"))
VARIANTS += variants(group_scores_kernel, NARROW, _PLAN, {}, mask="i64", parts="fp64")


@launch.kernel
def group_merge_kernel(parts, merged, chunks: tl.int64, BLOCK: tl.constexpr):
    """One program a row and field."""
    program, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(merged + program, tl.sum(tl.load(parts + program * chunks + i, mask=i < chunks, other=0), 0))


_PLAN = Plan(loads=(), stores=(), row_loads=("parts",) * 4, row_stores=("merged",), registers=(32, 32))
VARIANTS += [v for v in variants(group_merge_kernel, GROUP, _PLAN, {}, parts="fp64", merged="fp64") if v.dtype == "fp32"]


@launch.kernel
def group_advantage_fwd_kernel(
    mask, out, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, cu_seqlens, chunks: tl.int32, row_values,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    value = tl.load(row_values + row)
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = launch.load(mask, mask_stride, start, first, inside, INNER[0], ALIGNED) != 0
        launch.store(out, out_stride, start, first, tl.where(valid, value, 0.0), inside, ALIGNED)
        first += BLOCK


_PLAN = Plan(loads=("mask",), stores=("out",), row_loads=("row_values",), registers=(64, 64))
VARIANTS += variants(group_advantage_fwd_kernel, NARROW, _PLAN, {}, mask="i64", row_values="fp64")


# ---- launchers ------------------------------------------------------------------------------------------------------
def chunks_of(rows: int, tokens: int) -> int:
    """The chunks of a row; of packed rows only the longest possible is known."""
    found: int = max(1, min(triton.cdiv(tokens, NARROW.size), _PROGRAMS // max(rows, 1), GROUP.size))
    return found


def over_chunks(kernel: Any, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, chunks: int, table: Tensor) -> None:
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    launch.over(layout.B * chunks, NARROW, kernel, layout, tensors, cu_seqlens, chunks, table)


def row_sums(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, rows: int, chunks: int) -> tuple[Tensor, Tensor | None]:
    """Of each row: the sum of its rewards and, given a mask, how many tokens are valid."""
    fields = 1 if mask is None else 2
    parts = torch.empty((fields, rows, chunks), dtype=torch.float64, device=rewards.device)
    over_chunks(group_scores_kernel, (rewards, mask), cu_seqlens, chunks, parts)
    merged = parts[:, :, 0]
    if chunks > 1:
        merged = torch.empty((fields, rows), dtype=torch.float64, device=rewards.device)
        launch.once(group_merge_kernel, fields * rows, GROUP, parts, merged, chunks)
    return merged[0], None if mask is None else merged[1]


def group_advantage_fwd(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: bool,
    eps: float,
    singleton: str,
    flags: list[bool] | None,
    whiten_eps: float,
    component_scores: Tensor | None,
    component_weights: Tensor | None,
    f_norm: float,
    out: Tensor | None,
) -> Tensor | float:
    """The count of a whitened batch, or of groups of one row, for the CPU's judge."""
    rows, weighted = ids.shape[0], baseline == "length_weighted"
    chunks = chunks_of(rows, response_mask.shape[-1])
    mask = response_mask if weighted or flags is not None else None
    summed = response_mask if component_scores is not None else token_level_rewards  # rewards are not read then
    scores, counts = row_sums(summed, mask, cu_seqlens, rows, chunks)
    index = (ids, order, offsets, baseline, scale)
    values = group_values.values_of(
        scores, counts if weighted else None, index, eps, singleton, component_scores, component_weights, f_norm
    )
    count: Tensor | float = 0.0
    if baseline == "second_best":
        count = (offsets[1:] - offsets[:-1] == 1).sum()
    if flags is not None:
        whitened = torch.empty_like(values)
        count = masked_whiten_fwd(values, counts, None, flags, whiten_eps, False, whitened if rows else None, None)
        values = whitened
    if out is not None:
        over_chunks(group_advantage_fwd_kernel, (response_mask, out), cu_seqlens, chunks, values)
    return count
