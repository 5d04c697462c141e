# SPDX-License-Identifier: Apache-2.0
"""tools/bans.py: every ban catches a planted offence, and the tree is clean."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
C_SPDX = "// SPDX-License-Identifier: Apache-2.0\n"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rlkern_bans", ROOT / "tools" / "bans.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bans = load()


def found(root: Path, name: str, text: str) -> list[str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return [str(f) for f in bans.check(root)]


def function(lines: int) -> str:
    return SPDX + "def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("csrc/cpu/a.cpp", C_SPDX + "#include <torch/extension.h>\n", "csrc/cpu/a.cpp:2: error: a Torch header"),
        ("csrc/math/a.h", C_SPDX + '\n  # include "ATen/ATen.h"\n', "csrc/math/a.h:3: error: a Torch header"),
        ("csrc/cuda/a.cu", C_SPDX + "#include <c10/core/Device.h>\n", "csrc/cuda/a.cu:2: error: a Torch header"),
        ("rlkern/scan.py", SPDX + "n = x.sum().item()\n", "rlkern/scan.py:2: error: .item()"),
        ("rlkern/reference/scan.py", SPDX + "f = x.item\n", "rlkern/reference/scan.py:2: error: .item()"),
        ("rlkern/advantages/verl.py", SPDX + "assert x\n", "rlkern/advantages/verl.py:2: error: assert"),
        ("rlkern/check.py", SPDX + "def f(x):\n    assert x, 'no'\n", "rlkern/check.py:3: error: assert"),
        ("kernels/scan.py", SPDX + "n = x.sum().item()\n", "kernels/scan.py:2: error: .item in a launcher"),
        ("kernels/scan.py", SPDX + "n = x.cpu()\n", "kernels/scan.py:2: error: .cpu in a launcher"),
        ("rlkern/kl.py", "x = 1\n", "rlkern/kl.py:1: error: no SPDX"),
        ("Makefile", "all:\n", "Makefile:1: error: no SPDX"),
        (".ci/run", "#!/bin/bash\ntrue\n" + SPDX, ".ci/run:1: error: no SPDX"),
        ("csrc/a.h", C_SPDX + "int x;\n" * 400, "csrc/a.h:1: error: file of 401 lines"),
        ("tests/test_a.py", SPDX + "x = 1\n" * 300, "tests/test_a.py:1: warning: file of 301 lines"),
        ("bench/a.py", function(61), "bench/a.py:2: error: function f of 61 lines"),
        ("tools/a.py", function(51), "tools/a.py:2: warning: function f of 51 lines"),
    ],
)
def test_bans_catch(tmp_path: Path, name: str, text: str, message: str) -> None:
    lines = found(tmp_path, name, text)
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rlkern/testing.py", SPDX + "assert x.item()\n"),
        ("rlkern/cli/bench.py", SPDX + "assert x.item()\n"),
        ("tests/test_a.py", SPDX + "assert x.item()\n"),
        ("rlkern/scan.py", SPDX + '"""No .item() and no assert here."""\nd = dict(a=1).items()\n'),
        ("csrc/a.h", C_SPDX + '#include "torch_free.h"\n// #include <torch/torch.h> is banned\n'),
        (".ci/run", "#!/bin/bash\n" + SPDX + "true\n"),
        ("docs/index.md", "# No SPDX line in prose\n"),
        ("rlkern/kl.py", function(50)),
    ],
)
def test_bans_let_pass(tmp_path: Path, name: str, text: str) -> None:
    assert found(tmp_path, name, text) == []


def test_bans_tree_is_clean() -> None:
    assert [str(f) for f in bans.check(ROOT) if f.error] == []
