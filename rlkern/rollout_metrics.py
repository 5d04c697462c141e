# SPDX-License-Identifier: Apache-2.0
"""What rollout correction reports: a column of sums a row on the device, verl's numbers on the host by one transfer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlkern.reference.correction import FIELDS, SAFETY


class RolloutMetrics(NamedTuple):
    """Sums, counts and maxima of each row, (fields, rows) float64 (float32 where a device has none), detached; and the
    settings that `as_dict` needs. `fields` are named in rlkern.reference.correction.

    `level`: "token", "sequence", "" for no weights. `options`: rejection's, with two limits each. `norm`: the divisor of a
    batch normalisation, 0-dim. `single`: float32 arithmetic. `probabilities`: the table compares them.
    """

    table: Tensor
    level: str = ""
    icepop: bool = False
    is_range: tuple[float, ...] = (0.0, math.inf)
    options: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()
    norm: Tensor | None = None
    single: bool = True
    probabilities: bool = False

    def field(self, name: str) -> Tensor:
        """A field of every row, (rows,), still on the device: `metrics.field("tokens")`."""
        if name not in FIELDS:
            raise ValueError(
                f"rlkern.RolloutMetrics.field: name must be one of {', '.join(FIELDS)}; got {name!r}. as_dict() has the means."
            )
        return self.table[FIELDS.index(name)]

    def merge(self, other: RolloutMetrics) -> RolloutMetrics:
        """Of two micro-batches together: their rows side by side. What was normalised apart stays apart: no factor is left."""
        if self[1:6] != other[1:6]:
            raise ValueError("rlkern.RolloutMetrics.merge: other must have the same settings; got others. Merge like with like.")
        return self._replace(table=torch.cat((self.table, other.table), 1), norm=None, single=self.single and other.single)

    def as_dict(self, prefix: str = "rollout_corr/") -> dict[str, float]:
        """Python floats under verl's names, by one transfer: the weights', rejection's, then the off-policy ones.

        Raises ValueError where no token is valid, as verl does.
        """
        flat = self.table if self.norm is None else torch.cat((self.table.reshape(-1), self.norm.to(self.table).reshape(1)))
        numbers = flat.cpu().double().numpy().reshape(-1)
        rows = self.table.shape[1]
        r = _Rows(dict(zip(FIELDS, numbers[: len(FIELDS) * rows].reshape(len(FIELDS), rows), strict=True)), self.single)
        if not r.count > 0:
            raise ValueError(
                "rlkern.RolloutMetrics.as_dict: the mask must select at least one value; got a mask whose sum is 0. Skip the batch."
            )
        with np.errstate(all="ignore"):
            found = _weights(r, self) if self.level else {}
            if self.norm is not None:
                found["rollout_is_batch_norm_factor"] = numbers[-1]
            if self.options:
                for i, option in enumerate(self.options):
                    found |= _rejected(r, option, *self.limits[2 * i : 2 * i + 2])
                found["rollout_rs_masked_fraction"] = 1 - r["kept"].sum() / r.count
                found["rollout_rs_seq_masked_fraction"] = _share(r["kept"] < r["tokens"])
            found |= _off_policy(r)
            found = {prefix + name: value for name, value in found.items()}
            if self.probabilities:
                found |= _probabilities(r)
        return {name: float(value) for name, value in found.items()}


class _Rows:
    """The table on the host, and the numbers that all metrics share."""

    def __init__(self, fields: dict[str, Any], single: bool) -> None:
        self.fields, self.single = fields, single
        self.n = fields["tokens"]
        self.count = float(self.n.sum())
        self.valid = self.n > 0
        self.at_least_one = np.maximum(self.n, 1)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def rounded(self, x: Any) -> Any:
        """As the kernels compare it with a threshold: in the dtype of the arithmetic."""
        return np.float32(x).astype(np.float64) if self.single else x

    def mean(self, name: str) -> Any:
        """Of all tokens."""
        return _sum(self[name]) / self.count

    def row_mean(self, name: str) -> Any:
        """Of each row; 0 where it has no token."""
        return self[name] / self.at_least_one

    def ratio(self) -> Any:
        """q of each row: the sum of its log-ratios."""
        return self["old"] - self["rollout"]


# numpy's methods mean, std and max take three times as long as these, and every step of a trainer calls them.
_most, _least, _sum = np.maximum.reduce, np.minimum.reduce, np.add.reduce


def _mean(x: Any) -> Any:
    return _sum(x) / x.size


def _share(test: Any) -> float:
    return float(np.count_nonzero(test) / test.size)


def _std(x: Any) -> Any:
    """Bessel's, by two passes; 0 for one number."""
    if x.size < 2:
        return 0.0
    d = x - _mean(x)
    return np.sqrt(_sum(d * d) / (x.size - 1))


