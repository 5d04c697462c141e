# SPDX-License-Identifier: Apache-2.0
"""log_prob, entropy, sum_pi_squared: the reference path, which is all there is of them: no backends, no raw ops.

A raw op's registration does not apply: `registers` shows that they compile. They have no mask: `ignores_masked` shows that a
NaN stays in its own position.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.testing import assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [((0, 5), "no positions"), ((3, 1), "one word"), ((2, 7, 33), "batch, tokens, words"), ((5,), "one position")]


def labels_of(logits, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=g)


def batch(*shape, dtype=torch.float32, spread=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=g)).to(dtype)


def size(z):
    """1, but of float64 what the float64 formula itself adds up: logsumexps of the size of the logits."""
    return 1 + 4 * z.abs().max().item() if z.dtype == torch.float64 else 1


# name: (rlkern's, verl's formula in the dtype it is given)
OPS = {
    "log_prob": (
        lambda z, **kw: rlkern.log_prob(z, labels_of(z), **kw),
        lambda z: z.gather(-1, labels_of(z).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1),
    ),
    "entropy": (rlkern.entropy, lambda z: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)),
    "sum_pi_squared": (rlkern.sum_pi_squared, lambda z: ((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1)).exp()),
}


def value_and_grad(fn, z, **keywords):
    leaf = z.clone().requires_grad_()
    value = fn(leaf, **keywords)
    weight = torch.arange(value.numel(), dtype=torch.float64).view_as(value).cos().to(value.dtype)
    return value.detach(), torch.autograd.grad(value, leaf, weight)[0]


def test_logprob_known_values():
    z = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])
    torch.testing.assert_close(rlkern.log_prob(z, torch.tensor([1, 0])), torch.tensor([math.log(0.75), math.log(0.5)]))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(rlkern.entropy(z), torch.tensor([h, math.log(2.0)]))
    torch.testing.assert_close(rlkern.sum_pi_squared(z), torch.tensor([10 / 16, 0.5]))
    torch.testing.assert_close(rlkern.entropy(3 * z, temperature=3.0), rlkern.entropy(z))
    barred = torch.tensor([[0.0, -math.inf, 0.0]])  # a word that a top-p filter has taken out
    value, grad = value_and_grad(rlkern.entropy, barred)
    torch.testing.assert_close(value, torch.tensor([math.log(2.0)]))
    torch.testing.assert_close(grad, torch.zeros(1, 3), atol=1e-7, rtol=0)
    assert rlkern.log_prob(barred, torch.tensor([1])).item() == -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_logprob_matches_reference(name, dtype):
    ours, formula = OPS[name]
    for z, scale in (
        (batch(6, 41, 257, dtype=dtype), 1),
        (batch(4, 31, 1001, dtype=dtype, spread=0.1), 1),
        (batch(40, 33, dtype=dtype) + 50, 50),
    ):
        value, scale = ours(z), scale * size(z)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = formula(z.double())
        assert_within(value, formula(z.to(value.dtype)), exact, scale * (exact.abs() + 1), name)
        cooler = ours(z, temperature=0.7)
        assert_within(cooler, formula(z.to(value.dtype) / 0.7), formula(z.double() / 0.7), 2 * scale * (exact.abs() + 1), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_logprob_grad_matches_reference(name, dtype):
    ours, formula = OPS[name]
    z = batch(6, 41, 129, dtype=dtype)
    exact = value_and_grad(formula, z.double())[1]
    found = value_and_grad(ours, z)[1]
    assert found.dtype == dtype
    assert_within(
        found, value_and_grad(formula, z.to(torch.promote_types(dtype, torch.float32)))[1], exact, size(z) * (exact.abs() + 1), name
    )


@pytest.mark.parametrize("name", OPS)
def test_logprob_gradcheck(name):
    z = batch(3, 7, dtype=torch.float64).requires_grad_()
    for temperature in (1.0, 0.7):

        def fn(z, temperature=temperature):
            return OPS[name][0](z, temperature=temperature)

        assert torch.autograd.gradcheck(fn, (z,))
        assert torch.autograd.gradgradcheck(fn, (z,))


@pytest.mark.parametrize("name", OPS)
def test_logprob_ignores_masked(name):
    z = batch(4, 9)
    z[2, 5] = math.nan
    value, grad = value_and_grad(OPS[name][0], z)
    assert value.isnan().tolist() == [False, False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("shape", "why"), SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_logprob_edge_shapes(name, shape, why):
    ours, formula = OPS[name]
    z = batch(*shape)
    value = ours(z)
    assert value.shape == shape[:-1]
    torch.testing.assert_close(value, formula(z), rtol=1e-5, atol=1e-6)
    wide = torch.full((*shape[:-1], shape[-1] + 3), math.nan)[..., 1 : shape[-1] + 1]
    before = wide.copy_(z).clone()
    torch.testing.assert_close(ours(wide), value)
    assert torch.equal(wide, before)  # never written


@given(st.integers(1, 40), st.floats(-5, 5), st.integers(0, 10**6))
def test_logprob_properties(V, shift, seed):
    z = batch(1, V, dtype=torch.float64, seed=seed)
    every = torch.stack([rlkern.log_prob(z[0], torch.tensor(v)) for v in range(V)])
    assert every.exp().sum().item() == pytest.approx(1.0)
    assert rlkern.entropy(z).item() == pytest.approx(-(every.exp() * every).sum().item(), abs=1e-12)
    assert rlkern.sum_pi_squared(z).item() == pytest.approx(every.exp().square().sum().item())
    for ours, _ in OPS.values():
        torch.testing.assert_close(ours(z + shift), ours(z), rtol=1e-9, atol=1e-12)
    assert rlkern.entropy(torch.zeros(1, V)).item() == pytest.approx(math.log(V), abs=1e-6)


def test_logprob_rejects():
    z, y = batch(2, 5), torch.zeros(2, dtype=torch.int64)
    for name, (ours, _) in OPS.items():
        with pytest.raises(ValueError, match=rf"rlkern\.{name}: temperature must be in \(0.0, inf\]"):
            ours(z, temperature=0.0)
        with pytest.raises(ValueError, match=rf"rlkern\.{name}: temperature must be finite"):
            ours(z, temperature=math.inf)
    with pytest.raises(TypeError, match=r"rlkern\.entropy: logits must be a floating-point tensor"):
        rlkern.entropy(y)
    with pytest.raises(ValueError, match=r"rlkern\.sum_pi_squared: logits must be \(\.\.\., V\)"):
        rlkern.sum_pi_squared(z[:, :0])
    with pytest.raises(TypeError, match=r"rlkern\.log_prob: labels must be an int64 or int32 tensor"):
        rlkern.log_prob(z, y.float())
    with pytest.raises(ValueError, match=r"rlkern\.log_prob: labels must have the shape \(2,\)"):
        rlkern.log_prob(z, y[:1])


@pytest.mark.parametrize("name", OPS)
def test_logprob_registers(name):
    ours = OPS[name][0]
    z, labels = batch(3, 20), labels_of(batch(3, 20))

    def step(z):
        return (rlkern.log_prob(z, labels) if name == "log_prob" else ours(z)).square().sum()

    eager, compiled = (value_and_grad(fn, z) for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    torch.testing.assert_close(eager, compiled)
