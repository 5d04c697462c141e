# SPDX-License-Identifier: Apache-2.0
"""masked_whiten, masked_normalize, whiten_apply. The oracles: hand arithmetic, verl's and OpenRLHF's recorded outputs, the
formula written out below in float64, and the identities of whitened values."""

import itertools
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

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
D = torch.float64
DEFAULTS = {"shift_mean": True, "unbiased": True, "eps": 1e-8, "eps_mode": "add", "scale_by_std": True, "mask_output": False}
# each departure from verl's defaults, and OpenRLHF's global normalisation
OPTIONS = [
    {},
    {"shift_mean": False},
    {"unbiased": False, "eps_mode": "floor"},
    {"eps_mode": "floor", "eps": 30.0},
    {"scale_by_std": False},
    {"mask_output": True, "eps": 0.1},
    {"mask_output": True, "shift_mean": False, "scale_by_std": False},
]
ROW_OPTIONS = [{}, {"mask_output": False}, {"eps_mode": "add", "eps": 0.1}, {"scale_by_std": False}, {"eps": 30.0}]


def statistics(v, m, by_row, o):
    """(mean, 1 / std) by the definition, in the dtype of v; two passes."""
    w, axes = torch.ones_like(v) if m is None else m.to(v.dtype), -1 if by_row else tuple(range(v.dim()))
    seen = torch.where(w != 0, v, 0.0)
    count = w.sum(axes, keepdim=True)
    count = count.clamp(min=1) if by_row else count
    mean = (w * seen).sum(axes, keepdim=True) / count
    m2 = (w * torch.where(w != 0, seen - mean, 0.0) ** 2).sum(axes, keepdim=True)
    var = m2 / (count - 1 if o["unbiased"] else count)
    rstd = (var.clamp(min=o["eps"]) if o["eps_mode"] == "floor" else var + o["eps"]).rsqrt()
    return mean, rstd if o["scale_by_std"] else torch.ones_like(rstd)


def formula(v, m, by_row=False, **options):
    """Differentiable; of float64 values the exact answer, of others the framework's."""
    o = {**DEFAULTS, **options}
    mean, rstd = statistics(v, m, by_row, o)
    valid = torch.ones_like(v, dtype=torch.bool) if m is None else m != 0
    out = ((torch.where(valid, v, 0.0) if o["mask_output"] else v) - mean) * rstd + (0.0 if o["shift_mean"] else mean)
    return torch.where(valid, out, 0.0) if o["mask_output"] else out


def normalized(v, m, **options):
    return formula(v, m, True, **{"unbiased": False, "eps_mode": "floor", "mask_output": True, **options})


def in_three_steps(v, m, **options):
    """The sharded form: whole rows as shards."""
    shards = [rlkern.masked_moments(v[i : i + 2], None if m is None else m[i : i + 2]) for i in range(0, v.shape[0], 2)]
    return rlkern.whiten_apply(v, rlkern.merge_moments(shards), m, **options)


OPS = {
    "masked_whiten": (rlkern.masked_whiten, formula, OPTIONS),
    "masked_normalize": (rlkern.masked_normalize, normalized, ROW_OPTIONS),
    "whiten_apply": (in_three_steps, formula, OPTIONS),
}


def scale(op, v, m, options):
    """Each value feels its own rounding and the mean's, times 1 / std."""
    by_row = op == "masked_normalize"
    o = {**DEFAULTS, **({"unbiased": False, "eps_mode": "floor"} if by_row else {}), **options}
    mean, rstd = statistics(v.double(), m, by_row, o)
    return 2 * (torch.nan_to_num(v.double()).abs() + mean.abs()) * (rstd + (0 if o["shift_mean"] else 1))


def values(rows, tokens, dtype=torch.float32, offset=0.0):
    return (3 * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(rows), dtype=D) + offset).to(dtype)


def weights(rows, tokens, dtype=torch.float32):
    m = ragged_mask(rows, tokens, 0.2, 3).double()
    return (m * (torch.arange(tokens) % 3 + 1) / (2 if dtype.is_floating_point else 1)).to(dtype)


