# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for OpenRLHF's own tests, which load its files by path under names of their own: ours are put into those
copies too, once they are collected."""

import sys

from rlkern.integrations import hooks, openrlhf

PUT = []


def pytest_collection_finish():
    files = {site.module.replace(".", "/") + ".py": site.module for site in openrlhf.sites()}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        canonical = next((name for end, name in files.items() if file.endswith("/" + end)), None)
        if canonical is None:
            continue
        swaps = {}
        for site in openrlhf.sites():
            if site.module == canonical:
                swapped = hooks._put(site, module)
                if swapped is not None:
                    swaps[id(swapped[0])] = swapped
                    PUT.append(f"{module.__name__}.{site.name}")
        hooks._swap(swaps)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"put in place: {', '.join(PUT)}")
