# SPDX-License-Identifier: Apache-2.0
"""Estimators of the literature that no framework here has: V-trace, lambda-returns, REINFORCE. Masked tokens are skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import check
from rlkern.advantages.outcome import batch, plain
from rlkern.affine_scan import affine_scan
from rlkern.moments import masked_mean
from rlkern.types import Advantages

__all__ = ["reinforce", "td_lambda", "vtrace"]


# ---- rows -----------------------------------------------------------------------------------------------------------
class _Rows:
    """Valid tokens, and what stands behind the last one of each row."""

    def __init__(self, op: str, rewards: Tensor, mask: Tensor, bootstrap: Tensor | None, cu: Tensor | None) -> None:
        self.valid, self.cu, self.like = mask != 0, cu, rewards
        self.initial = check.per_row(op, "bootstrap", bootstrap, check.rows_of(rewards, cu), rewards)
        if self.initial is not None:
            self.initial = self.initial.detach().to(rewards.dtype)

    def where(self, x: Tensor | float, masked: float = 0.0) -> Tensor:
        """x at valid tokens."""
        return torch.where(self.valid, x, torch.full_like(self.like, masked))

    def scan(self, decay: Tensor | float, x: Tensor, initial: Tensor | None) -> Tensor:
        """y = x + decay y' over the valid tokens; a masked one holds that of the next."""
        return affine_scan(self.where(decay, 1.0), self.where(x), initial=initial, cu_seqlens=self.cu)

    def behind(self, y: Tensor, end: Tensor | None) -> Tensor:
        """Of each token what the next one holds; at the row's last, `end`."""
        if y.shape[-1] == 0:
            return y
        if self.cu is None:
            last = torch.zeros_like(y[:, :1]) if end is None else end[:, None]
            return torch.cat([y[:, 1:], last], 1)
        found = torch.cat([y[1:], y[:1], y[:1]])  # one place more, for the ends of rows without a token
        starts, ends = self.cu[:-1], self.cu[1:]
        at = torch.where(ends > starts, ends - 1, y.shape[0])
        last = torch.zeros(at.shape, dtype=y.dtype, device=y.device) if end is None else end
        return found.index_copy(0, at, last)[:-1] if at.shape[0] else y


def _begin(op: str, rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Any, cu_seqlens: Any, **more: Tensor) -> tuple[_Rows, Any]:
    cu = batch(op, rewards, cu_seqlens, values=values, response_mask=mask, **more)
    dtype = check.result_dtype(rewards, values, *more.values())
    tensors = [plain(x).to(dtype) for x in (rewards, values, *more.values())]
    return _Rows(op, tensors[0], plain(mask), bootstrap, cu), tensors


