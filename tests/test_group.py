# SPDX-License-Identifier: Apache-2.0
"""group_mean_std, group_normalize. The oracles: hand arithmetic, recorded outputs, a loop over the groups in
float64, and laws that no implementation shares."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends
from rlkern.reference import group as reference
from rlkern.testing import assert_within

# Names of the nine that an op of this file does not have, and why.
NOT_HERE = {(op, "ignores_masked"): "every score is read" for op in ("group_mean_std", "group_normalize")}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "verl_0.9.1.json").read_text())
SINGLETONS = ("raw", "zero", "nan")
BASELINES = ("mean", "leave_one_out", "length_weighted")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (labels, why)
LABELS = [
    ([], "no rows"),
    (["a"], "one row"),
    (["a"] * 9, "one giant group"),
    (list("abcdefg"), "singletons only"),
    (list("abacbdaab"), "ragged, interleaved, one singleton"),
    ([i % 7 for i in range(300)], "more rows than the table starts with"),
    (["a"] * 190 + ["b"] * 70, "groups for a block of threads each"),
    (list(range(500)), "more groups than the table starts with"),
]


def inputs(labels, dtype=torch.float32, seed=0, offset=0.0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    scores = (offset + spread * torch.randn(len(labels), generator=g, dtype=torch.float64)).to(dtype)
    return scores, torch.randint(1, 100, (len(labels),), generator=g)


def scale_of(exact, scores, divisor=1.0):
    """The result itself: half precision and float32 are computed in float64. There the terms count, the scores."""
    return exact.abs() if scores.dtype != torch.float64 else 2 * scores.abs().max() / divisor + exact.abs()


# ---- group_mean_std -------------------------------------------------------------------------------------------------
def test_group_mean_std_known_values(backend):
    scores = torch.tensor([1.0, 5.0, 3.0, 7.0, 7.0])
    got = rlkern.group_mean_std(scores, list("abacc"))
    assert got.mean.tolist() == [2.0, 0.0, 7.0]
    assert got.count.tolist() == [2, 1, 2]
    torch.testing.assert_close(got.std, torch.tensor([2**0.5, 1.0, 1e-3]))  # the floor of the variance is 1e-6
    assert rlkern.group_mean_std(scores, list("abacc"), unbiased=False).std[0] == 1.0
    assert rlkern.group_mean_std(scores, list("abacc"), eps=0.0).std[2] == 0.0
    got = rlkern.group_mean_std(scores, list("abacc"), singleton="zero")
    assert (got.mean[1], got.std[1]) == (5.0, 1.0)
    got = rlkern.group_mean_std(scores, list("abacc"), singleton="nan")
    assert got.mean[1] == 5.0
    assert got.std[1].isnan()


def test_group_mean_std_known_values_recorded(backend):
    expected = GOLDEN["group_mean_std(eps=1e-6)"]
    scores = torch.tensor(GOLDEN["inputs"]["token_level_rewards"]).sum(1)
    got = rlkern.group_mean_std(scores, expected["gidx"])
    order = [1, 0, 2]  # verl numbers its groups by the labels 0, 1, 2; here 1 appears first
    for name in ("mean", "std", "count"):
        torch.testing.assert_close(getattr(got, name)[order].float(), torch.tensor(expected[name]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("singleton", SINGLETONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_mean_std_matches_reference(backend, dtype, singleton):
    for labels, why in LABELS[1:7]:
        for offset, spread in ((0.0, 1.0), (100.0, 0.1), (3.3, 0.0), (1e4, 1.0)):
            if dtype == torch.float16 and offset > 1e3:
                continue
            scores, _ = inputs(labels, dtype, offset=offset, spread=spread)
            index = rlkern.group_index(labels)
            for unbiased in (True, False):
                kernel = rlkern.group_mean_std(scores, index, unbiased=unbiased, singleton=singleton)
                exact = reference.mean_std_loop(scores.double(), index.ids, unbiased, 1e-6, singleton)
                framework = reference.mean_std_loop(scores, index.ids, unbiased, 1e-6, singleton)
                for k, f, e in zip(kernel[:2], framework, exact, strict=True):
                    assert k.dtype == dtype
                    assert_within(k, f, e, scale_of(e, scores), f"{why} {dtype} offset {offset}")


@pytest.mark.parametrize("singleton", SINGLETONS)
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_group_mean_std_grad_matches_reference(backend, eps, singleton):
    labels = LABELS[4][0]

    def grads(fn, dtype):
        s = inputs(labels, dtype)[0].requires_grad_()
        mean, std = fn(s)
        keep = std.isfinite() if singleton == "nan" else torch.ones_like(std, dtype=torch.bool)
        return torch.autograd.grad((mean * 0.3 + std)[keep].sum(), s)[0]

    exact = grads(lambda s: autograd_mean_std(s, labels, eps, singleton), torch.float64)
    framework = grads(lambda s: autograd_mean_std(s, labels, eps, singleton), torch.float32)
    kernel = grads(lambda s: rlkern.group_mean_std(s, labels, eps=eps, singleton=singleton)[:2], torch.float32)
    assert_within(kernel, framework, exact, exact.abs() + 1, f"{singleton} {eps}")


def autograd_mean_std(scores, labels, eps, singleton):
    """Group by group, by torch's own functions."""
    groups = [[b for b, x in enumerate(labels) if x == name] for name in dict.fromkeys(labels)]
    mean = [scores[g].mean() if len(g) > 1 or singleton != "raw" else scores[g].sum() * 0 for g in groups]
    alone = scores.new_tensor(torch.nan if singleton == "nan" else 1.0)
    std = [scores[g].var().clamp(min=eps).sqrt() if len(g) > 1 else alone for g in groups]
    return torch.stack(mean), torch.stack(std)


