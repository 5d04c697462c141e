# SPDX-License-Identifier: Apache-2.0
"""KL estimators in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_value(log_prob: Tensor, ref_log_prob: Tensor, kl: str, kl_range: list[float]) -> Tensor:
    """d = ref - log_prob, clamped; k1: -d, abs: |d|, k2: d^2 / 2, k3: exp(d) - 1 - d; the value clamped."""
    ratio_low, ratio_high, value_low, value_high = kl_range
    d = (ref_log_prob - log_prob).clamp(ratio_low, ratio_high)
    name = kl.removesuffix("+")
    if name == "k3":
        value = tail_of_exp(d)
    else:
        value = {"k1": -d, "abs": d.abs(), "k2": 0.5 * d * d}[name]
    return value.clamp(value_low, value_high)


def tail_of_exp(d: Tensor) -> Tensor:
    """exp(d) - 1 - d; near 0 by its series, where the difference would cancel."""
    near = d.abs() < 0.02
    s = torch.where(near, d, torch.zeros((), dtype=d.dtype, device=d.device))
    series = s * s * (0.5 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720 + s * (1 / 5040 + s / 40320))))))
    return torch.where(near, series, torch.expm1(d) - d)
