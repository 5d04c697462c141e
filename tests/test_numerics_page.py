# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md: each row of its tables has a test that shows the number it states. Here: masks, variances, groups.

A framework's formula stands here in plain torch, in the dtypes that the framework uses. test_numerics_*.py have the rest;
a row may also name a test of any other file.
"""

import math
import pathlib
import re

import numpy
import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.advantages import gae

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parent / "docs" / "numerics.md"


# ---- the page itself --------------------------------------------------------------------------------------------------
def rows():
    """The cells of every row of a table of differences."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith(("| the framework |", "|---")):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_every_row_names_a_test():
    known = {name for path in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    found = list(rows())
    assert len(found) >= 75
    for cells in found:
        assert len(cells) == 5, cells
        named = re.fullmatch(r"`(test_\w+)`", cells[-1])
        assert named, f"the last cell of {cells[0]!r} must be `test_...`"
        assert named[1] in known, f"no test {named[1]}"


# ---- verl's functions, in plain torch ---------------------------------------------------------------------------------
def masked_mean(x, mask):
    return (torch.where(mask.bool(), x, 0.0) * mask).sum() / (mask.sum() + 1e-8)


def masked_whiten(x, mask):
    mean, n = masked_mean(x, mask), mask.sum()
    var = masked_mean((x - mean) ** 2, mask) * (n / (n - 1))
    return (x - mean) * torch.rsqrt(var + 1e-8)


def verl_gae(rewards, values, mask, gamma, lam, whiten=True):
    following = last = 0
    found = []
    for t in reversed(range(rewards.shape[-1])):
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        following = values[:, t] * mask[:, t] + (1 - mask[:, t]) * following
        last = step * mask[:, t] + (1 - mask[:, t]) * last
        found.append(last)
    found = torch.stack(found[::-1], 1)
    return masked_whiten(found, mask) if whiten else found


def group_loop(scores, eps=1e-6):
    """verl's GRPO over one group: torch.mean, torch.std, in float32."""
    return (scores - scores.mean()) / (scores.std() + eps)


def rollout(B=4, T=12):
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 7:] = 0
    return torch.randn(B, T, generator=g), torch.randn(B, T, generator=g), mask


# ---- masked positions -------------------------------------------------------------------------------------------------
def test_padding_nan_in_gae():
    rewards, values, mask = rollout()
    values[1, 9] = torch.nan
    assert verl_gae(rewards, values, mask, 1.0, 0.9).isnan().all()
    assert gae(rewards, values, mask, 1.0, 0.9).advantages[mask != 0].isfinite().all()
    values[1, 3] = torch.nan  # at a token that is read
    assert gae(rewards, values, mask, 1.0, 0.9).advantages.isnan().any()


def test_padding_nan_in_seq_losses():
    old, lp, mask = rollout()
    a = torch.ones_like(lp)
    a[1, 9] = torch.nan
    leaf = lp.clone().requires_grad_()
    loss = (-a * (leaf - old).exp() * mask).sum(-1).mean()
    assert loss.isnan()
    assert torch.autograd.grad(loss, leaf)[0][1, 9].isnan()
    leaf = lp.clone().requires_grad_()
    loss = rlkern.policy_loss(old, leaf, a, mask, loss_agg_mode="seq-mean-token-sum").loss
    assert loss.isfinite()
    assert torch.autograd.grad(loss, leaf)[0][1, 9] == 0


def test_padding_nan_in_means():
    x, _, mask = rollout()
    x[1, 9] = torch.nan
    assert ((x * mask).sum() / mask.sum()).isnan()
    assert rlkern.masked_mean(x, mask).isfinite()


def test_bool_mask_in_gae():
    rewards, values, mask = rollout()
    with pytest.raises(RuntimeError, match="bool"):
        verl_gae(rewards, values, mask.bool(), 1.0, 0.9)
    found = [gae(rewards, values, mask.to(dtype), 1.0, 0.9).advantages for dtype in (torch.bool, torch.int64, torch.uint8)]
    assert all(torch.equal(x, found[0]) for x in found)


