# SPDX-License-Identifier: Apache-2.0
"""verl in shadow mode by its own switch: ``VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl_shadow``."""

from rlkern.integrations.verl import patch_if_named

patch_if_named(__name__, "shadow")
