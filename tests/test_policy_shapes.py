# SPDX-License-Identifier: Apache-2.0
"""Every variant of policy_loss: masked tokens, shapes, packed rows, identities, refusals, registration."""

import math

import pytest
import torch

import rlkern
from rlkern.policy import VARIANTS
from rlkern.reference import policy as reference
from rlkern.testing import ragged_mask

OWN = {"dro": {"dro_beta": 0.3}, "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}, "kl_cov": {"kl_cov_ratio": 0.2}}
NAMES = [*VARIANTS, "ppo sequence", "ppo sequence-sum", "cispo sequence", "sapo sequence"]


def keywords(name, lp, seed=0):
    """What a call of that variant needs, tensors like lp among them."""
    variant, _, level = name.partition(" ")
    g = torch.Generator().manual_seed(seed)
    x, noise, ref = (torch.rand(lp.shape, generator=g).to(lp.dtype) for _ in range(3))
    o = {"variant": variant, **OWN.get(variant, {}), "ref_log_prob": -ref - 1, "kl_coef": 0.1, "use_bias_correction_kl": True}
    o |= {"importance_sampling_level": level} if level else {}
    o |= {"rollout_log_prob": -x - 1} if variant == "decoupled" else {}
    o |= {"noise": noise} if variant == "clip_cov" else {}
    return o


def batch(B, T, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = -torch.rand(B, T, generator=g) * 3 - 0.05
    old, a = lp + 0.25 * torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    w = torch.rand(B, T, generator=g) + 0.5
    return *(x.to(dtype) for x in (old, lp, a)), ragged_mask(B, T, 0.2, seed), w.to(dtype)


def same(x, y, exactly=True):
    pairs = [(x.loss, y.loss), (x.d_log_prob, y.d_log_prob), (x.metrics.sums, y.metrics.sums), (x.metrics.maxes, y.metrics.maxes)]
    for a, b in pairs:
        if exactly:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_policy_variant_ignores_masked(backend, name):
    old, lp, a, m, w = batch(5, 61)
    m[2] = 0
    o = keywords(name, lp)
    clean = rlkern.policy_loss_and_grad(old, lp, a, m, rollout_is_weights=w, **o)
    assert clean.loss.isfinite()
    assert (clean.d_log_prob[m == 0] == 0).all()
    for poison in (torch.nan, torch.inf, -torch.inf)[: 1 if backend == "triton" else None]:  # interpreted

        def hide(x, poison=poison):
            return torch.where(m != 0, x, poison) if isinstance(x, torch.Tensor) else x

        weights = w if name == "vespo" else hide(w)  # vespo reads its weights everywhere, as TRL
        dirty = rlkern.policy_loss_and_grad(
            hide(old), hide(lp), hide(a), m, rollout_is_weights=weights, **{k: hide(v) for k, v in o.items()}
        )
        same(dirty, clean)


@pytest.mark.parametrize("name", NAMES)
def test_policy_variant_ignores_masked_but_shows_valid(backend, name):
    for i in range(3):
        args = list(batch(3, 40)[:3])
        args[i] = args[i].clone()
        args[i][1, 3] = torch.nan
        found = rlkern.policy_loss_and_grad(
            *args, torch.ones(3, 40), **{**keywords(name, args[1]), "kl_coef": 0.0, "use_bias_correction_kl": False}
        )
        if name.startswith(("gpg", "reinforce", "topr")) and i == 0:
            continue  # -A log_prob does not read the old one but for a metric; topr where A > 0
        assert found.loss.isnan(), name
        assert found.d_log_prob[1, 3].isnan() or name.startswith(("gpg", "reinforce", "topr", "dro")), name
        assert found.metrics.field("nonfinite").item() >= 1


@pytest.mark.parametrize("name", NAMES)
def test_policy_variant_edge_shapes(backend, name):
    for B, T in ((0, 5), (3, 0), (1, 1), (2, 17), (3, 1030)):
        old, lp, a, m, w = batch(B, T)
        o = keywords(name, lp)
        found = rlkern.policy_loss_and_grad(old, lp, a, m, rollout_is_weights=w, **o)
        assert found.loss.isfinite() or int(m.sum()) == 0
        strided = [torch.zeros(B, 2 * T + 3).narrow(1, 1, T).copy_(x) for x in (old, lp, a, m.float(), w)]
        o = {k: torch.zeros(B, 2 * T + 1).narrow(1, 1, T).copy_(v) if isinstance(v, torch.Tensor) else v for k, v in o.items()}
        got = rlkern.policy_loss_and_grad(*strided[:4], rollout_is_weights=strided[4], **o)
        same(got, found, exactly=False) if int(m.sum()) else None
    old, lp, a, m, w = batch(4, 33)
    o = keywords(name, lp)
    per_row = rlkern.policy_loss_and_grad(old, lp, a[:, 0], m, rollout_is_weights=w[:, :1], **o)
    if name != "vespo":  # a weight of the row counts once there
        spread = rlkern.policy_loss_and_grad(
            old, lp, a[:, :1].expand(4, 33).contiguous(), m, rollout_is_weights=w[:, :1].expand(4, 33), **o
        )
        same(per_row, spread, exactly=False)
    empty = rlkern.policy_loss_and_grad(old, lp, a, torch.zeros_like(m), **o)
    assert (empty.d_log_prob == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_policy_variant_edge_shapes_packed(backend, name):
    """Packed rows give what padded ones give."""
    old, lp, a, m, w = batch(4, 37)
    sizes = [37, 0, 5, 20]
    for r, n in enumerate(sizes):
        m[r, n:] = 0
    inside = torch.arange(37) < torch.tensor(sizes)[:, None]
    w = torch.where(inside, w, 1.0)
    o = keywords(name, lp) | ({"loss_agg_mode": "token-mean"} if name != "geo_mean" else {})
    cu = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    padded = rlkern.policy_loss_and_grad(old, lp, a, m, rollout_is_weights=w, **o)
    packed = {k: v[inside] if isinstance(v, torch.Tensor) else v for k, v in o.items()}
    found = rlkern.policy_loss_and_grad(
        old[inside], lp[inside], a[inside], m[inside], rollout_is_weights=w[inside], cu_seqlens=cu, **packed
    )
    same(found._replace(d_log_prob=torch.zeros(4, 37).masked_scatter(inside, found.d_log_prob)), padded, exactly=False)
    per_row = rlkern.policy_loss_and_grad(old[inside], lp[inside], a[:, 0], m[inside], cu_seqlens=cu, **packed)
    same(per_row._replace(d_log_prob=torch.zeros(4, 37).masked_scatter(inside, per_row.d_log_prob)),
         rlkern.policy_loss_and_grad(old, lp, a[:, 0], m, **o), exactly=False)  # fmt: skip


def test_policy_variant_properties(backend):
    old, lp, a, m, _ = batch(6, 50, torch.float64)
    row = a[:, :1].expand_as(lp)

    def grad(x, A=a, **o):
        return rlkern.policy_loss_and_grad(old if o.pop("off", True) else x, x, A, m, **o).d_log_prob

    # on the policy every ratio is 1: all of these are -A log_prob
    score = grad(lp, row, variant="gpg", loss_agg_mode="token-sum")
    for name in ("ppo", "gspo", "gspo_token", "luspo", "rloo", "cispo", "dppo_tv", "dppo_kl", "sapo"):
        times = m.sum(1, keepdim=True) if name == "rloo" else 1
        torch.testing.assert_close(grad(lp, row, variant=name, loss_agg_mode="token-sum", off=False), score * times)
    # one advantage a row and one weight a row: both gradients of gspo are one
    torch.testing.assert_close(grad(lp, row, variant="gspo"), grad(lp, row, variant="gspo", sequence_grad="row"))
    # a wide clip is no clip, and cispo's cap beyond every ratio is REINFORCE with importance weights
    ratio = (lp - old).exp()
    weighted = rlkern.policy_loss_and_grad(old, lp, a, m, variant="gpg", rollout_is_weights=ratio)
    torch.testing.assert_close(grad(lp, variant="cispo", ratio_cap=1e3), weighted.d_log_prob)
    # decoupled with the behaviour policy as the proximal one is ppo
    torch.testing.assert_close(grad(lp, variant="decoupled", rollout_log_prob=old), grad(lp))
    # rows in another order, and rows in two calls
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for name in NAMES[:: 4 if backend == "triton" else 1]:  # interpreted
        o = keywords(name, lp) | {"kl_coef": 0.0, "use_bias_correction_kl": False, "ref_log_prob": None}
        moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in o.items()}
        whole, other = (rlkern.policy_loss_and_grad(*(x[i] for x in (old, lp, a, m)), **k) for i, k in ((slice(None), o), (order, moved)))
        torch.testing.assert_close(whole.loss, other.loss)
        torch.testing.assert_close(whole.d_log_prob[order], other.d_log_prob)
        if "cov" not in name and name not in ("geo_mean", "luspo", "rloo"):
            o |= {"loss_agg_mode": "token-sum"}
            parts = 0.0
            for i in (slice(0, 2), slice(2, 6)):
                of = {k: v[i] if isinstance(v, torch.Tensor) else v for k, v in o.items()}
                parts = parts + rlkern.policy_loss(*(x[i] for x in (old, lp, a, m)), **of).loss
            torch.testing.assert_close(parts, rlkern.policy_loss(old, lp, a, m, **o).loss)


def test_policy_variant_properties_of_a_choice(backend):
    """clip-cov drops the share it says, by verl's generator or by noise, and kl-cov penalizes the largest."""
    old, lp, a, m, _ = batch(8, 200)
    o = {"variant": "clip_cov", "clip_cov_ratio": 0.05, "clip_cov_lb": 0.2}
    torch.manual_seed(3)
    first = rlkern.policy_loss_and_grad(old, lp, a, m, **o)
    after = torch.rand(1)
    torch.manual_seed(3)
    again = rlkern.policy_loss_and_grad(old, lp, a, m, **o)
    same(first, again)
    assert first.metrics.field("clipped").item() == int(0.05 * int(m.sum()))
    torch.manual_seed(3)  # one randperm of the candidates, as verl's
    cov = (a.double() - a[m != 0].double().mean()) * (lp.double() - lp[m != 0].double().mean())
    r = (lp - old).exp()
    able = (m != 0) & (cov > 0.2) & (cov < 5) & ~(((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0)))
    order = torch.randperm(int(able.sum()))
    assert torch.equal(torch.rand(1), after)
    dropped = able.nonzero()[order[: int(0.05 * int(m.sum()))]]
    assert (first.d_log_prob[dropped[:, 0], dropped[:, 1]] == 0).all()
    plain = rlkern.policy_loss_and_grad(old, lp, a, m, clip_ratio_c=None, log_ratio_clamp=None).d_log_prob
    assert ((plain != first.d_log_prob).sum() <= len(dropped)).item()
    noise = torch.rand(8, 200)
    by_noise = rlkern.policy_loss_and_grad(old, lp, a, m, noise=noise, **o)
    assert by_noise.metrics.field("clipped").item() == first.metrics.field("clipped").item()
    none = rlkern.policy_loss_and_grad(old, lp, a, m, variant="clip_cov", clip_cov_lb=50.0, clip_cov_ub=60.0)
    assert none.metrics.field("clipped").item() == 0


def test_policy_variant_rejects(backend):
    old, lp, a, m, _ = batch(2, 5)

    def refused(match, kind=ValueError, **o):
        with pytest.raises(kind, match=r"rlkern\.policy_loss: " + match):
            rlkern.policy_loss(old, lp, a, m, **o)

    refused("variant must be one of", variant="grpo")
    refused("dro_beta must be given", variant="dro")
    refused("dro_beta must be in", variant="dro", dro_beta=0.0)
    refused("dro_beta must be a number", variant="dro", dro_beta="1", kind=TypeError)
    refused("cliprange must be in", cliprange=-0.1)
    refused("cliprange must be left out", variant="sapo", cliprange=0.2)
    refused("clip_ratio_c must be left out", variant="cispo", clip_ratio_c=3.0)
    refused("log_ratio_clamp must be left out", variant="dro", dro_beta=0.1, log_ratio_clamp=20.0)
    refused("tau_pos must be left out", variant="ppo", tau_pos=1.0)
    refused("importance_sampling_level must be one of", variant="gpg", importance_sampling_level="sequence")
    refused("sequence_grad must be left out", sequence_grad="row")
    refused("sequence_grad must be one of", variant="gspo", sequence_grad="rows")
    refused("delta must be left out with clip_ratio_c", delta=4.0, clip_ratio_c=3.0)
    refused(r"delta must be above 1 \+ cliprange_high", delta=1.1)
    refused("rollout_log_prob must be given", variant="decoupled")
    refused("rollout_log_prob must be given", rollout_log_prob=lp)
    refused("noise must be left out", noise=lp)
    refused("noise must have the shape", variant="clip_cov", noise=lp[:, :2])
    refused("loss_agg_mode must be 'seq-mean-token-mean'", variant="geo_mean", loss_agg_mode="token-mean")
    refused("loss_agg_mode must be one of", loss_agg_mode="mean")
    refused("global_batch_size must be given", variant="luspo", dp_size=2)
    refused("use_bias_correction_kl must be False", use_bias_correction_kl=True)
    refused("use_bias_correction_kl must be False", use_bias_correction_kl=True, ref_log_prob=lp, kl_penalty="k3+")
    refused("rollout_log_prob must not require grad", variant="decoupled", rollout_log_prob=lp.clone().requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_policy_variant_registers(backend, backend_number, name):
    if backend == "triton" and name not in ("gspo", "sapo", "kl_cov", "ppo sequence"):
        pytest.skip("interpreted: one of each way through the launcher")
    old, lp, a, m, w = batch(3, 20)
    o = keywords(name, lp)

    def loss(x):
        return rlkern.policy_loss(old, x, a, m, rollout_is_weights=w, **o)

    def step(fn):
        x = lp.clone().requires_grad_()
        found = fn(x)
        return found.loss.detach(), found.metrics.sums, torch.autograd.grad(found.loss, x)[0]

    torch._dynamo.reset()  # one limit of compilations for all variants
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(p, q) for p, q in zip(step(loss), step(compiled), strict=True))


def test_policy_variant_registers_its_ops(backend, backend_number):
    old, lp, a, m, w = batch(3, 20)
    numbers = [0.2, 0.2, math.inf, math.inf, 0.5, math.inf, 0.0, 0.0], "token-mean", [1.0, math.nan, math.nan, math.nan]
    rest = "k3", [-20.0, 20.0, -10.0, 10.0], [0.0, 0.0], torch.float32, [True, False, True], backend_number
    tail = (None, None, "clip", "sequence", [True, False], *numbers, *rest)
    torch.library.opcheck(torch.ops.rlkern._policy_variant_fwd.default, (old, lp, a, None, m, w, None, None, None, None, None, *tail))
    args = (old, lp, a, None, m, None, "kl_cov", [0.1], backend_number)
    torch.library.opcheck(torch.ops.rlkern._policy_select_fwd.default, args)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_policy_variant_reference_terms_are_their_own_derivative(kind):
    """The reference's gradient by hand against autograd of its loss, off the edges."""
    x = torch.linspace(-3, 3, 607, dtype=torch.float64)
    n = {"kl_cov": [0.3], "sapo": [1.0, 1.5], "dro": [0.4], "vespo": [2.0, 3.0, 3.0, 2.0]}.get(kind, [0.5, math.inf])
    clip = [0.2, 0.3, 3.0, math.inf if kind in ("dro", "geo_mean") else 2.5, *n, 0.0, 0.0]
    for A in (-1.5, 0.0, 2.0):
        lp = (x - 4).requires_grad_()
        others = (torch.full_like(x, -4.0)[None], torch.full_like(x, A)[None], None, torch.ones(1, 607), None, None, None,
                  (x > 1)[None] if kind == "kl_cov" else None, None, None, None)  # fmt: skip
        for level, row in (("token", False), ("sequence", True), ("sequence", False)):
            if level != "token" and kind not in ("clip", "sapo", "cispo"):
                continue
            settings = (kind, level, [row, False], clip, "token-mean", [1.0, math.nan, math.nan, math.nan], "none", [0.0] * 4, [0.0, 0.0])
            loss = reference.smooth(lp[None], None, others, (*settings, torch.float64))
            (auto,) = torch.autograd.grad(loss, lp)
            tensors = (others[0], lp.detach()[None], *others[1:7], None, *others[7:])
            found = reference.policy_variant(*tensors, *settings, torch.float64, [True, False, True])
            torch.testing.assert_close(found[3][0], auto)
            torch.testing.assert_close(found[0], loss.detach())
