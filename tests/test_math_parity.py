# SPDX-License-Identifier: Apache-2.0
"""Every function of csrc/math, element by element over ties, infinities and NaN: each backend (C++, and with `--backend triton`
the interpreted twins, with `--backend cuda` the emulated kernels) against the C++ kernels and against the reference.

Through the ops that expose them: an element is a row or a token of its own.
"""

import itertools
import math

import pytest
import torch

import rlkern
from rlkern import backends
from rlkern.policy import VARIANTS

pytestmark = pytest.mark.skipif(backends.native is None, reason=str(backends.native_error))
inf, nan = math.inf, math.nan
POINTS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -200.0, 50.0, inf, -inf, nan]
LOG_PROBS = [0.0, -0.0, -1e-7, -0.25, -0.5, -1.0, -3.0, -25.0, -120.0, -inf, nan]
SCORES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e6, inf, -inf, nan]


# At an infinity the reference's autograd multiplies it by 0: there the C++ alone is asked.
which = pytest.mark.parametrize("which", ["finite", "NaN", "all"])


def some(points, which):
    return [x for x in points if which == "all" or math.isfinite(x) or (which == "NaN" and math.isnan(x))]


def product(which, *points):
    """Every combination, one a row: columns (n, 1)."""
    return [torch.tensor(c)[:, None] for c in zip(*itertools.product(*(some(x, which) for x in points)), strict=True)]


def in_one_row(columns):
    return [c.T.contiguous() for c in columns]


def thinned(backend, columns):
    """A row is a program, which takes milliseconds interpreted: there every seventh combination. No number of points is a multiple
    of 7, so each of them comes."""
    return [c[::7] for c in columns] if backend == "triton" and not torch.cuda.is_available() else columns


def voices(backend, which, ops, call):
    """What the backend, the C++ and the reference make of it, as lists of tensors."""
    if backend == "torch":
        pytest.skip("the reference is what the others are held to")
    if backend == "triton" and which != "all":
        pytest.skip("held to C++ at all points; C++ is held to the reference at these")
    missing = [why for op in ops for why in backends.why_not(backend, op, "cpu")]
    if missing:
        pytest.skip("; ".join(missing))
    found = {}
    for name in dict.fromkeys((backend, "cpp", "torch")):
        with rlkern.use_backend(name):
            found[name] = [x.detach() for x in call()]
    return found


def assert_alike(backend, which, ops, call, rtol=1e-6, loose=2e-5, atol=0.0):
    """NaN, infinities and zeros where the others have them; values to the last bits of an exponential (C++) or to what the
    reference's own float32 gives."""
    found = voices(backend, which, ops, call)
    for other, tolerance in (("cpp", rtol), ("torch", loose))[: 1 if which == "all" else 2]:
        for i, (ours, theirs) in enumerate(zip(found[backend], found[other], strict=True)):
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=tolerance,
                atol=max(atol, 1e-37),
                equal_nan=True,
                msg=lambda m, o=other, i=i: f"output {i} against {o}: {m}",
            )


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs, torch.ones_like(value))


# ---- kl.h -------------------------------------------------------------------------------------------------------------
RANGES = [{}, {"value_range": None, "log_ratio_range": None}, {"log_ratio_range": (-1.0, 1.0), "value_range": (-0.5, 2.0)}]


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
@which
def test_math_parity_kl(backend, which, name):
    lp, ref = in_one_row(product(which, POINTS, POINTS))

    def call(ranges):
        a, b = lp.clone().requires_grad_(), ref.clone().requires_grad_()
        value = rlkern.kl_penalty(a, b, name, **ranges)
        return value, *gradients(value, (a, b))

    for ranges in RANGES:
        assert_alike(backend, which, ["_kl_penalty_fwd", "_kl_penalty_bwd"], lambda r=ranges: call(r))


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3", "k1+"])
@which
def test_math_parity_kl_weighted(backend, which, name):
    few = [0.0, 0.5, -1.0, 2.0, 50.0, inf, -inf, nan]
    lp, ref, old = in_one_row(product(which, few, few, few))

    def call(ranges, bound):
        a, b = lp.clone().requires_grad_(), ref.clone().requires_grad_()
        value = rlkern.kl_penalty(a, b, name, old_log_prob=old, **ranges, **bound)
        return value, *gradients(value, (a, b))

    for ranges in RANGES:
        for bound in ({}, {"weight_max": 1.0}):
            assert_alike(backend, which, ["_kl_penalty_fwd", "_kl_penalty_bwd"], lambda r=ranges, w=bound: call(r, w))