# ---- what every op is asked: test_<op>_<question> --------------------------------------------------------------------
def matches_reference(op, dtype):
    call, plain, options = OPS[op]
    for rows, tokens, offset in ((5, 83, 0.0), (4, 300, 1e4 if dtype in (torch.float32, D) else 8.0), (2, 17000, 1.0)):
        v = values(rows, tokens, dtype, offset)
        v[0, 0] += 1000  # an outlier first: the worst shift
        kinds = [ragged_mask(rows, tokens, 0.2, 1, d) for d in mask_kinds()] + [
            weights(rows, tokens, d) for d in (torch.float32, D, torch.int64)
        ]
        kinds = [kinds[3], kinds[-1], kinds[-3]] if tokens > 1000 else kinds
        for o, m in itertools.chain(((o, kinds[0]) for o in options), (({}, m) for m in kinds), [({}, None)]):
            exact = plain(v.double(), m, **o)
            kernel = call(v, m, **o)
            assert kernel.dtype == dtype
            assert_within(kernel, plain(v, m, **o), exact, scale(op, v, m, o), f"{op} {o}, mask {m if m is None else m.dtype}")


def gradient(fn, v, m, **options):
    v = v.detach().requires_grad_()
    y = fn(v, m, **options)
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=D).view(y.shape).to(y.dtype)).sum(), v)[0]


def grad_matches_reference(op):
    call, plain, options = OPS[op]
    v = values(4, 300, offset=5.0)
    for m in (ragged_mask(4, 300, 0.2), weights(4, 300), weights(4, 300, torch.int64), ragged_mask(4, 300, dtype=torch.bool), None):
        for o in options:
            exact = gradient(plain, v.double(), m, **o)
            assert_within(gradient(call, v, m, **o), gradient(plain, v, m, **o), exact, 8 * exact.abs().max() + 8, f"{op} {o}")


def gradcheck(op):
    call, _, options = OPS[op]
    for m in (
        torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]),
        torch.tensor([[0.5, 0, 2, 1], [0, 1.5, 1, 3]]),
        torch.eye(4)[:2] * 0.7 + 0.1,
        None,
    ):
        for o in options:
            v = values(2, 4, D).requires_grad_()
            assert torch.autograd.gradcheck(lambda v, m=m, o=o: call(v, m, **o), (v,))
            assert torch.autograd.gradgradcheck(lambda v, m=m, o=o: call(v, m, **o), (v,))


def ignores_masked(op):
    call, _, options = OPS[op]
    for m in (ragged_mask(4, 70, 0.3), weights(4, 70), ragged_mask(4, 70, 0.3, dtype=torch.bool)):
        clean, valid = torch.where(m != 0, values(4, 70), 0.0), m != 0
        for o in options:
            dirty = torch.where(valid, clean, torch.nan)
            a, b = call(clean, m, **o), call(dirty, m, **o)
            assert torch.equal(a[valid], b[valid])
            unmasked = not o.get("mask_output", op == "masked_normalize")
            assert (b[~valid].isnan() if unmasked else b[~valid] == 0).all()

            def loss(v, m, o=o, valid=valid):  # what a trainer does next: the padding's gradient is 0
                return torch.where(valid, call(v, m, **o), 0.0)

            assert torch.equal(gradient(loss, clean, m), gradient(loss, dirty, m))
            assert (gradient(loss, dirty, m)[~valid] == 0).all()
    assert call(torch.where(torch.arange(70) == 0, torch.nan, clean), torch.ones_like(m)).isnan().all()


def edge_shapes(op):
    call, plain, _ = OPS[op]
    for rows, tokens, why in SHAPES:
        v = values(rows, tokens)
        for m in (ragged_mask(rows, tokens), torch.ones(rows, tokens, dtype=torch.bool), torch.zeros(rows, tokens), None):
            if op != "masked_normalize" and (v.numel() if m is None else int(m.sum())) < 2:
                if v.numel():
                    with pytest.raises(ValueError, match="the mask must"):
                        call(v, m)
                continue
            exact = plain(v.double(), m)
            assert_within(call(v, m), plain(v, m), exact, scale(op, v, m, {}) + 1, why)
    wide, m = values(6, 90), ragged_mask(6, 90, 0.2)
    v, m, row = wide[:, 3:71], m[:, 3:71], torch.arange(6.0)[:, None].expand(6, 68)
    turned, per_row = (v.T.contiguous().T, m.T.contiguous().T), m[:, :1].expand(6, 68)
    for a, b in ((v, m), turned, (v.contiguous(), m.to(torch.int32)), (row, m), (v, per_row)):
        assert_within(call(a, b), plain(a, b), plain(a.double(), b), scale(op, a, b, {}) + 1, "strides")
    if backends.current_backend() == "cpp":
        same_bits(op)


