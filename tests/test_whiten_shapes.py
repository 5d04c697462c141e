# SPDX-License-Identifier: Apache-2.0
"""Whitening and its reductions over rows whose starts lie at other offsets from 16 bytes, more of them than a GPU's threads keep in
registers: some rows then have a piece less than others."""

import pytest
import torch

import rlkern
from rlkern.testing import assert_within, ragged_mask

WIDE = 3 * torch.randn(9, 4001, generator=torch.Generator().manual_seed(0)) + 2
MASKS = {
    "mask": ragged_mask(9, 4001, 0.2)[:, 1:],
    "weights": (ragged_mask(9, 4001, 0.2) * (torch.arange(4001) % 3 + 1) / 2)[:, 1:],
}


def whitened(v, mask):
    """By the definition, and differentiable."""
    w = mask.to(v.dtype)
    seen = torch.where(w != 0, v, 0.0)
    mean = (w * seen).sum() / w.sum()
    var = (w * torch.where(w != 0, seen - mean, 0.0) ** 2).sum() / (w.sum() - 1)
    return (v - mean) * (var + 1e-8).rsqrt()


def gradient(of, v, mask):
    v = v.detach().requires_grad_()
    y = of(v, mask)
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum(), v)[0]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gapless", [False, True])
def test_whiten_uneven_rows(backend, gapless, mask):
    v = WIDE[:, 1:].contiguous() if gapless else WIDE[:, 1:]
    exact = whitened(v.double(), mask)
    assert_within(rlkern.masked_whiten(v, mask), whitened(v, mask), exact, 2 * exact.abs().max() + 2, "values")
    exact = gradient(whitened, v.double(), mask)
    assert_within(gradient(rlkern.masked_whiten, v, mask), gradient(whitened, v, mask), exact, 8 * exact.abs().max() + 8, "gradient")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_moments_uneven_rows(backend, mask):
    found, w = rlkern.masked_moments(WIDE[:, 1:], mask), mask.double()
    seen = torch.where(w != 0, WIDE[:, 1:].double(), 0.0)
    mean = (w * seen).sum() / w.sum()
    assert found.count == w.sum()
    assert float(found.mean) == pytest.approx(float(mean), rel=1e-12)
    assert float(found.m2) == pytest.approx(float((w * torch.where(w != 0, seen - mean, 0.0) ** 2).sum()), rel=1e-12)
