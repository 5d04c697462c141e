# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF's estimators, all of 0.11.2, in its order: rewards of rows are shaped in their group, clipped, placed with the KL at
tokens, then scanned. No autograd, as in OpenRLHF."""

from rlkern.advantages.openrlhf.group import dr_grpo, flash_reinforce, group_norm, reinforce_baseline, rloo
from rlkern.advantages.openrlhf.tokens import gae, reinforce

__all__ = ["dr_grpo", "flash_reinforce", "gae", "group_norm", "reinforce", "reinforce_baseline", "rloo"]
