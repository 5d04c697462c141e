# SPDX-License-Identifier: Apache-2.0
"""group_mean_std and group_normalize with nan="omit": a NaN is a row without a score. The oracles: the loop over groups,
torch.nanmean, TRL's recorded deviations, and the same call without those rows."""

import json
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern.reference import group as reference
from rlkern.testing import assert_within

# Of the nine names test_group.py has the rest: the ops are the same.
TRL = json.loads((Path(__file__).parent / "golden" / "trl_nanstd_1.16.0.json").read_text())
BASELINES = ("mean", "leave_one_out", "length_weighted")
SINGLETONS = ("raw", "zero", "nan")
LABELS = list("abacbdaabeef" * 3) + list("ghhh")
nan = float("nan")


def inputs(dtype=torch.float32, seed=0, offset=0.0):
    """A third of the scores missing: groups that begin with one, with one score left, with none."""
    g = torch.Generator().manual_seed(seed)
    s = (offset + torch.randn(len(LABELS), generator=g)).to(dtype)
    lengths = torch.randint(1, 100, (len(LABELS),), generator=g)
    missing = torch.rand(len(LABELS), generator=g) < 1 / 3
    missing[0] = True
    missing[-4:] = torch.tensor([True, True, False, True])
    return torch.where(missing, nan, s), lengths


def normalize(s, index, baseline, scale, singleton, lengths):
    n = lengths if baseline == "length_weighted" else None
    options = {"baseline": baseline, "scale_by_std": scale, "singleton": singleton, "lengths": n}
    return rlkern.group_normalize(s, index, nan="omit", **options)


def test_group_mean_std_known_values_recorded(backend):
    """TRL's nanstd of rows, and of all."""
    rows = torch.tensor([[nan if x is None else x for x in row] for row in TRL["rows"]])
    got = rlkern.group_mean_std(rows.flatten(), [0] * 3 + [1] * 3 + [2] * 3, eps=0.0, nan="omit")
    torch.testing.assert_close(got.std, torch.tensor(TRL["std"]))
    torch.testing.assert_close(got.mean, rows.nanmean(1))
    assert got.count.tolist() == [3, 3, 2]
    torch.testing.assert_close(rlkern.group_mean_std(rows.flatten(), [0] * 9, eps=0.0, nan="omit").std, torch.tensor([TRL["std_of_all"]]))


