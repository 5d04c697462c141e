# SPDX-License-Identifier: Apache-2.0
"""A batch's fields in one dtype and mask kind, as the checks take them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlkern.cli import framework
from rlkern.cli.first_three import reinforce_plus_plus_baseline
from rlkern.data import RolloutBatch

GAMMA, LAM = 0.99, 0.95


@dataclass(frozen=True)
class Data:
    """The batch in one dtype and one mask kind. What a captured batch lacks is None."""

    rewards: Tensor
    mask: Tensor
    uid: Any
    old: Tensor
    advantages: Tensor
    new: Tensor | None = None
    ref: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    vpreds: Tensor | None = None
    baselines: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def to(self, dtype: torch.dtype, mask: torch.dtype) -> Data:
        return replace(self, **{name: x.to(mask if name == "mask" else dtype) for name, x in self.tensors().items()})

    def on(self, device: str) -> Data:
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})


def data_of(batch: RolloutBatch) -> Data:
    """The batch, with advantages and returns for the losses made by the formulas in float64."""
    exact = batch.to(torch.float64, torch.int64)
    rewards, values, mask = exact.token_level_rewards, exact.values, exact.response_mask
    returns = vpreds = None
    if values is not None:
        returns = framework.gae(rewards, values, mask, GAMMA, LAM)[1]
        # a critic after a step: moved by up to 0.6, so that some predictions leave the clip range
        vpreds = values + 0.6 * torch.sin(torch.arange(values.numel())).reshape(values.shape)
    advantages = reinforce_plus_plus_baseline(rewards, mask, batch.uid)
    critic = (values, returns, vpreds)
    logs = (exact.log_prob, exact.ref_log_prob)
    return Data(rewards, mask, batch.uid, exact.old_log_prob, advantages, *logs, *critic, exact.reward_baselines)


def top(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def wanted(x: Tensor | None) -> Tensor:
    """A field that `Check.needs` has made sure of."""
    if x is None:
        raise ValueError("rlkern.verify: the batch must have the field; got None. Name it in Check.needs.")
    return x


def valid(x: Tensor | None, d: Data) -> Tensor:
    return torch.where(d.mask != 0, wanted(x), 0.0)
