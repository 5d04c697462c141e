# SPDX-License-Identifier: Apache-2.0
"""`rlkern info`: versions, the machine, and each backend with why it is on or off."""

from __future__ import annotations

import os
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from rlkern import backends, library
from rlkern.bench import machine
from rlkern.cli.frameworks import show
from rlkern.cli.shell import console


def _families() -> dict[str, list[str]]:
    """Raw ops by the public module that defines them."""
    found: dict[str, list[str]] = {}
    for op in library.OPS.values():
        found.setdefault(getattr(op.reference, "func", op.reference).__module__.rpartition(".")[2], []).append(op.name)
    return found


def _state(backend: str, ops: list[str], device: str) -> str:
    """on, off with its reasons, or on for some ops and off for the rest."""
    reasons = {op: backends.why_not(backend, op, device) for op in ops}
    off = {op: why for op, why in reasons.items() if why}
    if not off:
        return "[green]on[/]"
    if len(off) < len(ops):
        return f"[yellow]on, but not for[/] {', '.join(op.strip('_') for op in off)}"
    first = next(iter(off.values()))
    return escape("off: " + "; ".join(first))


def command(
    frameworks: Annotated[bool, typer.Option("--frameworks", help="Also what the drop-ins replace in verl, OpenRLHF and TRL.")] = False,
) -> None:
    """Show versions, the instruction set, threads, and each backend with why it is on or off."""
    out = console()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("versions", ", ".join(f"{name} {text}" for name, text in machine.versions().items()))
    facts.add_row("CPU", f"{machine.cpu_model()}, {machine.cores()} cores")
    usable = [name for name, ok in backends.native.isas().items() if ok] if backends.native is not None else []
    facts.add_row("ISA", f"{machine.isa()} chosen; usable here: {', '.join(usable) or 'none'}")
    facts.add_row("threads", f"{torch.get_num_threads()} (torch.set_num_threads)")
    facts.add_row("backend", f"{backends.current_backend()} (RLKERN_BACKEND={os.environ.get('RLKERN_BACKEND', 'not set')})")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPU", ", ".join(gpus) or "none that torch can see")
    out.print(facts)
    devices = ["cpu"] + (["cuda"] if gpus else [])
    for device in devices:
        found = Table(title=f"backends for tensors on {device}", title_justify="left", title_style="bold")
        found.add_column("family")
        for name in backends.NAMES:
            found.add_column(name, overflow="fold")
        for family, ops in _families().items():
            found.add_row(family, *[_state(name, ops, device) for name in backends.NAMES])
        out.print(found)
    if frameworks:
        show(out)
