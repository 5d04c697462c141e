# SPDX-License-Identifier: Apache-2.0
"""The check on a machine with a GPU: `make gpu` (or `python tools/gpu.py RESULTS [COMMIT] [--steps tests sanitizers bench]`).

tests: of every op on the GPU, by Triton and by CUDA, in several processes. sanitizers: memcheck, racecheck, initcheck and
synccheck on tiny shapes, where they work. bench: the table of bench/gpu.py. Each step ends in under nine minutes. Writes
RESULTS/gpu.json (machine, versions, commit, tests, table; steps not asked for keep what stood there) and RESULTS/gpu.log.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS, SANITIZER, BENCH = 260, 100, 500  # seconds: of each backend, of each tool, of the table
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TINY = """
import sys, torch, rlkern
backend, device = sys.argv[1:]
g = torch.Generator(device).manual_seed(0)
def draw(*shape): return torch.randn(*shape, generator=g, device=device)
with rlkern.use_backend(backend):
    for rows, tokens in ((3, 33), (2, 9001)):  # many rows, few long ones
        x, y = draw(rows, tokens), draw(rows, tokens).requires_grad_()
        m = (draw(rows, tokens) < 0.7).long(); m[:, 0] = 1
        leaf = x.clone().requires_grad_()
        (rlkern.gae(leaf, y, m, gamma=0.9, lam=0.9).advantages.sum() + rlkern.discounted_returns(leaf, m, gamma=0.9).sum()).backward()
        rlkern.affine_scan(torch.sigmoid(y), leaf).sum().backward()
        (rlkern.masked_whiten(leaf, m).square().sum() + rlkern.masked_normalize(y, m).sum() + rlkern.masked_var(y, m)).backward()
        rlkern.policy_loss(x, y, x, m).loss.backward(); rlkern.policy_loss_and_grad(x, y.detach(), x, m)
        rlkern.policy_loss(x, y, x, m, variant="gspo").loss.backward(); rlkern.value_loss(y, x, x, m).loss.backward()
        rlkern.kl_penalty(y, x, "k3").sum().backward(); rlkern.shape_rewards(x, x, y.detach(), m, kl_coef=0.1)
        ids = rlkern.group_index(torch.arange(rows, device=device) // 2)
        for f in (rlkern.advantages.grpo, rlkern.advantages.rloo): f(x, m, ids)
        rlkern.advantages.gae(x, y.detach(), m, 0.9, 0.9); rlkern.advantages.reinforce_plus_plus(x, m, 0.9)
        rlkern.rollout_correction(x, y.detach(), m, rollout_is="token"); rlkern.importance_weights(x, y.detach(), m)
if device == "cuda":
    torch.cuda.synchronize()
print("done")
"""


def say(text: str, log: Path) -> None:
    print(text, flush=True)
    with log.open("a") as file:
        file.write(text + "\n")


def run(command: list[str], limit: float, log: Path, **env: str) -> tuple[int, str]:
    """Exit status (124: out of time) and output, which also goes to the log. Never in the checkout: kernels/ lies there."""
    say("$ " + " ".join(command), log)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}, cwd=tempfile.gettempdir(), start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest still says what it has found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
        out.seek(0)
        text = out.read()
    with log.open("a") as file:
        file.write(text)
    say(f"  exit {status} after {time.monotonic() - began:.0f} s", log)
    return status, text


def tests(results: Path, log: Path, backend: str) -> dict[str, object]:
    xml = results / f"tests-{backend}.xml"
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", backend, f"--junitxml={xml}", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=100", "--timeout-method=thread"]  # a kernel that hangs has a name
    status, text = run([*command, *files], TESTS, log)
    found: dict[str, object] = {"exit": status, "summary": text.strip().splitlines()[-1] if text.strip() else ""}
    if xml.exists():
        suite = ET.parse(xml).getroot().find("testsuite")
        assert suite is not None
        found |= {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        found["failed"] = [
            f"{c.get('classname')}::{c.get('name')}" for c in suite if c.find("failure") is not None or c.find("error") is not None
        ][:50]
    return found


def sanitizer(log: Path, tool: str, backend: str) -> dict[str, object]:
    """Where it works: a checker that refuses the machine is a line of the report, not a failure; what it finds is one."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return {"ran": False, "why": "compute-sanitizer is not here"}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks for what a machine may not have
    status, text = run([*command, sys.executable, "-c", TINY, backend, "cuda"], SANITIZER, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return verdict(status, text)


def verdict(status: int, text: str) -> dict[str, object]:
    """Of a sanitizer's output. What it found counts also where the program died of it."""
    summary = re.findall(r"SUMMARY: (.*)", text)
    found = any(int(n) for line in summary for n in re.findall(r"\d+", line)[:1])
    if not found and (status != 0 or "done" not in text):
        return {"ran": False, "why": f"exit {status}", "end": text[-500:]}
    return {"ran": True, "clean": not found, "summary": summary[-1] if summary else ""}


def has_cuda() -> bool:
    """And a machine with nvcc has: its module was built, so it must load."""
    code = "from rlkern import backends; print(backends.cuda is not None)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    return asked.stdout.strip() == "True"


def bench(results: Path, log: Path) -> dict[str, object]:
    made = results / "bench"
    budget = str(BENCH - 60)  # a row that has begun may take its time
    status, text = run([sys.executable, "-m", "rlkern.bench.gpu", "--report", str(made), "--budget", budget], BENCH, log)
    say(text, log)
    table = made / "gpu.json"
    return {"bench_exit": status, "bench": json.loads(table.read_text()) if table.exists() else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "build" / "gpu")
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--steps", nargs="+", default=["tests", "sanitizers", "bench"], choices=["tests", "sanitizers", "bench"])
    given = parser.parse_args()
    results = given.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    log, table = results / "gpu.log", results / "gpu.json"
    found: dict[str, object] = (json.loads(table.read_text()) if table.exists() else {}) | {"commit": given.commit}
    backends = ["triton"] + ["cuda"] * has_cuda()
    good = "cuda" in backends or shutil.which("nvcc") is None

    def keep(step: str, name: str, result: dict[str, object], fine: bool) -> None:
        """At once: what ends this run loses no more than the step it is in."""
        nonlocal good
        good = good and fine
        found.setdefault(step, {})[name] = result  # type: ignore[index,attr-defined]
        table.write_text(json.dumps(found, indent=1) + "\n")
        say(f"{step} {name}: {json.dumps(result)}", log)

    if not good:
        keep("tests", "cuda", {"why": "nvcc is here, but rlkern._C_cuda does not load"}, False)
    if "tests" in given.steps:
        for backend in backends:
            of = tests(results, log, backend)
            keep("tests", backend, of, of["exit"] == 0)
    if "sanitizers" in given.steps:
        for backend, tool in [("cuda", t) for t in TOOLS if "cuda" in backends] + [("triton", TOOLS[0])]:
            seen = sanitizer(log, tool, backend)
            keep("sanitizers", f"{tool} {backend}", seen, bool(seen.get("clean", True)))
    if "bench" in given.steps:
        found |= bench(results, log)
        good = good and found["bench_exit"] == 0
        table.write_text(json.dumps(found, indent=1) + "\n")
    say(f"wrote {table} and {log}", log)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
