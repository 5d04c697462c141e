# SPDX-License-Identifier: Apache-2.0
"""The policy losses in plain torch: one function a variant, each value next to its derivative, then one frame for them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.reference.kl import kl_grad, kl_smooth, kl_value, wide
from rlkern.reference.loss import agg_weights, row_ids, row_sums, scattered, select, spread


class Operands(NamedTuple):
    """What a policy loss reads: each operand per token in the arithmetic dtype, 0 at masked tokens."""

    ids: Tensor | None
    cu: Tensor | None
    valid: Tensor
    n: Tensor  # valid tokens of each row
    dtype: torch.dtype
    log_prob: Tensor
    log_ratio: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_log_prob: Tensor | None
    entropy: Tensor | None
    selected: Tensor | None
    everywhere: Tensor | None  # the row sums of the logs of the weights, masked tokens too

    def rows(self, x: Tensor) -> Tensor:
        """(rows,) sums over valid tokens, in the wide type."""
        return row_sums(torch.where(self.valid, x, torch.zeros_like(x)), self.ids, self.cu)

    def each(self, per_row: Tensor) -> Tensor:
        """One number a row, at each of its tokens."""
        return spread(per_row, self.valid, self.ids)


class Terms(NamedTuple):
    """What a variant makes of its tokens; `grad` is by the log of the ratio where the loss goes through it, else by log_prob."""

    loss: Tensor
    grad: Tensor
    clipped: Tensor
    lower: Tensor


# ---- one variant each: x is the log-ratio, of the token or of its row; n = (low, high, cap, clamp, and its own numbers) ----
def clip(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """max(-A r, -A clip(r)), where A < 0 at most -A cap; n[4] is the share of the gradient where that ties, n[5] the most that a
    behaviour weight may be."""
    low, high, cap = n[:3]
    a, ratio = o.advantages, x.exp().to(o.dtype)
    plain, other = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    clipped, worse = other > plain, torch.maximum(plain, other)
    most, negative = -a * cap, a < 0
    lower = (worse > most) & negative
    grad = torch.where((worse == most) & negative, n[4] * plain, plain)
    grad = torch.where(clipped | lower, torch.zeros_like(grad), grad)
    loss = torch.where(lower, most, worse)
    if o.selected is not None:  # clip-cov: these tokens leave the loss
        loss, grad = (torch.where(o.selected, torch.zeros_like(v), v) for v in (loss, grad))
        clipped = o.selected
    return Terms(loss, grad, clipped, lower)


def kl_cov(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-A r, and coef |x| more at selected tokens."""
    plain = -o.advantages * x.exp()
    selected = torch.zeros_like(o.valid) if o.selected is None else o.selected
    loss = torch.where(selected, plain + n[4] * x.abs(), plain)
    return Terms(loss, torch.where(selected, plain + n[4] * x.sign(), plain), *_none(o))


