# SPDX-License-Identifier: Apache-2.0
"""Throughput of every op beside its peers; claims come only from `rlkern bench`."""
