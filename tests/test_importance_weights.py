# SPDX-License-Identifier: Apache-2.0
"""importance_weights and off_policy_mask: OpenRLHF's recorded gates, TRL's modes, NaN rules, packing, refusals."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

FOLDER = pathlib.Path(__file__).parent / "golden"
INPUTS = {k: torch.tensor(v) for k, v in json.loads((FOLDER / "verl_0.9.1.json").read_text())["inputs"].items() if k != "index"}
OPENRLHF = json.loads((FOLDER / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]
TRL = json.loads((FOLDER / "trl_1.16.0.json").read_text())
NATIVE = [f"cpp:{isa}" for isa, runs in (backends.native.isas() if backends.native else {}).items() if runs]
FORMS = [
    {"mode": "clip", "low": 0.5, "high": 2.0},
    {"mode": "mask", "low": 0.8, "high": 1.2},
    {"mode": "mask", "gating": "binary_kl", "high": 0.01},
    {"mode": "mask", "gating": "tv", "high": 0.05},
    {"level": "sequence", "mode": "mask", "low": 0.9, "high": 1.1},
    {"level": "sequence", "mode": "mask", "gating": "binary_kl", "low": 0.0, "high": 0.02},
    {"level": "sequence", "mode": "mask", "gating": "tv", "high": 0.1},
    {"level": "sequence", "mode": "clip", "reduce": "sum", "high": 1.5, "nan": "one", "padding": 1.0},
    {"level": "sequence", "mode": "mask", "reduce": "sum", "weights": "sequence", "high": 1.5, "nan": "one"},
    {"mode": "clip", "high": 1.1, "nan": "one", "padding": 1.0},
    {"mode": "clip", "high": 1.5, "nan": "drop"},
]


def batch(B, T, dtype=torch.float32, seed=0, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    rollout = -2 * torch.rand(B, T, generator=g) - 0.01
    old = torch.minimum(rollout + spread * torch.randn(B, T, generator=g), torch.tensor(-0.001))
    return old.to(dtype), rollout.to(dtype), ragged_mask(B, T, 0.2, seed)


def same(a, b, rtol=1e-5, atol=1e-7):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


def row_mean(x, m):
    return torch.where(m != 0, x, 0).sum(-1, keepdim=True) / (m != 0).sum(-1, keepdim=True)


def framework(old, rollout, m, level="token", mode="clip", gating="ratio", low=-math.inf, high=math.inf, reduce="mean", weights=None,
              nan="show", padding=0.0):  # fmt: skip
    """OpenRLHF's and TRL's gates, restated: (weights, filtered share)."""
    q = old - rollout
    q = torch.where(q.isnan(), 0, q) if nan == "one" else q
    p, p_old = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    if gating == "ratio":
        stat = q if level == "token" else row_mean(q, m) if reduce == "mean" else torch.where(m != 0, q, 0).sum(-1, keepdim=True)
        stat = stat.exp()
    else:
        stat = (p - p_old).abs() if gating == "tv" else p * (p / p_old).log() + (1 - p) * ((1 - p) / (1 - p_old)).log()
        stat = stat if level == "token" else row_mean(stat, m)
    per_row = level == "sequence" and (mode == "clip" or weights == "sequence")
    w, keep = stat if per_row else q.exp(), (stat >= low) & (stat <= high)
    w = w.clamp(low, high) if mode == "clip" else torch.where(keep, w, 0)
    w = torch.where(w.isfinite(), w, 0) if nan == "drop" else w
    out = ~keep if mode == "mask" else (stat < low) | (stat > high)
    filtered = out.double()[m != 0].mean() if level == "token" else out.double().mean()
    return (w.squeeze(-1) if per_row else torch.where(m != 0, w, padding)), filtered


def test_importance_weights_known_values(backend):
    old, rollout = torch.tensor([[-1.0, -1.0, -1.0, 5.0]]), torch.tensor([[-1.0, -3.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    clip = rlkern.importance_weights(old, rollout, mask, low=0.5, high=2.0)
    assert clip.weights.tolist() == [[1, 2, 0.5, 0]]
    assert clip.filtered.item() == pytest.approx(2 / 3)
    assert clip.kl.item() == 0
    row = rlkern.importance_weights(old, rollout, mask, level="sequence", reduce="sum", high=3.0)
    assert row.weights.tolist() == [1]
    mean = rlkern.importance_weights(old, rollout - 1, mask, level="sequence", weights="sequence", mode="mask", low=2.0)
    assert mean.weights.item() == pytest.approx(math.e)
    names = {"is_correction_level": "level", "is_correction_mode": "mode", "is_correction_gating": "gating"}
    found = 0
    for key, golden in OPENRLHF.items():
        if "is_correction_threshold" not in key and "empty_row" not in key:
            continue
        mask, empty = INPUTS["mask"].clone(), "empty_row" in key
        keywords, counts = {"is_correction_level": "seq", "is_correction_threshold": [0.95, 1.05]}, {}
        if not empty:
            mask[4, 0] = 1
            keywords, counts = (json.loads(x) for x in key.removeprefix("policy ").replace("} {", "}\n{").split("\n"))
        low, high = keywords.pop("is_correction_threshold")
        words = {"mode": "mask", **{names[k]: "sequence" if v == "seq" else v for k, v in keywords.items()}}
        rollout = INPUTS["old_log_probs"] + 0.3 * (INPUTS["rollout_is_weights"] - 1)
        gate = rlkern.importance_weights(INPUTS["old_log_probs"], rollout, mask, low=low, high=high, **words)
        lp = INPUTS["log_prob"].clone().requires_grad_()
        args = (INPUTS["old_log_probs"], lp, INPUTS["advantages"], mask)
        loss = rlkern.policy_loss(*args, clip_ratio_c=None, cliprange_high=0.28, rollout_is_weights=gate.weights, **counts).loss
        assert loss.item() == pytest.approx(golden["loss"], rel=2e-6), key
        torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], torch.tensor(golden["grad"]), rtol=2e-6, atol=1e-7)
        assert gate.filtered.item() == pytest.approx(golden["is_filter_ratio"]), key
        assert gate.kl.item() == pytest.approx(golden["vllm_kl"], abs=1e-7), key
        found += 1
    assert found == 15


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_importance_weights_matches_reference(backend, dtype, form):
    old, rollout, mask = batch(9, 83, dtype)
    mask[4] = 0
    keywords = FORMS[form]
    theirs, exact = framework(old, rollout, mask, **keywords), framework(old.double(), rollout.double(), mask, **keywords)
    found = rlkern.importance_weights(old, rollout, mask, **keywords)
    assert found.weights.dtype == dtype
    agree = (found.weights == 0) == (exact[0] == 0)  # a statistic on the edge may fall on either side
    assert agree.double().mean() > 0.999
    assert_within(found.weights[agree], theirs[0][agree], exact[0][agree], 1 + 40 * exact[0].abs(), "weights")
    assert found.filtered.item() == pytest.approx(exact[1].item(), abs=2e-3 if dtype == torch.bfloat16 else 1e-6)
    assert found.kl.item() == pytest.approx(
        row_mean((rollout.double() - old.double()).reshape(1, -1), mask.reshape(1, -1)).item(), abs=1e-6
    )


@pytest.mark.parametrize("mask_dtype", mask_kinds())
def test_importance_weights_matches_reference_for_masks(backend, mask_dtype):
    old, rollout, mask = batch(5, 83)
    for form in FORMS:
        found, expected = (rlkern.importance_weights(old, rollout, m, **form) for m in ((mask * 3).to(mask_dtype), mask))
        assert found.weights.dtype == (torch.float64 if mask_dtype == torch.float64 else torch.float32)
        same([x.float() for x in found], expected, 0, 0)


def test_importance_weights_ignores_masked(backend):
    old, rollout, mask = batch(6, 83)
    mask[2] = 0
    for form in FORMS:
        clean = rlkern.importance_weights(old, rollout, mask, **form)
        for poison in (torch.nan, torch.inf, -torch.inf):
            same(clean, rlkern.importance_weights(*(torch.where(mask != 0, x, poison) for x in (old, rollout)), mask, **form), 0, 0)


def test_importance_weights_ignores_masked_but_shows_valid(backend):
    old, rollout, mask = batch(3, 20)
    mask[:] = 1
    rollout = rollout.clone()
    rollout[1, 4] = torch.nan
    for name, expected in (("show", math.nan), ("one", 1.0), ("drop", 0.0)):
        clip = rlkern.importance_weights(old, rollout, mask, high=3.0, nan=name).weights
        assert clip[1, 4].item() == pytest.approx(expected, nan_ok=True)
        assert clip.isnan().sum() == (name == "show")
        masked = rlkern.importance_weights(old, rollout, mask, mode="mask", high=3.0, nan=name).weights
        assert masked[1, 4] == (1 if name == "one" else 0)
        row = rlkern.importance_weights(old, rollout, mask, level="sequence", nan=name, reduce="sum").weights
        assert row[1].isnan() == (name == "show")
        geometric = rlkern.importance_weights(old, rollout, mask, level="sequence", mode="mask", low=0.0, nan=name).weights
        assert (geometric[1] == 0).all() == (name != "one")
    rollout[1, 4] = -torch.inf
    assert rlkern.importance_weights(old, rollout, mask).weights[1, 4] == torch.inf
    assert rlkern.importance_weights(old, rollout, mask, nan="drop").weights[1, 4] == 0


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_importance_weights_edge_shapes(backend, B, T, why):
    old, rollout, mask = batch(B, T)
    few = (FORMS[1], FORMS[5], FORMS[7])
    for form, m in (*((form, mask) for form in FORMS), *((form, mask * 0) for form in few)):
        found = rlkern.importance_weights(old, rollout, m, **form)
        with rlkern.use_backend("torch"):
            same(found, rlkern.importance_weights(old, rollout, m, **form), 1e-5, 1e-6)
        if not m.any():
            assert found.kl.isnan()
    wide = torch.full((2, B, T + 5), torch.nan)[:, :, 2 : T + 2]
    wide.copy_(torch.stack((old, rollout)))
    strided = torch.ones(B, T + 3, dtype=torch.int64)[:, 1 : T + 1].copy_(mask)
    for form in few:
        same(rlkern.importance_weights(*wide, strided, **form), rlkern.importance_weights(old, rollout, mask, **form), 1e-6, 1e-6)


def test_importance_weights_edge_shapes_packed(backend):
    lengths = [2, 0, 33, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    old, rollout, _ = (x[0] for x in batch(1, int(cu[-1])))
    mask = torch.rand(int(cu[-1])) > 0.3
    padded = [torch.zeros(5, 40), torch.zeros(5, 40), torch.zeros(5, 40, dtype=torch.bool)]
    for i, n in enumerate(lengths):
        for to, x in zip(padded, (old, rollout, mask), strict=True):
            to[i, :n] = x[cu[i] : cu[i] + n]
    for form in FORMS:
        packed, full = (rlkern.importance_weights(*x, **form, **k) for x, k in (((old, rollout, mask), {"cu_seqlens": cu}), (padded, {})))
        if full.weights.dim() == 2:
            full = full._replace(weights=torch.cat([row[:n] for row, n in zip(full.weights, lengths, strict=True)]))
        same(packed, full, 1e-6, 1e-6)
        short = torch.tensor([0, 2, 2, 3])  # as many rows as tokens
        one = rlkern.importance_weights(old[:3], rollout[:3], mask[:3], cu_seqlens=short, **form)
        with rlkern.use_backend("torch"):
            same(one, rlkern.importance_weights(old[:3], rollout[:3], mask[:3], cu_seqlens=short, **form), 1e-5, 1e-6)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_importance_weights_properties(B, T, seed):
    old, rollout, mask = batch(B, T, torch.float64, seed)
    mask[:, 0] = 1
    on_policy = rlkern.importance_weights(old, old, mask, low=0.9, high=1.1)
    assert torch.equal(on_policy.weights, mask.double())
    assert on_policy.filtered == on_policy.kl == 0
    truncated = rlkern.importance_weights(old, rollout, mask, high=2.0)
    torch.testing.assert_close(truncated.weights, rlkern.rollout_correction(old, rollout, mask, rollout_is="token").weights)
    band = rlkern.importance_weights(old, rollout, mask, mode="mask", low=0.8, high=1.25)
    icepop = rlkern.rollout_correction(old, rollout, mask, rollout_is="token", rollout_is_threshold="0.8_1.25")
    torch.testing.assert_close(band.weights, icepop.weights)
    assert float(band.filtered) == pytest.approx(icepop.metrics.as_dict()["rollout_corr/rollout_is_oob_ratio"])
    row = rlkern.importance_weights(old, rollout, mask, level="sequence", reduce="sum", high=2.0)
    full = rlkern.rollout_correction(old, rollout, mask, rollout_is="sequence").weights
    torch.testing.assert_close(row.weights[:, None] * mask, full)
    mean = rlkern.importance_weights(old, rollout, mask, level="sequence").weights
    torch.testing.assert_close(mean ** mask.sum(-1), rlkern.importance_weights(old, rollout, mask, level="sequence", reduce="sum").weights)


def test_importance_weights_properties_near_on_policy(backend):
    """A divergence is never negative, so a band from 0 on keeps what is close; OpenRLHF's float32 KL drops a third of these tokens."""
    g = torch.Generator().manual_seed(0)
    rollout = -2 * torch.rand(4, 500, generator=g) - 0.01
    old, mask = rollout + 1e-4 * torch.randn(4, 500, generator=g), torch.ones(4, 500)
    found = rlkern.importance_weights(old, rollout, mask, mode="mask", gating="binary_kl", low=0.0, high=0.01)
    assert found.filtered == 0
    p, q = rollout.exp(), old.exp()
    negative = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) < 0
    assert 0.25 < negative.double().mean() < 0.5


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("form", [1, 5, 8])
def test_importance_weights_properties_of_bits(name, form):
    old, rollout, mask = batch(300, 1024)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with rlkern.use_backend(name):
            found.append(rlkern.importance_weights(old, rollout, mask, **FORMS[form]))
    torch.set_num_threads(before)
    same(*found, 0, 0)
    agree = rlkern.importance_weights(old, rollout, mask, **FORMS[form]).weights
    assert ((agree == 0) == (found[0].weights == 0)).double().mean() > 0.999