# ---- estimators -----------------------------------------------------------------------------------------------------
def vtrace(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    gamma: float,
    lam: float = 1.0,
    *,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    pg_rho_clip: float | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""V-trace: off-policy values by clipped importance weights, and advantages against them.

    Over the valid tokens, V' and vs' those of the next one (bootstrap past the end), w = exp(log_prob - rollout_log_prob):
    vs_t = V_t + delta_t + gamma lam min(w_t, c_clip) (vs' - V'), delta_t = min(w_t, rho_clip) (R_t + gamma V' - V_t);
    A_t = min(w_t, pg_rho_clip) (R_t + gamma vs' - V_t).

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        values: like token_level_rewards, the critic's value; not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        log_prob: like token_level_rewards, nats, of the policy that learns; not read where masked.
        rollout_log_prob: like log_prob, of the policy that acted.
        gamma: discount per step, a number.
        lam: trace decay per step, a number.
        rho_clip, c_clip: upper bounds of the weights, numbers; math.inf for none.
        pg_rho_clip: that of the advantages; None = rho_clip.
        bootstrap: (B,), the value after the last token of a truncated row; 0 by default.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like the rewards, 0 where masked; returns are vs.

    Gradient:
        None: targets are constants.

    Numerics:
        Three passes of `rlkern.affine_scan`, and arithmetic in the promoted dtype of the inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.classic.vtrace(r, v, m, torch.zeros(1, 3), torch.zeros(1, 3), 1.0)
        Advantages(advantages=tensor([[0.5000, 0.0000, 0.7500]]), returns=tensor([[1., 0., 1.]]))

    Source:
        Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), section 4.1; lam of its remark 2.
    """
    op = "advantages.classic.vtrace"
    given: dict[str, Any] = {"log_prob": log_prob, "rollout_log_prob": rollout_log_prob}
    rows, (r, v, new, old) = _begin(op, token_level_rewards, values, response_mask, bootstrap, cu_seqlens, **given)
    gamma, lam = check.number(op, "gamma", gamma, 0.0), check.number(op, "lam", lam, 0.0)
    clips = [rho_clip, c_clip, rho_clip if pg_rho_clip is None else pg_rho_clip]
    names = ("rho_clip", "c_clip", "pg_rho_clip")
    rho, c, pg = ((new - old).exp().clamp(max=check.number(op, name, x, 0.0)) for name, x in zip(names, clips, strict=True))
    kept = rows.scan(0.0, v, rows.initial)  # the value of each token, or of the next valid one
    behind = rows.behind(kept, rows.initial)
    traced = rows.scan(gamma * lam * c, rho * (r + gamma * behind - v), None)  # vs - V
    vs = rows.behind(kept + traced, rows.initial)
    return Advantages(rows.where(pg * (r + gamma * vs - v)), rows.where(kept + traced))


def td_lambda(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    *,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""TD(lambda): lambda-returns, and advantages against the values.

    Over the valid tokens: returns_t = R_t + gamma ((1 - lam) V' + lam returns'), V' and returns' of the next one (bootstrap past
    the end);  A = returns - V.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        values: like token_level_rewards, the critic's value; not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        lam: 0 for one-step targets, 1 for Monte Carlo.
        bootstrap: (B,), the value after the last token of a truncated row; 0 by default.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like the rewards, 0 where masked.

    Gradient:
        None: targets are constants. `rlkern.gae` has one, and the same returns.

    Numerics:
        Two passes of `rlkern.affine_scan`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.classic.td_lambda(r, v, m, 1.0, 0.5).returns
        tensor([[0.6250, 0.0000, 1.0000]])

    Source:
        Sutton 1988; Sutton and Barto 2018, equation 12.18.
    """
    op = "advantages.classic.td_lambda"
    rows, (r, v) = _begin(op, token_level_rewards, values, response_mask, bootstrap, cu_seqlens)
    gamma, lam = check.number(op, "gamma", gamma, 0.0), check.number(op, "lam", lam, 0.0, 1.0)
    behind = rows.behind(rows.scan(0.0, v, rows.initial), rows.initial)
    returns = rows.where(rows.scan(gamma * lam, r + gamma * (1 - lam) * behind, rows.initial))
    return Advantages(rows.where(returns - v), returns)


def reinforce(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    gamma: float = 1.0,
    *,
    baseline: Tensor | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""REINFORCE, with a baseline or without.

    returns_t = R_t + gamma returns of the next valid token;  A = returns - baseline at valid tokens, 0 elsewhere.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        baseline: None = 0; "mean": of the returns of all valid tokens; a tensor (B,), one a row, or like the rewards, one a token.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like the rewards, 0 where masked.

    Gradient:
        None: targets are constants. `rlkern.discounted_returns` has one.

    Numerics:
        As `rlkern.affine_scan`; the mean in float64.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.classic.reinforce(r, m, 0.5, baseline="mean").advantages
        tensor([[-0.2500,  0.0000,  0.2500]])

    Source:
        Williams 1992.
    """
    op = "advantages.classic.reinforce"
    cu = batch(op, token_level_rewards, cu_seqlens, response_mask=response_mask)
    r, mask = plain(token_level_rewards), plain(response_mask)
    rows = _Rows(op, r, mask, None, cu)
    returns = rows.where(rows.scan(check.number(op, "gamma", gamma, 0.0), r, None))
    if isinstance(baseline, Tensor):
        if baseline.shape != r.shape:
            one: Any = check.per_row(op, "baseline", baseline, check.rows_of(r, cu), r)
            baseline = one[:, None] if cu is None else one.repeat_interleave(cu.diff(), output_size=r.shape[0])
        return Advantages(rows.where(returns - baseline.detach().to(returns.dtype)), returns)  # type: ignore[union-attr]
    check.word(op, "baseline", baseline, (None, "mean"))
    return Advantages(returns if baseline is None else rows.where(returns - masked_mean(returns, rows.valid)), returns)
