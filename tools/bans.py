# SPDX-License-Identifier: Apache-2.0
"""The house's own lint: `python tools/bans.py [root]` prints what breaks a rule and exits 1 if anything does.

Errors: Torch headers in csrc/; `.item()` and bare `assert` in the ops; whatever waits for the device in kernels/; files without
an SPDX line; files over 400 lines; Python functions over 60, their docstring not counted. Warnings: files over 300 lines,
functions over 50.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("csrc", "kernels", "rlkern", "bench", "tests", "tools", "examples", "docs", ".ci", ".github")
CODE = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
SPDX_TOO = {".sh", ".toml", ".yml", ".yaml"}
SPDX_NAMES = {"Makefile", "CMakeLists.txt", "run", ".clang-format"}
OPS = re.compile(r"rlkern/(?!testing\.py)([^/]+|(reference|advantages)/.*)\.py")
KERNELS = re.compile(r"kernels/.*\.py")
WAITS = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero"}  # a CUDA graph could not hold them
TORCH_HEADER = re.compile(r'\s*#\s*include\s*[<"](torch|ATen|c10)[/.]')
FILE_LINES, FILE_AIM = 400, 300
FUNCTION_LINES, FUNCTION_AIM = 60, 50


class Finding(NamedTuple):
    error: bool
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {'error' if self.error else 'warning'}: {self.text}"


def files(root: Path) -> Iterator[Path]:
    yield from sorted(p for p in root.iterdir() if p.is_file())
    for folder in FOLDERS:
        yield from sorted(p for p in (root / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def size(where: str, what: str, lines: int, limit: int, aim: int) -> Iterator[Finding]:
    if lines > aim:
        yield Finding(lines > limit, where, f"{what} of {lines} lines; the limit is {limit}, the aim {aim}")


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    docstring = first if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None else None
    spans = [node] + ([docstring] if docstring else [])
    whole, *doc = [(n.end_lineno or n.lineno) - n.lineno + 1 for n in spans]
    return whole - sum(doc)


def python(name: str, text: str) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(text, name)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from size(where, f"function {node.name}", function_lines(node), FUNCTION_LINES, FUNCTION_AIM)
        if KERNELS.fullmatch(name) and isinstance(node, ast.Attribute) and node.attr in WAITS:
            yield Finding(True, where, f".{node.attr} in a launcher; it waits for the device")
        if not OPS.fullmatch(name):
            continue
        if isinstance(node, ast.Assert):
            yield Finding(True, where, "assert in an op; raise an error of the form in rlkern/check.py")
        if isinstance(node, ast.Attribute) and node.attr == "item":
            yield Finding(True, where, ".item() in an op; it waits for the device")


def check(root: Path) -> list[Finding]:
    found: list[Finding] = []
    for path in files(root):
        name = path.relative_to(root).as_posix()
        if not {path.suffix, path.name} & (CODE | SPDX_TOO | SPDX_NAMES):
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if not any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:2]):
            found.append(Finding(True, f"{name}:1", "no SPDX line among the first two"))
        if path.suffix in CODE:
            found += size(f"{name}:1", "file", len(lines), FILE_LINES, FILE_AIM)
        if path.suffix == ".py":
            found += python(name, text)
        if name.startswith("csrc/"):
            at = (i for i, line in enumerate(lines, 1) if TORCH_HEADER.match(line))
            found += [Finding(True, f"{name}:{i}", "a Torch header in csrc/; kernels take plain addresses") for i in at]
    return found


def main() -> int:
    found = check(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
    print(*found, sep="\n", end="\n" if found else "")
    return int(any(f.error for f in found))


if __name__ == "__main__":
    sys.exit(main())
