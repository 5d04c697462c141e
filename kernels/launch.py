# SPDX-License-Identifier: Apache-2.0
"""What every launcher shares: tensors as rows, the block sizes, and one way to launch.

A kernel is compiled once per combination of dtypes and constexprs, whatever the shapes: T, strides and addresses are
never specialised on. ALIGNED is the one constexpr that a shape decides, so a run in which T changes at each step compiles
each kernel at most twice. Under ALIGNED the tensors start at multiples of 16 bytes, and T and the strides arrive as counts
of 16 elements: that is what lets the compiler use 128-bit accesses.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Block(NamedTuple):
    size: int
    num_warps: int


# 8 elements a thread: two 128-bit accesses of float32, one of bfloat16, and half of what a thread has room for.
TOKENS = Block(1024, 4)  # many programs a row
ROW = Block(2048, 8)  # one program a row: more threads, since rows are fewer than the GPU's places
SCAN = Block(1024, 4)  # one program a part of a row: each thread reads what each warp of a scan adds up, so few warps are cheap
SWEEP = Block(512, 4)  # a chunk of a row a program, with its sums: of ten sums, 8 elements a thread take twice the registers
MERGE = Block(1024, 8)  # what the programs of a few rows left: one program, 4 elements a thread of each sum
NARROW = Block(1024, 4)  # one program a row, where ROW would spill
PARTS = Block(1024, 8)  # at most so many spans, which one program merges: about 8 on each of the GPU's multiprocessors
GROUP = Block(128, 1)  # one program a group of rows: mostly a few, which a warp adds without a barrier


class Plan(NamedTuple):
    """What a kernel's machine code may cost; tools/sass_check.py holds it to this.

    `loads` and `stores` name a tensor of tokens once for each time the code reads or writes one of its elements, and thereby
    state the bytes per element. Aligned, each access is 128 bits wide, or all that a thread has of a narrow dtype; else one
    element. `row_loads` and `row_stores` are the accesses to one value a row. `registers`: of a thread, aligned and not; 64
    leave room for 1024 threads, and a loop over a row that is not aligned keeps an address per element.
    """

    loads: tuple[str, ...]
    stores: tuple[str, ...]
    registers: tuple[int, int]
    row_loads: tuple[str, ...] = ()
    row_stores: tuple[str, ...] = ()


class Variant(NamedTuple):
    """One way a kernel is compiled: `dtype` for every tensor of the plan but `others`, and its own constexprs."""

    kernel: Any
    block: Block
    plan: Plan
    dtype: str
    constexprs: dict[str, Any]
    others: dict[str, str]

    def types(self) -> dict[str, str]:
        loads, stores, _, row_loads, row_stores = self.plan
        return dict.fromkeys(loads + stores + row_loads + row_stores, self.dtype) | self.others


def variants(kernel: Any, block: Block, plan: Plan, *constexprs: dict[str, Any], **others: str) -> list[Variant]:
    """The variants that training runs most: float32 and bfloat16, with each of `constexprs`; `others`: element types."""
    return [Variant(kernel, block, plan, dtype, choice, others) for dtype in ("fp32", "bf16") for choice in constexprs]


def kernel(function: Callable[..., None]) -> Any:
    """triton.jit without specialisation on values: an argument's alignment, or its being 1, compiles nothing anew."""
    runtime = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


# ---- tensors as rows ------------------------------------------------------------------------------------------------
class Rows(NamedTuple):
    """B rows of T tokens. Element (r, t) of tensor i sits at r * strides[i] + t * inner[i], inner being 1, or 0 where
    a row holds one value. Packed rows start at cu[r], which strides of 1 multiply. If aligned, T and the strides of
    tensors of inner stride 1 count 16 elements."""

    B: int
    T: int
    strides: tuple[int, ...]
    inner: tuple[int, ...]
    aligned: bool


