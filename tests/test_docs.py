# SPDX-License-Identifier: Apache-2.0
"""What the docs show runs as it stands: every public docstring's example, and the README's code from top to bottom."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern import advantages

ROOT = Path(__file__).parents[1]
PARTS = ("Args:", "Returns:", "Numerics:", "Raises:", "Example:", "Source:")
OPS = {name: getattr(rlkern, name) for name in rlkern.__all__ if inspect.isfunction(getattr(rlkern, name))}
NOT_OPS = {"use_backend", "explain", "load_batch", "save_batch", "capture"}
ESTIMATORS = {f"advantages.{name.removeprefix('verl/')}": fn for name, fn in advantages.ESTIMATORS.items()}
DOCUMENTED = {**{k: v for k, v in OPS.items() if k not in NOT_OPS}, **ESTIMATORS}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docs_example_runs(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    found = doctest.DocTestFinder(recurse=False).find(DOCUMENTED[name], name, globs={"rlkern": rlkern, "torch": torch})
    examples = [test for test in found if test.examples]
    assert examples, "no example"
    for test in examples:
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docs_parts_in_order(name):
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    places = [text.find(part) for part in PARTS]
    assert -1 not in places, [part for part, at in zip(PARTS, places, strict=True) if at < 0]
    assert places == sorted(places)


def test_docs_readme_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) >= 6
    exec(compile("\n".join(code), "README.md", "exec"), {})
    assert "actor/ppo_kl" in capsys.readouterr().out


def test_docs_readme_begins_with_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    block = lines[lines.index("```") + 1 :]
    assert block[0].startswith("make run")
    assert block[1].startswith("make test")
