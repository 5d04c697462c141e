# SPDX-License-Identifier: Apache-2.0
"""The memory between blocks: who shares it and who keeps it. Of the device, only its answers are made up."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from rlkern import backends, streams

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """`stream` and `capture` as the device would say them; `made`: each memory's thread."""
    gpu = SimpleNamespace(stream=7, capture=0, made=[])

    def new(device):
        gpu.made.append(threading.get_ident())
        return torch.zeros(streams.COUNTERS, dtype=torch.uint8)

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream, raising=False)
    monkeypatch.setattr(backends, "cuda", SimpleNamespace(capture=lambda stream: gpu.capture))
    monkeypatch.setattr(streams, "_new", new)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(streams, "_new_on", new)
    for name in ("_memories", "_captures"):
        monkeypatch.setattr(streams, name, {})
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
    return gpu


def test_streams_share_no_memory(gpu):
    first, again = streams.place(DEVICE), streams.place(DEVICE)
    assert first[:4] == again[:4] == (7, 0, first[4].data_ptr(), streams._MEMORY)
    gpu.stream = 8
    assert streams.place(DEVICE)[2] != first[2]


def test_streams_memory_is_no_graph_pools(gpu):
    """A warm-up's allocations go to a graph's pool, by its thread."""
    streams.place(DEVICE)
    assert gpu.made != [threading.get_ident()]


def test_streams_a_capture_has_its_own(gpu):
    eager = streams.place(DEVICE)
    gpu.capture = 1
    first, again = streams.place(DEVICE), streams.place(DEVICE)
    assert first[2] == again[2] != eager[2]
    gpu.capture = 2
    assert streams.place(DEVICE)[2] != first[2]
    gpu.capture = 0
    assert streams.place(DEVICE)[2] == eager[2]


def test_streams_keep_nothing_in_torch_compiles_graphs(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace())
    gpu.capture = 1
    streams.place(DEVICE)
    assert not streams._captures
    assert not streams._memories
