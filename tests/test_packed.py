# SPDX-License-Identifier: Apache-2.0
"""Packed rows (cu_seqlens) give what the same rows give padded: the row-wise reductions and whitening. The
estimators are in test_packed_advantages.py; the scans, the losses and the shaped rewards have theirs beside their own tests."""

import pytest
import torch

import rlkern
from rlkern import backends
from rlkern.testing import assert_within, mask_kinds

LENGTHS = [5, 0, 33, 1, 300, 40, 16, 0]  # an empty row between others and at the end; less than a vector, one, many and a rest
D = torch.float64
F = torch.float32


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=dtype)


def inside(lengths):
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]


def batch(lengths, dtype=F, mask_dtype=torch.int64, weights=False):
    """A padded batch and the same packed."""
    g = torch.Generator().manual_seed(0)
    here = inside(lengths)
    mask = (torch.rand(here.shape, generator=g) < 0.7) & here
    padded = {
        "values": torch.where(here, 3 * torch.randn(here.shape, generator=g), 0.0).to(dtype),
        "mask": (mask * (1 + torch.arange(here.shape[1]) % 3 if weights else 1)).to(mask_dtype),
        "upstream": torch.randn(here.shape, generator=g).to(dtype),
    }
    return padded, {k: x[here] for k, x in padded.items()}


def normalized(v, m, cu):
    return rlkern.masked_normalize(v, m, cu_seqlens=cu)


def normalized_everywhere(v, m, cu):
    return rlkern.masked_normalize(v, m, cu_seqlens=cu, mask_output=False, unbiased=True, eps_mode="add", eps=0.1)


def applied(v, m, cu, **options):
    moments = rlkern.masked_moments(v, m, -1, cu_seqlens=cu)
    return rlkern.whiten_apply(v, moments, m, unbiased=False, cu_seqlens=cu, **options)


REDUCTIONS = {
    "masked_sum": lambda v, m, cu: rlkern.masked_sum(v, m, -1, cu_seqlens=cu),
    "masked_mean": lambda v, m, cu: rlkern.masked_mean(v, m, -1, cu_seqlens=cu),
    "masked_moments": lambda v, m, cu: rlkern.masked_moments(v, m, -1, cu_seqlens=cu).stack(),
}
BY_ROW = {
    **REDUCTIONS,
    "whiten_apply": lambda v, m, cu: applied(v, m, cu, mask_output=True),
    "whiten_apply everywhere": lambda v, m, cu: applied(v, m, cu, eps_mode="floor", shift_mean=False),
    "masked_normalize": normalized,
    "masked_normalize everywhere": normalized_everywhere,
}
by_row = pytest.mark.parametrize("op", BY_ROW)


def same(a, b, what=""):
    assert a.dtype == b.dtype, what
    assert a.shape == b.shape, what
    assert torch.equal(a.isnan(), b.isnan()), what
    if backends.current_backend() == "cuda":  # cuts a row where 16 divides its address, so a packed one is added up in another order
        torch.testing.assert_close(a, b, equal_nan=True, rtol=4 * torch.finfo(a.dtype).eps, atol=4 * torch.finfo(a.dtype).eps)
        return
    assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)), what


def flat(x, lengths):
    """What a padded result holds for the tokens that exist; one a row stays."""
    return x[inside(lengths)] if x.shape[:2] == (len(lengths), max(lengths, default=0)) else x


def gradient(call, v, m, cu, upstream):
    v = v.clone().requires_grad_()
    y = call(v, m, cu)
    g = upstream.to(y.dtype) if upstream.shape == y.shape else torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(torch.where(g != 0, y, 0.0).mul(g).sum(), v)[0]


