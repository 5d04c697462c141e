# SPDX-License-Identifier: Apache-2.0
"""Where a call on a GPU runs: its device's current stream, with memory for what the blocks of a kernel tell each other."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rlkern import backends

# Bytes: counters, which kernels leave as they find them, zero; then a grid's partial results and the state of a scan's chunks,
# which nobody clears. Outcome advantages take 16 of them a row, token baselines 24 a chunk: 700,000 rows a call.
COUNTERS, _MEMORY = 64 << 10, 16 << 20
_memories: dict[tuple[torch.device, int], Tensor] = {}
_captures: dict[tuple[torch.device, int], tuple[int, Tensor]] = {}


def place(device: torch.device) -> tuple[int, int, int, int, Tensor]:
    """The last argument of the CUDA module's functions: stream, device, address and size of the memory, and its owner.

    Two streams may run at once and share no memory. A graph may be replayed beside anything, so each capture has its own,
    cleared by a node of that graph.
    """
    if device.type != "cuda":  # emulated
        memory = _memories.get((device, 0))
        if memory is None:
            memory = _memories[device, 0] = _new(device)
        return (0, 0, memory.data_ptr(), _MEMORY, memory)
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    capture: int = backends.cuda.capture(stream)  # type: ignore[union-attr]
    memory = _of_capture(device, stream, capture) if capture else _of_stream(device, stream)
    return (stream, device.index, memory.data_ptr(), _MEMORY, memory)


def _new(device: torch.device) -> Tensor:
    found = torch.empty(_MEMORY, dtype=torch.uint8, device=device)
    found[:COUNTERS].zero_()
    return found


def _of_stream(device: torch.device, stream: int) -> Tensor:
    found = _memories.get((device, stream))
    if found is None:
        with ThreadPoolExecutor(1) as other:  # this thread may be warming up a graph, in whose pool nothing may stay
            found = _memories[device, stream] = other.submit(_new_on, torch.cuda.current_stream(device)).result()
    return found


def _new_on(stream: torch.cuda.Stream) -> Tensor:
    with torch.cuda.stream(stream):
        return _new(stream.device)


def _of_capture(device: torch.device, stream: int, capture: int) -> Tensor:
    """One for the whole capture: an earlier capture's goes back to its graph's pool, where it stays that graph's.

    torch.compile's own graphs bear nothing in their pool but their results: where there may be such, one for each call.
    """
    if "torch._inductor.cudagraph_trees" in sys.modules:
        return _new(device)
    last, found = _captures.get((device, stream), (0, None))
    if last != capture or found is None:
        found = _new(device)
        _captures[device, stream] = (capture, found)
    return found