def test_importance_weights_rejects(backend):
    old, rollout, mask = batch(2, 5)

    def refuses(kind, text, *args, **keywords):
        with pytest.raises(kind, match=rf"rlkern\.importance_weights: {text}"):
            rlkern.importance_weights(*(args or (old, rollout, mask)), **keywords)

    for name in ("level", "mode", "gating", "reduce", "weights", "nan"):
        refuses(ValueError, rf"{name} must be one of", **{name: "x"})
    refuses(ValueError, r"gating must be 'ratio' with mode 'clip'", gating="tv")
    refuses(ValueError, r"gating must be 'ratio' with reduce", gating="tv", mode="mask", level="sequence", reduce="sum")
    refuses(ValueError, r"weights must be 'token' with level 'token'", weights="sequence")
    refuses(ValueError, r"weights must be 'sequence' with mode 'clip'", weights="token", level="sequence")
    refuses(ValueError, r"low must be at most high", low=2.0, high=1.0)
    refuses(ValueError, r"low must be None or at most 0", low=0.5, mode="mask", gating="tv")
    refuses(TypeError, r"high must be a number", high="2")
    refuses(TypeError, r"padding must be a number", padding=True)
    refuses(ValueError, r"rollout_log_prob must have the shape", old, rollout[:, :4], mask)
    refuses(TypeError, r"mask must be a torch\.Tensor", old, rollout, None)
    refuses(ValueError, r"rollout_log_prob must not require grad", old, rollout.clone().requires_grad_(), mask)


