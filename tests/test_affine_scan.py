# SPDX-License-Identifier: Apache-2.0
"""affine_scan: a decay of every kind, both directions, forward and adjoint."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.reference.affine_scan import affine, affine_scan_bwd
from rlkern.testing import SHAPES, assert_within


def serial(decay, x, reverse=True, initial=None):
    """The definition, a step at a time."""
    decay = torch.as_tensor(decay, dtype=x.dtype)
    decay = (decay[:, None] if decay.dim() == 1 else decay).expand_as(x)
    y = x.new_zeros(x.shape[0]) if initial is None else initial
    out = [None] * x.shape[1]
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        y = x[:, t] + decay[:, t] * y
        out[t] = y
    return torch.stack(out, 1) if out else x


def decays(B, T, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [0.9, torch.rand(B, generator=g).to(dtype), torch.rand(B, T, generator=g).to(dtype)]


def test_affine_scan_known_values(backend):
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert rlkern.affine_scan(0.5, x).tolist() == [[3.0, 4.0, 4.0]]
    assert rlkern.affine_scan(0.5, x, reverse=False).tolist() == [[1.0, 2.5, 5.25]]
    assert rlkern.affine_scan(torch.tensor([[0.5, 0.0, 2.0]]), x, initial=torch.tensor([1.0])).tolist() == [[2.0, 2.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [True, False])
def test_affine_scan_matches_reference(backend, dtype, reverse):
    x, initial = torch.randn(5, 83).to(dtype), torch.randn(5).to(dtype)
    for decay in decays(5, 83, dtype):
        wide = decay.double() if isinstance(decay, torch.Tensor) else decay
        exact = serial(wide, x.double(), reverse, initial.double())
        kernel = rlkern.affine_scan(decay, x, reverse=reverse, initial=initial)
        assert_within(kernel, serial(decay, x, reverse, initial), exact, exact.abs(), "affine_scan")


@pytest.mark.parametrize("reverse", [True, False])
def test_affine_scan_grad_matches_reference(backend, reverse):
    def grads(fn, decay, dtype):
        x, b = torch.linspace(-1, 1, 200, dtype=dtype).view(4, 50), torch.linspace(-1, 1, 4, dtype=dtype)
        d = decay.to(dtype) if isinstance(decay, torch.Tensor) else decay
        wanted = [t.requires_grad_() for t in (x, b, d) if isinstance(t, torch.Tensor)]
        y = fn(d, x, reverse=reverse, initial=b)
        return torch.autograd.grad((y * torch.arange(200, dtype=dtype).view(4, 50).cos()).sum(), wanted)

    for decay in decays(4, 50):
        exact, framework = grads(serial, decay, torch.float64), grads(serial, decay, torch.float32)
        for k, f, e in zip(grads(rlkern.affine_scan, decay, torch.float32), framework, exact, strict=True):
            assert_within(k, f, e, e.abs() * 10, "affine_scan grad")


def test_affine_scan_grad_matches_reference_expanded(backend):
    """A decay a row that was expanded to its tokens: each token's gradient, and so their sum."""
    x = torch.linspace(-1, 1, 60).view(3, 20)
    one = torch.tensor([0.5, 0.9, 0.1])
    found = []
    for shape in ((3,), (3, 1)):
        leaf = one.clone().requires_grad_()
        decay = leaf if shape == (3,) else leaf.view(shape).expand(3, 20)
        found += torch.autograd.grad(rlkern.affine_scan(decay, x).sum(), leaf)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reverse", [True, False])
def test_affine_scan_gradcheck(backend, reverse):
    for decay in decays(2, 19, torch.float64)[1:]:
        arguments = tuple(t.requires_grad_() for t in (decay, torch.randn(2, 19).double(), torch.randn(2).double()))

        def op(d, x, b):
            return rlkern.affine_scan(d, x, reverse=reverse, initial=b)

        assert torch.autograd.gradcheck(op, arguments)
        assert torch.autograd.gradgradcheck(op, arguments)


def test_affine_scan_ignores_masked(backend):
    """No mask here; a NaN shows, to the left of its token and in its own row alone."""
    x = torch.ones(3, 40)
    x[1, 20] = torch.nan
    y = rlkern.affine_scan(0.5, x)
    assert y[1, :21].isnan().all()
    assert y[1, 21:].isfinite().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("B", "T", "why"), SHAPES[:-1])