def sapo(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A."""
    ratio = x.exp().to(o.dtype)
    tau = torch.where(o.advantages > 0, torch.full_like(ratio, n[4]), torch.full_like(ratio, n[5]))
    z = tau * (ratio - 1)
    slope = z.sigmoid() * (-z).sigmoid()
    return Terms(-o.advantages * (4 / tau) * z.sigmoid(), -o.advantages * 4 * (slope * ratio), *_none(o))


def reinforce(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    return Terms(-o.advantages * o.log_prob, -o.advantages, *_none(o))


def cispo(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-sg(clip(r)) A log_prob."""
    ratio = x.detach().exp().to(o.dtype)
    kept = ratio.clamp(1 - n[0], 1 + n[1])
    return Terms(-kept * o.advantages * o.log_prob, -kept * o.advantages, ratio != kept, torch.zeros_like(o.valid))


def topr(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-A log_prob, times sg(min(r, 1)) unless A > 0."""
    ratio, gain = x.detach().exp().to(o.dtype), o.advantages > 0
    kept = torch.where(gain, torch.ones_like(ratio), ratio.clamp(max=1)) * o.advantages
    return Terms(-kept * o.log_prob, -kept, (ratio > 1) & (o.advantages < 0), torch.zeros_like(o.valid))


def dppo_tv(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-A sg(min(r, cap)) log_prob, while the probability has moved by at most `high` (A > 0), `low` else."""
    p, q = o.log_prob.detach().exp(), (o.log_prob - o.log_ratio).detach().exp()
    return _gated(torch.where(o.advantages > 0, p - q <= n[1], p - q >= -n[0]), x, o, n)


def dppo_kl(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """The same, gated by the divergence of two coins."""
    old = (o.log_prob - o.log_ratio).detach()
    p, q = o.log_prob.detach().exp(), old.exp()
    # 1 - q + 1e-8 over 1 - p + 1e-8, without the cancellation of 1 - p near p = 1
    rest, kept = 1e-8 - torch.expm1(old), 1e-8 - torch.expm1(o.log_prob.detach())
    divergence = -q * o.log_ratio.detach() - torch.expm1(old) * torch.log(rest / kept)
    gain = (divergence <= n[1]) | (p <= q)
    return _gated(torch.where(o.advantages > 0, gain, (divergence <= n[0]) | (p >= q)), x, o, n)


def _gated(open_: Tensor, x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    ratio = x.detach().exp()
    kept = torch.where(open_, o.advantages * ratio.clamp(max=n[2]), torch.zeros_like(ratio))
    lost = o.advantages.isnan() | o.log_ratio.isnan()
    kept = torch.where(lost, o.advantages * o.log_ratio.detach(), kept)
    return Terms(-kept * o.log_prob, -kept, ~open_, open_ & (ratio > n[2]))


def dro(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-(A log_prob - beta x^2 / 2)."""
    loss = -(o.advantages * o.log_prob - 0.5 * n[4] * x.square())
    return Terms(loss, n[4] * x - o.advantages, *_none(o))


def vespo(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-sg(phi) A log_prob, phi = exp(lam + k L - lam e^L) by the sign of A; L is the row's sum of log-ratios and log-weights."""
    total = o.rows(o.log_ratio.detach().clamp(-20, 20))
    total = (total if o.everywhere is None else total + o.everywhere).clamp(_LOG_TINY, 20)

    def phi(k: float, lam: float) -> Tensor:
        found = (max(lam, 1e-4) * (1 - total.exp()) + k * total).exp()
        return o.each(torch.where(found.isfinite() | total.isnan(), found, torch.zeros_like(found)).to(o.dtype))

    kept = torch.where(o.advantages >= 0, phi(n[4], n[5]), phi(n[6], n[7])) * o.advantages
    return Terms(-kept * o.log_prob, -kept, *_none(o))


def geo_mean(x: Tensor, o: Operands, n: Sequence[float]) -> Terms:
    """-mean(A) exp(mean of clipped x) of the row, the same at each of its tokens; weights by their geometric mean."""
    a, count = o.advantages, o.n.clamp(min=1)
    gain, harm = a > 0, a < 0
    zero, above, below = torch.zeros_like(x), x > n[1], x < -n[0]
    y = torch.where(gain, x.clamp(max=n[1]), torch.where(harm, x.clamp(min=-n[0]), zero * (a + x)))
    row = -o.rows(a) / count * (o.rows(y) / count).exp()
    if o.weights is not None:
        row = row * (o.rows((o.weights + 1e-10).log()) / count).exp()
    each = o.each(row.to(o.dtype))
    passes = (gain & ~above) | (harm & ~below) | (a + x).isnan()
    clipped = above | below
    return Terms(each, torch.where(passes, each, zero), clipped & gain, clipped & harm)


def _none(o: Operands) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(o.valid), torch.zeros_like(o.valid)


_LOG_TINY = -18.420680743952367  # log 1e-8
KINDS: dict[str, Callable[[Tensor, Operands, Sequence[float]], Terms]] = {
    f.__name__: f for f in (clip, kl_cov, sapo, reinforce, cispo, dppo_tv, dppo_kl, dro, vespo, geo_mean, topr)
}
THROUGH_RATIO = ("clip", "kl_cov", "sapo")  # the others' gradient is that of log_prob itself
OWN_WEIGHTS = ("vespo", "geo_mean")  # where weights do not multiply the token's loss


# ---- the frame --------------------------------------------------------------------------------------------------------
def operands(log_prob: Tensor, entropy: Tensor | None, others: Sequence[Any], kind: str, behave_cap: float) -> Operands:
    """`others`: old_log_prob, advantages, their row form, mask, weights, their row form, ref_log_prob, selected, behave, counts,
    cu_seqlens."""
    old, adv, adv_row, mask, w, w_row, ref, selected, behave, _, cu = others
    ids, valid = row_ids(log_prob, cu), mask != 0
    adv = adv if adv is not None else spread(adv_row, log_prob, ids)
    dtype = wide(old, log_prob, adv, w, w_row, ref, entropy)
    everywhere = None
    if kind == "vespo" and (w is not None or w_row is not None):
        logs = (w_row if w is None else w).to(row_sums(valid, ids, cu).dtype).log().clamp(_LOG_TINY, 20)
        everywhere = logs if w is None else row_sums(logs, ids, cu)
    w = w if w is not None or w_row is None else spread(w_row, log_prob, ids)
    lp, old_lp, a = (select(valid, x, dtype) for x in (log_prob, old, adv))
    if behave is not None:
        found = (old_lp - select(valid, behave, dtype)).exp()
        found = torch.where(found > behave_cap, torch.zeros_like(found), found)
        w = found if w is None else w * found
    w = w if w is None else torch.where(valid, w.to(dtype), torch.ones((), dtype=dtype, device=w.device))
    ref, entropy = (None if x is None else select(valid, x, dtype) for x in (ref, entropy))
    chosen = None if selected is None else (selected != 0) & valid
    return Operands(ids, cu, valid, row_sums(valid, ids, cu), dtype, lp, lp - old_lp, a, w, ref, entropy, chosen, everywhere)


class Evaluated(NamedTuple):
    loss: Tensor
    grad: Tensor
    clipped: Tensor
    lower: Tensor
    x: Tensor  # the token's clamped log-ratio
    kl: Tensor | None
    kl_grad: Tensor | None  # by log_prob, of the KL alone
    of_ratio: Tensor | None  # by the log of the ratio, of the factor before it


def ratio_of(o: Operands, level: str, row_grad: bool, clamp: float) -> tuple[Tensor, Tensor, Tensor]:
    """(the log of the ratio, where its clamp blocks the gradient, the token's own clamped log-ratio)."""
    raw = o.log_ratio
    if level == "token":
        x = raw.clamp(-clamp, clamp)
        return x, raw.abs() > clamp, x
    total = o.rows(raw)
    s = o.each(total / o.n.clamp(min=1) if level == "sequence" else total)
    x = s.clamp(max=clamp)
    return x if row_grad else raw - raw.detach() + x.detach(), s > clamp, raw


def evaluate(o: Operands, kind: str, level: str, flags: list[bool], clip: Sequence[float], kl: str, kl_range: list[float]) -> Evaluated:
    row_grad, by_ratio = flags
    x, blocked, own = ratio_of(o, level, row_grad, clip[3])
    t = KINDS[kind](x, o, clip)
    through = kind in THROUGH_RATIO
    loss, grad = t.loss, torch.where(blocked, torch.zeros_like(t.grad), t.grad) if through else t.grad
    if o.weights is not None and kind not in OWN_WEIGHTS:
        loss, grad = loss * o.weights, grad * o.weights
    term = slope = factor = None
    if o.ref_log_prob is not None:
        args = (o.log_prob, o.ref_log_prob, kl, kl_range)
        term, slope = kl_value(*args), kl_grad(*args)
        if by_ratio:
            ratio = x.exp().to(o.dtype)
            term, slope = term * ratio, slope * ratio
            factor = torch.where(blocked, torch.zeros_like(term), term)
    own = -own.abs() if kind == "kl_cov" else own
    return Evaluated(loss, grad, t.clipped, t.lower, own, term, slope, factor)


def policy_variant(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor | None,
    advantages_row: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    weights_row: Tensor | None,
    ref_log_prob: Tensor | None,
    entropy: Tensor | None,
    selected: Tensor | None,
    behave: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    level: str,
    flags: list[bool],
    clip: list[float],
    mode: str,
    numbers: list[float],
    kl: str,
    kl_range: list[float],
    coefs: list[float],
    loss_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op `_policy_variant_fwd`: (loss, sums, maxes, d_log_prob, d_entropy); flags: the gradient goes through the row,
    the KL term is multiplied by the ratio."""
    others = (old_log_prob, advantages, advantages_row, mask, weights, weights_row, ref_log_prob, selected, behave, counts, cu_seqlens)
    o = operands(log_prob, entropy, others, kind, clip[5])
    e = evaluate(o, kind, level, flags, clip, kl, kl_range)
    row_weight, scale = agg_weights(mode, o.n, numbers, counts)

    def aggregated(x: Tensor) -> Tensor:
        return (o.rows(x) * row_weight).sum() * scale

    pg_loss = total = aggregated(e.loss)
    kl_loss = entropy_loss = torch.zeros_like(total)
    if e.kl is not None:
        kl_loss = aggregated(e.kl)
        total = total + coefs[0] * kl_loss if coefs[0] != 0 else total
    if o.entropy is not None:
        entropy_loss = aggregated(o.entropy)
        total = total - coefs[1] * entropy_loss if coefs[1] != 0 else total
    found = (o.valid, o.n > 0, e.clipped & o.valid, e.lower & o.valid, -o.rows(e.x), pg_loss, kl_loss, entropy_loss)
    bad = (~e.loss.isfinite() & o.valid).sum()
    sums = torch.stack([v.sum().to(o.n.dtype) for v in (*found, bad)])
    g = o.each(row_weight * scale)
    d_log_prob = scattered(_gradient(o, e, kind, level, flags[0], coefs[0], row_weight * scale), o.valid, log_prob, needs[0], needs[2])
    of = log_prob if entropy is None else entropy
    d_entropy = scattered(-coefs[1] * g, o.valid, of, needs[1] and entropy is not None, needs[2])
    clamp = clip[3] if level == "token" else float("inf")
    return total.to(loss_dtype), sums, maxes(o.log_ratio, o.valid, clamp, o.n.dtype), d_log_prob, d_entropy


def policy_loss(old_log_prob: Tensor, log_prob: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op `_policy_loss_fwd`: the clipped loss of the token's own ratio."""
    *tensors, counts, cu_seqlens, clip, mode, numbers, kl, kl_range, coefs, loss_dtype, needs = rest
    choice: tuple[Any, ...] = (None, None, counts, cu_seqlens, "clip", "token", [False, False], [*clip, 0.5, torch.inf])
    return policy_variant(*(old_log_prob, log_prob, *tensors, *choice, mode, numbers, kl, kl_range, coefs, loss_dtype, needs))


def _gradient(o: Operands, e: Evaluated, kind: str, level: str, row_grad: bool, kl_coef: float, weight: Tensor) -> Tensor:
    """d loss / d log_prob: what goes through the ratio of the row is shared by its tokens."""
    by_token, by_ratio = (None, e.grad) if kind in THROUGH_RATIO else (e.grad, None)
    if e.kl_grad is not None and kl_coef != 0:
        slope = kl_coef * e.kl_grad
        by_token = slope if by_token is None else by_token + slope
        if e.of_ratio is not None:
            by_ratio = kl_coef * e.of_ratio if by_ratio is None else by_ratio + kl_coef * e.of_ratio
    if by_ratio is not None and level != "token" and row_grad:
        shared = o.rows(by_ratio) * weight / (o.n.clamp(min=1) if level == "sequence" else 1)
        found = o.each(shared)
        return found if by_token is None else found + by_token * o.each(weight)
    parts = [x for x in (by_token, by_ratio) if x is not None]
    return (parts[0] if len(parts) == 1 else parts[0] + parts[1]) * o.each(weight)


def maxes(raw: Tensor, valid: Tensor, clamp: float, dtype: torch.dtype) -> Tensor:
    """(the largest ratio, the largest size of a log-ratio); a NaN is left out."""
    seen = valid & ~raw.isnan()
    if raw.numel() == 0:
        return torch.zeros(2, dtype=dtype, device=raw.device)
    most = torch.where(seen, raw, -torch.inf).amax().to(dtype).clamp(max=clamp)
    return torch.stack([most.exp(), torch.where(seen, raw.abs(), torch.zeros_like(raw)).amax().to(dtype)])


def smooth(log_prob: Tensor, entropy: Tensor | None, others: Sequence[Any], settings: Sequence[Any]) -> Tensor:
    """The loss as autograd may differentiate it twice, in log_prob and entropy; "+" estimators stand by k2."""
    kind, level, flags, clip, mode, numbers, kl, kl_range, (kl_coef, entropy_coeff), _ = settings
    o = operands(log_prob, entropy, others, kind, clip[5])
    x = ratio_of(o, level, flags[0], clip[3])[0]
    value = KINDS[kind](x, o, clip).loss
    value = value if o.weights is None or kind in OWN_WEIGHTS else value * o.weights
    if o.ref_log_prob is not None and kl_coef != 0:
        term = kl_smooth(o.log_prob, o.ref_log_prob, kl, kl_range)
        value = value + kl_coef * (term * x.exp().to(o.dtype) if flags[1] else term)
    if o.entropy is not None:
        value = value - entropy_coeff * o.entropy
    row_weight, scale = agg_weights(mode, o.n, numbers, others[-2])
    return (o.rows(value) * row_weight).sum() * scale
