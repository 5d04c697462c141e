# SPDX-License-Identifier: Apache-2.0
"""The specification, in plain torch on any device: what every kernel must equal, and the fallback where there is none."""
