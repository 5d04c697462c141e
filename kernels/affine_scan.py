# SPDX-License-Identifier: Apache-2.0
"""y_t = x_t + decay_t y_next, in either direction, and its adjoint, the same scan in the other direction with the decays one
step over. A decay of 0 starts anew."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import chunks, launch
from rlkern.kernels.chunks import PARTS
from rlkern.kernels.launch import SCAN, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles


@triton.jit
def blocks_of(begin, end, k, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the k-th block of a walk from `begin` to `end`, or back: its first token, and the element by which the walk leaves."""
    if REVERSE:
        return begin + ((end - begin + BLOCK - 1) // BLOCK - 1 - k) * BLOCK, 0
    else:
        first = begin + k * BLOCK
        return first, tl.minimum(end - first, BLOCK) - 1


@triton.jit
def decay_of(
    decay,
    stride,
    decay_row,
    decay_row_stride,
    value,
    row,
    start,
    first,
    inside,
    A: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Each token's decay; 1 outside a row."""
    if decay is not None:
        d = launch.load(decay, stride, start, first, inside, INNER, ALIGNED).to(A)
    elif decay_row is not None:
        d = tl.load(decay_row + row * decay_row_stride).to(A)
    else:
        d = tl.full((), value, A)
    return tl.where(inside, d, 1.0)


@triton.jit
def token_of(x, stride, start, t, T, other, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """Token t of a row, `other` where it does not exist."""
    there = (t >= 0) & (t < T)
    if INNER == 0:
        here = x + start * stride
    elif ALIGNED:
        here = x + start * (stride * 16) + t
    else:
        here = x + start * stride + t
    return tl.where(there, tl.load(here, mask=there, other=0).to(other.dtype), other)


# ---- forward --------------------------------------------------------------------------------------------------------
@launch.kernel
def affine_scan_fwd_kernel(
    x, y, decay, x_stride: tl.int64, y_stride: tl.int64, decay_stride: tl.int64, T: tl.int64, cu_seqlens,
    entering, decay_row, entering_stride: tl.int64, decay_row_stride: tl.int64, entering_given: tl.int32,
    parts: tl.int64, span: tl.int64, decay_value: tl.float64,
    REVERSE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, row, start, _T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    carry = chunks.entering_of(entering, entering_stride, program, entering_given, A)
    k = begin - begin
    while begin + k * BLOCK < end:
        first, last = blocks_of(begin, end, k, REVERSE, BLOCK)
        inside = launch.within(first, end, ALIGNED, BLOCK)
        v = launch.load(x, x_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        d = decay_of(decay, decay_stride, decay_row, decay_row_stride, decay_value, row, start, first, inside, A, INNER[2], ALIGNED)
        out, _c = chunks.scan(d, tl.where(inside, v, 0.0), carry, REVERSE, True)
        carry = chunks.at(out, last)
        launch.store(y, y_stride, start, first, out, inside, ALIGNED)
        k += 1


# The loops over a row have one block's accesses in their code.
_PLAN = Plan(("x",), ("y",), (96, 128), row_loads=("entering",))
_PER_TOKEN = Plan(("x", "decay"), ("y",), (96, 128), row_loads=("entering",))
_BACK, _FORTH = {"REVERSE": True}, {"REVERSE": False}
VARIANTS += variants(affine_scan_fwd_kernel, SCAN, _PLAN, _BACK, entering="fp32")
VARIANTS += variants(affine_scan_fwd_kernel, SCAN, _PER_TOKEN, _BACK, _FORTH, entering="fp32")


@launch.kernel
def affine_scan_local_kernel(
    x, decay, x_stride: tl.int64, decay_stride: tl.int64, T: tl.int64, cu_seqlens, maps, decay_row, decay_row_stride: tl.int64,
    programs: tl.int64, parts: tl.int64, span: tl.int64, decay_value: tl.float64,
    REVERSE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The map of a part: the product of its decays, and its sum."""
    program, row, start, _T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    total = tl.full((), 0.0, A)
    product = total + 1.0
    k = begin - begin
    while begin + k * BLOCK < end:
        first, last = blocks_of(begin, end, k, REVERSE, BLOCK)
        inside = launch.within(first, end, ALIGNED, BLOCK)
        d = decay_of(decay, decay_stride, decay_row, decay_row_stride, decay_value, row, start, first, inside, A, INNER[1], ALIGNED)
        v = launch.load(x, x_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        out, c = chunks.scan(d, tl.where(inside, v, 0.0), total, REVERSE, True)
        total, product = chunks.at(out, last), chunks.joined(product, chunks.at(c, last), True)
        k += 1
    tl.store(maps + program, product)
    tl.store(maps + programs + program, total)


_PLAN = Plan(("x", "decay"), (), (96, 128), row_stores=("maps",) * 2)
VARIANTS += variants(affine_scan_local_kernel, SCAN, _PLAN, _BACK, maps="fp32")


def affine_scan_fwd(
    decay: Tensor | None,
    decay_row: Tensor | None,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
    y: Tensor | None,
) -> None:
    if y is None:
        return
    tensors = (x, y, decay)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    parts, span = chunks.parts_of(layout, cu_seqlens)
    A, n = launch.arithmetic(x), layout.B * parts
    row_stride = 0 if decay_row is None else decay_row.stride(0)
    entering, choice = chunks.start(x, initial, A), {"REVERSE": reverse, "A": A}
    if parts > 1:
        maps = chunks.empty(x, A, 2, n)
        inputs = layout._replace(strides=layout.strides[::2], inner=layout.inner[::2])
        rest = (maps, decay_row, row_stride, n, parts, span, decay_value)
        launch.over_parts(affine_scan_local_kernel, inputs, parts, tensors[::2], cu_seqlens, *rest, **choice)
        entering = chunks.entering(maps, parts, entering, A, CUTS=True, REVERSE=reverse)
    starts = (entering.x, decay_row, entering.stride, row_stride, entering.given)
    launch.over_parts(affine_scan_fwd_kernel, layout, parts, tensors, cu_seqlens, *starts, parts, span, decay_value, **choice)


# ---- adjoint: `REVERSE` is the direction of the scan, against which this walks --------------------------------------
@triton.jit
def grads_of(
    grad, decay, grad_stride, decay_stride, decay_row, decay_row_stride, value, row, start, first, T, inside, carry,
    REVERSE: tl.constexpr, A: tl.constexpr, GRAD: tl.constexpr, DECAY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """c_t = G_t + decay_prev c_prev, prev being the token that the walk saw before; nothing enters a row's first. GRAD and
    DECAY: inner strides."""
    BLOCK: tl.constexpr = inside.shape[0]
    g = launch.load(grad, grad_stride, start, first, inside, GRAD, ALIGNED).to(A)
    d = decay_of(decay, decay_stride, decay_row, decay_row_stride, value, row, start, first, inside, A, DECAY, ALIGNED)
    edge = T - 1 if REVERSE is False else T - T
    if decay is not None:
        one = tl.full((), 1.0, A)
        if REVERSE:
            d = chunks.behind(d, token_of(decay, decay_stride, start, first - 1, T, one, DECAY, ALIGNED), False)
        else:
            d = chunks.behind(d, token_of(decay, decay_stride, start, first + BLOCK, T, one, DECAY, ALIGNED), True)
    d = tl.where(first + tl.arange(0, BLOCK) == edge, 0.0, d)
    return chunks.scan(d, tl.where(inside, g, 0.0), carry, not REVERSE, True)


@launch.kernel
def affine_scan_bwd_kernel(
    grad, y, decay, d_x, d_decay,
    grad_stride: tl.int64, y_stride: tl.int64, decay_stride: tl.int64, d_x_stride: tl.int64, d_decay_stride: tl.int64,
    T: tl.int64, cu_seqlens, entering, partials, decay_row, initial, d_initial,
    decay_row_stride: tl.int64, initial_stride: tl.int64, d_initial_stride: tl.int64, entering_given: tl.int32,
    parts: tl.int64, span: tl.int64, decay_value: tl.float64,
    REVERSE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_x = c, d_decay_t = c_t y_next (its sum over the part in `partials`), d_initial = decay c at the scan's first token."""
    program, row, start, T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    carry = chunks.entering_of(entering, 1, program, entering_given, A)
    before = tl.full((), 0.0, A)
    if initial is not None:
        before = tl.load(initial + row * initial_stride).to(A)
    total = tl.full((), 0.0, tl.float64)
    k = begin - begin
    while begin + k * BLOCK < end:
        first, last = blocks_of(begin, end, k, not REVERSE, BLOCK)
        inside = launch.within(first, end, ALIGNED, BLOCK)
        c, _product = grads_of(
            grad, decay, grad_stride, decay_stride, decay_row, decay_row_stride, decay_value, row, start, first, T, inside, carry,
            REVERSE, A, INNER[0], INNER[2], ALIGNED,
        )  # fmt: skip
        carry = chunks.at(c, last)
        if d_x is not None:
            launch.store(d_x, d_x_stride, start, first, c, inside, ALIGNED)
        if d_decay is not None or partials is not None:
            read = launch.load(y, y_stride, start, first, inside, INNER[1], ALIGNED).to(A)
            if REVERSE:
                edge = token_of(y, y_stride, start, first + BLOCK, T, before, INNER[1], ALIGNED)
            else:
                edge = token_of(y, y_stride, start, first - 1, T, before, INNER[1], ALIGNED)
            product = c * chunks.behind(tl.where(inside, read, before), edge, REVERSE)
            if d_decay is not None:
                launch.store(d_decay, d_decay_stride, start, first, product, inside, ALIGNED)
            else:
                total += tl.sum(tl.where(inside, product, 0.0), 0).to(tl.float64)
        k += 1
    if partials is not None:
        tl.store(partials + program, total)
    if d_initial is not None:
        d = tl.full((), decay_value, A)
        if decay is not None:
            d = token_of(decay, decay_stride, start, T - 1 if REVERSE else T - T, T, d, INNER[2], ALIGNED)
        elif decay_row is not None:
            d = tl.load(decay_row + row * decay_row_stride).to(A)
        d = tl.where(T > 0, d * carry, 0.0)
        leaves = program == row * parts + (parts - 1 if REVERSE else 0)
        tl.store(d_initial + row * d_initial_stride, launch.rounded(d, d_initial.dtype.element_ty), mask=leaves)


_TYPES = {"entering": "fp32"}
_PER_TOKEN = Plan(("grad", "y", "decay"), ("d_x", "d_decay"), (120, 136), row_loads=("entering", "y", "decay"))
_PER_ROW = Plan(("grad", "y"), ("d_x",), (120, 136), row_loads=("entering", "y", "decay_row"), row_stores=("partials",))
VARIANTS += variants(affine_scan_bwd_kernel, SCAN, _PER_TOKEN, _BACK, _FORTH, **_TYPES)
VARIANTS += variants(affine_scan_bwd_kernel, SCAN, _PER_ROW, _BACK, **_TYPES, partials="fp64")


@launch.kernel
def affine_scan_bwd_local_kernel(
    grad, decay, grad_stride: tl.int64, decay_stride: tl.int64, T: tl.int64, cu_seqlens, maps, decay_row, decay_row_stride: tl.int64,
    programs: tl.int64, parts: tl.int64, span: tl.int64, decay_value: tl.float64,
    REVERSE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The map of a part: the product of its decays, and its sum."""
    program, row, start, T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    total = tl.full((), 0.0, A)
    product = total + 1.0
    k = begin - begin
    while begin + k * BLOCK < end:
        first, last = blocks_of(begin, end, k, not REVERSE, BLOCK)
        inside = launch.within(first, end, ALIGNED, BLOCK)
        out, c = grads_of(
            grad, decay, grad_stride, decay_stride, decay_row, decay_row_stride, decay_value, row, start, first, T, inside, total,
            REVERSE, A, INNER[0], INNER[1], ALIGNED,
        )  # fmt: skip
        total, product = chunks.at(out, last), chunks.joined(product, chunks.at(c, last), True)
        k += 1
    tl.store(maps + program, product)
    tl.store(maps + programs + program, total)


_PLAN = Plan(("grad", "decay"), (), (96, 128), row_loads=("decay",), row_stores=("maps",) * 2)
VARIANTS += variants(affine_scan_bwd_local_kernel, SCAN, _PLAN, _BACK, maps="fp32")


@launch.kernel
def sum_kernel(partials, sums, parts: tl.int64, BLOCK: tl.constexpr):
    """A row's sum over its parts."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partials + row * parts + i, mask=i < parts, other=0), 0)
    tl.store(sums + row, launch.rounded(total, sums.dtype.element_ty))


_PLAN = Plan(loads=(), stores=(), row_loads=("partials",), row_stores=("sums",), registers=(24, 24))
VARIANTS += variants(sum_kernel, PARTS, _PLAN, {}, partials="fp64")


def affine_scan_bwd(
    grad: Tensor,
    decay: Tensor | None,
    decay_row: Tensor | None,
    y: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
    needs: list[bool],
    d_x: Tensor | None,
    d_decay: Tensor | None,
    d_initial: Tensor | None,
) -> None:
    if d_x is None and d_decay is None and d_initial is None:
        return
    tensors = (grad, y, decay, d_x, None if decay is None else d_decay)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    parts, span = chunks.parts_of(layout, cu_seqlens)
    A, n = launch.arithmetic(grad), layout.B * parts
    strides = [0 if x is None else x.stride(0) for x in (decay_row, initial, d_initial)]
    entering, choice = chunks.start(grad, None, A), {"REVERSE": reverse, "A": A}
    if parts > 1:
        maps = chunks.empty(grad, A, 2, n)
        inputs = layout._replace(strides=layout.strides[:3:2], inner=layout.inner[:3:2])
        local = (maps, decay_row, strides[0], n, parts, span, decay_value)
        launch.over_parts(affine_scan_bwd_local_kernel, inputs, parts, tensors[:3:2], cu_seqlens, *local, **choice)
        entering = chunks.entering(maps, parts, entering, A, CUTS=True, REVERSE=not reverse)
    partials = torch.empty(n, dtype=torch.float64, device=grad.device) if decay is None and d_decay is not None else None
    rest = (entering.x, partials, decay_row, initial, d_initial, *strides, entering.given, parts, span, decay_value)
    launch.over_parts(affine_scan_bwd_kernel, layout, parts, tensors, cu_seqlens, *rest, **choice)
    if partials is not None:
        launch.once(sum_kernel, layout.B, PARTS, partials, d_decay, parts)
