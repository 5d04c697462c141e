# SPDX-License-Identifier: Apache-2.0
"""docs/algorithms.md: every call and every set of arguments on it runs."""

import math
import pathlib
import re

import pytest
import torch

import rlkern
from rlkern.advantages import ESTIMATORS
from rlkern.policy import VARIANTS

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "algorithms.md"
B, T, V = 6, 9, 11


def calls():
    """The last cell of every row of a table."""
    for line in PAGE.read_text().splitlines():
        found = re.fullmatch(r"\| .* \| .* \| `(.+)` \|", line)
        if found:
            yield found[1]


def names():
    g = torch.Generator().manual_seed(0)
    tokens = ("rewards", "values", "returns", "vpreds", "log_prob", "old_log_prob", "ref_log_prob", "rollout_log_prob", "advantages", "kl")
    found = {name: torch.randn(B, T, generator=g) for name in tokens}
    lengths = torch.tensor([9, 4, 9, 1, 7, 5])
    found |= {"entropy": torch.rand(B, T, generator=g), "weights": torch.rand(B, T, generator=g) + 0.5}
    found |= {"scores": torch.randn(B, generator=g), "baselines": torch.randn(B, generator=g), "lengths": lengths.double()}
    found |= {"mask": (torch.arange(T) < lengths[:, None]).long(), "index": ["a", "b", "a", "b", "a", "b"]}
    found |= {"logits": torch.randn(B, T, V, generator=g), "labels": torch.randint(0, V, (B, T), generator=g)}
    found |= {"many": torch.randn(B, 2, generator=g), "squares": torch.rand(B, T, generator=g) + 1}
    return found | {"rlkern": rlkern, "math": math, "B": B, "items": 40, "world": 2, "max_completion_length": 10}


def test_algorithms_page_has_its_calls():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    headers = [line for line in lines if line.endswith(("| call |", "| arguments |"))]
    assert len(list(calls())) == len(lines) - len(headers)
    assert len(headers) >= 8


def test_algorithms_page_has_every_name():
    """Each estimator, variant, aggregation, correction and framework's word, each in a call of its own."""
    text = "\n".join(calls())
    for name in ESTIMATORS:
        framework, _, function = name.partition("/")
        assert f"rlkern.advantages.{function if framework == 'verl' else f'{framework}.{function}'}(" in text, name
    assert "policy_loss(old_log_prob, log_prob, advantages, mask)" in text  # variant "ppo"
    for name in VARIANTS.keys() - {"ppo"}:
        assert f'variant="{name}"' in text, name
    for name in ("rollout_correction", "rollout_metrics", "importance_weights", "off_policy_mask", "value_loss", "kl_penalty"):
        assert f"rlkern.{name}(" in text, name
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"):
        assert f'loss_agg_mode="{mode}"' in text, mode


@pytest.mark.parametrize("call", list(calls()))
def test_algorithms_page_runs(call):
    given = names()
    if call.startswith("rlkern."):
        result = eval(call, given)
    else:
        arguments = eval(f"dict({call})", given)
        result = rlkern.policy_loss(*(given[x] for x in ("old_log_prob", "log_prob", "advantages", "mask")), **arguments)
    result = list(result.values()) if isinstance(result, dict) else result
    for x in result if isinstance(result, tuple | list) else (result,):
        if isinstance(x, float | torch.Tensor):
            x = torch.as_tensor(x)
            assert (x if x.shape != (B, T) else x[given["mask"] != 0]).isfinite().all()
