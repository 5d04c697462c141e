# SPDX-License-Identifier: Apache-2.0
"""Scans in plain torch: the loops are the specification, the log-step forms the torch backend (tested equal).

A scan y_t = x_t + c_t y_{t+1} doubles its reach in each step: x += c * x[t + k], c *= c[t + k] for k = 1, 2, 4, ... Where c
is 0 nothing passes, not even a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkern.reference import whiten as whitening
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
def _next(x: Tensor, k: int, fill: float | Tensor, reverse: bool = True) -> Tensor:
    """x[:, t + k] (t - k going forward), `fill` past the end."""
    k = min(k, x.shape[1])
    pad = torch.zeros_like(x[:, :k]) + (fill if not isinstance(fill, Tensor) else fill[:, None])
    return torch.cat([x[:, k:], pad], 1) if reverse else torch.cat([pad, x[:, : x.shape[1] - k]], 1)


def affine(decay: Tensor, x: Tensor, initial: Tensor | None, reverse: bool = True) -> Tensor:
    """y_t = x_t + decay_t y_next with y = initial past the end; tensors (B, T), initial (B,)."""
    c, k = decay.expand_as(x), 1
    if x.shape[1] == 0:
        return x
    if initial is not None:
        edge = torch.zeros_like(x, dtype=torch.bool)
        edge[:, -1 if reverse else 0] = True
        x = torch.where(edge, x + c * initial[:, None], x)
    while k < x.shape[1]:
        x = torch.where(c != 0, x + c * _next(x, k, 0.0, reverse), x)
        c = c * _next(c, k, 0.0, reverse)
        k *= 2
    return x


def _latest(x: Tensor, live: Tensor, past_end: Tensor, reverse: bool = True) -> Tensor:
    """x of the next live token strictly to the right (to the left going forward), `past_end` where there is none."""
    found, value, k = live, torch.where(live, x, torch.zeros_like(x)), 1
    while k < x.shape[1]:
        value = torch.where(found, value, _next(value, k, 0.0, reverse))
        found = found | (_next(found.to(x.dtype), k, 0.0, reverse) != 0)
        k *= 2
    value = torch.where(found, value, past_end[:, None].expand_as(value))
    return _next(value, 1, past_end, reverse)


def _rows(cu: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """Packed rows as a padded batch (rows of zeros behind each), other tensors as two dimensions."""
    if cu is None:
        return [x if x is None or x.dim() == 2 else x[None] for x in tensors]
    sizes = (cu[1:] - cu[:-1]).tolist()
    return [None if x is None else torch.nn.utils.rnn.pad_sequence(list(x.split(sizes)), batch_first=True) if sizes else x.new_zeros(0, 0) for x in tensors]


def _unrows(cu: Tensor | None, x: Tensor, like: Tensor) -> Tensor:
    if cu is None:
        return x.reshape(like.shape)
    return torch.cat([row[:n] for row, n in zip(x, (cu[1:] - cu[:-1]).tolist(), strict=True)]) if cu.shape[0] > 1 else x.reshape(0)


def _inside(cu: Tensor | None, x: Tensor) -> Tensor:
    """Which tokens of the padded rows exist."""
    if cu is None:
        return torch.ones_like(x, dtype=torch.bool)
    return torch.arange(x.shape[1], device=x.device) < (cu[1:] - cu[:-1])[:, None]


def _arithmetic(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


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
    dtype, like = _arithmetic(rewards, values, mask), values
    rewards, values, mask, old, ref = _rows(cu_seqlens, rewards, values, mask, old_log_prob, ref_log_prob)  # type: ignore[assignment]
    out_dtype = _gae_dtype(rewards, values, mask)
    rewards, values = rewards.to(dtype), values.to(dtype)
    inside = _inside(cu_seqlens, values)
    valid = inside if mask is None else (mask != 0) & inside
    zero = torch.zeros((), dtype=dtype, device=values.device)
    if masked == "zero":
        rewards, values = torch.where(valid, rewards, zero), torch.where(valid, values, zero)
    rewards = _shaped(rewards, valid, old, ref, kl_coef, kl, kl_range)
    live = valid if masked == "skip" else inside
    past_end = torch.zeros_like(values.sum(1)) if bootstrap is None else bootstrap.to(dtype)
    decay = torch.full_like(past_end, gamma * lam) if lam_row is None else gamma * lam_row.to(dtype)
    delta = rewards + gamma * _latest(values, live, past_end) - values
    advantages = affine(torch.where(live, decay[:, None], zero + 1), torch.where(live, delta, zero), None)
    returns = _unrows(cu_seqlens, advantages + values, like)
    if whiten is not None:
        advantages = whitening.whiten("gae", advantages, valid, whiten, eps)
    return _unrows(cu_seqlens, advantages, like).to(out_dtype), returns.to(out_dtype)


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
    dtype, like, out_dtype = _arithmetic(rewards, mask), rewards, rewards.dtype
    rewards, mask, old, ref = _rows(cu_seqlens, rewards, mask, old_log_prob, ref_log_prob)  # type: ignore[assignment]
    rewards, inside = rewards.to(dtype), _inside(cu_seqlens, rewards)
    valid = inside if mask is None else (mask != 0) & inside
    zero = torch.zeros((), dtype=dtype, device=rewards.device)
    if masked == "zero":
        rewards = torch.where(valid, rewards, zero)
    rewards = _shaped(rewards, valid, old, ref, kl_coef, kl, kl_range)
    start = None if bootstrap is None else bootstrap.to(dtype)
    if masked == "turn":
        reads = valid & ~(_next(valid.to(dtype), 1, 0.0) != 0)
    else:
        reads = valid if masked in ("skip", "reset") else inside
    decay = torch.where(reads, zero + gamma, zero if masked == "reset" else zero + 1)
    decay = torch.where(inside, decay, zero + 1)
    carry = affine(decay, torch.where(reads, rewards, zero), start)
    if masked == "reset":
        past_end = torch.zeros_like(rewards.sum(1)) if start is None else start
        carry = torch.where(valid, carry, rewards + gamma * _next(carry, 1, past_end))
    shown = valid if masked in ("skip", "turn") else inside
    returns = torch.where(shown, carry, zero)
    flat = _unrows(cu_seqlens, returns, like).to(out_dtype)
    if whiten is None:
        return returns.new_empty(0, dtype=out_dtype), flat
    advantages = whitening.whiten("discounted_returns", returns, valid, whiten, eps)
    adv_dtype = torch.promote_types(out_dtype, mask.dtype) if mask is not None and mask.is_floating_point() else out_dtype
    return _unrows(cu_seqlens, advantages, like).to(adv_dtype), flat


# ---- adjoints -------------------------------------------------------------------------------------------------------
def _adjoint(x: Tensor, live: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_t = x_t + decay c_prev over live tokens, x of other tokens flowing right into the next live one.

    Returns c (0 where not live), c of the previous live token, and c of the row's last live one.
    """
    zero = torch.zeros_like(x.sum(1))
    d = torch.where(live, decay, torch.ones_like(x))  # a carry decays as it leaves a live token
    c = torch.where(live, affine(_next(d, 1, 0.0, reverse=False), x, None, reverse=False), torch.zeros_like(x))
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
    dtype, like = _arithmetic(grad_returns), grad_returns
    g, h, mask = _rows(cu_seqlens, grad_advantages, grad_returns, mask)  # type: ignore[assignment]
    g, h, inside = g.to(dtype), h.to(dtype), _inside(cu_seqlens, h)
    valid = inside if mask is None else (mask != 0) & inside
    live = valid if masked == "skip" else inside
    decay = torch.full_like(h[:, :1], gamma * lam) if lam_row is None else gamma * lam_row.to(dtype)[:, None]
    c, before, last = _adjoint(torch.where(inside, g + h, torch.zeros_like(h)), live, decay)
    d_values = h + torch.where(live, gamma * before - c, torch.zeros_like(c))
    if masked == "zero":
        c, d_values = (torch.where(valid, x, torch.zeros_like(x)) for x in (c, d_values))
    found = (_unrows(cu_seqlens, c, like), _unrows(cu_seqlens, d_values, like), gamma * last)
    return _needed(found, like, needs)  # type: ignore[return-value]


