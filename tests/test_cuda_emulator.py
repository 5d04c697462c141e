# SPDX-License-Identifier: Apache-2.0
"""tests/cuda_emulator finds what it is for: each planted fault is caught, and the same code without it is right, in any order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern import streams

HERE = Path(__file__).parent / "cuda_emulator"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# the fault's number in planted.cu, and what must be said of it
FAULTS = {
    "a missing barrier": (1, "wrong: out"),
    "one past the end": (2, "heap-buffer-overflow"),
    "one past the end of shared memory": (3, "heap-buffer-overflow"),
    "half a warp in a shuffle": (4, "rlkern.sum: the CUDA kernel must run; got emulator: threads wait where not all"),
    "half a block at a barrier": (5, "rlkern.mirror: the CUDA kernel must run; got emulator: threads wait where not all"),
    "a wait for oneself": (6, "rlkern.chain: the CUDA kernel must run; got emulator: threads wait for a write that nobody makes"),
    "a cooperative grid that does not fit": (7, "emulator: a cooperative grid that the chip cannot hold"),
    "a wide access at an odd address": (8, "misaligned address"),
    "a look-back that does not wait": (9, "wrong: close"),
}


# the number in refused.cu, and what the exception says
REFUSED = {
    "a barrier that half a block meets": (0, "rlkern.half: the CUDA kernel must run; got emulator: threads wait"),
    "a block of too many threads": (1, "rlkern.wide: the CUDA kernel must run; got emulator: a launch of no threads, or of too many"),
    "a block of no threads": (2, "rlkern.narrow: the CUDA kernel must run; got emulator: a launch of no threads"),
    "more shared memory than there is": (3, "rlkern.large: the CUDA kernel must run; got emulator: more shared memory"),
    "more blocks than a grid has": (4, "rlkern.long: the tensors must fit one grid; split the batch."),
    "a cooperative grid that does not fit": (5, "rlkern.grid: the CUDA kernel must run; got emulator: a cooperative grid"),
    "parts that do not fit": (6, "rlkern.parts: the memory between blocks must hold this launch; it is too small."),
    "no blocks, which is no launch": (7, "no exception"),
}


def built(name: str, folder: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = folder / name
    defines = ["-DRLKERN_CUDA", "-DRLKERN_ISA=cuda", "-I", str(HERE)]
    subprocess.run(["g++", *FLAGS, *SANITIZERS, *defines, "-x", "c++", str(HERE / f"{name}.cu"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("planted", tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("refused", tmp_path_factory.mktemp("emulator"))


def run(program: Path, fault: int, seed: int = 0) -> tuple[int, str]:
    env = os.environ | {"EMULATOR_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
    done = subprocess.run([str(program), str(fault)], capture_output=True, text=True, env=env, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_emulator_right_in_any_order(planted: Path) -> None:
    """And the bits of rows in chunks are the same, whichever block comes first."""
    hashes = set()
    for seed in range(20):
        status, text = run(planted, 0, seed)
        assert status == 0, text
        assert text.startswith("right\n")
        hashes.add(text.split()[1])
    assert len(hashes) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_emulator_catches(planted: Path, name: str) -> None:
    fault, words = FAULTS[name]
    for seed in range(2):
        status, text = run(planted, fault, seed)
        assert status != 0
        assert words in text


# ---- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REFUSED)
def test_launch_that_fails_names_the_op(refused: Path, name: str) -> None:
    """And leaves nothing behind: the next launch runs."""
    number, words = REFUSED[name]
    status, text = run(refused, number)
    assert status == 0, text
    first, last = text.splitlines()
    assert first.startswith(words)
    assert last == "next: 96"
    if "the CUDA kernel must run" in words:
        assert first.endswith('rlkern.use_backend("triton") avoids this one.')


def test_launch_that_fails_raises(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "cuda":
        pytest.skip("the CUDA kernels' own")
    values, mask, place = torch.arange(12.0).reshape(3, 4), torch.ones(3, 4), streams.place
    monkeypatch.setattr(streams, "place", lambda device: (*place(device)[:3], streams.COUNTERS, None))
    with pytest.raises(RuntimeError, match=r"rlkern\.masked_whiten: the memory between blocks must hold this launch; it is too small\."):
        rlkern.masked_whiten(values, mask)
    monkeypatch.undo()
    assert abs(rlkern.masked_whiten(values, mask).mean()) < 1e-6
