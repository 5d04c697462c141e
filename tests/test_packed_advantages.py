# SPDX-License-Identifier: Apache-2.0
"""Packed rows (cu_seqlens) give what the same rows give padded: every estimator of rlkern.advantages."""

import pytest
import torch

import rlkern
from rlkern import advantages
from rlkern.testing import assert_within, mask_kinds

# Names of the nine that no estimator has: test_outcome_advantages.py says why.
LENGTHS = [5, 0, 33, 1, 300, 40, 16, 0]  # an empty row between others and at the end; less than a vector, one, many and a rest
ESTIMATORS = {
    "gae": lambda x, **kw: advantages.gae(x["rewards"], x["values"], x["mask"], 0.97, 0.9, **kw),
    "grpo": lambda x, **kw: advantages.grpo(x["rewards"], x["mask"], x["labels"], **kw),
    "rloo": lambda x, **kw: advantages.rloo(x["rewards"], x["mask"], x["labels"], **kw),
    "opo": lambda x, **kw: advantages.opo(x["rewards"], x["mask"], x["labels"], **kw),
    "reinforce_plus_plus": lambda x, **kw: advantages.reinforce_plus_plus(x["rewards"], x["mask"], 0.97, **kw),
    "reinforce_plus_plus reset": lambda x, **kw: advantages.reinforce_plus_plus(x["rewards"], x["mask"], 0.97, masked="reset", **kw),
    "reinforce_plus_plus_baseline": lambda x, **kw: advantages.reinforce_plus_plus_baseline(x["rewards"], x["mask"], x["labels"], **kw),
    "remax": lambda x, **kw: advantages.remax(x["rewards"], x["baselines"], x["mask"], **kw),
}
WHITENED = [name for name in ESTIMATORS if name == "gae" or name.startswith("reinforce")]
BY_GROUP = ("grpo", "rloo", "opo", "reinforce_plus_plus_baseline")
estimators = pytest.mark.parametrize("name", ESTIMATORS)


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=dtype)


def inside(lengths):
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]


def batch(lengths, dtype=torch.float32, mask_dtype=torch.int64, weights=False):
    """A padded batch and the same packed. Rewards are quarters: their sums are exact in any order."""
    g = torch.Generator().manual_seed(0)
    here = inside(lengths)
    mask = (torch.rand(here.shape, generator=g) < 0.7) & here
    padded = {
        "rewards": torch.where(here, torch.randint(-8, 9, here.shape, generator=g) / 4, 0.0).to(dtype),
        "values": torch.where(here, 3 * torch.randn(here.shape, generator=g), 0.0).to(dtype),
        "mask": (mask * (1 + torch.arange(here.shape[1]) % 3 if weights else 1)).to(mask_dtype),
    }
    rows = {"labels": [i % 3 for i in range(len(lengths))], "baselines": torch.randn(len(lengths), generator=g).to(dtype)}
    return {**padded, **rows}, {**{k: x[here] for k, x in padded.items()}, **rows}


def same(a, b, what=""):
    assert a.dtype == b.dtype, what
    assert torch.equal(a, b), what


def test_estimators_known_values(backend):
    r, m = torch.tensor([0.0, 1.0, 0.5, 2.0]), torch.tensor([1, 1, 1, 0])
    cu = torch.tensor([0, 2, 2, 3, 4])  # scores 1 and 0.5 in a group, 0 and 2 in another
    index = ["a", "b", "a", "b"]
    assert advantages.rloo(r, m, index, cu_seqlens=cu).advantages.tolist() == [0.5, 0.5, -0.5, 0]
    assert advantages.grpo(r, m, index, 0.0, False, cu_seqlens=cu).advantages.tolist() == [0.25, 0.25, -0.25, 0]
    assert advantages.opo(r, m, ["a"] * 4, cu_seqlens=cu).advantages.tolist() == pytest.approx([1 / 6, 1 / 6, -1 / 3, 0])
    got = advantages.remax(r, torch.tensor([0.5, 9.0, 1.0, 9.0]), m, cu_seqlens=cu)
    assert [x.tolist() for x in got] == [[0.5, 0.5, -0.5, 0], [1, 1, 0.5, 0]]
    assert advantages.reinforce_plus_plus(r, m, 0.5, cu_seqlens=cu).returns.tolist() == [0.5, 1, 0.5, 0]
    assert advantages.gae(r, torch.zeros(4), m, 0.5, 1.0, cu_seqlens=cu).returns.tolist() == [0.5, 1, 0.5, 0]


