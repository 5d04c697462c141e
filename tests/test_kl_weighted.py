# SPDX-License-Identifier: Apache-2.0
"""kl_penalty with old_log_prob: importance-weighted values and gradients, as TRL, slime, NeMo-RL and OpenRLHF have them."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.testing import SHAPES, assert_within

FOLDER = pathlib.Path(__file__).parent / "golden"
INPUTS = json.loads((FOLDER / "verl_0.9.1.json").read_text())["inputs"]
OPENRLHF = json.loads((FOLDER / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]
TRL = json.loads((FOLDER / "trl_1.16.0.json").read_text())["cases"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["k1", "abs", "k2", "k3"]
INF = math.inf
TRL_FORM = {"log_ratio_range": None, "value_range": None}  # slime's k1, k2 and k3 too
SLIME = {"log_ratio_range": None, "value_range": (-10.0, 10.0)}  # its low_var_kl
NEMO = {"log_ratio_range": (-20.0, 20.0), "value_range": (-10.0, 10.0)}
OPENRLHF_FORM = {
    "k1": SLIME,
    "k2": SLIME,
    "k3": {"log_ratio_range": (-INF, 10.0), "value_range": (-10.0, 10.0)},
}
FORMS = [TRL_FORM, SLIME, NEMO]


def framework(lp, ref, old, name, log_ratio_range=None, value_range=None, weight_max=INF):
    """The frameworks' formula, in the dtype it is given: NeMo-RL's where the log-ratio is clamped, TRL's and slime's where
    it is not; OpenRLHF's unbiased_gradient for "+"."""
    raw = ref - lp
    d = raw if log_ratio_range is None else raw.clamp(*log_ratio_range)
    value = {"k1": -d, "abs": d.abs(), "k2": 0.5 * d.square(), "k3": d.exp() - 1 - d}[name.removesuffix("+")]
    w = (lp - old).exp().clamp(max=weight_max)
    if name.endswith("+"):
        value = value if value_range is None else value.clamp(*value_range)
        slope = w.detach() * 0.5 * (lp - ref).square()
        return value.detach() + slope - slope.detach()
    if log_ratio_range is not None:
        w = torch.where(d == raw, w, w.detach())
    value = w * value
    return value if value_range is None else value.clamp(*value_range)


def batch(B, T, dtype=torch.float32, spread=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(B, T, generator=g) - 2
    return (*((lp + s * torch.randn(B, T, generator=g)).to(dtype) for s in (0.0, 1.0, spread)),)


def ours(lp, ref, old, name, **keywords):
    return rlkern.kl_penalty(lp, ref, name, old_log_prob=old, **keywords)


def value_and_grads(fn, lp, ref, old, name, **keywords):
    lp, ref = lp.clone().requires_grad_(), ref.clone().requires_grad_()
    value = fn(lp, ref, old, name, **keywords)
    weight = torch.arange(value.numel(), dtype=torch.float64).view_as(value).cos().to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, (lp, ref), weight)


