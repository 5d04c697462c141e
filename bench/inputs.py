# SPDX-License-Identifier: Apache-2.0
"""The batches that are timed: float32, int64 mask, ragged lengths, shuffled uuid labels, eight responses a prompt."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern.data import RolloutBatch

GAMMA, LAM = 0.99, 0.95
PER_PROMPT = 8
LABELS = 65_536


@dataclass(frozen=True)
class Inputs:
    """One set of inputs. `out` holds two reused outputs where the shape asks for them, else None."""

    rewards: Tensor
    mask: Tensor
    uid: Any
    old: Tensor
    new: Tensor
    ref: Tensor
    values: Tensor
    advantages: Tensor
    out: tuple[Tensor, Tensor] | None = None

    @cached_property
    def leaf(self) -> Tensor:
        """log_prob as autograd's leaf."""
        return self.new.detach().clone().requires_grad_()

    @cached_property
    def tokens(self) -> int:
        """The count that a trainer knows before the loss (batch_num_tokens)."""
        return int((self.mask != 0).sum())

    @cached_property
    def squares(self) -> Tensor:
        """The sum over the vocabulary of squared probabilities, as an optimal token baseline reads it."""
        return (1.3 * self.old).exp()

    @property
    def shape(self) -> tuple[int, int]:
        return self.rewards.shape[0], self.rewards.shape[1]

    def exact(self) -> Inputs:
        """The same numbers in float64."""
        names = ("rewards", "old", "new", "ref", "values", "advantages")
        return replace(self, out=None, **{name: getattr(self, name).double() for name in names})

    def with_out(self) -> Inputs:
        return replace(self, out=(torch.empty_like(self.rewards), torch.empty_like(self.rewards)))


def uuids(rows: int, rng: random.Random, shared: bool = True) -> Any:
    """Labels of `rows` responses, eight a prompt, shuffled. `shared`: the rows of a prompt hold one str object, as when a
    trainer repeats its prompts; otherwise each row has a str of its own, as after reading from a file."""
    labels = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(-(-rows // PER_PROMPT))]
    labels = [label for label in labels for _ in range(PER_PROMPT)][:rows]
    if not shared:
        labels = ["".join(list(label)) for label in labels]
    rng.shuffle(labels)
    return np.fromiter(labels, dtype=object)


def make(rows: int, tokens: int, seed: int = 0) -> Inputs:
    """A synthetic batch: lengths 10-100 % of T, a 0/1 score on the last token and a small KL cost on the others."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(tokens // 10, 1), tokens + 1, (rows,), generator=g)
    mask = (torch.arange(tokens)[None] < lengths[:, None]).to(torch.int64)

    def noise(scale: float) -> Tensor:
        return torch.randn(rows, tokens, generator=g) * scale

    old = -torch.rand(rows, tokens, generator=g) * 2
    rewards = noise(0.01) * mask
    rewards[torch.arange(rows), lengths - 1] += torch.randint(0, 2, (rows,), generator=g).float()
    uid = uuids(rows, random.Random(seed))
    return Inputs(rewards, mask, uid, old, old + noise(0.15), old + noise(0.15), noise(1.0), noise(1.0))


def from_batch(batch: RolloutBatch) -> Inputs:
    """A recorded batch; fields it lacks are filled with noise of a usual size, since only their speed counts."""
    drawn = make(*batch.shape)
    found = batch.to(torch.float32)

    def pick(x: Tensor | None, fallback: Tensor) -> Tensor:
        return (fallback if x is None else x).contiguous()

    old = found.old_log_prob.contiguous()
    new = pick(found.log_prob, old + 0.15 * torch.randn_like(old))
    ref = pick(found.ref_log_prob, old + 0.15 * torch.randn_like(old))
    values = pick(found.values, drawn.values)
    rewards, mask = found.token_level_rewards.contiguous(), found.response_mask.contiguous()
    return Inputs(rewards, mask, batch.uid, old, new, ref, values, drawn.advantages)
