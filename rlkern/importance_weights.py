# SPDX-License-Identifier: Apache-2.0
"""Importance weights behind a gate, and the off-policy mask of sequences: the forms of OpenRLHF, TRL, slime and ROLL."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.correction import single, tokens_of
from rlkern.reference import correction as reference
from rlkern.reference.loss import row_ids, spread, wide_on
from rlkern.rollout_metrics import ImportanceWeights


# ---- raw op ---------------------------------------------------------------------------------------------------------
def _weights_alloc(
    old: Tensor, rollout: Tensor, mask: Tensor, cu: Tensor | None, gating: str, unit: str, per_row: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = check.rows_of(old, cu)
    weights = old.new_empty(rows, dtype=rest[-1]) if per_row else library.fresh(old, rest[-1])
    return weights, old.new_empty((len(reference.WEIGHT_FIELDS), rows), dtype=wide_on(old.device))


library.define(
    "_importance_weights_fwd",
    "(Tensor old_log_prob, Tensor rollout_log_prob, Tensor mask, Tensor? cu_seqlens, str gating, str unit, bool per_row, bool clip,"
    " float[] bounds, str nan, float padding, ScalarType weights_dtype) -> (Tensor, Tensor)",
    _weights_alloc,
    reference.importance_weights,
)


# ---- arguments ------------------------------------------------------------------------------------------------------
def _gate(op: str, level: str, mode: str, gating: str, reduce: str, weights: str | None, nan: str) -> bool:
    """Do the words go together? Is the weight one a row?"""
    check.word(op, "level", level, ("token", "sequence"))
    check.word(op, "mode", mode, ("clip", "mask"))
    check.word(op, "gating", gating, ("ratio", "binary_kl", "tv"))
    check.word(op, "reduce", reduce, ("mean", "sum"))
    check.word(op, "weights", weights, (None, "token", "sequence"))
    check.word(op, "nan", nan, ("show", "one", "drop"))
    per_row = level == "sequence" and (weights or ("sequence" if mode == "clip" else "token")) == "sequence"
    if mode == "clip" and gating != "ratio":
        raise check.fail(op, "gating", "be 'ratio' with mode 'clip'", repr(gating), "A divergence is no weight: use mode 'mask'.")
    if gating != "ratio" and (reduce != "mean" or per_row):
        raise check.fail(op, "gating", "be 'ratio' with reduce 'sum' or weights 'sequence'", repr(gating), "A row's divergence is a mean.")
    if level == "token" and weights == "sequence":
        raise check.fail(op, "weights", "be 'token' with level 'token'", repr(weights), "Use level 'sequence'.")
    if mode == "clip" and level == "sequence" and not per_row:
        raise check.fail(op, "weights", "be 'sequence' with mode 'clip' and level 'sequence'", repr(weights), "Use level 'token'.")
    return per_row


# ---- public ops -----------------------------------------------------------------------------------------------------
def importance_weights(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["clip", "mask"] = "clip",
    gating: Literal["ratio", "binary_kl", "tv"] = "ratio",
    low: float | None = None,
    high: float | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    weights: Literal["token", "sequence"] | None = None,
    nan: Literal["show", "one", "drop"] = "show",
    padding: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> ImportanceWeights:
    r"""Importance weights exp(old_log_prob - rollout_log_prob), clipped, or 0 where a gate is outside [low, high].

    The gate's statistic of a token: "ratio": the weight; "tv": |p - p'|; "binary_kl": p ln(p / p') + (1 - p) ln((1 - p) /
    (1 - p')), with p = exp(rollout_log_prob), p' = exp(old_log_prob), both in [1e-6, 1 - 1e-6]. Of a sequence: the mean of
    its tokens' (ratio: exp of the mean log-ratio, or of its sum). mode "clip": clamp(weight, low, high); "mask": the weight
    where low <= statistic <= high, else 0.

    Args:
        old_log_prob: (B, T) or packed (N,), floating point, nats; not read at masked tokens.
        rollout_log_prob: like old_log_prob: what the rollout engine gave.
        mask: like old_log_prob, bool, integer or float; nonzero = trainable token, whatever its value.
        level: whether a token or a whole row is gated.
        mode: clip (with gating "ratio" alone) or mask.
        gating: the statistic.
        low, high: the band; None = open. A divergence has an upper bound alone: low None or at most 0.
        reduce: a sequence's ratio is exp of the mean (geometric mean) or of the sum of its log-ratios.
        weights: "token" or "sequence": whose ratio the weight is. None: the level's; for a masked sequence, the token's.
        nan: a NaN log-ratio: "show": a clip passes it, a mask drops it; "one": it counts as 0, so its ratio is 1; "drop": a
            weight that is NaN or infinite becomes 0.
        padding: the weight at masked tokens.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        ImportanceWeights(weights, filtered, kl): (B, T), or (rows,) for the weights of sequences, in the promotion of the
        inputs and a float mask; the share of valid tokens (or of all rows) outside the band; the mean of -log-ratio.

    Gradient:
        None: inputs that require grad are refused.

    Numerics:
        Arithmetic in float32 (float64 if an input is), the binary KL in float64; a row's sums in float64, rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes, words or bounds that do not fit, or do not go together.

    Example:
        >>> old, rollout, mask = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.0, -4.0, 0.0]]), torch.tensor([[1, 1, 0]])
        >>> rlkern.importance_weights(old, rollout, mask, mode="mask", low=0.5, high=5.0).weights
        tensor([[1., 0., 0.]])

    Source:
        OpenRLHF PolicyLoss (is_correction_level, _mode, _gating); TRL GRPOTrainer vllm_importance_sampling_mode: token_truncate =
        clip, token_mask = mask, sequence_* with reduce="sum", weights="sequence", all with nan="one", padding=1.0; slime, ROLL.
    """
    op = "importance_weights"
    names = ("old_log_prob", "rollout_log_prob", "mask")
    old, rollout, mask, cu = tokens_of(op, names, (old_log_prob, rollout_log_prob, mask), cu_seqlens)
    check.detached(op, old_log_prob=old, rollout_log_prob=rollout)
    per_row = _gate(op, level, mode, gating, reduce, weights, nan)
    bounds = [
        -math.inf if low is None else check.number(op, "low", low),
        math.inf if high is None else check.number(op, "high", high),
    ]
    if not bounds[0] <= bounds[1]:
        raise check.fail(op, "low", "be at most high", f"{low} and {high}", "Give the band as low, high.")
    if gating != "ratio" and bounds[0] > 0:
        raise check.fail(op, "low", f"be None or at most 0 with gating {gating!r}", low, "A divergence has an upper bound alone.")
    padding = check.number(op, "padding", padding)
    unit = "token" if level == "token" else reduce
    dtype = check.result_dtype(old, rollout, mask)
    args = (old, rollout, mask, cu, gating, unit, per_row, mode == "clip", bounds, nan, padding, dtype)
    found, table = library.call("_importance_weights_fwd", *args, backend=pick("_importance_weights_fwd", old))
    tokens = table[0].sum()
    filtered = table[3].sum() / tokens if level == "token" else table[3].mean()
    wide = torch.promote_types(dtype, torch.float32)
    return ImportanceWeights(found, filtered.to(wide), (-table[1].sum() / tokens).to(wide))


def off_policy_mask(
    advantages: Tensor,
    log_prob: Tensor,
    sampling_log_prob: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    nan: Literal["show", "one"] = "one",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Which sequences to keep: those with an advantage of at least 0, or a mean KL from the sampling policy of at most `threshold`.

    keep = (advantage >= 0) or (mean over the row's valid tokens of sampling_log_prob - log_prob <= threshold).

    Args:
        advantages: (rows,) or (rows, 1), one a row, or like log_prob, one a token; floating point.
        log_prob: (B, T) or packed (N,), floating point, nats; not read at masked tokens. Gradients stop here.
        sampling_log_prob: like log_prob; the sampling policy's, where there is none the old policy's.
        mask: like log_prob, bool, integer or float; nonzero = trainable token.
        threshold: of the mean KL, nats.
        nan: a NaN difference counts as 0 ("one": ratio 1), or makes the row's mean NaN, which is not at most `threshold` ("show").
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Tensor of 0 and 1 in the dtype of the mask: (rows,) for advantages of rows, else like log_prob.

    Gradient:
        None.

    Numerics:
        Arithmetic in float32 (float64 if an input is); a row's sum in float64, its mean rounded once. A row without a valid
        token has mean 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or numbers that do not fit.

    Example:
        >>> log_prob, sampling = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([[-0.5, -2.0], [-1.0, -2.0]])
        >>> rlkern.off_policy_mask(torch.tensor([-1.0, -1.0]), log_prob, sampling, torch.ones(2, 2), threshold=0.1)
        tensor([0., 1.])

    Source:
        DeepSeek-AI 2025 (DeepSeek-V3.2, off-policy sequence masking); TRL GRPOTrainer.get_off_policy_mask, slime's OPSM.
    """
    op = "off_policy_mask"
    names = ("log_prob", "sampling_log_prob", "mask")
    new, sampling, mask, cu = tokens_of(op, names, (log_prob, sampling_log_prob, mask), cu_seqlens)
    threshold = check.number(op, "threshold", threshold)
    check.word(op, "nan", nan, ("show", "one"))
    rows = check.rows_of(new, cu)
    new, sampling = new.detach(), sampling.detach()
    args = (sampling, new, mask, cu, "ratio", "sum", True, True, [-math.inf, math.inf], nan, 0.0, new.dtype)
    tokens, _, total, _ = library.call("_importance_weights_fwd", *args, backend=pick("_importance_weights_fwd", new))[1]
    near = (total / tokens.clamp(min=1)).to(torch.float32 if single(new, sampling) else torch.float64) <= threshold
    if isinstance(advantages, Tensor) and advantages.shape == new.shape and (cu is not None or new.dim() == 2) and new.shape != (rows, 1):
        advantages = check.tensors(op, new, advantages=advantages)[0]
        keep: Tensor = ((advantages >= 0) | spread(near, new, row_ids(new, cu))).to(mask.dtype)
        return keep
    of_row = check.per_row(op, "advantages", advantages, rows, new)
    if of_row is None:
        raise check.fail(op, "advantages", "be a torch.Tensor", "None", "Give one a row, or one a token.", TypeError)
    keep = ((of_row >= 0) | near).to(mask.dtype)
    return keep
