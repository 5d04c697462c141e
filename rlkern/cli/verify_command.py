# SPDX-License-Identifier: Apache-2.0
"""The arguments of `rlkern verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from rlkern import backends
from rlkern.cli import against as formulas
from rlkern.cli.shell import console, fail, load


def command(
    batch: Annotated[
        Path | None,
        typer.Option(help="A batch written by rlkern.save_batch or rlkern.capture; the embedded one by default."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to check; may be repeated. Default: all that run on the device."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the ops' tensors lie: cpu, cuda, cuda:1.")] = "cpu",
    against: Annotated[
        str,
        typer.Option(help="'plain': the framework's formulas restated; 'verl': the installed verl's own functions."),
    ] = "plain",
    every: Annotated[bool, typer.Option("--all", help="Show every cell, not the worst of each op and backend.")] = False,
) -> None:
    """Compare every op, dtype, mask kind and backend with float64; exit 1 if any error is over its budget."""
    from rlkern.cli.verify import verify

    if against not in ("plain", "verl"):
        fail(f"rlkern verify: --against must be 'plain' or 'verl'; got {against!r}.")
    if against == "verl" and formulas.verl_version() is None:
        fail("rlkern verify: --against verl needs verl in this environment (pip install verl); without it use 'plain'.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        fail(f"rlkern verify: --device must be one that torch has here; got {device!r} ({str(error).splitlines()[0]}).")
    for name in backend or []:
        try:
            with backends.use_backend(name):
                pass
        except backends.BackendError as error:
            fail(str(error))
        reasons = backends.why_not(name.partition(":")[0], "_gae_fwd", torch.device(device).type) if name != "auto" else []
        if reasons:
            fail(f"rlkern verify: backend {name!r} cannot run here: {'; '.join(reasons)}.")
    if not verify(load(batch), backend, against, every, console(), device):
        raise typer.Exit(1)
