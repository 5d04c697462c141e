# SPDX-License-Identifier: Apache-2.0
"""The mechanism of the drop-ins, on a framework made for it; the real ones: `make test-frameworks`."""

import importlib
import pickle
import sys

import pytest
import torch

import rlkern

pytest.importorskip("wrapt")
from rlkern import integrations
from rlkern.integrations import hooks
from rlkern.integrations.site import Site, Uncovered

MODULE = """
import torch
def total(values, mask, scale=1.0):
    return (values * mask).sum() * scale
def odd(values, mask):
    return (values * mask).sum() + 1
class Thing:
    def total(self, values, mask):
        return (values * mask).sum()
TABLE = {"total": total}
"""
LATE = "from made_math import total, TABLE\n"


def total(values, mask, scale=1.0):
    if scale == 0:
        raise Uncovered("a scale of 0")
    return rlkern.masked_sum(values, mask) * scale


def method(self, values, mask):
    return rlkern.masked_sum(values, mask)


def probes(original):
    return [((torch.arange(6.0).view(2, 3), torch.ones(2, 3)), {})]


def on_thing(original):
    return [((None, *probes(original)[0][0]), {})]


def sites():
    yield Site(
        "made_math", "total", [lambda v, m, scale=1.0: v.sum() * 2, total], probes, "_masked_sum_fwd", ("values",), terms=("values", 1.0)
    )
    yield Site("made_math", "odd", [total], probes, "_masked_sum_fwd")
    yield Site("made_math", "gone", [total], probes, "_masked_sum_fwd")
    yield Site("made_math", "Thing.total", [method], on_thing, "_masked_sum_fwd")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A framework of one module, and one that binds its names; neither is imported yet."""
    (tmp_path / "made_math.py").write_text(MODULE)
    (tmp_path / "made_late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield lambda name: importlib.import_module(f"made_{name}")
    hooks.unpatch("made")
    hooks._hooked.discard("made_math")
    for name in ("made_math", "made_late"):
        sys.modules.pop(name, None)


def is_ours(function):
    return hasattr(function, "__rlkern__")


def test_integrations_patch_before_the_import(made):
    hooks.patch("made", sites)
    late = made("late")
    assert is_ours(late.total)
    assert is_ours(late.TABLE["total"])
    assert is_ours(made("math").Thing.total)
    hooks.unpatch("made")
    assert not is_ours(late.total)
    assert not is_ours(late.TABLE["total"])
    assert not is_ours(made("math").Thing.total)


def test_integrations_patch_after_the_import(made):
    late = made("late")
    own = late.total
    for _ in range(2):
        hooks.patch("made", sites)
        assert late.total is made("math").total is late.TABLE["total"]
        assert late.total.__rlkern__.original is own
        hooks.unpatch("made")
        assert late.total is own
    hooks.patch("made", sites, "off")
    assert late.total is own


def test_integrations_choose_by_behaviour(made):
    """The first choice that answers as the original; none: left alone, with the reason."""
    hooks.patch("made", sites)
    module = made("math")
    states = {site.name: site for site in hooks.sites()["made"]}
    assert states["total"].chosen is total
    assert not is_ours(module.odd)
    assert "no version" in states["odd"].why_left
    assert "does not have it" in states["gone"].why_left


def test_integrations_calls(made, caplog):
    hooks.patch("made", sites)
    module, (values, mask) = made("math"), probes(None)[0][0]
    assert module.total(values, mask) == 15
    assert module.Thing().total(values, mask) == 15
    assert module.total(values, mask, scale=0) == 0  # uncovered: the original
    with pytest.raises(RuntimeError, match="must match"):  # a shape that both refuse: the framework's own error
        module.total(values, mask[:, :2])
    assert "framework" in caplog.text
    assert pickle.loads(pickle.dumps(module.total)) is module.total


def test_integrations_shadow(made, caplog):
    hooks.patch("made", sites, "shadow")
    module, (values, mask) = made("math"), probes(None)[0][0]
    for _ in range(3):
        module.total(values.requires_grad_(), mask)
    assert "total: 3 calls" in integrations.summary()
    assert "inside" in integrations.summary()
    module.total.__rlkern__.chosen = lambda v, m, scale=1.0: v.sum() * (1 + 1e-5)
    assert module.total(values, mask) == 15  # the framework's result
    assert "OVER" in integrations.summary()
    assert any("is off by" in r.message for r in caplog.records)
    module.total.__rlkern__.chosen = total
    module.total(values, mask, scale=0)
    assert "1 not compared" in integrations.summary()


def test_integrations_accelerators_without_kernels(made):
    hooks.patch("made", sites)
    site = made("math").total.__rlkern__
    with pytest.raises(Uncovered, match="no kernel for meta"):
        site.refuse_foreign([torch.empty(2, device="meta")])


def test_integrations_never_stop_an_import(made):
    def broken():
        yield Site("made_math", "total", [total], lambda original: 1 / 0, "_masked_sum_fwd")

    hooks.patch("made", broken)
    assert not is_ours(made("math").total)
    assert "could not be probed" in hooks.sites()["made"][0].why_left


def test_integrations_reject():
    for call in (lambda: integrations.patch("unsloth"), lambda: integrations.patch("trl", "dark"), lambda: integrations.unpatch("x")):
        with pytest.raises(ValueError, match=r"must be one of .*; got"):
            call()
    with pytest.raises(ValueError, match="framework must be one of verl, openrlhf"):
        integrations.capture("/nowhere", steps=1, framework="trl")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        integrations.capture("/nowhere", steps=0)


def test_integrations_status_and_recordings(tmp_path):
    with integrations.patched("verl"), integrations.capture(tmp_path / "run", steps=2) as recording:
        rows = {(row.framework, row.state) for row in integrations.status()}
        assert rows == {("verl", "left"), ("verl", "recorded")}  # verl is not here: every function waits for its module
        assert recording.written == 0
        with pytest.raises(ValueError, match="recorded already"):
            integrations.capture(tmp_path / "run", steps=2)
    assert integrations.status() == []


def test_integrations_ray_hooks():
    for hook, name in (
        (integrations.ray_runtime_env_hook, "rlkern.integrations.setup"),
        (integrations.ray_runtime_env_hook_shadow, "rlkern.integrations.setup_shadow"),
    ):
        assert hook({"env_vars": {"A": "1"}}) == {"env_vars": {"A": "1"}, "worker_process_setup_hook": name}
        assert hook(None) == {"worker_process_setup_hook": name}
        assert hook({"worker_process_setup_hook": "mine"}) == {"worker_process_setup_hook": "mine"}
        integrations.unpatch()
