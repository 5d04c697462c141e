# SPDX-License-Identifier: Apache-2.0
"""shape_rewards: per-token and per-row rewards, placement, clipping, masked positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask


def framework(rewards, old, ref, mask, coef=0.1, clip=None):
    """verl's apply_kl_penalty (B, T), OpenRLHF's compute_reward (B,), with k1."""
    kl = (old - ref) * (mask != 0)
    if rewards.dim() == 2:
        return rewards - coef * kl
    if mask.shape[1] == 0:
        return -coef * kl
    last = torch.where(mask != 0, torch.arange(mask.shape[1]), -1).amax(1, keepdim=True)
    last = torch.where(last < 0, mask.shape[1] - 1, last)
    scores = rewards if clip is None else rewards.clamp(*clip)
    return -coef * kl + torch.zeros_like(kl).scatter(1, last, scores[:, None].to(kl.dtype))


def inputs(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=g) - 2
    tensors = (torch.randn(B, T, generator=g), old, old + 0.3 * torch.randn(B, T, generator=g))
    return *(x.to(dtype) for x in tensors), ragged_mask(B, T, 0.2, seed)


def test_shape_rewards_known_values(backend):
    old, ref = torch.tensor([[-1.0, -1.0, 0.0], [-2.0, -2.0, -2.0]]), torch.tensor([[-1.5, -1.0, 0.0], [-2.0, -3.0, -2.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    got = rlkern.shape_rewards(torch.tensor([20.0, 3.0]), old, ref, mask, kl_coef=0.1, reward_clip=(-10.0, 10.0))
    torch.testing.assert_close(got, torch.tensor([[-0.05, 10.0, 0.0], [0.0, 0.0, 3.0]]))
    rewards = torch.tensor([[0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])  # 5 sits on a masked tool token
    got = rlkern.shape_rewards(rewards, old, ref, mask, kl_coef=2.0)
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0, 5.0], [1.0, 2.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", mask_kinds())
def test_shape_rewards_matches_reference(backend, dtype, mask_dtype):
    rewards, old, ref, mask = inputs(9, 83, dtype)
    mask = mask.to(mask_dtype)
    for r in (rewards, rewards[:, 0]):
        got = rlkern.shape_rewards(r, old, ref, mask, kl_coef=0.1)
        assert got.dtype == (torch.promote_types(dtype, mask_dtype) if mask_dtype.is_floating_point else dtype)
        exact = framework(r.double(), old.double(), ref.double(), mask)
        assert_within(got, framework(r, old, ref, mask), exact, exact.abs() + 1, f"{dtype} {mask_dtype}")


def test_shape_rewards_grad_matches_reference(backend):
    rewards, old, ref, mask = inputs(9, 83)
    for r, clip in ((rewards, None), (rewards[:, 0] * 3, (-1.0, 1.0))):
        x = r.clone().requires_grad_()
        ours = rlkern.shape_rewards(x, old, ref, mask, kl_coef=0.1, reward_clip=clip)
        theirs = framework(x, old, ref, mask, clip=clip)
        assert torch.equal(*(torch.autograd.grad(y, x, old)[0] for y in (ours, theirs)))


def test_shape_rewards_gradcheck(backend):
    rewards, old, ref, mask = inputs(3, 9, torch.float64)
    for r in (rewards, rewards[:, 0]):
        x = r.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rlkern.shape_rewards(x, old, ref, mask, kl_coef=0.1, kl_penalty="k3"), (x,))
        assert torch.autograd.gradgradcheck(lambda x: rlkern.shape_rewards(x, old, ref, mask, kl_coef=0.1), (x,))


def test_shape_rewards_ignores_masked(backend):
    rewards, old, ref, mask = inputs(9, 83)
    for name in ("kl", "abs", "k2", "k3", "k3+"):
        clean = rlkern.shape_rewards(rewards[:, 0], old, ref, mask, kl_coef=0.1, kl_penalty=name)
        dirty = [torch.where(mask != 0, x, torch.nan) for x in (old, ref)]
        assert torch.equal(clean, rlkern.shape_rewards(rewards[:, 0], *dirty, mask, kl_coef=0.1, kl_penalty=name))
    rewards[0] = torch.nan  # read everywhere
    assert rlkern.shape_rewards(rewards, old, ref, mask, kl_coef=0.1)[0].isnan().all()


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_shape_rewards_edge_shapes(backend, B, T, why):
    rewards, old, ref, mask = inputs(B, T)
    per_row = torch.randn(B)
    for m in (mask, mask * 0, mask * 0 + 1):
        wide = torch.full((B, T + 3), torch.nan)
        strided = wide[:, 1 : T + 1]
        strided.copy_(old)
        for r in (rewards, per_row):
            out = torch.empty(B, T)
            assert rlkern.shape_rewards(r, strided, ref, m, kl_coef=0.1, out=out) is out
            torch.testing.assert_close(out, framework(r, old, ref, m), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_shape_rewards_properties(B, T, seed):
    rewards, old, ref, mask = inputs(B, T, torch.float64, seed)
    scores = rewards[:, 0]
    shaped = rlkern.shape_rewards(scores, old, ref, mask, kl_coef=0.5)
    kl = rlkern.kl_penalty(old, ref) * mask
    torch.testing.assert_close(shaped.sum(1), scores - 0.5 * kl.sum(1))
    torch.testing.assert_close(rlkern.shape_rewards(rewards, old, ref, mask, kl_coef=0.0), rewards, rtol=0, atol=0)


def test_shape_rewards_rejects(backend):
    rewards, old, ref, mask = inputs(2, 3)
    with pytest.raises(ValueError, match=r"rlkern\.shape_rewards: old_log_prob must not require grad"):
        rlkern.shape_rewards(rewards, old.clone().requires_grad_(), ref, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"rlkern\.shape_rewards: rewards must have the shape \(2,\)"):
        rlkern.shape_rewards(torch.ones(3), old, ref, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"rlkern\.shape_rewards: reward_clip must be \(low, high\), with rewards"):
        rlkern.shape_rewards(rewards, old, ref, mask, kl_coef=0.1, reward_clip=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"rlkern\.shape_rewards: reward_clip must be"):
        rlkern.shape_rewards(rewards[:, 0], old, ref, mask, kl_coef=0.1, reward_clip=(1.0, 0.0))
    with pytest.raises(TypeError, match=r"rlkern\.shape_rewards: kl_coef must be a number"):
        rlkern.shape_rewards(rewards, old, ref, mask, kl_coef="0.1")
    with pytest.raises(ValueError, match=r"rlkern\.shape_rewards: old_log_prob must be \(B, T\)"):
        rlkern.shape_rewards(rewards[0], old[0], ref[0], mask[0], kl_coef=0.1)


def test_shape_rewards_registers(backend_number):
    rewards, old, ref, mask = inputs(3, 20)
    rest = (old, ref, mask, None, 0.1, "k3", [-20.0, 20.0, -10.0, 10.0], [-1.0, 1.0], backend_number)
    torch.library.opcheck(torch.ops.rlkern._shape_rewards_fwd.default, (rewards, None, *rest))
    torch.library.opcheck(torch.ops.rlkern._shape_rewards_fwd.default, (None, rewards[:, 0], *rest))
    torch.library.opcheck(torch.ops.rlkern._shape_rewards_bwd.default, (old, rewards[:, 0], mask, None, [-1.0, 1.0], backend_number))

    def step(x):
        return rlkern.shape_rewards(x, old, ref, mask, kl_coef=0.1).square().sum()

    for r in (rewards, rewards[:, 0]):
        found = []
        for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            x = r.clone().requires_grad_()
            found.append(torch.autograd.grad(fn(x), x)[0])
        assert torch.equal(*found)


def test_shape_rewards_edge_shapes_packed(backend):
    lengths = [5, 0, 33, 1, 40]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    rewards, old, ref, mask = (x[0] for x in inputs(1, sum(lengths)))
    mask = mask.clone()
    mask[38:39] = 0  # a row without a valid token
    scores = torch.linspace(-2, 2, 5)
    for awarded in (rewards, scores.requires_grad_()):
        got = rlkern.shape_rewards(
            awarded, old, ref, mask, kl_coef=0.1, reward_clip=(-1.5, 9.0) if awarded is scores else None, cu_seqlens=cu
        )
        for i, n in enumerate(lengths):
            row = slice(int(cu[i]), int(cu[i]) + n)
            if n == 0:
                continue
            one = awarded[i : i + 1] if awarded is scores else awarded[None, row]
            clip = (-1.5, 9.0) if awarded is scores else None
            alone = rlkern.shape_rewards(one, old[None, row], ref[None, row], mask[None, row], kl_coef=0.1, reward_clip=clip)
            assert torch.equal(got[row], alone[0])
    (d,) = torch.autograd.grad((got * torch.arange(79.0)).sum(), scores)
    assert d[0] == 0  # the clip moved it
    assert d[1] == 0  # no token
    assert d[3] == 38


def test_shape_rewards_edge_shapes_mask_of_a_row(backend):
    """One value a row, expanded: the score lies on the last token, and its gradient there."""
    mask, log_prob = torch.tensor([[1], [0], [1]]).expand(3, 5), torch.zeros(3, 5)
    scores = torch.tensor([1.0, 2.0, 3.0]).requires_grad_()
    found = rlkern.shape_rewards(scores, log_prob, log_prob, mask, kl_coef=0.0)
    assert torch.equal(found.detach()[:, -1], scores.detach())
    assert torch.equal(torch.autograd.grad(found[:, -1].sum(), scores)[0], torch.ones(3))