def test_kl_penalty_weighted_known_values(backend):
    lp, ref, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([-1.0 - math.log(2), -1.0])
    assert ours(lp, ref, old, "k1").tolist() == pytest.approx([1.0, 0.0])
    assert ours(lp, ref, old, "k1", weight_max=1.5).tolist() == pytest.approx([0.75, 0.0])
    assert ours(lp, ref, old, "k1+", weight_max=1.5).tolist() == pytest.approx([0.5, 0.0])
    x = {k: torch.tensor(v) for k, v in INPUTS.items() if k != "index"}
    # TRL: 0.05 * r * k3 on top of the same loss; its dapo case divides by 60 / 2
    cases = [TRL[json.dumps({"loss_type": "dapo", **more})] for more in ({"level": "token"}, {"beta": 0.05, "bias": True})]
    value, d_lp, _ = value_and_grads(ours, x["log_prob"], x["ref_log_prob"], x["old_log_probs"], "k3", **TRL_FORM)
    total = (cases[1]["loss"] - cases[0]["loss"]) * 30 / 0.05
    assert (value * x["mask"]).sum().item() == pytest.approx(total, abs=2e-4)
    cotangent = torch.arange(value.numel(), dtype=torch.float64).view_as(value).cos().float()
    theirs = (torch.tensor(cases[1]["grad"]) - torch.tensor(cases[0]["grad"])) * 30 / 0.05
    torch.testing.assert_close(d_lp / cotangent * x["mask"], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_penalty_weighted_known_values_of_openrlhf(backend, name):
    x = {k: torch.tensor(v) for k, v in INPUTS.items() if k != "index"}
    for unbiased, old in ((False, None), (True, None), (True, "given")):
        golden = OPENRLHF[f"kl {name} unbiased_gradient={unbiased} old={old}"]
        weights = {"old_log_prob": x["old_log_probs"], "weight_max": 10.0} if old else {}
        lp = x["log_prob"].clone().requires_grad_()
        value = rlkern.kl_penalty(lp, x["ref_log_prob"], name + "+" * unbiased, **OPENRLHF_FORM[name], **weights)
        torch.testing.assert_close(value.detach(), torch.tensor(golden["value"]), rtol=1e-6, atol=2e-7)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), lp)[0], torch.tensor(golden["grad"]), rtol=1e-6, atol=2e-7)
    golden = OPENRLHF["kl k3 extremes lp=[-200,-15,-11,-3,-.5,-2] ref=[-.5,-3,-.5,-.2,-9,-60]"]
    lp, ref = torch.tensor([[-200, -15, -11, -3, -0.5, -2]]).requires_grad_(), torch.tensor([[-0.5, -3, -0.5, -0.2, -9, -60]])
    value = rlkern.kl_penalty(lp, ref, "k3", **OPENRLHF_FORM["k3"])
    torch.testing.assert_close(value.detach(), torch.tensor(golden["value"]), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), lp)[0], torch.tensor(golden["grad"]), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kl_penalty_weighted_matches_reference(backend, dtype, name):
    lp, ref, old = batch(7, 83, dtype)
    wide = [x.double() for x in (lp, ref, old)]
    for form in FORMS:
        for weight_max in (None, 1.25):
            bound = {} if weight_max is None else {"weight_max": weight_max}
            exact = framework(*wide, name, **form, **bound)
            value = ours(lp, ref, old, name, **form, **bound)
            assert value.dtype == dtype
            weight = (wide[0] - wide[2]).exp().clamp(max=weight_max or INF)
            terms = exact.abs() + weight * ((wide[0] - wide[1]).abs() + 1)
            assert_within(value, framework(lp, ref, old, name, **form, **bound), exact, terms, name)
    assert ours(lp, ref, old.double(), name).dtype == torch.float64
    assert ours(lp, ref, old.double(), name + "+").dtype == dtype  # there it weighs the gradient alone
    assert torch.equal(ours(lp, ref, old, name + "+", weight_max=2.0), rlkern.kl_penalty(lp, ref, name + "+"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*NAMES, *(f"{name}+" for name in NAMES)])
def test_kl_penalty_weighted_grad_matches_reference(backend, dtype, name):
    lp, ref, old = batch(7, 83, dtype)
    for form in FORMS:
        for bound in ({}, {"weight_max": 1.25}):
            wide = [x.double() for x in (lp, ref, old)]
            exact, theirs, found = (
                value_and_grads(fn, *tensors, name, **form, **bound)[1:]
                for fn, tensors in ((framework, wide), (framework, (lp, ref, old)), (ours, (lp, ref, old)))
            )
            raw, w = (wide[1] - wide[0]).abs(), (wide[0] - wide[2]).exp()
            value = w.clamp(max=bound.get("weight_max", INF)) * (raw.exp() if name == "k3" else 0.5 * raw * raw)
            kept = (w - 1.25).abs() > 0.02  # where rounding cannot move a token over a bound
            if form is not TRL_FORM and name in ("k2", "k3"):
                kept &= (value - 10).abs() > 0.2 * 10
            for x, y, z in zip(found, theirs, exact, strict=True):
                assert x.dtype == dtype
                assert_within(x[kept], y[kept], z[kept], (w * (raw + 2))[kept], name)


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}+" for name in NAMES)])
def test_kl_penalty_weighted_gradcheck(backend, name):
    lp, ref, old = batch(3, 7, torch.float64)
    inputs = (lp.requires_grad_(), ref.requires_grad_())
    weight = torch.randn(3, 7).double().requires_grad_()
    for bound in ({}, {"weight_max": 1.25}):
        if not name.endswith("+"):

            def fn(a, b, bound=bound):
                return ours(a, b, old, name, **TRL_FORM, **bound)

            assert torch.autograd.gradcheck(fn, inputs)
        for form in FORMS:
            seconds = []
            for f in (ours, framework):
                first = torch.autograd.grad(f(*inputs, old, name, **form, **bound), inputs, weight, create_graph=True)
                total = sum((g * g).sum() for g in first)
                seconds.append(torch.autograd.grad(total, (*inputs, weight), allow_unused=True, materialize_grads=True))
            for x, y in zip(*seconds, strict=True):
                torch.testing.assert_close(x, y)