# ---- row by row ------------------------------------------------------------------------------------------------------
def test_by_row_known_values(backend):
    v, m, cu = torch.tensor([1.0, 3.0, 9.0, 4.0, 5.0]), torch.tensor([1, 1, 0, 1, 2]), torch.tensor([0, 3, 3, 4, 5])
    assert rlkern.masked_sum(v, m, cu_seqlens=cu).tolist() == [4, 0, 4, 10]
    assert rlkern.masked_mean(v, m, cu_seqlens=cu).tolist() == [2, 0, 4, 5]
    moments = rlkern.masked_moments(v, m, cu_seqlens=cu)
    assert [x.tolist() for x in moments] == [[2, 0, 1, 2], [2, 0, 4, 5], [2, 0, 0, 0]]
    assert rlkern.whiten_apply(v, moments, m, scale_by_std=False, mask_output=True, cu_seqlens=cu).tolist() == [-1, 1, 0, 0, 0]
    whole = rlkern.masked_moments(v, m)  # one for all: the rows do not matter
    assert torch.equal(rlkern.whiten_apply(v, whole, cu_seqlens=cu), rlkern.whiten_apply(v, whole))


@by_row
@pytest.mark.parametrize("dtype", [F, D, torch.bfloat16, torch.float16])
def test_by_row_matches_reference(backend, op, dtype):
    """Values and gradients, to the bit."""
    call = BY_ROW[op]
    for mask_dtype in mask_kinds():
        for weights in (False,) if mask_dtype == torch.bool else (False, True):
            padded, packed = batch(LENGTHS, dtype, mask_dtype, weights)
            m = padded["mask"]
            v = torch.where((m == 0) & ~inside(LENGTHS), torch.nan, padded["values"])  # padding that nothing reads
            got = call(packed["values"], packed["mask"], offsets(LENGTHS, torch.int32))
            same(got, flat(call(v, m, None), LENGTHS), f"{op}, mask {mask_dtype}")
            got = gradient(call, packed["values"], packed["mask"], offsets(LENGTHS), packed["upstream"])
            upstream = torch.where(inside(LENGTHS), padded["upstream"], 0.0)
            same(got, gradient(call, v, m, None, upstream)[inside(LENGTHS)], f"d {op}, mask {mask_dtype}")
    ones = inside(LENGTHS).to(dtype)
    same(call(packed["values"], None, offsets(LENGTHS)), flat(call(padded["values"], ones, None), LENGTHS), "no mask")


@by_row
def test_by_row_gradcheck(backend, op):
    cu, v = torch.tensor([0, 4, 4, 9]), batch([9], D)[1]["values"].requires_grad_()
    for m in (torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1]), torch.tensor([0.5, 2, 0, 1, 1, 0, 3, 1, 0.25]), None):
        assert torch.autograd.gradcheck(lambda v, m=m: BY_ROW[op](v, m, cu), (v,))
        assert torch.autograd.gradgradcheck(lambda v, m=m: BY_ROW[op](v, m, cu), (v,))


@pytest.mark.parametrize("options", [{}, {"mask_output": True}, {"shift_mean": False, "eps_mode": "floor", "eps": 0.5}])
def test_whiten_apply_gradcheck(backend, options):
    """To values and to the moments of each row."""
    cu, m = torch.tensor([0, 4, 4, 9]), torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1])
    v = batch([9], D)[1]["values"].requires_grad_()
    mean, m2 = torch.tensor([0.5, 0.0, -1.0], dtype=D, requires_grad=True), torch.tensor([9.0, 1.0, 20.0], dtype=D, requires_grad=True)

    def call(v, mean, m2):
        return rlkern.whiten_apply(v, rlkern.types.Moments(torch.full_like(mean, 4), mean, m2), m, cu_seqlens=cu, **options)

    assert torch.autograd.gradcheck(call, (v, mean, m2))
    assert torch.autograd.gradgradcheck(call, (v, mean, m2))


