# SPDX-License-Identifier: Apache-2.0
"""The estimators of OpenRLHF, TRL, NeMo-RL and ROLL. The oracles: hand arithmetic, each framework's steps written out in plain
torch, and laws."""

import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.advantages import ESTIMATORS, nemo, openrlhf, roll, trl
from rlkern.reference import others
from rlkern.testing import assert_within, error

# Names of the nine that no estimator has: test_outcome_advantages.py says why. The ops beneath have them all.
nan = float("nan")
GROUPED = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
ORL = ("reinforce", "gae", "flash_reinforce", *GROUPED)


def batch(n=3, groups=4, T=23, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    B = n * groups
    mask = (torch.rand(B, T, generator=g) < 0.7).long()
    mask[1], mask[:, 5] = 0, 1
    x = {"rewards": 3 * torch.randn(B, generator=g), "kl": torch.randn(B, T, generator=g), "values": torch.randn(B, T, generator=g)}
    return {k: v.to(dtype) for k, v in x.items()} | {"mask": mask, "n": n}


# ---- OpenRLHF -------------------------------------------------------------------------------------------------------
def call(name, x, **kw):
    options = {"kl": x["kl"], "kl_coef": 0.1, "reward_clip_range": (-2.0, 2.5)} | kw
    if name == "gae":
        return openrlhf.gae(x["rewards"], x["values"], x["mask"], 0.97, 0.9, **options)
    if name == "reinforce":
        return openrlhf.reinforce(x["rewards"], x["mask"], 0.97, **options)
    if name in GROUPED and "index" not in options:
        options.setdefault("n_samples_per_prompt", x["n"])
    return getattr(openrlhf, name)(x["rewards"], x["mask"], **options)


def specified(name, x, dtype, no_std_norm=False):
    """OpenRLHF's steps, token by token."""
    r, kl, v, m = (x[k].to(dtype) for k in ("rewards", "kl", "values", "mask"))
    rows = r.reshape(-1, x["n"])
    if name == "rloo":
        rows = rows - (rows.sum(1, keepdim=True) - rows) / (x["n"] - 1)
    elif name in ("reinforce_baseline", "dr_grpo"):
        rows = rows - rows.mean(1, keepdim=True)
    elif name == "group_norm":
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-9)
    elif name == "flash_reinforce":
        rows = rows - rows.mean()
    r = rows.reshape(-1).clamp(-2.0, 2.5)
    token = -0.1 * kl
    for b in range(len(r)):
        if m[b].any():
            token[b, int(torch.nonzero(m[b])[-1])] += r[b]
    token, v = token * m, v * m
    B, T = m.shape
    advantages, returns = torch.zeros(2, B, T, dtype=dtype).unbind(0)
    trace, following = torch.zeros(B, dtype=dtype), torch.zeros(B, dtype=dtype)
    gamma = {"gae": 0.97, "reinforce": 0.97}.get(name, 1.0)
    for t in reversed(range(T)):
        if name == "gae":
            trace = token[:, t] + gamma * following - v[:, t] + gamma * 0.9 * trace
            advantages[:, t], returns[:, t], following = trace, trace + v[:, t], v[:, t]
        else:
            trace = token[:, t] + gamma * trace
            advantages[:, t] = returns[:, t] = trace
    if name in ("gae", "reinforce", "reinforce_baseline"):
        mean = (advantages * m).sum() / m.sum()
        var = ((advantages - mean).square() * m).sum() / m.sum()
        advantages = (advantages - mean) * (1.0 if no_std_norm else var.clamp(min=1e-8).rsqrt())
    return advantages, returns


