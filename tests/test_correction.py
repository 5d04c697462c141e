# SPDX-License-Identifier: Apache-2.0
"""rollout_correction: verl's recorded configurations, every option and dtype against float64, padding and NaN."""

import json
import math
import pathlib

import pytest
import torch
from correction_cases import CONFIGS, EVERYTHING, OFF_POLICY, batch, same

import rlkern
from rlkern.testing import assert_within, mask_kinds
from rlkern.thresholds import RS_OPTIONS

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
INPUTS = {k: torch.tensor(v) for k, v in GOLDEN["inputs"].items() if k != "index"}
RECORDED = GOLDEN["rollout_correction(old_log_prob=log_prob,rollout=old_log_probs)"]


# ---- verl, restated in the dtype of its inputs ------------------------------------------------------------------------
def mean(x, m, dim=None):
    return torch.where(m != 0, x, 0).sum(dim) / ((m != 0).sum(dim) + 1e-8)


def framework(old, rollout, m, rollout_is=None, rollout_is_threshold=2.0, rollout_rs=None, rollout_rs_threshold=None, **_):
    """(weights, modified mask, the metrics that depend on arithmetic), without batch normalisation."""
    q = old - rollout
    safe, found = q.clamp(-20, 20), {}
    rows = [mean(x, m, -1) for x in (old, rollout)]
    weights, keep = None, m != 0
    if rollout_is:
        low, high = ([float(x) for x in str(rollout_is_threshold).split("_")] * 2)[:2]
        band = "_" in str(rollout_is_threshold)
        total = torch.where(m != 0, q, 0).sum(-1, keepdim=True)
        w = (safe if rollout_is == "token" else total.clamp(-20, 20).expand_as(q)).exp() * (m != 0)
        weights = torch.where((w >= low) & (w <= high), w, 0) if band else w.clamp(max=high)
        found["rollout_is_mean"] = mean(weights, m)
        found["rollout_is_std"] = (mean((weights - mean(weights, m)) ** 2, m)).sqrt()
        found["rollout_is_eff_sample_size"] = (mean(weights, m) + 1e-8) ** 2 / mean(weights**2, m)
        found["rollout_is_seq_std"] = mean(weights, m, -1).std()
    k = {"k1": -safe, "k2": safe**2 / 2, "k3": safe.exp() - 1 - safe}
    options = rollout_rs.split(",") if rollout_rs else []
    thresholds = str(rollout_rs_threshold).split(",") * len(options)
    for option, threshold in zip(options, thresholds, strict=False):
        v = k[option[-2:]]
        if option.startswith("seq_sum"):
            v = torch.where(m != 0, v, 0).sum(-1)
        elif option.startswith("seq_mean"):
            v = mean(v, m, -1)
        elif option.startswith("seq_max"):
            v = torch.where(m != 0, v, -math.inf).amax(-1).clamp(min=0)
        of_rows = v if v.dim() == 1 else mean(v, m, -1)
        v = v if v.dim() == 2 else v[:, None].expand_as(q)
        high = float(threshold.split("_")[-1])
        low, high = (
            (math.log(float(threshold.split("_")[0]) if "_" in threshold else 1 / high), math.log(high)) if "k1" in option else (0, high)
        )
        keep = keep & (v >= low) & (v <= high)
        c, of_rows = v.clamp(low, high), of_rows[(m != 0).any(-1)]
        found[f"rollout_rs_{option}_mean"] = mean(v, m)
        found[f"rollout_rs_{option}_std"] = mean((c - mean(c, m)) ** 2, m).sqrt()
        found |= {f"rollout_rs_{option}_seq_{name}": getattr(of_rows, name)() for name in ("mean", "std", "max", "min")}
    gap = rows[1] - rows[0]
    found |= {"training_ppl": (-rows[0]).exp().mean(), "rollout_ppl": (-rows[1]).exp().mean(), "ppl_ratio": gap.exp().mean()}
    found |= {"kl": mean(-q, m), "k3_kl": mean(q.exp() - q - 1, m), "chi2_token": mean((2 * safe).exp(), m) - 1}
    found["chi2_seq"] = (2 * torch.where(m != 0, q, 0).sum(-1).clamp(-20, 20)).exp().mean() - 1
    found |= {"log_ppl_abs_diff": gap.abs().mean(), "log_ppl_diff_max": gap.max(), "log_ppl_diff_min": gap.min()}
    return weights, torch.where(keep, m, 0), {f"rollout_corr/{name}": x for name, x in found.items()}