# ---- loss.h -----------------------------------------------------------------------------------------------------------
CLIPS = [
    {},
    {"log_ratio_clamp": None, "clip_ratio_c": None},
    {"cliprange_low": 0.0, "cliprange_high": 0.0, "clip_ratio_c": 1.0000001},  # a ratio of 1 is on each bound
    {"log_ratio_clamp": 0.5, "clip_ratio_c": 1.5},
]


def counts(found, which):
    """Of tokens, rows, clipped by either bound; of a NaN the reference says that a clamp has moved it."""
    return [] if which == "NaN" else [found.metrics.sums[:4]]


@pytest.mark.parametrize("options", range(len(CLIPS)))
@which
def test_math_parity_policy(backend, which, options):
    lp, a = in_one_row(product(which, POINTS, SCORES))

    def call():
        found = rlkern.policy_loss_and_grad(torch.zeros_like(lp), lp, a, torch.ones_like(lp), loss_agg_mode="token-sum", **CLIPS[options])
        return found.d_log_prob, *counts(found, which)

    assert_alike(backend, which, ["_policy_loss_fwd"], call)


KINDS = {
    "ppo": {"delta": 1.5, "log_ratio_clamp": None},
    "decoupled": {"behave_cap": 1.0},
    "gspo": {},
    "luspo": {"delta": 1.5},
    "rloo": {},
    "sapo": {"tau_neg": 2.0},
    "cispo": {},
    "reinforce": {},
    "geo_mean": {},
    "dppo_tv": {"cliprange": 0.03, "clip_ratio_c": 1.3},
    "dppo_kl": {"cliprange": 0.005, "clip_ratio_c": 1.3},
    "dro": {"dro_beta": 0.3},
    "topr": {},
    "vespo": {},
}


OF_ROWS = ("gspo", "luspo", "rloo", "geo_mean", "vespo")  # a row is an element


@pytest.mark.parametrize("kind", KINDS)
@which
def test_math_parity_variants(backend, which, kind):
    columns = product(which, LOG_PROBS, LOG_PROBS, [0.0, -0.0, 1.0, -1.0, inf, nan])
    old, lp, a = thinned(backend, columns) if kind in OF_ROWS else in_one_row(columns)
    more = {"rollout_log_prob": old.roll(7, -1)} if kind == "decoupled" else {}

    def call():
        options = KINDS[kind] | more | {"loss_agg_mode": VARIANTS[kind].mode or "token-sum"}
        found = rlkern.policy_loss_and_grad(old, lp, a, torch.ones_like(lp), variant=kind, **options)
        return found.d_log_prob, *counts(found, which)

    # where A is 0 the reference's gradient shows a NaN that C++ shows in the loss alone
    assert_alike(backend, "all" if (kind, which) == ("geo_mean", "NaN") else which, ["_policy_variant_fwd"], call)


@pytest.mark.parametrize(("cliprange", "delta"), [(0.5, None), (0.0, None), (0.5, 1.0), (None, 0.5), (None, None)])
@which
def test_math_parity_value(backend, which, cliprange, delta):
    points = [0.0, -0.0, 0.5, -0.5, 1.0, 2.0, inf, -inf, nan]
    v, ret, old = in_one_row(product(which, points, points, points))
    options = {"cliprange_value": cliprange, "huber_delta": delta, "loss_agg_mode": "token-sum"}

    def call():
        leaf = v.clone().requires_grad_()
        found = rlkern.value_loss(leaf, ret, old, torch.ones_like(v), **options)
        found.loss.backward()
        return leaf.grad, found.metrics.sums[:3]

    assert_alike(backend, which, ["_value_loss_fwd"], call)


