# SPDX-License-Identifier: Apache-2.0
"""Puts sites in place and takes them back: after a module's import, before anyone has bound its names; and by identity in
what is loaded already."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

try:
    import wrapt
except ImportError as missing:
    raise ImportError("rlkern.integrations: wrapt must be installed; got no such module. pip install 'rlkern[integrations]'.") from missing

from rlkern.integrations.site import Site, logger

MODES = ("on", "off", "shadow")
_sites: dict[str, list[Site]] = {}  # by framework, of what is or will be patched
_hooked: set[str] = set()  # modules whose import we hear of
_lock = threading.RLock()


# ---- identity ---------------------------------------------------------------------------------------------------------
def _swap(swaps: dict[int, tuple[Any, Any]]) -> None:
    """In every loaded module, and in the dicts at its top: each key's object by the one it is swapped for."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(module, ModuleType) or names is None or module.__name__.startswith("rlkern.integrations"):
            continue
        for holder in [names, *(x for x in list(names.values()) if type(x) is dict)]:
            for name, x in list(holder.items()):
                old, new = swaps.get(id(x), (None, None))
                if old is x and new is not None:
                    holder[name] = new


def _holder(module: ModuleType, name: str) -> tuple[Any, str] | None:
    """What holds the function, a module or a class, and under which name; None where this version has none."""
    of_class, _, last = name.rpartition(".")
    holder = getattr(module, of_class, None) if of_class else module
    return (holder, last) if holder is not None and hasattr(holder, last) else None


# ---- a site -----------------------------------------------------------------------------------------------------------
def _put(site: Site, module: ModuleType) -> tuple[Any, Any] | None:
    """Replace one function; what was swapped, where others may have bound it."""
    found = _holder(module, site.name)
    if found is None:
        site.why_left = "this version does not have it"
        return None
    holder, name = found
    original = getattr(holder, name)
    known = getattr(original, "__rlkern__", None)
    if type(known) is type(site) or not site.choose(original):
        return None
    setattr(holder, name, site.replace(original))
    return original, site.replacement


def _imported(module: ModuleType) -> None:
    """Never raises: a framework runs without us rather than not at all."""
    with _lock:
        swaps = {}
        for site in [s for sites in _sites.values() for s in sites if s.module == module.__name__ and s.replacement is None]:
            try:
                swapped = _put(site, module)
            except Exception as problem:
                site.why_left = f"{type(problem).__name__}: {problem}"
                logger.exception("rlkern: %s stays as it is", site.target)
                continue
            if swapped is not None:
                swaps[id(swapped[0])] = swapped
        if swaps:
            _swap(swaps)


# ---- a framework ------------------------------------------------------------------------------------------------------
def patch(framework: str, sites: Callable[[], Iterable[Site]], mode: str = "on") -> None:
    """Put every site of a framework in place, now or when its module is imported; again: change the mode."""
    if mode not in MODES:
        raise ValueError(f"rlkern.integrations.patch: mode must be one of {', '.join(MODES)}; got {mode!r}. 'shadow' compares only.")
    if mode == "off":
        return unpatch(framework)
    with _lock:
        if framework not in _sites:
            _sites[framework] = list(sites())
        for site in _sites[framework]:
            site.mode = mode
        for module in dict.fromkeys(site.module for site in _sites[framework]):
            if module not in _hooked:
                _hooked.add(module)
                wrapt.register_post_import_hook(_imported, module)  # at once, where it is imported already
            elif module in sys.modules:
                _imported(sys.modules[module])
    return None


def unpatch(framework: str) -> None:
    """The framework's own functions everywhere again."""
    with _lock:
        swaps: dict[int, tuple[Any, Any]] = {}
        for site in _sites.pop(framework, []):
            site.chosen = None  # whoever kept the replacement gets the original's results
            if site.replacement is None:
                continue
            found = _holder(sys.modules[site.module], site.name)
            if found is not None and getattr(found[0], found[1]) is site.replacement:
                setattr(*found, site.original)
            swaps[id(site.replacement)] = (site.replacement, site.original)
        if swaps:
            _swap(swaps)


def sites() -> dict[str, list[Site]]:
    """Of the frameworks that are patched."""
    return {framework: list(found) for framework, found in _sites.items()}
