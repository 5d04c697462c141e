# SPDX-License-Identifier: Apache-2.0
"""verl's advantage estimators, all of 0.9.1, under verl's names, positional order and defaults. No autograd, as in verl."""

from rlkern.advantages.verl.baseline import gpg, opo, reinforce_plus_plus_baseline, rloo, rloo_vectorized
from rlkern.advantages.verl.group import gdpo, grpo, grpo_passk, grpo_vectorized
from rlkern.advantages.verl.optimal_token_baseline import optimal_token_baseline, tir_optimal_token_baseline
from rlkern.advantages.verl.scan import gae, reinforce_plus_plus, remax

__all__ = [
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "rloo_vectorized",
    "tir_optimal_token_baseline",
]
