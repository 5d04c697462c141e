# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, one module a framework. `ESTIMATORS` has them by "framework/name"; a bare name means verl's."""

from __future__ import annotations

from collections.abc import Callable

from rlkern.advantages import classic, nemo, openrlhf, roll, trl, verl
from rlkern.advantages.verl import (
    gae,
    gdpo,
    gpg,
    grpo,
    grpo_passk,
    grpo_vectorized,
    opo,
    optimal_token_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
    rloo_vectorized,
    tir_optimal_token_baseline,
)
from rlkern.types import Advantages

_FRAMEWORKS = {"verl": verl, "openrlhf": openrlhf, "trl": trl, "nemo": nemo, "roll": roll, "classic": classic}
ESTIMATORS: dict[str, Callable[..., Advantages]] = {
    f"{framework}/{name}": getattr(module, name) for framework, module in _FRAMEWORKS.items() for name in module.__all__
}

__all__ = [
    "ESTIMATORS",
    "classic",
    "estimator",
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "nemo",
    "openrlhf",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "rloo_vectorized",
    "roll",
    "tir_optimal_token_baseline",
    "trl",
    "verl",
]


def estimator(name: str) -> Callable[..., Advantages]:
    """The estimator of that name: "verl/grpo", or "grpo" for verl's."""
    found = ESTIMATORS.get(name if "/" in name else f"verl/{name}")
    if found is None:
        known = ", ".join(sorted(ESTIMATORS))
        raise ValueError(f"rlkern.advantages.estimator: name must be one of {known}; got {name!r}. A bare name means verl's.")
    return found
