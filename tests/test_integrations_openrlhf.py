# SPDX-License-Identifier: Apache-2.0
"""The losses of OpenRLHF's drop-in against recorded values of its own class; the real one: `make test-frameworks`."""

import json
import pathlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("wrapt")
from rlkern.integrations.openrlhf import _policy_loss, compute_approx_kl
from rlkern.integrations.site import Uncovered

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "openrlhf_0.11.2.json").read_text())["openrlhf_0.11.2"]
INPUTS = {k: torch.tensor(v) for k, v in json.loads((FOLDER / "verl_0.9.1.json").read_text())["inputs"].items() if k != "index"}
ROLLOUT = INPUTS["old_log_probs"] + 0.3 * (INPUTS["rollout_is_weights"] - 1)
EMPTY = "policy empty_row seq ratio mask [.95,1.05]"
RESULTS = ("loss", "clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")


def made(**options):
    """What forward reads of the class."""
    given = {
        "clip_eps_low": 0.2, "clip_eps_high": 0.28, "token_level_loss": options.get("policy_loss_type") != "gspo", "dual_clip": None,
        "policy_loss_type": "ppo", "is_correction_level": "off", "is_correction_mode": "mask", "is_correction_gating": "ratio",
        "is_correction_threshold": (0.5, 5.0),
    }  # fmt: skip
    return SimpleNamespace(**given | options)


def close(found, golden):
    torch.testing.assert_close(found, torch.tensor(golden), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("policy")])
def test_openrlhf_policy_loss_known_values(backend, key):
    mask = INPUTS["mask"].clone()
    if key == EMPTY:
        options, counts = {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.05)}, {}
    else:
        options, counts = (json.loads(x) for x in key.removeprefix("policy ").replace("} {", "}|{").split("|"))
        mask[4][0] = 1
    leaf = INPUTS["log_prob"].clone().requires_grad_()
    args = (leaf, INPUTS["old_log_probs"], INPUTS["advantages"], mask, ROLLOUT)
    found = _policy_loss(5)(made(**options), *args, **counts)
    found[0].backward()
    close(leaf.grad, GOLDEN[key]["grad"])
    for name, x in zip(RESULTS, found, strict=True):
        if GOLDEN[key][name] is None:
            assert x is None, name
        else:
            assert x.shape == ()
            assert x.dtype == torch.float32
            close(x.detach(), GOLDEN[key][name])


def test_openrlhf_policy_loss_leaves():
    x, forward = [INPUTS[k] for k in ("log_prob", "old_log_probs", "advantages", "mask")], _policy_loss(5)
    for options in ({"policy_loss_type": "other"}, {"enable_vllm_is_correction": True}, {"is_correction_level": "token"}):
        with pytest.raises(Uncovered):  # the last for want of the rollout's log-probs
            forward(made(**options), *x)
    with pytest.raises(Uncovered, match="half precision"):
        forward(made(), x[0].bfloat16(), *x[1:])
    with pytest.raises(Uncovered):
        forward(made(), *x[:3])


@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("kl k") and "extremes" not in key])
def test_openrlhf_approx_kl_known_values(backend, key):
    _, kind, unbiased, old = key.split()
    unbiased = unbiased.endswith("True")
    leaf = INPUTS["log_prob"].clone().requires_grad_()
    args = (leaf, INPUTS["ref_log_prob"], INPUTS["old_log_probs"] if old.endswith("given") else None, kind, unbiased)
    if kind == "k1" and not unbiased:
        with pytest.raises(Uncovered):
            compute_approx_kl(*args)
        return
    found = compute_approx_kl(*args)
    found.sum().backward()
    close(found.detach(), GOLDEN[key]["value"])
    close(leaf.grad, GOLDEN[key]["grad"])
