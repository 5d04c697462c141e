# SPDX-License-Identifier: Apache-2.0
"""value_loss: value, gradient, metrics, aggregation, edges; Metrics of both losses."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.aggregation import AGG_MODES
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
OPENRLHF = json.loads((pathlib.Path(__file__).parent / "golden" / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]
HUBER = {"huber_delta": 0.75, "scale": 3.0}
COUNTS = {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 7}


def agg(x, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    x, n = torch.where(mask != 0, x, torch.zeros_like(x)), (mask != 0).sum(-1)
    if mode == "token-sum":
        return x.sum() * dp_size
    if mode == "token-mean":
        return x.sum() / (n.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    rows = x.sum(-1) / (n.clamp(min=1) if mode == "seq-mean-token-mean" else 1)
    loss = rows.sum() / ((n > 0).sum() if global_batch_size is None else global_batch_size) * dp_size
    return loss / (x.shape[-1] if loss_scale_factor is None else loss_scale_factor) if mode.endswith("norm") else loss


def framework(vpreds, returns, values, mask, cliprange_value=0.5, huber_delta=None, scale=1.0, loss_agg_mode="token-mean", **counts):
    """verl's compute_value_loss, in the dtype it is given; AReaL's Huber loss, NeMo-RL's scale."""

    def size(error):
        if huber_delta is None:
            return error.square()
        return torch.where(error.abs() <= huber_delta, error.square(), 2 * huber_delta * (error.abs() - 0.5 * huber_delta))

    error = size(vpreds - returns)
    if cliprange_value is not None:
        inside = torch.maximum(torch.minimum(vpreds, values + cliprange_value), values - cliprange_value)
        error = torch.maximum(error, size(inside - returns))
    return 0.5 * scale * agg(error, mask, loss_agg_mode, **counts)


