# SPDX-License-Identifier: Apache-2.0
"""Group statistics in plain torch. `mean_std_loop` and `normalize_loop` are the specification, group by group."""

from __future__ import annotations

import torch
from torch import Tensor


# ---- the specification ----------------------------------------------------------------------------------------------
def mean_std_loop(scores: Tensor, ids: Tensor, unbiased: bool, eps: float, singleton: str, omit: bool = False) -> tuple[Tensor, Tensor]:
    """(mean, std) of each group; eps is the floor of the variance. `omit`: of the scores that are not NaN."""
    mean, std = [], []
    for g in range(int(ids.max()) + 1 if len(ids) else 0):
        x = scores[ids == g]
        x = x[~x.isnan()] if omit else x
        if len(x) <= 1:
            mean.append(0.0 if singleton == "raw" else float(x.sum() / len(x)))
            std.append(float("nan") if singleton == "nan" else 1.0)
        else:
            mean.append(float(x.mean()))
            std.append(float(x.var(correction=int(unbiased)).clamp(min=eps).sqrt()))
    return scores.new_tensor(mean), scores.new_tensor(std)


def normalize_loop(
    scores: Tensor, lengths: Tensor | None, ids: Tensor, baseline: str, scale: bool, unbiased: bool, eps: float, singleton: str,
    omit: bool = False,
) -> Tensor:  # fmt: skip
    """(s - baseline) / (std + eps), row by row; eps is added to the standard deviation."""
    out = torch.empty_like(scores)
    for b in range(len(scores)):
        group = (ids == ids[b]) & ~(scores.isnan() & omit)
        x, s = scores[group], scores[b]
        k = len(x)
        if omit and s.isnan():
            out[b] = s
            continue
        if k == 1:
            out[b] = {"raw": s / (1 + eps) if scale else s, "zero": s - s, "nan": s.new_tensor(float("nan"))}[singleton]
            continue
        center = x.mean() if baseline == "mean" else (x.sum() - s) / (k - 1)
        if baseline == "length_weighted" and lengths is not None:
            n = lengths[group].to(scores.dtype)
            center = (n * x).sum() / n.sum()
        out[b] = (s - center) / (x.std(correction=int(unbiased)) + eps) if scale else s - center
    return out


# ---- the torch backend ----------------------------------------------------------------------------------------------
def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.device.type != "mps" else torch.float32