def test_affine_scan_edge_shapes(backend, B, T, why):
    torch.manual_seed(0)
    x = torch.randn(B, T)
    for decay in decays(B, T):
        for reverse in (True, False):
            wide = decay.double() if isinstance(decay, torch.Tensor) else decay
            exact = serial(wide, x.double(), reverse)
            kernel = rlkern.affine_scan(decay, x, reverse=reverse)
            assert_within(kernel, serial(decay, x, reverse), exact, exact.abs(), why)


def test_affine_scan_edge_shapes_packed(backend):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)])
    x, initial, per_row, per_token = torch.randn(79), torch.randn(5), torch.rand(5), torch.rand(79)
    for reverse in (True, False):
        for decay in (0.9, per_row, per_token):
            got = rlkern.affine_scan(decay, x, reverse=reverse, initial=initial, cu_seqlens=cu)
            for i, n in enumerate(lengths):
                row = slice(int(cu[i]), int(cu[i]) + n)
                d = decay if isinstance(decay, float) else decay[i : i + 1] if decay is per_row else decay[None, row]
                expected = serial(d, x[None, row], reverse, initial[i : i + 1])
                torch.testing.assert_close(got[row], expected[0], rtol=1e-5, atol=1e-6)


# Few long rows: a GPU cuts them into chunks. 0.999999 reaches over all of a row; a 0 stops what comes before it.
LONG = 3 * 4096 + 77


def long_rows(kind, dtype=torch.float32):
    """x, initial and a decay of a kind; what they give in float64, and the sum of the absolute terms of each."""
    g = torch.Generator().manual_seed(2)
    x, initial = torch.randn(2, LONG, generator=g).to(dtype), torch.randn(2, generator=g).to(dtype)
    per_token = (1 - 1e-3 * torch.rand(2, LONG, generator=g)).to(dtype)
    per_token[0, 5000] = 0
    decay = {"a number": 0.995, "per row": torch.tensor([0.999999, 0.5], dtype=dtype), "per token": per_token}[kind]
    return x, initial, decay


def exact_and_terms(decay, x, initial, reverse):
    """In float64 the reference's powers by squaring are not exact enough: a step at a time."""
    decay = torch.as_tensor(decay, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).double()
    decay = (decay[:, None] if decay.dim() == 1 else decay).expand_as(x)
    initial = torch.zeros(x.shape[0]).double() if initial is None else initial.double()
    exact = serial(decay, x, reverse, initial) if x.dtype == torch.float64 else affine(decay, x.double(), initial, reverse)
    return exact, affine(decay.abs(), x.double().abs(), initial.abs(), reverse)


@pytest.mark.parametrize("kind", ["a number", "per row", "per token"])
@pytest.mark.parametrize(
    ("dtype", "reverse"), [(torch.float32, True), (torch.float32, False), (torch.float64, True), (torch.bfloat16, True)]
)
def test_affine_scan_edge_shapes_long(backend, dtype, reverse, kind):
    x, initial, decay = long_rows(kind, dtype)
    exact, terms = exact_and_terms(decay, x, initial, reverse)
    assert_within(rlkern.affine_scan(decay, x, reverse=reverse, initial=initial), exact, exact, terms, "long rows")


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("kind", ["a number", "per row", "per token"])
def test_affine_scan_edge_shapes_long_packed(backend, reverse, kind):
    x, _initial, decay = long_rows(kind)
    cu, x = torch.tensor([0, LONG - 2001, LONG - 2001, 2 * LONG]), x.reshape(-1)
    if kind != "a number":
        decay = decay.reshape(-1) if kind == "per token" else torch.tensor([0.5, 0.9, 0.999999])
    got = rlkern.affine_scan(decay, x, reverse=reverse, cu_seqlens=cu)
    for i in (0, 2):
        row = slice(int(cu[i]), int(cu[i + 1]))
        d = decay if kind == "a number" else decay[None, row] if kind == "per token" else decay[i : i + 1]
        exact, terms = exact_and_terms(d, x[None, row], None, reverse)
        assert_within(got[None, row], exact, exact, terms, "long packed rows")


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("kind", ["a number", "per row", "per token"])
def test_affine_scan_grad_matches_reference_long(backend, reverse, kind):
    x, initial, decay = long_rows(kind)
    weight = torch.randn(2, LONG, generator=torch.Generator().manual_seed(3))
    wanted = [t.requires_grad_() for t in (x, initial, decay) if isinstance(t, torch.Tensor)]
    found = torch.autograd.grad(rlkern.affine_scan(decay, x, reverse=reverse, initial=initial), wanted, weight)

    def grads(w, x, initial):
        y = affine(d, x, initial, reverse)
        per_row = decay.double().detach() if kind == "per row" else None
        return affine_scan_bwd(w, None if kind == "per row" else d, per_row, y, initial, None, 0.0, reverse, [True] * 3)

    d = torch.as_tensor(decay).detach().double()
    d = (d[:, None] if kind == "per row" else d).expand_as(x)
    wide = [t.detach().double() for t in (weight, x, initial)]
    of = dict(zip(("x", "decay", "initial"), zip(grads(*wide), grads(*[t.abs() for t in wide]), strict=True), strict=True))
    for k, (exact, terms) in zip(found, (of["x"], of["initial"], of["decay"]), strict=False):
        assert_within(k, exact, exact, terms, "long rows, grad")