def test_uint8_mask_of_two():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    of = {dtype: torch.tensor([[1, 2, 1]]).to(dtype) for dtype in (torch.uint8, torch.int64)}
    wrong = verl_gae(rewards, values, of[torch.uint8], 1.0, 1.0, whiten=False)
    assert wrong[0].tolist() == [256.5, 65.25, 0.25]
    ones = verl_gae(rewards, values, torch.ones_like(of[torch.int64]), 1.0, 1.0, whiten=False)
    assert ones[0].tolist() == [0.5, 0.75, 0.25]
    for mask in of.values():
        assert torch.equal(rlkern.gae(rewards, values, mask, gamma=1.0, lam=1.0).advantages, ones)


def test_counts_in_the_dtype_of_the_mask():
    half = torch.ones(257, dtype=torch.bfloat16)
    assert masked_mean(torch.ones(257), half).item() == pytest.approx(1.0039, abs=1e-4)
    assert rlkern.masked_mean(torch.ones(257), half) == 1
    half = torch.ones(70_000, dtype=torch.float16)
    assert half.sum().isinf()
    assert masked_mean(torch.ones(70_000), half) == 0
    assert rlkern.masked_mean(torch.ones(70_000), half) == 1


def test_eps_beside_the_count():
    ones = torch.ones(7, dtype=torch.float64)
    assert 1 - masked_mean(ones, ones).item() == pytest.approx(1.4e-9, rel=0.05)
    assert rlkern.masked_mean(ones, ones) == 1
    assert masked_mean(ones.float(), ones.float()) == 1  # in float32 the eps is nothing
    assert rlkern.masked_mean(ones, 0 * ones) == 0


# ---- variance and whitening -------------------------------------------------------------------------------------------
def test_one_pass_variance_of_groups():
    for mean, stated in ((1.0, 8.5e-5), (10.0, 1.1e-2), (100.0, 1.1)):
        worst = ours = 0.0
        for seed in range(20):
            x, n = mean + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(seed)), 64
            total, squares = (torch.zeros(1).index_add(0, torch.zeros(n, dtype=torch.int64), y)[0] for y in (x, x * x))
            var = ((squares / n - (total / n) ** 2) * n / (n - 1)).clamp(min=1e-6)
            exact = group_loop(x.double())
            worst = max(worst, ((x - total / n) / (var.sqrt() + 1e-6) - exact).abs().max().item())
            ours = max(ours, (rlkern.group_normalize(x, [0] * n).double() - exact).abs().max().item())
        assert stated / 3 < worst < 3 * stated, (mean, worst)
        assert ours < 3e-7


def test_one_pass_whitening():
    found = set()
    for seed in range(20):
        x = 1e4 + torch.rand(256, generator=torch.Generator().manual_seed(seed))
        found.add((x.square().sum() / 256 - (x.sum() / 256) ** 2).item())
        assert x.var().item() == pytest.approx(1 / 12, rel=0.3)
        assert rlkern.masked_var(x, None).item() == pytest.approx(x.double().var().item(), rel=1e-6)
    assert all(x % 8 == 0 for x in found)  # the spacing of float32 at 1e8
    assert {-8.0, 8.0} <= found


def test_rounded_mean():
    for mean, least, most in ((10.0, 1e-7, 5e-6), (1000.0, 1e-5, 5e-4)):
        g = torch.Generator().manual_seed(3)
        x, mask = mean + torch.randn(999, generator=g), torch.ones(999, dtype=torch.int64)
        exact = masked_whiten(x.double(), mask)
        errors = [(y.double() - exact).abs().max().item() for y in (masked_whiten(x, mask), rlkern.masked_whiten(x, mask))]
        assert least < errors[0] < most, (mean, errors)
        assert errors[1] < 1e-6


def test_bessel_factor_in_float32():
    n = torch.tensor(7)
    assert abs((n / (n - 1)).double().item() / (7 / 6) - 1) == pytest.approx(3.4e-8, rel=0.05)
    half = torch.tensor(7.0, dtype=torch.bfloat16)
    assert abs((half / (half - 1)).item() / (7 / 6) - 1) == pytest.approx(2.2e-3, rel=0.05)
    x = torch.arange(7, dtype=torch.float64)
    assert rlkern.masked_var(x, torch.ones(7, dtype=torch.int64)).item() == pytest.approx(x.var().item(), rel=1e-15)