def _per_group(x: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """Sum of x by group, in a fixed order: on a GPU index_add adds as the threads come, an accumulating index_put sorts."""
    zero = torch.zeros_like(like, dtype=x.dtype)
    return zero.index_add(0, ids, x) if x.device.type == "cpu" else zero.index_put((ids,), x, accumulate=True)


def _first(scores: Tensor, there: Tensor | None, ids: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Of each group the first score that counts."""
    if there is None:
        return scores[order[offsets[:-1]]]
    last = len(scores) - 1
    place = torch.where(there[order], torch.arange(len(scores), device=scores.device), last)
    found = torch.full_like(offsets[:-1], last).scatter_reduce(0, ids[order], place, "amin")
    return scores[order[found]].nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _moments(scores: Tensor, lengths: Tensor | None, ids: Tensor, order: Tensor, offsets: Tensor, omit: bool = False) -> tuple[Tensor, ...]:
    """Of each group: count, shift, mean and baseline as distances from shift, M2. Shift, the first score, keeps the digits
    that a large common offset would take, and lets equal scores deviate by exactly 0. `omit`: NaN is no score."""
    count = (offsets[1:] - offsets[:-1]).to(scores.dtype)
    there = ~scores.detach().isnan() if omit else None
    if there is not None:
        count = _per_group(there.to(scores.dtype), ids, count)
    first = _first(scores.detach(), there, ids, order, offsets)
    shift = torch.where(first.isfinite(), first, torch.zeros_like(first))
    distance = scores - shift[ids]
    distance = distance if there is None else torch.where(there, distance, torch.zeros_like(distance))
    mean = _per_group(distance, ids, count) / count
    baseline = mean
    if lengths is not None:
        weights = lengths.to(scores.dtype)
        weights = weights if there is None else torch.where(there, weights, torch.zeros_like(weights))
        baseline = _per_group(weights * distance, ids, count) / _per_group(weights, ids, count)
    deviation = distance - mean[ids]
    deviation = deviation if there is None else torch.where(there, deviation, torch.zeros_like(deviation))
    return count, shift, mean, baseline, _per_group(deviation.square(), ids, count)


def _std(m2: Tensor, count: Tensor, unbiased: bool, floor: float) -> Tensor:
    """sqrt(max(variance, floor)) where there are two rows or more, 1 elsewhere; no gradient at 0 or below the floor."""
    divisor = count - 1 if unbiased else count
    var = m2 / torch.where(count > 1, divisor, torch.ones_like(count))
    good = (var != 0) & ~(var < floor)
    root = torch.where(good, torch.where(good, var, torch.ones_like(var)).sqrt(), torch.full_like(var, floor**0.5))
    return torch.where(count > 1, root, torch.ones_like(root))


def mean_std(
    scores: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, unbiased: bool, eps: float, singleton: str, omit: bool = False
) -> tuple[Tensor, Tensor]:
    """The raw op `_group_mean_std_fwd`."""
    count, shift, mean, _, m2 = _moments(scores.to(_wide(scores)), None, ids, order, offsets, omit)
    mean, std = shift + mean, _std(m2, count, unbiased, eps)
    alone = count <= 1
    # of one row: the mean is the score itself, and so is its derivative
    if singleton == "raw":
        mean = torch.where(alone, torch.zeros_like(mean), mean)
    if singleton == "nan":
        std = torch.where(alone, torch.full_like(std, float("nan")), std)
    return mean.to(scores.dtype), std.to(scores.dtype)


def normalize(
    scores: Tensor,
    lengths: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: str,
    scale: bool,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool = False,
) -> Tensor:
    """The raw op `_group_normalize_fwd`."""
    wide = scores.to(_wide(scores))
    count, shift, _, center, m2 = _moments(wide, lengths, ids, order, offsets, omit)
    alone = count <= 1
    factor = (_std(m2, count, unbiased, 0.0) + eps).reciprocal() if scale else torch.ones_like(count)
    stretched = factor * count / torch.where(alone, torch.ones_like(count), count - 1)
    stretched = torch.where(alone, factor, stretched) if baseline == "leave_one_out" else factor
    # a select between constants and tensors with a gradient: a lone row's statistics reach nothing
    zero = torch.zeros_like(count)
    shift, center = torch.where(alone, zero, shift), torch.where(alone, zero, center)
    if singleton == "zero":
        stretched = torch.where(alone, zero, stretched)
    kept = torch.where(wide.isnan(), torch.zeros_like(wide), wide) if omit else wide
    found = ((kept - shift[ids]) - center[ids]) * stretched[ids]
    if singleton == "nan":
        found = torch.where(alone[ids], torch.full_like(found, float("nan")), found)
    return (torch.where(wide.isnan(), wide, found) if omit else found).to(scores.dtype)


# ---- adjoints -------------------------------------------------------------------------------------------------------
def _std_grad(count: Tensor, ids: Tensor, deviation: Tensor, m2: Tensor, unbiased: bool, floor: float) -> Tensor:
    """d std / d score, row by row: (s - mean) / (divisor std); 0 in groups of one, at zero spread and below the floor."""
    divisor = torch.where(count > 1, count - 1 if unbiased else count, torch.ones_like(count))
    var = m2 / divisor
    good = (count > 1) & (var != 0) & ~(var < floor)
    slope = torch.where(good, 1.0 / (divisor * torch.where(good, var, torch.ones_like(var)).sqrt()), torch.zeros_like(var))
    return torch.where(good[ids], deviation * slope[ids], torch.zeros_like(deviation))


def mean_std_bwd(
    grad_mean: Tensor,
    grad_std: Tensor,
    scores: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool = False,
) -> Tensor:
    """The raw op `_group_mean_std_bwd`."""
    wide = scores.to(_wide(scores))
    count, shift, mean, _, m2 = _moments(wide, None, ids, order, offsets, omit)
    slope = _std_grad(count, ids, (wide - shift[ids]) - mean[ids], m2, unbiased, eps)
    of_mean = torch.where((count <= 1) & (singleton == "raw"), torch.zeros_like(count), 1.0 / count)
    found = (grad_mean.to(wide.dtype) * of_mean)[ids] + grad_std.to(wide.dtype)[ids] * slope
    return (torch.where(wide.isnan(), torch.zeros_like(found), found) if omit else found).to(scores.dtype)


def normalize_bwd(
    grad: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: str,
    scale: bool,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool = False,
) -> Tensor:
    """The raw op `_group_normalize_bwd`: q stretch (c - w sum c) - q^2 (sum c d) d std, with q = 1 / (std + eps), the row's
    share w of the baseline and its distance d from it."""
    wide, c = scores.to(_wide(scores)), grad.to(_wide(scores))
    count, shift, mean, center, m2 = _moments(wide, lengths, ids, order, offsets, omit)
    weights = torch.ones_like(wide) if lengths is None else lengths.to(wide.dtype)
    there = None
    if omit:  # what is left out gets no gradient, and gives none
        there = ~wide.isnan()
        c, weights, wide = (torch.where(there, x, torch.zeros_like(x)) for x in (c, weights, wide))
    alone, one = count <= 1, torch.ones_like(count)
    q = (_std(m2, count, unbiased, 0.0) + eps).reciprocal() if scale else one
    stretch = count / torch.where(alone, one, count - 1) if baseline == "leave_one_out" else one
    share = weights / _per_group(weights, ids, count)[ids]
    found = (q * stretch)[ids] * (c - share * _per_group(c, ids, count)[ids])
    if scale:
        distance = ((wide - shift[ids]) - center[ids]) * stretch[ids]
        slope = _std_grad(count, ids, (wide - shift[ids]) - mean[ids], m2, unbiased, 0.0)
        found = found - (q * q * _per_group(c * distance, ids, count))[ids] * slope
    lone = c * q[ids] if singleton == "raw" else torch.zeros_like(c)
    found = torch.where(alone[ids], lone, found)
    return (found if there is None else torch.where(there, found, torch.zeros_like(found))).to(scores.dtype)
