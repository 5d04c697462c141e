# SPDX-License-Identifier: Apache-2.0
from rlkern.cli import main

main()