def test_openrlhf_known_values(backend):
    r, m = torch.tensor([3.0, 1.0]), torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    kl = torch.tensor([[9.0, 1.0, 9.0, 2.0], [1.0, 1.0, 9.0, 9.0]])
    got = openrlhf.dr_grpo(r, m, n_samples_per_prompt=2, kl=kl, kl_coef=0.5)
    expected = torch.tensor([[-0.5, -0.5, 0.0, 0.0], [-2.0, -1.5, 0.0, 0.0]])
    torch.testing.assert_close(got.advantages, expected)
    assert got.advantages is not got.returns
    assert torch.equal(*got)
    # clipped after shaping: 12 - 0 is 12, not 10 - 0
    got = openrlhf.rloo(torch.tensor([12.0, 0.0]), m, ["a", "a"], reward_clip_range=(-10.0, 11.0)).returns
    torch.testing.assert_close(got[:, 1], torch.tensor([11.0, -10.0]))
    white = openrlhf.reinforce(r, m)  # 3 3, 1 1: mean 2, population deviation 1
    torch.testing.assert_close(white.advantages, torch.tensor([[1.0] * 4, [-1.0, -1.0, -2.0, -2.0]]))
    torch.testing.assert_close(openrlhf.reinforce(r, m, 0.5, no_std_norm=True).returns[0], torch.tensor([0.375, 0.75, 1.5, 3.0]))


@pytest.mark.parametrize("name", ORL)
def test_openrlhf_matches_reference(backend, name):
    for dtype in (torch.float32, torch.float64):
        x = batch(dtype=dtype)
        for no_std_norm in (False, True):
            options = {"no_std_norm": no_std_norm} if name in ("gae", "reinforce", "reinforce_baseline") else {}
            framework, exact = specified(name, x, dtype, no_std_norm), specified(name, x, torch.float64, no_std_norm)
            for a, b, c in zip(call(name, x, **options), framework, exact, strict=True):
                assert a.dtype == dtype
                terms = (0.1 * x["kl"].abs() + x["values"].abs()).sum(1).max() + x["rewards"].abs().max()
                assert_within(a, b, c, terms * (1 + c.abs().max()), f"{name} {dtype}")


@pytest.mark.parametrize("name", ORL)
def test_openrlhf_ignores_masked(backend, name):
    x = batch()
    clean = call(name, x)
    dirty = {**x, **{k: torch.where(x["mask"] != 0, x[k], nan) for k in ("kl", "values")}}
    got = call(name, dirty)
    valid = x["mask"] != 0
    assert torch.equal(got.advantages, clean.advantages)
    assert torch.equal(got.returns[valid], clean.returns[valid])


