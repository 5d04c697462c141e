# SPDX-License-Identifier: Apache-2.0
"""Rollout batches: one in memory, one file on disk, and a recorder for a training run."""

from rlkern.data.batch import FIELDS, RolloutBatch, load_batch, save_batch
from rlkern.data.recorder import Capture, capture

__all__ = ["FIELDS", "Capture", "RolloutBatch", "capture", "load_batch", "save_batch"]
