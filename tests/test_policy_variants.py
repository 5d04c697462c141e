# SPDX-License-Identifier: Apache-2.0
"""Every variant of policy_loss against its framework's formula, differentiated by autograd, and against recorded values."""

import json
import math
import pathlib

import pytest
import torch

import rlkern
from rlkern.policy import VARIANTS
from rlkern.testing import assert_within, ragged_mask

GOLDEN = {name: json.loads((pathlib.Path(__file__).parent / "golden" / f"{name}.json").read_text())
          for name in ("verl_0.9.1", "trl_1.16.0", "openrlhf_0.11.2")}  # fmt: skip
INPUTS = {k: torch.tensor(v) for k, v in GOLDEN["verl_0.9.1"]["inputs"].items() if k != "index"}
VERL = {"cliprange_low": 0.2, "cliprange_high": 0.28}

# A call of each variant, of each level of its ratio, and of each number of its own.
CASES = {
    "ppo delta": {"variant": "ppo", "delta": 1.5, "log_ratio_clamp": None},
    "ppo sequence": {"variant": "ppo", "importance_sampling_level": "sequence", "clip_ratio_c": 1.3, "log_ratio_clamp": None},
    "ppo sequence-sum": {"variant": "ppo", "importance_sampling_level": "sequence-sum", "log_ratio_clamp": 2.0},
    "ppo sequence, token's own gradient": {"variant": "ppo", "importance_sampling_level": "sequence", "sequence_grad": "token"},
    "decoupled": {"variant": "decoupled"},
    "decoupled capped": {"variant": "decoupled", "behave_cap": 1.2},
    "gspo": {"variant": "gspo", "cliprange": 0.05},
    "gspo through the row": {"variant": "gspo", "cliprange": 0.05, "sequence_grad": "row"},
    "gspo_token": {"variant": "gspo_token", "cliprange": 0.05},
    "luspo": {"variant": "luspo", "cliprange": 0.05, "delta": 1.2},
    "rloo": {"variant": "rloo"},
    "sapo": {"variant": "sapo", "tau_neg": 2.0},
    "sapo sequence": {"variant": "sapo", "importance_sampling_level": "sequence"},
    "cispo": {"variant": "cispo"},
    "cispo capped": {"variant": "cispo", "ratio_cap": 1.1},
    "cispo sequence": {"variant": "cispo", "cliprange": 0.05, "importance_sampling_level": "sequence"},
    "gpg": {"variant": "gpg"},
    "reinforce": {"variant": "reinforce"},
    "geo_mean": {"variant": "geo_mean"},
    "clip_cov": {"variant": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": 0.1},
    "kl_cov": {"variant": "kl_cov", "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7},
    "dppo_tv": {"variant": "dppo_tv", "cliprange": 0.03, "clip_ratio_c": 1.3},
    "dppo_kl": {"variant": "dppo_kl", "cliprange": 0.005, "clip_ratio_c": 1.3},
    "dro": {"variant": "dro", "dro_beta": 0.3},
    "topr": {"variant": "topr"},
    "vespo": {"variant": "vespo"},
}  # fmt: skip
OF_ROWS = ("ppo sequence", "ppo sequence-sum", "gspo", "gspo through the row", "sapo sequence", "cispo sequence")


# ---- the frameworks' formulas -----------------------------------------------------------------------------------------
def clipped(r, a, low, high, cap=math.inf, delta=math.inf):
    loss = torch.maximum(-a * r.clamp(max=delta), -a * r.clamp(1 - low, 1 + high))
    return torch.where(a < 0, torch.minimum(loss, -a * cap), loss)


def per_token(old, lp, a, m, variant, kept, w=None, behave=None, level=None, grad=None, cliprange=0.2, **o):
    """The loss of each token, in the dtype it is given; `kept`: the tokens that clip-cov or kl-cov chose."""
    row = {"sequence": m.sum(-1, keepdim=True).clamp(min=1), "sequence-sum": 1}
    v, x = VARIANTS[variant], lp - old
    level, grad = level or v.levels[0], grad or ("row" if v.row_grad else "token")
    clamp = o.pop("log_ratio_clamp", v.clamp if v.clamps else None)
    if level != "token":
        x = (x * m).sum(-1, keepdim=True) / row[level] + torch.zeros_like(x)
        x = x if grad == "row" else lp - lp.detach() + x.detach()
    x = x if clamp is None else x.clamp(-clamp if level == "token" else -math.inf, clamp)
    r, cap = x.exp(), o.get("clip_ratio_c", v.cap) or math.inf
    if variant in ("ppo", "gspo", "gspo_token", "luspo", "rloo", "decoupled"):
        cap = math.inf if o.get("delta") else cap
        loss = clipped(r, a, cliprange, cliprange, cap, o.get("delta", math.inf))
        b = (old - behave).exp() if variant == "decoupled" else 1.0
        return loss * b * (b <= o.get("behave_cap", math.inf)) if variant == "decoupled" else loss
    if variant == "clip_cov":
        return clipped(r, a, cliprange, cliprange) * ~kept
    if variant == "kl_cov":
        return -a * r + kept.to(x.dtype) * o["ppo_kl_coef"] * x.abs()
    if variant == "sapo":
        tau = torch.where(a > 0, o.get("tau_pos", 1.0), o.get("tau_neg", 1.05) * torch.ones_like(a))
        return -a * 4 / tau * torch.sigmoid(tau * (r - 1))
    if variant == "cispo":
        low, high = (1 - cliprange, 1 + cliprange) if "ratio_cap" not in o else (0, o["ratio_cap"])
        return -r.clamp(low, high).detach() * a * lp
    if variant in ("gpg", "reinforce"):
        return -a * lp
    if variant == "topr":
        return -torch.where(a > 0, torch.ones_like(r), r.clamp(max=1)).detach() * a * lp
    if variant == "dro":
        return 0.5 * o["dro_beta"] * x.square() - a * lp
    if variant == "vespo":
        L = (m * x.clamp(-20, 20)).sum(-1, keepdim=True)
        L = (L if w is None else L + w.log().clamp(math.log(1e-8), 20).sum(-1, keepdim=True)).clamp(math.log(1e-8), 20)
        k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        return -(lam + k * L - lam * L.exp()).exp().detach() * a * lp
    if variant == "geo_mean":
        n = m.sum(-1, keepdim=True) + 1e-8
        y = a.sign() * torch.minimum(a.sign() * x, a.sign() * x.clamp(-cliprange, cliprange))
        loss = -(a * m).sum(-1, keepdim=True) / n * ((y * m).sum(-1, keepdim=True) / n).exp()
        loss = loss if w is None else loss * (((w + 1e-10).log() * m).sum(-1, keepdim=True) / n).exp()
        return loss + torch.zeros_like(x)
    p, q = lp.exp(), old.exp()
    if variant == "dppo_tv":
        ok = torch.where(a > 0, p - q <= cliprange, p - q >= -cliprange)
    else:
        kl = q * (old - lp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        ok = torch.where(a > 0, (kl <= cliprange) | (p <= q), (kl <= cliprange) | (p >= q))
    return -a * r.clamp(max=cap).detach() * lp * ok.detach()


def agg(x, m, mode):
    x = torch.where(m != 0, x, torch.zeros_like(x))
    n = m.sum(-1)
    if mode == "token-mean":
        return x.sum() / n.sum()
    return (x.sum(-1) / (n.clamp(min=1) if mode == "seq-mean-token-mean" else 1)).sum() / len(n)  # all rows


def framework(old, lp, a, m, case, w=None, kept=None, behave=None, mode="token-mean"):
    o = dict(CASES[case])
    o = {{"importance_sampling_level": "level", "sequence_grad": "grad"}.get(k, k): v for k, v in o.items()}
    loss = per_token(old, lp, a, m, o.pop("variant"), kept, w, behave, **o)
    return agg(loss if w is None or case in ("vespo", "geo_mean") else loss * w, m, mode)


# ---- inputs -----------------------------------------------------------------------------------------------------------
def batch(B, T, dtype=torch.float32, seed=0, spread=0.25):
    g = torch.Generator().manual_seed(seed)
    lp = -torch.rand(B, T, generator=g) * 3 - 0.05
    old, a = lp + spread * torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    w, behave, noise = torch.rand(B, T, generator=g) + 0.5, lp + 0.2 * torch.randn(B, T, generator=g), torch.rand(B, T, generator=g)
    mask = ragged_mask(B, T, 0.2, seed)
    return *(x.to(dtype) for x in (old.clamp(max=-0.01), lp, a)), mask, w.to(dtype), behave.to(dtype), noise.to(dtype)


def call(case, old, lp, a, m, w=None, behave=None, noise=None, mode=None, fn=None, **more):
    o = {**CASES[case], **more}
    o |= {"rollout_log_prob": behave} if o["variant"] == "decoupled" else {}
    o |= {"noise": noise} if o["variant"] == "clip_cov" else {}
    return (fn or rlkern.policy_loss_and_grad)(old, lp, a, m, rollout_is_weights=w, loss_agg_mode=mode, **o)


def mode_of(case):
    return VARIANTS[CASES[case]["variant"]].mode


def chosen(case, old, lp, a, m, noise):
    """What clip-cov drops and kl-cov penalizes, by float64 and a sort."""
    if case not in ("clip_cov", "kl_cov"):
        return None
    o, valid = CASES[case], m != 0
    x, y = a.double(), lp.double()
    cov, n = (x - x[valid].mean()) * (y - y[valid].mean()), int(valid.sum())
    if case == "kl_cov":
        score, k = torch.where(valid, cov, -math.inf), max(int(n * o["kl_cov_ratio"]), 1)
    else:
        r = (lp - old).exp()
        bad = ((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0))
        able = valid & ~bad & (cov > o["clip_cov_lb"]) & (cov < 5.0)
        score, k = torch.where(able, -noise.double(), -math.inf), min(max(int(n * o["clip_cov_ratio"]), 1), int(able.sum()))
    found = torch.zeros_like(score, dtype=torch.bool).flatten()
    found[score.flatten().argsort(descending=True, stable=True)[:k]] = True
    return found.view_as(m) & valid


def exact_grad(case, old, lp, a, m, dtype, **more):
    leaf = lp.to(dtype).detach().requires_grad_()
    args = {k: v if v is None or isinstance(v, str) or v.dtype == torch.bool else v.to(dtype) for k, v in more.items()}
    loss = framework(old.to(dtype), leaf, a.to(dtype), m, case, **args)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---- tests ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", GOLDEN["verl_0.9.1"]["policy_loss(lo=.2,hi=.28,c=3)"])
def test_policy_variant_known_values_of_verl(backend, key):
    golden = GOLDEN["verl_0.9.1"]["policy_loss(lo=.2,hi=.28,c=3)"][key]
    name, mode, weights = key.split("|")
    variant = {"vanilla": "ppo"}.get(name, name)
    o = {"variant": variant, "loss_agg_mode": None if name in ("sapo", "geo_mean") else mode}  # these two have their own in verl
    o |= VERL if VARIANTS[variant].clips else {}
    o |= {"dro_beta": 0.1} if name == "dro" else {}
    o |= {"rollout_is_weights": INPUTS["rollout_is_weights"]} if weights == "isw" else {}
    args = [INPUTS[k] for k in ("old_log_probs", "log_prob", "advantages", "mask")]
    found = rlkern.policy_loss_and_grad(*args, **o)
    torch.testing.assert_close(found.loss, torch.tensor(golden["loss"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.d_log_prob, torch.tensor(golden["grad"]), rtol=1e-6, atol=1e-6)
    metrics = found.metrics.as_dict()
    assert all(metrics[k] == pytest.approx(v, abs=1e-6) for k, v in golden["metrics"].items())


def trl_arguments(o):
    """TRL's options as ours: (arguments, mode, counts); 6 rows, gradient accumulation 4, 60 tokens over 2 processes."""
    kind, level = o["loss_type"], o.get("level", "token")
    tokens, rows = int((INPUTS["mask"] != 0).sum()), 6 * 4
    mode, counts = "token-mean", {"batch_num_tokens": 30}  # dapo, cispo, vespo
    if kind in ("grpo", "sapo"):
        mode, counts = "seq-mean-token-mean", {"global_batch_size": rows}
    elif kind == "luspo":
        mode, counts = "seq-mean-token-sum", {"global_batch_size": rows}
    elif kind in ("bnpo", "dr_grpo"):
        counts = {"batch_num_tokens": tokens * 4 if kind == "bnpo" else 6 * 10 * 4}
    ours = {"variant": kind if kind in ("sapo", "cispo", "vespo") else "ppo", "loss_agg_mode": mode, **counts}
    if kind != "vespo":
        ours |= {"importance_sampling_level": level, "log_ratio_clamp": None}
    if ours["variant"] == "ppo":
        ours |= {**VERL, "clip_ratio_c": None} | ({"delta": o["delta"]} if "delta" in o else {})
    if kind == "cispo":
        ours["ratio_cap"] = o["epsh"]
    if "beta" in o:
        ours |= {
            "ref_log_prob": INPUTS["ref_log_prob"],
            "kl_coef": o["beta"],
            "kl_penalty": "k3",
            "use_bias_correction_kl": bool(o.get("bias")),
        }
    return ours


def trl_case(key):
    """(arguments, mask, advantages) of a recorded case; what TRL does beside the loss is applied to mask and weights."""
    A, w, mask = torch.tensor(GOLDEN["trl_1.16.0"]["advantages"]), INPUTS["rollout_is_weights"], INPUTS["mask"]
    if key.startswith("{"):
        o = json.loads(key)
        weights = None
        if "opsm" in o:  # keep a row whose A is not negative or whose policy has not moved: sampling = old - 0.05
            gap = ((INPUTS["old_log_probs"] - 0.05 - INPUTS["log_prob"]) * mask).sum(-1) / mask.sum(-1)
            weights = ((A >= 0) | (gap <= o["opsm"])).float()
        if "q" in o:
            entropy = 0.5 * INPUTS["log_prob"].abs() + 0.1  # as the recording has it
            weights = (entropy * mask >= torch.quantile(entropy[mask != 0], 1 - o["q"])).float()
        return o, weights, A
    kind = key.partition(",")[0]
    return (
        {"loss_type": kind},
        w[:, 0] if "sequence" in key else None if "advantages" in key else w,
        INPUTS["advantages"] if "(B,T)" in key else A,
    )


@pytest.mark.parametrize("key", GOLDEN["trl_1.16.0"]["cases"])
def test_policy_variant_known_values_of_trl(backend, key):
    golden = GOLDEN["trl_1.16.0"]["cases"][key]
    o, weights, A = trl_case(key)
    old = INPUTS["log_prob"] if o.get("olp") is False else INPUTS["old_log_probs"]
    found = rlkern.policy_loss_and_grad(old, INPUTS["log_prob"], A, INPUTS["mask"], rollout_is_weights=weights, **trl_arguments(o))
    torch.testing.assert_close(found.loss, torch.tensor(golden["loss"]), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.d_log_prob, torch.tensor(golden["grad"]), rtol=2e-6, atol=1e-6)
    metrics, expected = found.metrics.as_dict(), golden["metrics"]
    if "clip_ratio/region_mean" in expected and o.get("level") != "sequence":
        assert metrics["actor/pg_clipfrac"] == pytest.approx(expected["clip_ratio/region_mean"], abs=1e-6)


OPENRLHF = {k: v for k, v in GOLDEN["openrlhf_0.11.2"]["openrlhf_0.11.2"].items() if k.startswith("policy {}")
            or k.startswith(('policy {"dual', 'policy {"token_level_loss', 'policy {"policy_loss_type": "gspo"} '))}  # fmt: skip


@pytest.mark.parametrize("key", OPENRLHF)
def test_policy_variant_known_values_of_openrlhf(backend, key):
    golden, (_, options, counts) = OPENRLHF[key], key.replace("} {", "}|{").replace("policy {", "policy|{").split("|")
    o, given, mask = json.loads(options), json.loads(counts), INPUTS["mask"].clone()
    mask[4][0] = 1
    token = o.get("token_level_loss", True) and "policy_loss_type" not in o
    ours = {"loss_agg_mode": "token-mean" if token else "seq-mean-token-mean", **VERL, **given}
    if "policy_loss_type" in o:
        ours |= {"variant": "gspo", "sequence_grad": "row", "log_ratio_clamp": None}
    else:
        ours["clip_ratio_c"] = o.get("dual_clip")
    args = [INPUTS[k] for k in ("old_log_probs", "log_prob", "advantages")]
    found = rlkern.policy_loss_and_grad(*args, mask, **ours)
    torch.testing.assert_close(found.loss, torch.tensor(golden["loss"]), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.d_log_prob, torch.tensor(golden["grad"]), rtol=2e-6, atol=1e-6)
    assert found.metrics.as_dict()["actor/pg_clipfrac"] == pytest.approx(golden["clip_ratio"], abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_policy_variant_matches_reference(backend, case, dtype, weighted):
    old, lp, a, m, w, behave, noise = batch(7, 83, dtype)
    w = w if weighted else None
    kept = chosen(case, old, lp, a, m, noise)
    more = {"w": w, "behave": behave, "kept": kept, "mode": mode_of(case)}
    exact, d_exact = exact_grad(case, old, lp, a, m, torch.float64, **more)
    theirs, d_theirs = exact_grad(case, old, lp, a, m, dtype, **more)
    counts = {"global_batch_size": len(lp)} if mode_of(case).startswith("seq") else {}
    found = call(case, old, lp, a, m, w, behave, noise, mode_of(case), **counts)
    size = agg((a.abs() * 6 * (1 + lp.abs())).double() * (1 if w is None else w.double().abs()), m, mode_of(case))
    assert_within(found.loss, theirs, exact, size, case)
    assert_within(found.d_log_prob, d_theirs, d_exact, d_exact.abs().max() + size / m.sum(), case)


@pytest.mark.parametrize("case", CASES)
def test_policy_variant_grad_matches_reference(backend, case):
    """Half log-probs: autograd's and the direct gradient, with every term of the loss on."""
    old, lp, a, m, w, behave, noise = batch(4, 37, torch.bfloat16)
    wide = [x.double() for x in (old, lp, a)]
    extra = {"ref_log_prob": old, "kl_coef": 0.1, "entropy": lp.abs(), "entropy_coeff": 0.01}
    found = call(case, old, lp, a, m, w, behave, noise, **extra)
    exact = call(
        case,
        *wide,
        m,
        w.double(),
        behave.double(),
        noise.double(),
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()},
    )
    leaf, entropy = lp.clone().requires_grad_(), extra["entropy"].clone().requires_grad_()
    loss, _ = call(case, old, leaf, a, m, w, behave, noise, fn=rlkern.policy_loss, **{**extra, "entropy": entropy})
    loss.backward()
    assert torch.equal(leaf.grad, found.d_log_prob)
    assert torch.equal(entropy.grad, found.d_entropy)
    torch.testing.assert_close(found.d_log_prob.double(), exact.d_log_prob, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(found.loss.double(), exact.loss.double(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_policy_variant_gradcheck(backend, case):
    old, lp, a, m, w, behave, noise = batch(3, 9, torch.float64, spread=0.1)
    if (
        "cov" in case
        or case in ("dppo_tv", "dppo_kl", "cispo", "cispo capped", "cispo sequence", "topr", "vespo", "gspo", "gspo_token")
        or "own" in case
    ):
        pytest.skip("a detached factor: autograd's numbers are not those of a difference quotient; matches_reference has them")
    extra = {"ref_log_prob": old - 0.1, "kl_coef": 0.1, "use_bias_correction_kl": True}

    def loss(x):
        return call(case, old, x, a, m, w, behave, noise, fn=rlkern.policy_loss, **extra).loss

    assert torch.autograd.gradcheck(loss, lp.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, lp)


def test_policy_variant_grad_matches_reference_at_ties(backend):
    """On a clip's edge the gradient passes in full; a tie with the dual clip halves it, TRL's delta does not."""
    old, one, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    with torch.no_grad():  # e as this backend has it
        e = -rlkern.policy_loss(old, one, one, mask, cliprange=99.0).loss.item()

    def grad(A, **o):
        return rlkern.policy_loss_and_grad(old, one, A * one, mask, **o).d_log_prob.item()

    rows = {"variant": "ppo", "importance_sampling_level": "sequence", "log_ratio_clamp": None, "cliprange_low": 0.0}
    assert grad(1.0, **rows, cliprange_high=e - 1) == -e
    assert grad(-1.0, **rows, cliprange_high=0.1, clip_ratio_c=e) == e / 2
    assert grad(-1.0, variant="ppo", cliprange_low=0.0, cliprange_high=0.1, delta=e, log_ratio_clamp=None) == e
    assert grad(1.0, variant="gspo", log_ratio_clamp=1.0, cliprange=99.0) == -e
    assert grad(1.0, variant="gspo", log_ratio_clamp=0.99, cliprange=99.0) == 0
    assert grad(1.0, variant="geo_mean", cliprange=1.0) == pytest.approx(-e, rel=1e-6)
    assert grad(1.0, variant="geo_mean", cliprange=0.99) == 0
    assert grad(0.0, variant="geo_mean") == 0
    assert grad(0.0, variant="kl_cov", ppo_kl_coef=0.5) == 0.5  # one token: it is chosen
    assert rlkern.policy_loss_and_grad(old, old, one * 0, mask, variant="kl_cov").d_log_prob.item() == 0  # |x| at 0
