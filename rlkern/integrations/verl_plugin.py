# SPDX-License-Identifier: Apache-2.0
"""The entry point of group "verl.plugins", which verl 0.9 imports by itself: it acts only if VERL_USE_EXTERNAL_PLUGINS names
rlkern. Installing a package changes no numbers."""

import os

from rlkern.integrations.verl import patch_safely

if "rlkern" in os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "").replace(" ", "").split(","):
    patch_safely("on")
