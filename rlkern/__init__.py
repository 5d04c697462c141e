# SPDX-License-Identifier: Apache-2.0
"""rlkern: fused kernels for RLHF training, with the numerics of the reference path."""

from rlkern import advantages, backends
from rlkern.affine_scan import affine_scan
from rlkern.backends import BackendError, explain, use_backend
from rlkern.data import RolloutBatch, capture, load_batch, save_batch
from rlkern.group import group_mean_std, group_normalize
from rlkern.labels import group_index
from rlkern.scan import discounted_returns, gae
from rlkern.types import Advantages, GroupIndex, GroupStats, Moments

__version__ = "0.1.0"
__all__ = [
    "Advantages",
    "BackendError",
    "GroupIndex",
    "GroupStats",
    "Moments",
    "RolloutBatch",
    "advantages",
    "affine_scan",
    "capture",
    "discounted_returns",
    "explain",
    "gae",
    "group_index",
    "group_mean_std",
    "group_normalize",
    "load_batch",
    "save_batch",
    "use_backend",
]

backends.environment_backend()
