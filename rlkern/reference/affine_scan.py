# SPDX-License-Identifier: Apache-2.0
"""The affine scan in plain torch, and how packed rows become padded ones.

y_t = x_t + c_t y_{t+1} doubles its reach in each step: x += c * x[t + k], c *= c[t + k] for k = 1, 2, 4, ... Where c is 0
nothing passes, not even a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def neighbour(x: Tensor, k: int, fill: float | Tensor, reverse: bool = True) -> Tensor:
    """x[:, t + k] (t - k going forward), `fill` past the end."""
    k = min(k, x.shape[1])
    pad = torch.zeros_like(x[:, :k]) + (fill if not isinstance(fill, Tensor) else fill[:, None])
    return torch.cat([x[:, k:], pad], 1) if reverse else torch.cat([pad, x[:, : x.shape[1] - k]], 1)


def affine(decay: Tensor, x: Tensor, initial: Tensor | None, reverse: bool = True) -> Tensor:
    """y_t = x_t + decay_t y_next with y = initial past the end; tensors (B, T), initial (B,)."""
    c, k = decay.expand_as(x), 1
    if x.shape[1] == 0:
        return x
    if initial is not None:
        edge = torch.zeros_like(x, dtype=torch.bool)
        edge[:, -1 if reverse else 0] = True
        x = torch.where(edge, x + c * initial[:, None], x)
    while k < x.shape[1]:
        x = torch.where(c != 0, x + c * neighbour(x, k, 0.0, reverse), x)
        c = c * neighbour(c, k, 0.0, reverse)
        k *= 2
    return x


def rows(cu: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Packed rows as a padded batch (rows of zeros behind each), other tensors as two dimensions."""
    if cu is None:
        return [x if x is None or x.dim() == 2 else x[None] for x in tensors]
    sizes = (cu[1:] - cu[:-1]).tolist()
    return [
        None if x is None else torch.nn.utils.rnn.pad_sequence(list(x.split(sizes)), batch_first=True) if sizes else x.reshape(0, 0)
        for x in tensors
    ]


def unrows(cu: Tensor | None, x: Tensor, like: Tensor) -> Tensor:
    if cu is None:
        return x.reshape(like.shape)
    return torch.cat([row[:n] for row, n in zip(x, (cu[1:] - cu[:-1]).tolist(), strict=True)]) if cu.shape[0] > 1 else x.reshape(0)


def inside(cu: Tensor | None, x: Tensor) -> Tensor:
    """Which tokens of the padded rows exist."""
    if cu is None:
        return torch.ones_like(x, dtype=torch.bool)
    return torch.arange(x.shape[1], device=x.device) < (cu[1:] - cu[:-1])[:, None]


def arithmetic(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def needed(found: Sequence[Tensor | None], like: Tensor, needs: list[bool]) -> Any:
    return tuple(x.to(like.dtype) if need and x is not None else like.new_empty(0) for x, need in zip(found, needs, strict=True))


def _decay(decay: Tensor | None, decay_row: Tensor | None, value: float, x: Tensor, cu: Tensor | None) -> Tensor:
    """The decay as (rows, T), (rows, 1) or (1, 1), in x's dtype."""
    if decay_row is not None:
        return decay_row[:, None].to(x.dtype)
    if decay is not None:
        per_token: Tensor = rows(cu, decay)[0].to(x.dtype)
        return per_token
    return torch.full((1, 1), value, dtype=x.dtype, device=x.device)


def affine_scan(
    decay: Tensor | None,
    decay_row: Tensor | None,
    x: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
) -> Tensor:
    """The raw op `_affine_scan_fwd`; decay per token, per row (rows,), or absent with `decay_value`."""
    like = x
    x = rows(cu_seqlens, x)[0].to(arithmetic(x))
    exists = inside(cu_seqlens, x)
    c = torch.where(exists, _decay(decay, decay_row, decay_value, x, cu_seqlens), torch.ones_like(x))
    y = affine(c, x, None if initial is None else initial.to(x.dtype), reverse)
    return unrows(cu_seqlens, y, like).to(like.dtype)


def affine_scan_bwd(
    grad: Tensor,
    decay: Tensor | None,
    decay_row: Tensor | None,
    y: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_value: float,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op `_affine_scan_bwd`: c_t = G_t + decay_prev c_prev; d_x = c, d_decay_t = c_t y_next, d_initial = decay c at the end."""
    g, out = (rows(cu_seqlens, t)[0].to(arithmetic(grad)) for t in (grad, y))
    exists = inside(cu_seqlens, g)
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    d = torch.where(exists, _decay(decay, decay_row, decay_value, g, cu_seqlens), zero + 1)
    start = torch.zeros_like(g.sum(1)) if initial is None else initial.to(g.dtype)
    c = affine(neighbour(d, 1, 0.0, not reverse), torch.where(exists, g, zero), None, not reverse)
    d_decay = torch.where(exists, c * _latest_or_end(out, exists, start, reverse), zero)
    d_initial = (inside_edge(exists, reverse).to(g.dtype) * d * c).sum(1)
    c = torch.where(exists, c, zero)
    per_decay = d_decay.sum(1) if decay_row is not None else unrows(cu_seqlens, d_decay, grad)
    found = (unrows(cu_seqlens, c, grad), per_decay, d_initial)
    result: tuple[Tensor, Tensor, Tensor] = needed(found, grad, needs)
    return result


def inside_edge(exists: Tensor, reverse: bool) -> Tensor:
    """The token next to `initial` in each row."""
    return exists & ~(neighbour(exists.float(), 1, 0.0, reverse) != 0)


def _latest_or_end(y: Tensor, exists: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """y of the token that a step read, `initial` at the edge."""
    return torch.where(inside_edge(exists, reverse), start[:, None].expand_as(y), neighbour(y, 1, 0.0, reverse))
