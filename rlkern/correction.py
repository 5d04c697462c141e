# SPDX-License-Identifier: Apache-2.0
"""Rollout correction: importance weights and rejection between the policy that sampled and the policy that is trained."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.reference import correction as reference
from rlkern.reference.loss import wide_on
from rlkern.rollout_metrics import RolloutCorrection, RolloutMetrics
from rlkern.thresholds import importance_range, rejection_limits


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _correction_alloc(
    old: Tensor, rollout: Tensor, mask: Tensor, cu: Tensor | None, level: str, icepop: bool, is_range: Any, options: str, *rest: Any
) -> tuple[Tensor, ...]:
    weights = library.fresh(old, rest[-1]) if level else old.new_empty(0, dtype=rest[-1])
    modified = library.fresh(mask) if options else mask.new_empty(0)
    return weights, modified, old.new_empty((len(reference.FIELDS), check.rows_of(old, cu)), dtype=wide_on(old.device))


def _judge_correction(count: float, *args: Any) -> None:
    check.valid_tokens("rollout_correction", count, False)


def _correction_reference(*args: Any) -> tuple[Tensor, ...]:
    found = reference.rollout_correction(*args)
    if found[2].device.type == "cpu":
        _judge_correction(float(found[2][0].sum()))
    return found


library.define(
    "_rollout_correction_fwd",
    "(Tensor old_log_prob, Tensor rollout_log_prob, Tensor mask, Tensor? cu_seqlens, str level, bool icepop, float[] is_range,"
    " str options, float[] limits, bool probabilities, ScalarType weights_dtype) -> (Tensor, Tensor, Tensor)",
    _correction_alloc,
    _correction_reference,
    _judge_correction,
)


# ---- arguments ------------------------------------------------------------------------------------------------------
def tokens_of(op: str, names: tuple[str, str, str], values: tuple[Any, Any, Any], cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """Both log-probs and the mask, checked, and the offsets of packed rows."""
    first = values[0]
    check.batch(op, names[0], first, cu_seqlens)
    check.present(op, names[0], **dict(zip(names[1:], values[1:], strict=True)))
    found = check.tensors(op, first, **dict(zip(names, values, strict=True)))
    return *found, check.lengths(op, cu_seqlens, first)


def single(*tensors: Tensor) -> bool:
    """Is the arithmetic float32's?"""
    return all(x.dtype != torch.float64 for x in tensors)


def _batch_mean(weights: RolloutMetrics, group: Any) -> Tensor:
    """The mean that a batch normalisation divides by, 0-dim on the device: of tokens, or of the rows that have one."""
    tokens = weights.field("tokens")
    valid = tokens > 0
    if weights.level == "token":
        sums = torch.stack((torch.where(valid, weights.field("w") + tokens, 0.0).sum(), tokens.sum()))
    else:
        ratio = weights.field("ratio").to(torch.float32 if weights.single else torch.float64)
        of_row = reference.weight_of(ratio, weights.is_range[0], weights.is_range[1], weights.icepop).to(tokens.dtype)
        sums = torch.stack((torch.where(valid, of_row, 0.0).sum(), valid.to(tokens.dtype).sum()))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums, group=group)
    mean = sums[0] / sums[1]
    return torch.where(mean > 1e-8, mean, torch.ones_like(mean))  # as verl: a NaN divides nothing


