# SPDX-License-Identifier: Apache-2.0
"""Tensors as the rows of a Triton launch, aligned and not: run by `pytest --backend triton`."""

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


def both(op, *args, **options):
    found = []
    for name in ("triton", "cpp"):
        with rlkern.use_backend(name):
            found.append(op(*args, **options))
    return found


# (tokens, width of the buffer, its offset, why)
ROWS = [
    (16, 32, 0, "aligned, one block"),
    (2064, 2080, 16, "aligned, past one block of a row, which ends inside the second"),
    (4096, 4096, 0, "aligned, whole blocks"),
    (2064, 2080, 1, "the strides are aligned, the address is not"),
    (2064, 2065, 0, "the address is aligned, the stride is not"),
    (2063, 2080, 0, "T is not aligned"),
]


@pytest.mark.parametrize(("T", "width", "offset", "why"), ROWS)
def test_kernels_rows_equal_native(backend, T, width, offset, why):
    def tokens():
        return torch.randn(3, width + offset)[:, offset : T + offset]

    lp, ref, rewards, mask = tokens(), tokens(), tokens(), tokens() > 0
    mask[1] = False
    column = lp[:, :1].expand(3, T)
    for pair in ((lp, ref), (column, ref), (lp, column), (lp.bfloat16(), ref.bfloat16()), (lp.double(), ref)):
        assert torch.equal(*both(rlkern.kl_penalty, *pair))
    for given in (rewards, rewards[:, 0]):
        assert torch.equal(*both(rlkern.shape_rewards, given, lp, ref, mask, kl_coef=0.5))  # a power of two: fused or not


def test_kernels_rows_round_to_nearest(backend):
    """float64 arithmetic into a bfloat16 gradient, NaN and infinity among it."""
    lp, ref = torch.randn(1000).bfloat16().requires_grad_(), torch.randn(1000).double()
    ref[:3] = torch.tensor([torch.nan, torch.inf, 3.4e38])
    ours, theirs = both(lambda: torch.autograd.grad(rlkern.kl_penalty(lp, ref, "k2").sum(), lp)[0])
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_kernels_rows_layout(backend):
    from rlkern.kernels import launch

    x = torch.randn(4, 64)
    assert launch.rows((x, None)) == (4, 4, (4, 0), (1, 1), True)
    assert launch.rows((x, x), flat=True) == (1, 16, (0, 0), (1, 1), True)
    assert launch.rows((x[:, :63],)) == (4, 63, (64,), (1,), False)
    assert launch.rows((x, x[:, :1].expand(4, 64))) == (4, 4, (4, 64), (1, 0), True)
    assert launch.rows((x, x[:, 0][:, None].expand(4, 64)), flat=True) == (4, 4, (4, 64), (1, 0), True)
    assert launch.rows((x[:, :1],)) == (4, 1, (64,), (1,), False)
    assert not launch.rows((torch.randn(4, 80)[:, 1:65],)).aligned  # the address
    cu = torch.tensor([0, 3, 64])
    assert launch.rows((x[0], x[0, :1].expand(64)), cu_seqlens=cu) == (2, 0, (1, 0), (1, 0), False)
