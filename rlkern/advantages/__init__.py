# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, one file a framework."""
