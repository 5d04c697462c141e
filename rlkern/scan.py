# SPDX-License-Identifier: Apache-2.0
"""Reverse scans over tokens: GAE and discounted returns, with their rules for masked tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.backends import pick
from rlkern.kl import estimator
from rlkern.reference import scan as reference
from rlkern.types import Advantages, Kl, Masked

_NO_KL = ("none", [0.0, 0.0, 0.0, 0.0])


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _gae_alloc(rewards: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = check.result_dtype(rewards, values, mask)
    return library.fresh(values, dtype), library.fresh(values, dtype)


def _returns_alloc(rewards: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    whiten = rest[-2]
    advantages = rewards.new_empty(0) if whiten is None else library.fresh(rewards, check.result_dtype(rewards, mask))
    return advantages, library.fresh(rewards)


def _wanted(like: Tensor, rows: int, needs: list[bool]) -> tuple[Tensor, ...]:
    tokens = [library.fresh(like) if need else like.new_empty(0) for need in needs[:-1]]
    return *tokens, like.new_empty(rows if needs[-1] else 0)


def _gae_bwd_alloc(grad_advantages: Tensor, grad_returns: Tensor, mask: Any, lam: Any, cu: Tensor | None, *rest: Any) -> Any:
    return _wanted(grad_returns, check.rows_of(grad_returns, cu), rest[-1])


def _returns_bwd_alloc(grad_returns: Tensor, mask: Any, cu: Tensor | None, *rest: Any) -> Any:
    return _wanted(grad_returns, check.rows_of(grad_returns, cu), rest[-1])


def _judge_gae(count: float, *args: Any) -> None:
    if args[-2] is not None:
        check.valid_tokens("gae", count, args[-2][0])


def _judge_returns(count: float, *args: Any) -> None:
    if args[-2] is not None:
        check.valid_tokens("discounted_returns", count, args[-2][0])


library.define(
    "_gae_fwd",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? bootstrap, Tensor? lam_row, Tensor? old_log_prob,"
    " Tensor? ref_log_prob, Tensor? cu_seqlens, str masked, float gamma, float lam, float kl_coef, str kl,"
    " float[] kl_range, bool[]? whiten, float eps) -> (Tensor, Tensor)",
    _gae_alloc,
    reference.gae,
    _judge_gae,
)
library.define(
    "_gae_bwd",
    "(Tensor grad_advantages, Tensor grad_returns, Tensor? mask, Tensor? lam_row, Tensor? cu_seqlens, str masked,"
    " float gamma, float lam, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _gae_bwd_alloc,
    reference.gae_bwd,
)
library.define(
    "_discounted_returns_fwd",
    "(Tensor rewards, Tensor? mask, Tensor? bootstrap, Tensor? old_log_prob, Tensor? ref_log_prob, Tensor? cu_seqlens,"
    " str masked, float gamma, float kl_coef, str kl, float[] kl_range, bool[]? whiten, float eps) -> (Tensor, Tensor)",
    _returns_alloc,
    reference.discounted_returns,
    _judge_returns,
)
library.define(
    "_discounted_returns_bwd",
    "(Tensor grad_returns, Tensor? mask, Tensor? cu_seqlens, str masked, float gamma, bool[] needs) -> (Tensor, Tensor)",
    _returns_bwd_alloc,
    reference.discounted_returns_bwd,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _Gae(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards: Tensor, values: Tensor, bootstrap: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        mask, lam_row, old, ref, cu, masked, gamma, lam, kl_coef, kl, kl_range, backend = rest
        ctx.rest = (cu, masked, gamma, lam, kl_coef, kl, kl_range, backend)
        ctx.save_for_backward(rewards, values, bootstrap, mask, lam_row, old, ref)
        args = (rewards, values, mask, bootstrap, lam_row, old, ref, cu, masked, gamma, lam, kl_coef, kl, kl_range, None, 0.0)
        advantages, returns = library.call("_gae_fwd", *args, backend=backend)
        return advantages, returns

    @staticmethod
    def backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple[Any, ...]:
        rewards, values, bootstrap, mask, lam_row, old, ref = ctx.saved_tensors
        cu, masked, gamma, lam, kl_coef, kl, kl_range, backend = ctx.rest
        if library.wants_double_backward(grad_advantages, grad_returns):

            def forward(rewards: Tensor, values: Tensor, bootstrap: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference.gae(
                    rewards, values, mask, bootstrap, lam_row, old, ref, cu, masked, gamma, lam, kl_coef, kl, kl_range, None, 0.0
                )

            found = library.differentiate(forward, (rewards, values, bootstrap), (grad_advantages, grad_returns))
            return (*found, *[None] * 12)
        needs = list(ctx.needs_input_grad[:3])
        grads = (check.inner(grad_advantages), check.inner(grad_returns))
        found = library.call("_gae_bwd", *grads, mask, lam_row, cu, masked, gamma, lam, needs, backend=backend)
        return (*[x if need else None for x, need in zip(found, needs, strict=True)], *[None] * 12)


class _DiscountedReturns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards: Tensor, bootstrap: Tensor | None, *rest: Any) -> Tensor:
        mask, old, ref, cu, masked, gamma, kl_coef, kl, kl_range, backend = rest
        ctx.rest = (cu, masked, gamma, kl_coef, kl, kl_range, backend)
        ctx.save_for_backward(rewards, bootstrap, mask, old, ref)
        args = (rewards, mask, bootstrap, old, ref, cu, masked, gamma, kl_coef, kl, kl_range, None, 0.0)
        returns: Tensor = library.call("_discounted_returns_fwd", *args, backend=backend)[1]
        return returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rewards, bootstrap, mask, old, ref = ctx.saved_tensors
        cu, masked, gamma, kl_coef, kl, kl_range, backend = ctx.rest
        if library.wants_double_backward(grad):

            def forward(rewards: Tensor, bootstrap: Tensor | None) -> Tensor:
                return reference.discounted_returns(
                    rewards, mask, bootstrap, old, ref, cu, masked, gamma, kl_coef, kl, kl_range, None, 0.0
                )[1]

            return (*library.differentiate(forward, (rewards, bootstrap), (grad,)), *[None] * 10)
        needs = list(ctx.needs_input_grad[:2])
        found = library.call("_discounted_returns_bwd", check.inner(grad), mask, cu, masked, gamma, needs, backend=backend)
        return (*[x if need else None for x, need in zip(found, needs, strict=True)], *[None] * 10)


# ---- public ops -----------------------------------------------------------------------------------------------------
def _kl(op: str, old: Tensor | None, ref: Tensor | None, kl_coef: float, kl_penalty: str) -> tuple[str, list[float]]:
    if old is None and ref is None:
        return _NO_KL
    if old is None or ref is None:
        missing = "old_log_prob" if old is None else "ref_log_prob"
        raise check.fail(op, missing, "come with the other log-probs", "None", "Give both, or neither.")
    check.detached(op, old_log_prob=old, ref_log_prob=ref)
    check.number(op, "kl_coef", kl_coef)
    return estimator(op, kl_penalty)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lam: float | Tensor,
    masked: Masked | None = "skip",
    bootstrap: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_penalty: Kl = "kl",
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""Generalised advantage estimation, right to left along each row.

    Over the tokens that count, with V' and A' those of the next one (bootstrap and 0 past the end):
    A_t = R_t + gamma V' - V_t + gamma lam A',  returns_t = A_t + V_t.

    Args:
        rewards: (B, T) or packed (N,), floating point; reward per token. "skip" does not read it at masked tokens.
        values: like rewards; the critic's value. "skip" reads it at masked tokens only for their own return.
        mask: like rewards, bool, integer or float; nonzero = trainable token. None = all.
        gamma: discount per step, a number.
        lam: trace decay per step, a number or (B,), one a row.
        masked: what a masked token does. "skip" (verl): nothing; it emits the advantage of the next valid token. "zero"
            (OpenRLHF): a step with reward and value 0. None (slime, ROLL): an ordinary step; mask is not read.
        bootstrap: (B,), the value after the last token of a truncated row; 0 by default.
        old_log_prob, ref_log_prob, kl_coef, kl_penalty: reward shaping, R_t - kl_coef * KL_t at valid tokens (`kl_penalty`).
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into; not with inputs that require grad.

    Returns:
        Advantages(advantages, returns), in the promoted dtype of rewards, values and a float mask. Not whitened.

    Gradient:
        To rewards, values and bootstrap. Log-probs that require grad are refused.

    Numerics:
        Arithmetic in float32 (float64 for float64); the order of operations depends on T alone. A NaN at a token that is
        read reaches every token to its left, as in the loop; at a token that is not read, nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.gae(r, v, m, gamma=1.0, lam=1.0).advantages
        tensor([[0.5000, 0.7500, 0.7500]])

    Source:
        Schulman et al. 2016 (arXiv 1506.02438); verl compute_gae_advantage_return without its whitening
        (`rlkern.advantages.gae` has it), OpenRLHF get_advantages_and_returns ("zero").
    """
    check.batch("gae", "rewards", rewards, cu_seqlens)
    rewards, values, mask, old, ref = check.tensors(
        "gae", rewards, rewards=rewards, values=values, mask=mask, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob
    )
    check.word("gae", "masked", masked, ("skip", "zero", None))
    cu = check.lengths("gae", cu_seqlens, rewards)
    rows = check.rows_of(rewards, cu)
    lam_row = None
    if isinstance(lam, Tensor):
        check.detached("gae", lam=lam)
        lam_row, lam = check.per_row("gae", "lam", lam, rows, rewards), 0.0
    gamma, lam = check.number("gae", "gamma", gamma, 0.0), check.number("gae", "lam", lam, 0.0)
    bootstrap = check.per_row("gae", "bootstrap", bootstrap, rows, rewards)
    kl, kl_range = _kl("gae", old, ref, kl_coef, kl_penalty)
    if masked is None and old is None:
        mask = None
    backend = pick("_gae_fwd", values)
    grad = check.wants_grad(rewards, values, bootstrap)
    if out is not None:
        dtype = check.result_dtype(rewards, values, mask)
        out = check.out_tensors("gae", out, values, [dtype, dtype], grad)
    if grad:
        rest = (mask, lam_row, old, ref, cu, masked or "none", gamma, lam, kl_coef, kl, kl_range, backend)
        return Advantages(*_Gae.apply(rewards, values, bootstrap, *rest))  # type: ignore[no-untyped-call]
    args = (rewards, values, mask, bootstrap, lam_row, old, ref, cu, masked or "none", gamma, lam, kl_coef, kl, kl_range, None, 0.0)
    return Advantages(*library.call("_gae_fwd", *args, backend=backend, out=out))


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    masked: Masked | None = "skip",
    bootstrap: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_penalty: Kl = "kl",
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Discounted sum of the rewards from each token to the end of its row.

    c_t = R_t + gamma c_next (bootstrap past the end); what a masked token does to c is `masked`.

    Args:
        rewards: (B, T) or packed (N,), floating point; reward per token. "skip" and "turn" do not read it at masked tokens.
        mask: like rewards, bool, integer or float; nonzero = trainable token. None = all.
        gamma: discount per step, a number.
        masked: "skip" (verl >= 0.9): the return passes through, and masked tokens give 0. "reset" (verl <= 0.8): a masked
            token gives R_t + gamma c_next and cuts the trace. "zero" (OpenRLHF): an ordinary step with reward 0, output not
            masked. "turn" (ROLL): one step per run of valid tokens, on the reward of its last. None: plain, mask not read.
        bootstrap: (B,), the return after the last token; 0 by default.
        old_log_prob, ref_log_prob, kl_coef, kl_penalty: reward shaping, R_t - kl_coef * KL_t at valid tokens (`kl_penalty`).
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor to write into; not with inputs that require grad.

    Returns:
        Tensor like rewards.

    Gradient:
        To rewards and bootstrap. Log-probs that require grad are refused.

    Numerics:
        As `gae`. "reset" reads rewards at masked tokens; a NaN there shows at that token and is cut with the trace.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.discounted_returns(r, m, gamma=1.0), rlkern.discounted_returns(r, m, gamma=1.0, masked="reset")
        (tensor([[1., 0., 1.]]), tensor([[0., 1., 1.]]))

    Source:
        Hu et al. 2025 (REINFORCE++, arXiv 2501.03262); verl compute_reinforce_plus_plus_outcome_advantage (its returns),
        OpenRLHF get_cumulative_returns ("zero"), ROLL compute_agentic_reinforce_return ("turn").
    """
    op = "discounted_returns"
    check.batch(op, "rewards", rewards, cu_seqlens)
    rewards, mask, old, ref = check.tensors(op, rewards, rewards=rewards, mask=mask, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob)
    check.word(op, "masked", masked, ("skip", "reset", "zero", "turn", None))
    gamma = check.number(op, "gamma", gamma, 0.0)
    cu = check.lengths(op, cu_seqlens, rewards)
    bootstrap = check.per_row(op, "bootstrap", bootstrap, check.rows_of(rewards, cu), rewards)
    kl, kl_range = _kl(op, old, ref, kl_coef, kl_penalty)
    if masked is None and old is None:
        mask = None
    backend = pick("_discounted_returns_fwd", rewards)
    grad = check.wants_grad(rewards, bootstrap)
    rule = masked or "none"
    if grad and out is None:
        rest = (mask, old, ref, cu, rule, gamma, kl_coef, kl, kl_range, backend)
        result: Tensor = _DiscountedReturns.apply(rewards, bootstrap, *rest)  # type: ignore[no-untyped-call]
        return result
    args = (rewards, mask, bootstrap, old, ref, cu, rule, gamma, kl_coef, kl, kl_range, None, 0.0)
    if out is not None:
        out = check.out_tensors(op, out, rewards, [rewards.dtype], grad)
        library.call("_discounted_returns_fwd", *args, backend=backend, out=(rewards.new_empty(0), out))
        return out
    returns: Tensor = library.call("_discounted_returns_fwd", *args, backend=backend)[1]
    return returns
