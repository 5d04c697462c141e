# SPDX-License-Identifier: Apache-2.0
"""What the scans share. A row is walked block by block; what one block leaves enters the next. An element of a scan is the
map y -> x + c y of what enters it, so (1, 0) passes it on: a token that the recurrence skips, or that does not exist.

Few long rows would leave most of a GPU idle. They are cut into parts in three launches: each part's own map, what enters each
part (here, a program per row), and then the same walk as that of a whole row. The inputs are read twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch
from rlkern.kernels.launch import Block, Plan, Rows, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
PARTS = Block(128, 4)  # the most parts a row has: one a thread
_PLACES = 512  # programs of SCAN that a large GPU's multiprocessors hold at once, three or four each at 96 to 128 registers


# ---- composition: `far` is the step nearer to where the walk began. A product of decays is kept in two parts, c + e: a power
# by squaring would double its error with each step, and a decay near 1 reaches over thousands of tokens --------------
@triton.jit
def product_of(c_far, e_far, c, e):
    product = c * c_far
    return product, tl.fma(c, e_far, tl.fma(e, c_far, tl.fma(c, c_far, -product)))


@triton.jit
def after(c, e, x_far, x):
    """x + (c + e) x_far; e is no part of an infinity, since 0 times that is NaN."""
    rest = tl.where(tl.abs(x_far) == float("inf"), x, tl.fma(e, x_far, x))
    return tl.fma(c, x_far, rest)


@triton.jit
def compose(c_far, e_far, x_far, c, e, x):
    """A product of decays that underflows is none of 0, which would make NaN of an infinity."""
    _product, rest = product_of(c_far, e_far, c, e)
    return joined(c_far, c, True), rest, after(c, e, x_far, x)


@triton.jit
def compose_cut(c_far, e_far, x_far, c, e, x):
    """A decay of 0 lets nothing pass, not even a NaN."""
    _product, rest = product_of(c_far, e_far, c, e)
    return joined(c_far, c, True), rest, tl.where(c == 0.0, x, after(c, e, x_far, x))


@triton.jit
def joined(c_far, c, CUTS: tl.constexpr):
    """The decay of both; a product that underflows is no cut."""
    product = c * c_far
    if CUTS:
        tiny = tl.full((), 1e-37 if product.dtype == tl.float32 else 1e-300, product.dtype)
        least = tl.minimum(tl.minimum(tl.abs(c), tl.abs(c_far)), tiny)  # fewer registers than two comparisons with 0
        product = tl.where(tl.abs(product) < least, least, product)
    return product


@triton.jit
def compose_latest(known_far, x_far, known, x):
    """x of the nearest token where there is one."""
    return known | known_far, tl.where(known != 0, x, x_far)


# ---- inside a block -------------------------------------------------------------------------------------------------
@triton.jit
def scan(c, x, carry, REVERSE: tl.constexpr, CUTS: tl.constexpr):
    """y = x + c y_next in a block that `carry` enters, and the product of the decays so far."""
    e = c - c
    if CUTS:
        c, e, x = tl.associative_scan((c, e, x), 0, compose_cut, REVERSE)
        return tl.where(c == 0.0, x, tl.fma(c + e, carry, x)), tl.where(c == 0.0, c, c + e)
    else:
        c, e, x = tl.associative_scan((c, e, x), 0, compose, REVERSE)
        return tl.fma(c + e, carry, x), c + e


@triton.jit
def latest(x, live, entering, REVERSE: tl.constexpr):
    """x of this or the nearest live token behind it in the walk, `entering` where there is none, and is there one?"""
    known, x = tl.associative_scan((live.to(tl.int32), x), 0, compose_latest, REVERSE)
    return tl.where(known != 0, x, entering), known


@triton.jit
def behind(x, entering, REVERSE: tl.constexpr):
    """x of the token that the walk saw before each; of the block's first one, `entering`."""
    BLOCK: tl.constexpr = x.shape[0]
    i = tl.arange(0, BLOCK)
    if REVERSE:
        return tl.where(i == BLOCK - 1, entering, tl.gather(x, tl.minimum(i + 1, BLOCK - 1), 0))
    else:
        return tl.where(i == 0, entering, tl.gather(x, tl.maximum(i - 1, 0), 0))


