# SPDX-License-Identifier: Apache-2.0
"""The switches that Ray offers: a hook in each worker process, and a hook on a driver's runtime environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlkern.integrations.site import logger

_KEY = "worker_process_setup_hook"


def _patch(mode: str) -> None:
    """Never raises: a worker whose hook raises dies, and Ray starts the next."""
    try:
        from rlkern import integrations

        integrations.patch(None, mode)
    except Exception:
        logger.exception("rlkern: the frameworks stay as they are")


def setup() -> None:
    """`worker_process_setup_hook="rlkern.integrations.setup"`: every framework is patched as this process imports it."""
    _patch("on")


def setup_shadow() -> None:
    """The same in shadow mode."""
    _patch("shadow")


def _with_hook(runtime_env: dict[str, Any] | None, hook: Callable[[], None]) -> dict[str, Any]:
    """The environment with our hook in it; this process is patched too, for a driver does arithmetic of its own."""
    found = dict(runtime_env or {})
    name = f"rlkern.integrations.{hook.__name__}"
    given = found.get(_KEY)
    if given is None:
        found[_KEY] = name
    elif given != name:
        logger.warning("rlkern: the workers have a setup hook already, %r; call %s from it", given, name)
    hook()
    return found


def ray_runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """`RAY_RUNTIME_ENV_HOOK=rlkern.integrations.ray_runtime_env_hook`: Ray calls it in ray.init of the driver."""
    return _with_hook(runtime_env, setup)


def ray_runtime_env_hook_shadow(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """The same in shadow mode."""
    return _with_hook(runtime_env, setup_shadow)
