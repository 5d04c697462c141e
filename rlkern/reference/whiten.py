# SPDX-License-Identifier: Apache-2.0
"""Masked moments and whitening in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern import check


def moments(values: Tensor, weights: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) over all elements, or along `dim`, in the wider float type; two passes. weights 0 = unread."""
    wide = torch.float64 if values.device.type != "mps" else torch.float32
    w = weights.to(wide)
    v = torch.where(w != 0, values.to(wide), torch.zeros((), dtype=wide, device=values.device))
    axes = tuple(range(v.dim())) if dim is None else (dim,)
    count = w.sum(axes, keepdim=True)
    mean = torch.where(count != 0, (w * v).sum(axes, keepdim=True) / count, torch.zeros_like(count))
    m2 = (w * torch.where(w != 0, v - mean, torch.zeros_like(v)).square()).sum(axes, keepdim=True)
    return tuple(x.squeeze() if dim is None else x.squeeze(dim) for x in (count, mean, m2))  # type: ignore[return-value]


def whiten(op: str, values: Tensor, valid: Tensor, flags: list[bool], eps: float) -> Tensor:
    """(v - mean) * rstd over all valid elements; flags (unbiased, floor, shift_mean, scale, mask_output)."""
    unbiased, floor, shift_mean, scale, mask_output = flags
    count, mean, m2 = moments(values, valid)
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        check.valid_tokens(op, float(count), unbiased)
    var = m2 / (count - 1 if unbiased else count)
    rstd = (var.clamp(min=eps) if floor else var + eps).rsqrt() if scale else torch.ones_like(var)
    out = (values.to(mean.dtype) - mean) * rstd + (0.0 if shift_mean else mean)
    return (torch.where(valid != 0, out, torch.zeros_like(out)) if mask_output else out).to(values.dtype)
