# SPDX-License-Identifier: Apache-2.0
"""Which tokens clip-cov and kl-cov treat apart: the raw op against its specification, token by token."""

import pytest
import torch

from rlkern.reference.policy_select import policy_select
from rlkern.testing import ragged_mask

NAN = float("nan")
CLIP = "clip_cov", [0.2, 5.0, 0.2, 0.2]


def batch(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = -torch.rand(B, T, generator=g) * 3 - 0.05
    old, a = lp + 0.25 * torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    return *(x.to(dtype) for x in (old, lp, a)), ragged_mask(B, T, 0.2, seed)


def same(backend_number, old, lp, a, m, kind, numbers, a_row=None, cu=None):
    args = old, lp, a, a_row, m, cu, kind, numbers
    expected, expected_counts = policy_select(*args)
    chosen, counts = torch.ops.rlkern._policy_select_fwd(*args, backend_number)
    assert torch.equal(chosen, expected)
    assert counts.tolist() == expected_counts.tolist()
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "numbers"), [CLIP, ("kl_cov", [0.1])])
def test_policy_select_matches_the_specification(backend, backend_number, dtype, kind, numbers):
    old, lp, a, m = batch(5, 61, dtype)
    same(backend_number, old, lp, a, m, kind, numbers)
    same(backend_number, old, lp, None, m.to(torch.int64), kind, numbers, a_row=a[:, 0].contiguous())
    strided = [torch.zeros(5, 130, dtype=dtype).narrow(1, 1, 61).copy_(x) for x in (old, lp, a)]
    same(backend_number, *strided, m.bool(), kind, numbers)
    old, a = old.float(), a.float()  # mixed
    same(backend_number, old, lp, a, m, kind, numbers)
    for x in (old, lp, a):
        x[m == 0] = NAN
    same(backend_number, old, lp, a, m, kind, numbers)


@pytest.mark.parametrize(("kind", "numbers"), [CLIP, ("kl_cov", [0.3])])
def test_policy_select_edge_shapes(backend, backend_number, kind, numbers):
    for B, T in ((0, 5), (3, 0), (1, 1), (2, 17), (7, 1030)):
        old, lp, a, m = batch(B, T)
        same(backend_number, old, lp, a, m, kind, numbers)
        same(backend_number, old, lp, a, m * 0, kind, numbers)
    old, lp, a, m = batch(4, 37)
    inside = torch.arange(37) < torch.tensor([37, 0, 5, 20])[:, None]
    cu = torch.tensor([0, 37, 37, 42, 62])
    packed = [x[inside] for x in (old, lp, a, m)]
    same(backend_number, *packed, kind, numbers, cu=cu)
    same(backend_number, *packed[:2], None, packed[3], kind, numbers, a_row=a[:, 0].contiguous(), cu=cu)
    same(backend_number, *packed[:2], None, packed[3], kind, numbers, a_row=a[:, 0].double(), cu=cu)


def test_policy_select_ties(backend, backend_number):
    """Of equal covariances the first by position; sums of these values are exact."""
    for B, T, share in (
        (1, 64, 0.25),
        (1, 64, 0.5),
        (2, 512, 0.3),
        (4, 2048, 0.25),
        (4, 2048, 1 / 128),
        (1, 8, 1.0),
        (1, 8, 2.0),
        (1, 8, 1e-9),
    ):
        n = B * T
        a = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).view(B, T)
        lp = torch.where(torch.arange(n) % 4 < 2, -0.5, -1.5).view(B, T)  # means 0 and -1: four covariances, two signs
        for m in (torch.ones(B, T), (torch.arange(n) % 8 < 4).view(B, T)):
            chosen = same(backend_number, lp, lp, a, m, "kl_cov", [share])
            assert int(chosen.sum()) == min(max(int(share * m.sum()), 1), int(m.sum()))
        first = same(backend_number, lp, lp, a * 0, torch.ones(B, T), "kl_cov", [share]).flatten()
        assert first[: int(first.sum())].all()


def test_policy_select_shows_nan(backend, backend_number):
    """A NaN is the largest covariance, and no candidate."""
    for i in range(3):
        old, lp, a, m = batch(3, 40)
        (old, lp, a)[i][1, 3] = NAN
        m[1, 3] = 1
        for kind, numbers in (CLIP, ("kl_cov", [0.01]), ("kl_cov", [0.5])):
            same(backend_number, old, lp, a, m, kind, numbers)
