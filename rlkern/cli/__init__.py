# SPDX-License-Identifier: Apache-2.0
"""The command `rlkern`: verify the numerics, measure the throughput, show what runs here."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def app() -> typer.Typer:
    """The typer application, built on demand: the library itself needs neither typer nor rich."""
    import typer

    from rlkern.cli import bench, info, verify_command

    found = typer.Typer(
        help="Fused kernels for RLHF training: verify them, time them, see what runs here.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    found.command("verify")(verify_command.command)
    found.command("bench")(bench.command)
    found.command("info")(info.command)
    return found


def main() -> None:
    """Entry point of the console script."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"rlkern: the command line needs {' and '.join(missing)}. Run: pip install 'rlkern[cli]'. The library itself works without.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    app()()