def batch(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(B, T, generator=g)
    tensors = (v, v + torch.randn(B, T, generator=g), v + 0.6 * torch.randn(B, T, generator=g))
    return *(x.to(dtype) for x in tensors), ragged_mask(B, T, 0.2, seed)


def value_and_grad(fn, vpreds, *rest, **keywords):
    v = vpreds.detach().clone().requires_grad_()
    loss = fn(v, *rest, **keywords)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    return loss.detach(), torch.autograd.grad(loss, v)[0]


def test_value_loss_known_values(backend):
    # v - R = 1 (inside), 3 (clip pulls it to 1: the unclipped term wins), -1 (clip pulls it to -2: no gradient), masked
    v, r, old = torch.tensor([[1.0, 3.0, 0.0, 7.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.5, -1.5, 0.0]])
    v.requires_grad_()
    loss, metrics = rlkern.value_loss(v, r, old, torch.tensor([[1, 1, 1, 0]]))
    assert loss.item() == pytest.approx((0.5 + 4.5 + 2.0) / 3)
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.tensor([[1.0, 3.0, 0.0, 0.0]]) / 3)
    found = metrics.as_dict()
    assert found["critic/vf_clipfrac"] == pytest.approx(1 / 3)
    assert found["critic/vpred_mean"] == pytest.approx(4 / 3)
    assert found["critic/abs_error_max"] == 3
    assert rlkern.value_loss(v.detach(), r, None, torch.ones(1, 4), cliprange_value=None).loss.item() == pytest.approx((1 + 9 + 1 + 49) / 8)
    golden = GOLDEN["value_loss(vpreds=values,returns=token_level_rewards,values=values-0.7*adv,clip=.5)"]
    inputs = {k: torch.tensor(x) for k, x in GOLDEN["inputs"].items() if k != "index"}
    old = inputs["values"] - 0.7 * inputs["advantages"]
    loss, grad = value_and_grad(rlkern.value_loss, inputs["values"], inputs["token_level_rewards"], old, inputs["mask"])
    torch.testing.assert_close(loss, torch.tensor(golden["loss"]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, torch.tensor(golden["grad"]), rtol=1e-6, atol=1e-7)
    metrics = rlkern.value_loss(inputs["values"], inputs["token_level_rewards"], old, inputs["mask"]).metrics
    assert metrics.as_dict()["critic/vf_clipfrac"] == pytest.approx(golden["clipfrac"], abs=1e-6)
    for token_level in (True, False):
        golden = OPENRLHF[f"value(old=values-.7adv,ret=rew,clip=.5,token_level={token_level})"]
        mode = "token-mean" if token_level else "seq-mean-token-mean"
        args = (inputs["values"], inputs["token_level_rewards"], old, inputs["mask"])
        loss, grad = value_and_grad(rlkern.value_loss, *args, loss_agg_mode=mode)
        torch.testing.assert_close(loss, torch.tensor(golden["loss"]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, torch.tensor(golden["grad"]), rtol=1e-6, atol=1e-7)


def test_value_loss_known_values_of_huber_and_scale(backend):
    # errors 1, 3 (beyond delta = 2), -1 and, clipped to 0.5 away from -1.5, -3.5 whose half square would be 6.125
    v, r, old = torch.tensor([[1.0, 3.0, -1.0, -0.5]]), torch.tensor([[0.0, 0.0, 0.0, 1.5]]), torch.tensor([[1.0, 3.0, -1.0, -2.5]])
    keywords = {"huber_delta": 2.0, "loss_agg_mode": "token-sum"}
    loss, grad = value_and_grad(rlkern.value_loss, v, r, old, torch.ones(1, 4), **keywords)
    assert loss.item() == pytest.approx(0.5 + 4.0 + 0.5 + 5.0)
    assert grad.tolist() == [[1.0, 2.0, -1.0, 0.0]]
    twice = value_and_grad(rlkern.value_loss, v, r, old, torch.ones(1, 4), scale=2.0, **keywords)
    assert twice[0] == 2 * loss
    assert torch.equal(twice[1], 2 * grad)
    found = rlkern.value_loss(v, r, old, torch.ones(1, 4), scale=2.0, dp_size=torch.tensor(3), batch_num_tokens=4, **keywords)
    assert found.loss == 6 * loss
    assert found.metrics.field("vf_loss") == 6 * loss.double()


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_loss_matches_reference(backend, dtype, mode):
    *tensors, mask = batch(9, 83, dtype)
    for keywords in ({}, COUNTS, {"cliprange_value": None}, {"cliprange_value": 0.0}, HUBER, {"cliprange_value": None, **HUBER, **COUNTS}):
        keywords = {"loss_agg_mode": mode, **keywords}
        exact = framework(*(x.double() for x in tensors), mask, **keywords)
        loss = rlkern.value_loss(*tensors, mask, **keywords).loss
        assert loss.dtype == (dtype if mode.startswith("token") else torch.promote_types(dtype, torch.float32))
        assert_within(loss, framework(*tensors, mask, **keywords), exact, exact, mode)


@pytest.mark.parametrize("mask_dtype", mask_kinds())
def test_value_loss_matches_reference_for_masks(backend, mask_dtype):
    *tensors, mask = batch(5, 83)
    loss = rlkern.value_loss(*tensors, mask.to(mask_dtype)).loss
    assert loss.dtype == (torch.float64 if mask_dtype == torch.float64 else torch.float32)
    assert torch.equal(loss.float(), rlkern.value_loss(*tensors, mask).loss)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_loss_grad_matches_reference(backend, dtype, mode):
    *tensors, mask = batch(9, 83, dtype)
    wide = [x.double() for x in tensors]
    for keywords in ({}, HUBER):
        exact = value_and_grad(framework, *wide, mask, loss_agg_mode=mode, **keywords)[1]
        theirs = value_and_grad(framework, *tensors, mask, loss_agg_mode=mode, **keywords)[1]
        ours = value_and_grad(rlkern.value_loss, *tensors, mask, loss_agg_mode=mode, **keywords)[1]
        near = ((wide[0] - wide[2]).abs() - 0.5).abs() < 0.02
        keep = ~near if dtype == torch.bfloat16 else torch.ones_like(near)  # a rounded bound may fall on the other side
        assert ours.dtype == dtype
        assert_within(ours[keep], theirs[keep], exact[keep], exact.abs(), mode)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_value_loss_gradcheck(backend, mode):
    v, r, old, mask = batch(3, 9, torch.float64)
    for keywords in ({}, HUBER, {"cliprange_value": None, **HUBER}):

        def loss(v, keywords=keywords):
            return rlkern.value_loss(v, r, old, mask, loss_agg_mode=mode, **keywords).loss

        assert torch.autograd.gradcheck(loss, (v.requires_grad_(),))
        assert torch.autograd.gradgradcheck(loss, (v,))


def test_value_loss_ignores_masked(backend):
    *tensors, mask = batch(6, 83)
    mask[2] = 0
    for mode in AGG_MODES:
        clean, grad = value_and_grad(rlkern.value_loss, *tensors, mask, loss_agg_mode=mode)
        dirty = [torch.where(mask != 0, x, torch.nan) for x in tensors]
        found = value_and_grad(rlkern.value_loss, *dirty, mask, loss_agg_mode=mode)
        assert torch.equal(found[0], clean)
        assert torch.equal(found[1], grad)
        assert (grad[mask == 0] == 0).all()
    for which in range(3):
        shown = [x.clone() for x in tensors]
        shown[which][1, 3] = torch.nan
        for clip, delta in ((math.inf, None), (0.5, None), (0.5, 0.75)):
            keywords = {"cliprange_value": clip, "huber_delta": delta}
            loss, grad = value_and_grad(rlkern.value_loss, *shown, torch.ones(6, 83), **keywords)
            assert loss.isnan()
            assert grad.isnan().nonzero().tolist() == [[1, 3]]
        assert rlkern.value_loss(*shown, torch.ones(6, 83)).metrics.field("nonfinite").item() == 1


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_value_loss_edge_shapes(backend, B, T, why, mode):
    *tensors, mask = batch(B, T)
    for m in (mask, mask * 0):
        loss, grad = value_and_grad(rlkern.value_loss, *tensors, m, loss_agg_mode=mode)
        if m.any():
            expected = value_and_grad(framework, *tensors, m, loss_agg_mode=mode)
            torch.testing.assert_close((loss, grad), expected, rtol=1e-5, atol=1e-6)
        else:
            assert loss.isnan() or mode == "token-sum"
            assert not grad.any()
    wide = torch.full((3, B, T + 5), torch.nan)[:, :, 2 : T + 2]
    wide.copy_(torch.stack(tensors))
    loss = rlkern.value_loss(*wide, mask, loss_agg_mode=mode, **COUNTS).loss
    torch.testing.assert_close(loss, framework(*tensors, mask, loss_agg_mode=mode, **COUNTS), rtol=1e-5, atol=1e-6)
    if B and T:
        row = tensors[1][:, :1].expand(B, T)
        loss = rlkern.value_loss(tensors[0], row, tensors[2], mask, loss_agg_mode=mode, **COUNTS).loss
        torch.testing.assert_close(loss, framework(tensors[0], row, tensors[2], mask, loss_agg_mode=mode, **COUNTS), rtol=1e-5, atol=1e-6)


def test_value_loss_edge_shapes_packed(backend):
    *tensors, mask = batch(3, 20)
    cu = torch.tensor([0, 20, 40, 60])
    for mode in AGG_MODES:
        keywords = {"loss_agg_mode": mode, "loss_scale_factor": 20}
        packed = value_and_grad(rlkern.value_loss, *(x.reshape(-1) for x in (*tensors, mask)), cu_seqlens=cu, **keywords)
        loss, grad = value_and_grad(rlkern.value_loss, *tensors, mask, **keywords)
        torch.testing.assert_close(packed, (loss, grad.reshape(-1)))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_value_loss_properties(B, T, seed):
    *tensors, mask = batch(B, T, torch.float64, seed)
    mask[:, 0] = 1
    loss, grad = value_and_grad(rlkern.value_loss, *tensors, mask)
    shifted = value_and_grad(rlkern.value_loss, *(x + 3 for x in tensors), mask)
    torch.testing.assert_close(shifted, (loss, grad), rtol=1e-9, atol=1e-12)
    plain = rlkern.value_loss(*tensors, mask, cliprange_value=None).loss
    assert loss >= plain - 1e-12
    torch.testing.assert_close(rlkern.value_loss(*tensors, mask, cliprange_value=math.inf).loss, plain)
    torch.testing.assert_close(rlkern.value_loss(*tensors, mask, huber_delta=math.inf).loss, loss)
    assert rlkern.value_loss(*tensors, mask, huber_delta=0.5).loss <= loss
    torch.testing.assert_close(plain, 0.5 * ((tensors[0] - tensors[1]).square() * mask).sum() / mask.sum())


def test_value_loss_rejects(backend):
    v, r, old, mask = batch(2, 5)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: cliprange_value must be in"):
        rlkern.value_loss(v, r, old, mask, cliprange_value=-1.0)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: huber_delta must be in"):
        rlkern.value_loss(v, r, old, mask, huber_delta=0.0)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: scale must be in"):
        rlkern.value_loss(v, r, old, mask, scale=-1.0)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: values must be given with cliprange_value"):
        rlkern.value_loss(v, r, None, mask)
    with pytest.raises(TypeError, match=r"rlkern\.value_loss: returns must be a torch\.Tensor"):
        rlkern.value_loss(v, None, old, mask)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: returns must have the shape"):
        rlkern.value_loss(v, r[:, :1], old, mask)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: loss_agg_mode must be one of"):
        rlkern.value_loss(v, r, old, mask, loss_agg_mode=None)
    with pytest.raises(ValueError, match=r"rlkern\.value_loss: global_batch_size must be given with dp_size"):
        rlkern.value_loss(v, r, old, mask, loss_agg_mode="seq-mean-token-mean", dp_size=torch.tensor(2))
    for name in ("returns", "values"):
        tensors = {"returns": r, "values": old, name: r.clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"rlkern\.value_loss: {name} must not require grad"):
            rlkern.value_loss(v, **tensors, response_mask=mask)


def test_value_loss_registers(backend_number):
    v, r, old, mask = batch(3, 20)
    nan = float("nan")
    args = (
        v,
        r,
        old,
        mask,
        None,
        None,
        0.5,
        math.inf,
        "seq-mean-token-mean",
        [1.0, nan, nan, nan],
        torch.float32,
        [True, True],
        backend_number,
    )
    torch.library.opcheck(torch.ops.rlkern._value_loss_fwd.default, args)

    def step(v):
        loss, metrics = rlkern.value_loss(v, r, old, mask)
        return loss * 3.0, metrics.sums

    found = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = v.clone().requires_grad_()
        loss, sums = fn(leaf)
        found.append((loss.detach(), sums, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- metrics --------------------------------------------------------------------------------------------------------
def test_metrics(tmp_path):
    v, r, old, mask = batch(4, 30)
    value = rlkern.value_loss(v, r, old, mask).metrics
    policy = rlkern.policy_loss(v, r, old, mask, ref_log_prob=v, entropy=r, entropy_coeff=0.1).metrics
    assert {"kl_loss", "actor/entropy_loss", "actor/pg_clipfrac", "actor/ppo_kl"} <= policy.as_dict().keys()
    assert "kl_loss" not in rlkern.policy_loss(v, r, old, mask).metrics.as_dict()
    twice = policy.merge(policy)
    assert twice.field("tokens") == 2 * policy.field("tokens")
    assert twice.as_dict()["actor/ppo_kl"] == pytest.approx(policy.as_dict()["actor/ppo_kl"])
    with pytest.raises(ValueError, match=r"rlkern\.Metrics\.merge: other must be of kind"):
        policy.merge(value)
    with pytest.raises(ValueError, match=r"rlkern\.Metrics\.field: name must be one of"):
        value.field("pg_loss")
    assert policy.all_reduce() is policy
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        reduced = policy.all_reduce()
        assert torch.equal(reduced.sums, policy.sums)
        assert reduced.sums is not policy.sums
    finally:
        torch.distributed.destroy_process_group()
