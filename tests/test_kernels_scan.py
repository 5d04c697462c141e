# SPDX-License-Identifier: Apache-2.0
"""The Triton scans at shapes that the family tests do not reach: past one block, at its edges, and rows cut into parts. Run by
`pytest --backend triton`."""

import os

import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.reference import scan as reference
from rlkern.testing import assert_within, ragged_mask

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs interpreted: pytest --backend triton")

BLOCK = 1024
SHAPES = [
    (2, BLOCK, "exactly one block"),
    (2, BLOCK + 1, "one token past it"),
    (1, 2 * BLOCK + 16, "aligned, the last block partial"),
    (2, 7 * BLOCK, "the longest row that is not cut, in whole blocks"),
    (2, 8 * BLOCK - 16, "cut into parts, aligned, the last partial"),
]
RULES = ("skip", "reset", "zero", "turn", None)


def tokens(B, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=g)
    mask = ragged_mask(B, T, 0.2, seed)
    if B > 1:
        mask[-1, T // 3 :] = 0  # whole parts without a valid token
    return rewards, values, mask


def in_loop(fn, *tensors):
    """By the loop in the framework's precision and in float64."""
    return fn(*tensors), fn(*(x.double() if x.is_floating_point() else x for x in tensors))


def assert_near(kernel, found, scale, what):
    framework, exact = found
    for k, f, e in zip(kernel, framework, exact, strict=True):
        assert_within(k, f, e, scale, what)


def test_kernels_scan_cut(backend):
    """Which shapes are cut: few long rows, by B and T alone."""
    from rlkern.kernels import chunks, launch

    def parts(B, T):
        x = torch.empty(1).expand(B, T)
        return chunks.parts_of(launch.rows((x,)), None)

    assert parts(8, 7 * BLOCK) == (1, 7 * BLOCK)
    assert parts(8, 7 * BLOCK + 1) == (8, BLOCK)
    assert parts(65, 131072) == (1, 131072)
    assert parts(64, 131072) == (8, 16 * BLOCK)
    assert parts(1, 131072) == (128, BLOCK)
    assert parts(3, 10**6) == (123, 8 * BLOCK)
    assert parts(0, 5) == (1, BLOCK)
    assert parts(3, 0) == (1, BLOCK)


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_kernels_scan_gae(backend, B, T, why):
    rewards, values, mask = tokens(B, T)
    bootstrap, lam = torch.linspace(-1, 1, B), torch.linspace(0.9, 0.99, B)
    for masked in ("skip", "zero", None):

        def loop(r, v, bootstrap, lam, masked=masked):
            seen = mask != 0 if masked == "zero" else torch.ones_like(mask, dtype=torch.bool)
            r, v = (torch.where(seen, x, 0.0) for x in (r, v))
            return reference.gae_loop(r, v, mask if masked == "skip" else torch.ones_like(mask), 0.99, lam, bootstrap)

        found = in_loop(loop, rewards, values, bootstrap, lam)
        got = rlkern.gae(rewards, values, mask, gamma=0.99, lam=lam, masked=masked, bootstrap=bootstrap)
        assert_near(got, found, found[1][0].abs().max() + 4, f"{why} {masked}")


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_kernels_scan_returns(backend, B, T, why):
    rewards, _, mask = tokens(B, T)
    bootstrap = torch.linspace(-1, 1, B)
    for masked in RULES:

        def loop(r, bootstrap, masked=masked):
            m = mask if masked else torch.ones_like(mask)
            return (reference.returns_loop(r, m, 0.99, masked, bootstrap),)

        found = in_loop(loop, rewards, bootstrap)
        got = rlkern.discounted_returns(rewards, mask, gamma=0.99, masked=masked, bootstrap=bootstrap)
        assert_near((got,), found, found[1][0].abs().max() + 4, f"{why} {masked}")


def grads(op, inputs, G):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(sum((x * g.to(x.dtype)).sum() for x, g in zip(outputs, G, strict=False)), inputs)


@pytest.mark.parametrize(("B", "T", "why"), [SHAPES[1], SHAPES[4]])
def test_kernels_scan_grads(backend, B, T, why):
    """Against the reference's own adjoints, in float32 and float64."""
    rewards, values, mask = tokens(B, T)
    bootstrap, G = torch.linspace(-1, 1, B), torch.randn(2, B, T, generator=torch.Generator().manual_seed(1))
    decay = torch.rand(B, T, generator=torch.Generator().manual_seed(2)).sqrt()
    cases = [
        (
            f"gae {rule}",
            (rewards, values, bootstrap),
            lambda r, v, b, rule=rule: rlkern.gae(r, v, mask, gamma=0.99, lam=0.95, masked=rule, bootstrap=b),
        )
        for rule in ("skip", "zero", None)
    ]
    cases += [
        (
            f"returns {rule}",
            (rewards, bootstrap),
            lambda r, b, rule=rule: rlkern.discounted_returns(r, mask, gamma=0.99, masked=rule, bootstrap=b),
        )
        for rule in RULES
    ]
    for reverse in (True, False):
        for d in (decay, decay[:, 0]):
            cases.append(
                (
                    f"affine {reverse} {d.dim()}",
                    (d, values, bootstrap),
                    lambda d, x, b, reverse=reverse: rlkern.affine_scan(d, x, reverse=reverse, initial=b),
                )
            )
    for name, inputs, op in cases:
        got = grads(op, inputs, G)
        with rlkern.use_backend("torch"):
            framework, exact = grads(op, inputs, G), grads(op, [x.double() for x in inputs], G)
        for k, f, e in zip(got, framework, exact, strict=True):
            assert_within(k, f, e, e.abs().max() + 40, f"{why} {name}")


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
@pytest.mark.parametrize("reverse", [True, False])
def test_kernels_scan_affine(backend, B, T, why, reverse):
    x, _, _ = tokens(B, T)
    decay, initial = torch.rand(B, T, generator=torch.Generator().manual_seed(3)).sqrt(), torch.linspace(-1, 1, B)
    for d in (decay, decay[:, 0]):

        def loop(d, x, initial):
            d, y, out = (d if d.dim() == 2 else d[:, None].expand_as(x)), initial, []
            steps = range(T)
            for t in reversed(steps) if reverse else steps:
                y = x[:, t] + d[:, t] * y
                out.append(y)
            return (torch.stack(out[::-1] if reverse else out, 1),)

        found = in_loop(loop, d, x, initial)
        got = rlkern.affine_scan(d, x, reverse=reverse, initial=initial)
        assert_near((got,), found, found[1][0].abs().max() + 4, why)


def test_kernels_scan_decay_near_one(backend):
    """Powers by squaring alone would be over the budget here, ten times."""
    x = torch.randn(2, 5 * BLOCK, generator=torch.Generator().manual_seed(0)).abs()
    for decay in (0.999, 0.9999):
        found = in_loop(lambda x, d=decay: (reference.returns_loop(x, torch.ones_like(x), float(torch.tensor(d)), "zero"),), x)
        got = rlkern.discounted_returns(x, gamma=float(torch.tensor(decay)), masked=None)
        assert_near((got,), found, found[1][0].abs(), f"decay {decay}")


@pytest.mark.parametrize("T", [3 * BLOCK, 8 * BLOCK - 16])
def test_kernels_scan_nan(backend, T):
    """A NaN that is read shows in every token to its left, however far, or up to the cut; one that is not read nowhere."""
    rewards, values, _ = tokens(2, T)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, 500] = False
    rewards[1, T - 5] = torch.nan
    clean = rlkern.gae(torch.nan_to_num(rewards), values, mask, gamma=0.9, lam=0.5)
    got = rlkern.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert got.advantages[1, : T - 4].isnan().all()
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g[0], c[0])
        assert torch.equal(g[1, T - 4 :], c[1, T - 4 :])
    got = rlkern.discounted_returns(rewards, mask, gamma=0.5, masked="reset")
    assert got[1, 500 : T - 4].isnan().all()
    assert got[1, :500].isfinite().all()
    decay = torch.full((2, T), 0.5)
    decay[1, 500] = 0.0  # starts anew
    y = rlkern.affine_scan(decay, rewards)
    assert y[1, 501 : T - 4].isnan().all()
    assert y[1, :501].isfinite().all()
    rewards[1, T - 5] = 1.0
    rewards[1, 500] = values[1, 500] = torch.nan  # masked
    got = rlkern.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert got.advantages.isfinite().all()
    assert got.returns.isfinite().sum() == 2 * T - 1


