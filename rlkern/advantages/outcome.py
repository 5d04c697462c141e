# SPDX-License-Identifier: Apache-2.0
"""What the estimators share: the checks of a batch, and outcome advantages, one number a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import CPP, VALUE_DTYPES, pick
from rlkern.group import index_for, wrong_rows
from rlkern.labels import readable
from rlkern.types import Advantages, GroupIndex

WHITEN_MASKED = [True, False, True, True, True]  # unbiased, eps floors the variance, shift the mean, scale, mask the output
WHITEN_EPS = 1e-8


def batch(op: str, token_level_rewards: Tensor, cu_seqlens: Tensor | None, **others: Tensor) -> Tensor | None:
    """Checks (B, T), or packed (N,), and returns the offsets of the packed rows."""
    check.batch(op, "token_level_rewards", token_level_rewards, cu_seqlens)
    check.present(op, "token_level_rewards", **others)
    check.tensors(op, token_level_rewards, token_level_rewards=token_level_rewards, **others)
    if cu_seqlens is not None:
        return check.lengths(op, cu_seqlens, token_level_rewards)
    if token_level_rewards.dim() != 2:
        raise check.fail(
            op, "token_level_rewards", "be (B, T)", check.describe(token_level_rewards), "One row a response; packed rows need cu_seqlens."
        )
    return None


def plain(x: Tensor) -> Any:
    """Rows of inner stride 1, out of autograd's sight."""
    return check.inner(x.detach() if x.requires_grad else x)


def components(
    op: str, like: Tensor, scores: Any, weights: Tensor | Sequence[float] | None, name: str = "component_scores",
    weights_name: str = "component_weights",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores (B, K) and their weights (K,), 1 by default."""
    check.no_transforms(op, scores)
    if not isinstance(scores, Tensor) or scores.dtype not in VALUE_DTYPES or scores.dim() != 2:
        raise check.fail(op, name, "be a floating-point (B, K)", check.describe(scores), "Stack them: torch.stack(x, 1).")
    if scores.device != like.device:
        raise check.fail(op, name, f"be on {like.device}", check.describe(scores), "Move it with .to(device).")
    K = scores.shape[1]
    if weights is None:
        weights = torch.ones(K, device=like.device)
    elif not isinstance(weights, Tensor):
        weights = torch.tensor([check.number(op, weights_name, w) for w in weights], dtype=torch.float64).to(like.device)
    if weights.shape != (K,) or weights.dtype not in VALUE_DTYPES or weights.device != like.device:
        must = f"be floating point of shape ({K},) on {like.device}"
        raise check.fail(op, weights_name, must, check.describe(weights), "One a component.")
    return plain(scores), plain(weights)


def outcome(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    baseline: str,
    scale: bool = False,
    eps: float = 0.0,
    whiten: list[bool] | None = None,
    singleton: str = "raw",
    components: tuple[Tensor | None, Tensor | None] = (None, None),
    f_norm: float = 0.0,
) -> Advantages:
    op = f"advantages.{name}"
    cu = batch(op, token_level_rewards, cu_seqlens, response_mask=response_mask)
    if out is not None:
        dtype = check.result_dtype(token_level_rewards, response_mask)
        out = check.out_tensors(op, out, token_level_rewards, [dtype], False)
    rewards, mask = plain(token_level_rewards), plain(response_mask)
    rows = token_level_rewards.shape[0] if cu is None else cu.shape[0] - 1
    if components[0] is not None and components[0].shape[0] != rows:
        raise check.fail(op, "component_scores", f"have {rows} rows", check.describe(components[0]), "One row of scores a row.")
    backend = pick("_group_advantage_fwd", rewards)
    rest = (cu, baseline, scale, eps, singleton, whiten, WHITEN_EPS, *components, f_norm)
    if backend == CPP and not isinstance(index, GroupIndex) and library.unheard((rewards, mask, cu, *components)):
        labels = readable(index)  # the kernel takes them as they are: no tensor is made of them
        if len(labels) != rows:
            raise wrong_rows(op, len(labels), rows)
        advantages = library.run(library.OPS["_group_advantage_fwd"], (rewards, mask, labels, None, None, *rest), backend, out)
    else:
        group = index_for(op, index, rows, rewards)
        parts = (group.ids, group.order, group.offsets)
        advantages = library.call("_group_advantage_fwd", rewards, mask, *parts, *rest, backend=backend, out=out)
    return Advantages(advantages, advantages)
