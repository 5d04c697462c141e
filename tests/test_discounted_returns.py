# SPDX-License-Identifier: Apache-2.0
"""discounted_returns under each mask rule. The oracles: hand arithmetic, recorded outputs, the step-by-step loop in float64,
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
RETURNS_RULES = ("skip", "reset", "zero", "turn", None)


def golden(name):
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    return data.get("inputs"), data


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(B, T, generator=g).to(dtype) for _ in range(2))
    return rewards, values, ragged_mask(B, T, 0.2, seed, mask_dtype)


def returns_by(loop_dtype, rewards, mask, gamma, masked, bootstrap=None):
    r = rewards.to(loop_dtype)
    m = torch.ones_like(mask) if masked is None else mask
    start = None if bootstrap is None else bootstrap.to(loop_dtype)
    return reference.returns_loop(r, m, gamma, masked, start) if r.shape[1] else r


def test_discounted_returns_known_values(backend):
    r, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
    assert rlkern.discounted_returns(r, m, gamma=1.0).tolist() == [[1.0, 0.0, 1.0]]
    assert rlkern.discounted_returns(r, m, gamma=1.0, masked="reset").tolist() == [[0.0, 1.0, 1.0]]
    # rewards on masked tokens, gamma .5: R = 1 [2] 4 8, mask 1 0 1 1
    r, m = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[1, 0, 1, 1]])
    assert rlkern.discounted_returns(r, m, gamma=0.5).tolist() == [[1 + 0.5 * 8, 0.0, 8.0, 8.0]]
    assert rlkern.discounted_returns(r, m, gamma=0.5, masked="reset").tolist() == [[1.0, 2 + 0.5 * 8, 8.0, 8.0]]
    assert rlkern.discounted_returns(r, m, gamma=0.5, masked="zero").tolist() == [[1 + 0.5 * 4, 4.0, 8.0, 8.0]]
    assert rlkern.discounted_returns(r, m, gamma=0.5, masked=None).tolist() == [[1 + 0.5 * 6, 2 + 0.5 * 8, 8.0, 8.0]]
    # turns: {3, 4} on R[4] = 8 (with R[3] = 4 ignored), then {1} on R[1] = 1
    assert rlkern.discounted_returns(r, m, gamma=0.5, masked="turn").tolist() == [[1 + 0.5 * 8, 0.0, 8.0, 8.0]]
    # the bootstrap of a truncated row
    assert rlkern.discounted_returns(r, m, gamma=0.5, bootstrap=torch.tensor([4.0])).tolist() == [[1 + 0.5 * 9, 0.0, 9.0, 10.0]]


def test_discounted_returns_known_values_recorded(backend):
    inp, data = golden("verl_0.9.1")
    rewards, mask = torch.tensor(inp["token_level_rewards"]), torch.tensor(inp["mask"])
    expected = data["adv_estimators(gamma=0.97,lam=0.9)"]["reinforce_plus_plus"]["returns"]
    got = rlkern.discounted_returns(rewards, mask, gamma=0.97)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    expected = json.loads((GOLDEN / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]["returns(gamma=.97)"]
    got = rlkern.discounted_returns(rewards, mask, gamma=0.97, masked="zero")
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("masked", RETURNS_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_discounted_returns_matches_reference(backend, masked, dtype):
    for mask_dtype in mask_kinds():
        rewards, _, mask = inputs(5, 83, dtype, mask_dtype)
        kernel = rlkern.discounted_returns(rewards, mask, gamma=0.97, masked=masked)
        exact = returns_by(torch.float64, rewards, mask, 0.97, masked)
        framework = returns_by(dtype, rewards, mask, 0.97, masked)
        assert_within(kernel, framework, exact, exact.abs(), f"returns {masked} {dtype} {mask_dtype}")


def test_discounted_returns_matches_reference_with_kl(backend):
    rewards, old, mask = inputs(5, 83)
    ref = old + 0.1 * torch.randn(5, 83)
    shaped = {"k1": old - ref, "k2": 0.5 * (old - ref) ** 2, "abs": (old - ref).abs(), "k3": (ref - old).exp() - 1 - (ref - old)}
    for name, kl in shaped.items():
        kernel = rlkern.discounted_returns(rewards, mask, gamma=0.97, old_log_prob=old, ref_log_prob=ref, kl_coef=0.3, kl_penalty=name)
        wanted = returns_by(torch.float64, rewards.double() - 0.3 * kl.double(), mask, 0.97, "skip")
        torch.testing.assert_close(kernel.double(), wanted, rtol=1e-5, atol=1e-5)
    poisoned = torch.where(mask != 0, ref, torch.nan)
    got = rlkern.discounted_returns(rewards, mask, gamma=0.97, old_log_prob=old, ref_log_prob=poisoned, kl_coef=0.3, kl_penalty="k3")
    assert torch.equal(got, kernel)


@pytest.mark.parametrize("masked", RETURNS_RULES)
def test_discounted_returns_grad_matches_reference(backend, masked):
    def grads(fn, dtype):
        r, _, m = inputs(4, 50, dtype)
        b = torch.linspace(-1, 1, 4, dtype=dtype)
        r, b = r.requires_grad_(), b.requires_grad_()
        q = fn(r, m, b)
        return torch.autograd.grad((q * torch.arange(q.numel(), dtype=dtype).view_as(q).cos()).sum(), (r, b))

    exact = grads(lambda r, m, b: returns_by(torch.float64, r, m, 0.97, masked, b), torch.float64)
    framework = grads(lambda r, m, b: returns_by(torch.float32, r, m, 0.97, masked, b), torch.float32)
    kernel = grads(lambda r, m, b: rlkern.discounted_returns(r, m, gamma=0.97, masked=masked, bootstrap=b), torch.float32)
    for k, f, e in zip(kernel, framework, exact, strict=True):
        assert_within(k, f, e, e.abs() * 10, f"returns grad {masked}")


@pytest.mark.parametrize("masked", RETURNS_RULES)
def test_discounted_returns_gradcheck(backend, masked):
    r, _, m = inputs(2, 21, torch.float64)
    b = torch.randn(2, dtype=torch.float64)

    def op(r, b):
        return rlkern.discounted_returns(r, m, gamma=0.97, masked=masked, bootstrap=b)

    arguments = (r.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


def test_discounted_returns_ignores_masked(backend):
    rewards, _, mask = inputs(6, 90)
    for masked in ("skip", "zero", "turn"):
        clean = rlkern.discounted_returns(rewards, mask, gamma=0.97, masked=masked)
        r = torch.where(mask != 0, rewards, torch.nan).requires_grad_()
        got = rlkern.discounted_returns(r, mask, gamma=0.97, masked=masked)
        assert torch.equal(got, clean)
        (d,) = torch.autograd.grad(got.sum(), r)
        assert (d[mask == 0] == 0).all()
        assert d.isfinite().all()
    # reset reads masked tokens: a NaN shows there, and the cut stops it
    r, m = torch.tensor([[1.0, torch.nan, 4.0]]), torch.tensor([[1, 0, 1]])
    got = rlkern.discounted_returns(r, m, gamma=0.5, masked="reset")
    assert got[0, 1].isnan()
    assert got[0, [0, 2]].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(("B", "T", "why"), SHAPES[:-1])
def test_discounted_returns_edge_shapes(backend, B, T, why):
    rewards, _, mask = inputs(B, T)
    for masked in RETURNS_RULES:
        for m in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
            exact = returns_by(torch.float64, rewards, m, 0.97, masked)
            framework = returns_by(torch.float32, rewards, m, 0.97, masked)
            kernel = rlkern.discounted_returns(rewards, m, gamma=0.97, masked=masked)
            assert_within(kernel, framework, exact, exact.abs() + 1, f"{why} {masked}")


def test_discounted_returns_edge_shapes_packed(backend):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)])
    rewards, _, mask = (x[0] for x in inputs(1, sum(lengths)))
    bootstrap = torch.linspace(-1, 1, 5)
    for masked in RETURNS_RULES:
        got = rlkern.discounted_returns(rewards, mask, gamma=0.97, masked=masked, bootstrap=bootstrap, cu_seqlens=cu)
        for i, n in enumerate(lengths):
            row = slice(int(cu[i]), int(cu[i]) + n)
            args = (rewards[None, row], mask[None, row], 0.97, masked, bootstrap[i : i + 1])
            exact = returns_by(torch.float64, *args)
            assert_within(got[None, row], returns_by(torch.float32, *args), exact, exact.abs(), masked)


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 10**6))
def test_discounted_returns_properties(B, T, seed):
    rewards, _, mask = inputs(B, T, torch.float64, seed=seed)
    suffix = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rlkern.discounted_returns(rewards, gamma=1.0, masked=None), suffix, rtol=1e-10, atol=1e-10)
    masked = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rlkern.discounted_returns(rewards, mask, gamma=1.0, masked="zero"), masked, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rlkern.discounted_returns(rewards, mask, gamma=1.0), masked * mask, rtol=1e-10, atol=1e-10)
    order = torch.randperm(B)
    a = rlkern.discounted_returns(rewards, mask, gamma=0.9)[order]
    assert torch.equal(a, rlkern.discounted_returns(rewards[order], mask[order], gamma=0.9))
    # values = 0 and lam = 1 make GAE the discounted return
    b = rlkern.gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0).advantages
    torch.testing.assert_close(torch.where(mask != 0, b, 0.0), rlkern.discounted_returns(rewards, mask, gamma=0.9), rtol=1e-9, atol=1e-9)


def test_discounted_returns_rejects(backend):
    r, _, m = inputs(2, 5)
    with pytest.raises(ValueError, match=r"rlkern\.discounted_returns: mask must have the shape \(2, 5\)"):
        rlkern.discounted_returns(r, m[:, :4], gamma=1.0)
    with pytest.raises(ValueError, match=r"rlkern\.discounted_returns: masked must be one of"):
        rlkern.discounted_returns(r, m, gamma=1.0, masked="cut")
    with pytest.raises(TypeError, match=r"rlkern\.discounted_returns: rewards must be float32"):
        rlkern.discounted_returns(m, m, gamma=1.0)
    with pytest.raises(ValueError, match=r"rlkern\.discounted_returns: gamma must be in"):
        rlkern.discounted_returns(r, m, gamma=-1)


def test_discounted_returns_registers(backend_number):
    r, _, m = inputs(3, 20)
    args = (r, m, None, None, None, None, "skip", 0.9, 0.0, "none", [0.0] * 4, None, 0.0, backend_number)
    torch.library.opcheck(torch.ops.rlkern._discounted_returns_fwd.default, args)
    torch.library.opcheck(torch.ops.rlkern._discounted_returns_bwd.default, (r, m, None, "skip", 0.9, [True] * 2, backend_number))

    def step(r):
        return rlkern.discounted_returns(r, m, gamma=0.9).square().sum()

    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = r.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x), x)[0])
    assert torch.equal(*grads)
