# SPDX-License-Identifier: Apache-2.0
"""The outcome estimators of rlkern.advantages: one number a row, normalized in its group. The oracles: hand arithmetic, verl's
recorded outputs, the estimators written out group by group, and laws."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import advantages, backends
from rlkern.advantages import ESTIMATORS, estimator
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

# Names of the nine that no estimator has, and why.
NOT_HERE = {
    "grad_matches_reference": "estimators run without autograd, as in verl: test_estimators_are_detached",
    "gradcheck": "the same; the ops beneath have gradients (test_group.py)",
}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
NAMES = ("grpo", "grpo_nostd", "rloo", "opo", "reinforce_plus_plus_baseline")


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = [f"p{i}" for i in torch.randint(0, max(B // 3, 1), (B,), generator=g).tolist()]
    return {"rewards": torch.randn(B, T, generator=g).to(dtype), "mask": ragged_mask(B, T, 0.2, seed, mask_dtype), "labels": labels}


def call(name, x, **kw):
    args = (x["rewards"], x["mask"], x["labels"])
    if name == "grpo_nostd":
        return advantages.grpo(*args, norm_adv_by_std_in_grpo=False, **kw)
    return getattr(advantages, name)(*args, **kw)


def whitened(a, valid):
    x = a[valid]
    return torch.where(valid, (a - x.mean()) * (x.var() + 1e-8).rsqrt(), 0.0)


def specified(name, x, dtype):
    """Row sums, group by group, broadcast."""
    scores, valid = x["rewards"].to(dtype).sum(1), x["mask"] != 0
    lengths = valid.sum(1).to(dtype)
    value = scores.clone()
    for label in set(x["labels"]):
        rows = torch.tensor([i for i, other in enumerate(x["labels"]) if other == label])
        s, n, k = scores[rows], lengths[rows], len(rows)
        if k == 1:
            value[rows] = s / (1 + 1e-6) if name == "grpo" else s
        elif name == "rloo":
            value[rows] = (s - s.mean()) * k / (k - 1)
        elif name == "opo":
            value[rows] = s - (n * s).sum() / n.sum()
        else:
            value[rows] = (s - s.mean()) / (s.std() + 1e-6) if name == "grpo" else s - s.mean()
    a = torch.where(valid, value[:, None], 0.0)
    if name == "reinforce_plus_plus_baseline":
        a = whitened(a, valid)
    return a


def scale_of(name, x, exact):
    """The terms that a result adds up: the sum of a row, over the deviation that divides it."""
    rows = x["rewards"].double().abs().sum(1).max()
    plain = specified("grpo_nostd", x, torch.float64)
    if name == "grpo":
        ratio = exact.abs() / plain.abs()
        return rows * ratio[ratio.isfinite()].max()
    return rows / plain[x["mask"] != 0].std() + exact.abs().max() if name == "reinforce_plus_plus_baseline" else rows


def assert_specified(name, x, what):
    exact = specified(name, x, torch.float64)
    got = call(name, x)
    assert got.returns is got.advantages
    assert_within(got.advantages, specified(name, x, x["rewards"].dtype), exact, scale_of(name, x, exact), f"{name}: {what}")


def test_known_values_by_hand(backend):
    # two prompts of two, one alone; a reward on a masked token (row 1) counts: s = 1, 0, 3, 1, 2
    r = torch.tensor([[0.0, 1.0, 0], [0.5, -0.5, 0], [3.0, 0, 0], [0, 0, 1.0], [2.0, 0, 0]])
    m = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]])
    labels = np.array(["a", "a", "b", "b", "c"], dtype=object)

    def rows(*values):
        return torch.tensor(values)[:, None] * m

    def close(got, *values):
        torch.testing.assert_close(got.advantages, rows(*values))
        assert got.returns is got.advantages

    half = 0.5**0.5
    close(advantages.grpo(r, m, labels), half, -half, half, -half, 2.0)
    close(advantages.grpo(r, m, labels, 1e-6, False), 0.5, -0.5, 1.0, -1.0, 2.0)
    close(advantages.grpo(r, m, labels, epsilon=1.0), 0.5 / (1 + half), -0.5 / (1 + half), 1 / (1 + 2**0.5), -1 / (1 + 2**0.5), 1.0)
    close(advantages.rloo(r, m, labels), 1.0, -1.0, 2.0, -2.0, 2.0)
    close(advantages.opo(r, m, labels), 1 - 2 / 3, -2 / 3, 3 - 11 / 5, 1 - 11 / 5, 2.0)
    # d = .5 .5 -.5 1 1 1 -1 -1 2 over the nine valid tokens: sum 3.5, squares 9.75
    std = ((9.75 - 3.5**2 / 9) / 8) ** 0.5
    close(advantages.reinforce_plus_plus_baseline(r, m, labels), *((d - 3.5 / 9) / std for d in (0.5, -0.5, 1.0, -1.0, 2.0)))


@pytest.mark.parametrize("name", NAMES)
def test_known_values_recorded(backend, name):
    inp, recorded = GOLDEN["inputs"], GOLDEN["adv_estimators(gamma=0.97,lam=0.9)"][name]
    x = {"rewards": torch.tensor(inp["token_level_rewards"]), "mask": torch.tensor(inp["mask"]), "labels": inp["index"]}
    torch.testing.assert_close(call(name, x).advantages, torch.tensor(recorded["advantages"]), rtol=1e-5, atol=1e-6)


def test_known_values_of_equal_rewards(backend):
    """verl's float32 mean leaves up to 0.95 here; the truth is 0."""
    for reward, k in ((3.3, 12), (1000.1, 16)):
        r = torch.zeros(k, 4)
        r[:, 2] = reward
        assert not call("grpo", {"rewards": r, "mask": torch.ones(k, 4), "labels": [0] * k}).advantages.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference(backend, name, dtype):
    for mask_dtype in mask_kinds():
        x = inputs(9, 83, dtype, mask_dtype)
        assert_specified(name, x, f"{dtype} {mask_dtype}")
        assert call(name, x).advantages.dtype == (torch.promote_types(dtype, mask_dtype) if mask_dtype.is_floating_point else dtype)


