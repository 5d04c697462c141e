# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md, its rows on the variants of the policy loss: each test shows the number that the row states.

A framework's formula stands here in plain torch, in the dtypes that the framework uses.
"""

import math

import pytest
import torch

import rlkern

NAN = math.nan
run = rlkern.policy_loss_and_grad


def batch(B=3, T=8):
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(B, T, generator=g) - 0.05
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 5:] = 0
    return old, (old + 0.2 * torch.randn(B, T, generator=g)).clamp(max=-1e-3), torch.randn(B, T, generator=g), mask


def gradient(loss, log_prob):
    leaf = log_prob.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# ---- masked positions -------------------------------------------------------------------------------------------------
def test_padding_nan_in_variants(backend):
    """verl's loss of selected tokens is finite; the gradient is 0 times a NaN."""
    old, lp, a, mask = batch()
    lp[1, 6] = NAN
    valid = mask != 0
    formulas = {
        "cispo": lambda x, r: -r.clamp(0.8, 1.2).detach() * a * x,
        "clip_cov": lambda x, r: torch.maximum(-a * r, -a * r.clamp(0.8, 1.2)),
        "kl_cov": lambda x, r: -a * r,
        "dppo_tv": lambda x, r: -a * r.clamp(max=3).detach() * x * (x.exp() - old.exp() < 0.2),
        "dro": lambda x, r: 0.05 * (x - old) ** 2 - a * x,
    }
    for name, formula in formulas.items():

        def mean(x, formula=formula):
            return torch.where(valid, formula(x, (x - old).exp()), 0.0).sum() / valid.sum()

        loss, grad = gradient(mean, lp)
        assert loss.isfinite(), name
        assert grad.isnan().sum() == 1, name
        assert grad[1, 6].isnan(), name
    row = ((lp - old).clamp(-0.2, 0.2) * mask).sum(-1) / mask.sum(-1)
    assert row.exp().mean().isnan()  # geo_mean: the loss too
    for name in (*formulas, "dppo_kl", "geo_mean", "sapo", "gspo"):
        found = run(old, lp, a, mask, variant=name, **({"dro_beta": 0.1} if name == "dro" else {}))
        assert found.loss.isfinite(), name
        assert found.d_log_prob.isfinite().all(), name
        assert found.d_log_prob[1, 6] == 0, name


# ---- choices ------------------------------------------------------------------------------------------------------------
def test_ties_of_covariances(backend):
    """Log-probs near 0 have the largest covariances; less their mean, float32 cannot tell them apart, and topk takes any."""
    lp = torch.cat([-4e-10 * torch.arange(64.0, 0, -1), torch.full((64,), -2.0)])[None]
    a = torch.cat([torch.ones(1, 64), -torch.ones(1, 64)], 1)
    cov, exact = ((x - x.mean()) * (y - y.mean()) for x, y in ((a, lp), (a.double(), lp.double())))
    assert len(cov[0, :64].unique()) == 1
    assert len(exact[0, :64].unique()) == 64
    options = {"variant": "kl_cov", "kl_cov_ratio": 1 / 128}
    with_penalty, without = (run(lp - 0.1, lp, a, torch.ones(1, 128), **options, ppo_kl_coef=x).d_log_prob for x in (0.5, 0.0))
    assert (with_penalty != without).nonzero().tolist() == [[0, 63]] == [[0, int(exact.argmax())]]


def test_nan_among_the_candidates(backend):
    """verl may choose a token whose ratio is NaN, and 0 times that is NaN: its choice is spent. Selected, it would not show."""
    lp, a = torch.tensor([[-0.1, -0.2, -3.0, -3.0]]), torch.tensor([[3.0, 3.0, -3.0, -3.0]])
    old = lp.clone()
    old[0, 0] = NAN
    cov = (a - a.mean()) * (lp - lp.mean())
    assert ((cov > 1) & (cov < 5)).all()  # verl has four candidates
    ratio = (lp - old).exp()
    assert (torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * torch.tensor([0.0, 1, 1, 1])).isnan().tolist() == [[True, *[False] * 3]]
    found = run(old, lp, a, torch.ones(1, 4), variant="clip_cov", noise=torch.arange(4.0)[None])
    assert found.loss.isnan()
    assert found.d_log_prob[0, 0].isnan()
    assert found.d_log_prob[0, 1:].tolist() == [0.0, 0.75, 0.75]  # the first that has a ratio