def test_bfloat16_after_each_step():
    x, mask = torch.randn(999, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.ones(999, dtype=torch.bfloat16)
    exact = masked_whiten(x.double(), mask.double())
    assert (masked_whiten(x, mask) - exact).abs().max().item() == pytest.approx(0.016, rel=0.5)
    assert torch.equal(rlkern.masked_whiten(x, mask), exact.bfloat16())  # one rounding


def test_sums_in_float16():
    x = torch.full((4096,), 20.0, dtype=torch.float16)
    assert x.sum().isinf()
    assert rlkern.masked_mean(x, torch.ones(4096)) == 20


def test_whitening_formulas():
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    centred = x - x.mean()
    openrlhf = centred * x.var(correction=0).clamp(min=1e-8).rsqrt()
    torch.testing.assert_close(rlkern.masked_whiten(x, None, unbiased=False, eps_mode="floor"), openrlhf)
    torch.testing.assert_close(rlkern.masked_whiten(x, None, scale_by_std=False), centred)
    ratio = (openrlhf / rlkern.masked_whiten(x, None)).mean().item()
    assert ratio == pytest.approx(math.sqrt(36 / 35), rel=1e-6)  # 1.4 % at N = 36


# ---- groups and labels --------------------------------------------------------------------------------------------------
def test_zero_variance_groups():
    for reward, n, stated in ((3.3, 12, 0.32), (1000.1, 16, 0.95)):
        x = torch.full((n,), reward)
        assert group_loop(x).abs().max().item() == pytest.approx(stated, abs=0.005)
        assert rlkern.group_normalize(x, [0] * n).tolist() == [0.0] * n


def test_floored_variance_of_groups():
    x = torch.tensor([0.0, 1e-4, 2e-4])
    floored = (x - x.mean()) / x.var().clamp(min=1e-6).sqrt()
    assert floored.abs().max().item() == pytest.approx(0.0999, rel=2e-3)
    assert rlkern.group_normalize(x, [0] * 3).abs().max().item() == pytest.approx(0.990, abs=1e-3)
    mean, std, _ = rlkern.group_mean_std(x, [0] * 3, eps=1e-6)
    assert ((x - mean) / (std + 1e-6)).abs().max().item() == pytest.approx(0.0999, rel=2e-3)


def test_truncated_labels():
    labels = [0.2, 0.7, 1.1]
    assert len(numpy.unique(numpy.asarray(labels).astype(numpy.int64))) == 2
    assert rlkern.group_index(labels).counts.tolist() == [1, 1, 1]


def test_large_and_negative_labels():
    labels = torch.tensor([10_000_000, -3, 10_000_000])
    assert int(labels.max()) + 1 == 10_000_001  # slots of a bincount
    with pytest.raises(IndexError):
        torch.zeros(5)[torch.tensor([-6])]
    index = rlkern.group_index(labels)
    assert index.counts.tolist() == [2, 1]
    assert index.ids.tolist() == [0, 1, 0]


def test_labels_as_keys_of_a_dict():
    labels = torch.tensor([4, 4, 4])
    assert len({label: None for label in labels}) == 3  # three keys of one value
    assert rlkern.group_index(labels).counts.tolist() == [3]


def test_groups_of_one():
    rewards, mask = torch.tensor([[2.0], [1.0], [0.0]]), torch.ones(3, 1)
    index = ["solo", "pair", "pair"]
    assert advantages.rloo(rewards, mask, index).advantages[:, 0].tolist() == [2.0, 1.0, -1.0]
    scores = rewards[:, 0]
    keywords = {"baseline": "leave_one_out", "scale_by_std": False}
    for singleton, value in (("raw", 2.0), ("zero", 0.0)):
        assert rlkern.group_normalize(scores, index, singleton=singleton, **keywords)[0] == value
    assert rlkern.group_normalize(scores, index, singleton="nan", **keywords)[0].isnan()


def test_dtype_of_half_precision_rloo():
    rewards = torch.ones(4, 1, dtype=torch.bfloat16)
    found = advantages.rloo(rewards, torch.ones(4, 1, dtype=torch.int64), [0, 0, 1, 1]).advantages
    assert found.dtype == torch.bfloat16
    assert (rewards.sum(-1) * torch.ones(4, dtype=torch.float64)).dtype == torch.float64  # what a float64 count makes of it


def test_lengths_that_do_not_fit():
    rewards = torch.ones(3, 4)
    with pytest.raises(ValueError, match="index must"):
        advantages.grpo(rewards, torch.ones(3, 4), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="shape"):
        advantages.grpo(rewards, torch.ones(3, 1), [0, 0, 1])
