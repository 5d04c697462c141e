# SPDX-License-Identifier: Apache-2.0
"""What the tests of rollout_correction share: configurations, random batches, and when two results are the same."""

import torch

from rlkern.testing import ragged_mask

OFF_POLICY = 13  # metrics that are always there
EVERYTHING = {"rollout_is": "token", "rollout_rs": "token_k1,seq_mean_k3,token_k2", "rollout_rs_threshold": "0.7_1.4,0.2,0.5"}
CONFIGS = [
    {},
    EVERYTHING,
    {"rollout_is": "token", "rollout_is_threshold": "0.8_1.25", "rollout_rs": "token_k3", "rollout_rs_threshold": 0.1},
    {"rollout_is": "sequence", "rollout_rs": "seq_sum_k1,seq_max_k2", "rollout_rs_threshold": "0.01_90,0.9"},
    {
        "rollout_is": "sequence",
        "rollout_is_threshold": "0.2_5",
        "rollout_rs": "seq_sum_k2,seq_sum_k3,seq_max_k3",
        "rollout_rs_threshold": 2,
    },
    {"rollout_is": "token", "rollout_is_threshold": 1.2, "rollout_is_batch_normalize": True},
    {
        "rollout_is": "sequence",
        "rollout_is_batch_normalize": True,
        "rollout_rs": "seq_mean_k1,seq_mean_k2",
        "rollout_rs_threshold": "1.2,0.2",
    },
]


def batch(B, T, dtype=torch.float32, seed=0, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    rollout = -2 * torch.rand(B, T, generator=g)
    old = rollout + spread * torch.randn(B, T, generator=g)
    mask = ragged_mask(B, T, 0.2, seed)
    if mask.numel():
        mask[0, 0] = 1
    return old.to(dtype), rollout.to(dtype), mask


def same(a, b, rtol=1e-5, atol=1e-6):
    """Two results, by whatever backend or layout: weights, mask, and each row's sums."""
    assert (a.weights is None) == (b.weights is None)
    if a.weights is not None:
        torch.testing.assert_close(a.weights, b.weights, rtol=rtol, atol=atol, equal_nan=True)
    assert torch.equal(a.response_mask, b.response_mask)
    torch.testing.assert_close(a.metrics.table, b.metrics.table, rtol=rtol, atol=atol, equal_nan=True)
