# SPDX-License-Identifier: Apache-2.0
"""KL estimators per token, and the KL reward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.reference import kl as reference
from rlkern.types import Kl

_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
KL_NAMES = tuple(_ESTIMATORS) + tuple(f"{name}+" for name in _ESTIMATORS)
Range = tuple[float, float] | None


def estimator(
    op: str, kl_penalty: str, log_ratio_range: Range | str = "verl", value_range: Range | str = "verl", weighted: bool = False
) -> tuple[str, list[float]]:
    """The estimator's own name (k1, abs, k2, k3, with "+" if straight-through) and its clamps as four numbers.

    The default clamps are verl's: k3 reads its log-ratio in [-20, 20] and gives values in [-10, 10]; the others have none.
    """
    check.word(op, "kl_penalty", kl_penalty, KL_NAMES)
    name = _ESTIMATORS[kl_penalty.removesuffix("+")]
    clamps: list[float] = []
    for argument, given, default in (("log_ratio_range", log_ratio_range, 20.0), ("value_range", value_range, 10.0)):
        if isinstance(given, str):
            check.word(op, argument, given, ("verl",))
            given = (-default, default) if name == "k3" else None
        low, high = (-math.inf, math.inf) if given is None else given
        if not low <= high:
            raise check.fail(op, argument, "be (low, high) with low <= high, or None", given, "None means no clamp.")
        clamps += [float(low), float(high)]
    straight = kl_penalty.endswith("+") and (name != "k2" or weighted or any(map(math.isfinite, clamps)))  # else k2 itself
    return name + ("+" if straight else ""), clamps


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _value_alloc(log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor | None, *rest: Any) -> Tensor:
    return library.fresh(log_prob, check.result_dtype(log_prob, ref_log_prob, old_log_prob))


def _grad_alloc(grad: Tensor, log_prob: Tensor, ref_log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    given = (log_prob, ref_log_prob)
    return tuple(library.fresh(x) if need else x.new_empty(0) for x, need in zip(given, needs, strict=True))


def _reward_alloc(rewards: Tensor | None, scores: Tensor | None, old: Tensor, ref: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    return library.fresh(old, check.result_dtype(old, ref, rewards, scores, mask))


library.define(
    "_kl_penalty_fwd",
    "(Tensor log_prob, Tensor ref_log_prob, Tensor? old_log_prob, str kl, float[] kl_range, float weight_max) -> Tensor",
    _value_alloc,
    reference.kl_penalty,
)
library.define(
    "_kl_penalty_bwd",
    "(Tensor grad, Tensor log_prob, Tensor ref_log_prob, Tensor? old_log_prob, str kl, float[] kl_range, float weight_max,"
    " bool[] needs) -> (Tensor, Tensor)",
    _grad_alloc,
    reference.kl_penalty_bwd,
)
library.define(
    "_shape_rewards_fwd",
    "(Tensor? rewards, Tensor? scores, Tensor old_log_prob, Tensor ref_log_prob, Tensor mask, Tensor? cu_seqlens, float kl_coef, str kl,"
    " float[] kl_range, float[] clip) -> Tensor",
    _reward_alloc,
    reference.shape_rewards,
)
library.define(
    "_shape_rewards_bwd",
    "(Tensor grad, Tensor scores, Tensor mask, Tensor? cu_seqlens, float[] clip) -> Tensor",
    lambda grad, scores, *rest: scores.new_empty(scores.shape),
    reference.shape_rewards_bwd,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _KlPenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor | None, settings: tuple[Any, ...], backend: int
    ) -> Tensor:
        ctx.rest = (settings, backend)
        ctx.save_for_backward(log_prob, ref_log_prob, old_log_prob)
        value: Tensor = library.call(
            "_kl_penalty_fwd", log_prob, ref_log_prob, _in_value(old_log_prob, settings), *settings, backend=backend
        )
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        log_prob, ref_log_prob, old_log_prob = ctx.saved_tensors
        settings, backend = ctx.rest
        needs = list(ctx.needs_input_grad[:2])
        if library.wants_double_backward(grad, log_prob, ref_log_prob):
            kl, kl_range, weight_max = settings

            def forward(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
                return reference.kl_smooth(log_prob, ref_log_prob, kl, kl_range, old_log_prob, weight_max)

            return (*library.differentiate(forward, (log_prob, ref_log_prob), (grad,)), None, None, None)
        args = (check.inner(grad), log_prob, ref_log_prob, old_log_prob, *settings, needs)
        found = library.call("_kl_penalty_bwd", *args, backend=backend)
        return (*[x if need else None for x, need in zip(found, needs, strict=True)], None, None, None)


def _in_value(old_log_prob: Tensor | None, settings: tuple[Any, ...]) -> Tensor | None:
    """A straight-through form has the weight in its gradient alone."""
    return None if settings[0].endswith("+") else old_log_prob


class _ShapeRewards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards: Tensor | None, scores: Tensor | None, *rest: Any) -> Tensor:
        old, ref, mask, cu, kl_coef, kl, kl_range, clip, backend = rest
        ctx.rest = (cu, clip, backend, None if rewards is None else rewards.dtype)
        ctx.save_for_backward(scores, mask)
        args = (rewards, scores, old, ref, mask, cu, kl_coef, kl, kl_range, clip)
        out: Tensor = library.call("_shape_rewards_fwd", *args, backend=backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        scores, mask = ctx.saved_tensors
        cu, clip, backend, dtype = ctx.rest
        if dtype is not None:
            return (grad.to(dtype), *[None] * 10)
        if library.wants_double_backward(grad):
            return (None, reference.shape_rewards_bwd(grad, scores, mask, cu, clip), *[None] * 9)
        return (None, library.call("_shape_rewards_bwd", check.inner(grad), scores, mask, cu, clip, backend=backend), *[None] * 9)


def _bound(op: str, weight_max: float | None, old_log_prob: Tensor | None) -> float:
    if weight_max is None:
        return math.inf
    if old_log_prob is None:
        raise check.fail(op, "weight_max", "be None without old_log_prob", weight_max, "Give old_log_prob.")
    return check.number(op, "weight_max", weight_max, 0.0, open_low=True)


# ---- public ops -----------------------------------------------------------------------------------------------------
def kl_penalty(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    kl_penalty: Kl = "kl",
    *,
    log_ratio_range: Range | str = "verl",
    value_range: Range | str = "verl",
    old_log_prob: Tensor | None = None,
    weight_max: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""The KL divergence from the reference policy, estimated per token.

    With d = ref_log_prob - log_prob, clamped to log_ratio_range: "kl" = "k1": -d; "abs": |d|; "mse" = "k2": d^2 / 2;
    "low_var_kl" = "k3": exp(d) - 1 - d. The value is clamped to value_range. With old_log_prob it is first multiplied by the
    importance weight w = min(exp(log_prob - old_log_prob), weight_max).

    Args:
        log_prob: any shape, floating point, nats; every position is read, there is no mask.
        ref_log_prob: like log_prob.
        kl_penalty: the estimator; with "+" (straight-through) it has the value of the estimator and the gradient of k2.
        log_ratio_range: (low, high) for d, None for no clamp, "verl": (-20, 20) for k3, else none.
        value_range: (low, high) for the value, None for no clamp, "verl": (-10, 10) for k3, else none.
        old_log_prob: like log_prob, the policy that sampled the tokens; None: no importance weight. log_prob.detach() gives
            the weight 1 and its gradient.
        weight_max: the largest w, positive; None: no bound.
        out: a tensor to write into; not with inputs that require grad.

    Returns:
        Tensor like log_prob, in the promoted dtype of the tensors in its formula.

    Gradient:
        To log_prob and ref_log_prob, each in its own dtype; old_log_prob is refused if it requires grad. A clamp passes
        gradient on its closed interval. w passes it too, where its bound does not bite: d(w k3) / d log_prob = -w d. An
        estimator with "+" has an unweighted value, and the gradient -w d with w detached, clamps or not.

    Numerics:
        Arithmetic in float32 (float64 for float64). k3 does not cancel near d = 0: it keeps its relative accuracy where
        exp(d) - d - 1 in float32 has none. A NaN shows in the value and in the gradient (torch.clamp's would be 0).

    Raises:
        ValueError, TypeError: an unknown estimator; shapes, dtypes or ranges that do not fit.

    Example:
        >>> log_prob, ref_log_prob = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
        >>> rlkern.kl_penalty(log_prob, ref_log_prob), rlkern.kl_penalty(log_prob, ref_log_prob, "k3")
        (tensor([0.5000, 0.0000]), tensor([0.1065, 0.0000]))

    Source:
        Schulman 2020, "Approximating KL divergence"; verl kl_penalty. OpenRLHF compute_approx_kl, TRL use_bias_correction_kl,
        slime and NeMo-RL: docs/algorithms.md has their arguments.
    """
    op = "kl_penalty"
    check.no_transforms(op, log_prob)
    if not isinstance(log_prob, Tensor):
        raise check.fail(op, "log_prob", "be a torch.Tensor", check.describe(log_prob), "Convert it with torch.as_tensor.", TypeError)
    log_prob, ref_log_prob, old = check.tensors(op, log_prob, log_prob=log_prob, ref_log_prob=ref_log_prob, old_log_prob=old_log_prob)
    settings = (*estimator(op, kl_penalty, log_ratio_range, value_range, old is not None), _bound(op, weight_max, old))
    check.detached(op, old_log_prob=old)
    grad = check.wants_grad(log_prob, ref_log_prob)
    backend = pick("_kl_penalty_fwd", log_prob)
    if out is not None:
        out = check.out_tensors(op, out, log_prob, [check.result_dtype(log_prob, ref_log_prob, _in_value(old, settings))], grad)
    shape = log_prob.shape
    if len(shape) not in (1, 2):
        log_prob, ref_log_prob = log_prob.reshape(-1), ref_log_prob.reshape(-1)
        old = None if old is None else old.reshape(-1)
    if grad:
        flat: Tensor = _KlPenalty.apply(log_prob, ref_log_prob, old, settings, backend)  # type: ignore[no-untyped-call]
        return flat if flat.shape == shape else flat.view(shape)
    direct = out is None or out.shape == log_prob.shape
    args = (log_prob, ref_log_prob, _in_value(old, settings), *settings)
    value: Tensor = library.call("_kl_penalty_fwd", *args, backend=backend, out=out if direct else None)
    if out is not None:
        return value if direct else out.copy_(value.view(shape))
    return value if value.shape == shape else value.view(shape)


