# SPDX-License-Identifier: Apache-2.0
"""gae and discounted_returns on rows of many thousands of tokens: past one tile of a GPU's block, and cut into chunks where rows
are few. The oracles: the step-by-step loop in float64, and the reference's own adjoints."""

import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.reference import scan as reference
from rlkern.testing import assert_within, ragged_mask

RULES = ("skip", "reset", "zero", "turn", None)
SHAPES = [
    (2, 2049, torch.float32, "a chunk, and one token of the next"),
    (1, 4100, torch.float32, "chunks, the last one ragged"),
    (2, 4099, torch.bfloat16, "chunks of two bytes a token"),
    (1, 1027, torch.float64, "chunks of eight"),
    (7, 1200, torch.float32, "more rows than are cut, past one tile"),
]
shapes = pytest.mark.parametrize(("B", "T", "dtype", "why"), SHAPES)


def tokens(B, T, dtype=torch.float32, seed=0):
    """Whole chunks without a valid token, and runs of valid ones."""
    g = torch.Generator().manual_seed(seed)
    rewards, values, G, H = torch.randn(4, B, T, generator=g).to(dtype)
    mask = ragged_mask(B, T, 0.02, seed)
    mask[-1] = torch.arange(T) > 5 * T // 6
    mask[0, T // 2 :] = 1
    return rewards, values, mask, G, H


def check(got, op, what, *tensors):
    """`op` in the framework's precision and in float64 gives the budget; a result sums hundreds of terms of either sign."""
    framework, exact = op(*tensors), op(*(x.double() for x in tensors))
    for k, f, e in zip(got, framework, exact, strict=True):
        assert_within(k, f, e, 10 * exact[0].abs().max() + 4, what)


@shapes
def test_long_gae(backend, B, T, dtype, why):
    rewards, values, mask, *_ = tokens(B, T, dtype)
    bootstrap, lam = torch.linspace(-1, 1, B).to(dtype), torch.linspace(0.9, 1, B)
    for masked in ("skip", "zero", None):

        def loop(r, v, b, masked=masked):
            seen = mask != 0 if masked == "zero" else torch.ones_like(mask, dtype=torch.bool)
            r, v = (torch.where(seen, x, 0.0) for x in (r, v))
            return reference.gae_loop(r, v, mask if masked == "skip" else torch.ones_like(mask), 0.999, lam.to(r.dtype), b)

        got = rlkern.gae(rewards, values, mask, gamma=0.999, lam=lam, masked=masked, bootstrap=bootstrap)
        check(got, loop, f"{why} {masked}", rewards, values, bootstrap)


@shapes
def test_long_returns(backend, B, T, dtype, why):
    rewards, _, mask, *_ = tokens(B, T, dtype)
    bootstrap = torch.linspace(-1, 1, B).to(dtype)
    for masked in RULES:

        def loop(r, b, masked=masked):
            return (reference.returns_loop(r, mask if masked else torch.ones_like(mask), 0.999, masked, b),)

        got = rlkern.discounted_returns(rewards, mask, gamma=0.999, masked=masked, bootstrap=bootstrap)
        check((got,), loop, f"{why} {masked}", rewards, bootstrap)


@pytest.mark.parametrize(("B", "T", "dtype", "why"), [SHAPES[0], SHAPES[3], SHAPES[4]])
def test_long_grads(backend, B, T, dtype, why):
    rewards, values, mask, G, H = tokens(B, T, dtype)
    flags, gamma, lam = [True] * 3, 0.99, 0.97
    for masked in ("skip", "zero", None):
        r, v, b = (x.clone().requires_grad_() for x in (rewards, values, values[:, 0]))
        out = rlkern.gae(r, v, mask, gamma=gamma, lam=lam, masked=masked, bootstrap=b)
        got = torch.autograd.grad((out.advantages * G + out.returns * H).sum(), (r, v, b))

        def adjoint(g, h, masked=masked):
            return reference.gae_bwd(g, h, mask if masked else None, None, None, masked or "none", gamma, lam, flags)

        check(got, adjoint, f"gae {why} {masked}", G, H)
    for masked in RULES:
        r, b = (x.clone().requires_grad_() for x in (rewards, values[:, 0]))
        out = rlkern.discounted_returns(r, mask, gamma=gamma, masked=masked, bootstrap=b)
        got = torch.autograd.grad((out * G).sum(), (r, b))

        def adjoint(g, masked=masked):
            return reference.discounted_returns_bwd(g, mask if masked else None, None, masked or "none", gamma, flags[:2])

        check(got, adjoint, f"returns {why} {masked}", G)


def test_long_infinite_reward(backend):
    """It reaches what lies before it in its row, however far, and nothing else; a NaN behind a cut reaches nothing."""
    if backend == "torch":
        pytest.skip("a product of its log steps underflows, and 0 lets nothing pass")
    rewards, values, mask, *_ = tokens(2, 4100)
    ones, clean = torch.ones_like(mask), rlkern.gae(rewards, values, gamma=0.5, lam=0.5)
    rewards[0, 4000] = torch.inf
    got = rlkern.gae(rewards, values, ones, gamma=0.5, lam=0.5)
    assert (got.advantages[0, :4001] == torch.inf).all()
    assert torch.equal(got.advantages[0, 4001:], clean.advantages[0, 4001:])
    assert torch.equal(got.advantages[1], clean.advantages[1])
    assert (rlkern.discounted_returns(rewards, gamma=0.5, masked=None)[0, :4001] == torch.inf).all()
    rewards[0, 4000], ones[0, 3000] = torch.nan, 0
    got = rlkern.discounted_returns(rewards, ones, gamma=0.9, masked="reset")
    assert got[0, 3000:4001].isnan().all()
    assert got[0, :3000].isfinite().all()
    if backend == "triton":
        return  # a block's product of decays above 1 overflows: docs/numerics.md
    rewards, values = torch.zeros(1, 4100), torch.zeros(1, 4100)  # a decay above 1 over zeros
    assert (rlkern.gae(rewards, values, gamma=2.0, lam=1.0).advantages == 0).all()


def test_long_packed(backend):
    """To the bit what the same rows give padded; and the same bits at every call."""
    lengths = [4100, 3, 0, 4099]
    cu, here = torch.tensor([0, 4100, 4103, 4103, 8202]), torch.arange(4100) < torch.tensor(lengths)[:, None]
    rewards, values, mask, *_ = tokens(4, 4100)
    r, v, m = rewards[here], values[here], mask[here]
    padded = [torch.where(here, x, 0) for x in (rewards, values, mask)]
    for got, expected in (
        (rlkern.gae(r, v, m, gamma=0.99, lam=0.95, cu_seqlens=cu), rlkern.gae(*padded, gamma=0.99, lam=0.95)),
        (rlkern.gae(r, v, m, gamma=0.99, lam=0.95, cu_seqlens=cu), rlkern.gae(r, v, m, gamma=0.99, lam=0.95, cu_seqlens=cu)),
    ):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b if a.shape == b.shape else b[here])


