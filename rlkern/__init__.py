# SPDX-License-Identifier: Apache-2.0
"""rlkern: fused kernels for RLHF training, with the numerics of the reference path."""

from rlkern import advantages, backends
from rlkern.affine_scan import affine_scan
from rlkern.backends import BackendError, explain, use_backend
from rlkern.correction import rollout_correction, rollout_metrics
from rlkern.data import RolloutBatch, capture, load_batch, save_batch
from rlkern.group import group_mean_std, group_normalize
from rlkern.importance_weights import importance_weights, off_policy_mask
from rlkern.kl import kl_penalty, shape_rewards
from rlkern.labels import group_index
from rlkern.logprob import entropy, log_prob, sum_pi_squared
from rlkern.loss import policy_loss, policy_loss_and_grad
from rlkern.metrics import Metrics, PolicyLoss, PolicyLossAndGrad, ValueLoss
from rlkern.moments import masked_mean, masked_moments, masked_sum, masked_var, merge_moments
from rlkern.rollout_metrics import ImportanceWeights, RolloutCorrection, RolloutMetrics
from rlkern.scan import discounted_returns, gae
from rlkern.types import Advantages, GroupIndex, GroupStats, Moments
from rlkern.value_loss import value_loss
from rlkern.whiten import masked_normalize, masked_whiten, whiten_apply

__version__ = "0.1.0"
__all__ = [
    "Advantages",
    "BackendError",
    "GroupIndex",
    "GroupStats",
    "ImportanceWeights",
    "Metrics",
    "Moments",
    "PolicyLoss",
    "PolicyLossAndGrad",
    "RolloutBatch",
    "RolloutCorrection",
    "RolloutMetrics",
    "ValueLoss",
    "advantages",
    "affine_scan",
    "capture",
    "discounted_returns",
    "entropy",
    "explain",
    "gae",
    "group_index",
    "group_mean_std",
    "group_normalize",
    "importance_weights",
    "kl_penalty",
    "load_batch",
    "log_prob",
    "masked_mean",
    "masked_moments",
    "masked_normalize",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "merge_moments",
    "off_policy_mask",
    "policy_loss",
    "policy_loss_and_grad",
    "rollout_correction",
    "rollout_metrics",
    "save_batch",
    "shape_rewards",
    "sum_pi_squared",
    "use_backend",
    "value_loss",
    "whiten_apply",
]

backends.environment_backend()
