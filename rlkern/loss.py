# SPDX-License-Identifier: Apache-2.0
"""The clipped policy loss: value, gradient and metrics from one pass."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.aggregation import Count, counts_of, gradient, loss_dtype, results
from rlkern.backends import pick
from rlkern.kl import estimator
from rlkern.metrics import POLICY_MAXES, POLICY_SUMS, Metrics, PolicyLoss, PolicyLossAndGrad
from rlkern.reference import loss as reference
from rlkern.types import Kl, LossAggMode


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _policy_alloc(old_log_prob: Tensor, log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy, dtype, needs = rest[6], rest[-2], rest[-1]
    d_entropy = gradient(log_prob if entropy is None else entropy, needs[1], needs[2])
    return *results(log_prob, dtype, len(POLICY_SUMS), len(POLICY_MAXES)), gradient(log_prob, needs[0], needs[2]), d_entropy


library.define(
    "_policy_loss_fwd",
    "(Tensor old_log_prob, Tensor log_prob, Tensor? advantages, Tensor? advantages_row, Tensor mask, Tensor? weights,"
    " Tensor? weights_row, Tensor? ref_log_prob, Tensor? entropy, Tensor? counts, Tensor? cu_seqlens, float[] clip,"
    " str mode, float[] numbers, str kl, float[] kl_range, float[] coefs, ScalarType loss_dtype, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _policy_alloc,
    reference.policy_loss,
)
library.define(
    "_scale_fwd",
    "(Tensor x, Tensor factor, Tensor like) -> Tensor",
    lambda x, factor, like: library.fresh(x, like.dtype),
    reference.scale,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _PolicyLoss(torch.autograd.Function):
    """The forward leaves the gradients, in float32 for half log-probs: unscaled, they would underflow in float16."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, entropy: Tensor | None, *rest: Any) -> Any:
        (old, *tensors), (*settings, backend) = rest[:9], rest[9:]
        adv, adv_row, mask, weights, weights_row, ref, counts, cu = tensors
        args = (old, log_prob, adv, adv_row, mask, weights, weights_row, ref, entropy, counts, cu)
        needs = [*ctx.needs_input_grad[:2], True]
        loss, sums, maxes, d_log_prob, d_entropy = library.call("_policy_loss_fwd", *args, *settings, needs, backend=backend)
        ctx.rest = (settings, backend)
        ctx.save_for_backward(d_log_prob, d_entropy, log_prob, entropy, *rest[:9])
        ctx.mark_non_differentiable(sums, maxes)
        ctx.set_materialize_grads(False)
        return loss, sums, maxes

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        d_log_prob, d_entropy, log_prob, entropy, *tensors = ctx.saved_tensors
        settings, backend = ctx.rest
        found = bonus = None
        if grad is not None and library.wants_double_backward(grad, log_prob, entropy):

            def forward(log_prob: Tensor, entropy: Tensor | None) -> Tensor:
                return reference.policy_loss_smooth(log_prob, entropy, tensors, settings)

            found, bonus = library.differentiate(forward, (log_prob, entropy), (grad,))
        elif grad is not None:
            need, need_entropy = ctx.needs_input_grad[:2]
            found = library.call("_scale_fwd", d_log_prob, grad, log_prob, backend=backend) if need else None
            bonus = library.call("_scale_fwd", d_entropy, grad, entropy, backend=backend) if need_entropy else None
        return (found, bonus, *[None] * 17)


# ---- arguments ------------------------------------------------------------------------------------------------------
def _token_or_row(x: Any, like: Tensor) -> tuple[Any, Any]:
    """(x, None) if x has one value a token, (None, x) if it may have one a row."""
    return (None, x) if isinstance(x, Tensor) and x.shape != like.shape else (x, None)


class _Policy(NamedTuple):
    """Checked arguments of a policy loss."""

    log_prob: Tensor
    entropy: Tensor | None
    tensors: tuple[Tensor | None, ...]  # old, advantages, their row form, mask, weights, their row form, ref, counts, cu
    settings: tuple[Any, ...]  # clip, mode, numbers, kl, kl_range, coefs, loss dtype
    kind: str
    backend: int


