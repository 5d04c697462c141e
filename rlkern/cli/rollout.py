# SPDX-License-Identifier: Apache-2.0
"""Rollout correction as the frameworks compute it: truncated token weights, the rejection of k1, and the numbers that depend on
arithmetic, each by passes of its own over the batch. And the check of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.cli.fields import Data, top, valid, wanted
from rlkern.cli.framework import masked_mean

CONFIG: dict[str, Any] = {"rollout_is": "token", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"}
COMPARED = (
    "kl", "k3_kl", "training_ppl", "rollout_ppl", "log_ppl_abs_diff", "chi2_token", "rollout_is_mean", "rollout_is_std",
    "rollout_is_eff_sample_size", "rollout_is_seq_std", "rollout_rs_token_k1_mean", "rollout_rs_token_k1_std",
)  # fmt: skip
PREFIX = "rollout_corr/"


def rollout_correction(old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(weights, modified mask, metrics) of CONFIG."""
    q = old - rollout
    safe = q.clamp(-20, 20)
    weights = (safe.exp() * mask).clamp(max=2.0)
    mean = masked_mean(weights, mask)
    k1, bound = -safe, math.log(2)
    keep = (k1 >= -bound) & (k1 <= bound)
    clamped = k1.clamp(-bound, bound)
    rows = [masked_mean(x, mask, -1) for x in (old, rollout, weights)]
    found = {
        "kl": masked_mean(-q, mask),
        "k3_kl": masked_mean(q.exp() - q - 1, mask),
        "training_ppl": (-rows[0]).exp().mean(),
        "rollout_ppl": (-rows[1]).exp().mean(),
        "log_ppl_abs_diff": (rows[1] - rows[0]).abs().mean(),
        "chi2_token": masked_mean(safe.exp().square(), mask) - 1,
        "rollout_is_mean": mean,
        "rollout_is_std": (masked_mean(weights.square(), mask) - mean.square()).clamp(min=0).sqrt(),
        "rollout_is_eff_sample_size": 1 / masked_mean((weights / (mean + 1e-8)).square(), mask),
        "rollout_is_seq_std": rows[2].std() if len(rows[2]) > 1 else mean * 0,
        "rollout_rs_token_k1_mean": masked_mean(k1, mask),
        "rollout_rs_token_k1_std": (masked_mean(clamped.square(), mask) - masked_mean(clamped, mask).square()).clamp(min=0).sqrt(),
    }
    return weights, (mask * keep).to(mask.dtype), {PREFIX + name: x.item() for name, x in found.items()}


def outputs(weights: Tensor, metrics: dict[str, float]) -> tuple[Tensor, Tensor]:
    """What is compared: no share of tokens, since rounding decides the side of a threshold."""
    return weights, torch.tensor([metrics[PREFIX + name] for name in COMPARED], dtype=torch.float64)


# ---- the check of `rlkern verify` -----------------------------------------------------------------------------------
def ours(d: Data) -> dict[str, Tensor]:
    found = rlkern.rollout_correction(wanted(d.new), d.old, d.mask, **CONFIG)
    return _named(wanted(found.weights), found.metrics.as_dict(), d)


def theirs(f: dict[str, Any], d: Data) -> dict[str, Tensor]:
    weights, _, metrics = f["rollout_correction"](wanted(d.new), d.old, d.mask)
    return _named(weights, metrics, d)


def _named(weights: Tensor, metrics: dict[str, float], d: Data) -> dict[str, Tensor]:
    dtype = torch.promote_types(d.old.dtype, torch.float32)
    numbers = {name: torch.tensor(metrics[PREFIX + name], dtype=dtype) for name in COMPARED}
    return {"weights": valid(weights, d)} | numbers


def scale(d: Data) -> dict[str, Any]:
    """A rounded log-ratio moves its weight by that share of it; a perplexity feels the error of a row's mean log-prob."""
    new = wanted(d.new)
    q = valid(new - d.old, d)
    exact = rollout_correction(new, d.old, d.mask)[2]
    share, size = 1 + top(q), 1 + top(valid(new, d)) + top(valid(d.old, d))
    numbers = {name: (1 + abs(exact[PREFIX + name])) * (size if "ppl" in name else 2 * share) for name in COMPARED}
    return {"weights": (1 + q.abs()) * q.exp().clamp(max=2.0)} | numbers