@triton.jit
def at(x, i):
    """One element of a block."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == i, x, 0), 0)


@triton.jit
def leaving(x, REVERSE: tl.constexpr):
    return at(x, 0 if REVERSE else x.shape[0] - 1)


# ---- rows in parts --------------------------------------------------------------------------------------------------
def parts_of(rows: Rows, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(parts a row, tokens a part). Rows are cut where they alone give a GPU less than an eighth of the programs that it holds
    at once, and a row is long enough to pay for two more launches. Packed rows are not: their lengths are not known here."""
    blocks = triton.cdiv(rows.T * 16 if rows.aligned else rows.T, launch.SCAN.size)
    if cu_seqlens is not None or not 0 < rows.B <= _PLACES // 8 or blocks < 8:
        return 1, max(blocks, 1) * launch.SCAN.size
    each = triton.cdiv(blocks, min(blocks, _PLACES // rows.B, PARTS.size))
    return triton.cdiv(blocks, each), each * launch.SCAN.size


@triton.jit
def part_of(T, cu_seqlens, parts, span, ALIGNED: tl.constexpr):
    """Of this program: its part, its row, what row strides multiply, the row's length, the part's first token and end."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    start = row
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row)
        T = tl.load(cu_seqlens + row + 1) - start
    if ALIGNED:
        T = T * 16
    begin = (program - row * parts) * span
    return program, row, start, T, begin, tl.where(parts == 1, T, tl.minimum(begin + span, T))


class Start(NamedTuple):
    """What enters the programs: one value each. Of the dtype of the arithmetic and there even where nothing enters, so that
    cutting rows into parts, as they get longer, compiles no kernel anew."""

    x: Tensor
    stride: int
    given: int


def start(like: Tensor, initial: Tensor | None, A: tl.dtype) -> Start:
    if initial is None:
        return Start(empty(like, A, 1), 0, 0)
    return Start(initial.to(torch.float64 if A is tl.float64 else torch.float32), initial.stride(0), 1)


def empty(like: Tensor, dtype: tl.dtype, *sizes: int) -> Tensor:
    return torch.empty(*sizes, dtype=torch.float64 if dtype is tl.float64 else torch.float32, device=like.device)


@triton.jit
def entering_of(x, stride, program, given, A: tl.constexpr):
    return tl.load(x + program * stride, mask=given != 0, other=0).to(A)


@launch.kernel
def carries_kernel(
    maps, carries, initial, stride: tl.int64, given: tl.int32, programs: tl.int64, parts: tl.int64,
    CUTS: tl.constexpr, REVERSE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters each part, from the maps of a row's parts: the scan again, with parts for tokens, in float64."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    there, inside = row * parts + i, i < parts
    c = tl.load(maps + there, mask=inside, other=1).to(tl.float64)
    x = tl.load(maps + programs + there, mask=inside, other=0).to(tl.float64)
    carry = entering_of(initial, stride, row, given, tl.float64)
    y, _c = scan(c, x, carry, REVERSE, CUTS)
    tl.store(carries + there, behind(y, carry, REVERSE).to(A), mask=inside)


# A thread has one part, or none.
_PLAN = Plan(loads=(), stores=(), row_loads=("maps", "maps", "initial"), row_stores=("carries",), registers=(48, 48))
_CHOICES = [{"CUTS": cuts, "REVERSE": reverse} for cuts in (False, True) for reverse in (False, True)]
VARIANTS += [v for v in variants(carries_kernel, PARTS, _PLAN, *_CHOICES) if v.dtype == "fp32"]


def entering(maps: Tensor, parts: int, initial: Start, A: tl.dtype, **choice: bool) -> Start:
    """What enters each part; maps (2, rows * parts): the products of decays, and the sums."""
    n = maps.shape[1]
    carries = empty(maps, A, n)
    launch.once(carries_kernel, n // parts, PARTS, maps, carries, *initial, n, parts, A=A, **choice)
    return Start(carries, 1, 1)


@launch.kernel
def gae_carries_kernel(
    maps, carries, lam, lam_stride: tl.int64, bootstrap, stride: tl.int64, given: tl.int32, programs: tl.int64, parts: tl.int64,
    gamma: tl.float64, decay: tl.float64, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for GAE: of a part with a live token, A = sum + product * (gamma V' + gamma lam A'), V' and A' entering it."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    there, inside = row * parts + i, i < parts
    product = tl.load(maps + there, mask=inside, other=1).to(tl.float64)
    x = tl.load(maps + programs + there, mask=inside, other=0).to(tl.float64)
    value = tl.load(maps + 2 * programs + there, mask=inside, other=0).to(tl.float64)
    live = tl.load(maps + 3 * programs + there, mask=inside, other=0) != 0
    end = entering_of(bootstrap, stride, row, given, tl.float64)
    value, _known = latest(value, live, end, True)
    next_value = behind(value, end, True)
    gamma, decay = decays(gamma, decay, lam, lam_stride, row, tl.float64)
    c = tl.where(live, product * decay, 1.0)
    zero = tl.full((), 0.0, tl.float64)
    y, _c = scan(c, tl.where(live, tl.fma(product * gamma, next_value, x), 0.0), zero, True, False)
    tl.store(carries + there, next_value.to(A), mask=inside)
    tl.store(carries + programs + there, behind(y, zero, True).to(A), mask=inside)


_PLAN = Plan(loads=(), stores=(), row_loads=("maps",) * 4 + ("bootstrap",), row_stores=("carries",) * 2, registers=(64, 64))
VARIANTS += [v for v in variants(gae_carries_kernel, PARTS, _PLAN, {}) if v.dtype == "fp32"]


def gae_entering(
    maps: Tensor, parts: int, lam: Tensor | None, bootstrap: Start, numbers: tuple[float, float], A: tl.dtype
) -> tuple[Start, Start]:
    """The next values and the advantages that enter each part; maps (4, rows * parts), as gae_local_kernel writes them."""
    n = maps.shape[1]
    carries = empty(maps, A, 2, n)
    lam_stride = 0 if lam is None else lam.stride(0)
    launch.once(gae_carries_kernel, n // parts, PARTS, maps, carries, lam, lam_stride, *bootstrap, n, parts, *numbers, A=A)
    return Start(carries[0], 1, 1), Start(carries[1], 1, 1)


@triton.jit
def decays(gamma, decay, lam, lam_stride, row, A: tl.constexpr):
    """gamma, and gamma * lam: of the row where `lam` holds one each, else `decay`."""
    if lam is not None:
        product = tl.full((), gamma, tl.float64) * tl.load(lam + row * lam_stride).to(tl.float64)
        return tl.full((), gamma, A), product.to(A)
    else:
        return tl.full((), gamma, A), tl.full((), decay, A)
