# SPDX-License-Identifier: Apache-2.0
"""The modes of every framework by `loss_agg_mode` and denominators: each row of the table in docs/algorithms.md."""

import json
import pathlib

import pytest
import torch

import rlkern
from rlkern.testing import assert_within, ragged_mask

FOLDER = pathlib.Path(__file__).parent / "golden"
INPUTS = json.loads((FOLDER / "verl_0.9.1.json").read_text())["inputs"]
OPENRLHF = json.loads((FOLDER / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]
TRL_FILE = json.loads((FOLDER / "trl_1.16.0.json").read_text())
ACCUMULATION, ITEMS, WORLD, STEPS, LONGEST = 4, 60, 2, 4, 10  # of the recorded TRL cases
L = 11.0


# ---- the frameworks' formulas: a loss a token, a mask -----------------------------------------------------------------
def trl_rows(x, m):
    return ((x * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()


def openrlhf_rows(x, m, dp_size=1, global_batch_size=None):
    rows, there = (x * m).sum(-1) / (m.sum(-1) + 1e-8), (m.sum(-1) > 0).to(x.dtype)
    total = (rows * there).sum()
    return total / there.sum() if global_batch_size is None else total / global_batch_size * dp_size


def roll_rows(x, m):
    rows = torch.where(m.sum(-1) > 0, (x * m).sum(-1) / (m.sum(-1) + 1e-8), 0.0)
    return rows.mean()


# name: (the framework's formula, rlkern's arguments); both of the mask
MODES = {
    "OpenRLHF token": (lambda x, m: (x * m).sum() / m.sum(), lambda m: {}),
    "OpenRLHF token, counted": (
        lambda x, m: (x * m).sum() / 100.0 * 4,
        lambda m: {"batch_num_tokens": 100.0, "dp_size": 4},
    ),
    "OpenRLHF sample": (openrlhf_rows, lambda m: {"loss_agg_mode": "seq-mean-token-mean"}),
    "OpenRLHF sample, counted": (
        lambda x, m: openrlhf_rows(x, m, 4, 16.0),
        lambda m: {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 16.0, "dp_size": 4},
    ),
    "TRL grpo, sapo": (trl_rows, lambda m: {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": len(m)}),
    "TRL bnpo": (lambda x, m: (x * m).sum() / m.sum().clamp(min=1), lambda m: {"batch_num_tokens": m.sum().clamp(min=1)}),
    "TRL dr_grpo": (lambda x, m: (x * m).sum() / (len(m) * L), lambda m: {"batch_num_tokens": len(m) * L}),
    "TRL dr_grpo, by the norm": (
        lambda x, m: (x * m).sum() / (len(m) * L),
        lambda m: {"loss_agg_mode": "seq-mean-token-sum-norm", "global_batch_size": len(m), "loss_scale_factor": L},
    ),
    "TRL dapo, cispo, vespo": (lambda x, m: (x * m).sum() / (60 / 2 * 4 / 4), lambda m: {"batch_num_tokens": 60 / 2 * 4 / 4}),
    "TRL luspo": (lambda x, m: (x * m).sum(-1).mean(), lambda m: {"loss_agg_mode": "seq-mean-token-sum", "global_batch_size": len(m)}),
    "NeMo-RL": (lambda x, m: (x * m).sum() / (100 + 1e-8), lambda m: {"batch_num_tokens": 100 + 1e-8}),
    "AReaL": (lambda x, m: (x * m).sum() / max(int(m.sum()), 1), lambda m: {"batch_num_tokens": max(int(m.sum()), 1)}),
    "ROLL value loss": (roll_rows, lambda m: {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": len(m)}),
}


def batch(B, T, dtype=torch.float64):
    g = torch.Generator().manual_seed(B * T)
    v = torch.randn(B, T, generator=g)
    return v.to(dtype), (v + torch.randn(B, T, generator=g)).to(dtype), ragged_mask(B, T, 0.2, B)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aggregation_matches_frameworks(backend, name, dtype):
    formula, arguments = MODES[name]
    v, r, mask = batch(7, 41, dtype)
    mask[3] = 0  # a row without a token: TRL counts it, OpenRLHF does not
    found, exact, theirs = [], [], []
    for into, x, y, loss in (
        (found, v, r, lambda v, r: rlkern.value_loss(v, r, None, mask, cliprange_value=None, **arguments(mask)).loss),
        (exact, v.double(), r.double(), lambda v, r: formula(0.5 * (v - r).square(), mask)),
        (theirs, v, r, lambda v, r: formula(0.5 * (v - r).square(), mask)),
    ):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y)
        into += [value.detach(), torch.autograd.grad(value, leaf)[0]]
    assert_within(found[0], theirs[0], exact[0], exact[0], name)
    assert_within(found[1], theirs[1], exact[1], exact[1].abs(), name)


@pytest.mark.parametrize("name", ["TRL grpo, sapo", "TRL bnpo", "TRL dr_grpo", "TRL luspo", "AReaL", "ROLL value loss"])
def test_aggregation_of_nothing(backend, name):
    """Explicit denominators make the loss of an empty mask 0, as in TRL; verl's and OpenRLHF's local counts give NaN."""
    v, r, mask = batch(3, 9)
    mask.zero_()
    keywords = MODES[name][1](mask)
    assert rlkern.value_loss(v, r, None, mask, cliprange_value=None, **keywords).loss == 0
    assert rlkern.value_loss(v, r, None, mask, cliprange_value=None).loss.isnan()


def test_aggregation_by_row_denominators(backend):
    """slime divides each sample by the tokens of its group: weights a row, and token-sum."""
    v, _, mask = batch(6, 41)
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    tokens = torch.zeros(3, dtype=torch.float64).index_add(0, group, mask.sum(-1).double())[group].clamp(min=1)
    advantages = torch.linspace(-1, 1, 6).double()
    loss = rlkern.policy_loss(v, v, advantages, mask, loss_agg_mode="token-sum", rollout_is_weights=1 / tokens).loss
    torch.testing.assert_close(loss, -(advantages * mask.sum(-1) / tokens).sum())


# ---- recorded values --------------------------------------------------------------------------------------------------
def inputs(*names):
    return [torch.tensor(INPUTS[name]) for name in names]


def test_aggregation_known_values_of_trl(backend):
    old, lp, mask = inputs("old_log_probs", "log_prob", "mask")
    advantages, B = torch.tensor(TRL_FILE["advantages"]), len(mask)
    clip = {"cliprange_low": 0.2, "cliprange_high": 0.28, "clip_ratio_c": None, "log_ratio_clamp": None}
    share = {"dp_size": 1 / ACCUMULATION}
    arguments = {
        "grpo": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": B, **share},
        "bnpo": {"batch_num_tokens": mask.sum().clamp(min=1), **share},
        "dr_grpo": {"batch_num_tokens": B * LONGEST, **share},
        "dapo": {"batch_num_tokens": ITEMS / WORLD * ACCUMULATION / STEPS},
        "luspo": {"loss_agg_mode": "seq-mean-token-sum", "global_batch_size": B, **share},
    }
    for name, keywords in arguments.items():
        golden = TRL_FILE["cases"][json.dumps({"loss_type": name, "level": "token"})]
        leaf = lp.clone().requires_grad_()
        loss = rlkern.policy_loss(old, leaf, advantages, mask, **clip, **keywords).loss
        assert loss.item() == pytest.approx(golden["loss"], abs=1e-6), name
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], torch.tensor(golden["grad"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("counts", [{}, {"dp_size": 4, "batch_num_tokens": 100.0, "global_batch_size": 16.0}])
@pytest.mark.parametrize("token_level", [True, False])
def test_aggregation_known_values_of_openrlhf(backend, counts, token_level):
    old, lp, mask, advantages = inputs("old_log_probs", "log_prob", "mask", "advantages")
    mask[4, 0] = 1  # its cases have no empty row
    settings = {} if token_level else {"token_level_loss": False}
    golden = OPENRLHF[f"policy {json.dumps(settings)} {json.dumps(counts)}"]
    leaf = lp.clone().requires_grad_()
    mode = "token-mean" if token_level else "seq-mean-token-mean"
    clip = {"cliprange_low": 0.2, "cliprange_high": 0.28, "clip_ratio_c": None}
    loss = rlkern.policy_loss(old, leaf, advantages, mask, loss_agg_mode=mode, **clip, **counts).loss
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], torch.tensor(golden["grad"]), rtol=1e-5, atol=1e-7)
