# SPDX-License-Identifier: Apache-2.0
"""policy_loss and policy_loss_and_grad: value, gradient and metrics, every aggregation, ties, NaN, counts of every kind."""

import json
import math
import pathlib

import pytest
import torch

import rlkern
from rlkern.aggregation import AGG_MODES
from rlkern.testing import assert_within, mask_kinds, ragged_mask

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
COUNTS = {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 7}
INPUTS = {k: torch.tensor(v) for k, v in GOLDEN["inputs"].items() if k != "index"}


def agg(x, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """verl's agg_loss."""
    m = mask.to(x.dtype) if mask.dtype == torch.bool else mask
    x = torch.where(mask != 0, x, torch.zeros_like(x))
    if mode == "token-sum":
        return (x * m).sum() * dp_size
    if mode == "token-mean":
        return (x * m).sum() / (mask.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    n = m.sum(-1)
    rows = (x * m).sum(-1) / (n + 1e-8 if mode == "seq-mean-token-mean" else 1)
    loss = rows.sum() / ((n > 0).float().sum() if global_batch_size is None else global_batch_size) * dp_size
    return loss / (x.shape[-1] if loss_scale_factor is None else loss_scale_factor) if mode.endswith("norm") else loss


def framework(old, lp, adv, mask, cliprange_low=0.2, cliprange_high=0.2, clip_ratio_c=3.0, loss_agg_mode="token-mean",
              rollout_is_weights=None, ref_log_prob=None, kl_coef=0.0, entropy=None, entropy_coeff=0.0, **counts):  # fmt: skip
    """verl's compute_policy_loss_vanilla and its KL and entropy terms, in the dtype it is given."""
    adv, w = (x if x is None or x.shape == lp.shape else x.reshape(-1, 1).expand_as(lp) for x in (adv, rollout_is_weights))
    ratio = (lp - old).clamp(-20, 20).exp()
    first, second = -adv * ratio, -adv * ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    loss = torch.maximum(first, second)
    if clip_ratio_c is not None:
        loss = torch.where(adv < 0, torch.minimum(loss, -adv * clip_ratio_c), loss)
    total = agg(loss if w is None else loss * w, mask, loss_agg_mode, **counts)
    if entropy is not None:
        total = total - entropy_coeff * agg(entropy, mask, loss_agg_mode, **counts)
    if ref_log_prob is not None:
        d = (ref_log_prob - lp).clamp(-20, 20)
        total = total + kl_coef * agg((d.exp() - d - 1).clamp(-10, 10), mask, loss_agg_mode, **counts)
    return total


def batch(B, T, dtype=torch.float32, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(B, T, generator=g) - 2
    others = [spread * torch.randn(B, T, generator=g), torch.randn(B, T, generator=g), torch.rand(B, T, generator=g) + 0.5]
    return *(x.to(dtype) for x in (lp + others[0], lp, others[1])), ragged_mask(B, T, 0.2, seed), others[2].to(dtype)


def terms(B, T, dtype=torch.float32):
    """Keywords that switch everything on."""
    g = torch.Generator().manual_seed(9)
    ref, entropy, w = (torch.rand(B, T, generator=g).to(dtype) for _ in range(3))
    return {"rollout_is_weights": w, "ref_log_prob": ref - 2.5, "kl_coef": 0.05, "entropy": entropy, "entropy_coeff": 0.01}


def value_and_grad(fn, old, lp, *rest, **keywords):
    lp = lp.detach().clone().requires_grad_()
    loss = fn(old, lp, *rest, **keywords)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    return loss.detach(), torch.autograd.grad(loss, lp)[0]


def test_policy_loss_known_values(backend):
    # r = 1, 1.5 (clipped, A > 0), 0.5 (clipped, A < 0), 4 (dual clip, A < 0), 0.5 (A > 0), masked
    ratio, adv = torch.tensor([[1.0, 1.5, 0.5, 4.0, 0.5, 9.0]]), torch.tensor([[1.0, 2.0, -1.0, -1.0, 2.0, 5.0]])
    mask, lp = torch.tensor([[1, 1, 1, 1, 1, 0]]), ratio.log().requires_grad_()
    loss, metrics = rlkern.policy_loss(torch.zeros(1, 6), lp, adv, mask)
    (grad,) = torch.autograd.grad(loss, lp)
    assert loss.item() == pytest.approx((-1 - 2.4 + 0.8 + 3 - 1) / 5, rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 0, 0, 0, -1.0, 0]]) / 5)
    assert [metrics.field(name).item() for name in ("tokens", "sequences", "clipped", "clipped_lower")] == [5, 1, 2, 1]
    assert metrics.as_dict()["actor/ppo_kl"] == pytest.approx(-math.log(0.5 * 1.5 * 4 * 0.5) / 5, rel=1e-5)
    assert metrics.as_dict()["actor/ratio_max"] == pytest.approx(4.0)
    for key, golden in GOLDEN["policy_loss(lo=.2,hi=.28,c=3)"].items():
        name, mode, weights = key.split("|")
        if name == "vanilla":
            w = INPUTS["rollout_is_weights"] if weights == "isw" else None
            check_golden(golden, {"loss_agg_mode": mode, "rollout_is_weights": w})
    for mode, golden in GOLDEN["vanilla_global_info(dp=4,tok=100,bs=16,scale=7)"].items():
        check_golden(golden, {"loss_agg_mode": mode, **COUNTS})
        check_golden(golden, {"loss_agg_mode": mode, **{k: torch.tensor(v) for k, v in COUNTS.items()}})


