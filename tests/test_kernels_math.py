# SPDX-License-Identifier: Apache-2.0
"""kernels/math.py against csrc/math/math.h, both through what exposes them: run by `pytest --backend triton`."""

import math
import os

import mpmath
import pytest
import torch

import rlkern
from rlkern import backends

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs interpreted: pytest --backend triton"),
    pytest.mark.skipif(backends.native is None, reason=backends.native_error),
]
EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.17e-38, 88.72, 88.73, 89.0, 89.1, -86.0, -86.1, -103.9, -104.1]
FAR = 80.0  # what the bounded forms are asked for


@triton.jit
def each(x, y, FUNCTION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, FUNCTION(tl.load(x + i)))


def twin(name, x):
    """A function of kernels/math.py, of each value."""
    from rlkern.kernels import math as twins

    padded = torch.zeros(triton.next_power_of_2(len(x)), dtype=x.dtype)
    padded[: len(x)] = x
    y = torch.empty_like(padded)
    each[(1,)](padded, y, getattr(twins, name), len(padded))
    return y[: len(x)]


def dense():
    """Every scale: near 0, across the first steps of n, over all of the range, and the ends."""
    near = torch.cat([torch.linspace(-s, s, 4001) for s in (1e-30, 1e-6, 1e-3, 0.1, 0.34657, 0.34658, 1.1)])
    return torch.cat([near, torch.linspace(-110, 95, 60001), torch.tensor(EDGES)])


def k3(d, **clamps):
    """(exp(d) - 1 - d, exp(d) - 1) of the C++ kernels: k3 and its slope."""
    lp = torch.zeros_like(d).requires_grad_()
    value = rlkern.kl_penalty(lp, d, "k3", value_range=None, **clamps)
    return value.detach(), -torch.autograd.grad(value.sum(), lp)[0]


def ratio(x):
    """exp(x) of the C++ kernels: the gradient of an unclipped policy loss with an advantage of -1."""
    zero, one = torch.zeros_like(x)[None], torch.ones_like(x)[None]
    free = {"cliprange_low": 1.0, "clip_ratio_c": None, "log_ratio_clamp": None, "batch_num_tokens": 1}
    return rlkern.policy_loss_and_grad(zero, x[None], -one, one, **free).d_log_prob[0]


def assert_same(ours, theirs, x, ulps=2):
    """The same NaNs, infinities and signs; values within `ulps` of each other."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~ours.isnan()
    assert torch.equal(ours.isinf() & known, theirs.isinf() & known)
    assert torch.equal(ours[known].sign(), theirs[known].sign())
    a, b = (v[known].view(torch.int32).long() for v in (ours, theirs))  # one sign: the integers are in the order of the floats
    gap = torch.where(ours[known] == theirs[known], 0, (a - b).abs())
    assert gap.max() <= ulps, (gap.max(), x[known][gap.argmax()])


def test_kernels_math_values(backend):
    x = dense()
    bounded = x[x.abs() <= FAR]
    with rlkern.use_backend("cpp"):
        value, slope = k3(x, log_ratio_range=None)
        short_value, short_slope = k3(bounded, log_ratio_range=(-FAR, FAR))
        exp, short_exp = ratio(x), ratio(bounded)
    assert_same(twin("exp_minus_1_minus", x), value, x)
    assert_same(twin("expm1_of", x), slope, x)
    assert_same(twin("exp_of", x), exp, x)
    assert_same(twin("exp_minus_1_minus_bounded", bounded), short_value, bounded)
    assert_same(twin("expm1_bounded", bounded), short_slope, bounded)
    assert_same(twin("exp_bounded", bounded), short_exp, bounded)


def test_kernels_math_float64(backend):
    sizes = [1e-300, 1e-8, 0.019, 0.021, 0.499, 0.501, 1.0, 20.0, 700.0]
    x = torch.cat([torch.linspace(-s, s, 101, dtype=torch.float64) for s in sizes])
    with mpmath.workdps(60):
        tail = torch.tensor([float(mpmath.expm1(v) - v) if abs(v) > 1e-20 else v * v / 2 for v in x.tolist()], dtype=torch.float64)
        expm1 = torch.tensor([float(mpmath.expm1(v)) for v in x.tolist()], dtype=torch.float64)
    eps = torch.finfo(torch.float64).eps
    for name, exact, scale in (("expm1_of", expm1, 4), ("exp_minus_1_minus", tail, 8)):
        assert ((twin(name, x) - exact).abs() <= scale * eps * exact.abs() + 5e-324).all(), name
    edges = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert twin("exp_minus_1_minus", edges)[:2].tolist() == [math.inf, math.inf]
    assert twin("expm1_of", edges)[:2].tolist() == [math.inf, -1.0]
    assert twin("exp_minus_1_minus", edges)[2].isnan()
    assert twin("expm1_of", edges)[2].isnan()


def test_kernels_math_weighted_kl(backend):
    """With an importance weight, at zeros, bounds, infinities and NaN: as the C++, to the last bits of the exponential."""
    points = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 50.0, -200.0, math.inf, -math.inf, math.nan])
    lp, ref, old = (v.reshape(-1) for v in torch.meshgrid(points, points, points, indexing="ij"))
    for name in ("k1", "abs", "k2", "k3", "k1+"):
        for ranges in ({"value_range": None, "log_ratio_range": None}, {"value_range": (-0.5, 2.0)}, {"log_ratio_range": (-1.0, 1.0)}):
            for bound in ({}, {"weight_max": 1.0}):
                found = []
                for choice in ("cpp", "triton"):
                    with rlkern.use_backend(choice):
                        a, b = lp.clone().requires_grad_(), ref.clone().requires_grad_()
                        value = rlkern.kl_penalty(a, b, name, old_log_prob=old, **ranges, **bound)
                        found.append((value.detach(), *torch.autograd.grad(value, (a, b), torch.ones_like(value))))
                for ours, theirs in zip(*found, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_kernels_math_decisions(backend):
    """Estimators and clamps at ties, zeros, infinities and NaN: equal to the C++. (Triton's -x is 0 - x: no -0 at 0.)"""
    points = torch.tensor([0.0, -0.0, 1e-45, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf, math.nan])
    lp, ref = (v.reshape(-1) for v in torch.meshgrid(points, points, indexing="ij"))
    for name in ("k1", "abs", "k2", "k1+", "abs+"):
        for ranges in ({}, {"log_ratio_range": (-1.0, 1.0), "value_range": (-0.5, 2.0)}):
            found = []
            for choice in ("cpp", "triton"):
                with rlkern.use_backend(choice):
                    a, b = lp.clone().requires_grad_(), ref.clone().requires_grad_()
                    value = rlkern.kl_penalty(a, b, name, **ranges)
                    found.append((value.detach(), *torch.autograd.grad(value, (a, b), torch.ones_like(value))))
            for ours, theirs in zip(*found, strict=True):
                assert ((ours == theirs) | (ours.isnan() & theirs.isnan())).all(), (name, ranges)
