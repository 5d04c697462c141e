# SPDX-License-Identifier: Apache-2.0
"""How a loss adds up: rows cut into chunks, the mask's counts, the denominators, and the merge of what chunks leave.

A program has a chunk of a row and leaves a column of the table `parts`: float64, a line a field, in the order of the
result's sums and maxes. A merge takes ROWS rows of at most CHUNKS columns; where there are more rows, merging programs leave
a column each, and one program merges those. Orders are fixed, so the bits are the same in every run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.launch import MERGE, SWEEP, TOKENS, Block, Plan, Rows, Variant, variants

VARIANTS: list[Variant] = []
CHUNKS, COLUMNS = tl.constexpr(64), tl.constexpr(256)
ROWS = tl.constexpr(MERGE.size // CHUNKS.value)
FIELDS = tl.constexpr(16)  # at least a table's lines
LANES = tl.constexpr(SWEEP.size // 4)  # what a thread adds up is a lane
LOCAL, IN_TENSOR = tl.constexpr(1), tl.constexpr(2)  # where a denominator comes from; 0: it is a number

# The lines of a table: how many, the weighted sums (from, to), the first maximum.
Layout = tuple[int, int, int, int]
COUNTED: Layout = (2, 2, 2, 2)


# ---- chunks ---------------------------------------------------------------------------------------------------------
@triton.jit
def chunk_of(T, cu_seqlens, chunks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its row, what row strides multiply, the row's length, its first token and the end of its chunk."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    start = row
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row)
        T = tl.load(cu_seqlens + row + 1) - start
    if ALIGNED:
        T = T * 16
    size = ((T + BLOCK - 1) // BLOCK + chunks - 1) // chunks * BLOCK
    first = (program % chunks) * size
    return row, start, T, first, tl.minimum(first + size, T)


@triton.jit
def by_lanes(x, ALIGNED: tl.constexpr):
    """A block with what a thread holds along axis ALIGNED: neighbours if accesses are wide, else elements LANES apart."""
    if ALIGNED:
        return tl.reshape(x, (LANES, x.shape[0] // LANES))
    else:
        return tl.reshape(x, (x.shape[0] // LANES, LANES))


@triton.jit
def in_lanes(x, ALIGNED: tl.constexpr):
    """The float64 sum of a block's elements, left in lanes; of a test, how many pass."""
    x = x.to(tl.int32 if x.dtype == tl.int1 else tl.float64)
    return tl.sum(by_lanes(x, ALIGNED), 1 if ALIGNED else 0)


@triton.jit
def largest_in_lanes(x, ALIGNED: tl.constexpr):
    return tl.max(by_lanes(x, ALIGNED), 1 if ALIGNED else 0)


@triton.jit
def none(dtype: tl.constexpr):
    """Lanes of nothing."""
    return tl.zeros((LANES,), dtype)


@triton.jit
def leave(parts, FIELD: tl.constexpr, value):
    """A field of this program's column."""
    tl.store(parts + (FIELD * tl.num_programs(0).to(tl.int64) + tl.program_id(0)), value.to(tl.float64))