def test_matches_reference_near_constant(backend):
    x = inputs(48, 40)
    x["rewards"] = torch.zeros(48, 40)
    x["rewards"][:, 39] = 100 + 0.1 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        exact = specified(name, x, torch.float64)
        assert_within(call(name, x).advantages, exact, exact, exact.abs(), name)  # no room but the result's own rounding


@pytest.mark.skipif(backends.native is None, reason=backends.native_error)
@pytest.mark.parametrize("isa", [k for k, ok in backends.native.isas().items() if ok] if backends.native else [])
def test_matches_reference_on_each_isa(isa):
    with rlkern.use_backend(f"cpp:{isa}"):
        for name in NAMES:
            for mask_dtype in (torch.int64, torch.bool, torch.float32):
                for dtype in (torch.float32, torch.float64):
                    assert_specified(name, inputs(9, 83, dtype, mask_dtype), f"{isa} {dtype} {mask_dtype}")


@pytest.mark.parametrize("name", NAMES)
def test_ignores_masked(backend, name):
    x = inputs(12, 40)
    x["labels"] = ["a", "b", "c", "d"] * 3
    clean = call(name, x).advantages
    assert not clean[x["mask"] == 0].any()
    assert not clean[x["mask"] == 0].signbit().any()
    # rewards are read everywhere: NaN on a masked token shows at its group's valid tokens, and nowhere else
    x["mask"][0, 39], x["mask"][:, 0] = 0, 1
    clean = call(name, x).advantages
    x["rewards"] = x["rewards"].clone()
    x["rewards"][0, 39] = torch.nan
    got = call(name, x).advantages
    assert (got[x["mask"] == 0] == 0).all()
    valid = x["mask"] != 0
    if name == "reinforce_plus_plus_baseline":  # the batch is whitened with it
        assert got[valid].isnan().all()
        return
    assert got[::4][valid[::4]].isnan().all()
    for i in (1, 2, 3):
        assert torch.equal(got[i::4], clean[i::4])
    # NaN in a row without a valid token still is in its group
    x["mask"][0] = 0
    got = call(name, x).advantages
    assert (got[0] == 0).all()
    assert got[4][valid[4]].isnan().all()


def test_ignores_masked_groups(backend):
    """A group without a valid token: zeros, where verl's 0 / 0 fills its rows with NaN."""
    r, m = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0, 0], [0, 0], [1, 1]])
    assert advantages.opo(r, m, ["a", "a", "b"]).advantages.tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]


def test_ignores_masked_weights(backend):
    """Any nonzero mask counts 1 here; verl multiplies by it."""
    x = inputs(9, 40)
    half = {**x, "mask": x["mask"].float() * 0.5}
    for name in NAMES:
        torch.testing.assert_close(call(name, half).advantages, call(name, x).advantages, rtol=0, atol=0)


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_edge_shapes(backend, B, T, why):
    x = inputs(B, T)
    for name in NAMES:
        for mask in (x["mask"], torch.ones_like(x["mask"])):
            y = {**x, "mask": mask}
            if mask.sum() <= 1 and name == "reinforce_plus_plus_baseline":
                with pytest.raises(ValueError, match="the mask must"):
                    call(name, y)
            elif B and T:
                assert_specified(name, y, why)
            else:
                assert call(name, y).advantages.shape == (B, T)


