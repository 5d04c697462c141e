# SPDX-License-Identifier: Apache-2.0
"""verl's other outcome estimators: grpo_vectorized, grpo_passk, gdpo, rloo_vectorized, gpg; and the recorded outputs of all
fourteen. The oracles: hand arithmetic, those records, the estimators written out group by group, and laws."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import advantages, backends
from rlkern.reference import group_advantage as reference
from rlkern.testing import SHAPES, assert_within, mask_kinds, ragged_mask

# Names of the nine that no estimator has: test_outcome_advantages.py says why.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
RECORDED = GOLDEN["adv_estimators(gamma=0.97,lam=0.9)"]
NAMES = ("grpo_vectorized", "grpo_passk", "passk_nostd", "gdpo", "gdpo_components", "rloo_vectorized", "gpg")
WEIGHTS = [1.0, 0.5, 2.0]


def inputs(B, T, dtype=torch.float32, mask_dtype=torch.int64, seed=0, holes=0.2):
    """Two rows or more of each label; some scores are 0."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, T, generator=g) * (torch.arange(B) % 3 != 0)[:, None]
    scores = torch.randn(B, 3, generator=g)
    labels = [i % max(B // 3, 1) for i in range(B)]
    mask = ragged_mask(B, T, holes, seed, mask_dtype)
    return {"rewards": rewards.to(dtype), "mask": mask, "labels": labels, "scores": scores.to(dtype)}


def call(name, x, **kw):
    args = (x["rewards"], x["mask"], x["labels"])
    if name == "passk_nostd":
        return advantages.grpo_passk(*args, norm_adv_by_std_in_grpo=False, **kw)
    if name == "gdpo_components":
        return advantages.gdpo(*args, component_scores=x["scores"], component_weights=WEIGHTS, **kw)
    return getattr(advantages, name)(*args, **kw)


def of_group(name, s):
    k = len(s)
    if name == "rloo_vectorized":
        return (k * s - s.sum()) / max(k - 1, 1) * (k > 1)
    if name in ("grpo_passk", "passk_nostd"):
        return reference.best_loop(s, torch.zeros(k, dtype=torch.int64), name == "grpo_passk", 1e-6)
    mean, std = (s.mean(), s.std()) if k > 1 else (0.0, 1.0)
    return s - mean if name == "gpg" else (s - mean) / (std + 1e-6)


def specified(name, x, dtype):
    """Row sums, group by group, broadcast."""
    total, valid = x["rewards"].to(dtype).sum(1), x["mask"] != 0
    parts = list(zip(x["scores"].to(dtype).unbind(1), WEIGHTS, strict=True)) if name == "gdpo_components" else [(total, 1.0)]
    value = torch.zeros_like(total)
    for score, weight in parts:
        for label in set(x["labels"]):
            rows = torch.tensor([i for i, other in enumerate(x["labels"]) if other == label])
            value[rows] += weight * of_group(name, score[rows])
    if name == "gpg":
        value = value * len(total) / max(int((total != 0).sum()), 1)
    a = torch.where(valid, value[:, None], 0.0)
    if name.startswith("gdpo"):
        mean = a[valid].mean()
        a = torch.where(valid, (a - mean) * (a[valid].var() + 1e-8).rsqrt(), 0.0)
    return a


def assert_specified(name, x, what):
    exact, framework = (specified(name, x, dtype) for dtype in (torch.float64, x["rewards"].dtype))
    got = call(name, x)
    assert got.returns is got.advantages
    terms = x["rewards"].double().abs().sum(1).max()
    plain = specified("rloo_vectorized", x, torch.float64).abs()
    near = plain[plain > 0].min() if (plain > 0).any() else torch.ones(())
    # what divides a sum divides its error: bounded by the largest result over the smallest distance from a mean
    scale = terms * (1 + exact.abs().max() / near) if name not in ("rloo_vectorized", "gpg", "passk_nostd") else 3 * terms
    assert_within(got.advantages, framework, exact, scale, f"{name}: {what}")


def test_known_values_by_hand(backend):
    # scores 1, 0 | 3, 1 | 2; alpha of gpg: 5 rows, 4 not 0
    r = torch.tensor([[0.0, 1.0, 0], [0.5, -0.5, 0], [3.0, 0, 0], [0, 0, 1.0], [2.0, 0, 0]])
    m = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]])
    labels = ["a", "a", "b", "b", "c"]

    def close(got, *values):
        torch.testing.assert_close(got.advantages, torch.tensor(values)[:, None] * m[: len(values)])
        assert got.returns is got.advantages

    half, pairs = 0.5**0.5, (r[:4], m[:4], labels[:4])
    close(advantages.grpo_vectorized(r, m, labels), half, -half, half, -half, 2.0)
    close(advantages.grpo_vectorized(r, m, labels, 1e-6, False), 0.5, -0.5, 1.0, -1.0, 2.0)
    close(advantages.rloo_vectorized(r, m, labels), 1.0, -1.0, 2.0, -2.0, 0.0)
    close(advantages.gpg(r, m, labels), *(1.25 * x for x in (0.5, -0.5, 1.0, -1.0, 2.0)))
    close(advantages.gpg(r, m, labels, f_norm=5.0), *(0.25 * x for x in (0.5, -0.5, 1.0, -1.0, 2.0)))
    close(advantages.gpg(torch.zeros_like(r), m, labels), *[0.0] * 5)
    close(advantages.grpo_passk(*pairs, 1e-6, False), 1.0, 0.0, 2.0, 0.0)
    close(advantages.grpo_passk(*pairs, 1.0), 1 / (1 + half), 0.0, 2 / (1 + 2**0.5), 0.0)
    close(advantages.grpo_passk(r, m, [0] * 5, 1e-6, False), 0.0, 0.0, 1.0, 0.0, 0.0)
    # a = 1.5 half, -1.5 half over tokens 2, 1; the second component is constant in b
    scores = torch.tensor([[1.0, 0.0], [0.0, -1.0], [4.0, 4.0], [4.0, 4.0]])
    a = torch.tensor([1.5 * half, 1.5 * half, -1.5 * half, 0, 0, 0, 0, 0])
    white = ((a - a.mean()) / a.std()).tolist()
    got = advantages.gdpo(*pairs, component_scores=scores, component_weights=[1.0, 0.5])
    close(got, white[0], white[2], white[3], white[3])
    close(
        advantages.gdpo(*pairs, component_scores=scores[:, :1]),
        *advantages.gdpo(scores[:, :1].expand(4, 3) / 3, *pairs[1:]).advantages[:, 0],
    )