@by_row
def test_by_row_ignores_masked(backend, op):
    """NaN at a masked token reaches nothing but its own place, a valid one its own row."""
    call, cu = BY_ROW[op], offsets(LENGTHS)
    for mask_dtype, weights in ((torch.int64, False), (torch.bool, False), (F, True)):
        x = batch(LENGTHS, F, mask_dtype, weights)[1]
        valid = x["mask"] != 0
        dirty, per_token = torch.where(valid, x["values"], torch.nan), call(x["values"], x["mask"], cu).shape == valid.shape
        there = valid if per_token else slice(None)
        same(call(dirty, x["mask"], cu)[there], call(x["values"], x["mask"], cu)[there])
        upstream = torch.where(valid, x["upstream"], 0.0)
        clean = gradient(call, x["values"], x["mask"], cu, upstream)
        same(gradient(call, dirty, x["mask"], cu, upstream), clean)
        if "everywhere" not in op:
            assert (clean[~valid] == 0).all()
        shown = x["values"].clone()
        shown[cu[2] + int(valid[cu[2] :].nonzero()[0])] = torch.nan
        before, after = call(x["values"], x["mask"], cu), call(shown, x["mask"], cu)
        others = torch.ones(before.shape[0], dtype=torch.bool)
        others[slice(cu[2], cu[3]) if per_token else 2] = False
        same(after[others], before[others])
        assert after[~others].isnan().any()


@by_row
def test_by_row_edge_shapes(backend, op):
    call = BY_ROW[op]
    for lengths in ([], [0], [0, 0, 0], [1], [7], [0, 7, 0], [1] * 20, [17000, 3]):
        padded, packed = batch(lengths)
        cu = offsets(lengths)
        got = call(packed["values"], packed["mask"], cu)
        per_row = (len(lengths), 3) if op == "masked_moments" else (len(lengths),)
        assert got.shape == (per_row if op in REDUCTIONS else packed["values"].shape)
        if max(lengths, default=0) > 0:
            same(got, flat(call(padded["values"], padded["mask"], None), lengths), lengths)
        x = packed["values"].requires_grad_()
        (d,) = torch.autograd.grad(call(x, packed["mask"], cu).sum(), x, create_graph=True)
        assert d.shape == x.shape
        torch.autograd.grad(call(x, packed["mask"], cu).square().sum(), x, create_graph=True)
    packed, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    v, m = packed["values"], packed["mask"]
    expected = call(v, m, cu)
    wide = torch.full((2 * len(v),), torch.nan)
    wide[::2] = v
    same(call(wide[::2], m.repeat_interleave(2)[::2], cu), expected, "strided")
    same(call(v, torch.ones(1).expand(len(v)), cu), call(v, None, cu), "one mask for all")
    same(call(torch.ones(1).expand(len(v)), m, cu), call(torch.ones(len(v)), m, cu), "one value for all")


@by_row
def test_by_row_edge_shapes_threads(backend, op):
    lengths = [70000, 0, 3, 90001, 5]
    (_, x), cu, threads = batch(lengths), offsets(lengths), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            forth, back = BY_ROW[op](x["values"], x["mask"], cu), gradient(BY_ROW[op], x["values"], x["mask"], cu, x["upstream"])
            found.append(torch.cat((forth.double().flatten(), back.double())))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpp":  # torch adds in an order of its own
        same(found[1], found[0])
    same(found[2], found[1])


@by_row
def test_by_row_properties(backend, op):
    """Rows may be cut and joined: a call on two batches is the two calls."""
    call, x, cu = BY_ROW[op], batch(LENGTHS)[1], offsets(LENGTHS)
    v, m, middle = x["values"], x["mask"], int(cu[4])
    parts = call(v[:middle], m[:middle], cu[:5]), call(v[middle:], m[middle:], cu[4:] - middle)
    exact = call(v.double(), m, cu)
    assert_within(torch.cat(parts), call(v, m, cu), exact, scale=exact.nan_to_num().abs().max())
    if op == "masked_moments":
        merged, whole = rlkern.merge_moments(call(v, m, cu)), rlkern.masked_moments(v.double(), m)
        assert_within(merged.stack(), whole.stack(), whole.stack(), scale=whole.stack().abs().max())


def test_by_row_out(backend):
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    v, m, out = x["values"], x["mask"], torch.empty_like(x["values"])
    moments = rlkern.masked_moments(v, m, cu_seqlens=cu)
    for call, args in ((rlkern.masked_normalize, (v, m)), (rlkern.whiten_apply, (v, moments, m))):
        assert call(*args, cu_seqlens=cu, out=out) is out
        same(out, call(*args, cu_seqlens=cu))