def discounted_returns_bwd(
    grad_returns: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, masked: str, gamma: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """The raw op `_discounted_returns_bwd`: (d_rewards, d_bootstrap), empty where not needed."""
    dtype, like = _arithmetic(grad_returns), grad_returns
    x, mask = _rows(cu_seqlens, grad_returns, mask)  # type: ignore[assignment]
    x, inside = x.to(dtype), _inside(cu_seqlens, x)
    valid = inside if mask is None else (mask != 0) & inside
    zero = torch.zeros_like(x)
    if masked == "reset":  # c_t = G_t + gamma m_t c_prev, on every token
        c = affine(torch.where(valid, zero + gamma, zero), torch.where(inside, x, zero), None, reverse=False)
        last = torch.where(_inside_edge(inside, True), c, zero).sum(1)
    else:
        live = inside
        if masked == "skip":
            live = valid
        elif masked == "turn":
            live = valid & ~(_next(valid.to(dtype), 1, 0.0) != 0)
        shown = valid if masked in ("skip", "turn") else inside
        c, _, last = _adjoint(torch.where(shown, x, zero), live, zero[:, :1] + gamma)
    if masked == "zero":
        c = torch.where(valid, c, zero)
    return _needed((_unrows(cu_seqlens, torch.where(inside, c, zero), like), gamma * last), like, needs)  # type: ignore[return-value]


def _needed(found: Sequence[Tensor | None], like: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(x.to(like.dtype) if need and x is not None else like.new_empty(0) for x, need in zip(found, needs, strict=True))


def _decay(decay: Tensor | None, decay_row: Tensor | None, value: float, x: Tensor, cu: Tensor | None) -> Tensor:
    """The decay as (rows, T), (rows, 1) or (1, 1), in x's dtype."""
    if decay_row is not None:
        return decay_row[:, None].to(x.dtype)
    if decay is not None:
        return _rows(cu, decay)[0].to(x.dtype)  # type: ignore[union-attr]
    return torch.full((1, 1), value, dtype=x.dtype, device=x.device)


def affine_scan(
    decay: Tensor | None,
    decay_row: Tensor | None,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
) -> Tensor:
    """The raw op `_affine_scan_fwd`; decay per token, per row (rows,), or absent with `decay_value`."""
    like = x
    rows = _rows(cu_seqlens, x)[0].to(_arithmetic(x))  # type: ignore[union-attr]
    inside = _inside(cu_seqlens, rows)
    c = torch.where(inside, _decay(decay, decay_row, decay_value, rows, cu_seqlens), torch.ones_like(rows))
    y = affine(c, rows, None if initial is None else initial.to(rows.dtype), reverse)
    return _unrows(cu_seqlens, y, like).to(like.dtype)


def affine_scan_bwd(
    grad: Tensor,
    decay: Tensor | None,
    decay_row: Tensor | None,
    y: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op `_affine_scan_bwd`: c_t = G_t + decay_prev c_prev; d_x = c, d_decay_t = c_t y_next, d_initial = decay c at the end."""
    g, out = (_rows(cu_seqlens, t)[0].to(_arithmetic(grad)) for t in (grad, y))  # type: ignore[union-attr]
    inside = _inside(cu_seqlens, g)
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    d = torch.where(inside, _decay(decay, decay_row, decay_value, g, cu_seqlens), zero + 1)
    start = torch.zeros_like(g.sum(1)) if initial is None else initial.to(g.dtype)
    c = affine(_next(d, 1, 0.0, not reverse), torch.where(inside, g, zero), None, not reverse)
    d_decay = torch.where(inside, c * _latest_or_end(out, inside, start, reverse), zero)
    d_initial = (_inside_edge(inside, reverse).to(g.dtype) * d * c).sum(1)
    c = torch.where(inside, c, zero)
    per_decay = d_decay.sum(1) if decay_row is not None else _unrows(cu_seqlens, d_decay, grad)
    found = (_unrows(cu_seqlens, c, grad), per_decay, d_initial)
    return _needed(found, grad, needs)  # type: ignore[return-value]


def _inside_edge(inside: Tensor, reverse: bool) -> Tensor:
    """The token next to `initial` in each row."""
    return inside & ~(_next(inside.float(), 1, 0.0, reverse) != 0)


def _latest_or_end(y: Tensor, inside: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """y of the token that a step read, `initial` at the edge."""
    return torch.where(_inside_edge(inside, reverse), start[:, None].expand_as(y), _next(y, 1, 0.0, reverse))
