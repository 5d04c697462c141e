# SPDX-License-Identifier: Apache-2.0
"""Value loss, in the manner of loss.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import aggregation, launch, math
from rlkern.kernels.aggregation import Layout, in_lanes, largest_in_lanes, leave, merged, none, valid_tokens
from rlkern.kernels.launch import SWEEP, Plan, Variant, variants

VARIANTS: list[Variant] = []
LAYOUT: Layout = (7, 4, 5, 6)  # tokens, sequences, clipped, vpreds, vf_loss, nonfinite; the largest size of an error


# ---- twin of csrc/math/loss.h ---------------------------------------------------------------------------------------
@triton.jit
def huber(error, square, delta):
    """e^2 / 2, beyond an error of size delta its tangent."""
    size = tl.abs(error)
    return tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * square)


@triton.jit
def value_token(vpred, ret, value, clip, delta):
    """l = max((v - R)^2, (clip(v, V - c, V + c) - R)^2) / 2: l, gradient, clipped. `value` None: half the squared error."""
    error = vpred - ret
    plain, bound = error * error, math.clamped(error, 0.0 - delta, delta)
    if value is None:
        return huber(error, plain, delta), bound, plain > plain
    else:
        inside = tl.where(value != value, value, math.clamped(vpred, value - clip, value + clip))
        other = inside - ret
        clipped_term = other * other
        clipped, moved = clipped_term > plain, (inside < vpred) | (inside > vpred)
        full = tl.where((clipped_term == plain) & moved, 0.5 * bound, bound)
        grad, loss = (
            tl.where(clipped & moved, 0.0, full),
            huber(tl.where(clipped, other, error), tl.where(clipped, clipped_term, plain), delta),
        )
        lost = clipped_term != clipped_term
        return tl.where(lost, clipped_term, loss), tl.where(lost, clipped_term, grad), clipped


# ---- kernels --------------------------------------------------------------------------------------------------------
@launch.kernel
def value_loss_fwd_kernel(
    vpreds, returns, values, mask, d_vpreds,
    vpreds_stride: tl.int64, returns_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, d_vpreds_stride: tl.int64,
    T: tl.int64, cu_seqlens, chunks: tl.int32, parts,
    row_counts, local, counts, dp_size: tl.float64, tokens: tl.float64, sequences: tl.float64, norm: tl.float64, clip: tl.float64,
    delta: tl.float64,
    MODE: tl.constexpr, FROM: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    if d_vpreds is not None:
        g = aggregation.grad_weight(row, chunks, row_counts, local, counts, dp_size, tokens, sequences, norm, MODE, FROM).to(A)
    found, clips, bads = none(tl.int32), none(tl.int32), none(tl.int32)
    predictions, losses, far = none(tl.float64), none(tl.float64), none(A)
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = valid_tokens(mask, mask_stride, start, first, inside, INNER[3], ALIGNED)
        vpred = tl.where(valid, launch.load(vpreds, vpreds_stride, start, first, inside, INNER[0], ALIGNED).to(A), 0.0)
        ret = tl.where(valid, launch.load(returns, returns_stride, start, first, inside, INNER[1], ALIGNED).to(A), 0.0)
        value = None
        if values is not None:
            value = tl.where(valid, launch.load(values, values_stride, start, first, inside, INNER[2], ALIGNED).to(A), 0.0)
        loss, grad, clipped = value_token(vpred, ret, value, math.constant(clip, A), math.constant(delta, A))  # all 0 where masked
        if d_vpreds is not None:
            launch.store(d_vpreds, d_vpreds_stride, start, first, tl.where(valid, grad * g, 0.0), inside, ALIGNED)
        found, clips = found + in_lanes(valid, ALIGNED), clips + in_lanes(clipped, ALIGNED)
        bads += in_lanes(loss - loss != 0, ALIGNED)
        predictions, losses = predictions + in_lanes(vpred, ALIGNED), losses + in_lanes(loss, ALIGNED)
        size = tl.abs(vpred - ret)
        far = math.maximum(far, largest_in_lanes(tl.where(size == size, size, 0.0), ALIGNED))
        first += BLOCK
    leave(parts, 0, tl.sum(found, 0))
    leave(parts, 2, tl.sum(clips, 0))
    leave(parts, 3, tl.sum(predictions, 0))
    leave(parts, 4, tl.sum(losses, 0))
    leave(parts, 5, tl.sum(bads, 0))
    leave(parts, 6, tl.max(far, 0))


@launch.kernel
def value_results_kernel(
    parts, rows: tl.int64, chunks: tl.int64, loss, sums, maxes,
    counts, dp_size: tl.float64, tokens: tl.float64, sequences: tl.float64, norm: tl.float64,
    MODE: tl.constexpr, FROM: tl.constexpr, LAYOUT: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    begun = aggregation.start_merge(parts, 0, rows, chunks, MODE, LAYOUT, STAGED)
    n = merged(begun, 0, LAYOUT, STAGED)
    b = merged(begun, 1, LAYOUT, STAGED)
    scale = aggregation.agg_scale(counts, dp_size, tokens, sequences, norm, n, b, MODE, FROM)
    total = merged(begun, 4, LAYOUT, STAGED) * scale
    tl.store(loss, launch.rounded(total, loss.dtype.element_ty))
    tl.store(sums, n)
    tl.store(sums + 1, b)
    tl.store(sums + 2, merged(begun, 2, LAYOUT, STAGED))
    tl.store(sums + 3, merged(begun, 3, LAYOUT, STAGED))
    tl.store(sums + 4, total)
    tl.store(sums + 5, merged(begun, 5, LAYOUT, STAGED))
    far = merged(begun, 6, LAYOUT, STAGED)
    tl.store(maxes, tl.where(n > 0, far, 0.0))  # no row leaves -inf


_CHOICE = {"MODE": "token-mean", "FROM": (0, 0, 0, 0)}
_COUNTED = {"MODE": "seq-mean-token-mean", "FROM": (0, 0, 1, 0)}
_PLAN = Plan(("vpreds", "returns", "values", "mask"), ("d_vpreds",), (64, 64), ("row_counts", "local"), ("parts",) * 6)
_TYPES = {"mask": "i64", "parts": "fp64", "row_counts": "fp64", "local": "fp64"}
VARIANTS += variants(value_loss_fwd_kernel, SWEEP, _PLAN, _CHOICE, _COUNTED, **_TYPES)
_PLAN = Plan((), (), (128, 128), (), ("loss",) + ("sums",) * 6 + ("maxes",))
VARIANTS += aggregation.merge_variants(value_results_kernel, LAYOUT, _PLAN, _COUNTED, sums="fp64", maxes="fp64")


# ---- launcher -------------------------------------------------------------------------------------------------------
def value_loss_fwd(
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
    loss: Tensor,
    sums: Tensor,
    maxes: Tensor,
    d_vpreds: Tensor | None,
) -> None:
    tensors = (vpreds, returns, values, mask, d_vpreds)
    at = aggregation.chunked(tensors, cu_seqlens, {})
    agg = aggregation.aggregation(mode, numbers, counts)
    row_counts = local = None
    if d_vpreds is not None and agg.counts_first():
        row_counts, local = aggregation.count_first(at, agg, 3, mask)
    A = launch.arithmetic(vpreds, returns, values)
    parts = aggregation.over_chunks(
        value_loss_fwd_kernel, SWEEP, at, tensors, LAYOUT[0], row_counts, local, *agg.rest, clip, delta, **agg.choice, A=A
    )  # fmt: skip
    aggregation.finish(value_results_kernel, at, parts, LAYOUT, loss, sums, maxes, *agg.rest, **agg.choice)
