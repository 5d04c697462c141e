# SPDX-License-Identifier: Apache-2.0
"""What a run found: a table per shape and thread count, a JSON file, a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlkern.bench import machine
from rlkern.bench.cases import CASES, FRAMEWORK, Case
from rlkern.bench.run import EMPTY, OURS, TOLERANCE, Row

CASE = {case.name: case for case in CASES}
IN_CACHE, SMALL_RIVAL = (
    1.5,
    4.0,
)  # at (64, 512): times the in-cache floor beyond the empty op; times faster than any rival
MIDDLE, LARGE = "(256, 2048)", "(1024, 8192)"


def milliseconds(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return ""
    ms = seconds * 1e3
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


# ---- targets --------------------------------------------------------------------------------------------------------
def beyond_empty(row: Row) -> float:
    """Small shapes: what the op takes beyond the same op on empty tensors, over its floor in one core's cache."""
    if not {OURS, EMPTY} <= row.seconds.keys():
        return math.nan
    return (row.seconds[OURS] - row.seconds[EMPTY]) / (row.bytes * row.elements / row.cache_bandwidth)


def targets(row: Row) -> list[tuple[str, float, float, bool]]:
    """(what, reached, wanted, hit) for the numbers that this row is held to: one thread, the named shapes."""
    target, found = CASE[row.op].target, []
    if row.threads != 1:
        return []
    floor = {MIDDLE: target.middle, LARGE: target.large}.get(row.shape)
    if floor is not None and OURS in row.floors:
        found.append(("x floor", row.floors[OURS], floor, row.floors[OURS] <= floor))
    if row.shape == LARGE or row.kind == "labels":
        rival = target.only or row.rival() or ""
        for what, name, wanted in (("framework", FRAMEWORK, target.framework), (rival, rival, target.rival)):
            reached = row.ratio(name)
            if wanted is not None and not math.isnan(reached):
                found.append((f"vs {what}", reached, wanted, reached >= wanted))
    if row.kind == "hot" and row.shape == "(64, 512)":
        beyond, rival = beyond_empty(row), row.rival() or ""
        if not math.isnan(beyond):
            found.append(("x cache floor", beyond, IN_CACHE, beyond <= IN_CACHE))
        if rival and not math.isnan(row.ratio(rival)):
            found.append(("vs rival", row.ratio(rival), SMALL_RIVAL, row.ratio(rival) >= SMALL_RIVAL))
    return found


def _verdicts(row: Row) -> str:
    lines = []
    for what, reached, wanted, hit in targets(row):
        sign = "<=" if "floor" in what else ">="
        colour, word = ("green", "hit") if hit else ("red", "MISS")
        lines.append(f"[{colour}]{what} {reached:.2f} {sign} {wanted:g} {word}[/]")
    return "\n".join(lines)


# ---- the table ------------------------------------------------------------------------------------------------------
def _peer_lines(row: Row) -> str:
    """Every peer with its time and how many times longer than rlkern it takes, the fastest first; a lost cell in red."""
    lines = []
    for name in sorted((n for n in row.seconds if n not in (OURS, EMPTY)), key=row.seconds.__getitem__):
        ratio = row.ratio(name)
        text = f"{name} {milliseconds(row.seconds[name])} {times(ratio)}".rstrip()
        lines.append(f"[red]{text}[/]" if ratio < 1 else text)
    return "\n".join(lines + [f"[yellow]{name}: {escape(why)}[/]" for name, why in row.problems.items() if name != OURS])


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    kinds = {
        "hot": "hot in cache",
        "cold": "rotating inputs, cold",
        "large": "out= reused",
        "labels": "a str of its own for each row, hashes cached",
    }
    speed = sorted(r.bandwidth for r in rows if not math.isnan(r.bandwidth))
    copy = f", copy {speed[len(speed) // 2] / 1e9:.1f} GB/s" if speed else ""
    dropped = sum(r.dropped for r in rows)
    lost = f", {dropped} rounds dropped (bandwidth collapsed)" if dropped else ""
    return f"{first.shape}, {kinds[first.kind]}, {first.threads} thread{'s' * (first.threads > 1)}{copy}{lost}"