def test_affine_scan_ignores_masked_long(backend):
    """A NaN shows to the left of its token, in every chunk of its row."""
    x = torch.ones(2, LONG)
    x[1, 9000] = torch.nan
    y = rlkern.affine_scan(0.99, x)
    assert y[1, :9001].isnan().all()
    assert y[1, 9001:].isfinite().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("reverse", [True, False])
def test_affine_scan_edge_shapes_very_long(backend, reverse):
    """More chunks than one look-back covers: of unlike dtypes a thread holds two tokens."""
    g = torch.Generator().manual_seed(4)
    x, decay = torch.randn(1, 140 * 512 + 9, generator=g).bfloat16(), 1 - 1e-4 * torch.rand(1, 140 * 512 + 9, generator=g)
    exact = affine(decay.double(), x.double(), None, reverse)
    assert_within(rlkern.affine_scan(decay, x, reverse=reverse), exact.bfloat16(), exact, exact.abs(), "very long rows")


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 10**6))
def test_affine_scan_properties(B, T, seed):
    g = torch.Generator().manual_seed(seed)
    x, z, decay = (torch.randn(B, T, generator=g).double() for _ in range(3))
    decay = decay.sigmoid()
    both = rlkern.affine_scan(decay, x + 2 * z)
    torch.testing.assert_close(both, rlkern.affine_scan(decay, x) + 2 * rlkern.affine_scan(decay, z), rtol=1e-9, atol=1e-9)
    flipped = rlkern.affine_scan(decay.flip(1), x.flip(1), reverse=False).flip(1)
    torch.testing.assert_close(rlkern.affine_scan(decay, x), flipped, rtol=1e-9, atol=1e-9)
    cut = T // 2  # split anywhere: the right half's first y is the left half's initial
    right = rlkern.affine_scan(decay[:, cut:], x[:, cut:])
    left = rlkern.affine_scan(decay[:, :cut], x[:, :cut], initial=right[:, 0])
    torch.testing.assert_close(rlkern.affine_scan(decay, x), torch.cat([left, right], 1), rtol=1e-9, atol=1e-9)


def test_affine_scan_rejects(backend):
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"rlkern\.affine_scan: decay must have the shape \(2,\)"):
        rlkern.affine_scan(torch.ones(5), x)
    with pytest.raises(TypeError, match=r"rlkern\.affine_scan: decay must be a number"):
        rlkern.affine_scan("0.5", x)
    with pytest.raises(ValueError, match=r"rlkern\.affine_scan: x must be \(B, T\)"):
        rlkern.affine_scan(0.5, x[None])


def test_affine_scan_registers(backend_number):
    x, decay = torch.randn(3, 20), torch.rand(3, 20)
    torch.library.opcheck(torch.ops.rlkern._affine_scan_fwd.default, (decay, None, x, None, None, 0.0, True, backend_number))
    args = (x, decay, None, x, None, None, 0.0, True, [True, True, False], backend_number)
    torch.library.opcheck(torch.ops.rlkern._affine_scan_bwd.default, args)

    def step(d, x):
        return rlkern.affine_scan(d, x).square().sum()

    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        a, b = decay.clone().requires_grad_(), x.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(a, b), (a, b)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