def _settings(
    op: str, cliprange: float, cliprange_low: float | None, cliprange_high: float | None, clip_ratio_c: float | None,
    log_ratio_clamp: float | None, kl_penalty: str, kl_coef: float, entropy_coeff: float, has_ref: bool, has_entropy: bool,
) -> tuple[list[float], str, list[float], list[float]]:  # fmt: skip
    """The numbers of a policy loss, checked once for each set of them: (clip, estimator, its clamps, coefficients)."""
    cliprange = check.number(op, "cliprange", cliprange, 0.0)
    low = cliprange if cliprange_low is None else check.number(op, "cliprange_low", cliprange_low, 0.0)
    high = cliprange if cliprange_high is None else check.number(op, "cliprange_high", cliprange_high, 0.0)
    cap = math.inf if clip_ratio_c is None else check.number(op, "clip_ratio_c", clip_ratio_c, 1.0, open_low=True)
    clamp = math.inf if log_ratio_clamp is None else check.number(op, "log_ratio_clamp", log_ratio_clamp, 0.0)
    coefs = [check.number(op, "kl_coef", kl_coef), check.number(op, "entropy_coeff", entropy_coeff)]
    if coefs[0] != 0 and not has_ref:
        raise check.fail(op, "kl_coef", "be 0 without ref_log_prob", kl_coef, "Give ref_log_prob.")
    if coefs[1] != 0 and not has_entropy:
        raise check.fail(op, "entropy_coeff", "be 0 without entropy", entropy_coeff, "Give entropy.")
    kl, kl_range = estimator(op, kl_penalty)
    return [low, high, cap, clamp], kl, kl_range, coefs


_cached_settings = functools.lru_cache(maxsize=64, typed=True)(_settings)


def _settings_once(*numbers: Any) -> tuple[list[float], str, list[float], list[float]]:
    if torch.compiler.is_compiling():
        return _settings(*numbers)
    try:
        return _cached_settings(*numbers)
    except TypeError:  # unhashable: the check names it
        return _settings(*numbers)


def _policy(
    op: str, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float = 0.2,
    cliprange_low: float | None = None, cliprange_high: float | None = None, clip_ratio_c: float | None = 3.0,
    log_ratio_clamp: float | None = 20.0, loss_agg_mode: str = "token-mean", rollout_is_weights: Tensor | None = None,
    ref_log_prob: Tensor | None = None, kl_penalty: str = "low_var_kl", kl_coef: float = 0.0, entropy: Tensor | None = None,
    entropy_coeff: float = 0.0, dp_size: Count = 1, batch_num_tokens: Count = None, global_batch_size: Count = None,
    loss_scale_factor: Count = None, cu_seqlens: Tensor | None = None,
) -> _Policy:  # fmt: skip
    check.batch(op, "log_prob", log_prob, cu_seqlens)
    check.present(op, "log_prob", old_log_prob=old_log_prob, advantages=advantages, response_mask=response_mask)
    adv, adv_row = _token_or_row(advantages, log_prob)
    weights, weights_row = _token_or_row(rollout_is_weights, log_prob)
    log_prob, old, mask, adv, weights, ref, entropy = check.tensors(
        op, log_prob, log_prob=log_prob, old_log_prob=old_log_prob, response_mask=response_mask, advantages=adv,
        rollout_is_weights=weights, ref_log_prob=ref_log_prob, entropy=entropy,
    )  # fmt: skip
    cu = check.lengths(op, cu_seqlens, log_prob)
    if adv_row is not None or weights_row is not None:
        rows = check.rows_of(log_prob, cu)
        adv_row = check.per_row(op, "advantages", adv_row, rows, log_prob)
        weights_row = check.per_row(op, "rollout_is_weights", weights_row, rows, log_prob)
    if op == "policy_loss":
        check.detached(op, advantages=advantages, old_log_prob=old, ref_log_prob=ref, rollout_is_weights=rollout_is_weights)
    clip, kl, kl_range, coefs = _settings_once(
        op, cliprange, cliprange_low, cliprange_high, clip_ratio_c, log_ratio_clamp, kl_penalty, kl_coef, entropy_coeff,
        ref is not None, entropy is not None,
    )  # fmt: skip
    counts = counts_of(
        op, log_prob, loss_agg_mode, cu is not None, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
    )  # fmt: skip
    dtype = loss_dtype(loss_agg_mode, counts, log_prob, old, adv, adv_row, weights, weights_row, mask, ref, entropy)
    tensors = (old, adv, adv_row, mask, weights, weights_row, ref, counts.tensor, cu)
    kind = "policy" + ("+kl" if ref is not None else "") + ("+entropy" if entropy is not None else "")
    settings = (clip, loss_agg_mode, counts.numbers, kl, kl_range, coefs, dtype)
    return _Policy(log_prob, entropy, tensors, settings, kind, pick("_policy_loss_fwd", log_prob))


