# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, its exit codes, and the formulas and the clock that its verdicts rest on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import rlkern
from rlkern import backends, cli
from rlkern.bench import machine, report, timing
from rlkern.bench import run as bench_run
from rlkern.cli import against, first_three, framework, verify


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app(), [str(a) for a in arguments])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scans in two dtypes with two mask kinds: enough to see a verdict."""
    chosen = [c for c in verify.CHECKS if c.op in ("discounted_returns, skip", "gae, skip")]
    monkeypatch.setattr(verify, "CHECKS", chosen)
    monkeypatch.setattr(verify, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(verify, "MASKS", (torch.bool, torch.int64))


# ---- the formulas, by hand ------------------------------------------------------------------------------------------
def test_cli_formulas_known_values() -> None:
    r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
    advantages, returns = framework.gae(r, v, m, 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.75]]
    assert returns.tolist() == [[1.0, 9.75, 1.0]]
    for rule, wanted in (("skip", [1.0, 0.0, 1.0]), ("reset", [0.0, 1.0, 1.0]), ("zero", [1.0, 1.0, 1.0])):
        assert framework.discounted_returns(r, m, 1.0, rule).tolist() == [wanted]
    assert first_three.reinforce_plus_plus_reset(r, m, 1.0)[1].tolist() == [[0.0, 1.0, 1.0]]
    scores, mask = torch.tensor([[1.0], [0.0], [2.0]]), torch.ones(3, 1)
    assert framework.rloo(scores, mask, "aab").flatten().tolist() == [1.0, -1.0, 2.0]
    wanted = [0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6), 2 / (1 + 1e-6)]
    assert first_three.grpo(scores, mask, "aab").flatten().tolist() == pytest.approx(wanted, rel=1e-6)
    centred = first_three.reinforce_plus_plus_baseline(scores, mask, "aab").flatten()
    assert float(centred.mean()) == pytest.approx(0, abs=1e-7)
    assert float(centred.var()) == pytest.approx(1, rel=1e-6)


def test_cli_formulas_turn_rule() -> None:
    r, m = torch.tensor([[5.0, 1.0, 7.0, 3.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0, 1, 1, 0]])
    # one step per run of valid tokens, on the reward of its last: 2, then 1 + 0.5 * 2
    assert framework.discounted_returns(r, m, 0.5, "turn").tolist() == [[2.0, 2.0, 0.0, 2.0, 2.0, 0.0]]


@pytest.mark.skipif(against.verl_version() is None, reason="verl is not installed")
def test_cli_formulas_match_verl() -> None:
    result = invoke("verify", "--against", "verl")
    assert result.exit_code == 0, result.output


# ---- verify ---------------------------------------------------------------------------------------------------------
def test_cli_verify_embedded() -> None:
    result = invoke("verify")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if " ok " in line]
    each = 1 if backends.native is None else 2  # a row a backend
    for row, words in zip(rows[::each], ("REINFORCE++, reset", "GRPO, dict", "REINFORCE++-baseline"), strict=False):
        assert words in row
    assert "every error inside its budget" in result.output


@pytest.mark.usefixtures("few")
def test_cli_verify_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rlkern.discounted_returns

    def wrong(rewards: Any, mask: Any, **options: Any) -> Any:
        found = right(rewards, mask, **options).clone()
        found[0, 0] += 1e-5 if found.dtype is torch.float32 else 1.0
        return found

    assert invoke("verify").exit_code == 0
    monkeypatch.setattr(rlkern, "discounted_returns", wrong)
    result = invoke("verify")
    assert result.exit_code == 1
    assert "BREACH" in result.output
    assert "8 outside the budget" in result.output or "4 outside the budget" in result.output


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_cli_verify_catches_nan(monkeypatch: pytest.MonkeyPatch, damage: float) -> None:
    right = rlkern.discounted_returns
    monkeypatch.setattr(rlkern, "discounted_returns", lambda *a, **k: right(*a, **k) + damage)
    assert invoke("verify").exit_code == 1


@pytest.mark.usefixtures("few")
def test_cli_verify_captured_batch(tmp_path: Path) -> None:
    batch = replace(rlkern.load_batch(), values=None)
    rlkern.save_batch(tmp_path / "b.safetensors", batch)
    result = invoke("verify", "--batch", tmp_path / "b.safetensors", "--backend", "torch", "--all")
    assert result.exit_code == 0, result.output
    assert "not checked: gae, skip: the batch has no values" in result.output
    assert "bfloat16" in result.output
    assert "cpp" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "--batch", "nowhere.safetensors"], "must name a file; got 'nowhere.safetensors'"),
        (["verify", "--backend", "fast"], "name must be one of auto, torch, cpp"),
        (["verify", "--backend", "cuda"], "backend 'cuda' cannot run here"),
        (["verify", "--device", "tpu"], "--device must be one that torch has here"),
        (["verify", "--against", "trl"], "--against must be 'plain' or 'verl'"),
        (["bench", "--ops", "gea"], "--ops must be among"),
        (["bench", "--shape", "0", "8"], "--shape must be two positive numbers"),
        (["bench", "--threads", "0"], "--threads must be at least 1"),
        (["bench", "--batch", "nowhere.safetensors"], "must name a file"),
        (["bench", "--batch", "b", "--shape", "2", "8"], "must not stand beside --batch"),
        (["bench", "--allocator", "fast"], "--allocator must be one of"),
    ],
)
def test_cli_rejects(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_cli_needs_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "typer" else real(name, *a))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'rlkern[cli]'" in capsys.readouterr().err


def test_cli_info() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for words in ("torch 2.", f"rlkern {rlkern.__version__}", "ISA", "RLKERN_BACKEND", "scan", "off: the CUDA module"):
        assert words in result.output


# ---- bench ----------------------------------------------------------------------------------------------------------
def bench(*arguments: object) -> Any:
    return invoke("bench", "--quick", "--shape", 6, 40, "--allocator", "default", *arguments)


def test_cli_bench_quick_reports(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    result = bench("--ops", "gae,discounted_returns", "--report", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "framework's formula" in result.output or "verl" in result.output
    assert "chunked matmul" in result.output
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "r" / "bench.json").read_text())
    assert [row["op"] for row in found["rows"]] == ["gae", "discounted_returns"]
    assert {"rlkern", "framework"} <= found["rows"][0]["seconds"].keys()
    assert found["rows"][0]["bytes"] == 24
    assert found["machine"]["versions"]["torch"] == str(torch.__version__)
    assert (tmp_path / "r" / "bench.png").stat().st_size > 1000


def test_cli_bench_times_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rlkern.discounted_returns
    monkeypatch.setattr(rlkern, "discounted_returns", lambda *a, **k: right(*a, **k) * 1.001)
    result = bench("--ops", "discounted_returns")
    assert result.exit_code == 1
    assert "WRONG: off by" in result.output
    row = result.output[result.output.index("discounted returns") :].splitlines()[0]
    assert "x │" not in row  # a ratio needs both answers right


def test_cli_bench_captured_batch(tmp_path: Path) -> None:
    rlkern.save_batch(tmp_path / "b.safetensors", rlkern.load_batch())
    options = ("--allocator", "default", "--ops", "gae")
    result = invoke("bench", "--quick", "--batch", tmp_path / "b.safetensors", *options)
    assert "batch (240, 128)" in result.output, result.output


def test_cli_bench_restarts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlkern.cli import bench as command

    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *a: calls.append(a))
    for name in machine.MALLOC:
        monkeypatch.delenv(name, raising=False)
    command._fix_allocator("default")
    assert not calls
    command._fix_allocator("reuse")
    (program, arguments, environment) = calls[0]
    assert (program, arguments[1:]) == (sys.executable, sys.orig_argv[1:])
    assert environment.items() >= machine.MALLOC.items()
    monkeypatch.setenv(next(iter(machine.MALLOC)), "4294967296")
    command._fix_allocator("reuse")
    assert len(calls) == 1


def test_bench_inputs_are_what_they_say() -> None:
    from rlkern.bench import inputs

    x = inputs.make(64, 100)
    lengths = x.mask.sum(-1)
    assert x.mask.dtype is torch.int64
    assert int(lengths.min()) >= 10
    assert int(lengths.max()) <= 100
    assert sorted(np.unique(x.uid, return_counts=True)[1].tolist()) == [8] * 8
    assert float(x.rewards[x.mask == 0].abs().sum()) == 0
    again = inputs.make(64, 100)
    assert torch.equal(x.rewards, again.rewards)
    assert list(x.uid) == list(again.uid)


class _Copies:
    """Bandwidth that collapses in the third round."""

    def __init__(self) -> None:
        self.calls = itertools.count()

    def measure(self) -> float:
        return 10.0 if next(self.calls) // 2 == 2 else 100.0


def test_bench_timing_drops_collapsed_rounds() -> None:
    samples, dropped = timing.interleave({"a": len, "b": sum}, [(1, 2)], _Copies(), rounds=5, budget=1.0)  # type: ignore[arg-type]
    assert dropped == 1
    assert {name: len(s.seconds) for name, s in samples.items()} == {"a": 4, "b": 4}
    assert samples["a"].floors(100.0) == pytest.approx(samples["a"].median)


def test_bench_report_judges_targets() -> None:
    row = bench_run.Row("kl_k3", report.LARGE, "large", 1, 12, 1024 * 8192)
    row.seconds = {"rlkern": 1.0, "framework": 6.0, "compiled": 2.0}
    row.floors = {"rlkern": 1.1, "framework": 6.6, "compiled": 2.2}
    verdicts = {what: hit for what, _, _, hit in report.targets(row)}
    assert verdicts == {"x floor": True, "vs framework": False, "vs compiled": True}
    assert report.targets(replace(row, threads=2)) == []