def test_edge_shapes_beyond_the_chip(backend):
    """More tokens, of unlike dtypes, than a small chip keeps masks of; groups that a whole block takes."""
    x = inputs(2, 17000, mask_dtype=torch.float64)
    assert_specified("opo", {**x, "mask": x["mask"] != 0}, "long rows")
    got = advantages.rloo(x["rewards"], x["mask"], x["labels"]).advantages
    torch.testing.assert_close(got, specified("rloo", x, torch.float64), rtol=1e-5, atol=1e-4)
    x = inputs(260, 3) | {"labels": [i % 2 for i in range(260)]}
    for name in NAMES:
        assert_specified(name, x, "large groups")


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_masks_and_strides(backend, name):
    x = inputs(10, 70)
    expected = call(name, x).advantages
    wide, transposed = torch.full((10, 99), torch.nan), x["mask"].t().contiguous().t()
    strided = {**x, "rewards": wide[:, 9:79].copy_(x["rewards"]), "mask": transposed}
    assert torch.equal(call(name, strided).advantages, expected)
    with warnings.catch_warnings():  # torch warns of memory that it could not write
        warnings.simplefilter("ignore")
        fixed = {
            k: torch.from_numpy(np.frombuffer(x[k].numpy().tobytes(), x[k].numpy().dtype).reshape(10, 70)) for k in ("rewards", "mask")
        }
    assert torch.equal(call(name, {**x, **fixed}).advantages, expected)
    # one reward a row by stride 0, and a mask of one row for all
    row = torch.linspace(-1, 1, 10)[:, None]
    flat = {**x, "rewards": row.expand(10, 70), "mask": x["mask"][:1].expand(10, 70)}
    full = {**x, "rewards": row.repeat(1, 70), "mask": x["mask"][:1].repeat(10, 1)}
    torch.testing.assert_close(call(name, flat).advantages, call(name, full).advantages, rtol=1e-6, atol=1e-7)
    # a row that is masked whole gives 0 and still is in its group; a wholly masked batch
    x["mask"][0] = 0
    assert_specified(name, x, "a masked row")
    x["mask"].zero_()
    if name != "reinforce_plus_plus_baseline":
        assert not call(name, x).advantages.any()
        return
    with pytest.raises(ValueError, match="the mask must select at least one value"):
        call(name, x)


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_out(backend, name):
    x = inputs(10, 70)
    out = torch.full((10, 80), torch.nan)[:, :70]
    got = call(name, x, out=out)
    assert got.advantages is got.returns is out
    assert torch.equal(out, call(name, x).advantages)


@pytest.mark.parametrize("name", NAMES)
def test_estimators_are_detached(backend, name):
    x = inputs(10, 70)
    before = {k: x[k].clone() for k in ("rewards", "mask")}
    expected = call(name, x).advantages
    assert all(torch.equal(x[k], v) and x[k]._version == 0 for k, v in before.items())
    got = call(name, {**x, "rewards": x["rewards"].clone().requires_grad_()}).advantages
    assert not got.requires_grad
    assert torch.equal(got, expected)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6), st.floats(-5, 5), st.floats(0.1, 10))
def test_properties(B, T, seed, shift, factor):
    x = inputs(B, T, torch.float64, seed=seed)
    x["mask"][:, 0] = 1  # every row has its value in column 0
    x["mask"][:, T - 1] = 1
    _, inverse, counts = np.unique(x["labels"], return_inverse=True, return_counts=True)
    many = torch.tensor(counts[inverse] > 1)
    moved = {**x, "rewards": factor * x["rewards"]}
    moved["rewards"][:, 0] += shift
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = {k: v[order] if isinstance(v, torch.Tensor) else [f"other {v[i]}" for i in order] for k, v in x.items()}
    padded = {k: torch.nn.functional.pad(v, (0, 7)) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in x.items()}

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)

    for name in NAMES:
        if name == "reinforce_plus_plus_baseline" and x["mask"].sum() < 2:
            continue
        a = call(name, x).advantages
        close(call(name, permuted).advantages, a[order])
        close(call(name, padded).advantages[:, :T], a)
        if name == "reinforce_plus_plus_baseline":  # whitened: mean 0, variance 1 (or no spread at all)
            valid = a[x["mask"] != 0]
            close(valid.mean(), torch.zeros((), dtype=torch.float64))
            assert float(valid.abs().max()) < 1e-3 or abs(float(valid.var()) - 1) < 1e-3
            continue
        value, after = a[:, 0], call(name, moved).advantages[:, 0]
        weights = (x["mask"] != 0).sum(1).double() if name == "opo" else torch.ones(B, dtype=torch.float64)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add(
            0, torch.from_numpy(inverse), torch.where(many, weights * value, 0.0)
        )
        close(sums, torch.zeros_like(sums))
        if name == "grpo":  # up to the epsilon beside the deviation
            torch.testing.assert_close(after[many], value[many], rtol=1e-3, atol=1e-3)
        else:
            close(after[many], factor * value[many])