# ---- public ops -----------------------------------------------------------------------------------------------------
def rollout_correction(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    response_mask: Tensor,
    *,
    rollout_is: Literal["token", "sequence"] | None = None,
    rollout_is_threshold: float | str | None = 2.0,
    rollout_rs: str | None = None,
    rollout_rs_threshold: float | str | None = None,
    rollout_is_batch_normalize: bool = False,
    group: Any = None,
    cu_seqlens: Tensor | None = None,
) -> RolloutCorrection:
    r"""Importance weights, rejection and every diagnostic of the gap between the sampling and the training policy.

    With q = old_log_prob - rollout_log_prob: rollout_is "token": W = exp(clamp(q, +-20)); "sequence": W = exp(clamp(sum of
    the row's q, +-20)) at each of its tokens. A threshold u truncates, min(W, u); "l_u" (IcePop) zeroes W outside [l, u].
    rollout_rs names statistics that must stay within their limits, or the token (token_*) or the row (seq_*) is rejected:
    k1 = -q, k2 = q^2 / 2, k3 = exp(q) - 1 - q of the clamped q; of the token, or the row's sum, mean or maximum.

    Args:
        old_log_prob: (B, T) or packed (N,), floating point, nats. No input but the mask is read at masked tokens.
        rollout_log_prob: like old_log_prob: what the rollout engine gave.
        response_mask: like old_log_prob, bool, integer or float; nonzero = trainable token, whatever its value.
        rollout_is: the level of the weights, None = no weights.
        rollout_is_threshold: u, or "l_u"; ratios. None = no weights.
        rollout_rs: comma-separated, all must pass: token_k1, token_k2, token_k3, seq_sum_*, seq_mean_*, seq_max_k2, seq_max_k3.
        rollout_rs_threshold: one for all, or one for each, comma-separated. k1: ratios "l_u", or u for 1/u to u, compared in
            the log with k1; k2, k3: an upper limit, nats.
        rollout_is_batch_normalize: divide the weights by their mean, over tokens ("token") or rows ("sequence").
        group: the ranks over which that mean is taken where torch.distributed is initialised; None: all, as in verl.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        RolloutCorrection(weights, response_mask, metrics): the weights, 0 at masked tokens, in the promotion of the inputs
        and a float mask, or None; a new mask, its values kept or 0; `RolloutMetrics`, whose as_dict() has verl's names.

    Gradient:
        None: inputs that require grad are refused. The weights change the measure, not the objective.

    Numerics:
        Arithmetic in float32 (float64 if an input is). Sums in float64, a row's statistic rounded once before it meets its
        limit; the same bits for every thread count. A NaN at a valid token shows in a truncated weight and in the metrics;
        IcePop drops it and rejection rejects it.

    Raises:
        ValueError, TypeError: shapes, dtypes, options or thresholds that do not fit; on CPU tensors a mask without a valid
        token (elsewhere as_dict() raises).

    Example:
        >>> old, rollout, mask = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.0, -4.0, 0.0]]), torch.tensor([[1, 1, 0]])
        >>> found = rlkern.rollout_correction(old, rollout, mask, rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold=3.0)
        >>> found.weights, found.response_mask, round(found.metrics.as_dict()["rollout_corr/kl"], 4)
        (tensor([[1., 2., 0.]]), tensor([[1, 0, 0]]), -1.0)

    Source:
        Yao et al. 2025 (truncated importance sampling of the rollout), Ling Team 2025 (IcePop);
        verl compute_rollout_correction_and_rejection_mask.
    """
    op = "rollout_correction"
    names = ("old_log_prob", "rollout_log_prob", "response_mask")
    old, rollout, mask, cu = tokens_of(op, names, (old_log_prob, rollout_log_prob, response_mask), cu_seqlens)
    check.detached(op, old_log_prob=old, rollout_log_prob=rollout)
    check.word(op, "rollout_is", rollout_is, (None, "token", "sequence"))
    level = "" if rollout_is_threshold is None else rollout_is or ""
    is_range, icepop = importance_range(op, rollout_is_threshold) if level else ((0.0, math.inf), False)
    options, limits = rejection_limits(op, rollout_rs, rollout_rs_threshold)
    dtype = check.result_dtype(old, rollout, mask)
    normalize = bool(level and rollout_is_batch_normalize)
    made = torch.promote_types(dtype, torch.float32) if normalize else dtype  # rounded once, after the division
    args = (old, rollout, mask, cu, level, icepop, list(is_range), ",".join(options), list(limits), False, made)
    weights, modified, table = library.call("_rollout_correction_fwd", *args, backend=pick("_rollout_correction_fwd", old))
    metrics = RolloutMetrics(table, level, icepop, is_range, options, limits, None, single(old, rollout))
    if normalize:
        norm = _batch_mean(metrics, group)
        weights = weights.div_(norm).to(dtype)
        metrics = metrics._replace(norm=norm)
    return RolloutCorrection(weights if level else None, modified if options else mask.clone(), metrics)


def rollout_metrics(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    response_mask: Tensor,
    *,
    probabilities: bool = False,
    cu_seqlens: Tensor | None = None,
) -> RolloutMetrics:
    r"""The diagnostics of the gap between the sampling and the training policy: KL, perplexities, chi-squared.

    With q = log_prob - rollout_log_prob: kl = mean(-q), k3_kl = mean(exp(q) - 1 - q), chi2_token = mean(exp(2 q)) - 1 over
    tokens; perplexities, their ratio and chi2_seq = mean(exp(2 sum q)) - 1 over rows, empty ones too.

    Args:
        log_prob: (B, T) or packed (N,), floating point, nats; not read at masked tokens. Gradients stop here.
        rollout_log_prob: like log_prob.
        response_mask: like log_prob, bool, integer or float; nonzero = trainable token.
        probabilities: compare the tokens' probabilities too: the largest, the mean and the deviation of their gap, and their
            correlation (verl's training/rollout_probs_diff_*).
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        RolloutMetrics: sums of each row on the device; as_dict() has verl's names, by one transfer.

    Gradient:
        None.

    Numerics:
        As `rollout_correction`.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; on CPU tensors a mask without a valid token.

    Example:
        >>> old, rollout = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
        >>> rlkern.rollout_metrics(old, rollout, torch.tensor([[1, 1]])).as_dict()["rollout_corr/kl"]
        -0.25

    Source:
        verl compute_rollout_corr_metrics_from_logprobs, calculate_debug_metrics.
    """
    op = "rollout_metrics"
    names = ("log_prob", "rollout_log_prob", "response_mask")
    old, rollout, mask, cu = tokens_of(op, names, (log_prob, rollout_log_prob, response_mask), cu_seqlens)
    old, rollout = old.detach(), rollout.detach()
    args: tuple[Any, ...] = (old, rollout, mask, cu, "", False, [0.0, math.inf], "", [], bool(probabilities), old.dtype)
    table = library.call("_rollout_correction_fwd", *args, backend=pick("_rollout_correction_fwd", old))[2]
    return RolloutMetrics(table, single=single(old, rollout), probabilities=bool(probabilities))
