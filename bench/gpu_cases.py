# SPDX-License-Identifier: Apache-2.0
"""What the GPU table times: inputs made on the device, and the calls with the bytes they move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rlkern
from rlkern.bench import peers_gpu
from rlkern.bench.inputs import GAMMA, LAM, PER_PROMPT

SMALL, LARGE, LONG, LARGEST = (64, 512), (1024, 8192), (8, 131072), (4096, 16384)
SHAPES = (SMALL, LARGE, LONG, LARGEST)  # the first ones are measured even where time is short
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES = 3  # the sets together hold this many times the L2 cache


@dataclass(frozen=True)
class Batch:
    """One set of inputs on the device."""

    rewards: Tensor
    values: Tensor
    old: Tensor
    new: Tensor
    advantages: Tensor
    mask: Tensor
    group: rlkern.GroupIndex
    tokens: int
    count: Tensor  # the same on the device, for the peer: a new number would be a new graph

    def exact(self) -> Batch:
        doubles = {k: v.double() for k, v in self.__dict__.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return Batch(**{**self.__dict__, **doubles})


Call = Callable[[Batch], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """`op`: the raw op behind it. `values`, `masks`: how many values and int64 masks a token moves if each input is read once;
    `twice`: those that two sweeps move. `of_copy`: the share of the copy's bandwidth aimed at for large shapes, by backend."""

    name: str
    op: str
    values: int
    masks: int
    ours: Call
    peer: Callable[[Batch, peers_gpu.Of], Sequence[Tensor]]
    of_copy: dict[str, float]
    compiled: float  # times faster than torch.compile, aimed at
    twice: tuple[int, int] | None = None

    def bytes(self, x: Batch, backend: str = "cuda") -> int:
        values, masks = self.twice if self.twice and backend != "cuda" else (self.values, self.masks)
        return x.mask.numel() * (values * x.rewards.element_size() + masks * x.mask.element_size())


def _loss(x: Batch) -> Sequence[Tensor]:
    found = rlkern.policy_loss_and_grad(x.old, x.new, x.advantages, x.mask, batch_num_tokens=x.tokens)
    return found.loss, found.d_log_prob


def _value_loss(x: Batch) -> Sequence[Tensor]:
    return (rlkern.value_loss(x.values, x.rewards, x.old, x.mask, batch_num_tokens=x.tokens).loss,)


def _share(triton: float, cuda: float = 0.85) -> dict[str, float]:
    return {"triton": triton, "cuda": cuda}


CASES = [
    Case("policy_loss_and_grad", "_policy_loss_fwd", 4, 1, _loss, peers_gpu.policy_loss, _share(0.85), 1.5),
    Case(
        "gae", "_gae_fwd", 4, 1,
        lambda x: rlkern.gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAM), peers_gpu.gae, _share(0.80), 2,
    ),
    Case(
        "discounted_returns", "_discounted_returns_fwd", 2, 1,
        lambda x: (rlkern.discounted_returns(x.rewards, x.mask, gamma=GAMMA),), peers_gpu.discounted_returns, _share(0.80), 2,
    ),
    Case(
        "gae_whiten", "_gae_fwd", 4, 1,
        lambda x: rlkern.advantages.gae(x.rewards, x.values, x.mask, GAMMA, LAM), peers_gpu.gae_whiten, _share(0.75), 3,
        twice=(6, 1),  # advantages are read back and written again
    ),
    Case(
        "reinforce_plus_plus", "_discounted_returns_fwd", 3, 1,
        lambda x: rlkern.advantages.reinforce_plus_plus(x.rewards, x.mask, GAMMA), peers_gpu.reinforce_plus_plus, _share(0.75), 3,
        twice=(4, 2),  # returns and mask are read again
    ),
    Case(
        "masked_whiten", "_masked_whiten_fwd", 2, 1,
        lambda x: (rlkern.masked_whiten(x.values, x.mask),), peers_gpu.masked_whiten, _share(0.85), 1.2, twice=(3, 1),
    ),
    Case(
        "grpo", "_group_advantage_fwd", 2, 1,
        lambda x: rlkern.advantages.grpo(x.rewards, x.mask, x.group)[:1], peers_gpu.grpo, _share(0.80), 1.3,
    ),
    Case(
        "rloo", "_group_advantage_fwd", 2, 1,
        lambda x: rlkern.advantages.rloo(x.rewards, x.mask, x.group)[:1], peers_gpu.rloo, _share(0.80), 1.3,
    ),
    Case("kl_penalty", "_kl_penalty_fwd", 3, 0, lambda x: (rlkern.kl_penalty(x.new, x.old, "k3"),), peers_gpu.kl_penalty, _share(0.85), 1),
    Case("value_loss", "_value_loss_fwd", 3, 1, _value_loss, peers_gpu.value_loss, _share(0.85), 1),
]  # fmt: skip


# ---- inputs ---------------------------------------------------------------------------------------------------------
def make(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Batch:
    """Lengths of 10 to 100 % of T, rewards and values on valid tokens; drawn on the device."""
    rows, tokens = shape
    g = torch.Generator(device).manual_seed(seed)
    lengths = torch.randint(max(tokens // 10, 1), tokens + 1, (rows,), generator=g, device=device)
    mask = (torch.arange(tokens, device=device)[None] < lengths[:, None]).long()

    def noise(scale: float) -> Tensor:
        return (torch.randn(rows, tokens, generator=g, device=device) * scale).to(dtype)

    old = noise(0.5) - 1
    group = rlkern.group_index(torch.arange(rows, device=device) // PER_PROMPT)
    count = mask.sum()
    return Batch(noise(0.1) * mask, noise(1.0) * mask, old, old + noise(0.15), noise(1.0), mask, group, int(count), count)


def sets(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Batch]:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    a_set = shape[0] * shape[1] * (4 * dtype.itemsize + 8)
    return [make(shape, dtype, device, seed) for seed in range(max(2, -(-CACHES * l2 // a_set)))]