@by_row
def test_by_row_rejects(backend, op):
    call, name, x = BY_ROW[op], op.split()[0], batch(LENGTHS)[1]
    v, m, cu = x["values"], x["mask"], offsets(LENGTHS)
    name = name if name != "whiten_apply" else "masked_moments"  # whose moments come first
    for args, kind, words in (
        ((v[None], m[None], cu), ValueError, r"values must be \(N,\) with cu_seqlens"),
        ((v, m[:-1], cu), ValueError, "mask must have the shape"),
        ((v, m, cu[:-2]), ValueError, r"cu_seqlens must run from 0 to 395 without falling"),
        ((v, m, cu.flip(0)), ValueError, r"cu_seqlens must run from 0"),
        ((v, m, cu.float()), TypeError, "cu_seqlens must be a 1-D int32 or int64 tensor"),
        ((v, m, cu.tolist()), TypeError, "cu_seqlens must be a 1-D int32 or int64 tensor"),
        ((v, m, cu[:0]), ValueError, "cu_seqlens must hold at least one offset"),
    ):
        with pytest.raises(kind, match=rf"rlkern\.{name}: {words}.*; got"):
            call(*args)


def test_axis_and_moments_rejects(backend):
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    v, m = x["values"], x["mask"]
    for name in REDUCTIONS:
        for axis in (0, 1, (0,), (-1,), 1.0, True):
            with pytest.raises(ValueError, match=rf"rlkern\.{name}: axis must be None or -1 with cu_seqlens; got"):
                getattr(rlkern, name)(v, m, axis, cu_seqlens=cu)
    moments = rlkern.masked_moments(v, m, cu_seqlens=cu).stack()
    for bad in (moments[:-1], moments[:, None], moments[:1]):
        with pytest.raises(ValueError, match=r"rlkern\.whiten_apply: moments must be 0-dim or \(8,\), on cpu; got"):
            rlkern.whiten_apply(v, bad, cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"rlkern\.whiten_apply: moments must be 0-dim or \(\), on cpu; got"):
        rlkern.whiten_apply(v, moments)
    with pytest.raises(ValueError, match=r"rlkern\.whiten_apply: values must be \(N,\) with cu_seqlens"):
        rlkern.whiten_apply(v[None], moments, cu_seqlens=cu)


@pytest.mark.parametrize("kind", ["sum", "mean", "moments"])
def test_reductions_registers(backend_number, kind):
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    v, m, ops = x["values"], x["mask"], torch.ops.rlkern
    moments = rlkern.masked_moments(v, m, cu_seqlens=cu).stack()
    torch.library.opcheck(getattr(ops, f"_masked_{kind}_fwd").default, (v, m, cu, True, False, True, backend_number))
    grad = moments if kind == "moments" else moments[:, 0].float()
    torch.library.opcheck(getattr(ops, f"_masked_{kind}_bwd").default, (grad, v, m, cu, moments, True, False, backend_number))


def test_whiten_apply_registers(backend_number):
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    v, m = x["values"], x["mask"]
    args = (v, m, cu, rlkern.masked_moments(v, m, cu_seqlens=cu).stack(), [False, False, True, True, True], 0.1, True)
    torch.library.opcheck(torch.ops.rlkern._whiten_apply_fwd.default, (*args, backend_number))
    torch.library.opcheck(torch.ops.rlkern._whiten_apply_bwd.default, (v, *args, [True, True], backend_number))


@by_row
def test_by_row_registers_compiled(backend, op):
    torch._dynamo.reset()
    (_, x), cu = batch(LENGTHS), offsets(LENGTHS)
    compiled = torch.compile(BY_ROW[op], fullgraph=True, backend="aot_eager")
    found = [gradient(call, x["values"], x["mask"], cu, x["upstream"]) for call in (BY_ROW[op], compiled)]
    same(*found)