def table(rows: Sequence[Row]) -> Table:
    """The rows of one shape and thread count."""
    found = Table(title=_title(rows), title_justify="left", title_style="bold", show_lines=True)
    small = any(r.kind == "hot" for r in rows)
    labels = ["op", "B/elt", "floor ms", "rlkern ms", "x floor", "of copy"] + (["empty ms", "x cache"] if small else [])
    for name in labels:
        found.add_column(name, justify="left" if name == "op" else "right")
    for name in ("peers, ms, times rlkern's", "targets"):
        found.add_column(name)
    for row in rows:
        ours = row.floors.get(OURS, math.nan)
        floor = row.seconds[OURS] / ours if OURS in row.floors else None
        cells = [
            CASE[row.op].title,
            str(row.bytes or ""),
            milliseconds(floor),
            milliseconds(row.seconds.get(OURS)) or f"[red]{escape(row.problems.get(OURS, '')[:60])}[/]",
            "" if math.isnan(ours) else f"{ours:.2f}",
            "" if math.isnan(ours) else f"{1 / ours:.0%}",
        ]
        if small:
            beyond = beyond_empty(row)
            cells += [milliseconds(row.seconds.get(EMPTY)), "" if math.isnan(beyond) else f"{beyond:.2f}"]
        found.add_row(*cells, _peer_lines(row), _verdicts(row))
    return found


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by shape and thread count, in order of appearance."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.threads), []).append(row)
    return list(found.values())


def print_all(rows: Sequence[Row], notes: dict[str, str], console: Console) -> None:
    for group in groups(rows):
        console.print(table(group))
    held = [hit for row in rows for *_, hit in targets(row)]
    console.print(f"machine: {machine.cpu_model()}, {machine.cores()} cores; ISA {machine.isa()}")
    console.print(f"malloc, the same for all sides: {machine.allocator()}")
    console.print(f"framework: {notes[FRAMEWORK]}; floor: bytes / {notes.get('bandwidth', 'copy')} of the same round")
    console.print(f"each answer timed is within {TOLERANCE:g} of float64 (share of the largest value, inside the mask)")
    for name in ("numba", "pandas"):
        if name in notes:
            console.print(f"[yellow]{escape(notes[name])}[/]")
    if held:
        console.print(f"targets: {sum(held)} of {len(held)} hit")


# ---- files ----------------------------------------------------------------------------------------------------------
def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(rows: Sequence[Row], notes: dict[str, str]) -> dict[str, Any]:
    found = []
    for row in rows:
        case: Case = CASE[row.op]
        held = [{"what": what, "reached": reached, "wanted": wanted, "hit": hit} for what, reached, wanted, hit in targets(row)]
        ratios = {name: row.ratio(name) for name in row.seconds if name not in (OURS, EMPTY)}
        extra = {"moved": case.moved, "ratios": ratios, "targets": held, "beyond_empty": beyond_empty(row)}
        found.append(_plain(dataclasses.asdict(row) | extra))
    return {"machine": machine.describe(), "notes": notes, "tolerance": TOLERANCE, "rows": found}


def picture(rows: Sequence[Row], path: Path) -> None:
    """Times the floor, rlkern beside its peers, logarithmic; one panel per shape and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [group for group in groups(rows) if any(row.floors for row in group)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 4.2 * len(panels)), squeeze=False)
    colours = {OURS: "#1b6ca8", "best rival": "#e0a030", FRAMEWORK: "#b0b0b0"}
    for axis, group in zip(axes[:, 0], panels, strict=True):
        for offset, (name, colour) in enumerate(colours.items()):
            heights = [row.floors.get((row.rival() or "") if name == "best rival" else name, math.nan) for row in group]
            axis.bar([i + 0.27 * (offset - 1) for i in range(len(group))], heights, 0.27, label=name, color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylabel("time / floor")
        axis.set_title(_title(group), fontsize=10)
        axis.set_xticks(range(len(group)), [CASE[row.op].title.partition(",")[0] for row in group], rotation=20, ha="right")
        axis.legend(fontsize=8)
    figure.suptitle(f"rlkern bench, {machine.cpu_model()}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(rows: Sequence[Row], notes: dict[str, str], folder: Path) -> list[str]:
    """bench.json and, with matplotlib, bench.png into `folder`; returns a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(as_json(rows, notes), indent=1) + "\n")
    lines = [f"wrote {folder / 'bench.json'}"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*lines, "no picture: matplotlib is not installed (pip install 'rlkern[bench]')"]
    if not any(row.floors for row in rows):
        return [*lines, "no picture: no row has a floor"]
    picture(rows, folder / "bench.png")
    return [*lines, f"wrote {folder / 'bench.png'}"]
