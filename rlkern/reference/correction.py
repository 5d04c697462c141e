# SPDX-License-Identifier: Apache-2.0
"""Rollout correction in plain torch: importance weights, rejection, and one column of sums a row, from which every metric follows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlkern.reference.kl import tail_of_exp, wide
from rlkern.reference.loss import row_ids, row_sums, select, spread, wide_on

# The lines of a table, a column a row. Sums run over the row's valid tokens; q = old - rollout, e = exp(clamp(q, +-20)).
# w: the token's weight; then for each of k1, k2, k3 what rejection asks of it; p, r: the probabilities, gap: |p - r|.
FIELDS = (
    "tokens", "old", "rollout", "k3_kl", "d", "dd", "kept", "ratio", "w", "ww", "w_high", "w_low", "w_max", "w_min", "w_square",
    *(f"k{i}_{name}" for i in (1, 2, 3) for name in ("sum", "max", "min", "c", "cc", "high", "low", "kept")),
    "p", "r", "pp", "rr", "pr", "gap", "gap2", "gap_max",
)  # fmt: skip
WEIGHT_FIELDS = ("tokens", "log_ratio", "statistic", "filtered")
SAFETY = 20.0  # verl's bound on a log-ratio before the exponential


def row_most(x: Tensor, valid: Tensor, ids: Tensor | None, rows: int) -> Tensor:
    """(rows,) maximum over valid tokens; -infinity where a row has none."""
    x = torch.where(valid, x, -math.inf)
    if ids is None:
        return x.amax(-1).reshape(-1)
    return torch.full((rows,), -math.inf, dtype=x.dtype, device=x.device).scatter_reduce(0, ids, x, "amax")


def weight_of(ratio: Tensor, low: float, high: float, icepop: bool) -> Tensor:
    """Truncated at high; IcePop: 0 outside [low, high], a NaN too."""
    if icepop:
        return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    return ratio.clamp(max=high)


def statistic(kind: str, sums: Tensor, most: Tensor, n: Tensor, dtype: torch.dtype) -> Tensor:
    """A row's statistic of an option "seq_sum_k1": its sum, mean or maximum, rounded to the arithmetic's dtype."""
    if kind == "seq_max":
        return torch.where(n > 0, most.to(sums.dtype), torch.zeros_like(sums)).to(dtype)
    return (sums / n.clamp(min=1) if kind == "seq_mean" else sums).to(dtype)


class Rows:
    """The valid tokens of each row, and what is asked of them: (rows,) in the wide dtype."""

    def __init__(self, old: Tensor, rollout: Tensor, mask: Tensor, cu: Tensor | None) -> None:
        self.ids, self.cu, self.valid = row_ids(old, cu), cu, mask != 0
        self.count = old.shape[0] if old.dim() == 2 else 1 if cu is None else cu.shape[0] - 1
        self.dtype, self.wide = wide(old, rollout), wide_on(mask.device)
        self.old, self.rollout = select(self.valid, old, self.dtype), select(self.valid, rollout, self.dtype)

    def total(self, x: Tensor) -> Tensor:
        return row_sums(select(self.valid, x, self.wide), self.ids, self.cu)

    def most(self, x: Tensor) -> Tensor:
        return row_most(x, self.valid, self.ids, self.count).to(self.wide)

    def spread(self, of_row: Tensor) -> Tensor:
        return spread(of_row, self.valid, self.ids)


def rollout_correction(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    level: str,
    icepop: bool,
    is_range: list[float],
    options: str,
    limits: list[float],
    probabilities: bool,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op `_rollout_correction_fwd`: (weights, modified mask, table), the first two empty where not asked for.

    `options`: rejection's, comma-separated; `limits`: two numbers each, log-ratios for k1. `is_range`: the thresholds.
    """
    b = Rows(old_log_prob, rollout_log_prob, mask, cu_seqlens)
    found = dict.fromkeys(FIELDS, torch.zeros(b.count, dtype=b.wide, device=mask.device))
    weights, modified = mask.new_empty(0, dtype=weights_dtype), mask.new_empty(0)
    if not mask.numel():
        weights = b.old.to(weights_dtype) if level else weights
        return weights, mask.clone() if options else modified, torch.stack([*found.values()])
    raw = b.old - b.rollout
    q = raw.clamp(-SAFETY, SAFETY)
    ratio = q.exp()
    excess = ratio.to(b.wide) - 1
    found |= {"tokens": b.total(b.valid), "old": b.total(b.old), "rollout": b.total(b.rollout), "k3_kl": b.total(tail_of_exp(raw))}
    found |= {"d": b.total(excess), "dd": b.total(excess.square())}
    if probabilities:
        _compare(b, found)
    if level:
        w = _weigh(b, found, level, ratio, is_range, icepop)
        weights = select(b.valid, w, weights_dtype)
    keep = _reject(b, found, q, options, limits)
    if options:
        modified = torch.where(keep, mask, torch.zeros_like(mask))
    return weights, modified, torch.stack([*found.values()])