@pytest.mark.parametrize("name", ORL)
def test_openrlhf_edge_shapes(backend, name):
    x = batch()
    inside = torch.arange(23) < (3 + torch.arange(12))[:, None]
    x["mask"] = x["mask"] * inside
    expected = call(name, x)
    cu = torch.tensor([0, *inside.sum(1).cumsum(0).tolist()])
    packed = {**x, **{k: x[k][inside] for k in ("kl", "values", "mask")}}
    for a, b in zip(call(name, packed, cu_seqlens=cu), expected, strict=True):
        torch.testing.assert_close(a, b[inside], rtol=1e-5, atol=1e-5)
    if name in GROUPED:
        labels = [str(i // 3) for i in range(12)]
        for a, b in zip(call(name, x, index=labels), expected, strict=True):
            assert torch.equal(a, b)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        got = call(name, moved, index=[labels[i] for i in order])
        torch.testing.assert_close(got.advantages, expected.advantages[order], rtol=1e-5, atol=1e-6)
    without = call(name, x, kl=None, kl_coef=0.0)
    assert error(without.advantages, call(name, {**x, "kl": torch.zeros_like(x["kl"])}).advantages) < 1e-5
    assert call(name, x, kl_coef=-1.0).returns.isfinite().all()


def test_openrlhf_properties(backend):
    """Shaped rewards of a prompt sum to 0; equal rewards give 0 where OpenRLHF's rounding, over 1e-9, gives 0.96."""
    x = batch()
    x["mask"].fill_(1)
    for name in ("rloo", "dr_grpo", "group_norm"):
        got = call(name, x, kl=None, kl_coef=0.0, reward_clip_range=None).returns[:, 0]
        torch.testing.assert_close(got.reshape(-1, 3).sum(1), torch.zeros(4), rtol=0, atol=1e-5)
    same = torch.full((12,), 3.3)
    assert not openrlhf.group_norm(same, torch.ones(12, 2), n_samples_per_prompt=12).advantages.any()
    theirs = (same - same.mean()) / (same.std() + 1e-9)
    assert 0.9 < float(theirs.abs().max()) < 1.0
    assert not openrlhf.rloo(torch.ones(2), torch.ones(2, 2), ["a", "b"]).returns.any()


def test_openrlhf_rejects(backend):
    x = batch()

    def check(kind, words, name="rloo", op="advantages.openrlhf.rloo", y=x, **kw):
        with pytest.raises(kind, match=rf"rlkern\.{op}: {words}"):
            call(name, y, **kw)

    check(ValueError, "n_samples_per_prompt must be at least 2 and divide the 12 rows; got 5", n_samples_per_prompt=5)
    check(ValueError, "n_samples_per_prompt must be at least 2", n_samples_per_prompt=1)
    check(TypeError, "n_samples_per_prompt must be an int", n_samples_per_prompt=2.0)
    check(ValueError, "index must be given, or else n_samples_per_prompt; got both", index=[0] * 12, n_samples_per_prompt=2)
    check(ValueError, "index must be given, or else n_samples_per_prompt; got neither", n_samples_per_prompt=None, index=None)
    check(ValueError, r"rewards must be \(B,\)", y={**x, "rewards": x["kl"]})
    check(TypeError, "rewards must be a floating-point tensor", y={**x, "rewards": x["mask"][:, 0]})
    check(ValueError, r"action_mask must be \(B, T\)", y={**x, "mask": x["mask"][0]}, kl=None, kl_coef=0.0)
    check(ValueError, r"rewards must have the shape \(11,\)", y={**x, "mask": x["mask"][1:]}, kl=None, kl_coef=0.0)
    check(ValueError, "kl must have the shape", kl=x["kl"][:, 1:])
    check(ValueError, "kl must be a tensor like action_mask", kl=None)
    with pytest.raises(ValueError, match="the mask must select at least one value"):
        call("gae", {**x, "mask": torch.zeros_like(x["mask"])})


# ---- TRL ------------------------------------------------------------------------------------------------------------
def nanstd(x, dim=None):
    count = (~x.isnan()).sum(dim, keepdim=True) if dim is not None else (~x.isnan()).sum()
    mean = x.nanmean(dim, keepdim=True) if dim is not None else x.nanmean()
    squares = (x - mean).square().nansum(dim, keepdim=True) if dim is not None else (x - mean).square().nansum()
    return torch.where(count > 1, squares / (count - 1), nan).sqrt()


def trl_specified(r, n, weights, scale, way):
    r, w = r.double(), torch.tensor(weights, dtype=torch.float64)
    missing = r.isnan().all(1)

    def total(x):
        return (x * w).nansum(1).masked_fill(missing, nan)

    if way == "sum_then_normalize":
        s = total(r).view(-1, n)
        std = {"group": nanstd(s, 1), "batch": nanstd(s), "none": 1 - 1e-4}[scale]
        return ((s - s.nanmean(1, keepdim=True)) / (std + 1e-4)).flatten().nan_to_num(nan=0.0)
    grouped = r.view(-1, n, r.shape[1])
    s = total(((grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, 1) + 1e-4)).view(r.shape))
    return ((s - s.nanmean()) / (nanstd(s) + 1e-4)).nan_to_num(nan=0.0)


def rewards_of(B=20, F=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(B, F, generator=g)
    r[torch.rand(B, F, generator=g) < 0.3] = nan
    r[3], r[4:7] = nan, nan  # a row that no function scored, and a group of one such row
    return r


@pytest.mark.parametrize("way", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_grpo_matches_reference(backend, way, scale):
    weights = [1.0, 0.5, 2.0]
    for r in (rewards_of(), rewards_of().nan_to_num(), rewards_of(4, 1), torch.full((4, 3), nan)):
        for n in (4, 2):
            options = {"scale_rewards": scale, "multi_objective_aggregation": way}
            w = weights[: r.shape[1]]
            got = trl.grpo(r, num_generations=n, reward_weights=w, **options)
            assert got.advantages is got.returns
            assert got.advantages.dtype == torch.float32
            torch.testing.assert_close(got.advantages.double(), trl_specified(r, n, w, scale, way), rtol=1e-6, atol=1e-6)
            labels = [f"p{i // n}" for i in range(len(r))]
            assert torch.equal(trl.grpo(r, labels, reward_weights=torch.tensor(w), **options).advantages, got.advantages)


def test_trl_rloo_matches_reference(backend):
    g = torch.Generator().manual_seed(1)
    old, ref = torch.randn(2, 20, 9, generator=g).unbind(0)
    mask = (torch.rand(20, 9, generator=g) < 0.7).long()
    r = rewards_of()
    s = r.double().nansum(1).masked_fill(r.isnan().all(1), nan).clamp(-1.0, 1.5) - 0.1 * ((old - ref).double() * mask).sum(1)
    grouped = s.view(-1, 4)
    base = (grouped.nansum(1, keepdim=True) - grouped) / ((~grouped.isnan()).sum(1, keepdim=True) - 1)
    expected = (grouped - base).flatten()
    options = {"num_generations": 4, "reward_clip_range": (-1.0, 1.5), "beta": 0.1}
    masked = torch.where(mask != 0, old, nan)
    tokens = {"old_log_prob": masked, "ref_log_prob": ref, "completion_mask": mask}
    got = trl.rloo(r, **options, **tokens).advantages
    torch.testing.assert_close(got.double(), expected.nan_to_num(nan=0.0), rtol=1e-5, atol=1e-6)
    expected = ((expected - expected.nanmean()) / (nanstd(expected) + 1e-4)).nan_to_num(nan=0.0)
    got = trl.rloo(r, **options, **tokens, normalize_advantages=True).advantages
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_trl_properties(backend):
    r = rewards_of(seed=2)
    a = trl.grpo(r, num_generations=4, scale_rewards=False).advantages
    assert torch.equal(a, trl.grpo(r, num_generations=4, scale_rewards="none").advantages)
    torch.testing.assert_close(a.view(-1, 4).sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    assert not a[r.isnan().all(1)].any()
    # equal rewards: TRL's float32 mean leaves 0.37 over its 1e-4
    same = torch.full((16, 1), 1000.1)
    assert not trl.grpo(same, num_generations=16).advantages.any()
    theirs = (same - same.mean()) / (same.std() + 1e-4)
    assert 0.3 < float(theirs.abs().max()) < 0.5
    assert trl.grpo(torch.empty(0, 2), num_generations=2).advantages.shape == (0,)
    assert trl.grpo(torch.tensor([1.0, 2.0]), num_generations=1).advantages.tolist() == [0.0, 0.0]


def test_trl_rejects(backend):
    r = rewards_of()

    def check(kind, words, *args, function=trl.grpo, **kw):
        with pytest.raises(kind, match=rf"rlkern\.advantages\.trl\.{function.__name__}: {words}"):
            function(*args, **kw)

    check(ValueError, "num_generations must be at least 1 and divide the 20 rows; got 3", r, num_generations=3)
    check(ValueError, "scale_rewards must be one of 'group', 'batch', 'none'; got 'all'", r, num_generations=4, scale_rewards="all")
    check(ValueError, "multi_objective_aggregation must be one of", r, num_generations=4, multi_objective_aggregation="sum")
    check(ValueError, r"reward_weights must be \(3,\)", r, num_generations=4, reward_weights=[1.0])
    check(ValueError, r"rewards must be \(B, F\) or \(B,\)", r[None], num_generations=4)
    check(TypeError, "rewards must be a floating-point tensor", r.nan_to_num().long(), num_generations=4)
    check(TypeError, "old_log_prob must be a torch.Tensor; got None", r, function=trl.rloo, num_generations=4, beta=0.1)


# ---- NeMo-RL --------------------------------------------------------------------------------------------------------
def test_nemo_known_values(backend):
    r = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0, 4.0, 7.0, 1.0])
    labels = list("aaabbbbcd")
    # of b: the others of 4 are equal, so it is not divided; the others of a 5 are 5 5 4
    half, third = 0.5**0.5 + 1e-6, (1 / 3) ** 0.5 + 1e-6
    expected = torch.tensor([0.0, -1.5 / half, 1.5 / half, *[(1 / 3) / third] * 3, -1.0, 0.0, 0.0])
    torch.testing.assert_close(nemo.grpo(r, labels).advantages, expected)
    plain = nemo.grpo(r, labels, use_leave_one_out_baseline=False).advantages
    torch.testing.assert_close(plain[:3], torch.tensor([0.0, -1.0, 1.0]))
    got = nemo.grpo(r, labels, torch.ones(9, 5), normalize_rewards=False)
    assert got.advantages.stride() == (1, 0)
    torch.testing.assert_close(got.advantages[:, 4], torch.tensor([0.0, -1.5, 1.5, *[1 / 3] * 3, -1.0, 0.0, 0.0]))
    assert nemo.grpo(torch.tensor([1.0, 0.0]), num_generations=2).advantages.tolist() == [1.0, -1.0]  # one other has no deviation


def test_nemo_others_match_reference():
    for B, G, seed in ((1, 1, 0), (37, 5, 1), (300, 2, 2), (64, 64, 3), (0, 1, 4)):
        g = torch.Generator().manual_seed(seed)
        s, labels = torch.randn(B, generator=g, dtype=torch.float64) + 1000, torch.randint(0, G, (B,), generator=g)
        index = rlkern.group_index(labels)
        for a, b in zip(others.mean_std_of_others(s, index), others.mean_std_loop(s, index.ids), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nemo_others_of_equal_rewards():
    """E[r^2] - E[r]^2 in float32, as NeMo-RL has it, finds a deviation of 0.057 among twelve rewards of 100.3, and divides by it."""
    s = torch.tensor([100.3] * 12 + [0.0])
    _, std = others.mean_std_of_others(s.double(), rlkern.group_index([0] * 13))
    assert float(std[12]) == 0.0
    r = s[:12]
    one_pass = ((r.square().sum() / 12 - (r.sum() / 12).square()) * 12 / 11).sqrt()
    assert float(one_pass) == pytest.approx(0.0565, abs=1e-3)
    assert float(nemo.grpo(s, [0] * 13).advantages[12]) == pytest.approx(-100.3)


def test_nemo_gdpo(backend):
    g = torch.Generator().manual_seed(0)
    r = torch.randn(12, 2, generator=g)
    parts = [nemo.grpo(x, num_generations=4).advantages.double() * w for x, w in zip(r.unbind(1), (1.0, 0.5), strict=True)]
    a = parts[0] + parts[1]
    got = nemo.gdpo(r, num_generations=4, reward_weights=[1.0, 0.5]).advantages
    torch.testing.assert_close(got.double(), (a - a.mean()) / a.std(), rtol=1e-5, atol=1e-6)
    assert not nemo.gdpo(torch.ones(12, 2), num_generations=4).advantages.any()
    with pytest.raises(ValueError, match=r"rlkern\.advantages\.nemo\.gdpo: rewards must be \(B, K\) with K of 2 or more"):
        nemo.gdpo(r[:, :1], num_generations=4)
    with pytest.raises(ValueError, match=r"rlkern\.advantages\.nemo\.gdpo: reward_weights must be floating point of shape \(2,\)"):
        nemo.gdpo(r, num_generations=4, reward_weights=[1.0])


def test_nemo_gae(backend):
    x = batch()
    r, v, m = x["kl"], x["values"], x["mask"]
    lengths = m.sum(1)
    lam = (1 - 1 / (0.05 * lengths.double()).clamp(min=1)).clamp(0, 1).float()
    got = nemo.gae(r, v, m, 0.97, length_adaptive_alpha=0.05, returns_lam=1.0)
    plain = rlkern.gae(r, v, m, gamma=0.97, lam=lam)
    assert torch.equal(got.advantages, torch.where(m != 0, plain.advantages, 0.0))
    assert torch.equal(got.returns, rlkern.gae(r, v, m, gamma=0.97, lam=1.0).returns)
    white = nemo.gae(r, v, m, 0.97, 0.9, whiten=True).advantages
    torch.testing.assert_close(white, rlkern.masked_whiten(rlkern.gae(r, v, m, gamma=0.97, lam=0.9).advantages, m, mask_output=True))
    flat = {"cu_seqlens": torch.arange(13) * 23, "length_adaptive_alpha": 0.05}
    packed = nemo.gae(r.flatten(), v.flatten(), m.flatten(), 0.97, **flat)
    assert torch.equal(packed.advantages.view(12, 23), got.advantages)
    with pytest.raises(ValueError, match="lam must be given, or else length_adaptive_alpha"):
        nemo.gae(r, v, m, 0.97)


# ---- ROLL -----------------------------------------------------------------------------------------------------------
def test_roll_known_values(backend):
    r, m = torch.tensor([[9.0, 1.0, 5.0, 2.0, 4.0]]), torch.tensor([[1, 1, 0, 1, 1]])
    assert roll.agentic_reinforce(r, m, 0.5).advantages.tolist() == [[3.0, 3.0, 0.0, 4.0, 4.0]]
    got = roll.reinforce(r, m, 0.5)
    assert got.returns.tolist() == [[10.0, 2.0, 2.0, 4.0, 4.0]]
    assert got.advantages.tolist() == [[10.0, 2.0, 0.0, 4.0, 4.0]]
    cu = torch.tensor([0, 2, 5])
    packed = roll.agentic_reinforce(r[0], m[0], 0.5, cu_seqlens=cu)
    assert packed.advantages.tolist() == [1.0, 1.0, 0.0, 4.0, 4.0]


def test_roll_reward_norm(backend):
    r = batch()["rewards"]
    rows = r.double().view(-1, 3)
    for mean, std in (("group", "group"), ("group", "batch"), ("batch", "batch"), (None, "batch"), ("group", None), (None, None)):
        centre = {"group": rows.mean(1, keepdim=True), "batch": rows.mean(), None: 0.0}[mean]
        scale = {"group": rows.std(1, keepdim=True) + 1e-6, "batch": rows.std() + 1e-6, None: 1.0}[std]
        got = roll.reward_norm(r, n_sample=3, norm_mean_type=mean, norm_std_type=std)
        torch.testing.assert_close(got.double(), ((rows - centre) / scale).flatten(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='norm_std_type must be "batch" or None with this mean'):
        roll.reward_norm(r, n_sample=3, norm_mean_type="batch")
    with pytest.raises(ValueError, match="norm_mean_type must be one of 'group', 'batch', None; got 'running'"):
        roll.reward_norm(r, n_sample=3, norm_mean_type="running")


# ---- all ------------------------------------------------------------------------------------------------------------
def test_registry():
    assert ESTIMATORS["openrlhf/rloo"] is openrlhf.rloo
    assert ESTIMATORS["trl/grpo"] is trl.grpo
    assert advantages.estimator("verl/rloo") is advantages.estimator("rloo") is advantages.rloo
    names = {"verl": 14, "openrlhf": 7, "trl": 2, "nemo": 3, "roll": 2, "classic": 3}
    assert {f: sum(name.startswith(f"{f}/") for name in ESTIMATORS) for f in names} == names


def test_compiled(backend):
    """No estimator asks the host for a number: each traces whole."""
    x = batch()
    r = rewards_of().nan_to_num()

    def step(rewards, kl, mask, values, many):
        y = {"rewards": rewards, "kl": kl, "mask": mask, "values": values, "n": 3}
        found = [call(name, y).advantages for name in ("rloo", "flash_reinforce", "reinforce", "gae")]
        found += [trl.grpo(many, num_generations=4, scale_rewards="batch").advantages, trl.rloo(many, num_generations=4).advantages]
        found += [nemo.grpo(rewards, num_generations=3).advantages, nemo.gdpo(many, num_generations=4).advantages]
        found += [nemo.gae(kl, values, mask, 1.0, length_adaptive_alpha=0.1).advantages, roll.reward_norm(rewards, n_sample=3)]
        return found

    torch._dynamo.reset()
    args = (x["rewards"], x["kl"], x["mask"], x["values"], r)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(compiled, step(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