def same_bits(op):
    """For one and two threads, run to run, into fresh memory or `out`; every ISA within the budget."""
    call, plain, options = OPS[op]
    threads, v = torch.get_num_threads(), values(9, 40000, offset=5.0)
    try:
        for o, m in ((options[0], ragged_mask(9, 40000, 0.2)), (options[-1], weights(9, 40000))):
            found = []
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                parts = call(v, m, **o), call(v, m, out=torch.empty_like(v), **o), call(v[:, 7:], m[:, 7:], **o)
                found.append((*parts, gradient(call, v, m, **o)))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
            assert torch.equal(found[0][0], found[0][1])
            for isa in [k for k, ok in backends.native.isas().items() if ok]:
                with rlkern.use_backend(f"cpp:{isa}"):
                    assert_within(call(v, m, **o), plain(v, m, **o), plain(v.double(), m, **o), scale(op, v, m, o), isa)
    finally:
        torch.set_num_threads(threads)


def ask(op, question):
    """test_<op>_<question>."""

    def test(backend):
        question(op)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(backend, dtype):
        question(op, dtype)

    globals()[f"test_{op}_{question.__name__}"] = test_dtypes if question is matches_reference else test


for _op in OPS:
    for _question in (matches_reference, grad_matches_reference, gradcheck, ignores_masked, edge_shapes):
        ask(_op, _question)


def rejects(op, call):
    v, m = torch.ones(2, 3), torch.ones(2, 3)
    bad = [
        ({"values": v.long()}, TypeError, "values must be float32"),
        ({"values": 1.0}, TypeError, "values must be a torch.Tensor"),
        ({"mask": [1.0]}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": m[:, :1]}, ValueError, "mask must have the shape"),
        ({"mask": m.to("meta")}, ValueError, "mask must be on"),
        ({"mask": m.clone().requires_grad_()}, ValueError, "mask must not require grad"),
        ({"eps": -1.0}, ValueError, "eps must be in"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"eps_mode": "clip"}, ValueError, "eps_mode must be one of"),
        ({"out": torch.empty(3, 2)}, ValueError, "out must be"),
        ({"out": torch.empty(2, 3, dtype=D)}, ValueError, "out must be"),
        ({"out": torch.empty(2, 3), "values": v.clone().requires_grad_()}, ValueError, "out must not be given"),
    ]
    for arguments, kind, words in bad:
        with pytest.raises(kind, match=rf"rlkern\.{op}: {words}.*; got"):
            call(**{"values": v, "mask": m, **arguments})


def registers(op, number, fwd, bwd):
    torch.library.opcheck(getattr(torch.ops.rlkern, f"_{op}_fwd").default, (*fwd, number))
    torch.library.opcheck(getattr(torch.ops.rlkern, f"_{op}_bwd").default, (*bwd, number))
    call = OPS[op][0]
    v, m, grads = values(3, 20), ragged_mask(3, 20), []
    for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        x = v.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x, m).pow(3).sum(), x)[0])
    assert torch.equal(*grads)


def spread(v, m):
    """Mean and unbiased variance of the valid values."""
    x = v.double()[m != 0]
    return float(x.mean()), float(x.var())


many = given(rows=st.integers(1, 9), tokens=st.integers(2, 70), seed=st.integers(0, 99))