def test_group_mean_std_known_values_of_few(backend):
    s, labels = torch.tensor([nan, 5.0, nan, nan]), ["a", "a", "b", "b"]
    for singleton, mean, std in (("raw", [0.0, 0.0], [1.0, 1.0]), ("zero", [5.0, nan], [1.0, 1.0]), ("nan", [5.0, nan], [nan, nan])):
        got = rlkern.group_mean_std(s, labels, singleton=singleton, nan="omit")
        torch.testing.assert_close(torch.stack(got[:2]), torch.tensor([mean, std]), equal_nan=True)
        assert got.count.tolist() == [1, 0]
        found = rlkern.group_normalize(s, labels, singleton=singleton, nan="omit", eps=0.0)
        alone = {"raw": 5.0, "zero": 0.0, "nan": nan}[singleton]
        torch.testing.assert_close(found, torch.tensor([nan, alone, nan, nan]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference(backend, dtype):
    index = rlkern.group_index(LABELS)
    for offset in (0.0, 100.0):
        s, lengths = inputs(dtype, offset=offset)
        for singleton in SINGLETONS:
            exact = reference.mean_std_loop(s.double(), index.ids, True, 1e-6, singleton, True)
            framework = reference.mean_std_loop(s, index.ids, True, 1e-6, singleton, True)
            got = rlkern.group_mean_std(s, index, singleton=singleton, nan="omit")
            for a, b, c in zip(got, framework, exact, strict=False):
                assert_within(a, b, c, s.nan_to_num().abs().max(), f"{dtype} {singleton}")
            for baseline in BASELINES:
                for scale in (True, False):
                    args = (lengths, index.ids, baseline, scale, True, 1e-6, singleton, True)
                    exact_y, framework_y = reference.normalize_loop(s.double(), *args), reference.normalize_loop(s, *args)
                    y = normalize(s, index, baseline, scale, singleton, lengths)
                    size = 4 * s.nan_to_num().abs().max() * (1 + exact_y.nan_to_num().abs().max())
                    assert_within(y, framework_y, exact_y, size, f"{dtype} {baseline} {scale} {singleton}")


@pytest.mark.parametrize("baseline", BASELINES)
def test_grad_matches_reference(backend, baseline):
    """The gradient of the rows that have a score is that of the same call without the others; those get 0."""
    s, lengths = inputs(torch.float64)
    there = ~s.isnan()
    few = [label for label, keep in zip(LABELS, there, strict=True) if keep]
    for scale in (True, False):
        for singleton in ("raw", "zero"):
            x, y = s.clone().requires_grad_(), s[there].clone().requires_grad_()
            weights = torch.arange(len(s)).double().cos()
            (normalize(x, LABELS, baseline, scale, singleton, lengths)[there] * weights[there]).sum().backward()
            n = lengths[there] if baseline == "length_weighted" else None
            options = {"baseline": baseline, "scale_by_std": scale, "singleton": singleton, "lengths": n}
            (rlkern.group_normalize(y, few, **options) * weights[there]).sum().backward()
            torch.testing.assert_close(x.grad[there], y.grad, rtol=1e-9, atol=1e-12)
            assert not x.grad[~there].any()
            whole = (~s.isnan()).double()
            x.grad = None
            got = rlkern.group_mean_std(x, LABELS, singleton=singleton, nan="omit")
            (got.std.nan_to_num().sum() + got.mean.nan_to_num().sum()).backward()
            assert not (x.grad * (1 - whole)).any()
            assert x.grad.isfinite().all()


def test_gradcheck(backend):
    s, lengths = inputs(torch.float64)
    there = ~s.isnan()

    def op(x):
        return normalize(s.masked_scatter(there, x), LABELS, "length_weighted", True, "raw", lengths)[there]

    assert torch.autograd.gradcheck(op, (s[there].requires_grad_(),))
    assert torch.autograd.gradgradcheck(op, (s[there].requires_grad_(),))


def test_properties(backend):
    """Rows without a score change nothing; equal scores deviate by 0; without NaN both rules give the same bits."""
    s, lengths = inputs()
    there = ~s.isnan()
    few = [label for label, keep in zip(LABELS, there, strict=True) if keep]
    for baseline in BASELINES:
        n = lengths if baseline == "length_weighted" else None
        y = normalize(s, LABELS, baseline, True, "raw", lengths)
        assert y[~there].isnan().all()
        plain = rlkern.group_normalize(s[there], few, baseline=baseline, lengths=None if n is None else n[there])
        torch.testing.assert_close(y[there], plain, rtol=1e-6, atol=1e-7)
        full = s.nan_to_num()
        a = rlkern.group_normalize(full, LABELS, baseline=baseline, lengths=n)
        assert torch.equal(a, rlkern.group_normalize(full, LABELS, baseline=baseline, lengths=n, nan="omit"))
    same = torch.where(there, 1000.1, nan)
    assert not rlkern.group_normalize(same, LABELS, singleton="zero", nan="omit")[there].any()
    assert normalize(torch.full((40,), nan), LABELS, "mean", True, "raw", lengths).isnan().all()
    assert rlkern.group_normalize(torch.empty(0), [], nan="omit").shape == (0,)


def test_rejects(backend):
    for op in (rlkern.group_mean_std, rlkern.group_normalize):
        with pytest.raises(ValueError, match=rf"rlkern\.{op.__name__}: nan must be one of 'propagate', 'omit'; got 'ignore'"):
            op(torch.ones(2), [0, 0], nan="ignore")


def test_registers(backend_number):
    index = rlkern.group_index(LABELS)
    s, lengths = inputs()
    s = s.nan_to_num()  # opcheck compares by equality
    rest = (index.ids, index.order, index.offsets, True, 1e-6, "raw", True, backend_number)
    torch.library.opcheck(torch.ops.rlkern._group_mean_std_fwd.default, (s, *rest))
    rest = (index.ids, index.order, index.offsets, "length_weighted", True, True, 1e-6, "raw", True, backend_number)
    torch.library.opcheck(torch.ops.rlkern._group_normalize_bwd.default, (torch.ones_like(s), s, lengths, *rest))
