# SPDX-License-Identifier: Apache-2.0
"""The estimators of rlkern.advantages that work token by token: gae, reinforce_plus_plus, remax. The oracles: hand arithmetic,
verl's recorded outputs, the estimators written out step by step, and identities."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkern import advantages
from rlkern.reference import scan
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

# Names of the nine that no estimator has, and why.
NOT_HERE = {
    "grad_matches_reference": "estimators run without autograd, as in verl: test_estimators_are_detached",
    "gradcheck": "the same; the ops beneath have gradients (test_scan.py)",
}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
NAMES = ("gae", "reinforce_plus_plus", "reinforce_plus_plus_reset", "remax")
WHITENED = NAMES[:3]


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(B, T, generator=g).to(dtype) for _ in range(2))
    return {"rewards": rewards, "values": values, "mask": ragged_mask(B, T, 0.2, seed, mask_dtype), "baselines": values.sum(1)}


def call(name, x, **kw):
    r, m = x["rewards"], x["mask"]
    if name == "gae":
        return advantages.gae(r, x["values"], m, 0.97, 0.9, **kw)
    if name == "remax":
        return advantages.remax(r, x["baselines"], m, **kw)
    return advantages.reinforce_plus_plus(r, m, 0.97, masked="reset" if name.endswith("reset") else "skip", **kw)


def whitened(a, valid):
    x = a[valid]
    return (a - x.mean()) * (x.var() + 1e-8).rsqrt()


def specified(name, x, dtype):
    r, m = x["rewards"].to(dtype), x["mask"] != 0
    if name == "gae":
        a, returns = scan.gae_loop(r, x["values"].to(dtype), m, 0.97, 0.9)
        return whitened(a, m), returns
    if name == "remax":
        returns = torch.where(m, r, 0.0).flip(1).cumsum(1).flip(1)
        return returns - torch.where(m, x["baselines"].to(dtype)[:, None], 0.0), returns
    returns = scan.returns_loop(r, m, 0.97, "reset" if name.endswith("reset") else "skip")
    return torch.where(m, whitened(returns, m), 0.0), returns


def scale_of(name, x, exact):
    """The terms that a result adds up: rewards and values along the row, over the deviation that divides them."""
    rows = x["rewards"].double().abs().sum(1).max() + x["values"].double().abs().max()
    if name == "remax":
        return rows
    raw = exact[1] - (x["values"].double() if name == "gae" else 0)
    return rows / raw[x["mask"] != 0].std() + exact[0].abs().max()


def assert_specified(name, x, what):
    exact, framework = (specified(name, x, dtype) for dtype in (torch.float64, x["rewards"].dtype))
    for k, f, e in zip(call(name, x), framework, exact, strict=True):
        assert_within(k, f, e, scale_of(name, x, exact), f"{name}: {what}")


def test_known_values_by_hand(backend):
    r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
    # before whitening .5 .75 .75: mean .625, deviation sqrt(1 / 32)
    got = advantages.gae(r, v, m, 1.0, 1.0)
    torch.testing.assert_close(got.advantages, torch.tensor([[-1.0, 1.0, 1.0]]) * 0.125 * 32**0.5)
    assert got.returns.tolist() == [[1.0, 9.75, 1.0]]
    # returns 1 + .5 * 2 = 2 and 2: no spread. reset: 1, [8 + .5 * 2], 2
    r = torch.tensor([[1.0, 8.0, 2.0]])
    got = advantages.reinforce_plus_plus(r, m, 0.5)
    assert got.returns.tolist() == [[2.0, 0.0, 2.0]]
    assert got.advantages.tolist() == [[0.0, 0.0, 0.0]]
    got = advantages.reinforce_plus_plus(r, m, 0.5, masked="reset")
    assert got.returns.tolist() == [[1.0, 9.0, 2.0]]
    torch.testing.assert_close(got.advantages, torch.tensor([[-(0.5**0.5), 0.0, 0.5**0.5]]))
    got = advantages.remax(r, torch.tensor([0.25]), m)
    assert got.returns.tolist() == [[3.0, 2.0, 2.0]]
    assert got.advantages.tolist() == [[2.75, 2.0, 1.75]]


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus", "remax"])
def test_known_values_recorded(backend, name):
    inp, recorded = GOLDEN["inputs"], GOLDEN["adv_estimators(gamma=0.97,lam=0.9)"][name]
    names = {"rewards": "token_level_rewards", "values": "values", "mask": "mask", "baselines": "reward_baselines"}
    got = call(name, {k: torch.tensor(inp[v]) for k, v in names.items()})
    for field, expected in recorded.items():
        torch.testing.assert_close(getattr(got, field), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference(backend, name, dtype):
    for mask_dtype in mask_kinds():
        x = inputs(9, 83, dtype, mask_dtype)
        assert_specified(name, x, f"{dtype} {mask_dtype}")
        wide = torch.promote_types(dtype, mask_dtype) if mask_dtype.is_floating_point else dtype
        found = call(name, x)
        assert found.advantages.dtype == wide
        assert found.returns.dtype == (dtype if name.startswith("reinforce_plus_plus") else wide)


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus", "remax"])
def test_ignores_masked(backend, name):
    x = inputs(6, 40)
    clean = call(name, x)
    x["rewards"] = torch.where(x["mask"] != 0, x["rewards"], torch.nan)
    got = call(name, x)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize(("B", "T", "why"), SHAPES[:-1])
def test_edge_shapes(backend, B, T, why):
    x = inputs(B, T)
    for name in NAMES:
        for mask in (x["mask"], torch.ones_like(x["mask"])):
            y = {**x, "mask": mask}
            if mask.sum() <= 1 and name in WHITENED:
                with pytest.raises(ValueError, match="the mask must"):
                    call(name, y)
            elif B and T:
                assert_specified(name, y, why)
            else:
                assert all(k.shape == (B, T) for k in call(name, y))


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_masks_and_strides(backend, name):
    x = inputs(10, 70)
    expected = call(name, x)
    wide, transposed = torch.full((10, 99), torch.nan), x["mask"].t().contiguous().t()
    strided = {**x, "rewards": wide[:, 9:79].copy_(x["rewards"]), "mask": transposed}
    assert all(torch.equal(a, b) for a, b in zip(call(name, strided), expected, strict=True))
    x["mask"][0] = 0
    assert_specified(name, x, "a masked row")
    x["mask"].zero_()
    if name in WHITENED:
        with pytest.raises(ValueError, match="the mask must select at least one value"):
            call(name, x)


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_out(backend, name):
    x = inputs(10, 70)
    out = tuple(torch.full((10, 80), torch.nan)[:, :70] for _ in range(2))
    got = call(name, x, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, call(name, x), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_estimators_are_detached(backend, name):
    x = inputs(10, 70)
    before = {k: v.clone() for k, v in x.items()}
    expected = call(name, x)
    assert all(torch.equal(x[k], v) and x[k]._version == 0 for k, v in before.items())
    wanting = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in x.items()}
    for got, e in zip(call(name, wanting), expected, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, e)


@given(st.integers(2, 6), st.integers(10, 60), st.integers(0, 10**6))
def test_properties(B, T, seed):
    x = inputs(B, T, torch.float64, seed=seed)
    x["mask"][:, :2] = 1
    valid = x["mask"] != 0
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    padded = {k: torch.nn.functional.pad(v, (0, 7)) if v.dim() == 2 else v for k, v in x.items()}
    for name in NAMES:
        a, returns = call(name, x)
        for k, p in zip((a, returns), call(name, {k: v[order] for k, v in x.items()}), strict=True):
            torch.testing.assert_close(p, k[order], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(call(name, padded).advantages[:, :T][valid], a[valid], rtol=1e-7, atol=1e-7)
        if name in WHITENED:
            torch.testing.assert_close(a[valid].mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)
            torch.testing.assert_close(a[valid].var(), torch.ones((), dtype=torch.float64), rtol=1e-4, atol=0)
    # gamma 1 without values: ReMax with a baseline of 0
    plain = advantages.reinforce_plus_plus(x["rewards"], x["mask"], 1.0).returns
    zero = advantages.remax(x["rewards"], torch.zeros(B), x["mask"]).advantages
    torch.testing.assert_close(zero[valid], plain[valid], rtol=1e-9, atol=1e-9)


def test_rejects(backend):
    x = inputs(4, 5)
    r, v, m = x["rewards"], x["values"], x["mask"]

    def check(kind, words, name, *args, **kw):
        with pytest.raises(kind, match=rf"rlkern\.advantages\.{name}: {words}"):
            getattr(advantages, name)(*args, **kw)

    check(ValueError, "gamma must be in", "gae", r, v, m, -1.0, 0.9)
    check(TypeError, "lam must be a number", "gae", r, v, m, 1.0, torch.ones(4))
    check(ValueError, r"values must have the shape \(4, 5\)", "gae", r, v[:, :4], m, 1.0, 0.9)
    check(ValueError, r"token_level_rewards must be \(B, T\)", "gae", r[0], v[0], m[0], 1.0, 0.9)
    check(ValueError, "out must hold 2", "gae", r, v, m, 1.0, 0.9, out=(torch.empty(4, 5),))
    check(ValueError, "masked must be one of 'skip', 'reset'", "reinforce_plus_plus", r, m, 1.0, masked="zero")
    check(TypeError, "response_mask must be bool", "reinforce_plus_plus", r, m.short(), 1.0)
    for baselines in (torch.ones(5), torch.ones(4, 1)):  # verl makes (B, B, T) of the second
        check(ValueError, r"reward_baselines must have the shape \(4,\)", "remax", r, baselines, m)
    check(TypeError, "reward_baselines must be a floating-point tensor", "remax", r, [1.0] * 4, m)
    one = torch.zeros_like(m)
    for words in ("select at least one value; got a mask whose sum is 0", "have a sum other than 1; got a mask whose sum is 1"):
        for name in WHITENED:
            with pytest.raises(ValueError, match="the mask must " + words):
                call(name, {**x, "mask": one})
        one[2, 3] = 1


@pytest.mark.parametrize("name", NAMES)
def test_registers_compiled(backend, name):
    """The raw ops beneath are those of test_scan.py and test_discounted_returns.py; here with whitening."""
    torch._dynamo.reset()
    x = inputs(6, 20)
    compiled = torch.compile(lambda x: call(name, x), fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(name, x), strict=True))
