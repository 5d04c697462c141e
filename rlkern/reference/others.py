# SPDX-License-Identifier: Apache-2.0
"""Mean and deviation of the other rows of a group, for every row: those before it and those behind it, merged.

Sums less the row's own would cancel: others that are equal would deviate by rounding. Merged moments (Chan et al. 1979) add
squares alone. Plain torch on every backend, O(B log B), no host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern.types import GroupIndex

Moments = tuple[Tensor, Tensor, Tensor]  # count, mean, sum of squared deviations


def mean_std_loop(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: of a row alone its score and 0, of one other that and 0."""
    mean, std = scores.clone(), torch.zeros_like(scores)
    for b in range(len(scores)):
        others = scores[(ids == ids[b]) & (torch.arange(len(scores)) != b)]
        mean[b] = others.mean() if len(others) else scores[b]
        std[b] = others.std() if len(others) > 1 else 0.0
    return mean, std


def _merged(a: Moments, b: Moments) -> Moments:
    n = a[0] + b[0]
    d, share = b[1] - a[1], b[0] / n.clamp(min=1)
    empty, none = a[0] == 0, b[0] == 0
    mean = torch.where(none, a[1], torch.where(empty, b[1], a[1] + d * share))
    return n, mean, a[2] + b[2] + torch.where(empty | none, torch.zeros_like(d), d * d * a[0] * share)


def _shifted(x: Moments, k: int, there: Tensor) -> Moments:
    """Of the place k before; nothing where that is in another group."""
    count, mean, m2 = (torch.cat([torch.zeros_like(y[:k]), y[: y.shape[0] - k]]) for y in x)
    zero = torch.zeros_like(count)
    return torch.where(there, count, zero), torch.where(there, mean, zero), torch.where(there, m2, zero)


def _before(x: Tensor, place: Tensor) -> Moments:
    """Of the rows of the group before each, in log steps; `place`: the row's number in its group."""
    found, k = (torch.ones_like(x), x, torch.zeros_like(x)), 1
    while k < x.shape[0]:
        found = _merged(_shifted(found, k, place >= k), found)
        k *= 2
    return _shifted(found, 1, place >= 1)


def mean_std_of_others(scores: Tensor, index: GroupIndex) -> tuple[Tensor, Tensor]:
    """(mean, sample deviation) of the group's other rows."""
    if scores.shape[0] == 0:
        return scores, scores
    order, ids = index.order, index.ids[index.order]
    place = torch.arange(order.shape[0], device=order.device) - index.offsets[ids]
    behind = index.counts[ids] - 1 - place
    first = scores[order[index.offsets[:-1]]]
    shift = torch.where(first.isfinite(), first, torch.zeros_like(first))[ids]
    x = scores[order] - shift
    back: Moments = tuple(y.flip(0) for y in _before(x.flip(0), behind.flip(0)))  # type: ignore[assignment]
    n, mean, m2 = _merged(_before(x, place), back)
    std = torch.where(n > 1, m2 / (n - 1).clamp(min=1), torch.zeros_like(m2)).sqrt()
    mean = torch.where(n > 0, shift + mean, scores[order])
    return torch.zeros_like(scores).index_copy(0, order, mean), torch.zeros_like(scores).index_copy(0, order, std)
