# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md, its rows on the estimators of every framework: each test shows the number that the row states.

A framework's formula stands here in plain torch, in the dtypes that the framework uses.
"""

import math

import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.advantages import nemo, openrlhf, roll, trl

NAN = math.nan
ONES = torch.ones(18, 1)


def normalized(x, eps):
    return (x - x.mean()) / (x.std() + eps)


# ---- groups ---------------------------------------------------------------------------------------------------------
def test_equal_rewards_of_each_framework():
    for reward, n, eps, stated in ((3.3, 12, 1e-9, 0.96), (1000.1, 16, 1e-4, 0.37)):
        assert normalized(torch.full((n,), reward), eps).abs().max().item() == pytest.approx(stated, abs=0.02)
    assert not openrlhf.group_norm(torch.full((12,), 3.3), ONES[:12], n_samples_per_prompt=12).advantages.any()
    assert not trl.grpo(torch.full((16, 1), 1000.1), num_generations=16).advantages.any()


def test_equal_rewards_of_gdpo():
    """verl whitens the noise with the other groups of the batch, which it moves."""
    labels = ["a"] * 16 + ["b"] * 2
    scores = torch.tensor([1000.1] * 16 + [0.0, 1.0])
    a = torch.cat([normalized(scores[:16], 1e-6), normalized(scores[16:], 1e-6)])
    theirs = (a - a.mean()) * (a.var() + 1e-8).rsqrt()
    torch.testing.assert_close(theirs[[0, 16, 17]], torch.tensor([-0.2700, 0.3573, 3.9631]), rtol=2e-3, atol=0)
    ours = advantages.gdpo(scores[:, None], ONES, labels).advantages[:, 0]
    assert not ours[:16].any()
    torch.testing.assert_close(ours[16:], torch.tensor([-2.9155, 2.9155]), rtol=1e-4, atol=0)


def test_deviation_of_the_others_in_one_pass():
    r = torch.tensor([100.3] * 12 + [0.0])
    rest = r[:12]
    std = ((rest.square().sum() / 12 - (rest.sum() / 12).square()) * 12 / 11).sqrt()
    assert std.item() == pytest.approx(0.0565, abs=1e-4)
    assert ((r[12] - rest.mean()) / (std + 1e-6)).item() == pytest.approx(-1774, abs=2)
    assert nemo.grpo(r, [0] * 13).advantages[12].item() == pytest.approx(-100.3)


def test_group_without_a_token():
    rewards, mask = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]), torch.tensor([[0, 0], [0, 0], [1, 1], [1, 0]])
    s, n = rewards.sum(1)[:2], mask.sum(1)[:2]
    assert (s - (n * s).sum() / n.sum()).isnan().all()
    ours = advantages.opo(rewards, mask, list("aabb")).advantages
    torch.testing.assert_close(ours, torch.tensor([[0.0, 0.0], [0.0, 0.0], [-1 / 3, -1 / 3], [2 / 3, 0.0]]))


def test_count_of_rewards_that_are_not_zero():
    rewards = torch.tensor([[1e8, 1.0, -1e8], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    s = rewards.sum(1)
    assert s.tolist() == [0.0, 1.0, 2.0, 4.0]  # in float32 the first is lost
    theirs = 4 / int(s.count_nonzero()) * (s - torch.tensor([0.5, 0.5, 3.0, 3.0]))
    torch.testing.assert_close(theirs, torch.tensor([-2 / 3, 2 / 3, -4 / 3, 4 / 3]))
    assert advantages.gpg(rewards, ONES[:4].expand(4, 3), list("aabb")).advantages[:, 0].tolist() == [0.0, 0.0, -1.0, 1.0]


def test_flag_of_the_deviation():
    rewards, mask, labels = torch.tensor([[1.0], [0.0]]), ONES[:2], ["a", "a"]
    for name, divided, plain in (("grpo", 0.5**0.5, 0.5), ("grpo_vectorized", 0.5**0.5, 0.5), ("grpo_passk", 2**0.5, 1.0)):
        for flag, stated in ((True, divided), (False, plain)):
            got = getattr(advantages, name)(rewards, mask, labels, norm_adv_by_std_in_grpo=flag).advantages
            assert got[0].item() == pytest.approx(stated, rel=1e-5), (name, flag)
    # gdpo: the whitening behind it divides anyway, but not each group by its own
    rewards, labels = torch.tensor([[2.0], [0.0], [1.0], [0.0]]), ["a", "a", "b", "b"]
    for flag, first in ((True, 3**0.5 / 2), (False, 1.0 / (2.5 / 3) ** 0.5)):
        got = advantages.gdpo(rewards, ONES[:4], labels, norm_adv_by_std_in_grpo=flag).advantages
        assert got[0].item() == pytest.approx(first, rel=1e-5)


def test_padding_nan_in_token_baselines():
    g = torch.Generator().manual_seed(0)
    old, rewards = -1 - torch.rand(4, 3, generator=g), torch.rand(4, 3, generator=g)
    squares, mask, labels = old.exp() ** 2, torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]), list("aabb")
    old[0, 1] = NAN
    weights = ((1 - 2 * old.exp() + squares) * mask).cumsum(1)[:2]
    returns = (rewards * mask).flip(1).cumsum(1).flip(1)[:2]
    base = (returns * weights * mask[:2]).sum(0) / ((weights * mask[:2]).sum(0) + 1e-8)
    assert base.isnan().tolist() == [False, True, True]  # of both rows, from there on
    for function in (advantages.optimal_token_baseline, advantages.tir_optimal_token_baseline):
        assert function(rewards, mask, labels, old, squares).advantages.isfinite().all()


def test_prompts_of_one_sample():
    one = torch.tensor([[3.0]])
    assert ((one.sum(1, keepdim=True) - one) / (1 - 1)).isnan().all()  # the mean of the others
    assert (((one - one.mean()).square().sum() / (1 - 1)).sqrt() + 1e-6).isnan()  # the deviation
    for function in (openrlhf.rloo, openrlhf.group_norm, openrlhf.dr_grpo):
        with pytest.raises(ValueError, match="n_samples_per_prompt must be at least 2"):
            function(torch.tensor([3.0, 1.0]), ONES[:2], n_samples_per_prompt=1)
        assert function(torch.tensor([3.0, 1.0]), ONES[:2], ["a", "b"]).advantages.tolist() == [[0.0], [0.0]]
    assert roll.reward_norm(torch.tensor([3.0, 1.0]), n_sample=1).tolist() == [0.0, 0.0]


def test_rows_without_a_reward():
    r, labels = torch.tensor([1.0, NAN, 0.0, 5.0]), list("aaab")
    assert trl.grpo(r, labels, scale_rewards="none").advantages.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert trl.rloo(r, labels).advantages.tolist() == [1.0, 0.0, -1.0, 0.0]
    shown = rlkern.group_normalize(r, labels, scale_by_std=False)
    assert shown[:3].isnan().all()  # a NaN is in its group's mean
    omitted = rlkern.group_normalize(r, labels, scale_by_std=False, nan="omit", singleton="zero")
    assert omitted.nan_to_num(0.0).tolist() == [0.5, 0.0, -0.5, 0.0]


def test_whitening_of_nothing():
    rewards, empty = torch.tensor([3.0, 1.0]), torch.zeros(2, 4)
    assert ((rewards[:, None] * empty).sum() / empty.sum()).isnan()
    for function in (openrlhf.reinforce, openrlhf.reinforce_baseline):
        group = {"n_samples_per_prompt": 2} if function is openrlhf.reinforce_baseline else {}
        with pytest.raises(ValueError, match="the mask must select at least one value"):
            function(rewards, empty, **group)


def test_shape_of_another_mean():
    r = torch.arange(6.0)
    assert ((r - r.mean()) / (r.reshape(-1, 3).std(1, keepdim=True) + 1e-6)).shape == (2, 6)
    with pytest.raises(ValueError, match='norm_std_type must be "batch" or None'):
        roll.reward_norm(r, n_sample=3, norm_mean_type="batch", norm_std_type="group")