@pytest.mark.parametrize(("B", "T"), [(3, BLOCK + 7), (2, 8 * BLOCK - 16), (260, 2)])
def test_kernels_scan_whitened(backend, B, T):
    """Moments of several blocks, of parts, and of more programs than merge at once (256); values far from 0."""
    rewards, values, mask = tokens(B, T)
    found = in_loop(lambda r, v: reference.gae_loop(r, v, mask, 0.99, 0.95), rewards + 3, values)
    got = advantages.gae(rewards + 3, values, mask, 0.99, 0.95)
    valid = mask != 0
    raw, exact = found[0][0], found[1][0]

    def whitened(a):
        x = a[valid]
        return (a - x.mean()) * (x.var() + 1e-8).rsqrt()

    assert_within(got.advantages, whitened(raw), whitened(exact), exact.abs().max() / exact[valid].std(), "whitened")
    returns = advantages.reinforce_plus_plus(rewards + 3, mask, 0.99)
    exact = reference.returns_loop((rewards + 3).double(), mask, 0.99, "skip")
    raw = reference.returns_loop(rewards + 3, mask, 0.99, "skip")
    assert_within(returns.advantages, whitened(raw) * mask, whitened(exact) * mask, exact.abs().max() / exact[valid].std(), "masked")


def test_kernels_scan_same_bits(backend):
    """Run to run, and whatever lies around a row."""
    rewards, values, mask = tokens(2, 8 * BLOCK - 16)
    wide = [torch.full((2, 9 * BLOCK), torch.nan)[:, 16 : 8 * BLOCK].copy_(x) for x in (rewards, values, mask)]
    for op in (rlkern.gae, lambda r, v, m, gamma, lam: advantages.gae(r, v, m, gamma, lam)):
        first, again, there = (op(r, v, m, gamma=0.99, lam=0.95) for r, v, m in ((rewards, values, mask), (rewards, values, mask), wide))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, there, strict=True))
