# SPDX-License-Identifier: Apache-2.0
"""The losses' Triton kernels where the family's tests do not reach: several blocks a chunk, several chunks a row, merges in
two stages, decisions at edges. Run by `pytest --backend triton`."""

import itertools
import math
import os

import pytest
import torch

import rlkern
from rlkern import backends
from rlkern.aggregation import AGG_MODES
from rlkern.testing import ragged_mask

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs interpreted: pytest --backend triton"),
    pytest.mark.skipif(backends.native is None, reason=backends.native_error),
]
INF, NAN = math.inf, math.nan


def batch(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(B, T, generator=g) - 2
    tensors = (lp + 0.4 * torch.randn(B, T, generator=g), lp, torch.randn(B, T, generator=g))
    return *(x.to(dtype) for x in tensors), ragged_mask(B, T, 0.2, seed)


def terms(old, lp, rows):
    g = torch.Generator().manual_seed(1)
    weights, entropy = torch.rand(rows, generator=g), torch.rand(lp.shape, generator=g)
    return {"rollout_is_weights": weights, "ref_log_prob": old, "kl_coef": 0.1, "entropy": entropy, "entropy_coeff": 0.01}


def both(op, *args, **keywords):
    """By these kernels, and by the C++."""
    found = []
    for name in ("triton", "cpp"):
        with rlkern.use_backend(name):
            found.append(op(*args, **keywords))
    return found


def assert_same(ours, theirs):
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(ours.metrics.sums, theirs.metrics.sums, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours.metrics.maxes, theirs.metrics.maxes, rtol=1e-6, atol=0)
    for a, b in ((ours.d_log_prob, theirs.d_log_prob), (ours.d_entropy, theirs.d_entropy)):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-12, equal_nan=True)


SHAPES = [
    (2, 512, "exactly one block, aligned"),
    (2, 513, "one block and a token"),
    (1, 1040, "aligned, the last block partial"),
    (1, 33500, "66 blocks: two a chunk, and chunks without any"),
    (18, 520, "two chunks a row, merged in two stages, the second tile of rows partial"),
]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_kernels_loss_shapes(backend, B, T, why, mode):
    old, lp, adv, mask = batch(B, T)
    mask[B // 2] = 0 if B > 1 else mask[0]
    assert_same(*both(rlkern.policy_loss_and_grad, old, lp, adv[:, 0], mask, loss_agg_mode=mode, **terms(old, lp, B)))
    ours, theirs = both(rlkern.value_loss, lp, old, lp + 0.3 * adv, mask.bool(), loss_agg_mode=mode)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.metrics.sums, theirs.metrics.sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.metrics.maxes, theirs.metrics.maxes)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_kernels_loss_packed_shapes(backend, mode):
    """Rows of several chunks next to empty and short ones, what a row holds once, and counts that stay on the device."""
    cu = torch.tensor([0, 0, 1300, 1301, 2100])
    old, lp, adv, mask = (x[0] for x in batch(1, 2100))
    counts = {
        "global_batch_size": torch.tensor(3),
        "loss_scale_factor": torch.tensor(700.0),
        "dp_size": 2,
        "batch_num_tokens": torch.tensor(900),
    }
    for keywords in ({"loss_scale_factor": 700}, counts):
        rest = {"loss_agg_mode": mode, "cu_seqlens": cu, **keywords}
        assert_same(*both(rlkern.policy_loss_and_grad, old, lp, adv[:4], mask, **terms(old, lp, 4), **rest))


def test_kernels_loss_strides(backend):
    """Inner stride 0 wherever a tensor may have it, also in a mask of floats, and together."""
    old, lp, adv, mask = batch(3, 20)
    rows = [x[:, :1].expand(3, 20) for x in (old, lp, adv, (mask + 0.5) * (torch.arange(3) != 1)[:, None])]
    for which in (*itertools.combinations(range(4), 1), (0, 1, 2, 3)):
        args = [rows[i] if i in which else x for i, x in enumerate((old, lp, adv, mask))]
        assert_same(*both(rlkern.policy_loss_and_grad, *args, ref_log_prob=args[0], kl_coef=0.1, loss_agg_mode="seq-mean-token-mean"))


