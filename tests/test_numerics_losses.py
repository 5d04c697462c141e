# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md, its rows on scans, KL, losses and logits: each test shows the number that the row states.

A framework's formula stands here in plain torch, in the dtypes that the framework uses.
"""

import math

import pytest
import torch

import rlkern

INF = math.inf


def grad_of(fn, *tensors):
    leaf = tensors[0].clone().requires_grad_()
    return torch.autograd.grad(fn(leaf, *tensors[1:]).sum(), leaf)[0]


def loop_gae(rewards, values, gamma, lam):
    following = last = torch.zeros(len(rewards), dtype=rewards.dtype)
    found = []
    for t in reversed(range(rewards.shape[-1])):
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        following = values[:, t]
        found.append(last)
    return torch.stack(found[::-1], 1)


def worst(x, exact):
    return (x.double() - exact).abs().max().item()


# ---- scans --------------------------------------------------------------------------------------------------------------
def test_masked_token_of_a_return():
    rewards, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
    found = {way: rlkern.discounted_returns(rewards, mask, gamma=1.0, masked=way)[0].tolist() for way in ("skip", "reset", "zero")}
    assert found == {"skip": [1.0, 0.0, 1.0], "reset": [0.0, 1.0, 1.0], "zero": [1.0, 1.0, 1.0]}


def test_order_of_a_scan(backend):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(8, 2048, generator=g), torch.randn(8, 2048, generator=g)
    exact = loop_gae(rewards.double(), values.double(), 0.99, 0.95)
    top = exact.abs().max().item()
    assert worst(loop_gae(rewards, values, 0.99, 0.95), exact) / top == pytest.approx(3.3e-7, rel=0.3)
    assert worst(rlkern.gae(rewards, values, gamma=0.99, lam=0.95).advantages, exact) / top < 3.5e-7


def test_half_precision_scans():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(8, 32, generator=g).bfloat16(), torch.randn(8, 32, generator=g).bfloat16()
    exact = loop_gae(rewards.double(), values.double(), 1.0, 0.95)
    theirs = worst(loop_gae(rewards, values, 1.0, 0.95), exact)
    ours = rlkern.gae(rewards, values, gamma=1.0, lam=0.95).advantages
    assert torch.equal(ours, exact.float().bfloat16())  # one rounding
    assert worst(ours, exact) == pytest.approx(0.015, rel=0.1)
    assert theirs == pytest.approx(0.062, rel=0.1)


def test_decay_above_one(backend):
    """From x = 0 every y is 0, token by token. Triton's block of 1024 tokens has the decay 2^1024, and
    the torch backend doubles its steps; a vector of the C++ has at most 16 tokens."""
    y = rlkern.affine_scan(2.0, torch.zeros(1, 3000))
    if backend != "cpp":
        assert not y.isfinite().all()
        assert (y[y.isfinite()] == 0).all()  # infinity or NaN, never a wrong number
    else:
        assert (y == 0).all()


# ---- KL -----------------------------------------------------------------------------------------------------------------
def test_k3_near_zero():
    d = 1e-4 * torch.where(torch.rand(100_000, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    d = d * (1 + 0.1 * torch.rand(100_000, generator=torch.Generator().manual_seed(1)))
    lp = torch.zeros_like(d)
    true = (0.5 * d.double().square()).mean().item()
    assert true == pytest.approx(5.5e-9, rel=0.02)
    eager = d.exp() - d - 1
    assert (eager.double() - 0.5 * d.double().square()).abs().max().item() == pytest.approx(1.2e-7, rel=0.1)
    assert (eager < 0).any()
    bias = eager.double().mean().item() - true
    assert abs(bias) > 0.9 * true  # 100 % of the KL
    ours = rlkern.kl_penalty(lp, d, "k3")
    assert (ours >= 0).all()
    assert ours.double().mean().item() == pytest.approx(true, rel=1e-4)


def test_k3_in_half_precision():
    d = torch.tensor([-0.09375], dtype=torch.bfloat16)
    assert (d.exp() - d - 1).item() == 0
    assert rlkern.kl_penalty(0 * d, d, "k3").item() == pytest.approx(0.0043, abs=5e-5)


def test_k3_of_an_unclamped_log_ratio():
    lp, ref = torch.tensor([-89.0]), torch.tensor([0.0])
    assert grad_of(lambda lp: ((ref - lp).exp() - 1 - (ref - lp)).clamp(-10, 10), lp).isnan()
    assert grad_of(lambda lp: rlkern.kl_penalty(lp, ref, "k3", log_ratio_range=None, value_range=(-10, 10)), lp) == 0
    assert rlkern.kl_penalty(lp, ref, "k3", log_ratio_range=None, value_range=(-10, 10)) == 10


def test_clamps_of_kl():
    lp, ref = torch.tensor([-15.0, 0.0]), torch.tensor([0.0, -30.0])
    assert rlkern.kl_penalty(lp, ref, "k1").tolist() == [-15.0, 30.0]
    assert rlkern.kl_penalty(lp, ref, "k1", value_range=(-10, 10)).tolist() == [-10.0, 10.0]  # OpenRLHF's, AReaL's
    assert rlkern.kl_penalty(lp, ref, "k3").tolist() == [10.0, 10.0]
    free = rlkern.kl_penalty(lp, ref, "k3", log_ratio_range=None, value_range=None)  # TRL's, slime's
    assert free.tolist() == pytest.approx([math.exp(15) - 16, 29.0], rel=1e-6)


def test_nan_behind_a_clamp():
    lp, ref = torch.tensor([math.nan]), torch.tensor([0.0])
    assert grad_of(lambda lp: ((ref - lp).clamp(-20, 20).exp() - 1 - (ref - lp).clamp(-20, 20)).clamp(-10, 10), lp) == 0
    assert grad_of(lambda lp: rlkern.kl_penalty(lp, ref, "k3"), lp).isnan()


def test_value_of_a_straight_through_kl():
    lp, ref, old = torch.tensor([-10.7]), torch.tensor([-1.0]), torch.tensor([-13.0])
    slope = (lp - old).exp().clamp(max=10) * 0.5 * (lp - ref).square()
    theirs = (lp - ref) + slope - slope
    assert abs((theirs - (lp - ref)).item()) == pytest.approx(1e-5, rel=0.5)
    ours = rlkern.kl_penalty(lp, ref, "k1+", value_range=(-10, 10), old_log_prob=old, weight_max=10.0)
    assert torch.equal(ours, lp - ref)


def test_nan_weight_of_kl():
    lp, ref, old = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([math.nan])
    w = (lp - old).exp().nan_to_num(0.0)
    assert w * (ref - lp).expm1() == 0
    assert rlkern.kl_penalty(lp, ref, "k3", old_log_prob=old).isnan()
    assert rlkern.kl_penalty(lp, ref, "k3", old_log_prob=old.nan_to_num(nan=INF)) == 0


# ---- losses -------------------------------------------------------------------------------------------------------------
def test_ratio_in_half_precision():
    x = torch.tensor([[0.09375]], dtype=torch.bfloat16)
    assert x.exp().item() == pytest.approx(1.1016, abs=1e-4)
    assert math.exp(0.09375) == pytest.approx(1.0983, abs=1e-4)
    assert torch.tensor(1.2, dtype=torch.bfloat16).item() == pytest.approx(1.203, abs=1e-3)
    one = torch.ones(1, 1)
    assert rlkern.policy_loss(0 * x, x, one, one).metrics.field("ratio_max").item() == pytest.approx(1.0983, abs=1e-4)
    far = torch.tensor([[20.0]], dtype=torch.float16)
    assert far.exp().isinf()
    assert grad_of(lambda x: torch.max(-x.exp(), -x.exp().clamp(0.8, 1.2)), far).isnan()
    assert grad_of(lambda x: rlkern.policy_loss(0 * far, x, one, one).loss, far) == 0


def test_sums_of_losses(backend):
    """Half a million tokens of 1/3."""
    x = torch.full((1, 500_000), 1 / 3)
    exact = x.double().sum().item()
    loss = rlkern.policy_loss(0 * x, 0 * x, -x, torch.ones_like(x), loss_agg_mode="token-sum").loss.item()
    assert abs(loss / exact - 1) <= 6e-8  # one rounding
    assert 6e-8 < abs(x.sum().item() / exact - 1) < 1e-6  # of float32, which torch adds by pairs


def test_means_of_means():
    """Micro-batches of 1 and 9 tokens, of which 1 and 0 are clipped: the mean of the means says half, and 1 of 10 were."""
    old, mask = torch.zeros(2, 9), torch.zeros(2, 9)
    mask[0, 0], mask[1] = 1, 1
    lp = torch.zeros(2, 9)
    lp[0, 0] = 1.0
    parts = [rlkern.policy_loss(old[i : i + 1], lp[i : i + 1], torch.ones(1, 9), mask[i : i + 1]).metrics for i in range(2)]
    assert sum(p.as_dict()["actor/pg_clipfrac"] for p in parts) / 2 == 0.5
    assert parts[0].merge(parts[1]).as_dict()["actor/pg_clipfrac"] == pytest.approx(0.1)


def test_mask_that_broadcasts():
    clipped, mask = torch.ones(4, 8), torch.tensor([[1], [1], [0], [1]])
    assert ((clipped * mask).sum() / mask.sum()).item() == 8  # a share of 8
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="response_mask must have the shape"):
        rlkern.policy_loss(x, x, x, mask)


def test_settings_without_sense():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="cliprange_low must be in"):
        rlkern.policy_loss(x, x, x, x, cliprange_low=-0.1)
    with pytest.raises(ValueError, match="clip_ratio_c must be in"):
        rlkern.policy_loss(x, x, x, x, clip_ratio_c=1.0)


def test_inputs_that_get_no_gradient():
    x, a = torch.zeros(1, 2), torch.ones(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="advantages must not require grad"):
        rlkern.policy_loss(x, x, a, torch.ones(1, 2))


def test_edge_of_the_value_clip(backend):
    """v sits on V + c, and its error is 1: torch.minimum halves the clipped term's gradient, torch.maximum halves both."""
    v, ret, old, mask = torch.tensor([[1.5]]), torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.ones(1, 1)

    def theirs(v):
        inside = torch.max(torch.min(v, old + 0.5), old - 0.5)
        return 0.5 * torch.max((v - ret).square(), (inside - ret).square())

    assert grad_of(theirs, v).item() == 0.75
    assert grad_of(lambda v: rlkern.value_loss(v, ret, old, mask).loss, v).item() == 1