def _run(p: _Policy, needs: list[bool], out: Any = None) -> tuple[Tensor, ...]:
    old, adv, adv_row, mask, weights, weights_row, ref, counts, cu = p.tensors
    args = (old, p.log_prob, adv, adv_row, mask, weights, weights_row, ref, p.entropy, counts, cu, *p.settings)
    if out is not None:
        loss, sums, maxes, _, d_entropy = _policy_alloc(*args, [False, *needs[1:]])
        out = (loss, sums, maxes, out, d_entropy)
    found: tuple[Tensor, ...] = library.call("_policy_loss_fwd", *args, needs, backend=p.backend, out=out)
    return found


# ---- public ops -----------------------------------------------------------------------------------------------------
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float | None = 3.0,
    log_ratio_clamp: float | None = 20.0,
    loss_agg_mode: LossAggMode = "token-mean",
    rollout_is_weights: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_penalty: Kl = "low_var_kl",
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coeff: float = 0.0,
    dp_size: Count = 1,
    batch_num_tokens: Count = None,
    global_batch_size: Count = None,
    loss_scale_factor: Count = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    r"""PPO's clipped policy loss, with the KL and entropy terms fused in.

    Per token, with x = clamp(log_prob - old_log_prob, +-log_ratio_clamp) and r = exp(x):
    l = max(-A r, -A clamp(r, 1 - low, 1 + high)), where A < 0 at most -A clip_ratio_c; then l * rollout_is_weights.
    loss = agg(l) + kl_coef * agg(KL) - entropy_coeff * agg(entropy).
    agg, with D = dp_size, N = batch_num_tokens, B = global_batch_size, S = loss_scale_factor, n the row's valid tokens:
    token-mean: D / N * sum; seq-mean-token-sum: D / B * sum; seq-mean-token-mean: D / B * sum over rows of (row sum / n);
    seq-mean-token-sum-norm: D / (B S) * sum; token-sum: D * sum.

    Args:
        old_log_prob: (B, T) or packed (N,), floating point, nats. No input but the mask is read at masked tokens.
        log_prob: like old_log_prob.
        advantages: like log_prob, or one a row: (B,), (B, 1), or (B, T) expanded with stride 0 (read once a row).
        response_mask: like log_prob, bool, integer or float; nonzero = trainable token, whatever its value.
        cliprange, cliprange_low, cliprange_high: the clip of r; low and high default to cliprange. Not negative.
        clip_ratio_c: the dual clip, greater than 1; None = off.
        log_ratio_clamp: the clamp of the log-ratio, nats; None = off.
        loss_agg_mode: the aggregation, as above.
        rollout_is_weights: like advantages; multiplies l, detached.
        ref_log_prob, kl_penalty, kl_coef: the KL term (`kl_penalty` has the estimators); like log_prob, nats.
        entropy, entropy_coeff: the entropy term; like log_prob, nats.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: numbers or 0-dim tensors, which are never read on
            the host. None: this call's valid tokens, its rows with any, and T.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        PolicyLoss(loss, metrics): a fresh 0-dim tensor, in verl's dtype (the promotion of the inputs and a float mask; at
        least float32 in the seq modes), and `Metrics`.

    Gradient:
        To log_prob and entropy; the other tensors are refused if they require grad. On a clip's edge it passes in full; a
        tie with the dual clip halves it. A second backward under retain_graph works; create_graph goes by the reference.

    Numerics:
        Arithmetic in float32 (float64 if an input is), for half log-probs too: verl rounds their ratio to half. Sums in
        float64; the same bits for every thread count. A NaN at a valid token shows in the loss, in its gradient (where
        torch.clamp would give 0) and in metrics.nonfinite. No valid token: loss NaN with local counts, gradients 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, numbers or modes that do not fit; dp_size > 1 without the count that
        the mode divides by; an input that requires grad and gets none.

    Example:
        >>> log_prob, mask = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[1, 1]])
        >>> loss, metrics = rlkern.policy_loss(log_prob.detach(), log_prob, torch.tensor([2.0]), mask)
        >>> loss.backward(); loss, log_prob.grad
        (tensor(-2., grad_fn=<_PolicyLossBackward>), tensor([[-1., -1.]]))

    Source:
        Schulman et al. 2017 (arXiv 1707.06347), Ye et al. 2019 (dual clip, 1912.09729), Yu et al. 2025 (clip-higher,
        2503.14476); verl compute_policy_loss_vanilla and agg_loss.
    """
    p = _policy(
        "policy_loss", old_log_prob, log_prob, advantages, response_mask, cliprange, cliprange_low, cliprange_high, clip_ratio_c,
        log_ratio_clamp, loss_agg_mode, rollout_is_weights, ref_log_prob, kl_penalty, kl_coef, entropy, entropy_coeff,
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, cu_seqlens,
    )  # fmt: skip
    if check.wants_grad(p.log_prob, p.entropy):
        args = (p.log_prob, p.entropy, *p.tensors, *p.settings, p.backend)
        loss, sums, maxes = _PolicyLoss.apply(*args)  # type: ignore[no-untyped-call]
    else:
        loss, sums, maxes, _, _ = _run(p, [False, False, False])
    return PolicyLoss(loss, Metrics(sums, maxes, p.kind))


