# SPDX-License-Identifier: Apache-2.0
"""Which tokens clip-cov and kl-cov treat apart. The covariances are one kernel; means and ranks are torch's reductions and its
stable sort, since the ranks of a whole batch are no sweep."""

import torch
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.aggregation import valid_tokens
from rlkern.kernels.launch import TOKENS, Plan, Variant, variants
from rlkern.reference.loss import row_ids, spread, wide_on

VARIANTS: list[Variant] = []


@launch.kernel
def covariance_kernel(
    old_log_prob, log_prob, advantages, mask, cov, chosen,
    old_log_prob_stride: tl.int64, log_prob_stride: tl.int64, advantages_stride: tl.int64, mask_stride: tl.int64, cov_stride: tl.int64,
    chosen_stride: tl.int64, T: tl.int64, blocks: tl.int32, means, above: tl.float64, below: tl.float64, low: tl.float64, high: tl.float64,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each token; kl-cov: left in `cov`, -inf where masked. clip-cov: whether it is a candidate."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    valid = valid_tokens(mask, mask_stride, row, first, inside, INNER[3], ALIGNED)
    lp = launch.load(log_prob, log_prob_stride, row, first, inside, INNER[1], ALIGNED).to(A)
    a = launch.load(advantages, advantages_stride, row, first, inside, INNER[2], ALIGNED).to(A)
    found = (a.to(tl.float64) - tl.load(means)) * (lp.to(tl.float64) - tl.load(means + 1))
    if chosen is None:
        launch.store(cov, cov_stride, row, first, tl.where(valid, found, float("-inf")), inside, ALIGNED)
    else:
        old = launch.load(old_log_prob, old_log_prob_stride, row, first, inside, INNER[0], ALIGNED).to(A)
        r = math.exp_of(tl.where(valid, lp - old, 0.0))
        beyond = tl.where(a > 0, r - math.constant(1 + high, A), tl.where(a < 0, math.constant(1 - low, A) - r, 0.0 * r))
        kept = valid & (beyond <= 0) & (found > math.constant(above, tl.float64)) & (found < math.constant(below, tl.float64))
        launch.store(chosen, chosen_stride, row, first, kept.to(tl.uint8), inside, ALIGNED)


_PLAN = Plan(("log_prob", "advantages", "mask"), ("cov",), (64, 72), ("means",) * 2)
VARIANTS += [v for v in variants(covariance_kernel, TOKENS, _PLAN, {}, mask="i64", cov="fp64", means="fp64") if v.dtype == "fp32"]


def policy_select_fwd(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor | None,
    advantages_row: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kind: str,
    numbers: list[float],
    chosen: Tensor | None,
    counts: Tensor,
) -> None:
    adv = advantages if advantages is not None else spread(advantages_row, log_prob, row_ids(log_prob, cu_seqlens))  # type: ignore[arg-type]
    valid, double = mask != 0, wide_on(log_prob.device)
    n = valid.sum(dtype=double)
    sums = [torch.where(valid, x, 0.0).sum(dtype=double) for x in (adv, log_prob)]
    counts[1] = n
    if chosen is None:
        counts[0] = 0
        return
    candidates = kind == "clip_cov"
    cov = None if candidates else torch.empty(log_prob.shape, dtype=double, device=log_prob.device)
    tensors = (old_log_prob, log_prob, adv, mask, cov, chosen if candidates else None)
    bounds = numbers if candidates else [0.0] * 4
    rows = launch.rows((log_prob, *tensors), flat=True)
    rows = rows._replace(strides=rows.strides[1:], inner=rows.inner[1:])
    A = launch.arithmetic(old_log_prob, log_prob, adv)
    launch.over_tokens(covariance_kernel, rows, tensors, torch.stack(sums) / n, *bounds, A=A)
    if cov is not None:
        most = torch.where(n > 0, (n * numbers[0]).floor().clamp(min=1), n)
        order = cov.flatten().argsort(descending=True, stable=True)
        chosen.view(-1).scatter_(0, order, (torch.arange(order.numel(), device=order.device) < most).to(torch.uint8))
        chosen *= valid
    counts[0] = chosen.sum(dtype=double)
