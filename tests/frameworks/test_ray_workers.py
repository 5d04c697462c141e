# SPDX-License-Identifier: Apache-2.0
"""In real Ray workers: tasks, actors and actors of actors are patched by each switch, and by none without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
HERE = Path(__file__).parent
WHERE = """
import ray
ENV = {env!r}

def state(framework):
    if framework == "verl":
        import verl.trainer.ppo.core_algos as m
        import verl.workers.utils.losses as early
        return hasattr(m.agg_loss, "__rlkern__"), hasattr(early.agg_loss, "__rlkern__")
    import sys
    sys.path.insert(0, {here!r})
    from conftest import stand_ins
    stand_ins()
    import openrlhf.models.loss as m
    import openrlhf.models as early
    return hasattr(m.PolicyLoss.forward, "__rlkern__"), hasattr(early.PolicyLoss.forward, "__rlkern__")

@ray.remote(num_cpus=0)
def task(framework):
    return state(framework)

@ray.remote(num_cpus=0)
class Actor:
    def state(self, framework):
        return state(framework)
    def nested(self, framework):
        return ray.get(Actor.options(runtime_env={{"env_vars": {{"SOME": "THING"}}}}).remote().state.remote(framework))

ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", runtime_env=ENV)
actor = Actor.remote()
found = ray.get([task.remote({framework!r}), actor.state.remote({framework!r}), actor.nested.remote({framework!r})])
print("FOUND", {{x for pair in found for x in pair}})
ray.shutdown()
"""
SETUP = {"worker_process_setup_hook": "rlkern.integrations.setup"}
MODULE = {"VERL_USE_EXTERNAL_MODULES": "rlkern.integrations.verl"}
PLUGIN = {"VERL_USE_EXTERNAL_PLUGINS": "rlkern"}
HOOK = {"RAY_RUNTIME_ENV_HOOK": "rlkern.integrations.ray_runtime_env_hook"}
WAYS = [
    ("verl", "nothing", {}, {}, "{False}"),
    ("verl", "VERL_USE_EXTERNAL_MODULES", MODULE, {}, "{True}"),
    ("verl", "VERL_USE_EXTERNAL_MODULES through the cluster", {}, {"env_vars": MODULE}, "{True}"),
    ("verl", "setup hook", {}, SETUP, "{True}"),
    ("verl", "plugin", PLUGIN, {}, "{True}"),
    ("verl", "another plugin", {"VERL_USE_EXTERNAL_PLUGINS": "other"}, {}, "{False}"),
    ("openrlhf", "nothing", {}, {}, "{False}"),
    ("openrlhf", "RAY_RUNTIME_ENV_HOOK", HOOK, {}, "{True}"),
    ("openrlhf", "setup hook", {}, SETUP, "{True}"),
]


@pytest.mark.parametrize(("framework", "way", "env", "runtime_env", "expected"), WAYS, ids=[f"{f}, {w}" for f, w, *_ in WAYS])
def test_ray_workers(tmp_path, framework, way, env, runtime_env, expected):
    code = WHERE.format(here=str(HERE), env=runtime_env, framework=framework)
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert f"FOUND {expected}" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]


def test_ray_hook_never_raises(monkeypatch, caplog):
    from rlkern import integrations

    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(integrations, "patch", broken)
    integrations.setup()
    assert integrations.ray_runtime_env_hook({"env_vars": {}})["worker_process_setup_hook"] == "rlkern.integrations.setup"
    assert "stay as they are" in caplog.text
