# SPDX-License-Identifier: Apache-2.0
"""What an expert writes in ten minutes: numba loops over rows, in parallel, compiled at first use."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern.bench.inputs import GAMMA, LAM, Inputs

numba: Any = importlib.import_module("numba")
prange = numba.prange


def jit(function: Callable[..., None]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = numba.njit(parallel=True)(function)
    return compiled


@jit
def _gae(rewards: Any, values: Any, mask: Any, gamma: Any, decay: Any, advantages: Any, returns: Any) -> None:
    rows, tokens = rewards.shape
    for b in prange(rows):
        advantage = np.float32(0)
        following = np.float32(0)
        for i in range(tokens):
            t = tokens - 1 - i
            value = values[b, t]
            if mask[b, t] != 0:
                advantage = rewards[b, t] + gamma * following - value + decay * advantage
                following = value
            advantages[b, t] = advantage
            returns[b, t] = advantage + value


@jit
def _returns(rewards: Any, mask: Any, gamma: Any, out: Any) -> None:
    rows, tokens = rewards.shape
    for b in prange(rows):
        carry = np.float32(0)
        for i in range(tokens):
            t = tokens - 1 - i
            if mask[b, t] != 0:
                carry = rewards[b, t] + gamma * carry
                out[b, t] = carry
            else:
                out[b, t] = 0


@jit
def _sums(values: Any, mask: Any, totals: Any) -> None:
    rows, tokens = values.shape
    for b in prange(rows):
        count = total = square = 0.0
        for t in range(tokens):
            if mask[b, t] != 0:
                v = np.float64(values[b, t])
                count += 1.0
                total += v
                square += v * v
        totals[b, 0] = count
        totals[b, 1] = total
        totals[b, 2] = square


@jit
def _scale(values: Any, mean: Any, rstd: Any, out: Any) -> None:
    rows, tokens = values.shape
    for b in prange(rows):
        for t in range(tokens):
            out[b, t] = (values[b, t] - mean) * rstd


@jit
def _kl(log_prob: Any, ref: Any, out: Any) -> None:
    rows, tokens = log_prob.shape
    for b in prange(rows):
        for t in range(tokens):
            d = min(max(ref[b, t] - log_prob[b, t], np.float32(-20)), np.float32(20))
            out[b, t] = min(max(math.exp(d) - d - np.float32(1), np.float32(-10)), np.float32(10))


@jit
def _loss(old: Any, new: Any, advantages: Any, mask: Any, weight: Any, grad: Any, totals: Any) -> None:
    rows, tokens = old.shape
    for b in prange(rows):
        loss = clipped = kl = dual = 0.0
        for t in range(tokens):
            g = np.float32(0)
            if mask[b, t] != 0:
                a = advantages[b, t]
                x = min(max(new[b, t] - old[b, t], np.float32(-20)), np.float32(20))
                r = math.exp(x)
                inside = min(max(r, np.float32(0.8)), np.float32(1.2))
                plain = -a * r
                value = max(plain, -a * inside)
                if plain >= value:
                    g = plain
                else:
                    clipped += 1.0
                if a < 0 and value > -3 * a:
                    value = -3 * a
                    g = np.float32(0)
                    dual += 1.0
                loss += value
                kl -= x
            grad[b, t] = g * weight
        totals[b, 0] = loss
        totals[b, 1] = clipped
        totals[b, 2] = kl
        totals[b, 3] = dual


def threads(count: int) -> None:
    numba.set_num_threads(count)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [x.numpy() for x in tensors]


def _outputs(x: Inputs, count: int) -> tuple[Tensor, ...]:
    return x.out[:count] if x.out else tuple(torch.empty_like(x.rewards) for _ in range(count))


def gae(x: Inputs) -> tuple[Tensor, ...]:
    out = _outputs(x, 2)
    _gae(*_arrays(x.rewards, x.values, x.mask), np.float32(GAMMA), np.float32(GAMMA * LAM), *_arrays(*out))
    return out


def discounted_returns(x: Inputs) -> tuple[Tensor, ...]:
    out = _outputs(x, 1)
    _returns(*_arrays(x.rewards, x.mask), np.float32(GAMMA), *_arrays(*out))
    return out


def _whiten(values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    totals = np.empty((values.shape[0], 3))
    source, valid, target = _arrays(values, mask, out)
    _sums(source, valid, totals)
    count, total, square = totals.sum(0)
    mean = total / count
    variance = (square - total * mean) / (count - 1)
    _scale(source, np.float32(mean), np.float32(1 / math.sqrt(variance + 1e-8)), target)
    return out


def whiten_in_place(values: Tensor, mask: Tensor) -> Tensor:
    return _whiten(values, mask, values)


def masked_whiten(x: Inputs) -> tuple[Tensor, ...]:
    return (_whiten(x.values, x.mask, _outputs(x, 1)[0]),)


def kl(x: Inputs) -> tuple[Tensor, ...]:
    out = _outputs(x, 1)
    _kl(*_arrays(x.old, x.ref, *out))
    return out


def policy_loss(x: Inputs) -> tuple[Tensor, ...]:
    out = _outputs(x, 1)
    totals = np.empty((x.shape[0], 4))
    weight = np.float32(1 / x.tokens)
    _loss(*_arrays(x.old, x.new, x.advantages, x.mask), weight, *_arrays(*out), totals)
    return torch.tensor(totals.sum(0)[0] / x.tokens, dtype=torch.float32), *out
