# SPDX-License-Identifier: Apache-2.0
"""Groups by position, and the checks of one reward a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import check
from rlkern.backends import VALUE_DTYPES
from rlkern.group import index_for
from rlkern.types import GroupIndex


def per_row(op: str, name: str, x: Any) -> Any:
    """(B,), floating point, out of autograd's sight."""
    check.no_transforms(op, x)
    if not isinstance(x, Tensor) or x.dtype not in VALUE_DTYPES:
        raise check.fail(op, name, "be a floating-point tensor", check.describe(x), "Convert it with torch.as_tensor.", TypeError)
    if x.dim() != 1:
        raise check.fail(op, name, "be (B,), one number a row", check.describe(x), "Sum the rewards of each row.")
    return x.detach()


def consecutive(rows: int, size: int, device: torch.device) -> GroupIndex:
    """Rows 0 to size - 1 are a group, the next `size` another: made on the device, nothing is read from it."""
    groups = rows // size
    every = torch.arange(rows, device=device)
    offsets = torch.arange(groups + 1, device=device) * size
    return GroupIndex(every // size, torch.full((groups,), size, dtype=torch.int64, device=device), every, offsets)


def all_in_one(like: Tensor) -> GroupIndex:
    """One group of all rows; none of no row."""
    return consecutive(like.shape[0], max(like.shape[0], 1), like.device)


def grouped(op: str, like: Tensor, index: Any, size: int | None, name: str, least: int = 1) -> GroupIndex:
    """The groups of the rows of `like`: by labels, or, by `size`, of neighbours."""
    if (index is None) == (size is None):
        raise check.fail(
            op, "index", f"be given, or else {name}", "both" if size is not None else "neither", "Labels, or groups of neighbours."
        )
    if size is None:
        return index_for(op, index, like.shape[0], like)
    if isinstance(size, bool) or not isinstance(size, int):
        raise check.fail(op, name, "be an int", check.describe(size), "It counts the rows of a prompt.", TypeError)
    if size < least or like.shape[0] % size:
        must = f"be at least {least} and divide the {like.shape[0]} rows"
        raise check.fail(op, name, must, size, "Give labels by index= where groups differ in size.")
    return consecutive(like.shape[0], size, like.device)