# ---- gates --------------------------------------------------------------------------------------------------------------
def test_divergence_near_certainty(backend):
    """The bounds of dppo_kl lie on both sides of the float32 value, and the gate follows the exact one."""

    def divergence(lp, old):
        p, q = lp.exp(), old.exp()
        return (q * (old - lp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()).item()

    lp, old, one = torch.tensor([[-3e-8]]), torch.tensor([[-1e-3]]), torch.ones(1, 1)
    exact, theirs = divergence(lp.double(), old.double()), divergence(lp, old)
    assert exact == pytest.approx(0.00912, abs=1e-5)
    assert theirs == pytest.approx(0.00857, abs=1e-5)
    for bound, is_open in ((theirs * 1.01, False), (exact * 0.999, False), (exact * 1.001, True)):
        grad = run(old, lp, one, one, variant="dppo_kl", cliprange=bound).d_log_prob.item()
        assert (grad != 0) == is_open, bound


def test_slope_of_a_sigmoid(backend):
    """autograd's s (1 - s) loses 1 - s."""
    one, old = torch.ones(1, 1), torch.tensor([[-4.0]])
    for x, stated, theirs in ((2.5, -6.781e-4, -6.797e-4), (3.0, -4.132e-7, 0.0)):
        for dtype, value in ((torch.float32, theirs), (torch.float64, stated)):
            grad = gradient(lambda y: (-4 * torch.sigmoid((y - old.to(y.dtype)).exp() - 1)).mean(), (old + x).to(dtype))[1]
            assert grad.item() == pytest.approx(value, rel=3e-4, abs=0)
        assert run(old, old + x, one, one, variant="sapo").d_log_prob.item() == pytest.approx(stated, rel=3e-4, abs=0)


def test_nan_weight_of_a_row(backend):
    """TRL's nan_to_num takes the row of a NaN out of the loss."""
    lp, one = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    old = torch.tensor([[NAN, -2.0]])
    total = (lp - old).clamp(-20, 20).sum()
    phi = (3 + 2 * total - 3 * total.exp()).exp()
    assert phi.isnan()
    assert (-phi.nan_to_num(nan=0.0) * lp).tolist() == [[0.0, 0.0]]
    found = run(old, lp, one, one, variant="vespo")
    assert found.loss.isnan()
    assert found.d_log_prob.isnan().all()


def test_nan_behaviour_weight(backend):
    old, one = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    behave = torch.tensor([[NAN, -2.0]])
    assert (old - behave).nan_to_num(0.0, 0.0, 0.0).exp().tolist() == [[1.0, 1.0]]
    assert run(old, old, one, one, variant="decoupled", rollout_log_prob=behave).loss.isnan()
    mended = torch.where(behave.isfinite(), behave, old)
    assert run(old, old, one, one, variant="decoupled", rollout_log_prob=mended).loss == -1


# ---- rows ---------------------------------------------------------------------------------------------------------------
def test_sums_of_a_row(backend):
    """The ratio of a whole row is the exponential of a sum: what the sum loses, the ratio loses relative to itself."""
    theirs = ours = 0.0
    for seed in range(20):
        x = 0.1 * torch.randn(1, 8192, generator=torch.Generator().manual_seed(seed))
        exact = x.double().sum().exp().item()
        theirs = max(theirs, abs(x.sum(-1).exp().item() / exact - 1))
        found = run(torch.zeros_like(x), x, -torch.ones(1), torch.ones_like(x), variant="rloo", cliprange_low=1.0, cliprange_high=1e9)
        ours = max(ours, abs(found.loss.item() / exact - 1))
    assert theirs == pytest.approx(2.4e-6, rel=0.7)
    assert ours < 1.2e-7  # rounded once, behind the exponential


def test_aggregation_of_its_own(backend):
    """verl's sapo and geo_mean take a mean of rows whatever loss_agg_mode says; so did its gspo up to 0.8.0."""
    lp, mask = torch.full((2, 3), -1.0), torch.tensor([[1, 0, 0], [1, 1, 1]])
    a = torch.tensor([1.0, 0.0])
    losses = {mode: {} for mode in (None, "token-mean", "seq-mean-token-mean")}
    for mode, found in losses.items():
        for name in ("sapo", "gspo", "geo_mean"):
            if name != "geo_mean" or mode != "token-mean":
                found[name] = run(lp, lp, a, mask, variant=name, loss_agg_mode=mode).loss.item()
    assert losses[None] == {"sapo": -1.0, "gspo": -0.25, "geo_mean": -0.5}
    assert losses["token-mean"] == {"sapo": -0.5, "gspo": -0.25}
    assert losses["seq-mean-token-mean"] == {"sapo": -1.0, "gspo": -0.5, "geo_mean": -0.5}
    with pytest.raises(ValueError, match="loss_agg_mode must be 'seq-mean-token-mean' with variant 'geo_mean'"):
        run(lp, lp, a, mask, variant="geo_mean", loss_agg_mode="token-mean")


def test_rows_without_a_token(backend):
    """luspo, rloo (TRL) and geo_mean (verl) divide by all rows; the others' seq modes by those that have a token."""
    lp, a = torch.full((2, 3), -1.0), torch.ones(2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    stated = {"luspo": -1.0, "rloo": -0.5, "geo_mean": -0.5, "sapo": -2.0}
    assert {name: run(lp, lp, a, mask, variant=name).loss.item() for name in stated} == stated
    assert run(lp, lp, a, mask, variant="rloo", global_batch_size=1).loss.item() == -1.0


def test_clip_range_alone(backend):
    """verl's configuration sets both bounds to 0.2, so that clip_ratio alone is not read."""
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    lp = torch.tensor([[0.15]])
    assert run(old, lp, one, one, cliprange=0.1).loss.item() == pytest.approx(-1.1)
    assert run(old, lp, one, one, cliprange=0.1, cliprange_low=0.2, cliprange_high=0.2).loss.item() == pytest.approx(-math.exp(0.15))
