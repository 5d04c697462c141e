# SPDX-License-Identifier: Apache-2.0
"""The whitening of what a scan has written, from the moments that each of its programs left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.launch import TOKENS, Block, Plan, Variant, variants
from rlkern.kernels.moments_math import merge, reciprocal_std, whitened

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
MERGE = Block(256, 8)  # one program: a triple a thread, so that each loop needs one trip to memory


@triton.jit
def of_block(x, valid):
    """Moments of a block's valid values, in float64, from sums of differences to the block's own mean."""
    one = tl.full((), 1, x.dtype)
    n = tl.sum(tl.where(valid, one, one - one), 0)
    there = tl.where(n == 0.0, 1.0, n)
    pivot = tl.sum(tl.where(valid, x, 0.0), 0) / there
    d = tl.where(valid, x - pivot, 0.0)
    s, square = tl.sum(d, 0).to(tl.float64), tl.sum(d * d, 0).to(tl.float64)
    shift = s / there.to(tl.float64)
    m2 = square - s * shift
    return n.to(tl.float64), pivot.to(tl.float64) + shift, tl.where(m2 < 0.0, 0.0, m2)


@launch.kernel
def merge_kernel(
    partials, scale, n: tl.int64, eps: tl.float64,
    UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each thread merges its triples in order, then Chan's merge of all threads at once: the count and the mean of all, and
    each one's share of M2 about that mean. Writes (count, mean in two parts, 1 / std, what is added)."""
    i = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float64)
    counts, means, m2s, first = zeros, zeros, zeros, n - n
    while first < n:
        there, inside = partials + first + i, first + i < n
        m2 = tl.load(there + 2 * n, mask=inside, other=0)
        counts, means, m2s = merge(counts, means, m2s, tl.load(there, mask=inside, other=0), tl.load(there + n, mask=inside, other=0), m2)
        first += BLOCK
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.where(count == 0.0, 1.0, count)
    d = means - mean
    m2 = tl.sum(m2s + counts * d * d, 0)
    high = mean.to(A).to(tl.float64)
    rstd = reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, math.constant(eps, tl.float64))
    k = tl.arange(0, 8)
    found = tl.where(k == 0, count, tl.where(k == 1, high, mean - high))
    found = tl.where(k == 3, rstd, tl.where(k == 4, 0.0 if SHIFT_MEAN else mean, found))
    tl.store(scale + k, found, mask=k < 5)


# The loop has one iteration's loads in its code: a triple a thread.
_PLAN = Plan(loads=(), stores=(), row_loads=("partials",) * 3, row_stores=("scale",), registers=(64, 64))
_VERL = {"UNBIASED": True, "FLOOR": False, "SHIFT_MEAN": True, "SCALE": True}
VARIANTS += [v for v in variants(merge_kernel, MERGE, _PLAN, _VERL, partials="fp64", scale="fp64") if v.dtype == "fp32"]


@launch.kernel
def whiten_kernel(
    x, mask, out, x_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, blocks: tl.int32, scale,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whitened values, 0 where a mask is; x may be out."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    v = launch.load(x, x_stride, row, first, inside, INNER[0], ALIGNED).to(A)
    high, low = tl.load(scale + 1).to(A), tl.load(scale + 2).to(A)
    v = whitened(v, high, low, tl.load(scale + 3).to(A), tl.load(scale + 4).to(A))
    if mask is not None:
        valid = launch.load(mask, mask_stride, row, first, inside, INNER[1], ALIGNED) != 0
        v = tl.where(valid, v, 0.0)
    launch.store(out, out_stride, row, first, v, inside, ALIGNED)


_ROW = ("scale",) * 4
_PLANS = Plan(("x",), ("out",), (40, 40), row_loads=_ROW), Plan(("x", "mask"), ("out",), (40, 40), row_loads=_ROW)
VARIANTS += variants(whiten_kernel, TOKENS, _PLANS[0], {}, scale="fp64")
VARIANTS += variants(whiten_kernel, TOKENS, _PLANS[1], {}, mask="i1", scale="fp64")


def whiten(partials: Tensor, x: Tensor, mask: Tensor | None, out: Tensor, flags: list[bool], eps: float, A: tl.dtype) -> Tensor:
    """out = x whitened by the merged partials (3, n), flags as in rlkern/whiten.py; the count."""
    unbiased, floor, shift_mean, scaled, mask_output = flags
    scale = torch.empty(5, dtype=torch.float64, device=x.device)
    choice = {"UNBIASED": unbiased, "FLOOR": floor, "SHIFT_MEAN": shift_mean, "SCALE": scaled, "A": A}
    launch.once(merge_kernel, 1, MERGE, partials, scale, partials.shape[1], eps, **choice)
    tensors = (x, mask if mask_output else None, out)
    launch.over_tokens(whiten_kernel, launch.rows(tensors, flat=True), tensors, scale, A=A)
    return scale[0]