def shape_rewards(
    rewards: Tensor,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_penalty: Kl = "kl",
    log_ratio_range: Range | str = "verl",
    value_range: Range | str = "verl",
    reward_clip: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Rewards per token with the KL penalty in them.

    Rewards (B, T): R_t - kl_coef * KL_t at valid tokens, R_t elsewhere. Rewards (B,): -kl_coef * KL_t at valid tokens, 0
    elsewhere, plus the row's reward, clipped, at its last valid token (its last token where a row has none).

    Args:
        rewards: like old_log_prob, read everywhere (a reward may sit on a masked tool token), or (B,) per row; floating point.
        old_log_prob: (B, T), or packed (N,); nats; not read at masked tokens.
        ref_log_prob: like old_log_prob.
        mask: like old_log_prob, bool, integer or float; nonzero = trainable token.
        kl_coef: weight of the KL, a number.
        kl_penalty, log_ratio_range, value_range: the estimator and its clamps, as in `kl_penalty`.
        reward_clip: (low, high) for rewards (B,), or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor to write into; not with rewards that require grad.

    Returns:
        (B, T) in the promoted dtype of the rewards, both log-probs and a float mask.

    Gradient:
        To rewards. Log-probs that require grad are refused.

    Numerics:
        Arithmetic in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; reward_clip with rewards (B, T).

    Example:
        >>> old, ref, mask = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]]), torch.tensor([[1, 1, 0]])
        >>> rlkern.shape_rewards(torch.tensor([2.0]), old, ref, mask, kl_coef=0.1)
        tensor([[-0.0500,  2.0000,  0.0000]])

    Source:
        Stiennon et al. 2020 (arXiv 2009.01325); verl apply_kl_penalty (B, T), OpenRLHF compute_reward (B,).
    """
    op = "shape_rewards"
    check.no_transforms(op, rewards)
    dims = 2 if cu_seqlens is None else 1
    if not isinstance(old_log_prob, Tensor) or old_log_prob.dim() != dims:
        form = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise check.fail(op, "old_log_prob", f"be {form}", check.describe(old_log_prob), "Give a row of tokens per response.")
    old, ref, mask = check.tensors(op, old_log_prob, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob, mask=mask)
    check.detached(op, old_log_prob=old, ref_log_prob=ref)
    kl_coef = check.number(op, "kl_coef", kl_coef)
    kl, kl_range = estimator(op, kl_penalty, log_ratio_range, value_range)
    tokens: Tensor | None = None
    scores: Tensor | None = None
    cu = check.lengths(op, cu_seqlens, old)
    if isinstance(rewards, Tensor) and rewards.dim() == 1 and (cu is None or rewards.shape != old.shape):
        scores = check.per_row(op, "rewards", rewards, check.rows_of(old, cu), old)
    else:
        tokens = check.tensors(op, old, rewards=rewards)[0]
    clip = [-math.inf, math.inf]
    if reward_clip is not None:
        clip = [check.number(op, "reward_clip", x) for x in reward_clip]
        if scores is None or len(clip) != 2 or not clip[0] <= clip[1]:
            raise check.fail(
                op, "reward_clip", "be (low, high), with rewards (B,)", reward_clip, "Clip per-token rewards with torch.clamp."
            )
    grad = check.wants_grad(rewards)
    backend = pick("_shape_rewards_fwd", old)
    if out is not None:
        out = check.out_tensors(op, out, old, [check.result_dtype(old, ref, tokens, scores, mask)], grad)
    args = (tokens, scores, old, ref, mask, cu, kl_coef, kl, kl_range, clip)
    if grad:
        shaped: Tensor = _ShapeRewards.apply(*args, backend)  # type: ignore[no-untyped-call]
        return shaped
    shaped = library.call("_shape_rewards_fwd", *args, backend=backend, out=out)
    return shaped
