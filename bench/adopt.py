# SPDX-License-Identifier: Apache-2.0
"""What GPU results say of `auto`: `python -m rlkern.bench.adopt bench/results/*/gpu.json` prints rlkern/measured.py's table.

An op is taken on CUDA where every row of every case of it, at each shape and dtype, timed both backends without a problem
and CUDA was at least as fast; an op that no case times stays with Triton.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def _as_fast(row: dict[str, Any]) -> bool:
    seconds = row["seconds"]
    return "cuda" in seconds and "triton" in seconds and seconds["cuda"] <= seconds["triton"]


def cuda_first(paths: Iterable[Path]) -> dict[str, frozenset[str]]:
    """By architecture."""
    verdicts: dict[tuple[str, str], bool] = {}
    for path in paths:
        found = json.loads(path.read_text())
        table = found.get("bench", found)  # of tools/gpu.py, or of rlkern.bench.gpu itself
        for row in table["rows"]:
            key = (table["machine"]["arch"], row["op"])
            verdicts[key] = verdicts.get(key, True) and _as_fast(row)
    archs = {arch for (arch, _), good in verdicts.items() if good}
    return {arch: frozenset(op for (of, op), good in verdicts.items() if of == arch and good) for arch in sorted(archs)}


def main() -> None:
    for arch, ops in cuda_first(map(Path, sys.argv[1:])).items():
        print(f'    "{arch}": frozenset({sorted(ops)}),')


if __name__ == "__main__":
    main()
