# SPDX-License-Identifier: Apache-2.0
"""The optimal token baselines of rlkern.advantages. The oracles: hand arithmetic, verl's recorded outputs
(test_verl_estimators.py), the loop over groups and columns, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import advantages, backends
from rlkern.reference import token_baseline as reference
from rlkern.testing import SHAPES, assert_within, error, mask_kinds, ragged_mask

# Names of the nine that no estimator has: test_outcome_advantages.py says why.
NAMES = ("optimal_token_baseline", "tir_optimal_token_baseline")
names = pytest.mark.parametrize("name", NAMES)
TOKENS = ("rewards", "mask", "old", "squares", "rho")


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0, holes=0.2):
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(B, T, generator=g)
    x = {"rewards": torch.randn(B, T, generator=g), "old": old, "squares": old.exp() ** 2 + 0.3 * torch.rand(B, T, generator=g)}
    x = {k: v.to(dtype) for k, v in x.items()} | {"mask": ragged_mask(B, T, holes, seed, mask_dtype)}
    return x | {"rho": (0.5 + torch.rand(B, T, generator=g)).to(dtype), "labels": [i % max(B // 3, 1) for i in range(B)]}


def call(name, x, zero_tail=True, weighted=True, **kw):
    rho = x["rho"] if weighted else None
    return getattr(advantages, name)(x["rewards"], x["mask"], x["labels"], x["old"], x["squares"], rho, zero_tail, **kw)


def specified(name, x, dtype, zero_tail=True, weighted=True):
    parts = [x[k].to(dtype) for k in ("rewards", "old", "squares")]
    rho, ids = x["rho"].to(dtype) if weighted else None, rlkern.group_index(x["labels"]).ids
    mask = x["mask"]
    return reference.advantage_loop(parts[0], mask, *parts[1:], rho, ids, name.startswith("tir"), zero_tail, 1e-8)


def assert_specified(name, x, what, got=None, **options):
    got = call(name, x, **options) if got is None else got
    framework, exact = (specified(name, x, dtype, **options) for dtype in (x["rewards"].dtype, torch.float64))
    terms = torch.where(x["mask"] != 0, x["rewards"].double().abs(), 0.0).sum(1)
    for a, b, c, size in zip(got, framework, exact, (4, 1), strict=True):  # a baseline is a mean of returns
        assert_within(a, b, c, size * terms, f"{name}: {what}")


def test_known_values_by_hand(backend):
    # w = 1 - 2 / 4 + S: 1, 1, 1 and 2, 2; to go: 6 5 3 and 1 1; W: 1 2 3 and 2 4
    r = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 9.0], [5.0, 5.0, 5.0]])
    m = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    old = torch.full((3, 3), 0.25).log()
    squares = torch.tensor([[0.5] * 3, [1.5] * 3, [0.5] * 3])
    args = (r, m, ["a", "a", "b"], old, squares)
    base = torch.tensor([(6 * 1 + 1 * 2) / 3, (5 * 2 + 1 * 4) / 6, 3.0])
    returns = torch.tensor([[6.0, 5, 3], [1, 1, 0], [15, 10, 5]])
    for name in NAMES:
        got = getattr(advantages, name)(*args, handle_zero_tail=False)
        torch.testing.assert_close(got.returns, returns)
        expected = torch.stack([returns[0] - base, torch.where(m[1] != 0, returns[1] - base, 0.0), returns[2]])
        torch.testing.assert_close(got.advantages, expected)
        expected[0, 2] = 3.0  # the longest row alone is there
        torch.testing.assert_close(getattr(advantages, name)(*args).advantages, expected)
        # rho = 2 in row 1: its weights times 4
        rho = torch.tensor([[1.0], [2.0], [1.0]]).expand(3, 3)
        got = getattr(advantages, name)(*args, rho, False).advantages[0, 0]
        torch.testing.assert_close(got, torch.tensor(6 - (6 * 1 + 1 * 8) / 9))


def test_known_values_of_columns(backend):
    """A tool token parts columns: [1, 0, 1] is as long as [1, 1, 0], and its second token stands in column 2 or is the second."""
    r, m = torch.tensor([[0.0, 0, 1], [0, 2.0, 0]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    args = (r, m, ["a", "a"], torch.full((2, 3), -1e9), torch.zeros(2, 3))  # w = 1
    apart = advantages.optimal_token_baseline(*args).advantages
    torch.testing.assert_close(apart, torch.tensor([[-0.5, 0, 0], [0.5, 0, 0]]))
    by_token = advantages.tir_optimal_token_baseline(*args).advantages
    torch.testing.assert_close(by_token, torch.tensor([[-0.5, 0, -0.5], [0.5, 0.5, 0]]))


def test_known_values_of_empty_rows(backend):
    """An empty row is a member of its group for the one, and none for the other; the longest row is alone either way."""
    r, m = torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]])
    args = (r, m, ["a", "a"], torch.full((2, 2), -1e9), torch.zeros(2, 2))
    for name, zero_tail, expected in (
        ("optimal_token_baseline", True, [[2.0, 1.0], [0.0, 0.0]]),
        ("optimal_token_baseline", False, [[0.0, 0.0], [0.0, 0.0]]),
        ("tir_optimal_token_baseline", False, [[2.0, 1.0], [0.0, 0.0]]),
    ):
        got = getattr(advantages, name)(*args, handle_zero_tail=zero_tail).advantages
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-6)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference(backend, name, dtype):
    few = backend == "triton" and dtype != torch.float32  # interpreted
    for i, mask_dtype in enumerate(mask_kinds()[: 2 if few else None]):
        x = inputs(9, 37, dtype, mask_dtype, seed=i)
        for zero_tail in (True, False):
            assert_specified(name, x, f"{dtype} {mask_dtype}", zero_tail=zero_tail, weighted=bool(i % 2))
        assert call(name, x).advantages.dtype == (torch.promote_types(dtype, mask_dtype) if mask_dtype.is_floating_point else dtype)


@pytest.mark.skipif(backends.native is None, reason=backends.native_error)
@pytest.mark.parametrize("isa", [k for k, ok in backends.native.isas().items() if ok] if backends.native else [])
def test_matches_reference_on_each_isa(isa):
    with rlkern.use_backend(f"cpp:{isa}"):
        for name in NAMES:
            for mask_dtype in (torch.int64, torch.bool, torch.float32):
                for dtype in (torch.float32, torch.float64):
                    assert_specified(name, inputs(9, 40, dtype, mask_dtype), f"{isa} {dtype} {mask_dtype}")


@names
def test_ignores_masked(backend, name):
    x = inputs(9, 40)
    clean = call(name, x)
    assert not clean.advantages[x["mask"] == 0].any()
    dirty = {k: torch.where(x["mask"] != 0, v, torch.nan) if k in TOKENS and k != "mask" else v for k, v in x.items()}
    for a, b in zip(call(name, dirty), clean, strict=True):
        assert torch.equal(a, b)
    # a NaN that is read shows to its left in the row, and in the columns of its group that it reaches
    t = int(torch.nonzero(x["mask"][0])[-1])
    x["rewards"] = x["rewards"].clone()
    x["rewards"][0, t] = torch.nan
    got = call(name, x)
    valid = x["mask"] != 0
    assert got.advantages[0][valid[0]].isnan().all()
    for i in (1, 2):
        assert torch.equal(got.advantages[i::3], clean.advantages[i::3])


@pytest.mark.parametrize(("B", "T", "why"), [s for s in SHAPES if s[0] * s[1] < 3000])
def test_edge_shapes(backend, B, T, why):
    for name in NAMES:
        for x in (inputs(B, T), {**inputs(B, T), "mask": torch.ones(B, T)}, {**inputs(B, T), "mask": torch.zeros(B, T)}):
            if B and T:
                assert_specified(name, x, why)
            else:
                assert call(name, x).advantages.shape == (B, T)


@names
def test_edge_shapes_long(backend, name):
    """Past one block; the torch backend in float64 is the oracle."""
    x = inputs(3, 5000 if backend == "triton" else 17000)
    with rlkern.use_backend("torch"):
        exact = call(name, {k: v.double() if k in TOKENS else v for k, v in x.items()})
    terms = torch.where(x["mask"] != 0, x["rewards"].double().abs(), 0.0).sum(1)
    for a, b in zip(call(name, x), exact, strict=True):
        assert_within(a, b, b, 4 * terms, name)


@names
def test_edge_shapes_strides_and_out(backend, name):
    x = inputs(9, 40)
    expected = call(name, x)
    wide = {k: torch.full((9, 99), torch.nan)[:, 9:49].copy_(x[k]) for k in TOKENS if k != "mask"}
    strided = {**x, **wide, "mask": x["mask"].t().contiguous().t()}
    out = tuple(torch.full((9, 50), torch.nan)[:, :40] for _ in range(2))
    got = call(name, strided, out=out)
    assert got.advantages is out[0]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    row = {**x, "rho": x["rho"][:, :1].expand(9, 40)}
    full = {**x, "rho": x["rho"][:, :1].repeat(1, 40)}
    assert error(call(name, row).advantages, call(name, full).advantages) < 1e-5
    fresh = {k: x[k].clone().requires_grad_() for k in TOKENS if k != "mask"}
    got = call(name, {**x, **fresh})
    assert not got.advantages.requires_grad
    assert torch.equal(got.advantages, expected.advantages)


@names
@pytest.mark.parametrize("times", [1, 21])
def test_edge_shapes_packed(backend, name, times):
    if backend == "triton" and times > 1:
        pytest.skip("interpreted")
    lengths = [times * n for n in (5, 0, 33, 1, 120, 40, 16, 0)]
    inside = torch.arange(120 * times) < torch.tensor(lengths)[:, None]
    x = inputs(8, 120 * times)
    x["labels"], x["mask"] = [0, 1, 0, 1, 0, 1, 0, 2], x["mask"] * inside
    packed = {k: v[inside] if k in TOKENS else v for k, v in x.items()}
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    for zero_tail in (True, False):
        got, padded = call(name, packed, zero_tail, cu_seqlens=cu), call(name, x, zero_tail)
        for a, b in zip(got, padded, strict=True):
            torch.testing.assert_close(a, b[inside], rtol=1e-5, atol=1e-5 * times)
    for n in ([], [0, 0], [3]):
        empty = {k: v[: sum(n)] if k in TOKENS else list(range(len(n))) for k, v in packed.items()}
        assert call(name, empty, cu_seqlens=torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()] if n else [0])).returns.shape == (sum(n),)


@given(st.integers(2, 9), st.integers(1, 30), st.integers(0, 10**6))
def test_properties(B, T, seed):
    x = inputs(B, T, torch.float64, seed=seed)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = {k: v[order] if isinstance(v, torch.Tensor) else [f"other {v[i]}" for i in order] for k, v in x.items()}
    padded = {k: torch.nn.functional.pad(v, (0, 7)) if k in TOKENS else v for k, v in x.items()}

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)

    for name in NAMES:
        got = call(name, x)
        close(got.returns, rlkern.discounted_returns(x["rewards"], x["mask"], gamma=1.0, masked="zero"))
        close(call(name, permuted).advantages, got.advantages[order])
        close(call(name, padded).advantages[:, :T], got.advantages)
        # equal weights: the mean of the group's column; of one row: no baseline
        even = {**x, "old": torch.full((B, T), -torch.inf, dtype=torch.float64), "squares": torch.zeros(B, T, dtype=torch.float64)}
        alone = call(name, {**x, "labels": list(range(B))}).advantages
        close(alone, torch.where(x["mask"] != 0, got.returns, 0.0))
        if name == "optimal_token_baseline":
            even["mask"] = torch.ones(B, T)
            plain = call(name, even, weighted=False)
            for label in set(x["labels"]):
                rows = torch.tensor([i for i, other in enumerate(x["labels"]) if other == label])
                mean = plain.returns[rows].mean(0) if len(rows) > 1 else 0.0
                close(plain.advantages[rows], plain.returns[rows] - mean)
            # without a hole both are one
            close(call("tir_optimal_token_baseline", even).advantages, call(name, even).advantages)


@names
def test_properties_threads_and_runs(backend, name):
    x, before, found = inputs(*{"triton": (6, 300), "cuda": (6, 3000)}.get(backend, (48, 3000))), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(call(name, x).advantages)
    finally:
        torch.set_num_threads(before)
    same = torch.equal if backend == "cpp" else torch.allclose
    assert all(same(found[0], other) for other in found[1:])


@names
def test_rejects(backend, name):
    x = inputs(4, 5)

    def check(kind, words, **changed):
        with pytest.raises(kind, match=rf"rlkern\.advantages\.{name}: {words}"):
            call(name, {**x, **changed})

    for key, word in (("mask", "response_mask"), ("old", "old_log_probs"), ("squares", "sum_pi_squared"), ("rho", "rollout_is_weights")):
        check(ValueError, rf"{word} must have the shape \(4, 5\)", **{key: x[key][:, :4]})
        check(TypeError, rf"{word} must be a torch\.Tensor", **{key: x[key].numpy()})
    check(TypeError, r"old_log_probs must be float32", old=x["mask"])
    check(ValueError, "index must have 4 labels, one a row; got 3", labels=x["labels"][:3])
    with pytest.raises(ValueError, match="epsilon must be in"):
        call(name, x, epsilon=-1.0)
    with pytest.raises(ValueError, match="out must hold 2 tensors"):
        call(name, x, out=(torch.empty(4, 5),))
    with pytest.raises(ValueError, match=r"token_level_rewards must be \(N,\) with cu_seqlens"):
        call(name, x, cu_seqlens=torch.tensor([0, 20]))


def test_registers(backend_number):
    x = inputs(6, 20)
    index = rlkern.group_index(x["labels"])
    for by_token in (False, True):
        args = (*(x[k] for k in ("rewards", "mask", "old", "squares", "rho")), index.ids, index.order, index.offsets)
        raw = torch.ops.rlkern._optimal_token_baseline_fwd.default
        torch.library.opcheck(raw, (*args, None, by_token, True, 1e-8, backend_number))


@names
def test_registers_compiled(backend, name):
    torch._dynamo.reset()
    x = inputs(6, 20)
    x["labels"] = rlkern.group_index(x["labels"])
    compiled = torch.compile(lambda x: tuple(call(name, x)), fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(name, x), strict=True))
