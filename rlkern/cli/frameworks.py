# SPDX-License-Identifier: Apache-2.0
"""`rlkern info --frameworks`: in the frameworks installed here, what rlkern replaces, what it leaves, and why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def _imported(modules: set[str]) -> list[str]:
    """Which of them could not be imported, and why; what they print is not shown."""
    failed = []
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for name in sorted(modules):
            try:
                importlib.import_module(name)
            except Exception as problem:
                failed.append(f"{name}: {type(problem).__name__}: {problem}")
    return failed


def show(out: Console) -> None:
    if importlib.util.find_spec("wrapt") is None:
        out.print("frameworks: the drop-ins need wrapt (pip install 'rlkern\\[integrations]')")
        return
    from rlkern import integrations
    from rlkern.integrations import hooks

    for framework in integrations.FRAMEWORKS:
        if framework not in sys.modules and importlib.util.find_spec(framework) is None:
            out.print(f"{framework}: not installed here")
            continue
        integrations.patch(framework)
        failed = _imported({site.module for site in hooks.sites()[framework]})
        found = Table(title=f"{framework}, patched", title_justify="left", title_style="bold")
        for name in ("function", "state", "why"):
            found.add_column(name, overflow="fold")
        for row in integrations.status():
            if row.framework == framework:
                found.add_row(row.function, f"[green]{row.state}[/]" if row.state == "on" else row.state, escape(row.detail))
        out.print(found)
        for line in failed:
            out.print(f"  could not be imported: {escape(line)}")
        integrations.unpatch(framework)
