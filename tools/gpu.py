# SPDX-License-Identifier: Apache-2.0
"""The whole check on a machine with a GPU, in under nine minutes: `make gpu` (or `python tools/gpu.py RESULTS [COMMIT]`).

Tests of every op on the GPU, in several processes; a memory checker on tiny shapes, where there is one; then the table of
bench/gpu.py. Writes RESULTS/gpu.json (machine, versions, commit, tests, table) and RESULTS/gpu.log.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# seconds; together under nine minutes. The bench has a budget of its own, inside its limit.
TESTS, SANITIZER, BENCH = 270, 60, 190
TINY = """
import torch, rlkern
x = torch.randn(3, 33, device="cuda"); m = (torch.rand_like(x) < 0.7).long()
with rlkern.use_backend("triton"):
    rlkern.gae(x, x, m, gamma=0.9, lam=0.9); rlkern.masked_whiten(x, m)
    rlkern.policy_loss_and_grad(x, x, x, m); rlkern.advantages.grpo(x, m, [0, 0, 1])
torch.cuda.synchronize(); print("done")
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
            os.killpg(process.pid, 9)
            process.wait()
            status = 124
        out.seek(0)
        text = out.read()
    with log.open("a") as file:
        file.write(text)
    say(f"  exit {status} after {time.monotonic() - began:.0f} s", log)
    return status, text


def tests(results: Path, log: Path) -> dict[str, object]:
    xml = results / "tests.xml"
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", "triton", f"--junitxml={xml}", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
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


def sanitizer(log: Path) -> dict[str, object]:
    """Where it works: a checker that refuses the machine is a line of the report, not a failure."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not here"}
    status, text = run([tool, "--tool", "memcheck", sys.executable, "-c", TINY], SANITIZER, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line]
    if not summary or "done" not in text:
        return {"ran": False, "why": f"exit {status}", "end": text[-500:]}
    return {"ran": True, "summary": summary[-1].strip("= ")}


def main() -> int:
    results = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "gpu").resolve()
    results.mkdir(parents=True, exist_ok=True)
    log = results / "gpu.log"
    log.unlink(missing_ok=True)
    found: dict[str, object] = {"commit": sys.argv[2] if len(sys.argv) > 2 else None, "tests": tests(results, log)}
    say(json.dumps(found["tests"]), log)
    found["sanitizer"] = sanitizer(log)
    say(json.dumps(found["sanitizer"]), log)
    budget = str(BENCH - 40)  # a row that has begun may take its time
    status, text = run([sys.executable, "-m", "rlkern.bench.gpu", "--report", str(results), "--budget", budget], BENCH, log)
    say(text, log)
    table = results / "gpu.json"
    found |= {"bench_exit": status, "bench": json.loads(table.read_text()) if table.exists() else None}
    table.write_text(json.dumps(found, indent=1) + "\n")
    say(f"wrote {table} and {log}", log)
    return int(found["tests"]["exit"] != 0 or status != 0)  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
