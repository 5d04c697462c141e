# SPDX-License-Identifier: Apache-2.0
"""Decisions of the losses' twins at ties, edges, infinities and NaN: those of csrc/math/loss.h. Run by `pytest --backend triton`.

A tie needs equal bits on both sides, and the twins' exponentials may differ by 2 ulp: ties are sought among the log-ratios
whose exponential is the same in both.
"""

import itertools
import math
import os

import pytest
import torch

import rlkern
from rlkern import backends

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs interpreted: pytest --backend triton"),
    pytest.mark.skipif(backends.native is None, reason=backends.native_error),
]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 20.0001, 90.0, -110.0, math.inf, -math.inf, math.nan]
ADVANTAGES = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -2.5, math.inf, -math.inf, math.nan])


def both(call):
    """What the C++ and the interpreted twin make of it."""
    found = []
    for name in ("cpp", "triton"):
        with rlkern.use_backend(name):
            found.append(call())
    return found


def policy(x, advantages, **options):
    """The gradient of each pair, the sums and maxes of all: tokens of one row."""
    x, a = (v.reshape(1, -1) for v in torch.meshgrid(x, advantages, indexing="ij"))
    options = {"loss_agg_mode": "token-sum", "log_ratio_clamp": None} | options
    found = rlkern.policy_loss_and_grad(torch.zeros_like(x), x, a, torch.ones_like(x), **options)
    return found.d_log_prob[0], found.metrics.sums, found.metrics.maxes


def same_decisions(ours, theirs):
    """NaN, infinities, zeros and signs alike, values within 2 ulp."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~ours.isnan()
    a, b = ours[known], theirs[known]
    assert torch.equal(a.sign(), b.sign())
    assert torch.equal(a.isinf(), b.isinf())
    gap = torch.where(a == b, 0, (a.view(torch.int32).long() - b.view(torch.int32).long()).abs())
    assert not gap.numel() or gap.max() <= 2


def equal_ratios(count):
    """Log-ratios and their exponential, where both sides give the same bits."""
    x = torch.cat([torch.linspace(-3, 3, 4001), torch.tensor([0.0])])
    free = {"cliprange_low": 1.0, "cliprange_high": 1e30, "clip_ratio_c": None}
    r, other = both(lambda: policy(x, torch.tensor([-1.0]), **free)[0])
    alike = r == other
    assert alike[-1]
    assert alike.float().mean() > 0.5
    pick = torch.linspace(0, int(alike.sum()) - 1, count).long()
    return x[alike][pick], r[alike][pick]


@pytest.mark.parametrize("clamp", [None, 20.0, 0.5])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_kernels_ties_special_values(backend, clamp, cap):
    x = torch.cat([torch.tensor(SPECIAL), torch.linspace(-1.5, 1.5, 301)])
    (d, sums, maxes), (e, other_sums, other_maxes) = both(lambda: policy(x, ADVANTAGES, log_ratio_clamp=clamp, clip_ratio_c=cap))
    same_decisions(e, d)
    for i in (0, 1, 2, 3, 8):  # tokens, sequences, clipped, clipped_lower, nonfinite: counts
        assert sums[i] == other_sums[i]
    assert torch.allclose(maxes, other_maxes, rtol=1e-6, atol=0, equal_nan=True)


def test_kernels_ties_at_every_edge(backend):
    """The ratio on the upper clip, the lower clip and the dual clip, and one ulp to each side."""
    for x, r in zip(*equal_ratios(24), strict=True):
        edges = {"cliprange_high": float(r) - 1} if r > 1 else {"cliprange_low": 1 - float(r)}
        dual = {"clip_ratio_c": float(r)} if r > 1 else {}
        for options in (edges, {"cliprange": 0.1} | dual, edges | dual):
            (d, sums, _), (e, other_sums, _) = both(lambda o=options, x=x: policy(x.reshape(1), ADVANTAGES, **o))
            same_decisions(e, d)
            assert torch.equal(sums[2:4], other_sums[2:4])


def test_kernels_ties_value_loss(backend):
    points = [0.0, -0.0, 0.5, -0.5, 1.0, 2.0, math.inf, -math.inf, math.nan]
    v, ret, old = (torch.tensor(c)[None] for c in zip(*itertools.product(points, points, points), strict=True))
    for cliprange, delta in ((0.5, None), (0.0, None), (1.0, None), (0.5, 1.0), (None, 0.5)):
        options = {"cliprange_value": cliprange, "huber_delta": delta, "loss_agg_mode": "token-sum"}

        def call(options=options):
            leaf = v.clone().requires_grad_()
            found = rlkern.value_loss(leaf, ret, old, torch.ones_like(v), **options)
            found.loss.backward()
            return leaf.grad[0], found.metrics.sums

        (d, sums), (e, other_sums) = both(call)
        same_decisions(e, d)
        for i in (0, 1, 2, 5):  # tokens, sequences, clipped, nonfinite
            assert sums[i] == other_sums[i]