def test_kl_penalty_weighted_ignores_masked(backend):
    """No mask here: a NaN of any operand shows in value and gradients, at its own position alone."""
    for name in [*NAMES, *(f"{name}+" for name in NAMES)]:
        for which in range(3):
            tensors = list(batch(2, 40))
            tensors[which][1, 20] = torch.nan
            value, d_lp, d_ref = value_and_grads(ours, *tensors, name, **NEMO, weight_max=2.0)
            for x in (d_lp, d_ref) if which == 2 and name.endswith("+") else (value, d_lp, d_ref):
                assert x[1, 20].isnan()
                assert x.isnan().sum() == 1


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_kl_penalty_weighted_edge_shapes(backend, B, T, why):
    lp, ref, old = batch(B, T)
    expected = framework(lp, ref, old, "k2", **TRL_FORM)
    wide = torch.full((B, T + 5), torch.nan)[:, 2 : T + 2]
    wide.copy_(old)
    out = torch.empty(B, T + 3)[:, :T]
    assert rlkern.kl_penalty(lp, ref, "k2", old_log_prob=wide, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(lp.T, ref.T, old.T, "k2"), expected.T, rtol=1e-5, atol=1e-6)
    deep = ours(*(x.view(B, 1, T, 1) for x in (lp, ref, old)), "k2")
    torch.testing.assert_close(deep.view(B, T), expected, rtol=1e-5, atol=1e-6)
    if B and T:
        column = old[:, :1].expand(B, T)
        found, theirs = (value_and_grads(f, lp, ref, column, "k3", **TRL_FORM) for f in (ours, framework))
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


@given(st.floats(-5, 0), st.floats(-3, 3), st.floats(-3, 3))
def test_kl_penalty_weighted_properties(x, d, log_weight):
    lp, ref, old = (torch.tensor([v], dtype=torch.float64) for v in (x, x + d, x - log_weight))
    _, d_lp, _ = value_and_grads(ours, lp, ref, old, "k3", **TRL_FORM)
    w = math.exp(lp.item() - old.item())
    assert d_lp.item() == pytest.approx(-w * (ref - lp).item(), abs=1e-12)  # r (log_prob - ref_log_prob)
    plus = value_and_grads(ours, lp, ref, old, "k3+", **TRL_FORM)
    assert plus[1].item() == pytest.approx(d_lp.item(), abs=1e-12)  # one gradient, by two roads
    assert plus[2] == -plus[1]
    here = value_and_grads(ours, lp, ref, lp, "k3", **TRL_FORM)  # on policy: the weight is 1, and has a gradient
    assert here[0] == rlkern.kl_penalty(lp, ref, "k3", **TRL_FORM)
    assert here[1].item() == pytest.approx(x - ref.item(), abs=1e-12)


def test_kl_penalty_weighted_rejects(backend):
    lp, ref, old = batch(2, 3)
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: weight_max must be None without old_log_prob"):
        rlkern.kl_penalty(lp, ref, weight_max=2.0)
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: weight_max must be in \(0.0, inf\]"):
        ours(lp, ref, old, "k3", weight_max=0.0)
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: old_log_prob must not require grad"):
        ours(lp, ref, old.requires_grad_(), "k3")
    with pytest.raises(ValueError, match=r"rlkern\.kl_penalty: old_log_prob must have the shape"):
        ours(lp, ref, old[:, :1].detach(), "k3")


def test_kl_penalty_weighted_registers(backend_number):
    lp, ref, old = batch(3, 20)
    for name in ("k3", "k3+"):
        args = (old, name, [-20.0, 20.0, -10.0, 10.0], 2.0)
        torch.library.opcheck(torch.ops.rlkern._kl_penalty_fwd.default, (lp, ref, *args, backend_number))
        torch.library.opcheck(torch.ops.rlkern._kl_penalty_bwd.default, (lp, lp, ref, *args, [True, False], backend_number))

    def step(lp, ref, old, name):
        return ours(lp, ref, old, name, weight_max=2.0).square().sum()

    for name in ("k3", "k2+"):
        eager, compiled = (
            value_and_grads(fn, lp, ref, old, name) for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
        )
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