def test_rollout_correction_known_values(backend):
    old, rollout = torch.tensor([[-1.0, -2.0, 7.0], [-1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -4.0, 7.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    found = rlkern.rollout_correction(old, rollout, mask, rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold=3.0)
    assert found.weights.tolist() == [[1, 2, 0], [1, 0, 1]]
    assert found.response_mask.tolist() == [[1, 0, 0], [1, 0, 1]]
    got = found.metrics.as_dict()
    assert got["rollout_corr/kl"] == -0.5
    assert got["rollout_corr/k3_kl"] == pytest.approx((math.exp(2) - 3) / 4)
    assert got["rollout_corr/rollout_is_mean"] == 1.25
    assert got["rollout_corr/rollout_is_std"] == pytest.approx(math.sqrt(7 / 4 - 1.25**2))
    assert got["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1.25**2 / (7 / 4))
    assert got["rollout_corr/rollout_rs_masked_fraction"] == 0.25
    assert got["rollout_corr/rollout_rs_seq_masked_fraction"] == 0.5
    row = rlkern.rollout_correction(old, rollout, mask, rollout_is="sequence", rollout_is_threshold=100)
    torch.testing.assert_close(row.weights, torch.tensor([[math.exp(2), math.exp(2), 0], [1, 0, 1]]))
    for key, golden in RECORDED.items():
        args = (INPUTS["log_prob"], INPUTS["old_log_probs"], INPUTS["mask"])
        found = rlkern.rollout_correction(*args, **json.loads(key))
        if golden["weights"] is None:
            assert found.weights is None
        else:
            torch.testing.assert_close(found.weights, torch.tensor(golden["weights"]), rtol=2e-6, atol=1e-7)
        assert found.response_mask.tolist() == golden["mask"]
        got = found.metrics.as_dict()
        assert list(got) == list(golden["metrics"]), key
        for name, value in golden["metrics"].items():
            assert got[name] == pytest.approx(value, rel=2e-5, abs=3e-7), (key, name)


@pytest.mark.parametrize("config", range(len(CONFIGS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rollout_correction_matches_reference(backend, dtype, config):
    old, rollout, mask = batch(9, 83, dtype, seed=config)
    mask[3] = 0
    keywords = {**CONFIGS[config], "rollout_is_batch_normalize": False}
    found = rlkern.rollout_correction(old, rollout, mask, **keywords)
    exact = framework(old.double(), rollout.double(), mask, **keywords)
    theirs = framework(old, rollout, mask, **keywords)
    assert torch.equal(found.response_mask, exact[1])
    if found.weights is not None:
        assert found.weights.dtype == dtype
        assert_within(found.weights, theirs[0], exact[0], 1 + exact[0].abs() * (1 + old.double().abs()), "weights")
    got, kind = found.metrics.as_dict(), torch.promote_types(dtype, torch.float32)
    size = (1 + old.double().abs()).sum(-1).max() if config else 3.0  # a row's sum of log-ratios, each rounded
    for name, value in exact[2].items():
        own = theirs[2][name]
        slack = abs(float(value)) * (float(size) if "seq" in name else 8)
        assert_within(torch.tensor(got[name], dtype=kind), own, value, slack + 1, name)


@pytest.mark.parametrize("mask_dtype", mask_kinds())
def test_rollout_correction_matches_reference_for_masks(backend, mask_dtype):
    """Nonzero is 1; the modified mask keeps the mask's own values and dtype, the weights take on a float mask's."""
    old, rollout, mask = batch(5, 83)
    for config in CONFIGS[:5]:
        expected = rlkern.rollout_correction(old, rollout, mask, **config)
        threes = (mask * 3).to(mask_dtype)
        found = rlkern.rollout_correction(old, rollout, threes, **config)
        assert found.response_mask.dtype == mask_dtype
        assert found.response_mask.data_ptr() != threes.data_ptr()
        assert torch.equal(found.response_mask, (expected.response_mask * 3).to(mask_dtype))
        assert torch.equal(found.metrics.table, expected.metrics.table)
        if found.weights is not None:
            assert found.weights.dtype == (torch.float64 if mask_dtype == torch.float64 else torch.float32)
            assert torch.equal(found.weights.float(), expected.weights)
    half = rlkern.rollout_correction(
        old.bfloat16(), rollout.bfloat16(), mask.to(mask_dtype), rollout_is="token", rollout_is_batch_normalize=True
    )
    assert half.weights.dtype == torch.promote_types(torch.bfloat16, mask_dtype if mask_dtype.is_floating_point else torch.bfloat16)


@pytest.mark.parametrize("option", RS_OPTIONS)
def test_rollout_correction_matches_reference_of_each_option(backend, option):
    old, rollout, mask = batch(7, 40, torch.float64)
    keywords = {"rollout_rs": option, "rollout_rs_threshold": "1.3" if option.endswith("k1") else 0.3}
    found, (_, modified, metrics) = rlkern.rollout_correction(old, rollout, mask, **keywords), framework(old, rollout, mask, **keywords)
    assert torch.equal(found.response_mask, modified)
    got = found.metrics.as_dict()
    assert len(got) == OFF_POLICY + 14 + option.endswith("k1") + 2
    for name, value in metrics.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-9), name


def test_rollout_correction_ignores_masked(backend):
    old, rollout, mask = batch(6, 83)
    mask[2] = 0
    for config in CONFIGS:
        clean = rlkern.rollout_correction(old, rollout, mask, **config)
        for poison in (torch.nan, torch.inf, -torch.inf):
            dirty = rlkern.rollout_correction(*(torch.where(mask != 0, x, poison) for x in (old, rollout)), mask, **config)
            same(clean, dirty, 0, 0)
        if clean.weights is not None:
            assert (clean.weights[mask == 0] == 0).all()


def test_rollout_correction_ignores_masked_but_shows_valid(backend):
    """A NaN at a valid token: a truncated weight and the metrics show it, IcePop and rejection drop the token (verl's comparisons)."""
    old, rollout, _ = batch(3, 40)
    old, mask = old.clone(), torch.ones(3, 40, dtype=torch.int64)
    old[1, 3] = torch.nan
    token = rlkern.rollout_correction(old, rollout, mask, **{**EVERYTHING, "rollout_rs_threshold": "0.001_1000,99,99"})
    assert token.weights.isnan().nonzero().tolist() == [[1, 3]]
    assert (token.response_mask == 0).nonzero().tolist() == [[1, i] for i in range(40)]  # seq_mean_k3 of the row is NaN
    got = token.metrics.as_dict()
    for name in (
        "kl",
        "k3_kl",
        "training_ppl",
        "rollout_is_mean",
        "rollout_is_max",
        "rollout_rs_token_k1_max",
        "rollout_rs_seq_mean_k3_mean",
    ):
        assert math.isnan(got["rollout_corr/" + name]), name
    assert got["rollout_corr/rollout_rs_token_k1_masked_fraction"] == pytest.approx(1 / 120)
    band = rlkern.rollout_correction(old, rollout, mask, rollout_is="token", rollout_is_threshold="0.1_10")
    assert band.weights[1, 3] == 0
    assert band.weights.isfinite().all()
    row = rlkern.rollout_correction(old, rollout, mask, rollout_is="sequence")
    assert row.weights.isnan().any(-1).tolist() == [False, True, False]
    far = rollout.clone()
    far[0, 0], far[0, 1] = -math.inf, 200.0  # the bound of 20 holds everywhere but in the KL
    found = rlkern.rollout_correction(
        rollout, far, mask, rollout_is="token", rollout_is_threshold=1e30, rollout_rs="token_k2", rollout_rs_threshold=300
    )
    assert found.weights[0, 0].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert found.weights[0, 1].item() == pytest.approx(math.exp(-20), rel=1e-6)
    assert found.metrics.as_dict()["rollout_corr/k3_kl"] == math.inf
    assert found.metrics.as_dict()["rollout_corr/rollout_rs_token_k2_max"] == 200


def test_rollout_correction_ignores_masked_but_a_nan_divides_nothing(backend):
    """The mean of weights with a NaN is one, which is not above 1e-8: they stay as they are, as verl's do."""
    old, rollout = torch.tensor([[-1.0, torch.nan, -1.0]]), torch.tensor([[-1.5, -1.0, -0.8]])
    found = rlkern.rollout_correction(old, rollout, torch.ones(1, 3), rollout_is="token", rollout_is_batch_normalize=True)
    torch.testing.assert_close(found.weights, torch.tensor([[0.5, torch.nan, -0.2]]).exp(), equal_nan=True)
    assert found.metrics.as_dict()["rollout_corr/rollout_is_batch_norm_factor"] == 1.0


def test_rollout_correction_properties_near_zero(backend):
    """Weights far below 1 keep their digits: second moments of 1e-17 beside 1 would be noise, and once were a negative size."""
    pick = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) < 0.3
    for small, large in ((2.1e-9, 5e-9), (2.1e-9, 5e-8), (1e-4, 3e-4)):
        gap = torch.where(pick, small, large).double().log().float()
        got = rlkern.rollout_correction(gap, torch.zeros_like(gap), torch.ones_like(gap), rollout_is="token").metrics.as_dict(prefix="")
        w = gap.double().clamp(-20, 20).exp()
        assert got["rollout_is_eff_sample_size"] == pytest.approx((1 / (w / (w.mean() + 1e-8)).square().mean()).item(), rel=1e-5)
        assert got["rollout_is_std"] == pytest.approx(w.std(correction=0).item(), rel=1e-5)
