# SPDX-License-Identifier: Apache-2.0
"""KL estimators per token, and the KL reward."""

from __future__ import annotations

import math

from rlkern import check

_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
KL_NAMES = tuple(_ESTIMATORS) + tuple(f"{name}+" for name in _ESTIMATORS)
Range = tuple[float, float] | None


def estimator(
    op: str, kl_penalty: str, log_ratio_range: Range | str = "verl", value_range: Range | str = "verl"
) -> tuple[str, list[float]]:
    """The estimator's own name (k1, abs, k2, k3, with "+" if straight-through) and its clamps as four numbers.

    The default clamps are verl's: k3 reads its log-ratio in [-20, 20] and gives values in [-10, 10]; the others have none.
    """
    check.word(op, "kl_penalty", kl_penalty, KL_NAMES)
    name = _ESTIMATORS[kl_penalty.removesuffix("+")]
    clamps: list[float] = []
    for argument, given, default in (("log_ratio_range", log_ratio_range, 20.0), ("value_range", value_range, 10.0)):
        if isinstance(given, str):
            check.word(op, argument, given, ("verl",))
            given = (-default, default) if name == "k3" else None
        low, high = (-math.inf, math.inf) if given is None else given
        if not low <= high:
            raise check.fail(op, argument, "be (low, high) with low <= high, or None", given, "None means no clamp.")
        clamps += [float(low), float(high)]
    return name + ("+" if kl_penalty.endswith("+") and name != "k2" else ""), clamps