def test_token_mean_without_a_mask():
    """ROLL's token-mean adds a term at masked tokens too: the entropy of 3 tokens of padding, beside 1 that counts."""
    x, mask = torch.ones(1, 4), torch.tensor([[1, 0, 0, 0]])
    assert x.sum() / mask.sum() == 4
    loss = rlkern.policy_loss(0 * x, 0 * x, 0 * x, mask, entropy=x, entropy_coeff=-1.0).loss
    assert loss == 1


# ---- from logits --------------------------------------------------------------------------------------------------------
def test_entropy_of_a_barred_word():
    z = torch.tensor([[0.0, -INF, 0.0]])
    assert (z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)).isnan()
    assert rlkern.entropy(z).item() == pytest.approx(math.log(2))


def test_entropy_in_half_precision():
    z = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rlkern.entropy(z.double())
    theirs = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert worst(theirs, exact) == pytest.approx(0.055, rel=0.3)
    assert worst(rlkern.entropy(z), exact) < 1e-5


def test_sum_of_squares_at_an_offset():
    z = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) + 1000
    exact = rlkern.sum_pi_squared(z.double())
    theirs = (torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1)).exp()
    assert ((theirs - exact) / exact).abs().max().item() == pytest.approx(1.2e-4, rel=0.3)
    assert ((rlkern.sum_pi_squared(z) - exact) / exact).abs().max().item() < 1e-5