@pytest.mark.parametrize("name", RECORDED)
def test_known_values_recorded(backend, name):
    x = {k: v if k == "index" else torch.tensor(v) for k, v in GOLDEN["inputs"].items()}
    rewards, mask, index = x["token_level_rewards"], x["mask"], x["index"]
    known = {
        "gae": (x["values"], mask, 0.97, 0.9),
        "remax": (x["reward_baselines"], mask),
        "reinforce_plus_plus": (mask, 0.97),
        "grpo_passk": (mask, ["g0" if label == "solo" else label for label in index]),  # pass@k refuses a label of one row
        "grpo_nostd": (mask, index, 1e-6, False),
        "grpo_vectorized_nostd": (mask, index, 1e-6, False),
        "otb_zero_tail_no_is": (mask, index, x["old_log_probs"], x["sum_pi_squared"]),
    }
    baseline = (mask, index, x["old_log_probs"], x["sum_pi_squared"], x["rollout_is_weights"])
    args = known.get(name, baseline if name.endswith("token_baseline") else (mask, index))
    function = {"otb_zero_tail_no_is": "optimal_token_baseline"}.get(name, name.removesuffix("_nostd"))
    got = getattr(advantages, function)(rewards, *args)
    for key, value in RECORDED[name].items():
        torch.testing.assert_close(getattr(got, key), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_known_values_of_equal_rewards(backend):
    """verl's float32 mean leaves up to 0.95 here in every estimator that divides by a deviation; the truth is 0."""
    for reward, k in ((3.3, 12), (1000.1, 16)):
        x = {"rewards": torch.full((k, 1), reward), "mask": torch.ones(k, 1), "labels": [0] * k}
        for name in ("grpo_vectorized", "grpo_passk", "gdpo", "gpg", "rloo_vectorized"):
            assert not call(name, x).advantages.any(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference(backend, name, dtype):
    for mask_dtype in mask_kinds():
        x = inputs(9, 83, dtype, mask_dtype)
        assert_specified(name, x, f"{dtype} {mask_dtype}")
        assert call(name, x).advantages.dtype == (torch.promote_types(dtype, mask_dtype) if mask_dtype.is_floating_point else dtype)


@pytest.mark.skipif(backends.native is None, reason=backends.native_error)
@pytest.mark.parametrize("isa", [k for k, ok in backends.native.isas().items() if ok] if backends.native else [])
def test_matches_reference_on_each_isa(isa):
    with rlkern.use_backend(f"cpp:{isa}"):
        for name in NAMES:
            for mask_dtype in (torch.int64, torch.bool, torch.float32):
                assert_specified(name, inputs(9, 83, torch.float32, mask_dtype), f"{isa} {mask_dtype}")


@pytest.mark.parametrize("name", NAMES)
def test_ignores_masked(backend, name):
    x = inputs(12, 40)
    clean = call(name, x).advantages
    assert not clean[x["mask"] == 0].any()
    # a NaN reward counts wherever it is; of component scores alone rewards are not read
    x["mask"][0, 39], x["mask"][:, 0] = 0, 1
    clean = call(name, x).advantages
    x["rewards"] = x["rewards"].clone()
    x["rewards"][0, 39] = torch.nan
    got, valid = call(name, x).advantages, x["mask"] != 0
    if name == "gdpo_components":
        assert torch.equal(got, clean)
        x["scores"][0, 1] = torch.nan
        got = call(name, x).advantages
    assert (got[~valid] == 0).all()
    if name.startswith("gdpo"):  # the batch is whitened with it
        assert got[valid].isnan().all()
    elif "passk" in name:  # NaN is the best of its group
        assert got[0][valid[0]].isnan().all()
        assert not got[4][valid[4]].any()
    else:
        assert got[::4][valid[::4]].isnan().all()
    if not name.startswith("gdpo"):
        for i in (1, 2, 3):
            torch.testing.assert_close(
                got[i::4] if name != "gpg" else got[i::4].sign(), clean[i::4] if name != "gpg" else clean[i::4].sign()
            )


@pytest.mark.parametrize(("B", "T", "why"), SHAPES)
def test_edge_shapes(backend, B, T, why):
    x = inputs(B, T)
    for name in NAMES:
        for mask in (x["mask"], torch.ones_like(x["mask"])):
            y = {**x, "mask": mask}
            if mask.sum() <= 1 and name.startswith("gdpo"):
                with pytest.raises(ValueError, match=r"advantages\.gdpo: the mask must"):
                    call(name, y)
            elif "passk" in name and B == 1:
                with pytest.raises(ValueError, match="index must hold two rows or more of each label; got 1 labels of one row"):
                    call(name, y)
            elif B and T:
                assert_specified(name, y, why)
            else:
                assert call(name, y).advantages.shape == (B, T)


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_strides_and_out(backend, name):
    x = inputs(10, 70)
    expected = call(name, x).advantages
    wide = torch.full((10, 99), torch.nan)
    strided = {**x, "rewards": wide[:, 9:79].copy_(x["rewards"]), "mask": x["mask"].t().contiguous().t()}
    strided["scores"] = x["scores"].t().contiguous().t()
    assert torch.equal(call(name, strided).advantages, expected)
    out = torch.full((10, 80), torch.nan)[:, :70]
    got = call(name, x, out=out)
    assert got.advantages is got.returns is out
    assert torch.equal(out, expected)
    index = rlkern.group_index(x["labels"])
    assert torch.equal(call(name, {**x, "labels": index}).advantages, expected)


@pytest.mark.parametrize("name", NAMES)
def test_edge_shapes_packed(backend, name):
    """Packed rows give what the same rows give padded."""
    lengths = [5, 0, 33, 1, 300, 40, 16, 0]
    inside = torch.arange(300) < torch.tensor(lengths)[:, None]
    x = inputs(8, 300)
    x["labels"] = [0, 1, 0, 1, 0, 1, 0, 1]
    x["rewards"] = torch.where(inside, (4 * x["rewards"]).round() / 4, 0.0)  # sums are exact in any order
    x["mask"] = x["mask"] * inside
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    got = call(name, {**x, "rewards": x["rewards"][inside], "mask": x["mask"][inside]}, cu_seqlens=cu).advantages
    assert torch.equal(got, call(name, x).advantages[inside])


@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.1, 10))
def test_properties(B, T, seed, factor):
    x = inputs(B, T, torch.float64, seed=seed)
    x["mask"][:, 0] = 1
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = {k: v[order] if isinstance(v, torch.Tensor) else [f"other {v[i]}" for i in order] for k, v in x.items()}
    padded = {k: torch.nn.functional.pad(v, (0, 7)) if k in ("rewards", "mask") else v for k, v in x.items()}
    for name in NAMES:
        a = call(name, x).advantages
        torch.testing.assert_close(call(name, permuted).advantages, a[order], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(call(name, padded).advantages[:, :T], a, rtol=1e-7, atol=1e-7)
        value = a[:, 0]
        sums = torch.zeros(B, dtype=torch.float64).index_add(0, torch.tensor(x["labels"]), value)
        if "passk" in name:  # at most one row a group, and never below 0
            assert float(value.min()) >= 0
            assert int((value > 0).sum()) <= len(set(x["labels"]))
        elif name.startswith("gdpo"):
            assert abs(float(a[x["mask"] != 0].mean())) < 1e-7
        else:
            torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-7)
        if name in ("passk_nostd", "rloo_vectorized", "gpg"):
            after = call(name, {**x, "rewards": factor * x["rewards"]}).advantages
            torch.testing.assert_close(after, factor * a, rtol=1e-7, atol=1e-7)
    same = {**x, "scores": x["rewards"].sum(1, keepdim=True).repeat(1, 3)}  # one component thrice is that one
    torch.testing.assert_close(call("gdpo_components", same).advantages, call("gdpo", x).advantages, rtol=1e-5, atol=1e-5)


