# SPDX-License-Identifier: Apache-2.0
"""Packed rows (cu_seqlens) equal the same rows one by one, for the row-wise whitening; the scans, the losses and the rewards
have theirs beside their own tests. Estimators under verl's names take padded batches, as verl has them."""

import pytest
import torch

import rlkern

LENGTHS = [5, 0, 33, 1, 40, 300]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def packed():
    g = torch.Generator().manual_seed(0)
    values, weights = (torch.randn(sum(LENGTHS), generator=g) for _ in range(2))
    mask = (torch.rand(sum(LENGTHS), generator=g) < 0.7).long()
    return values, mask, weights


def rows():
    return [slice(int(CU[i]), int(CU[i + 1])) for i, n in enumerate(LENGTHS) if n]


@pytest.mark.parametrize("options", [{}, {"mask_output": False}, {"unbiased": True, "eps_mode": "add", "eps": 0.1}])
def test_masked_normalize_packed(backend, options):
    values, mask, weights = packed()
    for m in (mask, mask.bool(), None):
        x = values.clone().requires_grad_()
        got = rlkern.masked_normalize(x, m, cu_seqlens=CU, **options)
        (grad,) = torch.autograd.grad((got * weights).sum(), x)
        for row in rows():
            y = values[None, row].clone().requires_grad_()
            alone = rlkern.masked_normalize(y, None if m is None else m[None, row], **options)
            (d,) = torch.autograd.grad((alone * weights[None, row]).sum(), y)
            torch.testing.assert_close(got[row], alone[0], rtol=2e-6, atol=2e-6, equal_nan=True)
            torch.testing.assert_close(grad[row], d[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    out = torch.empty_like(values)
    assert rlkern.masked_normalize(values, mask, cu_seqlens=CU, out=out, **options) is out
    again = rlkern.masked_normalize(values, mask, cu_seqlens=CU, **options)
    assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0))  # one token has no sample variance


def test_masked_normalize_packed_gradcheck(backend):
    values = packed()[0]
    cu, few, m = torch.tensor([0, 4, 4, 9]), values[:9].double().requires_grad_(), torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda v: rlkern.masked_normalize(v, m, cu_seqlens=cu), (few,))
    assert torch.autograd.gradgradcheck(lambda v: rlkern.masked_normalize(v, m, cu_seqlens=cu), (few,))


def test_masked_normalize_packed_rejects(backend):
    values, mask, _ = packed()
    with pytest.raises(ValueError, match=r"rlkern\.masked_normalize: values must be \(N,\) with cu_seqlens"):
        rlkern.masked_normalize(values[None], mask[None], cu_seqlens=CU)
    with pytest.raises(ValueError, match=r"rlkern\.masked_normalize: cu_seqlens must run from 0"):
        rlkern.masked_normalize(values, mask, cu_seqlens=CU[:-1])
