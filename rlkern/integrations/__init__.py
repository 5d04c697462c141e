# SPDX-License-Identifier: Apache-2.0
"""rlkern inside verl, OpenRLHF and TRL: one switch replaces their functions by ours, or runs ours beside theirs.

    VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl python3 -m verl.trainer.main_ppo ...
    RAY_RUNTIME_ENV_HOOK=rlkern.integrations.ray_runtime_env_hook python3 -m openrlhf.cli.train_ppo_ray ...

What has no counterpart here stays the framework's; `status()` says which and why.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
from collections.abc import Iterator
from typing import NamedTuple

from rlkern.integrations import hooks
from rlkern.integrations.ray import ray_runtime_env_hook, ray_runtime_env_hook_shadow, setup, setup_shadow
from rlkern.integrations.recording import capture
from rlkern.integrations.site import logger

FRAMEWORKS = ("verl", "openrlhf", "trl")
__all__ = [
    "FRAMEWORKS",
    "Status",
    "capture",
    "patch",
    "patched",
    "ray_runtime_env_hook",
    "ray_runtime_env_hook_shadow",
    "setup",
    "setup_shadow",
    "status",
    "summary",
    "unpatch",
]


class Status(NamedTuple):
    framework: str
    function: str
    state: str  # "on", "shadow", "left" or "recorded"
    detail: str  # why it was left, or what shadow mode found


def _named(op: str, framework: str | None) -> tuple[str, ...]:
    if framework is None:
        return FRAMEWORKS
    if framework not in FRAMEWORKS:
        raise ValueError(f"rlkern.integrations.{op}: framework must be one of {', '.join(FRAMEWORKS)}; got {framework!r}. None: all.")
    return (framework,)


def patch(framework: str | None = None, mode: str = "on") -> None:
    """Replace the functions of a framework, or of all three, now or when they are imported.

    Args:
        framework: "verl", "openrlhf" or "trl"; None: all.
        mode: "on"; "shadow": the framework's results are used, rlkern runs beside them and `summary()` has the worst error of
            each function; "off": as `unpatch`. A second call changes the mode.

    Raises:
        ValueError: another framework or mode.

    >>> from rlkern import integrations
    >>> integrations.patch("trl"); integrations.unpatch("trl")
    """
    for name in _named("patch", framework):
        table = importlib.import_module(f"rlkern.integrations.{name}")
        hooks.patch(name, table.sites, mode)


def unpatch(framework: str | None = None) -> None:
    """Put the framework's own functions back, wherever they were bound."""
    for name in _named("unpatch", framework):
        hooks.unpatch(name)


@contextlib.contextmanager
def patched(framework: str | None = None, mode: str = "on") -> Iterator[None]:
    """`patch` for a while."""
    names = [name for name in _named("patched", framework) if name not in hooks.sites()]
    patch(framework, mode)
    try:
        yield
    finally:
        for name in names:
            unpatch(name)


def status() -> list[Status]:
    """What is patched, what was left to the framework, and why."""
    found = []
    for framework, sites in hooks.sites().items():
        if framework not in FRAMEWORKS:  # a recording
            found += [Status(framework.partition(" ")[2], site.target, "recorded", site.why_left) for site in sites]
            continue
        table = importlib.import_module(f"rlkern.integrations.{framework}")
        for site in sites:
            state = "left" if site.replacement is None else site.mode
            detail = site.why_left if state == "left" else site.worst.line() if state == "shadow" else ""
            found.append(Status(framework, site.target, state, detail))
        found += [Status(framework, name, "left", why) for name, why in table.LEFT.items()]
    return found


def summary() -> str:
    """What shadow mode found of each function, a line each; empty where it compared none."""
    lines = [f"{site.target}: {site.worst.line()}" for found in hooks.sites().values() for site in found if site.worst.seen]
    return "\n".join(lines)


@atexit.register
def _say_summary() -> None:
    text = summary()
    if text:
        logger.warning("rlkern, shadow mode:\n%s", text)
