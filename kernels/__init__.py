# SPDX-License-Identifier: Apache-2.0
"""Triton kernels; installs as rlkern.kernels. Triton is imported on first use, and nothing compiles at import."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

# The raw ops of each family; the launcher of `_<op>` is `<op>` in the family's module.
FAMILIES: dict[str, tuple[str, ...]] = {
    "kl": ("_kl_penalty_fwd", "_kl_penalty_bwd", "_shape_rewards_fwd", "_shape_rewards_bwd"),
    "scan": ("_gae_fwd",),
    "scan_bwd": ("_gae_bwd", "_discounted_returns_bwd"),
    "discounted_returns": ("_discounted_returns_fwd",),
    "affine_scan": ("_affine_scan_fwd", "_affine_scan_bwd"),
    "moments": tuple(f"_masked_{kind}_{way}" for kind in ("sum", "mean", "var", "moments") for way in ("fwd", "bwd")),
    "whiten": ("_masked_whiten_fwd", "_masked_normalize_fwd", "_whiten_apply_fwd"),
    "whiten_bwd": ("_masked_whiten_bwd", "_masked_normalize_bwd", "_whiten_apply_bwd"),
    "group": ("_group_mean_std_fwd", "_group_mean_std_bwd", "_group_normalize_fwd", "_group_normalize_bwd"),
    "group_advantage": ("_group_advantage_fwd",),
    "token_baseline": ("_optimal_token_baseline_fwd",),
    "loss": ("_policy_loss_fwd", "_scale_fwd"),
    "policy": ("_policy_variant_fwd",),
    "policy_select": ("_policy_select_fwd",),
    "value_loss": ("_value_loss_fwd",),
    "correction": ("_rollout_correction_fwd",),
    "importance_weights": ("_importance_weights_fwd",),
}
_FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}


def has(op: str) -> bool:
    """Is there a Triton kernel for raw op `op`?"""
    return op in _FAMILY_OF


@functools.cache
def launcher(op: str) -> Callable[..., Any]:
    """What launches raw op `op`: its arguments, then its outputs (None where empty). It gives the op's count, or None."""
    found: Callable[..., Any] = getattr(importlib.import_module(f"rlkern.kernels.{_FAMILY_OF[op]}"), op.removeprefix("_"))
    return found