def batch(rows, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    v, m = torch.randn(rows, tokens, generator=g, dtype=D) * 3 + 7, (torch.rand(rows, tokens, generator=g) < 0.7).long()
    m[0, :2] = 1
    return v, m, torch.randperm(rows, generator=g)


# ---- masked_whiten ----------------------------------------------------------------------------------------------------
def test_masked_whiten_known_values(backend):
    v, m = torch.tensor([[1.0, 2.0, 3.0, 5.0]]), torch.tensor([[1, 1, 1, 0]])
    torch.testing.assert_close(rlkern.masked_whiten(v, m, eps=0.0), torch.tensor([[-1.0, 0, 1, 3]]))
    torch.testing.assert_close(rlkern.masked_whiten(v, m, False, eps=0.0, mask_output=True), torch.tensor([[1.0, 2, 3, 0]]))
    torch.testing.assert_close(rlkern.masked_whiten(v, m, eps=4.0, eps_mode="floor"), torch.tensor([[-0.5, 0, 0.5, 1.5]]))
    torch.testing.assert_close(rlkern.masked_whiten(v, m, unbiased=False, eps=7 / 3), torch.tensor([[-1.0, 0, 1, 3]]) / 3**0.5)
    torch.testing.assert_close(rlkern.masked_whiten(v, m, scale_by_std=False), torch.tensor([[-1.0, 0, 1, 3]]))
    x = torch.tensor([[1, 2, -1, 0.5], [3, -2, 4, 0.25]])
    w = torch.tensor([[0.5, 2, -1, 0], [1, 0.5, 0, 2]])  # weights: verl 0.9.1 gives this
    expected = torch.tensor([-0.4972, 0.33147, -2.1545, -0.91154])
    torch.testing.assert_close(rlkern.masked_whiten(x, w)[0], expected, rtol=1e-4, atol=1e-4)
    assert rlkern.masked_whiten(x, torch.eye(4)[:2] * 0.25).isnan().all()  # sum 0.5: a negative variance
    out = torch.empty(2, 4)
    assert rlkern.masked_whiten(x, w, out=out) is out
    cube = torch.randn(2, 3, 5)
    torch.testing.assert_close(rlkern.masked_whiten(cube, None), rlkern.masked_whiten(cube.view(6, 5), None).view(2, 3, 5))
    data = json.loads((GOLDEN / "verl_0.9.1.json").read_text())
    v, m = torch.tensor(data["inputs"]["values"]), torch.tensor(data["inputs"]["mask"])
    for shift_mean, key in ((True, "whiten"), (False, "whiten_noshift")):
        torch.testing.assert_close(rlkern.masked_whiten(v, m, shift_mean), torch.tensor(data["masked"][key]), rtol=2e-6, atol=2e-6)
    assert_within(rlkern.masked_whiten(v, m), framework.masked_whiten(v, m), formula(v.double(), m), scale("masked_whiten", v, m, {}))


@many
def test_masked_whiten_properties(rows, tokens, seed):
    v, m, order = batch(rows, tokens, seed)
    out, n = rlkern.masked_whiten(v, m, eps=0.0), int(m.sum())
    assert spread(out, m) == pytest.approx((0.0, 1.0), abs=1e-9)
    for same in (
        rlkern.masked_whiten(5 * v + 100, m, eps=0.0),
        rlkern.masked_whiten(v[order], m[order], eps=0.0)[order.argsort()],
        rlkern.masked_whiten(torch.nn.functional.pad(v, (4, 3)), torch.nn.functional.pad(m, (4, 3)), eps=0.0)[:, 4:-3],
        rlkern.masked_whiten(v, m * 3, eps=0.0) * ((n - 1) / (n - 1 / 3)) ** 0.5,  # three of each
        in_three_steps(v, m, eps=0.0),
    ):
        torch.testing.assert_close(same, out, rtol=1e-8, atol=1e-8)


def test_masked_whiten_rejects(backend):
    rejects("masked_whiten", rlkern.masked_whiten)
    v = torch.ones(2, 3)
    for m in (torch.zeros(2, 3), torch.tensor([[1, -1, 0], [0, 0, 0]]), torch.eye(3)[:2] * 0.5):
        with pytest.raises(ValueError, match=r"rlkern\.masked_whiten: the mask must"):
            rlkern.masked_whiten(v, m)


def test_masked_whiten_registers(backend_number):
    v, m = values(3, 20), ragged_mask(3, 20)
    flags = [True, False, True, True, False]
    moments = rlkern.masked_moments(v, m).stack()
    registers("masked_whiten", backend_number, (v, m, None, flags, 1e-8, True), (v, v, m, None, moments, flags, 1e-8))


# ---- masked_normalize -------------------------------------------------------------------------------------------------
def test_masked_normalize_known_values(backend):
    v, m = torch.tensor([[1.0, 3.0, 9.0], [7.0, 8.0, 9.0], [4.0, 0, 0]]), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert rlkern.masked_normalize(v, m).tolist() == [[-1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert rlkern.masked_normalize(v, m, scale_by_std=False, mask_output=False).tolist() == [[-1, 1, 7], [7, 8, 9], [0, -4, -4]]
    assert rlkern.masked_normalize(v, m, unbiased=True)[2, 0].isnan()
    data = json.loads((GOLDEN / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]["masked_normalize(dim=1)"]
    inputs = json.loads((GOLDEN / "verl_0.9.1.json").read_text())["inputs"]
    v, m = torch.tensor(inputs["values"]), torch.tensor(inputs["mask"])
    torch.testing.assert_close(rlkern.masked_normalize(v, m), torch.tensor(data), rtol=1e-6, atol=1e-6)
    assert_within(rlkern.masked_normalize(v, m), framework.masked_normalize(v, m), normalized(v.double(), m), 4.0)


@many
def test_masked_normalize_properties(rows, tokens, seed):
    v, m, order = batch(rows, tokens, seed)
    out = rlkern.masked_normalize(v, m)
    for row, valid in zip(out, m, strict=True):
        if valid.sum() > 1:
            mean, var = spread(row, valid)
            assert (mean, var * (1 - 1 / int(valid.sum()))) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert torch.equal(rlkern.masked_normalize(v[order], m[order]), out[order])
    torch.testing.assert_close(rlkern.masked_normalize(5 * v + 100, m), out, rtol=1e-6, atol=1e-6)


def test_masked_normalize_rejects(backend):
    rejects("masked_normalize", rlkern.masked_normalize)


def test_masked_normalize_registers(backend_number):
    v, m = values(3, 20), ragged_mask(3, 20)
    flags = [False, True, True, True, True]
    moments = rlkern.masked_moments(v, m, -1).stack()
    registers("masked_normalize", backend_number, (v, m, None, flags, 1e-8, True), (v, v, m, None, moments, flags, 1e-8))


# ---- whiten_apply -----------------------------------------------------------------------------------------------------
def test_whiten_apply_known_values(backend):
    moments = rlkern.Moments(*(torch.tensor(x) for x in (3.0, 2.0, 2.0)))
    v = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    torch.testing.assert_close(rlkern.whiten_apply(v, moments, eps=0.0), torch.tensor([[-1.0, 0, 1, 3]]))
    rows = rlkern.Moments(*(torch.tensor(x).double() for x in ([3.0, 0.0], [2.0, 0.0], [2.0, 0.0])))
    two = rlkern.whiten_apply(v.expand(2, 4), rows, torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]), eps=0.0, mask_output=True)
    torch.testing.assert_close(two, torch.tensor([[-1.0, 0, 1, 0], [0, 0, 0, 0]]))
    v, m = values(5, 300), ragged_mask(5, 300, 0.2)
    for options in OPTIONS:
        exact = rlkern.whiten_apply(v, rlkern.masked_moments(v, m), m, **options)
        assert torch.equal(exact, rlkern.masked_whiten(v, m, **options))


def test_whiten_apply_gradcheck_moments(backend):
    """With respect to given moments, for all values and by row."""
    v, m = values(3, 4, D).requires_grad_(), torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]])
    for shape, o in itertools.product(((), (3,)), OPTIONS):
        mean, m2 = (torch.rand(shape, dtype=D).requires_grad_() for _ in range(2))
        count = torch.full(shape, 7.0, dtype=D)

        def op(v, mean, m2, count=count, o=o):
            return rlkern.whiten_apply(v, rlkern.Moments(count, mean, 9 * m2), m, **o)

        assert torch.autograd.gradcheck(op, (v, mean, m2))
        assert torch.autograd.gradgradcheck(op, (v, mean, m2))


@many
def test_whiten_apply_properties(rows, tokens, seed):
    """The gradient through shards is the gradient through the whole."""
    v, m, _ = batch(rows, tokens, seed)
    torch.testing.assert_close(gradient(in_three_steps, v, m), gradient(rlkern.masked_whiten, v, m), rtol=1e-8, atol=1e-8)


def test_whiten_apply_rejects(backend):
    v, moments = torch.ones(2, 3), rlkern.masked_moments(values(2, 3), None)
    rejects("whiten_apply", lambda values, **rest: rlkern.whiten_apply(values, moments, **rest))
    for bad, kind in ((torch.ones(2), ValueError), (torch.ones(3, 3), ValueError), (1.0, TypeError), (torch.zeros(3), ValueError)):
        with pytest.raises(kind, match=r"rlkern\.whiten_apply: (moments|the mask) must"):
            rlkern.whiten_apply(v, bad)


def test_whiten_apply_registers(backend_number):
    v, m = values(3, 20), ragged_mask(3, 20)
    args = (v, m, None, rlkern.masked_moments(v, m).stack(), [True, False, True, True, True], 1e-8, False)
    registers("whiten_apply", backend_number, args, (v, *args, [True, True]))