@pytest.mark.parametrize(("B", "T", "dtype", "why"), [SHAPES[1], SHAPES[2], SHAPES[4]])
def test_long_whitened(backend, B, T, dtype, why):
    """What the chip keeps, and what it writes and reads again; whitened and the returns beside them."""
    rewards, values, mask, *_ = tokens(B, T, dtype)
    valid = mask != 0
    got = advantages.gae(rewards, values, mask, 0.99, 0.95)
    raw = rlkern.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    again = advantages.gae(rewards, values, mask, 0.99, 0.95)
    x = raw.advantages.double()
    wanted = (x - x[valid].mean()) * (x[valid].var() + 1e-8).rsqrt()
    torch.testing.assert_close(
        got.advantages.double(), wanted, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-5 if dtype == torch.float32 else 3e-2
    )
    assert torch.equal(got.returns, raw.returns)
    assert torch.equal(got.advantages, again.advantages)
    got = advantages.reinforce_plus_plus(rewards, mask, 0.99)
    x = rlkern.discounted_returns(rewards, mask, gamma=0.99)
    assert torch.equal(got.returns, x)
    assert (got.advantages[~valid] == 0).all()
    assert abs(float(got.advantages[valid].double().mean())) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert abs(float(got.advantages[valid].double().var()) - 1) < (1e-4 if dtype == torch.float32 else 3e-2)
