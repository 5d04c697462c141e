# SPDX-License-Identifier: Apache-2.0
"""How a loss adds up: the modes, their denominators, the results of every fused loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.reference import loss as reference

Count = int | float | Tensor | None
AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum")
_LOCAL, _IN_TENSOR = math.nan, -math.inf  # what stands for a count that is not a Python number


# ---- outputs --------------------------------------------------------------------------------------------------------
def results(like: Tensor, dtype: torch.dtype, sums: int, maxes: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.wide_on(like.device)
    return like.new_empty((), dtype=dtype), like.new_empty(sums, dtype=wide), like.new_empty(maxes, dtype=wide)


def gradient(of: Tensor, need: bool, wide: bool) -> Tensor:
    dtype = reference.dtype_of_grad(of.dtype, wide)
    return library.fresh(of, dtype) if need else of.new_empty(0, dtype=dtype)


# ---- denominators ---------------------------------------------------------------------------------------------------
class Counts(NamedTuple):
    """The denominators: Python numbers, and one float64 tensor for those that the host must not read."""

    numbers: list[float]
    tensor: Tensor | None
    dtype: torch.dtype | None  # of a floating-point tensor count that divides the loss: verl's loss takes it on


def counts_of(op: str, like: Tensor, mode: str, packed: bool, *, scale: float = 1.0, **given: Count) -> Counts:
    """`scale` multiplies the loss: it goes with dp_size."""
    check.word(op, "loss_agg_mode", mode, AGG_MODES)
    numbers: list[float] = []
    dtype = None
    divides = "batch_num_tokens" if mode == "token-mean" else "global_batch_size" if mode != "token-sum" else ""
    for name, x in given.items():
        if isinstance(x, Tensor):
            if x.dim() or x.is_complex() or x.requires_grad or x.device != like.device:
                raise check.fail(
                    op, name, f"be a number or a 0-dim tensor on {like.device}", check.describe(x), "Pass x.detach() of shape ()."
                )
            numbers.append(_IN_TENSOR)
            dtype = x.dtype if name == divides and x.is_floating_point() else dtype
        else:
            numbers.append(_LOCAL if x is None else check.number(op, name, x, 0.0))
    if divides and given[divides] is None and numbers[0] != 1.0:
        raise check.fail(op, divides, f"be given with dp_size in mode {mode!r}", "None", "It is the count over all ranks.")
    if mode == "seq-mean-token-sum-norm" and given["loss_scale_factor"] is None:
        if packed:
            raise check.fail(op, "loss_scale_factor", f"be given with cu_seqlens in mode {mode!r}", "None", "Padded rows divide by T.")
        numbers[3] = float(like.shape[-1])
    if scale != 1.0:
        dp_size = given["dp_size"]
        if isinstance(dp_size, Tensor):
            given["dp_size"] = dp_size.to(reference.wide_on(like.device)) * scale
        else:
            numbers[0] *= scale
    tensor = None
    if _IN_TENSOR in numbers:
        wide = reference.wide_on(like.device)
        tensor = torch.stack([x.to(wide) if isinstance(x, Tensor) else like.new_zeros((), dtype=wide) for x in given.values()])
    return Counts(numbers, tensor, dtype)


def loss_dtype(mode: str, counts: Counts, *tensors: Tensor | None) -> torch.dtype:
    dtype = check.result_dtype(*tensors)
    if mode.startswith("seq"):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype if counts.dtype is None else torch.promote_types(dtype, counts.dtype)
