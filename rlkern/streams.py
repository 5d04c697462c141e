# SPDX-License-Identifier: Apache-2.0
"""Where a call on a GPU runs: its device's current stream, with memory for what the blocks of a kernel tell each other."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes: counters, which kernels leave as they find them, zero; then a grid's partial results and the state of a scan's chunks.
COUNTERS, _MEMORY = 64 << 10, 4 << 20
_memories: dict[tuple[torch.device, int], Tensor] = {}


def place(device: torch.device) -> tuple[int, int, int, int]:
    """The last argument of the CUDA module's functions: stream, device, address and size of the memory.

    Two streams may run at once and share no memory. A graph may be replayed beside anything, so it holds its own.
    """
    if device.type != "cuda":  # emulated
        return (0, 0, _memory(device, 0), _MEMORY)
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    if torch.cuda.is_current_stream_capturing():
        return (stream, device.index, torch.zeros(_MEMORY, dtype=torch.uint8, device=device).data_ptr(), _MEMORY)
    return (stream, device.index, _memory(device, stream), _MEMORY)


def _memory(device: torch.device, stream: int) -> int:
    found = _memories.get((device, stream))
    if found is None:
        found = _memories[device, stream] = torch.zeros(_MEMORY, dtype=torch.uint8, device=device)
    return found.data_ptr()
