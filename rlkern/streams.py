# SPDX-License-Identifier: Apache-2.0
"""Where a call on a GPU runs: its device's current stream, with memory for what the blocks of a kernel tell each other."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern import backends

# Bytes: counters, which kernels leave as they find them, zero; then a grid's partial results and the state of a scan's chunks,
# which nobody clears. Outcome advantages take 16 of them a row, token baselines 24 a chunk: 700,000 rows a call.
COUNTERS, _MEMORY = 64 << 10, 16 << 20
_memories: dict[tuple[torch.device, int], Tensor] = {}
_captures: dict[tuple[torch.device, int], tuple[int, Tensor]] = {}


def place(device: torch.device) -> tuple[int, int, int, int]:
    """The last argument of the CUDA module's functions: stream, device, address and size of the memory.

    Two streams may run at once and share no memory. A graph may be replayed beside anything, so each capture has its own,
    cleared by a node of that graph.
    """
    if device.type != "cuda":  # emulated
        return (0, 0, _memory(device, 0), _MEMORY)
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    capture: int = backends.cuda.capture(stream)  # type: ignore[union-attr]
    return (stream, device.index, _of_capture(device, stream, capture) if capture else _memory(device, stream), _MEMORY)


def _new(device: torch.device) -> Tensor:
    found = torch.empty(_MEMORY, dtype=torch.uint8, device=device)
    found[:COUNTERS].zero_()
    return found


def _memory(device: torch.device, stream: int) -> int:
    found = _memories.get((device, stream))
    if found is None:
        found = _memories[device, stream] = _new(device)
    return found.data_ptr()


def _of_capture(device: torch.device, stream: int, capture: int) -> int:
    """An earlier capture's memory goes back to its graph's pool, where it stays that graph's."""
    last, found = _captures.get((device, stream), (0, None))
    if last != capture or found is None:
        found = _new(device)
        _captures[device, stream] = (capture, found)
    return found.data_ptr()
