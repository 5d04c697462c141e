# SPDX-License-Identifier: Apache-2.0
"""merge_moments: shards in, one answer out, whatever the split. The oracle is the unsplit float64 computation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.testing import assert_within, ragged_mask

D = torch.float64


def exact(v, m):
    """(count, mean, m2) of everything at once, in float64; differentiable."""
    w, v = m.double(), torch.where(m != 0, v.double(), 0.0)
    mean = (w * v).sum() / w.sum()
    return torch.stack((w.sum(), mean, (w * (v - mean) ** 2).sum()))


def together(vs, ms):
    return rlkern.merge_moments([rlkern.masked_moments(*x) for x in zip(vs, ms, strict=True)])


def shards(number, rows=2, tokens=50, dtype=D):
    v = (torch.randn(number * rows, tokens, generator=torch.Generator().manual_seed(number), dtype=D) + 1e3).to(dtype)
    m = ragged_mask(number * rows, tokens, 0.2)
    m[: rows * (number // 3)] = 0  # empty shards come first
    return v.split(rows), m.split(rows)


def test_merge_moments_known_values():
    a, b = torch.tensor([2.0, 1.0, 2.0]), torch.tensor([2.0, 5.0, 0.0])
    assert rlkern.merge_moments([a, b]).stack().tolist() == [4, 3, 2 + 16 * 1]
    nothing = torch.zeros(3)
    assert rlkern.merge_moments(torch.stack((nothing, a, nothing, b, nothing))).stack().tolist() == [4, 3, 18]
    assert rlkern.merge_moments([nothing, nothing]).stack().tolist() == [0, 0, 0]


def test_merge_moments_matches_reference(backend):
    for number in (1, 2, 5, 9):
        vs, ms = shards(number, dtype=torch.float32)
        v, m = torch.cat(vs), torch.cat(ms)
        whole = rlkern.masked_moments(v, m).stack()
        assert_within(together(vs, ms).stack(), whole, exact(v, m), (v.double() * m).abs().sum(), f"{number} shards")


def test_merge_moments_grad_matches_reference(backend):
    vs, ms = shards(5)
    leaves = [v.clone().requires_grad_() for v in vs]
    merged = together(leaves, ms)
    found = torch.autograd.grad((merged.mean + merged.m2), leaves)
    v, m = torch.cat(vs).requires_grad_(), torch.cat(ms)
    true = torch.autograd.grad(exact(v, m)[1:].sum(), v)[0]
    torch.testing.assert_close(torch.cat(found), true, rtol=1e-10, atol=1e-10)


def test_merge_moments_gradcheck():
    count = torch.tensor([0.0, 3, 0, 2]).double()
    leaves = tuple(torch.rand(4, dtype=D).requires_grad_() for _ in range(2))

    def merged(mean, m2):
        return rlkern.merge_moments(torch.stack((count, mean, m2), -1)).stack()

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradgradcheck(merged, leaves)


def test_merge_moments_ignores_masked():
    """An empty shard is what a mask is here: nothing, to the bit."""
    vs, ms = shards(6)
    moments = [rlkern.masked_moments(*x) for x in zip(vs, ms, strict=True)]
    full = [x for x in moments if x.count != 0]
    assert len(full) < len(moments)
    assert torch.equal(rlkern.merge_moments(moments).stack(), rlkern.merge_moments(full).stack())


def test_merge_moments_edge_shapes():
    for shape in ((), (4,), (2, 3), (0,)):
        rows = [rlkern.Moments(*torch.rand(3, *shape, dtype=D).add(1).unbind(0)) for _ in range(3)]
        assert rlkern.merge_moments(rows).mean.shape == shape
        assert torch.equal(rlkern.merge_moments(torch.stack([x.stack() for x in rows])).m2, rlkern.merge_moments(rows).m2)
    assert torch.equal(rlkern.merge_moments(rows[:1]).stack(), rows[0].stack())


@given(number=st.integers(2, 8), seed=st.integers(0, 99))
def test_merge_moments_properties(number, seed):
    x = torch.rand(number, 3, generator=torch.Generator().manual_seed(seed), dtype=D)
    x[:, 0] = (x[:, 0] * 5).floor()
    x[x[:, 0] == 0] = 0
    whole, halves = rlkern.merge_moments(x), [rlkern.merge_moments(part).stack() for part in (x[:1], x[1:])]
    for other in (rlkern.merge_moments(halves), rlkern.merge_moments(x.flip(0))):
        torch.testing.assert_close(other.stack(), whole.stack())


def test_merge_moments_rejects():
    one = rlkern.masked_moments(torch.ones(3), None)
    for bad, kind in (
        ([], ValueError),
        (one, TypeError),
        ([one, torch.ones(2, 3)], ValueError),
        ([torch.ones(2)], ValueError),
        ([1.0], TypeError),
    ):
        with pytest.raises(kind, match=r"rlkern\.merge_moments: moments must"):
            rlkern.merge_moments(bad)


def test_merge_moments_registers():
    """No raw op: it is a few scalars of plain torch, which compile traces."""
    x = torch.rand(4, 3, dtype=D)
    step = torch.compile(lambda x: rlkern.merge_moments(x).stack(), fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x), rlkern.merge_moments(x).stack())