def _off_policy(r: _Rows) -> dict[str, Any]:
    a, b, q = r.row_mean("old"), r.row_mean("rollout"), r.ratio()
    gap = b - a
    return {
        "training_ppl": _mean(np.exp(-a)),
        "training_log_ppl": _mean(-a),
        "kl": -q.sum() / r.count + 0.0,  # no -0
        "k3_kl": r.mean("k3_kl"),
        "rollout_ppl": _mean(np.exp(-b)),
        "rollout_log_ppl": _mean(-b),
        "log_ppl_diff": _mean(gap),
        "log_ppl_abs_diff": _mean(np.abs(gap)),
        "log_ppl_diff_max": _most(gap),
        "log_ppl_diff_min": _least(gap),
        "ppl_ratio": _mean(np.exp(gap)),
        "chi2_token": (2 * r["d"] + r["dd"]).sum() / r.count,  # of e^2 - 1, with d = e - 1
        "chi2_seq": _mean(np.expm1(2 * np.minimum(np.maximum(q, -SAFETY), SAFETY))),
    }


def _probabilities(r: _Rows) -> dict[str, Any]:
    p, q, gap, N = r.mean("p"), r.mean("r"), r.mean("gap"), r.count
    var = (r.mean("gap2") - gap**2) * (N / (N - 1)) if N > 1 else math.nan
    both = (r.mean("pp") - p**2) * (r.mean("rr") - q**2)
    most = r["gap_max"][r.valid].max()
    return {
        "training/rollout_probs_diff_valid": 1,
        "training/rollout_probs_diff_max": gap if math.isnan(gap) else most,
        "training/rollout_probs_diff_mean": gap,
        "training/rollout_probs_diff_std": np.sqrt(np.maximum(var, 0)),
        "training/rollout_actor_probs_pearson_corr": np.clip((r.mean("pr") - p * q) / np.sqrt(both), -1, 1),
    }


def _weights(r: _Rows, m: RolloutMetrics) -> dict[str, Any]:
    low, high = (r.rounded(x) for x in m.is_range)
    n, N = r.n, r.count
    if m.level == "token":
        raw, z = 1 + r.row_mean("d"), 1 + r.row_mean("w")
        raw, z = np.where(r.valid, raw, 0), np.where(r.valid, z, 0)
        shift, square = r.mean("w"), r.mean("ww")
        first = r["w"].sum()
        lost = math.isnan(first)
        found = {
            "rollout_is_mean": 1 + shift,
            "rollout_is_ratio_fraction_high": r.mean("w_high"),
            "rollout_is_ratio_fraction_low": r.mean("w_low"),
            "rollout_is_max": math.nan if lost else r["w_max"][r.valid].max(),
            "rollout_is_min": math.nan if lost else r["w_min"][r.valid].min(),
        }
        mean, plain = 1 + shift, r.mean("w_square")
        var = square - shift**2 if mean > 0.5 else plain - mean**2  # by what cancels less
        square = plain
        outside = r.mean("w_high") + r.mean("w_low")
    else:
        raw = np.where(r.valid, r["ratio"], 0)
        kept = (raw >= low) & (raw <= high)
        z = np.where(kept, raw, 0) if m.icepop else np.minimum(raw, high)
        q = r.rounded(r.ratio())
        mean = (n * z).sum() / N
        var, square = (n * (z - mean) ** 2).sum() / N, (n * z**2).sum() / N
        found = {
            "rollout_is_max": np.exp(np.minimum(_most(q), SAFETY)),
            "rollout_is_min": np.exp(_least(q)),
            "rollout_is_mean": mean,
            "rollout_is_ratio_fraction_high": _share(q > r.rounded(np.log(high))),
            "rollout_is_ratio_fraction_low": _share(q < r.rounded(np.log(low))),
        }
        outside = (n * ((raw < low) | (raw > high))).sum() / N
    found["rollout_is_std"] = np.sqrt(np.maximum(var, 0)) if N > 1 else 0.0
    found["rollout_is_eff_sample_size"] = (mean + 1e-8) ** 2 / square if square != 0 else 0.0  # no weight left: no sample
    far_row, near_row = r.rounded(raw), r.rounded(z)
    found |= {
        "rollout_is_seq_mean": _mean(z),
        "rollout_is_seq_std": _std(z),
        "rollout_is_seq_max": _most(near_row),
        "rollout_is_seq_min": _least(near_row),
        "rollout_is_seq_max_deviation": _most(np.abs(z - 1)),
        "rollout_is_seq_fraction_high": _share(far_row > high),
        "rollout_is_seq_fraction_low": _share(far_row < low),
    }
    return found | ({"rollout_is_oob_ratio": outside} if m.icepop else {})