def test_rejects(backend):
    x = inputs(4, 5)
    args = (x["rewards"], x["mask"], x["labels"])

    def check(name, kind, words, *args, **kw):
        with pytest.raises(kind, match=rf"rlkern\.advantages\.{name}: {words}"):
            getattr(advantages, name)(*args, **kw)

    for name in ("grpo_vectorized", "grpo_passk", "gdpo", "rloo_vectorized", "gpg"):
        check(name, ValueError, r"response_mask must have the shape \(4, 5\)", x["rewards"], x["mask"][:, :4], x["labels"])
        check(name, ValueError, r"index must have 4 labels, one a row; got 3", *args[:2], x["labels"][:3])
        check(name, TypeError, r"token_level_rewards must be float32", x["mask"], *args[1:])
        check(name, ValueError, r"out must be", *args, out=torch.empty(4, 6))
    for name in ("grpo_vectorized", "grpo_passk", "gdpo"):
        check(name, ValueError, r"epsilon must be in", *args, -1e-6)
    check("gpg", ValueError, r"f_norm must be in \(0", *args, 0.0)
    pairs = "index must hold two rows or more of each label; got 2 labels of one row"
    check("grpo_passk", ValueError, pairs, *args[:2], ["a", "b", "b", "c"])
    check("gdpo", ValueError, r"component_scores must be a floating-point \(B, K\)", *args, component_scores=x["scores"][0])
    check("gdpo", ValueError, r"component_scores must have 4 rows", *args, component_scores=x["scores"][1:])
    check(
        "gdpo",
        ValueError,
        r"component_weights must be floating point of shape \(3,\)",
        *args,
        component_scores=x["scores"],
        component_weights=[1.0],
    )
    check("gdpo", ValueError, r"component_weights must come with component_scores", *args, component_weights=[1.0])
    check("gdpo", TypeError, r"component_weights must be a number", *args, component_scores=x["scores"], component_weights=["a"] * 3)


def test_registers(backend_number):
    x = inputs(6, 20)
    index = rlkern.group_index(x["labels"])
    white = [True, False, True, True, True]
    for baseline, whiten, parts in (
        ("second_best", None, (None, None, 0.0)),
        ("mean", None, (None, None, 1.0)),
        ("mean", white, (x["scores"], torch.tensor(WEIGHTS), 0.0)),
    ):
        args = (x["rewards"], x["mask"], index.ids, index.order, index.offsets, None, baseline, True, 1e-6, "raw", whiten, 1e-8, *parts)
        torch.library.opcheck(torch.ops.rlkern._group_advantage_fwd.default, (*args, backend_number))


@pytest.mark.parametrize("name", NAMES)
def test_registers_compiled(backend, name):
    torch._dynamo.reset()
    x = inputs(6, 20)

    def step(rewards, mask, scores, index):
        return call(name, {"rewards": rewards, "mask": mask, "scores": scores, "labels": index}).advantages

    args = (x["rewards"].requires_grad_(), x["mask"], x["scores"], rlkern.group_index(x["labels"]))
    got = step(*args)
    assert not got.requires_grad
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), got)
