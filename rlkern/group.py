# SPDX-License-Identifier: Apache-2.0
"""Groups of rows: statistics by group, and scores normalized within their group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import backends, check, library
from rlkern.backends import pick
from rlkern.labels import group_index
from rlkern.reference import group as reference
from rlkern.reference import group_advantage, token_baseline
from rlkern.types import Baseline, GroupIndex, GroupStats, NanScores, Singleton

_BASELINES = ("mean", "leave_one_out", "length_weighted")
_NUMBERS = frozenset((*backends.VALUE_DTYPES, torch.uint8, torch.int32, torch.int64))
_SINGLETONS = ("raw", "zero", "nan")
_NAN_SCORES = ("propagate", "omit")


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _stats_alloc(scores: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(offsets.shape[0] - 1), scores.new_empty(offsets.shape[0] - 1)


def _advantage_alloc(token_level_rewards: Tensor, response_mask: Tensor, *rest: Any) -> Tensor:
    return library.fresh(token_level_rewards, check.result_dtype(token_level_rewards, response_mask))


def _judge_advantage(count: float, *args: Any) -> None:
    baseline, scale, whiten, component_scores = args[6], args[7], args[10], args[12]
    if baseline == "second_best":
        check.pairs("advantages.grpo_passk", count)
    if whiten is not None:
        check.valid_tokens(group_advantage.whitened_name(scale, component_scores), count, whiten[0])


def _token_baseline_alloc(token_level_rewards: Tensor, response_mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = check.result_dtype(token_level_rewards, response_mask)
    return library.fresh(token_level_rewards, dtype), library.fresh(token_level_rewards, dtype)


library.define(
    "_group_mean_std_fwd",
    "(Tensor scores, Tensor ids, Tensor order, Tensor offsets, bool unbiased, float eps, str singleton, bool omit) -> (Tensor, Tensor)",
    _stats_alloc,
    reference.mean_std,
)
library.define(
    "_group_mean_std_bwd",
    "(Tensor grad_mean, Tensor grad_std, Tensor scores, Tensor ids, Tensor order, Tensor offsets, bool unbiased, float eps,"
    " str singleton, bool omit) -> Tensor",
    lambda grad_mean, grad_std, scores, *rest: scores.new_empty(scores.shape),
    reference.mean_std_bwd,
)
library.define(
    "_group_normalize_fwd",
    "(Tensor scores, Tensor? lengths, Tensor ids, Tensor order, Tensor offsets, str baseline, bool scale, bool unbiased,"
    " float eps, str singleton, bool omit) -> Tensor",
    lambda scores, *rest: scores.new_empty(scores.shape),
    reference.normalize,
)
library.define(
    "_group_normalize_bwd",
    "(Tensor grad, Tensor scores, Tensor? lengths, Tensor ids, Tensor order, Tensor offsets, str baseline, bool scale,"
    " bool unbiased, float eps, str singleton, bool omit) -> Tensor",
    lambda grad, scores, *rest: scores.new_empty(scores.shape),
    reference.normalize_bwd,
)
# Outcome advantages in one call: row sums over all tokens, group normalization, broadcast over the mask, and whitening over
# the valid tokens where asked for. Component scores (B, K), weighted by (K,), stand for the row sums: each is normalized alone.
# f_norm, if not 0: times B / (scores that are not 0) / f_norm. Its callers are rlkern/advantages.
library.define(
    "_group_advantage_fwd",
    "(Tensor token_level_rewards, Tensor response_mask, Tensor ids, Tensor order, Tensor offsets, Tensor? cu_seqlens,"
    " str baseline, bool scale, float eps, str singleton, bool[]? whiten, float whiten_eps, Tensor? component_scores,"
    " Tensor? component_weights, float f_norm) -> Tensor",
    _advantage_alloc,
    group_advantage.advantage,
    _judge_advantage,
)
library.define(
    "_optimal_token_baseline_fwd",
    "(Tensor token_level_rewards, Tensor response_mask, Tensor old_log_prob, Tensor sum_pi_squared, Tensor? rollout_is_weights,"
    " Tensor ids, Tensor order, Tensor offsets, Tensor? cu_seqlens, bool by_token, bool zero_tail, float eps) -> (Tensor, Tensor)",
    _token_baseline_alloc,
    token_baseline.advantage,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _MeanStd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scores, ids, order, offsets)
        ctx.rest = rest
        mean, std = library.call("_group_mean_std_fwd", scores, ids, order, offsets, *rest[:-1], backend=rest[-1])
        return mean, std

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_std: Tensor) -> tuple[Any, ...]:
        scores, *index = ctx.saved_tensors
        *options, backend = ctx.rest
        if library.wants_double_backward(grad_mean, grad_std, scores):
            found = library.differentiate(lambda s: reference.mean_std(s, *index, *options), (scores,), (grad_mean, grad_std))
            return (*found, *[None] * 8)
        grads = (grad_mean.contiguous(), grad_std.contiguous())
        d_scores = library.call("_group_mean_std_bwd", *grads, scores, *index, *options, backend=backend)
        return (d_scores, *[None] * 8)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, lengths: Tensor | None, ids: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(scores, lengths, ids, order, offsets)
        ctx.rest = rest
        args = (scores, lengths, ids, order, offsets, *rest[:-1])
        out: Tensor = library.call("_group_normalize_fwd", *args, backend=rest[-1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        scores, *index = ctx.saved_tensors
        *options, backend = ctx.rest
        if library.wants_double_backward(grad, scores):
            found = library.differentiate(lambda s: reference.normalize(s, *index, *options), (scores,), (grad,))
            return (*found, *[None] * 11)
        d_scores = library.call("_group_normalize_bwd", grad.contiguous(), scores, *index, *options, backend=backend)
        return (d_scores, *[None] * 11)


# ---- index ----------------------------------------------------------------------------------------------------------
def wrong_rows(op: str, labels: int, rows: int) -> Exception:
    return check.fail(op, "index", f"have {rows} labels, one a row", labels, "Label every row, padding rows too.")


def index_for(op: str, index: Any, rows: int, like: Tensor) -> GroupIndex:
    """The `index` argument of an op, raw labels or a GroupIndex, checked against the rows of `like`."""
    found = group_index(index)
    if found is not index and like.device.type != "cpu":
        found = found.to(like.device)
    if found.ids.shape[0] != rows:
        raise wrong_rows(op, found.ids.shape[0], rows)
    if found.ids.device != like.device:
        raise check.fail(op, "index", f"be on {like.device}", f"a GroupIndex on {found.ids.device}", "Move it with index.to(device).")
    return found


# ---- public ops -----------------------------------------------------------------------------------------------------
def _check_scores(op: str, scores: Any, index: Any, eps: float, singleton: str, nan: str) -> tuple[GroupIndex, float]:
    check.batch(op, "scores", scores)
    check.tensors(op, scores, scores=scores)
    check.no_transforms(op, scores)
    if scores.dim() != 1:
        raise check.fail(op, "scores", "be (B,), one score a row", check.describe(scores), "Sum the rewards of each row.")
    check.word(op, "singleton", singleton, _SINGLETONS)
    check.word(op, "nan", nan, _NAN_SCORES)
    return index_for(op, index, scores.shape[0], scores), check.number(op, "eps", eps, 0.0)


def group_mean_std(
    scores: Tensor,
    index: Any,
    *,
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: Singleton = "raw",
    nan: NanScores = "propagate",
) -> GroupStats:
    r"""Mean and standard deviation of the scores of each group.

    mean_g = sum s / k,  std_g = sqrt(max(sum (s - mean_g)^2 / (k - 1), eps)).

    Args:
        scores: (B,), floating point; one score a row; of NaN see `nan`.
        index: labels (B,), or their `group_index`.
        unbiased: divide by k - 1, or by k.
        eps: floor of the variance, in squared units of the scores.
        singleton: mean and std of a group of one row. "raw" (verl): 0 and 1, which leaves its score as it is. "zero": the
            score and 1. "nan": the score and NaN.
        nan: what a NaN score is. "propagate": it shows in its group. "omit": a row without a score, which the group does
            not count (TRL); a group without any has mean NaN, or 0 under "raw".

    Returns:
        GroupStats(mean, std, count), each (G,), groups in the order of their first row. Mean and std have the dtype of the
        scores (verl's are always float32), count is int64.

    Gradient:
        To scores. Below the floor, and where all scores are equal, std passes none.

    Numerics:
        Two passes in float64, on distances from the group's first score: a common offset costs nothing. The same bits for
        every thread count.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or words that do not fit.

    Example:
        >>> rlkern.group_mean_std(torch.tensor([1.0, 5.0, 3.0]), ["a", "b", "a"])
        GroupStats(mean=tensor([2., 0.]), std=tensor([1.4142, 1.0000]), count=tensor([2, 1]))

    Source:
        verl group_mean_std (verl/utils/groupwise.py); "omit": TRL nanstd, torch.nanmean.
    """
    op = "group_mean_std"
    index, eps = _check_scores(op, scores, index, eps, singleton, nan)
    backend = pick("_group_mean_std_fwd", scores)
    args = (scores, index.ids, index.order, index.offsets, bool(unbiased), eps, singleton, nan == "omit")
    if torch.is_grad_enabled() and scores.requires_grad:
        mean, std = _MeanStd.apply(*args, backend)  # type: ignore[no-untyped-call]
    else:
        mean, std = library.call("_group_mean_std_fwd", *args, backend=backend)
    counts = index.counts
    if nan == "omit":
        counts = torch.zeros_like(counts).index_add(0, index.ids, (~scores.isnan()).to(counts.dtype))
    return GroupStats(mean, std, counts)


def group_normalize(
    scores: Tensor,
    index: Any,
    *,
    baseline: Baseline = "mean",
    scale_by_std: bool = True,
    eps: float = 1e-6,
    unbiased: bool = True,
    singleton: Singleton = "raw",
    nan: NanScores = "propagate",
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Scores less the baseline of their group, over its standard deviation.

    y_b = (s_b - baseline_b) / (std_g + eps), or s_b - baseline_b without `scale_by_std`.

    Args:
        scores: (B,), floating point; one score a row; of NaN see `nan`.
        index: labels (B,), or their `group_index`.
        baseline: "mean" (GRPO): of the group. "leave_one_out" (RLOO): the mean of the others, so s_b - baseline_b =
            (s_b - mean_g) k / (k - 1). "length_weighted" (OPO): sum n s / sum n over the group, n from `lengths`.
        scale_by_std: divide by the deviation about the group's mean, or not (Dr. GRPO).
        eps: added to the standard deviation, in units of the scores.
        unbiased: the variance divides by k - 1, or by k.
        singleton: what a group of one row becomes. "raw": its score, with std 1. "zero": 0. "nan": NaN.
        nan: what a NaN score is. "propagate": it shows in its whole group. "omit": a row without a score, which stays NaN and
            which its group does not count (TRL).
        lengths: (B,), for "length_weighted" only: tokens of each row, any number type.

    Returns:
        Tensor (B,) in the dtype of the scores.

    Gradient:
        To scores, through baseline and deviation; where all scores of a group are equal the deviation passes none. Lengths
        that require grad are refused.

    Numerics:
        As `group_mean_std`. Equal scores give exactly 0 (verl's rounding gives them up to 0.95).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or words that do not fit.

    Example:
        >>> rlkern.group_normalize(torch.tensor([1.0, 0.0, 2.0]), ["a", "a", "b"], baseline="leave_one_out", scale_by_std=False)
        tensor([ 1., -1.,  2.])

    Source:
        Shao et al. 2024 (GRPO, arXiv 2402.03300), Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), Hao et al. 2025 (OPO, arXiv
        2505.23585); the middle of verl's outcome estimators, which `rlkern.advantages` has whole.
    """
    op = "group_normalize"
    check.word(op, "baseline", baseline, _BASELINES)
    index, eps = _check_scores(op, scores, index, eps, singleton, nan)
    if (lengths is not None) != (baseline == "length_weighted"):
        must = 'be given with baseline "length_weighted", and only then'
        raise check.fail(op, "lengths", must, f"{type(lengths).__name__} with {baseline!r}", "One number of tokens a row.")
    if lengths is not None:
        check.detached(op, lengths=lengths)
        if not isinstance(lengths, Tensor) or lengths.dtype not in _NUMBERS:
            raise check.fail(op, "lengths", "be a tensor of numbers", check.describe(lengths), "Count the tokens: mask.sum(1).", TypeError)
        if lengths.shape != scores.shape:
            raise check.fail(op, "lengths", f"have the shape {tuple(scores.shape)} of scores", check.describe(lengths), "One a row.")
        if lengths.device != scores.device:
            raise check.fail(op, "lengths", f"be on {scores.device}", check.describe(lengths), "Move it with .to(device).")
    backend = pick("_group_normalize_fwd", scores)
    parts = (scores, lengths, index.ids, index.order, index.offsets)
    args = (*parts, baseline, bool(scale_by_std), bool(unbiased), eps, singleton, nan == "omit")
    if torch.is_grad_enabled() and scores.requires_grad:
        found: Tensor = _Normalize.apply(*args, backend)  # type: ignore[no-untyped-call]
    else:
        found = library.call("_group_normalize_fwd", *args, backend=backend)
    return found
