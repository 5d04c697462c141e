# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, one file a framework. `ESTIMATORS` has them by "framework/name"; a bare name means verl's."""

from __future__ import annotations

from collections.abc import Callable

from rlkern.advantages import verl
from rlkern.advantages.verl import gae, grpo, opo, reinforce_plus_plus, reinforce_plus_plus_baseline, remax, rloo
from rlkern.types import Advantages

ESTIMATORS: dict[str, Callable[..., Advantages]] = {f"verl/{name}": getattr(verl, name) for name in verl.__all__}

__all__ = [
    "ESTIMATORS",
    "estimator",
    "gae",
    "grpo",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]


def estimator(name: str) -> Callable[..., Advantages]:
    """The estimator of that name: "verl/grpo", or "grpo" for verl's."""
    found = ESTIMATORS.get(name if "/" in name else f"verl/{name}")
    if found is None:
        known = ", ".join(sorted(ESTIMATORS))
        raise ValueError(f"rlkern.advantages.estimator: name must be one of {known}; got {name!r}. A bare name means verl's.")
    return found
