# SPDX-License-Identifier: Apache-2.0
"""What the commands share: one console, one-line failures."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

import rlkern


def console() -> Console:
    """A terminal shows its own width; a log gets one that holds the tables."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=180)


def fail(message: str) -> NoReturn:
    """One clear line on stderr and exit code 2."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


def load(path: Path | None) -> rlkern.RolloutBatch:
    """The embedded batch, or the captured one at `path`."""
    try:
        return rlkern.load_batch(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        fail(str(error))
