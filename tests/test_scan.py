# SPDX-License-Identifier: Apache-2.0
"""gae. The oracles: hand arithmetic, recorded outputs, the step-by-step loop in float64,
and identities that no implementation shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.reference import scan as reference
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

GOLDEN = Path(__file__).parent / "golden"
GAE_RULES = ("skip", "zero", None)


def golden(name):
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    return data.get("inputs"), data


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(B, T, generator=g).to(dtype) for _ in range(2))
    return rewards, values, ragged_mask(B, T, 0.2, seed, mask_dtype)


def gae_exact(rewards, values, mask, gamma, lam, masked, bootstrap=None):
    """Float64 by the loop; what the loop is given is the mask rule."""
    r, v, m = rewards.double(), values.double(), mask != 0
    if masked == "zero":
        r, v = torch.where(m, r, 0.0), torch.where(m, v, 0.0)
    live = m if masked == "skip" else torch.ones_like(m)
    start = None if bootstrap is None else bootstrap.double()
    return reference.gae_loop(r, v, live, gamma, lam, start) if r.shape[1] else (r, v)


def gae_framework(rewards, values, mask, gamma, lam, masked, bootstrap=None):
    """The loop in the framework's own precision."""
    m = mask != 0
    zero = torch.zeros((), dtype=rewards.dtype)
    if masked == "zero":
        rewards, values = torch.where(m, rewards, zero), torch.where(m, values, zero)
    live = m if masked == "skip" else torch.ones_like(m)
    return reference.gae_loop(rewards, values, live, gamma, lam, bootstrap) if rewards.shape[1] else (rewards, values)


# ---- gae ------------------------------------------------------------------------------------------------------------
def test_gae_known_values(backend):
    r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
    advantages, returns = rlkern.gae(r, v, m, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.75]]
    assert returns.tolist() == [[1.0, 9.75, 1.0]]
    # gamma .5, lam .5, bootstrap 2: t2: 1 + .5*2 - 1 = 1; t1: 0 + .5*1 - 2 + .25*1 = -1.25; t0: 1 + .5*2 - 0 + .25*-1.25
    r, v = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    advantages, returns = rlkern.gae(r, v, gamma=0.5, lam=0.5, bootstrap=torch.tensor([2.0]))
    assert advantages.tolist() == [[1.6875, -1.25, 1.0]]
    assert returns.tolist() == [[1.6875, 0.75, 2.0]]
    # zero: the masked token is a step with R = V = 0
    advantages, _ = rlkern.gae(r, v, torch.tensor([[1, 0, 1]]), gamma=0.5, lam=0.5, masked="zero")
    assert advantages.tolist() == [[1.0 + 0.25 * 0.5, 0.5, 0.0]]


def test_gae_known_values_recorded(backend):
    inp, data = golden("verl_0.9.1")
    rewards, values, mask = (torch.tensor(inp[k]) for k in ("token_level_rewards", "values", "mask"))
    expected = data["adv_estimators(gamma=0.97,lam=0.9)"]["gae"]
    got = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9)
    torch.testing.assert_close(got.returns, torch.tensor(expected["returns"]), rtol=1e-6, atol=1e-6)
    zero = json.loads((GOLDEN / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]["gae(gamma=.97,lam=.9)"]
    got = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9, masked="zero")
    expected = torch.tensor(zero["adv"])
    torch.testing.assert_close(got.advantages, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", GAE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gae_matches_reference(backend, masked, dtype):
    for mask_dtype in mask_kinds():
        rewards, values, mask = inputs(5, 83, dtype, mask_dtype)
        kernel = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9, masked=masked)
        exact = gae_exact(rewards, values, mask, 0.97, 0.9, masked)
        framework = gae_framework(rewards, values, mask, 0.97, 0.9, masked)
        for k, f, e in zip(kernel, framework, exact, strict=True):
            assert_within(k, f, e, e.abs(), f"gae {masked} {dtype} {mask_dtype}")


@pytest.mark.parametrize("masked", GAE_RULES)
def test_gae_grad_matches_reference(backend, masked):
    def grads(fn, dtype):
        r, v, m = inputs(4, 50, dtype)
        b = torch.linspace(-1, 1, 4, dtype=dtype)
        r, v, b = (x.requires_grad_() for x in (r, v, b))
        a, q = fn(r, v, m, b)
        weight = torch.arange(a.numel(), dtype=dtype).view_as(a)
        return torch.autograd.grad((a * weight.cos()).sum() + (q * weight.sin()).sum(), (r, v, b))

    exact = grads(lambda r, v, m, b: gae_exact(r, v, m, 0.97, 0.9, masked, b), torch.float64)
    framework = grads(lambda r, v, m, b: gae_framework(r, v, m, 0.97, 0.9, masked, b), torch.float32)
    kernel = grads(lambda r, v, m, b: rlkern.gae(r, v, m, gamma=0.97, lam=0.9, masked=masked, bootstrap=b), torch.float32)
    for k, f, e in zip(kernel, framework, exact, strict=True):
        assert_within(k, f, e, e.abs() * 10, f"gae grad {masked}")  # a cotangent sums about 1 / (1 - gamma lam) terms