def test_importance_weights_registers(backend_number):
    old, rollout, mask = batch(3, 20)
    mask[:, 0] = 1  # a mean of nothing is NaN, which equals nothing
    for unit, per_row in (("token", False), ("mean", False), ("sum", True)):
        args = (old, rollout, mask, None, "ratio", unit, per_row, per_row, [0.5, 2.0], "one", 1.0, torch.float32, backend_number)
        torch.library.opcheck(torch.ops.rlkern._importance_weights_fwd.default, args)

    def step(old):
        found = rlkern.importance_weights(old * 1.0, rollout, mask, **FORMS[5])
        return *found, rlkern.off_policy_mask(old[:, 0], old, rollout, mask, threshold=0.1)

    found = [fn(old) for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- off_policy_mask: a comparison of what importance_weights sums up, so the tests above are its own -----------------------
def test_off_policy_mask_known_values(backend):
    """TRL's recorded runs: a row that is dropped has a gradient of 0, one with a negative advantage that is kept has not."""
    advantages = torch.tensor(TRL["advantages"])
    for threshold in (0.02, 0.1):
        golden = torch.tensor(TRL["cases"][json.dumps({"loss_type": "grpo", "opsm": threshold})]["grad"])
        args = (advantages, INPUTS["log_prob"], INPUTS["old_log_probs"] - 0.05, INPUTS["mask"])
        keep = rlkern.off_policy_mask(*args, threshold=threshold)
        plain = torch.tensor(TRL["cases"][json.dumps({"loss_type": "grpo", "level": "token"})]["grad"])
        torch.testing.assert_close(golden, plain * keep[:, None], rtol=1e-6, atol=1e-8)
        assert keep.dtype == INPUTS["mask"].dtype


def test_off_policy_mask_properties(backend):
    lp, sampling, mask = batch(8, 40)
    mask[5] = 0
    g = torch.Generator().manual_seed(2)
    advantages = torch.randn(8, generator=g)
    kl = torch.where(mask != 0, sampling - lp, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    expected = ((advantages >= 0) | (kl <= 0.01)).to(mask.dtype)
    found = rlkern.off_policy_mask(advantages, lp, sampling, mask, threshold=0.01)
    assert torch.equal(found, expected)
    assert 0 < found.sum() < 8
    assert torch.equal(rlkern.off_policy_mask(advantages[:, None], lp.requires_grad_(), sampling, mask, threshold=0.01), expected)
    tokens = torch.randn(8, 40, generator=g)
    per_token = rlkern.off_policy_mask(tokens, lp, sampling, mask.bool(), threshold=0.01)
    assert torch.equal(per_token, (tokens >= 0) | (kl <= 0.01)[:, None])
    flat = [x.reshape(-1) for x in (lp.detach(), sampling, mask)]
    cu = torch.arange(0, 321, 40)
    assert torch.equal(rlkern.off_policy_mask(advantages, *flat, threshold=0.01, cu_seqlens=cu), expected)
    assert torch.equal(
        rlkern.off_policy_mask(tokens.reshape(-1), *flat, threshold=0.01, cu_seqlens=cu), per_token.reshape(-1).to(mask.dtype)
    )
    dirty = torch.where(mask != 0, sampling, torch.nan)
    assert torch.equal(rlkern.off_policy_mask(advantages, lp, dirty, mask, threshold=0.01), expected)
    dirty[:, 0] = torch.nan
    low = -torch.ones(8)
    assert rlkern.off_policy_mask(low, lp, dirty, mask, threshold=9.0).sum() == 8
    assert rlkern.off_policy_mask(low, lp, dirty, mask, threshold=9.0, nan="show").sum() == (mask[:, 0] == 0).sum()


def test_off_policy_mask_rejects(backend):
    lp, sampling, mask = batch(2, 5)
    with pytest.raises(ValueError, match=r"rlkern\.off_policy_mask: advantages must have the shape \(2,\)"):
        rlkern.off_policy_mask(torch.ones(3), lp, sampling, mask, threshold=0.1)
    with pytest.raises(TypeError, match=r"rlkern\.off_policy_mask: advantages must be a torch\.Tensor"):
        rlkern.off_policy_mask(None, lp, sampling, mask, threshold=0.1)
    with pytest.raises(TypeError, match=r"rlkern\.off_policy_mask: threshold must be a number"):
        rlkern.off_policy_mask(torch.ones(2), lp, sampling, mask, threshold=None)
    with pytest.raises(ValueError, match=r"rlkern\.off_policy_mask: nan must be one of"):
        rlkern.off_policy_mask(torch.ones(2), lp, sampling, mask, threshold=0.1, nan="drop")
    with pytest.raises(ValueError, match=r"rlkern\.off_policy_mask: sampling_log_prob must have the shape"):
        rlkern.off_policy_mask(torch.ones(2), lp, sampling[:1], mask, threshold=0.1)
