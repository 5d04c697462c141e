# SPDX-License-Identifier: Apache-2.0
"""The scan as matrix products, after slime's chunked GAE: within a chunk y = x M with M[i, j] = c^(i-j), then the carries.

Like slime's it reads no mask in the recursion, so it answers for batches that are padded on the right only, where the
padding's rewards and values are zeroed first; inside the mask it then agrees with the skip rule.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rlkern.bench.inputs import GAMMA, LAM, Inputs

CHUNK = 128  # slime's default


@lru_cache(maxsize=16)
def _powers(decay: float, size: int) -> tuple[Tensor, Tensor]:
    """(size, size) matrix of c^(i-j) for i >= j, and the vector c^size ... c^1: what reaches each place from the right."""
    i = torch.arange(size, dtype=torch.float64)
    gap = i[:, None] - i[None, :]
    matrix = torch.where(gap >= 0, decay ** gap.clamp(min=0), 0.0)
    return matrix.float(), (decay ** (size - i)).float()


def scan(x: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay y_{t+1} for every row."""
    rows, tokens = x.shape
    size = min(CHUNK, tokens)
    padding = -tokens % size
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
    count = x.shape[1] // size
    matrix, reach = _powers(decay, size)
    local = (x.reshape(rows * count, size) @ matrix).reshape(rows, count, size)
    # the carries form a scan of their own, over chunks, with decay^size
    across, _ = _powers(decay**size, count)
    heads = local[:, :, 0] @ across
    carry = torch.nn.functional.pad(heads[:, 1:], (0, 1))
    return torch.addcmul(local, carry.unsqueeze(-1), reach).reshape(rows, -1)[:, :tokens]


def gae(x: Inputs) -> tuple[Tensor, ...]:
    rewards, values = x.rewards * x.mask, x.values * x.mask
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages = scan(rewards + GAMMA * following - values, GAMMA * LAM)
    return advantages, advantages + values


def discounted_returns(x: Inputs) -> tuple[Tensor, ...]:
    return (scan(x.rewards * x.mask, GAMMA),)