@pytest.mark.parametrize("masked", GAE_RULES)
def test_gae_gradcheck(backend, masked):
    r, v, m = inputs(2, 21, torch.float64)
    b = torch.randn(2, dtype=torch.float64)
    lam = torch.tensor([0.9, 0.5], dtype=torch.float64)

    def op(r, v, b):
        return rlkern.gae(r, v, m, gamma=0.97, lam=lam, masked=masked, bootstrap=b)

    arguments = tuple(x.requires_grad_() for x in (r, v, b))
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


def test_gae_ignores_masked(backend):
    rewards, values, mask = inputs(6, 90)
    for masked in ("skip", "zero"):
        clean = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9, masked=masked)
        for poison in (torch.nan, torch.inf):
            r, v = (torch.where(mask != 0, x, poison).requires_grad_() for x in (rewards, values))
            got = rlkern.gae(r, v, mask, gamma=0.97, lam=0.9, masked=masked)
            assert torch.equal(got.advantages, clean.advantages)
            kept = mask != 0 if masked == "skip" else torch.ones_like(mask, dtype=torch.bool)
            assert torch.equal(got.returns[kept], clean.returns[kept])
            for d in torch.autograd.grad(got.advantages.sum(), (r, v)):
                assert d.isfinite().all()
                assert (d[mask == 0] == 0).all()
    values[0, 3] = torch.nan  # read: it shows, in its own row alone
    mask[0, :5] = 1
    got = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9).advantages
    assert got[0, :4].isnan().all()
    assert got[1:].isfinite().all()


def test_gae_infinite_reward(backend):
    """It reaches what lies before it in its row, as it would token by token, and nothing else."""
    rewards, values, mask = inputs(3, 300)
    clean = rlkern.gae(rewards, values, mask * 0 + 1, gamma=0.99, lam=0.95).advantages
    rewards[1, 200] = torch.inf
    advantages = rlkern.gae(rewards, values, mask * 0 + 1, gamma=0.99, lam=0.95).advantages
    assert (advantages[1, :201] == torch.inf).all()
    assert torch.equal(advantages[1, 201:], clean[1, 201:])
    assert torch.equal(advantages[::2], clean[::2])


@pytest.mark.parametrize(("B", "T", "why"), SHAPES[:-1])
def test_gae_edge_shapes(backend, B, T, why):
    rewards, values, mask = inputs(B, T)
    for m in (mask, torch.zeros_like(mask), torch.ones_like(mask), None):
        rule = "skip" if m is not None else None
        exact = gae_exact(rewards, values, mask if m is None else m, 0.97, 0.9, rule)
        framework = gae_framework(rewards, values, mask if m is None else m, 0.97, 0.9, rule)
        for k, f, e in zip(rlkern.gae(rewards, values, m, gamma=0.97, lam=0.9), framework, exact, strict=True):
            assert_within(k, f, e, e.abs(), why)


def test_gae_edge_shapes_strides(backend):
    rewards, values, mask = inputs(6, 40)
    expected = rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9)
    wide = torch.full((6, 60), torch.nan)
    strided = wide[:, 7:47].copy_(rewards)
    transposed = values.t().contiguous().t()
    long_mask = torch.zeros(6, 99, dtype=torch.int64)[:, :40].copy_(mask)
    got = rlkern.gae(strided, transposed, long_mask, gamma=0.97, lam=0.9)
    assert torch.equal(got.advantages, expected.advantages)
    row = torch.linspace(-1, 1, 6)[:, None]
    got = rlkern.gae(row.expand(6, 40), values, mask, gamma=0.97, lam=0.9)
    assert torch.equal(got.returns, rlkern.gae(row.repeat(1, 40), values, mask, gamma=0.97, lam=0.9).returns)
    out = (torch.full((6, 50), torch.nan)[:, :40], torch.full((6, 40), torch.nan))
    rlkern.gae(rewards, values, mask, gamma=0.97, lam=0.9, out=out)
    assert torch.equal(out[0], expected.advantages)
    assert torch.equal(out[1], expected.returns)


def test_gae_edge_shapes_packed(backend):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    rewards, values, mask = (x[0] for x in inputs(1, sum(lengths)))
    lam, bootstrap = torch.linspace(0.5, 0.9, 5), torch.linspace(-1, 1, 5)
    for masked in GAE_RULES:
        got = rlkern.gae(rewards, values, mask, gamma=0.97, lam=lam, masked=masked, bootstrap=bootstrap, cu_seqlens=cu)
        for i, n in enumerate(lengths):
            row = slice(int(cu[i]), int(cu[i]) + n)
            one = (rewards[None, row], values[None, row], mask[None, row], 0.97, float(lam[i]), masked, bootstrap[i : i + 1])
            for k, f, e in zip(got, gae_framework(*one), gae_exact(*one), strict=True):
                assert_within(k[None, row], f, e, e.abs(), f"packed {masked}")


