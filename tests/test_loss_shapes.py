# SPDX-License-Identifier: Apache-2.0
"""policy_loss: shapes, strides, packing, what autograd does with it, bits, refusals, registration; policy_loss_and_grad."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.aggregation import AGG_MODES
from rlkern.reference import loss as reference
from rlkern.testing import SHAPES, ragged_mask

NATIVE = [f"cpp:{isa}" for isa, runs in (backends.native.isas() if backends.native else {}).items() if runs]


def batch(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(B, T, generator=g) - 2
    tensors = (lp + 0.4 * torch.randn(B, T, generator=g), lp, torch.randn(B, T, generator=g))
    return *(x.to(dtype) for x in tensors), ragged_mask(B, T, 0.2, seed)


def same(a, b, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(a.loss, b.loss, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(a.d_log_prob, b.d_log_prob, rtol=rtol, atol=atol)
    torch.testing.assert_close(a.metrics.sums, b.metrics.sums, rtol=rtol, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(a.metrics.maxes, b.metrics.maxes, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_policy_loss_edge_shapes(backend, B, T, why, mode):
    old, lp, adv, mask = batch(B, T)
    for m in (mask, mask * 0):
        found = rlkern.policy_loss_and_grad(old, lp, adv, m, loss_agg_mode=mode)
        with rlkern.use_backend("torch"):
            same(found, rlkern.policy_loss_and_grad(old, lp, adv, m, loss_agg_mode=mode))
        if not m.any():
            assert found.loss.isnan() or mode == "token-sum"
            assert not found.d_log_prob.any()
            assert found.metrics.as_dict()["actor/pg_clipfrac"] == 0
    wide = torch.full((3, B, T + 5), torch.nan)[:, :, 2 : T + 2]
    wide.copy_(torch.stack((old, lp, adv)))
    wide_mask = torch.ones(B, T + 3, dtype=torch.int64)[:, :T].copy_(mask)
    out = torch.empty(B, T + 7)[:, :T]
    keywords = {"loss_agg_mode": mode, "global_batch_size": 5.0, "batch_num_tokens": 11}
    strided = rlkern.policy_loss_and_grad(*wide, wide_mask, out=out, **keywords)
    assert strided.d_log_prob is out
    same(strided, rlkern.policy_loss_and_grad(old, lp, adv, mask, **keywords))
    per_row = adv[:, 0] if T else torch.randn(B)
    expected = rlkern.policy_loss_and_grad(old, lp, per_row[:, None].expand(B, T).contiguous(), mask, loss_agg_mode=mode)
    for form in (per_row, per_row[:, None], per_row[:, None].expand(B, T)):
        if form.shape != (B, T) or T != B:
            same(rlkern.policy_loss_and_grad(old, lp, form, mask, loss_agg_mode=mode), expected)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_policy_loss_edge_shapes_packed(backend, mode):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    old, lp, adv, _ = (x[0] for x in batch(1, 79))
    mask, adv_row, w_row = torch.rand(79) > 0.3, torch.randn(5), torch.rand(5)
    padded = [torch.zeros(5, 40) for _ in range(3)] + [torch.zeros(5, 40, dtype=torch.bool)]
    for i, n in enumerate(lengths):
        for to, x in zip(padded, (old, lp, adv, mask), strict=True):
            to[i, :n] = x[cu[i] : cu[i] + n]
    for a, b, w in ((adv, padded[2], None), (adv_row, adv_row, w_row)):
        keywords = {"loss_agg_mode": mode, "loss_scale_factor": 40, "rollout_is_weights": w}
        packed = rlkern.policy_loss_and_grad(old, lp, a, mask, cu_seqlens=cu, **keywords)
        full = rlkern.policy_loss_and_grad(padded[0], padded[1], b, padded[3], **keywords)
        flat = torch.cat([row[:n] for row, n in zip(full.d_log_prob, lengths, strict=True)])
        same(packed, full._replace(d_log_prob=flat))
        leaf = lp.clone().requires_grad_()
        rlkern.policy_loss(old, leaf, a, mask, cu_seqlens=cu, **keywords).loss.backward()
        assert torch.equal(leaf.grad, packed.d_log_prob)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(AGG_MODES))
def test_policy_loss_properties(B, T, seed, mode):
    old, lp, adv, mask = batch(B, T, torch.float64, seed)
    mask[:, 0] = 1
    one = rlkern.policy_loss_and_grad(old, lp, adv, mask, loss_agg_mode=mode)
    on_policy = rlkern.policy_loss_and_grad(lp, lp, adv, mask, loss_agg_mode="token-sum")
    torch.testing.assert_close(on_policy.loss, -(adv * mask).sum())
    torch.testing.assert_close(on_policy.d_log_prob, -adv * mask)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    shuffled = rlkern.policy_loss_and_grad(*(x[order] for x in (old, lp, adv, mask)), loss_agg_mode=mode)
    same(shuffled, one._replace(d_log_prob=one.d_log_prob[order]), 1e-9)
    wider = [torch.nn.functional.pad(x, (0, 7), value=torch.nan if x.is_floating_point() else 0) for x in (old, lp, adv, mask)]
    padded = rlkern.policy_loss_and_grad(*wider, loss_agg_mode=mode, loss_scale_factor=T)
    same(padded._replace(d_log_prob=padded.d_log_prob[:, :T]), one, 1e-9)
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": B, "loss_scale_factor": T}
    rows = [[x[i : i + 1] for x in (old, lp, adv, mask)] for i in range(B)]
    parts = [rlkern.policy_loss_and_grad(*row, loss_agg_mode=mode, **counts) for row in rows]
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), one.loss)
    merged = parts[0].metrics
    for p in parts[1:]:
        merged = merged.merge(p.metrics)
    torch.testing.assert_close(merged.sums, one.metrics.sums)
    torch.testing.assert_close(merged.maxes, one.metrics.maxes)


def test_policy_loss_properties_of_autograd(backend):
    """What trainers do: in-place sums, scaling, a second backward, accumulation, half precision under a GradScaler."""
    old, lp, adv, mask = batch(4, 50)
    leaf = lp.clone().requires_grad_()
    loss = rlkern.policy_loss(old, leaf, adv, mask).loss
    assert loss._base is None
    loss -= 0.5 * leaf.sum()
    loss += 1.0
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)
    expected = rlkern.policy_loss_and_grad(old, lp, adv, mask).d_log_prob
    torch.testing.assert_close(once, expected - 0.5)
    leaf.grad = None
    (rlkern.policy_loss(old, leaf, adv, mask).loss * torch.tensor(torch.inf)).backward()
    assert (leaf.grad[mask == 0] == 0).all()
    half = lp.half().requires_grad_()  # 1 / N is below float16's smallest number, the scaled gradient is not
    (rlkern.policy_loss(old.half(), half, adv.half(), mask, batch_num_tokens=1 << 25).loss * float(1 << 15)).backward()
    assert half.grad.dtype == torch.float16
    rounded = rlkern.policy_loss_and_grad(*(x.half().float() for x in (old, lp, adv)), mask, batch_num_tokens=1024)
    torch.testing.assert_close(half.grad.float(), rounded.d_log_prob, rtol=2e-3, atol=1e-6)
    frozen = rlkern.policy_loss(old, lp, adv, mask)
    assert not frozen.loss.requires_grad
    entropy = torch.rand(4, 50).requires_grad_()
    only_entropy = rlkern.policy_loss(old, lp, adv, mask, entropy=entropy, entropy_coeff=1.0).loss
    only_entropy.backward()
    torch.testing.assert_close(entropy.grad, -(mask / mask.sum()))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_properties_of_bits(name, mode):
    """The same bits for 1 and 2 threads, from read-only memory, with and without streaming; every ISA within rounding."""
    old, lp, adv, mask = batch(300, 1024)
    for x in (old, lp, adv, mask):
        x.numpy().flags.writeable = False
    frozen = [torch.from_numpy(x.numpy()) for x in (old, lp, adv, mask)]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with rlkern.use_backend(name):
            found.append(rlkern.policy_loss_and_grad(*frozen, loss_agg_mode=mode, ref_log_prob=frozen[0], kl_coef=0.1))
    assert torch.equal(found[0].d_log_prob, found[1].d_log_prob)
    assert torch.equal(found[0].loss, found[1].loss)
    assert torch.equal(found[0].metrics.sums, found[1].metrics.sums)
    same(found[0], rlkern.policy_loss_and_grad(*frozen, loss_agg_mode=mode, ref_log_prob=frozen[0], kl_coef=0.1))


def test_policy_loss_rejects(backend):
    old, lp, adv, mask = batch(2, 5)

    def refuses(kind, text, *args, **keywords):
        for op in (rlkern.policy_loss, rlkern.policy_loss_and_grad):
            with pytest.raises(kind, match=rf"rlkern\.{op.__name__}: {text}"):
                op(*(args or (old, lp, adv, mask)), **keywords)

    refuses(ValueError, r"cliprange must be in \[0.0", cliprange=-0.1)
    refuses(ValueError, r"cliprange_low must be", cliprange_low=float("nan"))
    refuses(TypeError, r"cliprange_high must be a number", cliprange_high="0.2")
    refuses(TypeError, r"cliprange must be a number", cliprange=[0.2])
    for c in (1.0, 0.5, -3.0, float("nan")):
        refuses(ValueError, r"clip_ratio_c must be in \(1.0", clip_ratio_c=c)
    refuses(ValueError, r"log_ratio_clamp must be", log_ratio_clamp=-1.0)
    refuses(ValueError, r"loss_agg_mode must be one of", loss_agg_mode="mean")
    refuses(ValueError, r"kl_penalty must be one of", kl_penalty="full")
    refuses(ValueError, r"kl_coef must be 0 without ref_log_prob", kl_coef=0.1)
    refuses(ValueError, r"entropy_coeff must be 0 without entropy", entropy_coeff=0.1)
    refuses(ValueError, r"batch_num_tokens must be given with dp_size", dp_size=2)
    refuses(ValueError, r"global_batch_size must be given with dp_size", dp_size=2, loss_agg_mode="seq-mean-token-sum")
    refuses(ValueError, r"batch_num_tokens must be a number or a 0-dim tensor", batch_num_tokens=torch.ones(1))
    refuses(ValueError, r"old_log_prob must have the shape", old[:, :4], lp, adv, mask)
    refuses(ValueError, r"advantages must have the shape", old, lp, torch.ones(3), mask)
    refuses(TypeError, r"advantages must be a torch\.Tensor", old, lp, None, mask)
    refuses(TypeError, r"log_prob must be float32", old, lp.long(), adv, mask)
    refuses(TypeError, r"response_mask must be", old, lp, adv, mask.to(torch.complex64))
    refuses(ValueError, r"log_prob must be \(N,\) with cu_seqlens", cu_seqlens=torch.tensor([0, 10]))
    flat = [x.reshape(-1) for x in (old, lp, adv, mask)]
    cu = torch.tensor([0, 5, 10])
    refuses(ValueError, r"loss_scale_factor must be given with cu_seqlens", *flat, cu_seqlens=cu, loss_agg_mode="seq-mean-token-sum-norm")
    for i, name in enumerate(("old_log_prob", None, "advantages")):
        if name:
            args = [x.clone().requires_grad_() if i == k else x for k, x in enumerate((old, lp, adv))]
            with pytest.raises(ValueError, match=rf"rlkern\.policy_loss: {name} must not require grad"):
                rlkern.policy_loss(*args, mask)
    for name in ("ref_log_prob", "rollout_is_weights"):
        with pytest.raises(ValueError, match=rf"rlkern\.policy_loss: {name} must not require grad"):
            rlkern.policy_loss(old, lp, adv, mask, **{name: lp.clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"rlkern\.policy_loss_and_grad: out must be"):
        rlkern.policy_loss_and_grad(old, lp, adv, mask, out=torch.empty(2, 4))


def test_policy_loss_registers(backend_number):
    old, lp, adv, mask = batch(3, 20)
    nan, inf = float("nan"), float("inf")
    rest = ([0.2, 0.2, 3.0, 20.0], "token-mean", [1.0, nan, -inf, 20.0], "k3", [-20.0, 20.0, -10.0, 10.0], [0.1, 0.1], torch.float32)
    counts = torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.float64)
    args = (old, lp, adv, None, mask, None, torch.rand(3), old, adv, counts, None, *rest, [True, True, True], backend_number)
    torch.library.opcheck(torch.ops.rlkern._policy_loss_fwd.default, args)
    torch.library.opcheck(torch.ops.rlkern._scale_fwd.default, (old, torch.tensor(2.0), old.half(), backend_number))

    ref = old + 0.1  # dynamo takes no tensor twice

    def step(lp, entropy, count):
        keywords = {"entropy": entropy, "entropy_coeff": 0.1, "ref_log_prob": ref, "kl_coef": 0.1, "batch_num_tokens": count}
        loss, metrics = rlkern.policy_loss(old, lp, adv, mask, **keywords)
        return loss * 3.0, metrics.sums

    found = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = lp.clone().requires_grad_(), adv.clone().requires_grad_()
        loss, sums = fn(*leaves, torch.tensor(9))
        found.append((loss.detach(), sums, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- policy_loss_and_grad: policy_loss without autograd, so the tests above are its own; here is what differs -----------
def test_policy_loss_and_grad_matches_reference(backend):
    old, lp, adv, mask = batch(5, 83)
    entropy = torch.rand(5, 83)
    leaves = lp.clone().requires_grad_(), entropy.clone().requires_grad_()
    keywords = {"entropy_coeff": 0.1, "ref_log_prob": old, "kl_coef": 0.2, "kl_penalty": "k3+"}
    loss, metrics = rlkern.policy_loss(old, leaves[0], adv, mask, entropy=leaves[1], **keywords)
    loss.backward()
    both = rlkern.policy_loss_and_grad(old, leaves[0], adv, mask, entropy=leaves[1], **keywords)
    assert torch.equal(both.loss, loss.detach())
    assert torch.equal(both.d_log_prob, leaves[0].grad)
    assert torch.equal(both.d_entropy, leaves[1].grad)
    assert torch.equal(both.metrics.sums, metrics.sums)
    assert not any(x.requires_grad for x in (both.loss, both.d_log_prob, both.d_entropy))
    assert rlkern.policy_loss_and_grad(old, lp, adv, mask).d_entropy is None
    half = rlkern.policy_loss_and_grad(old.half(), lp.half(), adv.half(), mask)
    assert half.d_log_prob.dtype == torch.float16


def test_policy_loss_and_grad_registers(backend):
    old, lp, adv, mask = batch(3, 20)

    def step(lp):
        both = rlkern.policy_loss_and_grad(old, lp, adv, mask, loss_agg_mode="seq-mean-token-mean")
        return both.loss, both.d_log_prob

    eager, compiled = step(lp), torch.compile(step, fullgraph=True, backend="aot_eager")(lp)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_value_loss_reference_terms_are_their_own_derivative():
    """The reference's per-token gradient against autograd of its per-token loss, off the clip's edges (verl: 0.75)."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).requires_grad_()
    for value in (-1.0, 0.5):
        loss, grad, _ = reference.value_terms(x, torch.zeros_like(x), torch.full_like(x, value), 0.2503, float("inf"))
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], grad.detach())
