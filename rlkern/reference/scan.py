# SPDX-License-Identifier: Apache-2.0
"""GAE and returns in plain torch: the loops are the specification, the log-step forms the torch backend (tested equal)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern.reference import whiten as whitening
from rlkern.reference.affine_scan import affine, arithmetic, inside, inside_edge, needed, neighbour, rows, unrows
from rlkern.reference.kl import kl_value


# ---- the specification ----------------------------------------------------------------------------------------------
def gae_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GAE with the skip rule, step by step; `mask` of ones is the plain recurrence. Tensors (B, T), lam also (B,)."""
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage) if bootstrap is None else bootstrap
    out = []
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t] != 0
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(valid, step, advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        out.append(advantage)
    advantages = torch.stack(out[::-1], 1)
    return advantages, advantages + values


def returns_loop(rewards: Tensor, mask: Tensor, gamma: float, masked: str, bootstrap: Tensor | None = None) -> Tensor:
    """Discounted returns under each mask rule, step by step. Tensors (B, T)."""
    carry = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap
    zero, valid = torch.zeros_like(carry), mask != 0
    out = []
    for t in reversed(range(rewards.shape[1])):
        here = valid[:, t]
        if masked == "turn":  # one step a turn, on the reward of its last token
            last = here & ~valid[:, t + 1] if t + 1 < rewards.shape[1] else here
            carry = torch.where(last, rewards[:, t] + gamma * carry, carry)
            out.append(torch.where(here, carry, zero))
            continue
        step = (torch.where(here, rewards[:, t], zero) if masked == "zero" else rewards[:, t]) + gamma * carry
        carry = torch.where(here, step, {"skip": carry, "reset": zero}.get(masked, step))
        out.append(torch.where(here, step, zero) if masked == "skip" else step)
    return torch.stack(out[::-1], 1)


# ---- log-step forms -------------------------------------------------------------------------------------------------
def _latest(x: Tensor, live: Tensor, past_end: Tensor, reverse: bool = True) -> Tensor:
    """x of the next live token strictly to the right (to the left going forward), `past_end` where there is none."""
    found, value, k = live, torch.where(live, x, torch.zeros_like(x)), 1
    while k < x.shape[1]:
        value = torch.where(found, value, neighbour(value, k, 0.0, reverse))
        found = found | (neighbour(found.to(x.dtype), k, 0.0, reverse) != 0)
        k *= 2
    value = torch.where(found, value, past_end[:, None].expand_as(value))
    return neighbour(value, 1, past_end, reverse)


def _shaped(rewards: Tensor, valid: Tensor, old: Tensor | None, ref: Tensor | None, coef: float, kl: str, kl_range: list[float]) -> Tensor:
    if old is None or ref is None or kl == "none":
        return rewards
    zero = torch.zeros((), dtype=rewards.dtype, device=rewards.device)
    old, ref = (torch.where(valid, x.to(rewards.dtype), zero) for x in (old, ref))
    return torch.where(valid, rewards - coef * kl_value(old, ref, kl, kl_range), rewards)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    lam_row: Tensor | None,
    old_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    lam: float,
    kl_coef: float,
    kl: str,
    kl_range: list[float],
    whiten: list[bool] | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The raw op `_gae_fwd`."""
    dtype, like = arithmetic(rewards, values, mask), values
    rewards, values, mask, old, ref = rows(cu_seqlens, rewards, values, mask, old_log_prob, ref_log_prob)
    out_dtype = _gae_dtype(rewards, values, mask)
    rewards, values = rewards.to(dtype), values.to(dtype)
    exists = inside(cu_seqlens, values)
    valid = exists if mask is None else (mask != 0) & exists
    zero = torch.zeros((), dtype=dtype, device=values.device)
    if masked == "zero":
        rewards, values = torch.where(valid, rewards, zero), torch.where(valid, values, zero)
    rewards = _shaped(rewards, valid, old, ref, kl_coef, kl, kl_range)
    live = valid if masked == "skip" else exists
    past_end = torch.zeros_like(values.sum(1)) if bootstrap is None else bootstrap.to(dtype)
    decay = torch.full_like(past_end, gamma * lam) if lam_row is None else gamma * lam_row.to(dtype)
    delta = rewards + gamma * _latest(values, live, past_end) - values
    advantages = affine(torch.where(live, decay[:, None], zero + 1), torch.where(live, delta, zero), None)
    returns = unrows(cu_seqlens, advantages + values, like)
    if whiten is not None:
        advantages = whitening.whiten("gae", advantages, valid, whiten, eps)
    return unrows(cu_seqlens, advantages, like).to(out_dtype), returns.to(out_dtype)


def _gae_dtype(rewards: Tensor, values: Tensor, mask: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    return torch.promote_types(dtype, mask.dtype) if mask is not None and mask.is_floating_point() else dtype


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    old_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    kl_coef: float,
    kl: str,
    kl_range: list[float],
    whiten: list[bool] | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The raw op `_discounted_returns_fwd`: (advantages, returns); advantages is empty unless whitening is asked for."""
    dtype, like, out_dtype = arithmetic(rewards, mask), rewards, rewards.dtype
    rewards, mask, old, ref = rows(cu_seqlens, rewards, mask, old_log_prob, ref_log_prob)
    rewards, exists = rewards.to(dtype), inside(cu_seqlens, rewards)
    valid = exists if mask is None else (mask != 0) & exists
    zero = torch.zeros((), dtype=dtype, device=rewards.device)
    if masked == "zero":
        rewards = torch.where(valid, rewards, zero)
    rewards = _shaped(rewards, valid, old, ref, kl_coef, kl, kl_range)
    start = None if bootstrap is None else bootstrap.to(dtype)
    if masked == "turn":
        reads = valid & ~(neighbour(valid.to(dtype), 1, 0.0) != 0)
    else:
        reads = valid if masked in ("skip", "reset") else exists
    decay = torch.where(reads, zero + gamma, zero if masked == "reset" else zero + 1)
    decay = torch.where(exists, decay, zero + 1)
    carry = affine(decay, torch.where(reads, rewards, zero), start)
    if masked == "reset":
        past_end = torch.zeros_like(rewards.sum(1)) if start is None else start
        carry = torch.where(valid, carry, rewards + gamma * neighbour(carry, 1, past_end))
    shown = valid if masked in ("skip", "turn") else exists
    returns = torch.where(shown, carry, zero)
    flat = unrows(cu_seqlens, returns, like).to(out_dtype)
    if whiten is None:
        return returns.new_empty(0, dtype=out_dtype), flat
    advantages = whitening.whiten("discounted_returns", returns, valid, whiten, eps)
    adv_dtype = torch.promote_types(out_dtype, mask.dtype) if mask is not None and mask.is_floating_point() else out_dtype
    return unrows(cu_seqlens, advantages, like).to(adv_dtype), flat


# ---- adjoints -------------------------------------------------------------------------------------------------------
def _adjoint(x: Tensor, live: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_t = x_t + decay c_prev over live tokens, x of other tokens flowing right into the next live one.

    Returns c (0 where not live), c of the previous live token, and c of the row's last live one.
    """
    zero = torch.zeros_like(x.sum(1))
    d = torch.where(live, decay, torch.ones_like(x))  # a carry decays as it leaves a live token
    c = torch.where(live, affine(neighbour(d, 1, 0.0, reverse=False), x, None, reverse=False), torch.zeros_like(x))
    edge = torch.nn.functional.pad
    last = _latest(edge(c, (0, 1)), edge(live, (0, 1)), zero, reverse=False)[:, -1]
    return c, _latest(c, live, zero, reverse=False), last


def gae_bwd(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    lam_row: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    lam: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op `_gae_bwd`: (d_rewards, d_values, d_bootstrap), empty where not needed."""
    dtype, like = arithmetic(grad_returns), grad_returns
    g, h, mask = rows(cu_seqlens, grad_advantages, grad_returns, mask)
    g, h, exists = g.to(dtype), h.to(dtype), inside(cu_seqlens, h)
    valid = exists if mask is None else (mask != 0) & exists
    live = valid if masked == "skip" else exists
    decay = torch.full_like(h[:, :1], gamma * lam) if lam_row is None else gamma * lam_row.to(dtype)[:, None]
    c, before, last = _adjoint(torch.where(exists, g + h, torch.zeros_like(h)), live, decay)
    d_values = h + torch.where(live, gamma * before - c, torch.zeros_like(c))
    if masked == "zero":
        c, d_values = (torch.where(valid, x, torch.zeros_like(x)) for x in (c, d_values))
    found = (unrows(cu_seqlens, c, like), unrows(cu_seqlens, d_values, like), gamma * last)
    result: tuple[Tensor, Tensor, Tensor] = needed(found, like, needs)
    return result


def discounted_returns_bwd(
    grad_returns: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, masked: str, gamma: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """The raw op `_discounted_returns_bwd`: (d_rewards, d_bootstrap), empty where not needed."""
    dtype, like = arithmetic(grad_returns), grad_returns
    x, mask = rows(cu_seqlens, grad_returns, mask)
    x, exists = x.to(dtype), inside(cu_seqlens, x)
    valid = exists if mask is None else (mask != 0) & exists
    zero = torch.zeros_like(x)
    if masked == "reset":  # c_t = G_t + gamma m_t c_prev, on every token
        c = affine(torch.where(valid, zero + gamma, zero), torch.where(exists, x, zero), None, reverse=False)
        last = torch.where(inside_edge(exists, True), c, zero).sum(1)
    else:
        live = exists
        if masked == "skip":
            live = valid
        elif masked == "turn":
            live = valid & ~(neighbour(valid.to(dtype), 1, 0.0) != 0)
        shown = valid if masked in ("skip", "turn") else exists
        c, _, last = _adjoint(torch.where(shown, x, zero), live, zero[:, :1] + gamma)
    if masked == "zero":
        c = torch.where(valid, c, zero)
    result: tuple[Tensor, Tensor] = needed((unrows(cu_seqlens, torch.where(exists, c, zero), like), gamma * last), like, needs)
    return result