@given(st.integers(1, 5), st.integers(1, 70), st.floats(0.5, 1.0), st.integers(0, 10**6))
def test_gae_properties(B, T, gamma, seed):
    rewards, values, mask = inputs(B, T, torch.float64, seed=seed)
    # lam = 1: the Monte-Carlo return less the value, by a sum of powers and not by a recurrence
    got = rlkern.gae(rewards, values, gamma=gamma, lam=1.0).advantages
    t = torch.arange(T)
    power = torch.where(t[None] >= t[:, None], gamma ** (t[None] - t[:, None]).clamp(min=0).double(), 0.0)
    torch.testing.assert_close(got, rewards @ power.T - values, rtol=1e-9, atol=1e-9)
    # padding on the right changes nothing
    wide = [torch.nn.functional.pad(x, (0, 13)) for x in (rewards, values, mask)]
    narrow = rlkern.gae(rewards, values, mask, gamma=gamma, lam=0.9)
    torch.testing.assert_close(rlkern.gae(*wide, gamma=gamma, lam=0.9).advantages[:, :T], narrow.advantages, rtol=1e-9, atol=1e-9)
    # a masked token is as if it were not there
    for b in range(B):
        keep = mask[b] != 0
        compact = rlkern.gae(rewards[b, keep], values[b, keep], gamma=gamma, lam=0.9).advantages
        torch.testing.assert_close(narrow.advantages[b, keep], compact, rtol=1e-9, atol=1e-9)


def test_gae_rejects(backend):
    r, v, m = inputs(2, 5)

    def check(kind, words, *args, **kw):
        with pytest.raises(kind, match=words):
            rlkern.gae(*args, **{"gamma": 1.0, "lam": 1.0, **kw})

    check(ValueError, r"rlkern\.gae: values must have the shape \(2, 5\).*got.*\(2, 4\)", r, v[:, :4], m)
    check(TypeError, r"rlkern\.gae: rewards must be a torch\.Tensor; got list", [[1.0]], v, m)
    check(TypeError, r"rlkern\.gae: values must be float32", r, v.long(), m)
    check(TypeError, r"rlkern\.gae: mask must be bool", r, v, m.to(torch.int8))
    check(ValueError, r"rlkern\.gae: rewards must be \(B, T\)", r[None], v[None], m[None])
    check(ValueError, r"rlkern\.gae: masked must be one of", r, v, m, masked="reset")
    check(ValueError, r"rlkern\.gae: gamma must be in", r, v, m, gamma=-0.1)
    check(ValueError, r"rlkern\.gae: gamma must be in", r, v, m, gamma=float("nan"))
    check(TypeError, r"rlkern\.gae: gamma must be a number", r, v, m, gamma="1")
    check(ValueError, r"rlkern\.gae: lam must have the shape \(2,\)", r, v, m, lam=torch.ones(3))
    check(ValueError, r"rlkern\.gae: bootstrap must have the shape \(2,\)", r, v, m, bootstrap=torch.ones(5))
    check(ValueError, r"rlkern\.gae: ref_log_prob must come with", r, v, m, old_log_prob=r)
    check(ValueError, r"rlkern\.gae: old_log_prob must not require grad", r, v, m, old_log_prob=r.clone().requires_grad_(), ref_log_prob=r)
    check(ValueError, r"rlkern\.gae: kl_penalty must be one of", r, v, m, old_log_prob=r, ref_log_prob=r, kl_penalty="full")
    check(ValueError, r"rlkern\.gae: cu_seqlens must run from 0 to 5", r[0], v[0], m[0], cu_seqlens=torch.tensor([0, 4]))
    check(ValueError, r"rlkern\.gae: out must", r, v, m, out=(torch.empty(2, 4), torch.empty(2, 5)))
    check(ValueError, r"rlkern\.gae: out must not be given", r, v.clone().requires_grad_(), m, out=(torch.empty(2, 5), torch.empty(2, 5)))
    check(ValueError, r"rlkern\.gae: values must be on cpu", r, v.to("meta"), m)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: rlkern.gae(x, x, gamma=1.0, lam=1.0).advantages)(r)


def test_gae_registers(backend_number):
    r, v, m = inputs(3, 20)
    args = (r, v, m, None, None, None, None, None, "skip", 0.9, 0.9, 0.0, "none", [0.0] * 4, None, 0.0, backend_number)
    torch.library.opcheck(torch.ops.rlkern._gae_fwd.default, args)
    torch.library.opcheck(torch.ops.rlkern._gae_bwd.default, (r, v, m, None, None, "skip", 0.9, 0.9, [True] * 3, backend_number))

    def step(r, v):
        a, q = rlkern.gae(r, v, m, gamma=0.9, lam=0.9)
        return (a * q).sum()

    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, y = r.clone().requires_grad_(), v.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x, y), (x, y)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
