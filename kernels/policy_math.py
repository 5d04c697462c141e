# SPDX-License-Identifier: Apache-2.0
"""The twins of the variants in csrc/math/loss.h: a token's loss and its derivative, by the log of the ratio where the loss goes
through it, else by log_prob; whether it is clipped, and clipped by the second bound.

`c` is (low, high, cap, clamp, log_low, log_high, own0, own1): bounds of the ratio, of a log-ratio, the variant's own numbers.
"""

import triton
import triton.language as tl

from rlkern.kernels import math

LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def clip_token(r, a, c):
    """max(-A r, -A clip(r)), where A < 0 at most -A cap; own0 is the share of the gradient where that ties."""
    gain, harm = a > 0, a < 0
    low, high, cap = c[0], c[1], c[2]
    best = math.clamped(r, tl.where(harm, low, float("-inf")), tl.where(harm, cap, tl.where(gain, high, float("inf"))))
    loss = -a * best
    grad = tl.where((best < r) | (best > r), 0.0, tl.where((r == cap) & harm, c[6] * loss, loss))
    return loss, grad, ((r > high) & gain) | ((r < low) & harm), (r > cap) & harm


@triton.jit
def kl_cov_token(x, r, a, penalty):
    """-A r + penalty |x|"""
    plain = -a * r
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    none = (x != x) & (x == x)
    there = penalty != 0
    return tl.where(there, tl.fma(penalty, tl.abs(x), plain), plain), tl.where(there, tl.fma(penalty, sign, plain), plain), none, none


@triton.jit
def sapo_token(r, a, c):
    """-A (4 / tau) sigmoid(tau (r - 1)), tau = own0 where A > 0, else own1"""
    tau = tl.where(a > 0, c[6], c[7])
    z = tau * (r - 1.0)
    e = math.exp_bounded(tl.where(tl.abs(z) > 80, -80.0, -tl.abs(z)))
    share = 1.0 / (1.0 + e)
    sigmoid = tl.where(z < 0, e * share, share)
    factor = -a * 4.0
    none = (r != r) & (r == r)
    return factor / tau * sigmoid, factor * (e * share * share) * r, none, none


@triton.jit
def gated_token(r, lp, old, a, opened, c):
    """-A min(r, cap) log_prob where open; a NaN shows, open or not"""
    lost = a * (lp - old)
    score = tl.where(opened, a * tl.where(r > c[2], c[2], r), 0.0)
    score = tl.where(lost != lost, lost, score)
    return -score * lp, -score, opened == 0, opened & (r > c[2])


@triton.jit
def dppo_tv_token(r, lp, old, a, c):
    moved, gain = math.exp_of(lp) - math.exp_of(old), a > 0
    return gated_token(r, lp, old, a, tl.where(gain, moved <= c[5], moved >= -c[4]), c)


@triton.jit
def dppo_kl_token(r, lp, old, a, c):
    p, q = math.expm1_of(lp), math.expm1_of(old)  # less one
    tiny = tl.zeros_like(p) + 1e-8
    divergence = tl.fma(-q, math.log_of((tiny - q) / (tiny - p)), (q + 1.0) * (old - lp))
    return gated_token(r, lp, old, a, tl.where(a > 0, (divergence <= c[5]) | (p <= q), (divergence <= c[4]) | (p >= q)), c)


@triton.jit
def geo_mean_part(x, a, c):
    """A token's part of the row's mean: x up to high where A > 0, down to -low where A < 0, nothing at 0."""
    up, down = tl.where(x > c[5], c[5], x), tl.where(x < -c[4], -c[4], x)
    return tl.where(a > 0, up, tl.where(a < 0, down, 0.0 * (a + x)))


@triton.jit
def geo_mean_token(x, a, of_row, c):
    gain, harm, above, below = a > 0, a < 0, x > c[5], x < -c[4]
    blocked = (gain & above) | (harm & below) | (a == 0)
    loss = of_row + tl.zeros_like(x)
    return loss, tl.where(blocked, 0.0, loss), (above | below) & gain, (above | below) & harm


@triton.jit
def variant_token(x, r, lp, old, a, penalty, of_gain, of_harm, c, KIND: tl.constexpr):
    if KIND == "clip":
        return clip_token(r, a, c)
    elif KIND == "kl_cov":
        return kl_cov_token(x, r, a, penalty)
    elif KIND == "sapo":
        return sapo_token(r, a, c)
    elif KIND == "dppo_tv":
        return dppo_tv_token(r, lp, old, a, c)
    elif KIND == "dppo_kl":
        return dppo_kl_token(r, lp, old, a, c)
    elif KIND == "geo_mean":
        return geo_mean_token(x, a, of_gain, c)
    else:
        none = (lp != lp) & (lp == lp)
        if KIND == "dro":  # own0 x^2 / 2 - A log_prob
            return 0.5 * (c[6] * x) * x - a * lp, tl.fma(c[6], x, -a), none, none
        elif KIND == "cispo":  # -clip(r) A log_prob
            kept = math.clamped(r, c[0], c[1])
            return -(kept * a) * lp, -(kept * a), (kept < r) | (kept > r), none
        elif KIND == "topr":  # -A log_prob, times min(r, 1) unless A > 0
            kept = tl.where(a > 0, 1.0, tl.where(r > 1, 1.0, r)) * a
            return -kept * lp, -kept, (r > 1) & (a < 0), none
        elif KIND == "vespo":
            kept = tl.where(a >= 0, of_gain, of_harm) * a
            return -kept * lp, -kept, none, none
        else:  # -A log_prob
            return -a * lp, -a, none, none


@triton.jit
def vespo_weight(total, k, lam):
    """exp(lam + k L - lam e^L), 0 where that is infinite."""
    found = math.exp_of(tl.where(lam > 1e-4, lam, 1e-4) * -math.expm1_of(total) + k * total)
    return tl.where(found > 1.7976931348623157e308, 0.0, found)
