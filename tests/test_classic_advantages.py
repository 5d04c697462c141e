# SPDX-License-Identifier: Apache-2.0
"""V-trace, TD(lambda) and REINFORCE of rlkern.advantages.classic. The oracles: the loops of the papers, GAE, Monte Carlo."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.advantages import classic
from rlkern.testing import SHAPES, assert_within, ragged_mask

# Names of the nine that no estimator has: test_outcome_advantages.py says why.
nan = float("nan")
TOKENS = ("rewards", "values", "mask", "new", "old")


def inputs(B, T, dtype=torch.float32, seed=0, mask_dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    new, old, rewards, values = (torch.randn(B, T, generator=g).to(dtype) for _ in range(4))
    x = {"rewards": rewards, "values": values, "new": -new.abs(), "old": -old.abs(), "mask": ragged_mask(B, T, 0.3, seed, mask_dtype)}
    return x | {"bootstrap": torch.randn(B, generator=g).to(dtype)}


def vtrace(x, gamma=0.97, lam=0.9, **kw):
    kw.setdefault("bootstrap", x["bootstrap"])
    return classic.vtrace(x["rewards"], x["values"], x["mask"], x["new"], x["old"], gamma, lam, **kw)


def td(x, gamma=0.97, lam=0.9, **kw):
    kw.setdefault("bootstrap", x["bootstrap"])
    return classic.td_lambda(x["rewards"], x["values"], x["mask"], gamma, lam, **kw)


def vtrace_loop(x, dtype, gamma=0.97, lam=0.9, rho_clip=1.0, c_clip=1.0, pg_clip=1.0):
    """Row by row over the valid tokens, as the paper has it."""
    r, v, new, old = (x[k].to(dtype) for k in ("rewards", "values", "new", "old"))
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for b in range(r.shape[0]):
        following, vs = x["bootstrap"][b].to(dtype), x["bootstrap"][b].to(dtype)
        for t in reversed(torch.nonzero(x["mask"][b])[:, 0].tolist()):
            w = (new[b, t] - old[b, t]).exp()
            advantage = w.clamp(max=pg_clip) * (r[b, t] + gamma * vs - v[b, t])
            delta = w.clamp(max=rho_clip) * (r[b, t] + gamma * following - v[b, t])
            vs = v[b, t] + delta + gamma * lam * w.clamp(max=c_clip) * (vs - following)
            following, advantages[b, t], returns[b, t] = v[b, t], advantage, vs
    return advantages, returns


def test_known_values(backend):
    # w = 2 and 1/2, both clipped at 1: rho = c = 1, 0.5
    x = {"rewards": torch.tensor([[1.0, 7.0, 2.0]]), "values": torch.tensor([[0.5, 9.0, 1.0]]), "mask": torch.tensor([[1, 0, 1]])}
    x |= {"new": torch.tensor([[2.0, 0.0, 0.5]]).log(), "old": torch.zeros(1, 3), "bootstrap": torch.tensor([4.0])}
    got = vtrace(x, 0.5, 1.0)  # t = 2: 1 + .5 (2 + 2 - 1) = 2.5; t = 0: .5 + (1 + .5 - .5) + .5 (2.5 - 1) = 2.25
    assert got.returns.tolist() == [[2.25, 0.0, 2.5]]
    assert got.advantages.tolist() == [[1 + 0.5 * 2.5 - 0.5, 0.0, 0.5 * 3]]
    got = td(x, 0.5, 0.5)  # t = 2: 2 + .5 * 4 = 4; t = 0: 1 + .5 (.5 * 1 + .5 * 4)
    assert got.returns.tolist() == [[2.25, 0.0, 4.0]]
    assert got.advantages.tolist() == [[1.75, 0.0, 3.0]]
    r, m = x["rewards"], x["mask"]
    assert classic.reinforce(r, m, 0.5).advantages.tolist() == [[2.0, 0.0, 2.0]]
    assert classic.reinforce(r, m, baseline="mean").advantages.tolist() == [[0.5, 0.0, -0.5]]
    assert classic.reinforce(r, m, baseline=torch.tensor([1.0])).advantages.tolist() == [[2.0, 0.0, 1.0]]
    assert classic.reinforce(r, m, baseline=x["values"]).advantages.tolist() == [[2.5, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(backend, dtype):
    for clips in ({}, {"rho_clip": 2.0, "c_clip": 0.7, "pg_rho_clip": math.inf}):
        x = inputs(7, 61, dtype)
        loop = {"rho_clip": 2.0, "c_clip": 0.7, "pg_clip": math.inf} if clips else {}
        got, framework, exact = vtrace(x, **clips), vtrace_loop(x, dtype, **loop), vtrace_loop(x, torch.float64, **loop)
        weight = (x["new"] - x["old"]).double().exp().clamp(max=2.0 if clips else 1.0)
        terms = rlkern.affine_scan(0.97 * 0.9 * weight.clamp(max=1), weight * (x["rewards"].abs() + 2 * x["values"].abs()).double() + 5)
        largest = (x["new"] - x["old"]).double().exp().max() if clips else 1.0
        for a, b, c, size in zip(got, framework, exact, (largest, 1.0), strict=True):
            assert a.dtype == dtype
            assert_within(a, b, c, size * terms, f"{dtype} {clips}")


@pytest.mark.parametrize("estimator", [vtrace, td, lambda x, **kw: classic.reinforce(x["rewards"], x["mask"], 0.97, **kw)])
def test_ignores_masked(backend, estimator):
    x = inputs(7, 40)
    clean = estimator(x)
    dirty = {k: torch.where(x["mask"] != 0, v, nan) if k in TOKENS and k != "mask" else v for k, v in x.items()}
    for a, b in zip(estimator(dirty), clean, strict=True):
        assert torch.equal(a, b)
        assert not a[x["mask"] == 0].any()


@pytest.mark.parametrize(("B", "T", "why"), [s for s in SHAPES if s[0] * s[1] < 5000])
def test_edge_shapes(backend, B, T, why):
    x = inputs(B, T)
    for got, exact in ((vtrace(x), vtrace_loop(x, torch.float64)),):
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert td(x).returns.shape == classic.reinforce(x["rewards"], x["mask"]).returns.shape == (B, T)
    assert vtrace(x, bootstrap=None).advantages.shape == (B, T)


def test_edge_shapes_packed(backend):
    lengths = [5, 0, 33, 1, 60, 40, 16, 0]
    inside = torch.arange(60) < torch.tensor(lengths)[:, None]
    x = inputs(8, 60)
    x["mask"] = x["mask"] * inside
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = {k: v[inside] if k in TOKENS else v for k, v in x.items()}
    row = x["bootstrap"]

    def plain(y, **kw):
        return classic.reinforce(y["rewards"], y["mask"], 0.97, baseline=row, **kw)

    for estimator in (vtrace, td, plain):
        for bootstrap in ({"bootstrap": row}, {"bootstrap": None}):
            options = {} if estimator is plain else bootstrap
            for a, b in zip(estimator(packed, cu_seqlens=cu, **options), estimator(x, **options), strict=True):
                torch.testing.assert_close(a, b[inside], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_properties(B, T, seed):
    x = inputs(B, T, torch.float64, seed)
    valid = x["mask"] != 0

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    gae = rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.97, lam=0.9, bootstrap=x["bootstrap"])
    got = td(x)
    close(got.returns[valid], gae.returns[valid])
    close(got.advantages[valid], gae.advantages[valid])
    on_policy = {**x, "old": x["new"]}
    close(vtrace(on_policy).returns, got.returns)
    # without a trace decay V-trace, TD(1) and REINFORCE are Monte Carlo
    returns = rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.97, bootstrap=x["bootstrap"])
    close(vtrace(on_policy, lam=1.0).returns, returns)
    close(vtrace(on_policy, lam=1.0).advantages, torch.where(valid, returns - x["values"], 0.0))
    close(td(x, lam=1.0).returns, returns)
    close(classic.reinforce(x["rewards"], x["mask"], 0.97).returns, td(x, lam=1.0, bootstrap=None).returns)
    # lambda 0: one step
    closed = torch.where(valid, x["rewards"] + 0.97 * rlkern_next(x), 0.0)
    close(td(x, lam=0.0).returns, closed)


def rlkern_next(x):
    found, following = torch.zeros_like(x["values"]), x["bootstrap"].clone()
    for t in reversed(range(found.shape[1])):
        found[:, t] = following
        following = torch.where(x["mask"][:, t] != 0, x["values"][:, t], following)
    return found


def test_rejects(backend):
    x = inputs(4, 5)

    def check(kind, words, estimator, y=x, **kw):
        with pytest.raises(kind, match=rf"rlkern\.advantages\.classic\.{words}"):
            estimator(y, **kw)

    check(ValueError, r"vtrace: log_prob must have the shape \(4, 5\)", vtrace, {**x, "new": x["new"][:, :4]})
    check(ValueError, r"vtrace: rho_clip must be in \[0.0, inf\]; got -1.0", vtrace, rho_clip=-1.0)
    check(ValueError, r"vtrace: bootstrap must have the shape \(4,\)", vtrace, bootstrap=torch.ones(3))
    check(ValueError, r"td_lambda: lam must be in \[0.0, 1.0\]; got 1.5", td, lam=1.5)
    check(TypeError, "td_lambda: values must be a torch.Tensor", td, {**x, "values": None})
    check(ValueError, r"td_lambda: token_level_rewards must be \(N,\) with cu_seqlens", td, cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(ValueError, match=r"rlkern\.advantages\.classic\.reinforce: baseline must be one of None, 'mean'; got 'max'"):
        classic.reinforce(x["rewards"], x["mask"], baseline="max")


def test_compiled(backend):
    torch._dynamo.reset()
    x = inputs(4, 20)
    both = torch.compile(lambda x: (*vtrace(x), *td(x)), fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(both, (*vtrace(x), *td(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