def _rejected(r: _Rows, option: str, low: float, high: float) -> dict[str, Any]:
    kind, k = option[:-3], option[-2:]
    name, n, N = f"rollout_rs_{option}", r.n, r.count
    low, high = r.rounded(low), r.rounded(high)
    sums, most, least = r[f"{k}_sum"], r[f"{k}_max"], r[f"{k}_min"]
    most, least = (np.where(np.isnan(sums), sums, x) for x in (most, least))
    s = r.rounded(np.where(r.valid, most, 0) if kind == "seq_max" else sums if kind == "seq_sum" else sums / r.at_least_one)
    of_rows = s[r.valid]
    over, under = _share(of_rows > high), _share(of_rows < low) if k == "k1" else 0.0
    if kind == "token":
        mean, top, bottom = sums.sum() / N, most[r.valid].max(), least[r.valid].min()
        beyond = r.mean(f"{k}_high"), r.mean(f"{k}_low") if k == "k1" else 0.0
        c = r.mean(f"{k}_c")
        var = r.mean(f"{k}_cc") - c**2
        dropped, cut = 1 - r[f"{k}_kept"].sum() / N, _share((r[f"{k}_kept"] < n)[r.valid])
    else:
        kept = (s >= low) & (s <= high)
        mean, top, bottom, beyond = (n * s).sum() / N, _most(of_rows), _least(of_rows), (over, under)
        clipped = np.minimum(np.maximum(s, low), high)
        c = (n * clipped).sum() / N
        var = (n * (clipped - c) ** 2).sum() / N
        dropped, cut = (n * ~kept).sum() / N, _share(~kept[r.valid])
    found = {
        "mean": mean,
        "max": top,
        "min": bottom,
        "fraction_high": beyond[0],
        "fraction_low": beyond[1],
        "std": np.sqrt(np.maximum(var, 0)) if N > 1 else 0.0,
        "seq_mean": _mean(of_rows),
        "seq_std": _std(of_rows),
        "seq_max": _most(of_rows),
        "seq_min": _least(of_rows),
        "seq_max_deviation": _most(np.abs(of_rows)),
        "seq_fraction_high": over,
        **({"seq_fraction_low": under} if k == "k1" else {}),
        "masked_fraction": dropped,
        "seq_masked_fraction": cut,
    }
    return {f"{name}_{what}": value for what, value in found.items()}


class RolloutCorrection(NamedTuple):
    """Weights (None without rollout_is), the mask less what was rejected, and the metrics."""

    weights: Tensor | None
    response_mask: Tensor
    metrics: RolloutMetrics


class ImportanceWeights(NamedTuple):
    """Weights, the filtered share (of valid tokens, or of rows), and the mean of rollout - old over valid tokens: 0-dim."""

    weights: Tensor
    filtered: Tensor
    kl: Tensor