def rows(tensors: Sequence[Tensor | None], *, flat: bool = False, cu_seqlens: Tensor | None = None) -> Rows:
    """The rows of tensors of one shape, (B, T) or (N,); None is absent. `flat`: rows do not matter, contiguous tensors are
    one row. The first tensor is there."""
    shape = tensors[0].shape  # type: ignore[union-attr]
    there = [x for x in tensors if x is not None]
    if cu_seqlens is not None:
        inner = tuple(1 if x is None or x.shape[0] == 1 else x.stride(0) for x in tensors)
        return Rows(cu_seqlens.shape[0] - 1, 0, inner, inner, False)
    if len(shape) == 1 or (flat and all(x.is_contiguous() for x in there)):
        B, T = 1, shape.numel()
    else:
        B, T = shape
    last = shape[-1] if shape else 1
    inner = tuple(1 if x is None or last == 1 else x.stride(-1) for x in tensors)
    strides = tuple(0 if x is None or B == 1 else x.stride(0) for x in tensors)
    vectors = [(x, s) for x, s, i in zip(tensors, strides, inner, strict=True) if x is not None and i]
    if T % 16 or any(s % 16 or x.data_ptr() % 16 for x, s in vectors):
        return Rows(B, T, strides, inner, False)
    return Rows(B, T // 16, tuple(s // 16 if i else s for s, i in zip(strides, inner, strict=True)), inner, True)


def arithmetic(*tensors: Tensor | None) -> tl.dtype:
    """float64 if any operand is, else float32."""
    return tl.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else tl.float32


# ---- launches -------------------------------------------------------------------------------------------------------
def over_tokens(kernel: Any, rows: Rows, tensors: Sequence[Tensor | None], *rest: Any, block: Block = TOKENS, **constexprs: Any) -> None:
    """A program per block of tokens: kernel(*tensors, *strides, T, blocks, *rest)."""
    blocks = triton.cdiv(rows.T * 16 if rows.aligned else rows.T, block.size)
    over(rows.B * blocks, block, kernel, rows, tensors, blocks, *rest, **constexprs)


def over_rows(
    kernel: Any, rows: Rows, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, *rest: Any, block: Block = ROW, **constexprs: Any
) -> None:
    """A program per row: kernel(*tensors, *strides, T, cu_seqlens, *rest)."""
    over(rows.B, block, kernel, rows, tensors, cu_seqlens, *rest, **constexprs)


def over_parts(
    kernel: Any, rows: Rows, parts: int, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, *rest: Any, **constexprs: Any
) -> None:
    """A program per part of a row: as over_rows."""
    over(rows.B * parts, SCAN, kernel, rows, tensors, cu_seqlens, *rest, **constexprs)


def over_spans(kernel: Any, rows: Rows, tensors: Sequence[Tensor | None], *rest: Any, **constexprs: Any) -> int:
    """A program per span of blocks, however rows lie: kernel(*tensors, *strides, T, blocks, total, span, *rest). How many."""
    blocks = triton.cdiv(rows.T * 16 if rows.aligned else rows.T, TOKENS.size)
    total = rows.B * blocks
    span = max(1, triton.cdiv(total, PARTS.size))
    programs: int = triton.cdiv(total, span)
    over(programs, TOKENS, kernel, rows, tensors, blocks, total, span, *rest, **constexprs)
    return programs


def over(programs: int, block: Block, kernel: Any, rows: Rows, tensors: Sequence[Tensor | None], *rest: Any, **constexprs: Any) -> None:
    """That many programs, on grid.x, on the device and the current stream of the tensors. Products and sums are never fused
    into multiply-adds unless the kernel says tl.fma: the bits are not the compiler's to choose."""
    if programs == 0:
        return
    options = {"BLOCK": block.size, "num_warps": block.num_warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(next(x for x in tensors if x is not None)):
        kernel[(programs,)](*tensors, *rows.strides, rows.T, *rest, INNER=rows.inner, ALIGNED=rows.aligned, **constexprs, **options)


def once(kernel: Any, programs: int, block: Block, *args: Any, **constexprs: Any) -> None:
    """So many programs, of what is no rows of tokens: kernel(*args)."""
    if programs == 0:
        return
    options = {"BLOCK": block.size, "num_warps": block.num_warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
        kernel[(programs,)](*args, **constexprs, **options)


# ---- inside a kernel ------------------------------------------------------------------------------------------------
@triton.jit
def block_of(T, blocks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program among those of `over_tokens`: its row, the first token of its block, and which tokens exist."""
    program = tl.program_id(0)
    first = (program % blocks).to(tl.int64) * BLOCK
    if ALIGNED:
        T = T * 16
    return (program // blocks).to(tl.int64), first, within(first, T, ALIGNED, BLOCK)


@triton.jit
def span_of(T, total, span, ALIGNED: tl.constexpr):
    """Of this program among those of `over_spans`: its first block, the one after its last, and T in tokens."""
    i = tl.program_id(0) * span
    if ALIGNED:
        T = T * 16
    return i, tl.minimum(i + span, total), T


@triton.jit
def block_at(i, T, blocks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of block i among those of `over_spans`: its row, its first token, and which tokens exist."""
    first = (i % blocks).to(tl.int64) * BLOCK
    return (i // blocks).to(tl.int64), first, within(first, T, ALIGNED, BLOCK)


@triton.jit
def row_of(T, cu_seqlens, ALIGNED: tl.constexpr):
    """Of this program among those of `over_rows`: its row, what row strides multiply, and the row's length."""
    row = tl.program_id(0).to(tl.int64)
    start = row
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row)
        T = tl.load(cu_seqlens + row + 1) - start
    if ALIGNED:
        T = T * 16
    return row, start, T


@triton.jit
def within(first, T, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens of the block at `first` exist."""
    if ALIGNED:
        count = tl.minimum((T - first) // 16, BLOCK // 16).to(tl.int32) * 16  # shows that whole vectors exist or do not
    else:
        count = tl.minimum(T - first, BLOCK).to(tl.int32)
    return tl.arange(0, BLOCK) < count


@triton.jit
def start_of(x, stride, row, first, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a row's token `first`."""
    if INNER == 0:
        return x + row * stride
    elif ALIGNED:
        return tl.multiple_of(x + (row * (stride * 16) + first), 16)  # one addition: merging two would lose the hint
    else:
        return x + (row * stride + first)


@triton.jit
def load(x, stride, row, first, inside, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """The block of tokens at `first` of a row, 0 outside it; one value where the row holds one."""
    start = start_of(x, stride, row, first, INNER, ALIGNED)
    if INNER == 0:
        return tl.load(start)
    else:
        return tl.load(start + tl.arange(0, inside.shape[0]), mask=inside, other=0)


@triton.jit
def store(x, stride, row, first, value, inside, ALIGNED: tl.constexpr):
    """Write a block, rounded to the dtype of x."""
    start = start_of(x, stride, row, first, 1, ALIGNED)
    tl.store(start + tl.arange(0, inside.shape[0]), rounded(value, x.dtype.element_ty), mask=inside)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value` in `dtype`, to nearest even. The interpreter cuts bfloat16 off instead, so there the bits are rounded by hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)