@pytest.mark.parametrize("singleton", SINGLETONS)
def test_group_mean_std_gradcheck(backend, singleton):
    labels = LABELS[4][0]
    scores = inputs(labels, torch.float64)[0].requires_grad_()
    lone = rlkern.group_index(labels).counts == 1

    def op(s):
        mean, std, _ = rlkern.group_mean_std(s, labels, singleton=singleton)
        return mean, torch.where(lone, 0.0, std)  # NaN has no difference quotient

    assert torch.autograd.gradcheck(op, (scores,))
    assert torch.autograd.gradgradcheck(op, (scores,))


def test_group_mean_std_gradcheck_at_zero_spread(backend):
    scores = torch.full((4,), 3.3, dtype=torch.float64, requires_grad=True)
    for eps in (0.0, 1e-6):
        std = rlkern.group_mean_std(scores, [0, 0, 1, 1], eps=eps).std
        assert torch.autograd.grad(std.sum(), scores)[0].tolist() == [0.0] * 4
    y = rlkern.group_normalize(scores, [0, 0, 1, 1])
    (d,) = torch.autograd.grad(y[0], scores)  # only the first term, with q = 1 / eps
    torch.testing.assert_close(d, torch.tensor([5e5, -5e5, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(("labels", "why"), LABELS)
def test_group_mean_std_edge_shapes(backend, labels, why):
    scores, _ = inputs(labels)
    index = rlkern.group_index(labels)
    expected = rlkern.group_mean_std(scores, index)
    exact = reference.mean_std_loop(scores.double(), index.ids, True, 1e-6, "raw")
    for k, e in zip(expected[:2], exact, strict=True):
        assert_within(k, e, e, e.abs(), why)
    wide = torch.full((len(labels), 3), torch.nan)
    wide[:, 1] = scores
    for s in (wide[:, 1], read_only(scores)):
        assert all(torch.equal(a, b) for a, b in zip(rlkern.group_mean_std(s, index), expected, strict=True))
    same = torch.tensor(2.5).expand(len(labels))
    assert torch.equal(rlkern.group_normalize(same, index, singleton="zero"), torch.zeros(len(labels)))


def read_only(x):
    array = x.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 10**6), st.floats(-1e3, 1e3), st.floats(0.1, 10))
def test_group_mean_std_properties(labels, seed, shift, factor):
    scores, _ = inputs(labels, torch.float64, seed)
    index = rlkern.group_index(labels)
    options = {"eps": 0.0, "singleton": "zero"}
    mean, std, count = rlkern.group_mean_std(scores, index, **options)
    moved = rlkern.group_mean_std(factor * scores + shift, index, **options)
    torch.testing.assert_close(moved.mean, factor * mean + shift, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.std, torch.where(count > 1, factor * std, std), rtol=1e-9, atol=1e-9)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    permuted = rlkern.group_mean_std(scores[order], index.ids[order], **options)
    back = rlkern.group_index(index.ids[order]).ids
    torch.testing.assert_close(permuted.mean[back], mean[index.ids[order]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(permuted.std[back], std[index.ids[order]], rtol=1e-9, atol=1e-9)


def test_group_mean_std_rejects(backend):
    s = torch.ones(3)
    bad = rlkern.group_index(["a", "b", "a"])

    def check(kind, words, *args, **kw):
        with pytest.raises(kind, match=r"rlkern\.group_mean_std: " + words):
            rlkern.group_mean_std(*args, **kw)

    check(ValueError, r"scores must be \(B,\)", torch.ones(3, 2), [1, 2, 3])
    check(TypeError, r"scores must be a torch\.Tensor; got list", [1.0, 2.0], [1, 2])
    check(TypeError, "scores must be float32", s.long(), [1, 2, 3])
    check(ValueError, "singleton must be one of 'raw', 'zero', 'nan'; got 'one'", s, [1, 2, 3], singleton="one")
    check(ValueError, "eps must be in", s, [1, 2, 3], eps=-1e-6)
    check(TypeError, "eps must be a number", s, [1, 2, 3], eps="0")
    check(ValueError, "index must be on meta", torch.ones(3, device="meta"), bad)
    if backends.current_backend() == "cpp":
        for broken in (
            bad._replace(order=torch.tensor([0, 2, 3])),
            bad._replace(offsets=torch.tensor([0, 5, 3])),
            bad._replace(order=bad.order.int()),
        ):
            with pytest.raises(ValueError, match=r"index must be as rlkern\.group_index made it"):
                rlkern.group_mean_std(s, broken)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: rlkern.group_mean_std(x, bad).mean)(torch.ones(2, 3))


def test_group_mean_std_registers(backend_number):
    index = rlkern.group_index(list("abacbdaab"))
    scores, _ = inputs(range(9))
    rest = (index.ids, index.order, index.offsets, True, 1e-6, "raw", False, backend_number)
    torch.library.opcheck(torch.ops.rlkern._group_mean_std_fwd.default, (scores, *rest))
    torch.library.opcheck(torch.ops.rlkern._group_mean_std_bwd.default, (torch.ones(4), torch.ones(4), scores, *rest))

    def step(s, index):
        mean, std, count = rlkern.group_mean_std(s, index)
        return (mean * std * count).sum()

    assert_compiles(step, scores, index)


def assert_compiles(step, scores, index):
    torch._dynamo.reset()
    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        s = scores.clone().requires_grad_()
        value = fn(s, index)
        grads.append((value.detach(), *torch.autograd.grad(value, s)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- group_normalize ------------------------------------------------------------------------------------------------
def test_group_normalize_known_values(backend):
    s, labels = torch.tensor([1.0, 0.0, 2.0]), list("aab")
    torch.testing.assert_close(rlkern.group_normalize(s, labels), torch.tensor([0.5, -0.5, 2.0]) / torch.tensor([0.5**0.5, 0.5**0.5, 1.0]))
    assert rlkern.group_normalize(s, labels, scale_by_std=False).tolist() == [0.5, -0.5, 2.0]
    assert rlkern.group_normalize(s, labels, scale_by_std=False, singleton="zero").tolist() == [0.5, -0.5, 0.0]
    assert rlkern.group_normalize(s, labels, scale_by_std=False, singleton="nan")[2].isnan()
    assert rlkern.group_normalize(s, labels, baseline="leave_one_out", scale_by_std=False).tolist() == [1.0, -1.0, 2.0]
    torch.testing.assert_close(rlkern.group_normalize(s, labels, unbiased=False, eps=0.5), torch.tensor([0.5, -0.5, 2.0 / 1.5]))
    # lengths 3 and 1: baseline 3/4
    n = torch.tensor([3, 1, 5])
    assert rlkern.group_normalize(s, labels, baseline="length_weighted", lengths=n, scale_by_std=False).tolist() == [0.25, -0.75, 2.0]


def test_group_normalize_known_values_recorded(backend):
    inp, expected = GOLDEN["inputs"], GOLDEN["adv_estimators(gamma=0.97,lam=0.9)"]
    scores, mask = torch.tensor(inp["token_level_rewards"]).sum(1), torch.tensor(inp["mask"])
    for name, options in (
        ("grpo_vectorized", {}),
        ("grpo_vectorized_nostd", {"scale_by_std": False}),
        ("rloo_vectorized", {"baseline": "leave_one_out", "scale_by_std": False, "singleton": "zero"}),
        ("opo", {"baseline": "length_weighted", "scale_by_std": False, "lengths": mask.sum(1)}),
    ):
        got = rlkern.group_normalize(scores, inp["index"], **options)[:, None] * mask
        torch.testing.assert_close(got, torch.tensor(expected[name]["advantages"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_normalize_matches_reference(backend, dtype, baseline):
    for labels, why in LABELS[1:7]:
        for offset, spread in ((0.0, 1.0), (100.0, 0.1), (3.3, 0.0)):
            scores, lengths = inputs(labels, dtype, offset=offset, spread=spread)
            n = lengths if baseline == "length_weighted" else None
            index = rlkern.group_index(labels)
            for scale in (True, False):
                for singleton in SINGLETONS:
                    args = (n, index.ids, baseline, scale, scale, 1e-6, singleton)
                    exact = reference.normalize_loop(scores.double(), *args)
                    framework = reference.normalize_loop(scores, *args)
                    options = {"baseline": baseline, "scale_by_std": scale, "unbiased": scale, "singleton": singleton, "lengths": n}
                    kernel = rlkern.group_normalize(scores, index, **options)
                    assert kernel.dtype == dtype
                    terms = scale_of(exact, scores, spread / 3 + 1e-6 if scale else 1.0)
                    assert_within(kernel, framework, exact, terms, f"{why} {dtype} {offset} {scale} {singleton}")


def test_group_normalize_matches_reference_where_verl_does_not(backend):
    """Scores whose common offset, or equality, leaves verl's float32 nothing but rounding."""
    for scores in (torch.full((12,), 3.3), torch.full((16,), 1000.1), torch.full((12,), 3.3, dtype=torch.float64)):
        assert rlkern.group_normalize(scores, [0] * len(scores)).tolist() == [0.0] * len(scores)
    scores = torch.tensor([1e4, 1e4 + 0.5, 1e4 + 1, 1e4 + 0.25])
    torch.testing.assert_close(rlkern.group_normalize(scores, [0] * 4), rlkern.group_normalize(scores - 1e4, [0] * 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("baseline", BASELINES)
def test_group_normalize_grad_matches_reference(backend, baseline):
    labels = LABELS[4][0]
    index = rlkern.group_index(labels)
    for scale in (True, False):
        for singleton in SINGLETONS:

            def grads(fn, dtype, scale=scale, singleton=singleton):
                s, n = inputs(labels, dtype)
                n = n if baseline == "length_weighted" else None
                y = fn(s.requires_grad_(), n, scale, singleton)
                return torch.autograd.grad((y * torch.arange(len(y), dtype=dtype).cos())[y.isfinite()].sum(), s)[0]

            def loop(s, n, scale, singleton):
                return reference.normalize_loop(s, n, index.ids, baseline, scale, True, 1e-6, singleton)

            def kernel(s, n, scale, singleton):
                return rlkern.group_normalize(s, index, baseline=baseline, scale_by_std=scale, singleton=singleton, lengths=n)

            exact = grads(loop, torch.float64)
            assert_within(grads(kernel, torch.float32), grads(loop, torch.float32), exact, exact.abs() + 1, f"{scale} {singleton}")


@pytest.mark.parametrize("baseline", BASELINES)
def test_group_normalize_gradcheck(backend, baseline):
    labels = LABELS[4][0]
    scores, lengths = inputs(labels, torch.float64)
    n = lengths if baseline == "length_weighted" else None
    for scale in (True, False):
        for singleton in ("raw", "zero"):

            def op(s, scale=scale, singleton=singleton):
                return rlkern.group_normalize(s, labels, baseline=baseline, scale_by_std=scale, singleton=singleton, lengths=n)

            assert torch.autograd.gradcheck(op, (scores.requires_grad_(),))
            assert torch.autograd.gradgradcheck(op, (scores,))


@pytest.mark.parametrize(("labels", "why"), LABELS)
def test_group_normalize_edge_shapes(backend, labels, why):
    scores, lengths = inputs(labels)
    index = rlkern.group_index(labels)
    for baseline in BASELINES:
        options = {"baseline": baseline, "lengths": lengths if baseline == "length_weighted" else None}
        expected = rlkern.group_normalize(scores, index, **options)
        assert torch.equal(rlkern.group_normalize(read_only(scores), labels, **options), expected), why
        wide = torch.full((len(labels), 3), torch.nan)
        wide[:, 2] = scores
        assert torch.equal(rlkern.group_normalize(wide[:, 2], index, **options), expected)
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.float64, torch.bfloat16):
        got = rlkern.group_normalize(scores, index, baseline="length_weighted", lengths=lengths.to(dtype))
        torch.testing.assert_close(got, expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 10**6), st.floats(-1e3, 1e3), st.floats(0.1, 10))
def test_group_normalize_properties(labels, seed, shift, factor):
    scores, lengths = inputs(labels, torch.float64, seed)
    index = rlkern.group_index(labels)
    many = index.counts[index.ids] > 1
    for baseline, n in ((b, lengths if b == "length_weighted" else None) for b in BASELINES):
        options = {"baseline": baseline, "lengths": n, "singleton": "zero"}
        y = rlkern.group_normalize(scores, index, scale_by_std=False, **options)
        # the sum over a group is 0; with lengths, the weighted one
        weights = torch.ones_like(y) if n is None else n.double()
        sums = torch.zeros(len(index.counts), dtype=torch.float64).index_add(0, index.ids, weights * y)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)
        # a shift of the scores changes nothing, a factor scales; with the deviation, a factor changes nothing
        moved = rlkern.group_normalize(factor * scores + shift, index, scale_by_std=False, **options)
        torch.testing.assert_close(moved, factor * y, rtol=1e-8, atol=1e-8)
        z = rlkern.group_normalize(scores, index, eps=0.0, **options)[many]
        torch.testing.assert_close(
            rlkern.group_normalize(factor * scores + shift, index, eps=0.0, **options)[many], z, rtol=1e-7, atol=1e-7
        )
        # other rows and other names do not matter
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        other = {**options, "lengths": None if n is None else n[order]}
        permuted = rlkern.group_normalize(scores[order], [f"prompt {labels[i]}" for i in order], scale_by_std=False, **other)
        torch.testing.assert_close(permuted, y[order], rtol=1e-9, atol=1e-9)


def test_group_normalize_rejects(backend):
    s, n = torch.ones(3), torch.ones(3)

    def check(kind, words, *args, **kw):
        with pytest.raises(kind, match=r"rlkern\.group_normalize: " + words):
            rlkern.group_normalize(*args, **kw)

    check(ValueError, "baseline must be one of 'mean', 'leave_one_out', 'length_weighted'; got 'median'", s, [1, 2, 3], baseline="median")
    check(ValueError, 'lengths must be given with baseline "length_weighted"', s, [1, 2, 3], baseline="length_weighted")
    check(ValueError, 'lengths must be given with baseline "length_weighted"', s, [1, 2, 3], lengths=n)
    weighted = {"baseline": "length_weighted"}
    check(ValueError, "lengths must not require grad", s, [1, 2, 3], lengths=n.clone().requires_grad_(), **weighted)
    check(ValueError, r"lengths must have the shape \(3,\)", s, [1, 2, 3], lengths=n[:2], **weighted)
    check(TypeError, r"lengths must be a tensor of numbers; got list", s, [1, 2, 3], lengths=[1, 2, 3], **weighted)
    check(TypeError, r"lengths must be a tensor of numbers", s, [1, 2, 3], lengths=n.bool(), **weighted)
    check(ValueError, "lengths must be on cpu", s, [1, 2, 3], lengths=n.to("meta"), **weighted)
    check(ValueError, r"scores must be \(B,\)", s[None], [1])


def test_group_normalize_registers(backend_number):
    index = rlkern.group_index(list("abacbdaab"))
    scores, lengths = inputs(range(9))
    rest = (index.ids, index.order, index.offsets, "length_weighted", True, True, 1e-6, "raw", False, backend_number)
    torch.library.opcheck(torch.ops.rlkern._group_normalize_fwd.default, (scores, lengths, *rest))
    torch.library.opcheck(torch.ops.rlkern._group_normalize_bwd.default, (torch.ones(9), scores, lengths, *rest))

    def step(s, index):
        return rlkern.group_normalize(s, index, baseline="leave_one_out").square().sum()

    assert_compiles(step, scores, index)
    with pytest.raises(Exception, match=r"outside torch\.compile|group_index"):
        torch.compile(lambda s: rlkern.group_normalize(s, ["a"] * 9), fullgraph=True, backend="eager")(scores)