@estimators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_estimators_match_reference(backend, name, dtype):
    """To the bit, as the sums of quarters are; sums of any rewards to their rounding."""
    for mask_dtype in mask_kinds():
        padded, packed = batch(LENGTHS, dtype, mask_dtype, mask_dtype != torch.bool)
        expected = ESTIMATORS[name](padded)
        for index in (packed["labels"], rlkern.group_index(packed["labels"])):
            got = ESTIMATORS[name]({**packed, "labels": index}, cu_seqlens=offsets(LENGTHS, torch.int32))
            for a, b in zip(got, expected, strict=True):
                same(a, b[inside(LENGTHS)], f"{name}, mask {mask_dtype}")
    padded, packed = ({**x, "rewards": x["values"]} for x in (padded, packed))
    within(ESTIMATORS[name], padded, ESTIMATORS[name](packed, cu_seqlens=offsets(LENGTHS)), inside(LENGTHS))


def within(call, padded, got, where=...):
    """`got` is the padded call's answer, inside the budget."""
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in padded.items()}
    own = call(padded)
    for a, b, c in zip(got, own, call(exact), strict=True):
        assert_within(a, b[where], c[where], scale=c.abs().max())


@estimators
def test_estimators_ignore_masked(backend, name):
    """What is not read where masked (gae, reinforce_plus_plus, remax), and NaN of another group."""
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    clean = ESTIMATORS[name](x, cu_seqlens=cu)
    if name in ("gae", "reinforce_plus_plus", "remax"):
        dirty = {**x, "rewards": torch.where(x["mask"] != 0, x["rewards"], torch.nan)}
        for a, b in zip(ESTIMATORS[name](dirty, cu_seqlens=cu), clean, strict=True):
            same(a, b)
    if name in ("grpo", "rloo", "opo"):
        dirty = {**x, "rewards": x["rewards"].clone()}
        dirty["rewards"][cu[2]] = torch.nan  # row 2, as rows 5 the group of label 2
        row = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        hit, got = row % 3 == 2, ESTIMATORS[name](dirty, cu_seqlens=cu).advantages
        same(got[~hit], clean.advantages[~hit])
        assert (got[hit].isnan() == (x["mask"][hit] != 0)).all()