def test_properties_threads_and_runs(backend):
    before = torch.get_num_threads()
    try:
        for B, T in ((70, 2500), (512, 512))[: 2 if backend in ("torch", "cpp") else 1]:  # of its programs all are alike
            x = inputs(B, T)
            found = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                found.append([call(name, x).advantages for name in NAMES])
            same = torch.equal if backend == "cpp" else torch.allclose
            assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_properties_labels(backend):
    """Every form of the same partition gives the same bits."""
    x = inputs(24, 33)
    ids, labels = rlkern.group_index(x["labels"]), x["labels"]
    forms = [labels, np.array(labels, dtype=object), np.array(labels), tuple(labels)]
    forms += [ids, ids.ids, (ids.ids * 7919 - 5).numpy(), ids.ids.half() / 2]
    for name in NAMES:
        first, *others = (call(name, {**x, "labels": form}).advantages for form in forms)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "reinforce_plus_plus_baseline"])
def test_rejects(backend, name):
    x = inputs(4, 5)
    r, m, labels = x["rewards"], x["mask"], x["labels"]

    def check(kind, words, *args, head=rf"rlkern\.advantages\.{name}: ", **kw):
        with pytest.raises(kind, match=head + words):
            getattr(advantages, name)(*args, **kw)

    check(ValueError, r"response_mask must have the shape \(4, 5\)", r, m[:, :4], labels)
    check(ValueError, r"index must have 4 labels, one a row; got 3", r, m, labels[:3])
    check(ValueError, r"index must have 4 labels, one a row; got 5", r, m, rlkern.group_index([*labels, "x"]))
    check(ValueError, r"token_level_rewards must be \(B, T\)", r[0], m[0], labels)
    check(TypeError, r"token_level_rewards must be a torch\.Tensor", r.numpy(), m, labels)
    check(TypeError, r"token_level_rewards must be float32", m, m, labels)
    check(TypeError, r"response_mask must be bool", r, m.to(torch.int16), labels)
    check(ValueError, r"out must be", r, m, labels, out=torch.empty(4, 6))
    labels_must = r"rlkern\.group_index: labels must "
    check(TypeError, "be hashable", r, m, [[1], [2], [3], [4]], head=labels_must)
    check(ValueError, "hold no NaN", r, m, np.array([1.0, 2.0, 3.0, np.nan]), head=labels_must)
    check(TypeError, "be a 1-D array", r, m, "abcd", head=labels_must)
    if name == "grpo":
        check(ValueError, r"epsilon must be in", r, m, labels, -1e-6)
    if name == "reinforce_plus_plus_baseline":
        one = torch.zeros_like(m)
        check(ValueError, "the mask must select at least one value; got a mask whose sum is 0", r, one, labels)
        one[2, 3] = 1
        check(ValueError, "the mask must have a sum other than 1", r, one, labels)


def test_rejects_unknown_names():
    assert estimator("grpo") is estimator("verl/grpo") is advantages.grpo
    names = "gae gdpo gpg grpo grpo_passk grpo_vectorized opo optimal_token_baseline reinforce_plus_plus"
    names += " reinforce_plus_plus_baseline remax rloo rloo_vectorized tir_optimal_token_baseline"
    assert sorted(name.partition("/")[2] for name in ESTIMATORS if name.startswith("verl/")) == names.split()
    for name in ("ppo", "openrlhf/ppo"):
        with pytest.raises(ValueError, match=r"rlkern\.advantages\.estimator: name must be one of .*verl/gae, .*; got"):
            estimator(name)


def test_registers(backend_number):
    x = inputs(6, 20)
    index = rlkern.group_index(x["labels"])
    for baseline, scale, whiten in (
        ("mean", True, None),
        ("length_weighted", False, None),
        ("mean", False, [True, False, True, True, True]),
    ):
        group = (index.ids, index.order, index.offsets, None)
        args = (x["rewards"], x["mask"], *group, baseline, scale, 1e-6, "raw", whiten, 1e-8, None, None, 0.0, backend_number)
        torch.library.opcheck(torch.ops.rlkern._group_advantage_fwd.default, args)


@pytest.mark.parametrize("name", NAMES)
def test_registers_compiled(backend, name):
    torch._dynamo.reset()
    x = inputs(6, 20)

    def step(rewards, mask, index):
        return call(name, {"rewards": rewards, "mask": mask, "labels": index}).advantages

    args = (x["rewards"].requires_grad_(), x["mask"], rlkern.group_index(x["labels"]))
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))
