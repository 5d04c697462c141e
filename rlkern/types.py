# SPDX-License-Identifier: Apache-2.0
"""The words and results of the public API."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Masked = Literal["skip", "reset", "zero", "turn"]
Kl = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "low_var_kl+", "k3+", "kl+", "k2+", "mse+"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"]
Baseline = Literal["mean", "leave_one_out", "length_weighted"]
Variant = Literal[
    "ppo", "decoupled", "gspo", "gspo_token", "luspo", "rloo", "sapo", "cispo", "gpg", "reinforce", "geo_mean", "clip_cov", "kl_cov",
    "dppo_tv", "dppo_kl", "dro", "topr", "vespo",
]  # fmt: skip
Level = Literal["token", "sequence", "sequence-sum"]
EpsMode = Literal["add", "floor"]
Singleton = Literal["raw", "zero", "nan"]
NanScores = Literal["propagate", "omit"]
Backend = Literal["auto", "torch", "cpp", "triton", "cuda"]
Number = int | float


class VariantOptions(TypedDict, total=False):
    """The numbers that one variant of the policy loss reads, under its framework's names."""

    delta: float
    behave_cap: float
    tau_pos: float
    tau_neg: float
    ratio_cap: float
    clip_cov_ratio: float
    clip_cov_lb: float
    clip_cov_ub: float
    noise: Tensor
    kl_cov_ratio: float
    ppo_kl_coef: float
    dro_beta: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


class Advantages(NamedTuple):
    """Advantages and returns, both (B, T) or packed (N,); (B,) of estimators that know rows alone (TRL, NeMo-RL)."""

    advantages: Tensor
    returns: Tensor


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of the valid values; 0-dim or (B,), float64 (float32 where a device has none)."""

    count: Tensor  # type: ignore[assignment]  # the name wins over tuple.count
    mean: Tensor
    m2: Tensor

    def stack(self) -> Tensor:
        """(..., 3), the form to all_gather; `merge_moments` takes it back."""
        return torch.stack(tuple(self), -1)


class GroupIndex(NamedTuple):
    """Labels as dense ids, made once by `group_index` and taken by every group op.

    ids (B,): the group of each row, numbered by first appearance. counts (G,): rows of each group. order (B,): row numbers
    sorted by group, stable. offsets (G + 1,): where each group starts in `order`. All int64, on one device.
    """

    ids: Tensor
    counts: Tensor
    order: Tensor
    offsets: Tensor

    def to(self, device: Any) -> GroupIndex:
        return GroupIndex(*(x.to(device) for x in self))


class GroupStats(NamedTuple):
    """Of each group: mean and standard deviation, in the dtype of the scores, and rows (int64); all (G,)."""

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # the name wins over tuple.count