@estimators
def test_estimators_edge_shapes(backend, name):
    for lengths in ([], [0], [0, 0, 0], [1], [7], [0, 7, 0], [2] * 20, [17000, 3]):
        padded, packed = batch(lengths)
        cu = offsets(lengths)
        padded["mask"], packed["mask"] = inside(lengths).long(), torch.ones_like(packed["mask"])
        if sum(lengths) < 2 and name in WHITENED:
            with pytest.raises(ValueError, match="the mask must"):
                ESTIMATORS[name](packed, cu_seqlens=cu)
            continue
        got = ESTIMATORS[name](packed, cu_seqlens=cu)
        for a, b in zip(got, ESTIMATORS[name](padded) if lengths else got, strict=True):
            same(a, b[inside(lengths)] if lengths else packed["rewards"], lengths)
    packed, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    expected = ESTIMATORS[name](packed, cu_seqlens=cu)
    strided = {k: v.repeat_interleave(2)[::2] if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    out = tuple(torch.full_like(x, torch.nan) for x in expected)
    for got in (ESTIMATORS[name](strided, cu_seqlens=cu), ESTIMATORS[name](packed, cu_seqlens=cu, out=out[0] if name in BY_GROUP else out)):
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    assert got[0] is out[0]


@estimators
def test_estimators_edge_shapes_threads(backend, name):
    lengths = [70000, 0, 3, 90001, 5]
    x, cu, threads, found = batch(lengths)[1], offsets(lengths), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(ESTIMATORS[name](x, cu_seqlens=cu))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        if backend == "cpp":  # torch adds in an order of its own
            same(a, b)
    within(lambda y: ESTIMATORS[name](y, cu_seqlens=cu), x, found[1])


@estimators
def test_estimators_properties(backend, name):
    """Rows may come in any order."""
    x, order = batch(LENGTHS)[1], torch.tensor([7, 3, 5, 0, 2, 6, 1, 4])
    parts = torch.arange(sum(LENGTHS)).split(LENGTHS)
    tokens = torch.cat([parts[i] for i in order])
    moved = {k: v[tokens] if isinstance(v, torch.Tensor) and k != "baselines" else v for k, v in x.items()}
    moved["labels"], moved["baselines"] = [x["labels"][i] for i in order], x["baselines"][order]
    got = ESTIMATORS[name](moved, cu_seqlens=offsets([LENGTHS[i] for i in order]))
    within(lambda y: ESTIMATORS[name](y, cu_seqlens=offsets(LENGTHS)), x, got, tokens)


@estimators
def test_estimators_reject(backend, name):
    (padded, x), cu, op = batch(LENGTHS), offsets(LENGTHS), rf"rlkern\.advantages\.{name.split()[0]}: "
    with pytest.raises(ValueError, match=op + r"token_level_rewards must be \(N,\) with cu_seqlens; got"):
        ESTIMATORS[name](padded, cu_seqlens=cu)
    with pytest.raises(ValueError, match=op + r"token_level_rewards must be \(B, T\); got .* cu_seqlens"):
        ESTIMATORS[name](x)
    with pytest.raises(ValueError, match=op + "cu_seqlens must run from 0 to 395 without falling; got"):
        ESTIMATORS[name](x, cu_seqlens=cu + 1)
    with pytest.raises(ValueError, match=op + "response_mask must have the shape"):
        ESTIMATORS[name]({**x, "mask": x["mask"][1:]}, cu_seqlens=cu)
    fewer = {**x, "labels": x["labels"][1:], "baselines": x["baselines"][1:]}
    if name == "remax":
        with pytest.raises(ValueError, match=op + r"reward_baselines must have the shape \(8,\)"):
            ESTIMATORS[name](fewer, cu_seqlens=cu)
    elif name in BY_GROUP:
        for index in (fewer["labels"], rlkern.group_index(fewer["labels"])):
            with pytest.raises(ValueError, match=op + "index must have 8 labels, one a row; got 7"):
                ESTIMATORS[name]({**x, "labels": index}, cu_seqlens=cu)


def test_group_advantage_registers(backend_number):
    x, cu = batch(LENGTHS)[1], offsets(LENGTHS)
    index = rlkern.group_index(x["labels"])
    for whiten in (None, [True, False, True, True, True]):
        args = (x["rewards"], x["mask"], index.ids, index.order, index.offsets, cu, "mean", False, 1e-6, "raw", whiten, 1e-8)
        args = (*args, None, None, 0.0)
        torch.library.opcheck(torch.ops.rlkern._group_advantage_fwd.default, (*args, backend_number))


@estimators
def test_estimators_register_compiled(backend, name):
    torch._dynamo.reset()
    (_, x), cu = batch(LENGTHS), offsets(LENGTHS)
    x["labels"] = rlkern.group_index(x["labels"])
    compiled = torch.compile(lambda x, cu: ESTIMATORS[name](x, cu_seqlens=cu), fullgraph=True, backend="aot_eager")(x, cu)
    for a, b in zip(compiled, ESTIMATORS[name](x, cu_seqlens=cu), strict=True):
        same(a, b)
