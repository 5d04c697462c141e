# SPDX-License-Identifier: Apache-2.0
"""The framework's path: the installed verl's own functions, else their restatement; and its vectorised eager forms."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern.bench.inputs import GAMMA, LAM, Inputs
from rlkern.cli import against, rollout
from rlkern.cli.against import Formulas

Outputs = tuple[Tensor, ...]
Call = Callable[[Inputs], Outputs]


def framework() -> tuple[str, Formulas]:
    """What the framework's column shows, and its functions."""
    version = against.verl_version()
    if version is None:
        return "framework's formula (plain loops)", against.plain()
    return f"verl {version}", against.verl()


def policy_loss(f: Formulas) -> Call:
    """Forward and backward by autograd, as a trainer's worker runs it."""

    def call(x: Inputs) -> Outputs:
        leaf = x.leaf
        leaf.grad = None
        loss = f["policy_loss"](x.old, leaf, x.advantages, x.mask)[0]
        loss.backward()
        return loss.detach(), leaf.grad  # type: ignore[return-value]

    return call


def rollout_correction(f: Formulas) -> Call:
    """Weights, modified mask and all metrics as Python numbers: what a trainer's step asks for."""

    def call(x: Inputs) -> Outputs:
        weights, _, metrics = f["rollout_correction"](x.new, x.old, x.mask)
        return rollout.outputs(weights, metrics)

    return call


def calls(f: Formulas) -> dict[str, Call]:
    """One call per op of the table."""
    return {
        "gae_whiten": lambda x: tuple(f["gae_whitened"](x.rewards, x.values, x.mask, GAMMA, LAM)),
        "gae": lambda x: tuple(f["gae"](x.rewards, x.values, x.mask, GAMMA, LAM)),
        "discounted_returns": lambda x: (f["discounted_returns"](x.rewards, x.mask, GAMMA),),
        "reinforce_plus_plus": lambda x: tuple(f["reinforce_plus_plus"](x.rewards, x.mask, GAMMA)),
        "masked_whiten": lambda x: (f["masked_whiten"](x.values, x.mask),),
        "policy_loss_and_grad": policy_loss(f),
        "policy_loss": policy_loss(f),
        "rollout_correction": rollout_correction(f),
        "kl_k3": lambda x: (f["kl_penalty"](x.old, x.ref, "low_var_kl"),),
        "grpo": lambda x: (f["grpo"](x.rewards, x.mask, x.uid),),
        "rloo": lambda x: (f["rloo"](x.rewards, x.mask, x.uid),),
        "reinforce_plus_plus_baseline": lambda x: (f["reinforce_plus_plus_baseline"](x.rewards, x.mask, x.uid),),
        "group_index": lambda x: (f["group_ids"](x.uid),),
    }


# ---- numbers for labels ---------------------------------------------------------------------------------------------
Numbering = Callable[[Any], tuple[Tensor, int]]


def by_dict(labels: Any) -> tuple[Tensor, int]:
    seen: dict[Any, int] = {}
    ids = [seen.setdefault(label, len(seen)) for label in labels.tolist()]
    return torch.tensor(ids), len(seen)


def by_unique(labels: Any) -> tuple[Tensor, int]:
    names, ids = np.unique(labels, return_inverse=True)
    return torch.from_numpy(ids), len(names)


def numberings() -> dict[str, Numbering]:
    """Ways to number labels, without pandas' where it is not installed."""
    found: dict[str, Numbering] = {"dict": by_dict, "np.unique": by_unique}
    if importlib.util.find_spec("pandas") is not None:
        pandas: Any = importlib.import_module("pandas")

        def by_factorize(labels: Any) -> tuple[Tensor, int]:
            ids, names = pandas.factorize(labels)
            return torch.from_numpy(ids), len(names)

        found["pandas.factorize"] = by_factorize
    return found
