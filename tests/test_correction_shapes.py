# SPDX-License-Identifier: Apache-2.0
"""rollout_correction: shapes, strides, packing, identities, bits, refusals, registration; rollout_metrics."""

import math

import numpy as np
import pytest
import torch
from correction_cases import CONFIGS, EVERYTHING, OFF_POLICY, batch, same
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.reference.correction import FIELDS
from rlkern.testing import SHAPES

NATIVE = [f"cpp:{isa}" for isa, runs in (backends.native.isas() if backends.native else {}).items() if runs]


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_rollout_correction_edge_shapes(backend, B, T, why):
    old, rollout, mask = batch(B, T)
    wide = torch.full((2, B, T + 5), torch.nan)[:, :, 2 : T + 2]
    wide.copy_(torch.stack((old, rollout)))
    column = torch.ones(B, 1, dtype=torch.int64).expand(B, T)
    for config, dtype in zip(CONFIGS[1:4], (torch.int64, torch.bool, torch.bfloat16), strict=True):
        if not mask.any():
            with pytest.raises(ValueError, match="the mask must select at least one value"):
                rlkern.rollout_correction(old, rollout, mask, **config)
            continue
        found = rlkern.rollout_correction(old, rollout, mask, **config)
        with rlkern.use_backend("torch"):
            same(found, rlkern.rollout_correction(old, rollout, mask, **config), 1e-5, 2e-6 * max(T, 1) ** 0.5)
        assert all(math.isfinite(x) for x in found.metrics.as_dict().values())
        wide_mask = torch.ones(B, T + 3, dtype=dtype)[:, 1 : T + 1].copy_(mask)
        strided = rlkern.rollout_correction(*wide, wide_mask, **config)
        same(strided._replace(response_mask=strided.response_mask.to(torch.int64)), found, 1e-6, 1e-6)
        if dtype == torch.bool:
            ones = rlkern.rollout_correction(old, rollout, torch.ones_like(mask), **config)
            same(rlkern.rollout_correction(old, rollout, column, **config), ones, 1e-6, 1e-6)


def test_rollout_correction_edge_shapes_packed(backend):
    lengths = [5, 0, 1033, 1, 40]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    old, rollout, _ = (x[0] for x in batch(1, int(cu[-1])))
    mask = (torch.rand(int(cu[-1])) > 0.3).to(torch.int64)
    mask[0] = 1
    padded = [torch.zeros(5, 1033), torch.zeros(5, 1033), torch.zeros(5, 1033, dtype=torch.int64)]
    for i, n in enumerate(lengths):
        for to, x in zip(padded, (old, rollout, mask), strict=True):
            to[i, :n] = x[cu[i] : cu[i] + n]
    for config in CONFIGS:
        packed = rlkern.rollout_correction(old, rollout, mask, cu_seqlens=cu, **config)
        full = rlkern.rollout_correction(*padded, **config)

        def flat(x):
            return None if x is None else torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])

        same(packed, full._replace(weights=flat(full.weights), response_mask=flat(full.response_mask)), 1e-6, 1e-6)
        assert packed.metrics.as_dict() == pytest.approx(full.metrics.as_dict(), rel=1e-5, abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(CONFIGS[:5]))
