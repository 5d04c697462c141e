# SPDX-License-Identifier: Apache-2.0
"""`rlkern bench`: its arguments, the allocator setting, the progress bar."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rlkern.bench import machine
from rlkern.cli.shell import console, fail, load

ALLOCATORS = ("reuse", "default")


def _fix_allocator(allocator: str) -> None:
    """Start this process again, once, with malloc told to keep large blocks: glibc reads its settings at start-up."""
    if allocator == "reuse" and not any(name in os.environ for name in machine.MALLOC):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | machine.MALLOC)


def _chosen(ops: list[str] | None, suite: str) -> list[str]:
    from rlkern.bench.cases import CASES, SUITES

    if suite not in SUITES:
        fail(f"rlkern bench: --suite must be one of {', '.join(SUITES)}; got {suite!r}.")
    known = [case.name for case in CASES]
    wanted = [name for entry in ops or SUITES[suite] for name in entry.split(",")]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        fail(f"rlkern bench: --ops must be among {', '.join(known)}; got {', '.join(unknown)}.")
    return wanted


def _plan(ops: list[str] | None, suite: str, shape: tuple[int, int] | None, threads: int | None, batch: Path | None, quick: bool) -> Any:
    from rlkern.bench import run

    if threads is not None and not 1 <= threads <= 1024:
        fail(f"rlkern bench: --threads must be at least 1; got {threads}.")
    if shape is not None and min(shape) < 1:
        fail(f"rlkern bench: --shape must be two positive numbers, rows and tokens; got {shape[0]} {shape[1]}.")
    if batch is not None and shape is not None:
        fail("rlkern bench: --shape must not stand beside --batch; got both. A batch has its own shape.")
    wanted = _chosen(ops, suite)
    shapes = [run.shape_of(*shape)] if shape else [run.shape_of(*s) for s in run.SHAPES[suite] if not quick or s == (256, 2048)]
    if batch is not None:
        shapes = [run.batch_shape(load(batch))]
    if shape is None and batch is None and suite == "core":
        shapes.append(run.labels_shape())
    counts = [threads] if threads else [1] if quick or machine.cores() < 2 else [1, 2]
    rounds, budget = (8, 0.25) if quick else (40, 2.0)
    return run.Plan(shapes, counts, wanted, rounds, budget)


def _run(plan: Any, out: Console) -> Any:
    from rlkern.bench import run

    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting (torch.compile peers compile as they come)", total=len(list(plan.rows())))
        first = True

        def step(text: str) -> None:
            nonlocal first
            bar.update(task, description=text, advance=0 if first else 1)
            first = False

        return run.run(plan, step)


def command(
    quick: Annotated[bool, typer.Option(help="(256, 2048) at one thread, few rounds: within a minute.")] = False,
    ops: Annotated[list[str] | None, typer.Option(help="Ops to time, repeated or with commas; all by default.")] = None,
    suite: Annotated[str, typer.Option(help="'core', or 'algorithms': every loss variant, estimator and correction.")] = "core",
    shape: Annotated[tuple[int, int] | None, typer.Option(help="Rows and tokens, instead of the suite's shapes.")] = None,
    threads: Annotated[int | None, typer.Option(help="Thread count for all sides; 1 and 2 by default.")] = None,
    batch: Annotated[Path | None, typer.Option(help="Time a captured batch instead of synthetic ones.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
    allocator: Annotated[
        str, typer.Option(help="'reuse': malloc keeps freed large blocks (the process restarts once); 'default'.")
    ] = "reuse",
) -> None:
    """Time every op beside the framework's path, torch.compile, numba and a chunked-matmul scan, in one process."""
    if allocator not in ALLOCATORS:
        fail(f"rlkern bench: --allocator must be one of {', '.join(ALLOCATORS)}; got {allocator!r}.")
    plan = _plan(ops, suite, shape, threads, batch, quick)
    _fix_allocator(allocator)
    from rlkern.bench import report as reports
    from rlkern.bench import run

    out = console()
    rows, notes = _run(plan, out)
    reports.print_all(rows, notes, out)
    if report is not None:
        try:
            lines = reports.write(rows, notes, report)
        except OSError as error:
            fail(f"rlkern bench: --report must name a folder that can be written; got {error}.")
        for line in lines:
            out.print(line, markup=False)
    failures = run.wrong(rows)
    for line in failures:
        out.print(line, markup=False, style="red")
    if failures:
        raise typer.Exit(1)
