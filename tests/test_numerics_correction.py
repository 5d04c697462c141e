# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md, its rows on rollout correction: each test shows the number that the row states.

A framework's formula stands here in plain torch, in the dtypes that the framework uses.
"""

import math

import pytest
import torch

import rlkern

NAN = math.nan


def near(gap, seed=0, rows=8):
    """(old, rollout) log-probs that differ by `gap` in the standard deviation."""
    g = torch.Generator().manual_seed(seed)
    rollout = -2 * torch.rand(rows, 512, generator=g) - 0.01
    return rollout + gap * torch.randn(rows, 512, generator=g), rollout


def metrics(old, rollout, **options):
    return rlkern.rollout_correction(old, rollout, torch.ones_like(old), **options).metrics.as_dict(prefix="")


# ---- masked positions -------------------------------------------------------------------------------------------------
def test_padding_nan_in_weights(backend):
    old, rollout, mask = torch.tensor([[-1.0, NAN]]), torch.tensor([[-1.5, -1.0]]), torch.tensor([[1, 0]])
    assert ((old - rollout).clamp(-20, 20).exp() * mask).isnan().tolist() == [[False, True]]
    found = rlkern.rollout_correction(old, rollout, mask, rollout_is="token")
    assert found.weights.tolist() == [[pytest.approx(math.exp(0.5)), 0.0]]
    assert all(math.isfinite(x) for x in found.metrics.as_dict().values())


def test_mask_of_three(backend):
    old, rollout, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.0]]), torch.tensor([[3.0, 1.0]])
    theirs = (old - rollout).exp() * mask
    assert theirs[0, 0].item() == pytest.approx(3 * math.exp(0.5))
    found = rlkern.rollout_correction(old, rollout, mask, rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold=1.2)
    assert found.weights.tolist() == [[pytest.approx(math.exp(0.5)), 1.0]]
    assert found.response_mask.tolist() == [[0.0, 1.0]]
    assert rlkern.rollout_correction(old, rollout, mask).response_mask.tolist() == [[3.0, 1.0]]


def test_coefficient_at_masked_tokens(backend):
    """OpenRLHF multiplies the loss, not the coefficient, by the mask; TRL's log-ratio is 0 there."""
    old, rollout, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.5]]), torch.tensor([[1, 0]])
    theirs = (old - rollout).exp().clamp(0.5, 5.0), ((old - rollout) * mask).exp()
    assert [x[0, 1].item() for x in theirs] == [pytest.approx(math.exp(0.5)), 1.0]
    for padding in (0.0, 1.0):
        assert rlkern.importance_weights(old, rollout, mask, high=5.0, padding=padding).weights[0, 1] == padding
    assert rlkern.importance_weights(old, rollout, mask, high=5.0).weights[0, 1] == 0


# ---- metrics ----------------------------------------------------------------------------------------------------------
def test_band_that_drops_all(backend):
    old, rollout = near(0.1)
    w = (old - rollout).exp()
    kept = torch.where((w >= 1000) & (w <= 2000), w, 0.0)
    with pytest.raises(ZeroDivisionError):
        1.0 / (kept / (kept.mean() + 1e-8)).square().mean().item()
    found = metrics(old, rollout, rollout_is="token", rollout_is_threshold="1000_2000")
    assert found["rollout_is_eff_sample_size"] == 0
    assert found["rollout_is_oob_ratio"] == 1


def test_deviation_in_one_pass(backend):
    def one_pass(x):
        return (x.square().mean() - x.mean().square()).clamp(min=0).sqrt().item()

    equal = []
    for gap in torch.linspace(0.05, 0.65, 40).tolist():
        old, rollout = torch.full((1, 9), -1.0), torch.full((1, 9), -1.0 - gap)
        equal.append(one_pass((old - rollout).exp()))
        assert metrics(old, rollout, rollout_is="token")["rollout_is_std"] < 1e-7
    assert max(equal) == pytest.approx(1.2e-3, rel=0.1)
    theirs = []
    for seed in range(8):
        old, rollout = near(1e-4, seed)
        theirs.append(one_pass((old - rollout).exp()))
        assert metrics(old, rollout, rollout_is="token")["rollout_is_std"] == pytest.approx(1e-4, rel=0.03)
    assert min(theirs) == 0
    assert max(theirs) > 3e-4


def test_k3_of_near_policies(backend):
    old, rollout = near(1e-4)
    q = old - rollout
    exact = (torch.expm1(q.double()) - q.double()).mean().item()
    assert exact == pytest.approx(5e-9, rel=0.03)
    assert abs((q.exp() - q - 1).mean().item() - exact) > 0.9 * exact  # nothing of it is left
    assert metrics(old, rollout)["k3_kl"] == pytest.approx(exact, rel=1e-5)


