# SPDX-License-Identifier: Apache-2.0
"""verl's functions and ours, from 0.7.0 to 0.9.1.

    VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl python3 -m verl.trainer.main_ppo ...

Imported so, by verl itself, this module patches; imported otherwise it does nothing until `patch` is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from rlkern.integrations import hooks, verl_correction, verl_estimators, verl_losses, verl_tensors
from rlkern.integrations.site import Site, logger
from rlkern.integrations.verl_common import CORE, CORRECTION, GROUPS, MATH

# Where these call a patched function, they reach ours.
LEFT = {
    f"{CORE}.compute_policy_loss": "deprecated, and built of what is patched",
    f"{CORRECTION}.compute_rollout_corr_metrics_from_logprobs": "built of what is patched",
    f"{CORRECTION}.compute_rollout_correction_and_add_to_batch": "built of what is patched",
    f"{CORRECTION}.compute_is_metrics, compute_rs_metrics": "parts of what is patched",
    f"{GROUPS}.as_torch_index": "labels, no arithmetic",
    f"{MATH}.logprobs_from_logits, entropy_from_logits": "no kernel yet",
}


def sites() -> Iterable[Site]:
    """Every function that has a counterpart."""
    for part in (verl_tensors, verl_estimators, verl_losses, verl_correction):
        yield from part.sites()


def patch(mode: str = "on") -> None:
    """`rlkern.integrations.patch("verl", mode)`."""
    hooks.patch("verl", sites, mode)


def unpatch() -> None:
    hooks.unpatch("verl")


def patch_safely(mode: str) -> None:
    """verl runs without us rather than not at all."""
    try:
        patch(mode)
    except Exception:
        logger.exception("rlkern: verl stays as it is")


def patch_if_named(module: str, mode: str) -> None:
    """Where verl's own switch names that module."""
    if module in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").replace(" ", "").split(","):
        patch_safely(mode)


patch_if_named(__name__, "on")