@triton.jit
def valid_tokens(mask, stride, start, first, inside, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    x = launch.load(mask, stride, start, first, inside, INNER, ALIGNED)
    if INNER == 0:
        x = tl.where(inside, x, 0)
    return (x != 0) & inside


@launch.kernel
def count_mask_kernel(
    mask, mask_stride: tl.int64, T: tl.int64, cu_seqlens, chunks: tl.int32, parts,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The valid tokens of each chunk, for what a gradient must know beforehand."""
    _row, start, T, first, end = chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    tokens = tl.zeros((BLOCK,), tl.int32)
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        tokens += valid_tokens(mask, mask_stride, start, first, inside, INNER[0], ALIGNED).to(tl.int32)
        first += BLOCK
    leave(parts, 0, tl.sum(tokens, 0))


_PLAN = Plan(loads=("mask",), stores=(), row_stores=("parts",), registers=(48, 64))
VARIANTS += [v for v in variants(count_mask_kernel, TOKENS, _PLAN, {}, mask="i64", parts="fp64") if v.dtype == "fp32"]


# ---- twin of AggWeights in csrc/math/loss.h: loss = scale * sum over rows of row_weight * (the row's sum) ---------------
@triton.jit
def denominator(number, local, counts, i: tl.constexpr, FROM: tl.constexpr):
    if FROM[i] == IN_TENSOR:
        return tl.load(counts + i)
    elif FROM[i] == LOCAL:
        return local
    else:
        return math.constant(number, tl.float64)


@triton.jit
def agg_scale(counts, dp_size, tokens, sequences, norm, local_tokens, local_sequences, MODE: tl.constexpr, FROM: tl.constexpr):
    """`local_*` are this call's own counts, used where the caller gave none."""
    scale = denominator(dp_size, dp_size, counts, 0, FROM)
    if MODE == "token-mean":
        scale = scale / denominator(tokens, local_tokens, counts, 1, FROM)
    elif MODE != "token-sum":
        scale = scale / denominator(sequences, local_sequences, counts, 2, FROM)
        if MODE == "seq-mean-token-sum-norm":
            scale = scale / denominator(norm, norm, counts, 3, FROM)
    return scale


@triton.jit
def row_weight(tokens, MODE: tl.constexpr):
    if MODE == "seq-mean-token-mean":
        return tl.where(tokens > 0, 1.0 / tl.where(tokens > 0, tokens, 1.0), 1.0)
    else:
        return tl.full((), 1, tl.float64)


@triton.jit
def grad_weight(row, chunks, row_counts, local, counts, dp_size, tokens, sequences, norm, MODE: tl.constexpr, FROM: tl.constexpr):
    """What the gradients of a row are multiplied by; `local` and `row_counts` are there where `counts_first` says so."""
    n, b, of_row = 0, 0, 0
    if MODE == "token-mean" and FROM[1] == LOCAL:
        n = tl.load(local)
    elif MODE != "token-mean" and MODE != "token-sum" and FROM[2] == LOCAL:
        b = tl.load(local + 1)
    if MODE == "seq-mean-token-mean":
        chunk = tl.arange(0, CHUNKS)
        of_row = tl.sum(tl.load(row_counts + row * chunks + chunk, mask=chunk < chunks, other=0), 0)
    return agg_scale(counts, dp_size, tokens, sequences, norm, n, b, MODE, FROM) * row_weight(of_row, MODE)


# ---- the merge ------------------------------------------------------------------------------------------------------
@triton.jit
def start_merge(parts, first, rows, chunks, MODE: tl.constexpr, LAYOUT: tl.constexpr, STAGED: tl.constexpr):
    """What `merged` takes. STAGED: `parts` is what merging programs left, `rows` of them."""
    if STAGED:
        return merge_columns(parts, rows, LAYOUT)
    else:  # the rows at `first`: a tile of columns, which of them are there, each row's tokens and weight
        row, chunk = first + tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNKS)[None, :]
        columns, there = parts + row * chunks + chunk, (row < rows) & (chunk < chunks)
        tokens = tl.sum(tl.load(columns, mask=there, other=0), 1)
        return columns, there, rows * chunks, tokens, row_weight(tokens, MODE)


@triton.jit
def merged(begun, FIELD: tl.constexpr, LAYOUT: tl.constexpr, STAGED: tl.constexpr):
    """A field of all that was begun."""
    if STAGED:
        return tl.sum(tl.where(tl.arange(0, FIELDS) == FIELD, begun, 0.0), 0)
    else:
        columns, there, total, tokens, weight = begun
        if FIELD == 0:
            return tl.sum(tokens, 0)
        elif FIELD == 1:
            return tl.sum((tokens > 0).to(tl.float64), 0)
        elif LAYOUT[3] <= FIELD:
            return tl.max(tl.max(tl.load(columns + FIELD * total, mask=there, other=float("-inf")), 1), 0)
        else:
            of_row = tl.sum(tl.load(columns + FIELD * total, mask=there, other=0), 1)
            if LAYOUT[1] <= FIELD and LAYOUT[2] > FIELD:
                of_row = of_row * weight
            return tl.sum(of_row, 0)


@triton.jit
def merge_columns(between, columns, LAYOUT: tl.constexpr):
    """What merging programs left, merged: a vector of FIELDS."""
    field, lane = tl.arange(0, FIELDS)[:, None], tl.arange(0, COLUMNS)[None, :]
    maximum = field >= LAYOUT[3]
    found = tl.where(maximum, float("-inf"), tl.zeros((FIELDS, COLUMNS), tl.float64))
    first = columns - columns
    while first < columns:
        column = first + lane
        there = (field < LAYOUT[0]) & (column < columns)
        x = tl.load(between + field * columns + column, mask=there, other=0)
        found = tl.where(there, tl.where(maximum, tl.where(x > found, x, found), found + x), found)
        first += COLUMNS
    return tl.where(tl.arange(0, FIELDS) >= LAYOUT[3], tl.max(found, 1), tl.sum(found, 1))


@launch.kernel
def merge_rows_kernel(parts, between, rows: tl.int64, chunks: tl.int64, MODE: tl.constexpr, LAYOUT: tl.constexpr):
    """A column of ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    begun = start_merge(parts, program * ROWS, rows, chunks, MODE, LAYOUT, False)
    for field in tl.static_range(tl.constexpr(LAYOUT[0])):
        tl.store(between + field * tl.num_programs(0) + program, merged(begun, field, LAYOUT, False))


@launch.kernel
def local_counts_kernel(parts, rows: tl.int64, chunks: tl.int64, local, MODE: tl.constexpr, LAYOUT: tl.constexpr, STAGED: tl.constexpr):
    """(valid tokens, rows with any)."""
    begun = start_merge(parts, 0, rows, chunks, MODE, LAYOUT, STAGED)
    tl.store(local, merged(begun, 0, LAYOUT, STAGED))
    tl.store(local + 1, merged(begun, 1, LAYOUT, STAGED))


# ---- launches -------------------------------------------------------------------------------------------------------
class Aggregation(NamedTuple):
    """The arguments of `agg_scale`: constexprs and the rest."""

    choice: dict[str, Any]
    rest: tuple[Any, ...]  # the tensor of counts, and the numbers

    def counts_first(self) -> bool:
        """Must the mask be counted before a gradient can be written?"""
        return self.local() or self.choice["MODE"] == "seq-mean-token-mean"

    def local(self) -> bool:
        """Is this call's own count a denominator?"""
        mode, source = self.choice["MODE"], self.choice["FROM"]
        return bool(mode != "token-sum" and source[1 if mode == "token-mean" else 2] == LOCAL.value)


def aggregation(mode: str, numbers: Sequence[float], counts: Tensor | None) -> Aggregation:
    """`numbers`: NaN is the local count, -infinity is in the tensor `counts`."""
    source = tuple(LOCAL.value if x != x else IN_TENSOR.value if x == float("-inf") and counts is not None else 0 for x in numbers)
    return Aggregation({"MODE": mode, "FROM": source}, (counts, *(0.0 if s else x for x, s in zip(numbers, source, strict=True))))


class Chunked(NamedTuple):
    """Tensors as rows, and the chunks of a row."""

    rows: Rows
    chunks: int
    cu_seqlens: Tensor | None


def chunked(tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, per_row: dict[int, Tensor]) -> Chunked:
    """`per_row`: tensors of one value a row, in the place of an absent tensor. A chunk has about 8 blocks, fewer where there
    are few rows: some 4096 programs keep a GPU's multiprocessors busy. Of packed rows only the longest possible is known."""
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    strides, inner = list(layout.strides), list(layout.inner)
    for i, x in per_row.items():
        strides[i], inner[i] = x.stride(0), 0
    layout = layout._replace(strides=tuple(strides), inner=tuple(inner))
    total = tensors[0].shape[-1]  # type: ignore[union-attr]
    blocks = triton.cdiv(total, SWEEP.size)
    least = 1 if cu_seqlens is not None else triton.cdiv(blocks, 8)
    return Chunked(layout, max(1, min(blocks, CHUNKS.value, max(least, 4096 // max(layout.B, 1)))), cu_seqlens)


def over_chunks(
    kernel: Any, block: Block, at: Chunked, tensors: Sequence[Tensor | None], fields: int, *rest: Any, **constexprs: Any
) -> Tensor:
    """A program per chunk: kernel(*tensors, *strides, T, cu_seqlens, chunks, parts, *rest). The table it leaves."""
    programs = at.rows.B * at.chunks
    parts = torch.empty((fields, programs), dtype=torch.float64, device=tensors[0].device)  # type: ignore[union-attr]
    launch.over(programs, block, kernel, at.rows, tensors, at.cu_seqlens, at.chunks, parts, *rest, **constexprs)
    return parts


def finish(kernel: Any, at: Chunked, parts: Tensor, layout: Layout, *rest: Any, MODE: str, **constexprs: Any) -> None:
    """Merge a table: kernel(parts, rows, chunks, *rest), in one program."""
    rows, chunks = at.rows.B, at.chunks
    staged = rows > ROWS.value
    options = {"MODE": MODE, "LAYOUT": layout, "num_warps": MERGE.num_warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(parts):
        if staged:
            programs = triton.cdiv(rows, ROWS.value)
            between = torch.empty((layout[0], programs), dtype=torch.float64, device=parts.device)
            merge_rows_kernel[(programs,)](parts, between, rows, chunks, **options)
            parts, rows, chunks = between, programs, 1
        kernel[(1,)](parts, rows, chunks, *rest, STAGED=staged, **constexprs, **options)


def count_first(at: Chunked, agg: Aggregation, i: int, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """From the mask alone, tensor i of `at`: the valid tokens of each chunk; (valid tokens, rows with any) where they divide."""
    rows, local = at.rows, None
    of_mask = rows._replace(strides=rows.strides[i : i + 1], inner=rows.inner[i : i + 1])
    parts = over_chunks(count_mask_kernel, TOKENS, at._replace(rows=of_mask), (mask,), 1)
    if agg.local():
        local = torch.empty(2, dtype=torch.float64, device=mask.device)
        finish(local_counts_kernel, at, parts, COUNTED, local, MODE="token-sum")
    return parts, local


# ---- plans of the merges ----------------------------------------------------------------------------------------------
def merge_variants(kernel: Any, layout: Layout, plan: Plan, *constexprs: dict[str, Any], **others: str) -> list[Variant]:
    """A merging kernel: of the table itself, where a thread has 4 elements of a field's tile, and of what merging programs
    left, where it has one of each field and the compiler unrolls the loop."""
    plan = plan._replace(row_loads=("parts",) * layout[0] * 8)
    choices = [{"LAYOUT": layout, "STAGED": staged, **x} for x in constexprs for staged in (False, True)]
    found = variants(kernel, MERGE, plan, *choices, parts="fp64", **others)
    return [v for v in found if v.dtype == "fp32"]


_PLAN = Plan((), (), (128, 128), ("parts",) * 4 * 10, ("between",) * 11)
_CHOICE = {"MODE": "seq-mean-token-mean", "LAYOUT": (11, 5, 8, 9)}
VARIANTS += [v for v in variants(merge_rows_kernel, MERGE, _PLAN, _CHOICE, parts="fp64", between="fp64") if v.dtype == "fp32"]
_PLAN = Plan((), (), (64, 64), (), ("local", "local"))
VARIANTS += merge_variants(local_counts_kernel, COUNTED, _PLAN, {"MODE": "token-sum"}, local="fp64")
