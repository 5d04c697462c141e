# SPDX-License-Identifier: Apache-2.0
"""Tests against the real frameworks: `make test-frameworks`, in a virtual environment of their own."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from rlkern import integrations
from rlkern.testing import assert_within

if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["*"]
torch.set_num_threads(1)


def _module(name, **names):
    """A stand-in for a package that needs a GPU: what is imported of it at module level, which fails if it is called."""

    def absent(*args, **kwargs):
        raise RuntimeError(f"{name} is not here")

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for key, value in names.items():
        setattr(module, key, value or absent)
    sys.modules[name] = module


def stand_ins():
    """For flash_attn and vllm, which OpenRLHF imports; after transformers has looked for them itself."""
    import transformers.modeling_utils  # noqa: F401

    if "flash_attn" not in sys.modules:
        _module("flash_attn", __version__="0")
        _module("flash_attn.bert_padding", **dict.fromkeys(("index_first_axis", "pad_input", "rearrange", "unpad_input")))
        _module("flash_attn.utils")
        _module("flash_attn.utils.distributed", all_gather=None)
        _module("vllm", SamplingParams=None, __version__="0")
        _module("vllm.inputs", TokensPrompt=dict)
        _module("vllm.utils", random_uuid=None)


@pytest.fixture(scope="session")
def openrlhf():
    stand_ins()
    import openrlhf.models
    import openrlhf.trainer.ppo_utils.experience_maker
    import openrlhf.trainer.ray.ppo_actor

    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "vllm")]:
        del sys.modules[name]  # TRL, in the same process, would take them for the packages
    return openrlhf


@pytest.fixture(autouse=True)
def nothing_patched():
    yield
    integrations.unpatch()


def tree(x, where="result"):
    """Tensors and numbers of a result, by where they stand."""
    if isinstance(x, torch.Tensor):
        return {where: x.detach().clone()}
    if isinstance(x, (int, float)):
        return {where: torch.tensor(float(x))}  # a metric: float32 before it was a number
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (tuple, list)) else ()
    return {k: v for i, y in items for k, v in tree(y, f"{where}[{i}]").items()}


class Compared:
    """What a call gives: the framework's own, patched, and the framework's own in float64."""

    def __init__(self, framework, call):
        self.own, self.exact = self.run(call, torch.float32), self.run(call, torch.float64)
        with integrations.patched(framework):
            self.ours = self.run(call, torch.float32)

    @staticmethod
    def run(call, dtype):
        torch.manual_seed(0)
        try:
            return tree(call(dtype))
        except Exception as refusal:
            return type(refusal)

    def check(self, what, size=0.0):
        """Inside the budget, or the same refusal; how many tensors. `size`: of the terms, where they cancel."""
        if isinstance(self.own, type):
            assert self.ours is self.own, what
            return 0
        assert not isinstance(self.ours, type), (what, self.ours)
        assert self.ours.keys() == self.own.keys(), what
        for where, own in self.own.items():
            assert self.ours[where].dtype == own.dtype, (what, where)
            scale = self.exact[where].double().abs().nan_to_num(0, 0, 0).max() if own.numel() else 0
            assert_within(self.ours[where].to(own.dtype), own, self.exact[where], max(scale, size), f"{what}: {where}")
        return len(self.own)


@pytest.fixture
def compared():
    return Compared