# ---- thresholds -------------------------------------------------------------------------------------------------------
def test_sum_of_a_row_at_its_limit(backend):
    """A row whose float32 sum is another number than its sum: at the smaller of the two one is kept, the other rejected."""
    old, rollout = near(0.1, rows=64)
    k2 = 0.5 * (old - rollout).square()
    theirs, exact = k2.sum(-1), k2.double().sum(-1).float()
    rows = (theirs != exact).nonzero()[:, 0].tolist()
    assert len(rows) > 10
    assert (theirs / exact - 1).abs().max() < 1e-6
    for row in rows[:10]:
        limit = torch.minimum(theirs, exact)[row].item()
        options = {"rollout_rs": "seq_sum_k2", "rollout_rs_threshold": limit}
        found = rlkern.rollout_correction(old[row : row + 1], rollout[row : row + 1], torch.ones(1, 512), **options)
        assert bool(found.response_mask.all()) == bool(exact[row] <= limit)
        assert bool(exact[row] <= limit) != bool(theirs[row] <= limit)


def test_thresholds_in_half_precision(backend):
    old, rollout = torch.tensor([[-1.0]]).bfloat16(), torch.tensor([[-1.5]]).bfloat16()
    assert (old - rollout).exp().clamp(max=1.2).item() == 1.203125
    assert (torch.tensor(1.2).bfloat16()).item() == 1.203125
    old, rollout = torch.tensor([[-0.5]]).bfloat16(), torch.tensor([[-0.68359375]]).bfloat16()
    exact = math.exp(0.18359375)  # 1.2015: outside of a band that ends at 1.2, inside of one at 1.203
    assert 1.2 < exact < 1.203125
    theirs = (old - rollout).exp()
    assert (theirs <= torch.tensor(1.2).bfloat16()).item()
    band = {"rollout_is": "token", "rollout_is_threshold": "0.5_1.2"}
    assert rlkern.rollout_correction(old, rollout, torch.ones(1, 1).bfloat16(), **band).weights.item() == 0


def test_divergence_below_zero(backend):
    for gap, stated in ((1e-3, 0.11), (1e-4, 0.43)):
        old, rollout = near(gap, rows=20)
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        lost = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) < 0
        assert lost.double().mean().item() == pytest.approx(stated, abs=0.05)
        band = {"mode": "mask", "gating": "binary_kl", "low": 0.0, "high": 0.01}
        assert rlkern.importance_weights(old, rollout, torch.ones_like(old), **band).filtered == 0


# ---- ratios -----------------------------------------------------------------------------------------------------------
def test_ratio_of_a_sequence(backend):
    rollout, mask = torch.full((1, 4), -1.0), torch.ones(1, 4)
    old = rollout + 0.5
    found = {way: rlkern.importance_weights(old, rollout, mask, level="sequence", reduce=way).weights.item() for way in ("mean", "sum")}
    assert found == {"mean": pytest.approx(math.exp(0.5)), "sum": pytest.approx(math.exp(2.0))}
    product = rlkern.rollout_correction(old, rollout, mask, rollout_is="sequence", rollout_is_threshold=100.0).weights
    assert product[0, 0].item() == pytest.approx(math.exp(2.0))


def test_nan_log_ratio(backend):
    old, rollout, mask = torch.tensor([[NAN, -1.0]]), torch.tensor([[-1.0, -1.5]]), torch.ones(1, 2)
    w = (old - rollout).exp()
    assert w.nan_to_num(nan=0.0)[0, 0] == 0  # NeMo-RL
    assert (old - rollout).nan_to_num(nan=0.0).exp()[0, 0] == 1  # TRL
    for nan, first in (("show", NAN), ("one", 1.0), ("drop", 0.0)):
        got = rlkern.importance_weights(old, rollout, mask, high=5.0, nan=nan).weights[0].tolist()
        assert got == [pytest.approx(first, nan_ok=True), pytest.approx(math.exp(0.5))]
    assert rlkern.rollout_correction(old, rollout, mask, rollout_is="token").weights[0, 0].isnan()


def test_correction_of_nothing():
    """The kernels of a GPU return; the host finds it when it reads the numbers."""
    old, rollout = near(0.1)
    with pytest.raises(ValueError, match="the mask must select at least one value"):
        rlkern.rollout_correction(old, rollout, torch.zeros_like(old))
    found = rlkern.rollout_metrics(old, rollout, torch.ones_like(old))
    nothing = found._replace(table=torch.zeros_like(found.table))
    with pytest.raises(ValueError, match="the mask must select at least one value"):
        nothing.as_dict()