def policy_loss_and_grad(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float | None = 3.0,
    log_ratio_clamp: float | None = 20.0,
    loss_agg_mode: LossAggMode = "token-mean",
    rollout_is_weights: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_penalty: Kl = "low_var_kl",
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coeff: float = 0.0,
    dp_size: Count = 1,
    batch_num_tokens: Count = None,
    global_batch_size: Count = None,
    loss_scale_factor: Count = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> PolicyLossAndGrad:
    r"""`policy_loss` and its gradients at once, without autograd.

    For callers that have d loss / d log_prob to hand on themselves: the gradient is written once, already scaled.

    Args:
        old_log_prob, log_prob, advantages, response_mask, ...: as in `policy_loss`.
        out: a tensor like log_prob to write d_log_prob into.

    Returns:
        PolicyLossAndGrad(loss, metrics, d_log_prob, d_entropy), detached; the gradients in the dtype of their tensors, 0 at
        masked tokens; d_entropy is None without entropy.

    Gradient:
        None is recorded, whether inputs require grad or not.

    Numerics:
        As `policy_loss`. A float16 gradient underflows at about 6e-8: scale the loss by the denominators, or use float32.

    Raises:
        ValueError, TypeError: as `policy_loss`.

    Example:
        >>> log_prob, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]])
        >>> rlkern.policy_loss_and_grad(log_prob, log_prob, torch.tensor([2.0]), mask).d_log_prob
        tensor([[-1., -1.]])

    Source:
        As `policy_loss`.
    """
    p = _policy(
        "policy_loss_and_grad", old_log_prob, log_prob, advantages, response_mask, cliprange, cliprange_low, cliprange_high, clip_ratio_c,
        log_ratio_clamp, loss_agg_mode, rollout_is_weights, ref_log_prob, kl_penalty, kl_coef, entropy, entropy_coeff,
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, cu_seqlens,
    )  # fmt: skip
    if check.wants_grad(p.log_prob, p.entropy, *p.tensors):
        entropy, *tensors = (x if x is None else x.detach() for x in (p.entropy, *p.tensors))
        p = p._replace(log_prob=p.log_prob.detach(), entropy=entropy, tensors=tuple(tensors))
    if out is not None:
        out = check.out_tensors("policy_loss_and_grad", out, p.log_prob, [p.log_prob.dtype], False)
    loss, sums, maxes, d_log_prob, d_entropy = _run(p, [True, p.entropy is not None, False], out)
    return PolicyLossAndGrad(loss, Metrics(sums, maxes, p.kind), d_log_prob, d_entropy if p.entropy is not None else None)
