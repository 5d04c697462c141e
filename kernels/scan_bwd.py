# SPDX-License-Identifier: Apache-2.0
"""The adjoints of GAE and of discounted returns: the same recurrences, left to right. What a token's cotangent c_t adds up
decays as it leaves: c_t = G_t + decay c_prev."""

import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import chunks, launch, math
from rlkern.kernels.discounted_returns import last_of_turn
from rlkern.kernels.launch import SCAN, Plan, Variant, variants
from rlkern.kernels.scan import valid_of

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles


@triton.jit
def gathered(x, live, decay, carry):
    """Cotangents of tokens that are not live flow right into the next live one; a sum decays as it leaves a live token. The
    sums, the products of decays, and both as they leave each token. `carry` has left the block before."""
    d = tl.where(live, decay, 1.0)
    s, c = chunks.scan(chunks.behind(d, 1.0, False), x, carry, False, False)
    return s, c, d * s, d * c


# ---- GAE ------------------------------------------------------------------------------------------------------------
@launch.kernel
def gae_bwd_kernel(
    grad_advantages, grad_returns, mask, d_rewards, d_values,
    grad_advantages_stride: tl.int64, grad_returns_stride: tl.int64, mask_stride: tl.int64, d_rewards_stride: tl.int64,
    d_values_stride: tl.int64, T: tl.int64, cu_seqlens, d_bootstrap, lam, d_bootstrap_stride: tl.int64, lam_stride: tl.int64,
    gamma: tl.float64, decay: tl.float64,
    RULE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_reward = c, d_value = G_returns - c + gamma c_prev, c_prev of the live token before."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    gamma, decay = chunks.decays(gamma, decay, lam, lam_stride, row, A)
    carry, before = tl.full((), 0.0, A), tl.full((), 0.0, A)
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        last = tl.minimum(T - first, BLOCK) - 1
        valid = valid_of(mask, mask_stride, start, first, inside, INNER[2], ALIGNED)
        live = valid if RULE == "skip" else inside
        h = launch.load(grad_returns, grad_returns_stride, start, first, inside, INNER[1], ALIGNED).to(A)
        g = launch.load(grad_advantages, grad_advantages_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        c, _product, left, _left_product = gathered(tl.where(inside, g + h, 0.0), live, decay, carry)
        carry = chunks.at(left, last)
        shown = valid if RULE == "zero" else live
        if d_rewards is not None:
            launch.store(d_rewards, d_rewards_stride, start, first, tl.where(shown, c, 0.0), inside, ALIGNED)
        if d_values is not None or d_bootstrap is not None:
            seen = c
            if RULE == "skip":
                seen, _known = chunks.latest(c, live, before, False)
            if d_values is not None:
                d = (h - c) + gamma * chunks.behind(seen, before, False)
                d = tl.where(shown, d, 0.0 if RULE == "zero" else h)
                launch.store(d_values, d_values_stride, start, first, d, inside, ALIGNED)
            before = chunks.at(seen, last)
        first += BLOCK
    if d_bootstrap is not None:
        tl.store(d_bootstrap + row * d_bootstrap_stride, launch.rounded(gamma * before, d_bootstrap.dtype.element_ty))


# The loop over a row has one block's accesses in its code.
_GRADS = ("grad_advantages", "grad_returns", "mask")
_PLAN = Plan(_GRADS, ("d_rewards", "d_values"), (120, 160), row_stores=("d_bootstrap",))
_VALUES = Plan(_GRADS, ("d_values",), (120, 160))
VARIANTS += variants(gae_bwd_kernel, SCAN, _PLAN, {"RULE": "skip"}, {"RULE": "zero"}, mask="i1")
VARIANTS += variants(gae_bwd_kernel, SCAN, _VALUES, {"RULE": "skip"}, mask="i1")


def gae_bwd(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    lam_row: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    lam: float,
    needs: list[bool],
    d_rewards: Tensor | None,
    d_values: Tensor | None,
    d_bootstrap: Tensor | None,
) -> None:
    if d_rewards is None and d_values is None and d_bootstrap is None:
        return
    tensors = (grad_advantages, grad_returns, mask, d_rewards, d_values)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    strides = (0 if x is None else x.stride(0) for x in (d_bootstrap, lam_row))
    rest = (d_bootstrap, lam_row, *strides, gamma, gamma * lam)
    launch.over_parts(gae_bwd_kernel, layout, 1, tensors, cu_seqlens, *rest, RULE=masked, A=launch.arithmetic(grad_returns))


# ---- discounted returns ---------------------------------------------------------------------------------------------
@triton.jit
def returns_grad_block(
    grad, mask, grad_stride, mask_stride, start, first, T, inside, carry, gamma,
    RULE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block's gradients, and the sums and products of decays that pass each token, or, under "turn", have left it."""
    valid = valid_of(mask, mask_stride, start, first, inside, INNER[1], ALIGNED)
    x = launch.load(grad, grad_stride, start, first, inside, INNER[0], ALIGNED).to(A)
    if RULE == "turn":  # a turn's cotangents gather at its last token, which alone read a reward
        live = last_of_turn(mask, mask_stride, start, first, T, valid, INNER[1], ALIGNED)
        d, _product, y, c = gathered(tl.where(valid, x, 0.0), live, gamma, carry)
        return tl.where(live, d, 0.0), y, c
    else:
        live = valid if RULE == "skip" else inside
        c = tl.where(live, gamma, 1.0)
        if RULE == "reset":  # a masked token reads the return to its right, but none to its left reads it
            c = tl.where(inside & (valid == 0), 0.0, c)
        y, c = chunks.scan(c, tl.where(live, x, 0.0), carry, False, RULE == "reset")
        return tl.where(valid if RULE == "zero" else live, y, 0.0), y, c


@launch.kernel
def discounted_returns_bwd_kernel(
    grad, mask, d_rewards, grad_stride: tl.int64, mask_stride: tl.int64, d_rewards_stride: tl.int64, T: tl.int64, cu_seqlens,
    entering, d_bootstrap, entering_stride: tl.int64, d_bootstrap_stride: tl.int64, entering_given: tl.int32,
    parts: tl.int64, span: tl.int64, gamma: tl.float64,
    RULE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, row, start, T, first, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    gamma = math.constant(gamma, A)
    carry = chunks.entering_of(entering, entering_stride, program, entering_given, A)
    while first < end:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        d, y, _c = returns_grad_block(grad, mask, grad_stride, mask_stride, start, first, T, inside, carry, gamma, RULE, A, INNER, ALIGNED)
        carry = chunks.at(y, tl.minimum(end - first, BLOCK) - 1)
        if d_rewards is not None:
            launch.store(d_rewards, d_rewards_stride, start, first, d, inside, ALIGNED)
        first += BLOCK
    if d_bootstrap is not None:
        d = carry if RULE == "turn" else gamma * carry
        there = d_bootstrap + row * d_bootstrap_stride
        tl.store(there, launch.rounded(d, d_bootstrap.dtype.element_ty), mask=program == row * parts + parts - 1)


_TYPES = {"mask": "i1", "entering": "fp32"}
_PLAN = Plan(("grad", "mask"), ("d_rewards",), (112, 128), row_loads=("entering",), row_stores=("d_bootstrap",))
_TURN = Plan(("grad", "mask"), ("d_rewards",), (112, 128), row_loads=("entering", "mask"))
VARIANTS += variants(discounted_returns_bwd_kernel, SCAN, _PLAN, {"RULE": "skip"}, {"RULE": "reset"}, **_TYPES)
VARIANTS += variants(discounted_returns_bwd_kernel, SCAN, _TURN, {"RULE": "turn"}, **_TYPES)


@launch.kernel
def discounted_returns_bwd_local_kernel(
    grad, mask, grad_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens,
    maps, programs: tl.int64, parts: tl.int64, span: tl.int64, gamma: tl.float64,
    RULE: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The map of a part: the product of its decays, and its sum."""
    program, _row, start, T, first, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    total = tl.full((), 0.0, A)
    product = total + 1.0
    while first < end:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        _d, y, c = returns_grad_block(
            grad, mask, grad_stride, mask_stride, start, first, T, inside, total, math.constant(gamma, A), RULE, A, INNER, ALIGNED
        )
        last = tl.minimum(end - first, BLOCK) - 1
        total = chunks.at(y, last)
        product = chunks.joined(product, chunks.at(c, last), RULE == "reset")
        first += BLOCK
    tl.store(maps + program, product)
    tl.store(maps + programs + program, total)


_PLAN = Plan(("grad", "mask"), (), (80, 96), row_stores=("maps",) * 2)
VARIANTS += variants(discounted_returns_bwd_local_kernel, SCAN, _PLAN, {"RULE": "skip"}, mask="i1", maps="fp32")


def discounted_returns_bwd(
    grad_returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    needs: list[bool],
    d_rewards: Tensor | None,
    d_bootstrap: Tensor | None,
) -> None:
    if d_rewards is None and d_bootstrap is None:
        return
    tensors = (grad_returns, mask, d_rewards)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    parts, span = chunks.parts_of(layout, cu_seqlens)
    A, n = launch.arithmetic(grad_returns), layout.B * parts
    entering = chunks.start(grad_returns, None, A)
    if parts > 1:
        maps = chunks.empty(grad_returns, A, 2, n)
        inputs = layout._replace(strides=layout.strides[:2], inner=layout.inner[:2])
        local = (maps, n, parts, span, gamma)
        launch.over_parts(discounted_returns_bwd_local_kernel, inputs, parts, tensors[:2], cu_seqlens, *local, RULE=masked, A=A)
        entering = chunks.entering(maps, parts, entering, A, CUTS=masked == "reset", REVERSE=False)
    outputs = (entering.x, d_bootstrap, entering.stride, 0 if d_bootstrap is None else d_bootstrap.stride(0), entering.given)
    rest = (*outputs, parts, span, gamma)
    launch.over_parts(discounted_returns_bwd_kernel, layout, parts, tensors, cu_seqlens, *rest, RULE=masked, A=A)
