# SPDX-License-Identifier: Apache-2.0
"""What the tests of the families do not show of the Triton kernels: several blocks a span, parts, aligned rows of several
blocks, weights that cancel, groups past a block, and the twin of Moments::merge. The oracle is the torch backend."""

import os

import pytest
import torch

import rlkern
from rlkern.reference import whiten as reference
from rlkern.testing import assert_within, ragged_mask

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs interpreted: pytest --backend triton")
D = torch.float64
# (rows, tokens, why): blocks of 1024 tokens
LONG = [
    (1, 1000, "part of a block"),
    (2, 1024, "exactly one block, aligned"),
    (1, 1025, "one token past a block"),
    (2, 2064, "two blocks and a part, aligned"),
    (1, 9000, "more blocks than parts: spans of several"),
]


def batch(rows, tokens, dtype=torch.float32, offset=5.0):
    g = torch.Generator().manual_seed(tokens)
    return (3 * torch.randn(rows, tokens, generator=g, dtype=D) + offset).to(dtype), ragged_mask(rows, tokens, 0.2)


def gradient(call, v, *args):
    v = v.detach().requires_grad_()
    y = call(v, *args)
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=D).view(y.shape).to(y.dtype)).sum(), v)[0]


def assert_like_torch(call, v, *args, scale, what):
    """Within the budget of the torch backend's float64 answer."""
    kernel = call(v, *args)
    with rlkern.use_backend("torch"):
        exact = call(v.double(), *args)
        assert_within(kernel, call(v, *args), exact, scale, what)


@pytest.fixture
def few_parts(monkeypatch):
    """Four parts at most, so that spans have several blocks."""
    from rlkern.kernels import launch

    monkeypatch.setattr(launch, "PARTS", launch.Block(4, 1))


@pytest.mark.parametrize(("rows", "tokens", "why"), LONG)
def test_kernels_whiten_spans(backend, few_parts, rows, tokens, why):
    v, m = batch(rows, tokens)
    wide = torch.full((rows, tokens + 48), torch.nan)
    wide[:, 16 : tokens + 16] = v
    for x, kind in ((v, "flat"), (wide[:, 16 : tokens + 16], "rows")):
        for mask in (m, m * 3, m.double() * 0.7, m.bool(), None):
            what, total = f"{why}, {kind}", x.double().square().sum()
            assert_like_torch(lambda v, m: rlkern.masked_moments(v, m).stack(), x, mask, scale=3 * total, what=what)
            assert_like_torch(rlkern.masked_sum, x, mask, scale=3 * x.double().abs().sum(), what=what)
        for call in (rlkern.masked_whiten, lambda v, m: rlkern.masked_whiten(v, m, mask_output=True)):
            assert_like_torch(call, x, m, scale=20.0, what=what)
            assert_like_torch(lambda v, m, call=call: gradient(call, v, m), x, m, scale=20.0, what=f"gradient, {what}")


@pytest.mark.parametrize(("rows", "tokens", "why"), LONG[1:4])
def test_kernels_whiten_rows(backend, rows, tokens, why):
    v, m = batch(rows, tokens)
    for unbiased in (True, False):

        def normalize(v, m, unbiased=unbiased):
            return rlkern.masked_normalize(v, m, unbiased=unbiased, mask_output=unbiased)

        def apply(v, m, unbiased=unbiased):
            return rlkern.whiten_apply(v, rlkern.masked_moments(v, m, -1), m, mask_output=unbiased)

        for call in (normalize, apply):
            assert_like_torch(call, v, m, scale=20.0, what=why)
            assert_like_torch(lambda v, m, call=call: gradient(call, v, m), v, m, scale=20.0, what=f"gradient, {why}")


def test_kernels_whiten_weights_that_cancel(backend, few_parts):
    """In a block, in a part, in all."""
    v, m = batch(1, 9000, D, 100.0)
    sign = torch.where(torch.arange(9000) % 2 == 0, 1, -1)
    for w in (torch.where(torch.arange(9000) < 1024, sign, m), torch.where(torch.arange(9000) < 4096, sign, m), sign[None]):
        scale = v.square().sum()
        assert_like_torch(lambda v, w: rlkern.masked_moments(v, w).stack(), v, w, scale=scale, what="weights")
        assert_like_torch(lambda v, w: rlkern.masked_moments(v, w, -1).stack(), v, w, scale=scale, what="weights by row")


def test_kernels_whiten_equal_values(backend, few_parts):
    """No variance, and none below 0."""
    v = torch.full((1, 9000), 3.3, dtype=D)
    count, mean, m2 = rlkern.masked_moments(v, None)
    assert count == 9000
    assert mean == pytest.approx(3.3, rel=1e-15)
    assert 0 <= m2 < 1e-25


@triton.jit
def merge_kernel(a, b, out, MERGE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N) * 3
    x, y, z = MERGE(tl.load(a + i), tl.load(a + i + 1), tl.load(a + i + 2), tl.load(b + i), tl.load(b + i + 1), tl.load(b + i + 2))
    tl.store(out + i, x)
    tl.store(out + i + 1, y)
    tl.store(out + i + 2, z)


def test_kernels_whiten_merge(backend):
    from rlkern.kernels import moments_math

    a, b = torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(0), dtype=D) + 1
    a[:20], b[10:30] = 0, 0
    out = torch.zeros(64, 3, dtype=D)
    merge_kernel[(1,)](a, b, out, moments_math.merge, 64)
    torch.testing.assert_close(out, reference.merge([a, b]), rtol=1e-14, atol=0)


# ---- groups ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted"])
def test_kernels_whiten_groups(backend, baseline):
    """A group past two blocks of 128 rows, one of exactly a block, two of one row, a small one."""
    labels = torch.tensor([0] * 300 + [1] * 128 + [2, 3, 4, 4, 4])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    index = rlkern.group_index(labels[order])
    s = batch(1, len(labels))[0][0]
    lengths = torch.randint(0, 9, s.shape) if baseline == "length_weighted" else None

    def call(s):
        return rlkern.group_normalize(s, index, baseline=baseline, lengths=lengths)

    assert_like_torch(call, s, scale=20.0, what=baseline)
    assert_like_torch(lambda s: gradient(call, s), s, scale=20.0, what=baseline)
    for i in (0, 1):
        assert_like_torch(lambda s, i=i: rlkern.group_mean_std(s, index)[i], s, scale=20.0, what="mean, std")
        assert_like_torch(lambda s, i=i: gradient(lambda s: rlkern.group_mean_std(s, index)[i], s), s, scale=20.0, what="gradient")


@pytest.mark.parametrize("name", ["grpo", "opo", "reinforce_plus_plus_baseline"])
def test_kernels_whiten_advantages(backend, name):
    """Rows of several blocks, aligned and not."""
    for rows, tokens, why in LONG[2:4]:
        v, m = batch(4 * rows, tokens)
        labels = [i % 3 for i in range(4 * rows)]

        def call(v, m, labels=labels):
            return getattr(rlkern.advantages, name)(v, m, labels).advantages

        assert_like_torch(call, v, m, scale=v.double().abs().sum(1).max(), what=why)