def test_kernels_loss_decisions(backend):
    """At the clips' edges, ties, infinities and NaN, with every clamp bounded and not."""
    points = torch.tensor([0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 21.0, 90.0, -110.0, INF, -INF, NAN, 1e-45])
    x, adv = torch.meshgrid(points, torch.tensor([0.0, 1.0, -1.0, INF, -INF, NAN, -1e-30]), indexing="ij")
    clips = [
        {"cliprange": 0.2},
        {"cliprange": 0.0, "clip_ratio_c": math.e},
        {"clip_ratio_c": None, "log_ratio_clamp": None},
        {"cliprange": 1e30},
    ]
    for clip in clips:
        args = (torch.zeros_like(x), x.contiguous(), adv.contiguous(), torch.ones(x.shape))
        ours, theirs = both(rlkern.policy_loss_and_grad, *args, loss_agg_mode="token-sum", **clip)
        torch.testing.assert_close(ours.d_log_prob, theirs.d_log_prob, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(ours.metrics.sums, theirs.metrics.sums, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(ours.metrics.maxes, theirs.metrics.maxes, rtol=1e-6, atol=0)


def test_kernels_loss_value_decisions(backend):
    points = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, INF, -INF, NAN])
    v, r, old = (x.reshape(9, 81).contiguous() for x in torch.meshgrid(points, points, points, indexing="ij"))
    for clip in (0.5, 0.0, None):
        leaves = [v.clone().requires_grad_() for _ in range(2)]
        found = []
        for name, leaf in zip(("triton", "cpp"), leaves, strict=True):
            with rlkern.use_backend(name):
                loss, metrics = rlkern.value_loss(leaf, r, old, torch.ones_like(v), cliprange_value=clip, loss_agg_mode="token-sum")
                found.append((*torch.autograd.grad(loss, leaf), metrics.sums, metrics.maxes))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_kernels_loss_sums_are_float64(backend):
    """Sums of float32 terms are exact where float64 is: 2^24 + 1 among them."""
    v = torch.ones(1, 2000)
    v[0, 3] = 2.0**24
    sums = rlkern.value_loss(v, v, None, torch.ones(1, 2000), cliprange_value=None).metrics.sums
    assert sums[3].item() == 2**24 + 1999


@pytest.mark.parametrize("mode", ["token-sum", "seq-mean-token-mean"])
def test_kernels_loss_merge(backend, mode):
    """4200 rows leave 263 columns: past one step of the second stage, which then ends in a part."""
    from rlkern.kernels import aggregation, value_loss

    rows, chunks = 4200, 3
    parts = torch.rand(7, rows, chunks, dtype=torch.float64)
    parts[0] = torch.randint(0, 3, (rows, chunks))
    loss, sums, maxes = torch.empty(()), torch.empty(6, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    at = aggregation.Chunked(aggregation.Rows(rows, 0, (), (), False), chunks, None)
    agg = aggregation.aggregation(mode, [2.0, NAN, NAN, NAN], None)
    aggregation.finish(value_loss.value_results_kernel, at, parts, value_loss.LAYOUT, loss, sums, maxes, *agg.rest, **agg.choice)
    tokens, of_row = parts[0].sum(-1), parts[4].sum(-1)
    sequences = (tokens > 0).sum().double()
    total = 2 * of_row.sum() if mode == "token-sum" else 2 / sequences * (of_row / tokens.clamp(min=1)).sum()
    expected = torch.stack([tokens.sum(), sequences, parts[2].sum(), parts[3].sum(), total, parts[5].sum()])
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)
    assert maxes[0] == parts[6].max()
    assert loss == total.float()


def test_kernels_loss_programs(backend):
    """How many a launch has: enough for a GPU where there are few rows, few enough for the merge."""
    from rlkern.kernels import aggregation

    def chunks(B, T, cu=None):
        x = torch.empty(1, 1).expand(B, T) if cu is None else torch.empty(1).expand(T)
        return aggregation.chunked([x], cu, {}).chunks

    assert [chunks(*shape) for shape in ((0, 5), (3, 0), (1, 512), (1, 513))] == [1, 1, 1, 2]
    assert [chunks(*shape) for shape in ((8, 131072), (4096, 16384), (100_000, 512))] == [64, 4, 1]
    assert chunks(0, 65536, torch.zeros(65, dtype=torch.int64)) == 64
    assert chunks(0, 65536, torch.zeros(10_001, dtype=torch.int64)) == 1
