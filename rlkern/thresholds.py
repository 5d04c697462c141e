# SPDX-License-Identifier: Apache-2.0
"""The thresholds of rollout correction, as verl writes them: 2.0, "0.5_2.0", "0.5_2.0,0.1"."""

from __future__ import annotations

import math
from typing import Any

from rlkern import check

RS_OPTIONS = (
    "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3", "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k2", "seq_max_k3",
)  # fmt: skip


def _positive(op: str, name: str, text: str, given: Any, pair: bool) -> list[float]:
    """The positive numbers of "u" or, where a pair may stand, "l_u"."""
    parts = text.split("_", 1) if pair else [text]
    must = "hold positive numbers, 'u' or 'l_u' with l <= u" if pair else "hold a positive number"
    try:
        numbers = [float(part) for part in parts if pair or "_" not in part]
    except ValueError as error:
        raise check.fail(op, name, must, repr(given), "For example '0.5_2.0'.") from error
    if not numbers or not all(x > 0 for x in numbers) or numbers[0] > numbers[-1]:
        raise check.fail(op, name, must, repr(given), "Ratios and divergences are positive.")
    return numbers


def importance_range(op: str, given: Any) -> tuple[tuple[float, float], bool]:
    """((lower, upper), is it a band that zeroes what is outside?); an upper bound alone has 1 / upper below."""
    name = "rollout_is_threshold"
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise check.fail(op, name, "be a number or a string 'u' or 'l_u'", check.describe(given), "For example 2.0.", TypeError)
    numbers = _positive(op, name, given.strip() if isinstance(given, str) else str(float(given)), given, isinstance(given, str))
    upper = numbers[-1]
    return (numbers[0] if len(numbers) > 1 else 1.0 / upper, upper), len(numbers) > 1


def rejection_limits(op: str, options: Any, given: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(the options without repeats, (low, high) of each): log-ratios for k1, else 0 and the upper limit."""
    if options is None:
        return (), ()
    if not isinstance(options, str):
        raise check.fail(op, "rollout_rs", "be a string", check.describe(options), "For example 'token_k1,seq_mean_k3'.")
    names = list(dict.fromkeys(part.strip() for part in options.split(",") if part.strip()))
    if not names or any(name not in RS_OPTIONS for name in names):
        raise check.fail(op, "rollout_rs", f"hold names out of {', '.join(RS_OPTIONS)}", repr(options), "Separate them by commas.")
    name = "rollout_rs_threshold"
    if given is None:
        raise check.fail(op, name, "be given with rollout_rs", "None", "One for all, or one for each.")
    if not isinstance(given, int | float | str):
        raise check.fail(op, name, "be a number or a string", check.describe(given), "For example '0.5_2.0,0.1'.", TypeError)
    specs = [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else [str(given)]
    if len(specs) not in (1, len(names)):
        raise check.fail(op, name, f"hold 1 or {len(names)} thresholds", repr(given), "One for all, or one for each.")
    limits: list[float] = []
    for option, spec in zip(names, specs if len(specs) > 1 else specs * len(names), strict=True):
        numbers = _positive(op, name, spec, given, option.endswith("k1"))
        if option.endswith("k1"):
            lower, upper = numbers if len(numbers) > 1 else (1.0 / numbers[0], numbers[0])
            if lower > upper:
                raise check.fail(op, name, "hold at least 1 for k1, or 'l_u'", repr(given), "u alone stands for 1/u to u.")
            limits += [math.log(lower), math.log(upper)]
        else:
            limits += [0.0, numbers[0]]
    return tuple(names), tuple(limits)