def _compare(b: Rows, found: dict[str, Tensor]) -> None:
    p, r = b.old.exp(), b.rollout.exp()
    gap = (p - r).abs()
    found["gap_max"] = b.most(gap)
    p, r, gap = (x.to(b.wide) for x in (p, r, gap))
    terms = {"p": p, "r": r, "pp": p * p, "rr": r * r, "pr": p * r, "gap": gap, "gap2": gap * gap}
    found |= {name: b.total(x) for name, x in terms.items()}


def _weigh(b: Rows, found: dict[str, Tensor], level: str, ratio: Tensor, is_range: list[float], icepop: bool) -> Tensor:
    low, high = is_range
    if level == "sequence":
        of_row = (found["old"] - found["rollout"]).to(b.dtype).clamp(-SAFETY, SAFETY).exp()
        found["ratio"] = of_row.to(b.wide)
        return b.spread(weight_of(of_row, low, high, icepop))
    w = weight_of(ratio, low, high, icepop)
    shifted = w.to(b.wide) - 1
    found |= {"w": b.total(shifted), "ww": b.total(shifted.square()), "w_high": b.total(ratio > high), "w_low": b.total(ratio < low)}
    found |= {"w_max": b.most(w), "w_min": -b.most(-w), "w_square": b.total(w.to(b.wide).square())}
    return w


def _reject(b: Rows, found: dict[str, Tensor], q: Tensor, options: str, limits: list[float]) -> Tensor:
    """Which tokens every option keeps."""
    keep, terms = b.valid, {"1": 0.0 - q, "2": 0.5 * q * q, "3": tail_of_exp(q)}
    for i, option in enumerate(options.split(",") if options else ()):
        kind, k, (lo, hi) = option[:-3], option[-1], limits[2 * i : 2 * i + 2]
        v = terms[k]
        found |= {f"k{k}_sum": b.total(v), f"k{k}_max": b.most(v), f"k{k}_min": -b.most(-v)}
        if kind == "token":
            kept = (v >= lo) & (v <= hi)
            c = v.clamp(lo, hi).to(b.wide)
            tests = {"c": c, "cc": c.square(), "high": v > hi, "low": v < lo, "kept": kept}
            found |= {f"k{k}_{name}": b.total(x) for name, x in tests.items()}
        else:
            s = statistic(kind, found[f"k{k}_sum"], found[f"k{k}_max"], found["tokens"], b.dtype)
            kept = b.spread((s >= lo) & (s <= hi))
        keep = keep & kept
    found["kept"] = b.total(keep)
    return keep


# ---- gates ----------------------------------------------------------------------------------------------------------
def gate_terms(gating: str, old: Tensor, rollout: Tensor, log_ratio: Tensor) -> Tensor:
    """A token's term: the log-ratio, or a divergence of the two events "this token" and "another" (p: rollout's, p': old's)."""
    if gating == "ratio":
        return log_ratio
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    if gating == "tv":
        return (p - q).abs()
    p, q = p.double(), q.double()
    value = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return value.clamp(min=0).to(old.dtype)  # rounding makes no divergence negative: a band from 0 on would drop it


def importance_weights(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    gating: str,
    unit: str,
    per_row: bool,
    clip: bool,
    bounds: list[float],
    nan: str,
    padding: float,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The raw op `_importance_weights_fwd`: (weights, table). `unit`: "token", or what a row's statistic is: "mean", "sum"."""
    b = Rows(old_log_prob, rollout_log_prob, mask, cu_seqlens)
    old, rollout, q, (low, high) = b.old, b.rollout, b.old - b.rollout, bounds
    if nan == "one":
        lost = q.isnan()
        q, old, rollout = (torch.where(lost, torch.zeros_like(x), x) for x in (q, old, rollout))
    term = gate_terms(gating, old, rollout, q)
    n, log_ratio, row = b.total(b.valid), b.total(q), b.total(term)
    row = (row / n if unit == "mean" else row).to(b.dtype)  # NaN where a mean has no token
    stat, weight = (term, q) if unit == "token" else (row, row)
    stat = stat.exp() if gating == "ratio" else stat
    weight = weight.exp() if per_row else q.exp()
    if clip:
        filtered, weight = (stat < low) | (stat > high), weight.clamp(low, high)
    else:
        filtered = ~((stat >= low) & (stat <= high))
        dropped = filtered if per_row or unit == "token" else b.spread(filtered)
        weight = torch.where(dropped, torch.zeros_like(weight), weight)
    if nan == "drop":
        weight = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    if not per_row:
        weight = torch.where(b.valid, weight, padding)
    table = torch.stack([n, log_ratio, row.to(b.wide), b.total(filtered) if unit == "token" else filtered.to(b.wide)])
    return weight.to(weights_dtype), table
