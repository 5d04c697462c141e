# SPDX-License-Identifier: Apache-2.0
"""masked_sum, masked_mean, masked_var, masked_moments. The oracles: hand arithmetic, verl's recorded outputs,
float64 sums written out here, and what reordering must not change."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.cli import framework
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

GOLDEN = json.loads((Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
F, D, H, B = torch.float32, torch.float64, torch.float16, torch.bfloat16


def stacked(v, m, axis=None):
    return rlkern.masked_moments(v, m, axis).stack()


OPS = {
    "masked_sum": rlkern.masked_sum,
    "masked_mean": rlkern.masked_mean,
    "masked_var": lambda v, m, axis=None: rlkern.masked_var(v, m),
    "masked_var biased": lambda v, m, axis=None: rlkern.masked_var(v, m, unbiased=False),
    "masked_moments": stacked,
}
PLAIN = {
    "masked_sum": framework.masked_sum,
    "masked_mean": framework.masked_mean,
    "masked_var": lambda v, m, axis=None: framework.masked_var(v, m),
    "masked_var biased": lambda v, m, axis=None: framework.masked_var(v, m, unbiased=False),
}


def exact(op, v, m, axis=None):
    """In float64, by the definition; differentiable."""
    axes = tuple(range(v.dim())) if axis is None else axis
    w = torch.ones_like(v, dtype=D) if m is None else m.double()
    v = torch.where(w != 0, v.double(), 0.0)
    n, s = w.sum(axes, keepdim=True), (w * v).sum(axes, keepdim=True)
    mean = torch.where(n != 0, s / torch.where(n != 0, n, 1.0), 0.0)
    m2 = (w * torch.where(w != 0, v - mean, 0.0) ** 2).sum(axes, keepdim=True)
    n, s, mean, m2 = (x.reshape(v.sum(axes).shape) for x in (n, s, mean, m2))
    return {
        "masked_sum": s,
        "masked_mean": mean,
        "masked_var": m2 / (n - 1),
        "masked_var biased": m2 / n,
        "masked_moments": torch.stack((n, mean, m2), -1),
    }[op]


def scale(op, v, m, axis=None):
    """The sum of absolute terms behind each result. A variance feels the rounding of its mean by twice the deviation."""
    w = m.double().abs()
    x = torch.where(w != 0, v.detach().double(), 0.0).abs()
    if op == "masked_sum":
        return exact(op, x, w, axis)
    mean, count = exact("masked_mean", x, w, axis), exact("masked_sum", torch.ones_like(x), w, axis)
    if op == "masked_mean":
        return mean
    spread = exact("masked_moments", v.detach(), w, axis)[..., 2] / count.clamp(min=1)
    variance = 4 * (spread + spread.sqrt() * mean)
    return torch.stack((count, mean, variance * count), -1) if op == "masked_moments" else variance


def weights(rows, tokens, dtype=F):
    m = ragged_mask(rows, tokens, 0.2, 3).double()
    return (m * (torch.arange(tokens) % 3 + 1) / (2 if dtype.is_floating_point else 1)).to(dtype)


def values(rows, tokens, dtype=F, offset=0.0):
    return (torch.randn(rows, tokens, generator=torch.Generator().manual_seed(rows), dtype=D) + offset).to(dtype)


def masks(rows, tokens):
    yield from (ragged_mask(rows, tokens, 0.2, 1, d) for d in mask_kinds())
    yield from (weights(rows, tokens, d) for d in (F, D, B, torch.int64, torch.int32, torch.uint8))


# ---- what every op is asked: test_<op>_<question> --------------------------------------------------------------------
def matches_reference(op, dtype):
    axes = (None, -1, 0) if op in ("masked_sum", "masked_mean", "masked_moments") else (None,)
    for rows, tokens, offset in ((5, 83, 0.0), (3, 300, 1e4 if dtype in (F, D) else 8.0), (2, 17000, 1.0)):
        v = values(rows, tokens, dtype, offset)
        if offset == 1.0:
            v[0, 0] = 3e4  # an outlier first: the worst shift
        long = tokens > 1000  # past one chunk: the fast path, weights noticed on the way, and beforehand
        few = backends.current_backend() == "triton" and not torch.cuda.is_available()  # interpreted, a column is a slow program
        for n, m in enumerate(
            (ragged_mask(rows, tokens, 0.2), weights(rows, tokens, torch.int64), weights(rows, tokens)) if long else masks(rows, tokens)
        ):
            for axis in (None,) if long else axes[: 2 if few and n else 3]:
                kernel, true = OPS[op](v, m, axis), exact(op, v, m, axis)
                plain = PLAIN[op](v, m, axis) if op in PLAIN else true
                assert_within(kernel, plain, true, scale(op, v, m, axis), f"{op}, mask {m.dtype}, axis {axis}")


def gradient(op, fn, v, m, axis=None):
    v = v.detach().requires_grad_()
    y = fn(v, m, axis)
    return torch.autograd.grad((y * torch.linspace(1, 2, y.numel(), dtype=D).view(y.shape).to(y.dtype)).sum(), v)[0]


def grad_matches_reference(op):
    for m in (ragged_mask(3, 300, 0.2), weights(3, 300), weights(3, 300, torch.int64), ragged_mask(3, 300, dtype=torch.bool), None):
        for axis in (None, -1) if "var" not in op else (None,):
            v = values(3, 300)
            true = gradient(op, lambda *a: exact(op, *a), v.double(), m, axis)
            plain = gradient(op, PLAIN[op], v, m, axis) if op in PLAIN and m is not None else true.float()
            assert_within(gradient(op, OPS[op], v, m, axis), plain, true, 8 * true.abs().max() + 1, op)


def gradcheck(op):
    for m in (torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]), torch.tensor([[0.5, 0, 2, -1], [0, 1.5, 1, 3]]), None):
        for axis in (None, -1, 0) if "var" not in op else (None,):
            v = values(2, 4, D).requires_grad_()
            assert torch.autograd.gradcheck(lambda v, m=m, axis=axis: OPS[op](v, m, axis), (v,))
            assert torch.autograd.gradgradcheck(lambda v, m=m, axis=axis: OPS[op](v, m, axis), (v,))


def ignores_masked(op):
    for m in (ragged_mask(4, 70, 0.3), weights(4, 70), ragged_mask(4, 70, 0.3, dtype=torch.bool)):
        clean = torch.where(m != 0, values(4, 70), 0.0)
        for bad in (torch.nan, torch.inf):
            v = torch.where(m != 0, clean, bad)
            assert torch.equal(OPS[op](v, m), OPS[op](clean, m))
            d = gradient(op, OPS[op], v, m)
            assert torch.equal(d, gradient(op, OPS[op], clean, m))
            assert (d[m == 0] == 0).all()
    v[0, 0] = torch.nan  # a valid one shows
    assert OPS[op](v, torch.ones_like(m)).isnan().any()
    nan_mask = torch.where(torch.arange(70) == 3, torch.nan, 1.0).expand(4, 70)
    assert OPS[op](clean, nan_mask).isnan().any()


def edge_shapes(op):
    for rows, tokens, why in SHAPES:
        v = values(rows, tokens)
        for m in (ragged_mask(rows, tokens), torch.ones(rows, tokens, dtype=torch.bool), None):
            n = v.numel() if m is None else int(m.sum())
            if op == "masked_var" and n < 2:
                with pytest.raises(ValueError, match="mask"):
                    OPS[op](v, m)
                continue
            if op == "masked_var biased" and n == 0:
                assert OPS[op](v, m) == 0
                continue
            true, ones = exact(op, v, m), torch.ones_like(v) if m is None else m
            assert_within(OPS[op](v, m), true.float(), true, scale(op, v, ones), why)
    wide, m = values(6, 90), ragged_mask(6, 90, 0.2)
    v, m, row = wide[:, 3:71], m[:, 3:71], torch.arange(6.0)[:, None].expand(6, 68)
    true = exact(op, v, m)
    for a, b in ((v, m), (v.T.contiguous().T, m.T.contiguous().T), (v.contiguous(), m.to(torch.int32))):
        assert_within(OPS[op](a, b), true.float(), true, scale(op, v, m), "strides")
    for a, b in ((row, m), (row, m[:, :1].expand(6, 68)), (v, m[:, :1].expand(6, 68))):
        true = exact(op, a, b)
        assert_within(OPS[op](a, b), true.float(), true, scale(op, a, b), "one value a row")
    if backends.current_backend() == "cpp":
        same_bits(op)


def same_bits(op):
    """For one and two threads, run to run; every ISA within the budget."""
    threads, v = torch.get_num_threads(), values(9, 40000, offset=5.0)
    try:
        for m in (ragged_mask(9, 40000, 0.2), weights(9, 40000)):
            found = []
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                found.append((OPS[op](v, m), OPS[op](v[:, 7:], m[:, 7:]), gradient(op, OPS[op], v, m)))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
            for isa in [k for k, ok in backends.native.isas().items() if ok] if backends.native else []:
                with rlkern.use_backend(f"cpp:{isa}"):
                    assert_within(OPS[op](v, m), exact(op, v, m).float(), exact(op, v, m), scale(op, v, m), isa)
    finally:
        torch.set_num_threads(threads)


def ask(op, question):
    """test_<op>_<question>."""
    names = [name for name in OPS if name.split()[0] == op]

    @pytest.mark.parametrize("name", names)
    def test(backend, name):
        question(name)

    @pytest.mark.parametrize("name", names)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(backend, name, dtype):
        question(name, dtype)

    globals()[f"test_{op}_{question.__name__}"] = test_dtypes if question is matches_reference else test


for _op in ("masked_sum", "masked_mean", "masked_var", "masked_moments"):
    for _question in (matches_reference, grad_matches_reference, gradcheck, ignores_masked, edge_shapes):
        ask(_op, _question)


def rejects(name, call):
    v, m = torch.ones(2, 3), torch.ones(2, 3)
    bad = [
        ((v.long(), m), TypeError, "values must be float32"),
        (([1.0], m), TypeError, "values must be a torch.Tensor"),
        ((v, [1.0]), TypeError, "mask must be a torch.Tensor"),
        ((v, m.to(torch.complex64)), TypeError, "mask must be bool"),
        ((v, m[:, :1]), ValueError, "mask must have the shape"),
        ((v, m.to("meta")), ValueError, "mask must be on"),
        ((v, m.clone().requires_grad_()), ValueError, "mask must not require grad"),
    ]
    for arguments, kind, words in bad:
        with pytest.raises(kind, match=rf"rlkern\.{name}: {words}.*; got"):
            call(*arguments)


def rejects_axes(name, call):
    v, m = torch.ones(2, 3), torch.ones(2, 3)
    for axis, kind in ((2, ValueError), (-3, ValueError), ((0, -2), ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=rf"rlkern\.{name}: axis must"):
            call(v, m, axis)


def registers(kind, call, number):
    v, m = values(3, 20), ragged_mask(3, 20)
    moments = stacked(v, m, -1)
    by_row = kind != "var"
    result = getattr(torch.ops.rlkern, f"_masked_{kind}_fwd").default
    torch.library.opcheck(result, (v, m, None, by_row, not by_row, True, number))
    grad = moments if kind == "moments" else moments[:, 0].float()
    args = (grad, v, m, None, moments, True, False) if by_row else (grad[0], v, m, None, stacked(v, m), False, True)
    torch.library.opcheck(getattr(torch.ops.rlkern, f"_masked_{kind}_bwd").default, (*args, number))
    grads = []
    for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        x = v.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x, m).square().sum(), x)[0])
    assert torch.equal(*grads)


def order_free(op, rows, tokens, seed):
    """Rows and tokens may come in any order, between any amount of padding."""
    g = torch.Generator().manual_seed(seed)
    v, m = torch.randn(rows, tokens, generator=g) * 3 + 7, (torch.rand(rows, tokens, generator=g) < 0.7).long()
    m[0, :2] = 1
    order = torch.randperm(rows, generator=g)
    padded = torch.nn.functional.pad(v, (0, 5), value=torch.nan), torch.nn.functional.pad(m, (0, 5))
    found = OPS[op](v, m)
    for other in (OPS[op](v[order], m[order]), OPS[op](*padded), OPS[op](v.flip(1), m.flip(1))):
        assert_within(other, found, exact(op, v, m), scale(op, v, m), op)


many = given(rows=st.integers(1, 9), tokens=st.integers(2, 70), seed=st.integers(0, 99))


# ---- masked_sum -------------------------------------------------------------------------------------------------------
def test_masked_sum_known_values(backend):
    v = torch.tensor([[1, 2, -1, 0.5], [3, -2, 4, 0.25]])
    m = torch.tensor([[0.5, 2, -1, 0], [1, 0.5, 0, 2]])
    assert rlkern.masked_sum(v, m) == 0.5 + 4 + 1 + 3 - 1 + 0.5
    assert rlkern.masked_sum(v, m, 0).tolist() == [3.5, 3.0, 1.0, 0.5]
    assert rlkern.masked_sum(v, m, (0, 1)) == rlkern.masked_sum(v, m, ()) == 8
    assert rlkern.masked_sum(v, m * 0) == 0
    assert rlkern.masked_sum(torch.tensor(3.0), torch.tensor(2)) == 6
    cube, ones = torch.arange(24.0).view(2, 3, 4), torch.ones(2, 3, 4)
    for axis in (0, 1, -1, (0, 2), (1, 2), (-3, -2), None):
        assert torch.equal(rlkern.masked_sum(cube, ones, axis), cube.sum(axis))
    for dtype, mask, result in ((F, torch.int64, F), (F, D, D), (B, torch.bool, B), (B, F, F), (H, torch.uint8, H), (H, B, F), (D, H, D)):
        assert rlkern.masked_sum(v.to(dtype), m.to(mask)).dtype == result
    inputs = GOLDEN["inputs"]
    found = rlkern.masked_sum(torch.tensor(inputs["values"]), torch.tensor(inputs["mask"]))
    torch.testing.assert_close(found, torch.tensor(GOLDEN["masked"]["sum"]), rtol=1e-6, atol=1e-6)


@many
def test_masked_sum_properties(rows, tokens, seed):
    order_free("masked_sum", rows, tokens, seed)
    v, m = values(rows, tokens), ragged_mask(rows, tokens, 0.1, seed)
    assert_within(rlkern.masked_sum(v, m) + rlkern.masked_sum(v, 1 - m), v.sum(), v.double().sum(), v.abs().sum())


def test_masked_sum_rejects(backend):
    rejects("masked_sum", rlkern.masked_sum)
    rejects_axes("masked_sum", rlkern.masked_sum)


def test_masked_sum_registers(backend_number):
    registers("sum", rlkern.masked_sum, backend_number)


# ---- masked_mean ------------------------------------------------------------------------------------------------------
def test_masked_mean_known_values(backend):
    v = torch.tensor([[1, 2, -1, 0.5], [3, -2, 4, 0.25]])
    m = torch.tensor([[0.5, 2, -1, 0], [1, 0.5, 0, 2]])
    assert rlkern.masked_mean(v, m).tolist() == pytest.approx(1.6)
    assert rlkern.masked_mean(v, m, -1).tolist() == pytest.approx([5.5 / 1.5, 2.5 / 3.5])
    assert rlkern.masked_mean(v, m * 0) == 0
    assert rlkern.masked_mean(v, torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0]])) == -1 / 1e-8
    for dtype, mask, result in ((F, torch.int64, F), (F, D, D), (B, torch.bool, F), (B, B, B), (H, B, F), (H, torch.int32, F), (D, H, D)):
        assert rlkern.masked_mean(v.to(dtype), m.to(mask)).dtype == result
    inputs = GOLDEN["inputs"]
    for axis, key in ((None, "mean"), (1, "mean_axis1")):
        found = rlkern.masked_mean(torch.tensor(inputs["values"]), torch.tensor(inputs["mask"]), axis)
        torch.testing.assert_close(found, torch.tensor(GOLDEN["masked"][key]), rtol=1e-6, atol=1e-6)


@many
def test_masked_mean_properties(rows, tokens, seed):
    order_free("masked_mean", rows, tokens, seed)
    v, m = values(rows, tokens, D), ragged_mask(rows, tokens, 0.1, seed)
    m[0, 0] = 1
    torch.testing.assert_close(rlkern.masked_mean(2 * v + 3, m), 2 * rlkern.masked_mean(v, m) + 3)
    torch.testing.assert_close(rlkern.masked_mean(v, m * 5), rlkern.masked_mean(v, m))


def test_masked_mean_rejects(backend):
    rejects("masked_mean", rlkern.masked_mean)
    rejects_axes("masked_mean", rlkern.masked_mean)


def test_masked_mean_registers(backend_number):
    registers("mean", rlkern.masked_mean, backend_number)


# ---- masked_var -------------------------------------------------------------------------------------------------------
def test_masked_var_known_values(backend):
    v = torch.tensor([[1, 2, -1, 0.5], [3, -2, 4, 0.25]])
    m = torch.tensor([[0.5, 2, -1, 0], [1, 0.5, 0, 2]])
    assert rlkern.masked_var(v, m).tolist() == pytest.approx(1.45625)
    assert rlkern.masked_var(v, m, unbiased=False).tolist() == pytest.approx(1.165)
    assert rlkern.masked_var(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1, 1, 0])) == 2
    assert rlkern.masked_var(v, torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0, 0]])).tolist() == pytest.approx(-0.25)
    assert rlkern.masked_var(v, m * 0, unbiased=False) == 0
    assert rlkern.masked_var(v.bfloat16(), m).dtype == F
    assert rlkern.masked_var(v.bfloat16(), m.bfloat16()).dtype == B
    inputs = GOLDEN["inputs"]
    for unbiased, key in ((True, "var"), (False, "var_biased")):
        found = rlkern.masked_var(torch.tensor(inputs["values"]), torch.tensor(inputs["mask"]), unbiased)
        torch.testing.assert_close(found, torch.tensor(GOLDEN["masked"][key]), rtol=1e-6, atol=1e-6)


@many
def test_masked_var_properties(rows, tokens, seed):
    order_free("masked_var", rows, tokens, seed)
    v, m = values(rows, tokens, D), ragged_mask(rows, tokens, 0.1, seed)
    m[0, :2] = 1
    torch.testing.assert_close(rlkern.masked_var(3 * v + 1e4, m), 9 * rlkern.masked_var(v, m), rtol=1e-9, atol=0)


def test_masked_var_rejects(backend):
    rejects("masked_var", rlkern.masked_var)
    v = torch.ones(2, 3)
    for m in (torch.zeros(2, 3), torch.tensor([[1, -1, 0], [0, 0, 0]]), torch.eye(3)[:2] * 0.5):
        with pytest.raises(ValueError, match=r"rlkern\.masked_var: the mask must"):
            rlkern.masked_var(v, m)


def test_masked_var_registers(backend_number):
    registers("var", rlkern.masked_var, backend_number)


# ---- masked_moments ---------------------------------------------------------------------------------------------------
def test_masked_moments_known_values(backend):
    v, m = torch.tensor([[1.0, 3.0, 99.0], [4.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    count, mean, m2 = rlkern.masked_moments(v, m)
    assert (float(count), float(mean), float(m2)) == (2, 2, 2)
    assert all(x.dtype == D and x.dim() == 0 for x in (count, mean, m2))
    rows = rlkern.masked_moments(v, m, axis=-1)
    assert [x.tolist() for x in rows] == [[2, 0], [2, 0], [2, 0]]
    assert rlkern.masked_moments(torch.ones(2, 3, 4), None, axis=(0, 2)).count.tolist() == [8, 8, 8]


@many
def test_masked_moments_properties(rows, tokens, seed):
    order_free("masked_moments", rows, tokens, seed)
    v, m = values(rows, tokens), ragged_mask(rows, tokens, 0.1, seed)
    merged = rlkern.merge_moments(rlkern.masked_moments(v, m, -1).stack())
    assert_within(merged.stack(), stacked(v, m), exact("masked_moments", v, m), scale("masked_moments", v, m))


def test_masked_moments_rejects(backend):
    rejects("masked_moments", rlkern.masked_moments)
    rejects_axes("masked_moments", rlkern.masked_moments)


def test_masked_moments_registers(backend_number):
    registers("moments", stacked, backend_number)