# ---- correction.h -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.0, 2.0, "0.5_1.0", "1_1"])
@which
def test_math_parity_correction(backend, which, level, threshold):
    old, rollout = thinned(backend, product(which, LOG_PROBS, LOG_PROBS))
    options = {"rollout_rs": "token_k1,token_k2,token_k3", "rollout_rs_threshold": "1_1,0.5,0.5"}

    def call():
        found = rlkern.rollout_correction(old, rollout, torch.ones_like(old), rollout_is=level, rollout_is_threshold=threshold, **options)
        table = [] if which == "NaN" else [found.metrics.table.float()]  # a NaN is the largest in the reference, and none in C++
        return found.weights, found.response_mask, *table

    assert_alike(backend, which, ["_rollout_correction_fwd"], call)


GATES = [
    {"mode": "clip", "low": 0.5, "high": 1.0},
    {"mode": "mask", "low": 1.0, "high": 1.0},
    {"mode": "mask", "gating": "binary_kl", "low": 0.0, "high": 0.01},
    {"mode": "mask", "gating": "tv", "high": 0.05},
    {"mode": "clip", "high": 1.5, "nan": "one"},
    {"mode": "clip", "high": 1.5, "nan": "drop"},
]


@pytest.mark.parametrize("gate", GATES)
@which
def test_math_parity_gates(backend, which, gate):
    old, rollout = thinned(backend, product(which, LOG_PROBS, LOG_PROBS))

    def call():
        return [rlkern.importance_weights(old, rollout, torch.ones_like(old), **gate).weights]

    assert_alike(backend, which, ["_importance_weights_fwd"], call)


# ---- group.h: groups of one, two and three ----------------------------------------------------------------------------
def groups(backend, which):
    scores, labels = [], []
    for size in (1, 2, 3):
        found = list(itertools.product(some(SCORES, which), repeat=size))
        for group in found if size < 3 else thinned(backend, [found])[0]:
            labels += [(labels[-1] + 1) if labels else 0] * size
            scores += group
    return torch.tensor(scores), labels


@pytest.mark.parametrize("singleton", ["raw", "zero", "nan"])
@pytest.mark.parametrize(("unbiased", "omit"), [(True, "propagate"), (False, "propagate"), (True, "omit")])
@which
def test_math_parity_group_mean_std(backend, which, singleton, unbiased, omit):
    scores, labels = groups(backend, which)
    index = rlkern.group_index(labels)

    def call():
        s = scores.clone().requires_grad_()
        found = rlkern.group_mean_std(s, index, unbiased=unbiased, singleton=singleton, nan=omit)
        return found.mean, found.std, *gradients(found.mean + found.std, (s,))

    assert_alike(backend, which, ["_group_mean_std_fwd", "_group_mean_std_bwd"], call, atol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize(("scale", "singleton"), [(True, "raw"), (False, "zero"), (True, "nan")])
@which
def test_math_parity_group_normalize(backend, which, baseline, scale, singleton):
    scores, labels = groups(backend, which)
    index = rlkern.group_index(labels)

    def call():
        s = scores.clone().requires_grad_()
        y = rlkern.group_normalize(s, index, baseline=baseline, scale_by_std=scale, singleton=singleton)
        return y, *gradients(y, (s,))

    assert_alike(backend, which, ["_group_normalize_fwd", "_group_normalize_bwd"], call, atol=1e-6)


# ---- whiten.h: rows of three, one of them masked or not ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "unbiased", "scale"), [("add", True, True), ("floor", True, True), ("floor", False, True), ("add", False, False)]
)
@pytest.mark.parametrize("masked", [True, False])
@which
def test_math_parity_whiten(backend, which, mode, unbiased, scale, masked):
    values = torch.tensor(list(itertools.product(some([0.0, 1.0, -1.0, inf, nan], which), repeat=3)))
    mask = torch.ones_like(values)
    mask[:, 2] = 0 if masked else 1
    options = {"unbiased": unbiased, "eps_mode": mode, "scale_by_std": scale}

    def call():
        v = values.clone().requires_grad_()
        y = rlkern.masked_normalize(v, mask, **options)  # a block a row: few rows, for the emulator
        return y, *torch.autograd.grad(y, (v,), torch.tensor([1.0, -0.5, 0.25]).expand_as(y).contiguous())

    assert_alike(backend, which, ["_masked_normalize_fwd", "_masked_normalize_bwd"], call, atol=1e-6)