def check_golden(golden, keywords):
    args = (INPUTS["old_log_probs"], INPUTS["log_prob"], INPUTS["advantages"], INPUTS["mask"])
    keywords = {"cliprange_low": 0.2, "cliprange_high": 0.28, **keywords}
    loss, grad = value_and_grad(rlkern.policy_loss, *args, **keywords)
    torch.testing.assert_close(loss, torch.tensor(golden["loss"]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, torch.tensor(golden["grad"]), rtol=1e-6, atol=1e-7)
    both = rlkern.policy_loss_and_grad(*args, **keywords)
    assert torch.equal(both.loss, loss)
    assert torch.equal(both.d_log_prob, grad)
    found = both.metrics.as_dict()
    assert all(found[k] == pytest.approx(v, abs=1e-6) for k, v in golden.get("metrics", {}).items())


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_policy_loss_matches_reference(backend, dtype, mode):
    old, lp, adv, mask, _ = batch(9, 83, dtype)
    for extra, counts in ((terms(9, 83, dtype), {}), ({}, COUNTS), ({"clip_ratio_c": None, "cliprange_high": 0.28}, {})):
        tensors = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
        exact = framework(old.double(), lp.double(), adv.double(), mask, loss_agg_mode=mode, **tensors, **counts)
        scale = agg(adv.double().abs() * (lp - old).double().exp() + 1, mask, mode, **counts)
        theirs = framework(old, lp, adv, mask, loss_agg_mode=mode, **extra, **counts)
        loss = rlkern.policy_loss(old, lp, adv, mask, loss_agg_mode=mode, **extra, **counts).loss
        assert loss.dtype == (dtype if mode.startswith("token") else torch.promote_types(dtype, torch.float32))
        assert_within(loss, theirs, exact, scale, mode)


@pytest.mark.parametrize("mask_dtype", mask_kinds())
def test_policy_loss_matches_reference_for_masks(backend, mask_dtype):
    old, lp, adv, mask, _ = batch(5, 83)
    expected = rlkern.policy_loss_and_grad(old, lp, adv, mask)
    got = rlkern.policy_loss_and_grad(old, lp, adv, (mask * 3).to(mask_dtype))  # nonzero is 1
    assert got.loss.dtype == (torch.float64 if mask_dtype == torch.float64 else torch.float32)
    assert torch.equal(got.loss.float(), expected.loss)
    assert torch.equal(got.d_log_prob, expected.d_log_prob)
    assert rlkern.policy_loss(old.bfloat16(), lp.bfloat16(), adv, mask).loss.dtype == torch.float32
    count = torch.tensor(7.0)
    assert rlkern.policy_loss(old.half(), lp.half(), adv.half(), mask, batch_num_tokens=count).loss.dtype == torch.float32


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_policy_loss_grad_matches_reference(backend, dtype, mode):
    old, lp, adv, mask, _ = batch(9, 83, dtype)
    extra = terms(9, 83, dtype)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    exact = value_and_grad(framework, old.double(), lp.double(), adv.double(), mask, loss_agg_mode=mode, **wide)[1]
    theirs = value_and_grad(framework, old, lp, adv, mask, loss_agg_mode=mode, **extra)[1]
    ours = value_and_grad(rlkern.policy_loss, old, lp, adv, mask, loss_agg_mode=mode, **extra)[1]
    ratio = (lp - old).double().exp()
    near = ((ratio - 0.8).abs() < 0.02) | ((ratio - 1.2).abs() < 0.02)  # a rounded ratio may fall on the other side
    keep = ~near if dtype == torch.bfloat16 else torch.ones_like(near)
    assert ours.dtype == dtype
    assert_within(ours[keep], theirs[keep], exact[keep], exact.abs().max() + adv.double().abs().max() / mask.sum(), mode)
    entropy = extra["entropy"].clone().requires_grad_()
    loss = rlkern.policy_loss(old, lp, adv, mask, loss_agg_mode=mode, entropy=entropy, entropy_coeff=0.5).loss
    (bonus,) = torch.autograd.grad(loss, entropy)
    assert (bonus[mask == 0] == 0).all()
    per_token = torch.ones_like(lp, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(-0.5 * agg(per_token, mask, mode), per_token)[0]
    torch.testing.assert_close(bonus.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-9)


def test_policy_loss_grad_matches_reference_at_ties(backend):
    """The clamp's edges pass in full, the dual clip's tie in half, A = 0 nothing."""
    bound, A = torch.tensor([1.0]).exp(), torch.tensor([1.0, -1.0, -1.0, 0.0])
    lp = torch.tensor([[1.0, 1.0, 1.0, 1.0], [21.0, 20.0, -20.0, -21.0]])
    adv = torch.stack([A, torch.full((4,), 1e-6)])
    keywords = {"cliprange_low": 0.0, "cliprange_high": bound.item() - 1, "clip_ratio_c": bound.item(), "loss_agg_mode": "token-sum"}
    with torch.no_grad():  # the edge as this backend's exp sees it
        edge = -rlkern.policy_loss(torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1), cliprange=99.0).loss
    keywords["cliprange_high"], keywords["clip_ratio_c"] = edge.double().item() - 1, edge.item()
    grad = value_and_grad(rlkern.policy_loss, torch.zeros(2, 4), lp, adv, torch.ones(2, 4), **keywords)[1]
    assert grad[0].tolist() == [-edge.item(), edge.item() / 2, edge.item() / 2, 0.0]
    wide = {**keywords, "cliprange_high": 1e30, "clip_ratio_c": None}
    grad = value_and_grad(rlkern.policy_loss, torch.zeros(2, 4), lp, adv, torch.ones(2, 4), **wide)[1]
    assert grad[1, 0] == 0
    assert grad[1, 1].item() == pytest.approx(-1e-6 * math.exp(20), rel=1e-5)
    assert grad[1, 2] < 0
    assert grad[1, 3] == 0


@pytest.mark.parametrize("mode", AGG_MODES)
def test_policy_loss_gradcheck(backend, mode):
    old, lp, adv, mask, _ = batch(3, 9, torch.float64, spread=0.1)
    extra = terms(3, 9, torch.float64)
    entropy = extra.pop("entropy").requires_grad_()

    def loss(x, e):
        return rlkern.policy_loss(old, x, adv, mask, loss_agg_mode=mode, entropy=e, **extra).loss

    assert torch.autograd.gradcheck(loss, (lp.requires_grad_(), entropy))
    assert torch.autograd.gradgradcheck(loss, (lp, entropy))


def test_policy_loss_ignores_masked(backend):
    old, lp, adv, mask, _ = batch(6, 83)
    mask[2] = 0
    for mode in AGG_MODES:
        for extra in ({}, terms(6, 83)):
            clean = rlkern.policy_loss_and_grad(old, lp, adv, mask, loss_agg_mode=mode, **extra)
            for poison in (torch.nan, torch.inf, -torch.inf):
                tensors = [torch.where(mask != 0, x, poison) for x in (old, lp, adv)]
                keywords = {k: torch.where(mask != 0, v, poison) if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
                dirty = rlkern.policy_loss_and_grad(*tensors, mask, loss_agg_mode=mode, **keywords)
                assert torch.equal(clean.loss, dirty.loss)
                assert torch.equal(clean.d_log_prob, dirty.d_log_prob)
                assert torch.equal(clean.metrics.sums, dirty.metrics.sums)
                assert torch.equal(clean.metrics.maxes, dirty.metrics.maxes)
            assert (clean.d_log_prob[mask == 0] == 0).all()


def test_policy_loss_ignores_masked_but_shows_valid(backend):
    for which in range(3):
        args = list(batch(2, 40)[:3])
        args[which] = args[which].clone()
        args[which][1, 3] = torch.nan
        both = rlkern.policy_loss_and_grad(*args, torch.ones(2, 40))
        assert both.loss.isnan()
        assert both.d_log_prob.isnan().nonzero().tolist() == [[1, 3]]
        assert both.metrics.field("nonfinite").item() == 1
        assert both.metrics.maxes.isfinite().all()