def test_rollout_correction_properties(B, T, seed, config):
    old, rollout, mask = batch(B, T, torch.float64, seed)
    one = rlkern.rollout_correction(old, rollout, mask, **config)
    got = one.metrics.as_dict()
    on_policy = rlkern.rollout_correction(old, old, mask, **config)
    assert torch.equal(on_policy.response_mask, mask)
    assert on_policy.weights is None or torch.equal(on_policy.weights, (mask != 0).double())
    still = on_policy.metrics.as_dict()
    for name in ("kl", "k3_kl", "chi2_token", "chi2_seq", "log_ppl_diff"):
        assert still[f"rollout_corr/{name}"] == 0
    if config.get("rollout_is"):
        assert still["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-7)
        mean = got["rollout_corr/rollout_is_mean"]
        assert 0 <= got["rollout_corr/rollout_is_eff_sample_size"] * mean**2 <= (mean + 1e-8) ** 2 * (1 + 1e-9)
    if config.get("rollout_is") == "sequence" and "rollout_is_threshold" not in config:
        ratio = torch.where(mask != 0, old - rollout, 0).sum(-1).exp().clamp(max=2)
        torch.testing.assert_close(one.weights, ratio[:, None] * (mask != 0))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    shuffled = rlkern.rollout_correction(old[order], rollout[order], mask[order], **config)
    assert torch.equal(shuffled.response_mask, one.response_mask[order])
    assert torch.equal(shuffled.metrics.table, one.metrics.table[:, order])
    assert shuffled.metrics.as_dict() == pytest.approx(got, rel=1e-9, abs=1e-12)
    twice = rlkern.rollout_correction(*(torch.cat((x, x)) for x in (old, rollout, mask)), **config).metrics
    assert torch.equal(one.metrics.merge(one.metrics).table, twice.table)
    assert got["rollout_corr/kl"] == pytest.approx(float(-((old - rollout) * mask).sum() / mask.sum()))


def test_rollout_correction_properties_of_normalisation(backend):
    old, rollout, mask = batch(6, 50)
    mask[4] = 0
    for level in ("token", "sequence"):
        found = rlkern.rollout_correction(old, rollout, mask, rollout_is=level, rollout_is_batch_normalize=True)
        plain = rlkern.rollout_correction(old, rollout, mask, rollout_is=level)
        valid = mask.bool()
        mean_of = found.weights[valid].mean() if level == "token" else found.weights.amax(-1)[valid.any(-1)].mean()
        assert mean_of.item() == pytest.approx(1, rel=1e-5)
        factor = found.metrics.as_dict()["rollout_corr/rollout_is_batch_norm_factor"]
        torch.testing.assert_close(found.weights * factor, plain.weights)
        assert found.metrics.as_dict()["rollout_corr/rollout_is_mean"] == plain.metrics.as_dict()["rollout_corr/rollout_is_mean"]
    nothing = {"rollout_is": "token", "rollout_is_threshold": "1000_2000", "rollout_is_batch_normalize": True}
    empty = rlkern.rollout_correction(old, rollout, mask, **nothing)  # verl: ZeroDivisionError
    got = empty.metrics.as_dict()
    assert not empty.weights.any()
    assert got["rollout_corr/rollout_is_eff_sample_size"] == 0
    assert got["rollout_corr/rollout_is_oob_ratio"] == 1
    assert got["rollout_corr/rollout_is_batch_norm_factor"] == 1


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("config", [1, 4])
def test_rollout_correction_properties_of_bits(name, config):
    """The same bits for 1 and 2 threads, from read-only memory, with streaming; every ISA within rounding."""
    old, rollout, mask = batch(300, 1024)
    for x in (old, rollout, mask):
        x.numpy().flags.writeable = False
    frozen = [torch.from_numpy(x.numpy()) for x in (old, rollout, mask)]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with rlkern.use_backend(name):
            found.append(rlkern.rollout_correction(*frozen, **CONFIGS[config]))
    torch.set_num_threads(before)
    same(*found, 0, 0)
    assert found[0].metrics.as_dict() == found[1].metrics.as_dict()
    same(found[0], rlkern.rollout_correction(*frozen, **CONFIGS[config]), 1e-5, 1e-4)


def test_rollout_correction_properties_of_std(backend):
    """Equal weights have no spread; E[x^2] - E[x]^2 in float32, as verl has it, finds one of up to 1.2e-3."""
    found = []
    for gap in torch.linspace(0.05, 0.65, 40).tolist():
        old, rollout = torch.full((1, 9), -1.0), torch.full((1, 9), -1.0 - gap)
        got = rlkern.rollout_correction(old, rollout, torch.ones(1, 9), rollout_is="token").metrics.as_dict()
        assert got["rollout_corr/rollout_is_std"] < 1e-7
        w = (old - rollout).exp()
        found.append((w.square().sum() / 9 - (w.sum() / 9).square()).clamp(min=0).sqrt().item())
    assert 1e-3 < max(found) < 1.3e-3


def test_rollout_correction_rejects(backend):
    old, rollout, mask = batch(2, 5)

    def refuses(kind, text, *args, **keywords):
        with pytest.raises(kind, match=rf"rlkern\.rollout_correction: {text}"):
            rlkern.rollout_correction(*(args or (old, rollout, mask)), **keywords)

    refuses(ValueError, r"rollout_is must be one of", rollout_is="row")
    for bad in (0, -1.0, "0", "-1_2", "2_1", "a", "", "1_b", float("nan")):
        refuses(ValueError, r"rollout_is_threshold must hold", rollout_is="token", rollout_is_threshold=bad)
    for bad in (True, [2.0]):
        refuses(TypeError, r"rollout_is_threshold must be a number", rollout_is="token", rollout_is_threshold=bad)
    for bad in ("token_k4", "seq_max_k1", "", ","):
        refuses(ValueError, r"rollout_rs must hold names", rollout_rs=bad, rollout_rs_threshold=1.0)
    refuses(ValueError, r"rollout_rs must be a string", rollout_rs=["token_k1"], rollout_rs_threshold=1.0)
    refuses(ValueError, r"rollout_rs_threshold must be given", rollout_rs="token_k1")
    refuses(ValueError, r"rollout_rs_threshold must hold 1 or 2", rollout_rs="token_k1,token_k2", rollout_rs_threshold="1,2,3")
    refuses(ValueError, r"rollout_rs_threshold must hold 1 or 1", rollout_rs="token_k1,token_k1", rollout_rs_threshold="1.5,2")
    for bad in ("0.5_2", "x", 0, -1, ""):
        refuses(ValueError, r"rollout_rs_threshold must hold", rollout_rs="token_k2", rollout_rs_threshold=bad)
    refuses(ValueError, r"rollout_rs_threshold must hold", rollout_rs="token_k1", rollout_rs_threshold="2_0.5")
    refuses(ValueError, r"rollout_rs_threshold must hold at least 1", rollout_rs="token_k1", rollout_rs_threshold=0.5)
    refuses(TypeError, r"rollout_rs_threshold must be a number", rollout_rs="token_k1", rollout_rs_threshold=[1.0])
    refuses(ValueError, r"rollout_log_prob must have the shape", old, rollout[:, :4], mask)
    refuses(ValueError, r"response_mask must have the shape", old, rollout, mask[:1])
    refuses(TypeError, r"rollout_log_prob must be a torch\.Tensor", old, None, mask)
    refuses(TypeError, r"old_log_prob must be float32", old.long(), rollout, mask)
    refuses(ValueError, r"old_log_prob must be \(N,\) with cu_seqlens", cu_seqlens=torch.tensor([0, 10]))
    refuses(ValueError, r"old_log_prob must not require grad", old.clone().requires_grad_(), rollout, mask)
    refuses(ValueError, r"the mask must select at least one value", old, rollout, mask * 0)
    with pytest.raises(ValueError, match=r"rlkern\.RolloutMetrics\.field: name must be one of"):
        rlkern.rollout_correction(old, rollout, mask).metrics.field("kl")
    one, other = (rlkern.rollout_correction(old, rollout, mask, rollout_is=x).metrics for x in ("token", "sequence"))
    with pytest.raises(ValueError, match=r"rlkern\.RolloutMetrics\.merge: other must have the same settings"):
        one.merge(other)
    empty = one._replace(table=torch.zeros_like(one.table))  # what a GPU finds for an empty mask
    with pytest.raises(ValueError, match=r"rlkern\.RolloutMetrics\.as_dict: the mask must select"):
        empty.as_dict()


def test_rollout_correction_registers(backend_number):
    old, rollout, mask = batch(3, 20)
    rest = ("token", False, [0.5, 2.0], "token_k1,seq_mean_k3", [-0.5, 0.5, 0.0, 0.1], True, torch.float32)
    torch.library.opcheck(torch.ops.rlkern._rollout_correction_fwd.default, (old, rollout, mask, None, *rest, backend_number))

    def step(old):
        found = rlkern.rollout_correction(old * 1.0, rollout, mask, **CONFIGS[6])
        return found.weights, found.response_mask, found.metrics.table

    found = [fn(old) for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- rollout_metrics: the off-policy part of the same op, so the tests above are its own; here is what differs ------------
def test_rollout_metrics_matches_reference(backend):
    old, rollout, mask = batch(5, 83)
    leaf = old.clone().requires_grad_()
    metrics = rlkern.rollout_metrics(leaf, rollout, mask)
    assert not metrics.table.requires_grad
    assert metrics.table.shape == (len(FIELDS), 5)
    full = rlkern.rollout_correction(old, rollout, mask, **EVERYTHING).metrics.as_dict()
    assert metrics.as_dict() == {k: v for k, v in full.items() if "rollout_is" not in k and "rollout_rs" not in k}
    assert len(metrics.as_dict(prefix="")) == OFF_POLICY
    assert torch.equal(metrics.field("tokens"), mask.sum(-1).double())
    with pytest.raises(ValueError, match="the mask must select"):
        rlkern.rollout_metrics(old, rollout, mask * 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rollout_metrics_matches_reference_of_probabilities(backend, dtype):
    old, rollout, mask = batch(5, 583, dtype)
    mask[3] = 0
    dirty = [torch.where(mask != 0, x, torch.nan) for x in (old, rollout)]
    got = rlkern.rollout_metrics(*dirty, mask, probabilities=True).as_dict()
    p, r = (x.double().exp()[mask != 0] for x in (old, rollout))
    gap = (p - r).abs()
    expected = (1.0, gap.max(), gap.mean(), gap.std(), torch.corrcoef(torch.stack((p, r)))[0, 1])
    names = (*(f"rollout_probs_diff_{name}" for name in ("valid", "max", "mean", "std")), "rollout_actor_probs_pearson_corr")
    assert list(got)[OFF_POLICY:] == [f"training/{name}" for name in names]
    for name, value in zip(names, expected, strict=True):
        assert got[f"training/{name}"] == pytest.approx(float(value), rel=1e-12 if dtype == torch.float64 else 2e-6), name
    old = old.clone()
    old[0, 0] = torch.nan
    lost = rlkern.rollout_metrics(old, rollout, mask, probabilities=True).as_dict()
    assert all(math.isnan(lost[f"training/{name}"]) for name in names[1:])
    one = rlkern.rollout_metrics(rollout[:1, :1], rollout[:1, :1], torch.ones(1, 1), probabilities=True).as_dict()
    assert one["training/rollout_probs_diff_max"] == 0
    assert math.isnan(one["training/rollout_probs_diff_std"])  # torch.std of one number
