# SPDX-License-Identifier: Apache-2.0
"""The frameworks' own tests: with rlkern on, none changes its verdict."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = HERE.parents[1] / ".frameworks"
VERL = {
    "0.9.1": ("tests.trainer.ppo", "tests.trainer.test_multi_trajectories_advantage_on_cpu", "tests.test_protocol_on_cpu"),
    "0.8.0": ("tests.trainer.ppo", "tests.test_protocol_on_cpu"),
    "0.7.1": ("tests.trainer.ppo", "tests.test_protocol_on_cpu"),
}
OPENRLHF = [
    f"tests.test_{name}"
    for name in (
        "loss_aggregation", "reward_shaping", "kl_estimator_gradient", "experience", "ppo_trainer", "actor_entropy_temperature",
    )
]  # fmt: skip


def verdicts(folder, packages, *options, path=(), **env):
    """Verdict by test, and the output; in a process of its own, away from any `tests` of ours."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*map(str, path), *before]), **env}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options, "--pyargs", *packages]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}::{case.get('name')}"] = bad[0] if bad else "passed"
    return found, done.stdout


PATCHED = """
import atexit
def tell():
    from rlkern import integrations
    print("PATCHED", sum(s.state == "on" for s in integrations.status()))
atexit.register(tell)
"""


@pytest.mark.parametrize("version", VERL)
def test_shipped_verl(tmp_path, version):
    path = [] if version == "0.9.1" else [OTHERS / f"verl-{version}"]
    if path and not path[0].exists():
        pytest.skip(f"verl {version} is not installed beside")
    (tmp_path / "rlkern_tells.py").write_text(PATCHED)
    own, _ = verdicts(tmp_path, VERL[version], path=path)
    ours, text = verdicts(
        tmp_path, VERL[version], "-p", "rlkern_tells", path=[*path, tmp_path], VERL_USE_EXTERNAL_MODULES="rlkern.integrations.verl"
    )
    assert len(own) > 100
    assert ours == own
    assert int(text.split("PATCHED ")[1].split()[0]) >= 17


def test_shipped_openrlhf(tmp_path):
    own, _ = verdicts(tmp_path, OPENRLHF)
    ours, text = verdicts(tmp_path, OPENRLHF, "-p", "swapped", path=[HERE])
    assert len(own) == 74
    assert ours == own
    placed = text.split("put in place: ")[1]
    for name in ("masked_mean", "compute_approx_kl", "aggregate_loss", "PolicyLoss.forward"):
        assert name in placed
