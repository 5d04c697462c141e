# SPDX-License-Identifier: Apache-2.0
"""kl_penalty and shape_rewards: every estimator, its clamps, its gradient; exp's accuracy through k3."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.kl import KL_NAMES
from rlkern.testing import SHAPES, assert_within

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
NATIVE = [f"cpp:{isa}" for isa, runs in (backends.native.isas() if backends.native else {}).items() if runs]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NO_CLAMP = {"log_ratio_range": None, "value_range": None}


def framework(lp, ref, name):
    """verl's kl_penalty, in the dtype it is given."""
    x = lp - ref
    base = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}.get(name.removesuffix("+"), name.removesuffix("+"))
    if base == "low_var_kl":
        d = (ref - lp).clamp(-20, 20)
        value = (d.exp() - d - 1).clamp(-10, 10)
    else:
        value = {"kl": x, "abs": x.abs(), "mse": 0.5 * x.square()}[base]
    if name.endswith("+") and base != "mse":
        backward = 0.5 * x.square()
        return backward - backward.detach() + value.detach()
    return value


def pair(B, T, dtype=torch.float32, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(B, T, generator=g) - 2
    return lp.to(dtype), (lp + spread * torch.randn(B, T, generator=g)).to(dtype)


def grads(fn, lp, ref, *args):
    lp, ref = lp.clone().requires_grad_(), ref.clone().requires_grad_()
    value = fn(lp, ref, *args)
    weight = torch.arange(value.numel(), dtype=torch.float64).view_as(value).cos().to(value.dtype)
    return torch.autograd.grad(value, (lp, ref), weight)


# ---- kl_penalty -----------------------------------------------------------------------------------------------------
def test_kl_penalty_known_values(backend):
    lp, ref = torch.tensor([-1.0, -2.0, -3.0, -9.0]), torch.tensor([-1.5, -2.0, -2.0, -1.0])
    assert rlkern.kl_penalty(lp, ref).tolist() == [0.5, 0.0, -1.0, -8.0]
    assert rlkern.kl_penalty(lp, ref, "abs").tolist() == [0.5, 0.0, 1.0, 8.0]
    assert rlkern.kl_penalty(lp, ref, "k2").tolist() == [0.125, 0.0, 0.5, 32.0]
    k3 = torch.tensor([math.exp(-0.5) - 0.5, 0.0, math.e - 2, 10.0])  # the last: its value clamp
    torch.testing.assert_close(rlkern.kl_penalty(lp, ref, "low_var_kl"), k3)
    unclamped = rlkern.kl_penalty(lp, ref, "k3", value_range=None)[3].item()
    assert unclamped == pytest.approx(math.exp(8) - 9, rel=1e-6)
    inputs = {k: torch.tensor(v) for k, v in GOLDEN["inputs"].items() if k != "index"}
    for name, golden in GOLDEN["kl_penalty"].items():
        x = inputs["log_prob"].clone().requires_grad_()
        value = rlkern.kl_penalty(x, inputs["ref_log_prob"], name)
        (grad,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(value.detach(), torch.tensor(golden["value"]), rtol=1e-6, atol=2e-7)
        torch.testing.assert_close(grad, torch.tensor(golden["grad"]), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KL_NAMES)
def test_kl_penalty_matches_reference(backend, dtype, name):
    lp, ref = pair(7, 83, dtype)
    exact = framework(lp.double(), ref.double(), name)
    value = rlkern.kl_penalty(lp, ref, name)
    assert value.dtype == dtype
    assert_within(value, framework(lp, ref, name), exact, exact.abs() + (lp - ref).double().abs(), name)
    mixed = rlkern.kl_penalty(lp, ref.float(), name)
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KL_NAMES)
def test_kl_penalty_grad_matches_reference(backend, dtype, name):
    lp, ref = pair(7, 83, dtype)
    exact = grads(framework, lp.double(), ref.double(), name)
    for ours, theirs, true in zip(grads(rlkern.kl_penalty, lp, ref, name), grads(framework, lp, ref, name), exact, strict=True):
        assert ours.dtype == dtype
        assert_within(ours, theirs, true, true.abs() + 1, name)


@pytest.mark.parametrize("name", KL_NAMES)
def test_kl_penalty_gradcheck(backend, name):
    lp, ref = pair(3, 7, torch.float64)
    inputs = (lp.requires_grad_(), ref.requires_grad_())
    if not name.endswith("+"):  # a straight-through form is not the derivative of its value
        assert torch.autograd.gradcheck(lambda a, b: rlkern.kl_penalty(a, b, name), inputs)
    weight = torch.randn(3, 7).double().requires_grad_()
    seconds = []
    for fn in (rlkern.kl_penalty, framework):
        first = torch.autograd.grad(fn(*inputs, name), inputs, weight, create_graph=True)
        total = sum((g * g).sum() for g in first)
        seconds.append(torch.autograd.grad(total, (*inputs, weight), allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_kl_penalty_ignores_masked(backend):
    """No mask here: a NaN shows in value and gradient, at its own position alone."""
    for name in KL_NAMES:
        lp, ref = pair(2, 40)
        lp[1, 20] = torch.nan
        value, (d_lp, d_ref) = rlkern.kl_penalty(lp, ref, name), grads(rlkern.kl_penalty, lp, ref, name)
        for x in (value, *((d_lp, d_ref) if name not in ("kl", "k1") else ())):
            assert x[1, 20].isnan()
            assert x.isnan().sum() == 1


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_kl_penalty_edge_shapes(backend, B, T, why):
    lp, ref = pair(B, T)
    expected = rlkern.reference.kl.kl_penalty(lp, ref, None, "k3", [-20.0, 20.0, -10.0, 10.0], math.inf)
    assert rlkern.kl_penalty(lp, ref, "k3").shape == (B, T)
    torch.testing.assert_close(rlkern.kl_penalty(lp, ref, "k3"), expected, rtol=1e-5, atol=1e-6)
    wide = torch.full((B, T + 5), torch.nan)
    strided = wide[:, 2 : T + 2]
    strided.copy_(lp)
    out = torch.empty(B, T + 3)[:, :T]
    assert rlkern.kl_penalty(strided, ref.expand_as(lp), "k3", out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rlkern.kl_penalty(lp.T, ref.T, "k3"), expected.T, rtol=1e-5, atol=1e-6)
    deep = rlkern.kl_penalty(lp.view(B, 1, T, 1), ref.view(B, 1, T, 1), "k3")
    torch.testing.assert_close(deep.view(B, T), expected, rtol=1e-5, atol=1e-6)
    if B and T:
        column = lp[:, :1].expand(B, T)
        torch.testing.assert_close(rlkern.kl_penalty(column, ref), column - ref)
        assert rlkern.kl_penalty(lp[0, 0], ref[0, 0]).shape == ()


@given(st.floats(-80, 80), st.floats(-20, 20))
def test_kl_penalty_properties(lp, x):
    a, b = torch.tensor([lp]), torch.tensor([lp + x])
    k1, k3 = rlkern.kl_penalty(a, b, "k1"), rlkern.kl_penalty(a, b, "k3", **NO_CLAMP)
    assert rlkern.kl_penalty(a, b, "abs") == k1.abs() == rlkern.kl_penalty(b, a, "abs")
    assert (rlkern.kl_penalty(b, a, "k1") == -k1).all()
    assert k3.item() >= 0
    bound = rlkern.kl_penalty(a, b, "k3", value_range=(0.25, 0.5)).item()
    assert bound == pytest.approx(min(max(k3.item(), 0.25), 0.5))
    plus, plain = rlkern.kl_penalty(a, b, "k3+"), rlkern.kl_penalty(a, b, "k3")
    assert torch.equal(plus, plain)


@pytest.mark.parametrize("name", ["cpp", *NATIVE])
def test_kl_penalty_properties_of_exp(name):
    """k3 is exp(d) - 1 - d, its slope exp(d) - 1: to 2 ulp near 0, to 2 ulp of max(1, |d|) beyond, and right at the ends."""
    if name == "cpp" and not NATIVE:
        pytest.skip("no native module")
    sizes = [1e-30, 1e-6, 1e-3, 0.1, 0.3465]
    near = torch.cat([torch.linspace(-s, s, 2001) for s in sizes])
    mid, far = torch.linspace(-1, 1, 40001), torch.linspace(-104, 88.7, 40001)
    eps = torch.finfo(torch.float32).eps

    def k3(d, **clamps):
        lp = torch.zeros_like(d).requires_grad_()
        value = rlkern.kl_penalty(lp, d, "k3", **(clamps or NO_CLAMP))
        return value.detach().double(), -torch.autograd.grad(value.sum(), lp)[0].double()

    def exact(d):
        d = d.double()
        series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
        return torch.where(d.abs() < 0.01, series, torch.expm1(d) - d), torch.expm1(d)

    with rlkern.use_backend(name):
        for d, slack in ((near, lambda v, e: v.abs()), (mid, lambda v, e: torch.ones_like(v)), (far, lambda v, e: v.abs() + 1)):
            normal = d.abs() > 1e-18
            (value, slope), (v, s) = k3(d), exact(d)
            assert ((value - v).abs() <= 2 * eps * slack(v, d) + 1e-44)[normal].all()
            assert ((slope - s).abs() <= 2 * eps * s.abs() + 1e-44).all()
        clamped = {"log_ratio_range": (-80.0, 80.0), "value_range": None}  # takes the shorter form of exp
        for plain, short in zip(k3(mid), k3(mid, **clamped), strict=True):
            assert ((plain - short).abs() <= 2 * eps).all()
        assert k3(torch.tensor([torch.nan, 81.0]), **clamped)[1].isnan().tolist() == [True, False]
        edges = torch.tensor([math.inf, -math.inf, math.nan, 89.0, 1000.0, -1000.0, 0.0, -0.0, 1e-45])
        value, slope = k3(edges)
        assert value.tolist()[:2] == [math.inf, math.inf]
        assert slope.tolist()[:2] == [math.inf, -1.0]
        assert value[2].isnan()
        assert slope[2].isnan()
        assert value.tolist()[3:] == [math.inf, math.inf, 999.0, 0.0, 0.0, 0.0]


def test_kl_penalty_rejects(backend):
    x = torch.randn(2, 3)
    for bad in ("full", "full+", "+", "nope"):
        with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: kl_penalty must be one of"):
            rlkern.kl_penalty(x, x, bad)
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: ref_log_prob must have the shape"):
        rlkern.kl_penalty(x, x[:, :1])
    with pytest.raises(TypeError, match=r"rlkern\.kl_penalty: log_prob must be float32"):
        rlkern.kl_penalty(x.long(), x)
    with pytest.raises(TypeError, match=r"rlkern\.kl_penalty: log_prob must be a torch.Tensor"):
        rlkern.kl_penalty([1.0], x)
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: value_range must be \(low, high\)"):
        rlkern.kl_penalty(x, x, "k3", value_range=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: out must not be given"):
        rlkern.kl_penalty(x.requires_grad_(), x.detach(), out=torch.empty(2, 3))


def test_kl_penalty_registers(backend_number):
    lp, ref = pair(3, 20)
    args = (None, "k3", [-20.0, 20.0, -10.0, 10.0], math.inf)
    torch.library.opcheck(torch.ops.rlkern._kl_penalty_fwd.default, (lp, ref, *args, backend_number))
    torch.library.opcheck(torch.ops.rlkern._kl_penalty_bwd.default, (lp, lp, ref, *args, [True, False], backend_number))

    def step(a, b):
        return rlkern.kl_penalty(a, b, "low_var_kl+").square().sum()

    eager, compiled = (grads(fn, lp, ref) for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
