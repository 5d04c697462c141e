# SPDX-License-Identifier: Apache-2.0
"""What the losses take, from logits: log-probs, entropy, sum of squared probabilities.

These are the reference path alone, plain torch on every device: the specification of a fused family to come. They hold a
float32 copy of the logits and, for the gradient, of the probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlkern import check
from rlkern.backends import VALUE_DTYPES
from rlkern.reference import logprob as reference


def _logits(op: str, logits: Tensor, temperature: float) -> float:
    """The temperature, both checked."""
    if not isinstance(logits, Tensor) or logits.dtype not in VALUE_DTYPES:
        raise check.fail(op, "logits", "be a floating-point tensor", check.describe(logits), "Convert it with .float().", TypeError)
    check.no_transforms(op, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise check.fail(op, "logits", "be (..., V) with V >= 1", check.describe(logits), "The vocabulary is the last dimension.")
    temperature = check.number(op, "temperature", temperature, 0.0, open_low=True)
    if temperature == math.inf:
        raise check.fail(op, "temperature", "be finite", temperature, "1.0 leaves the logits as they are.")
    return temperature


def log_prob(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""The log-probability of each label under softmax(logits / temperature).

    log p_y = z_y - logsumexp(z) with z = logits / temperature.

    Args:
        logits: (..., V), floating point; every position is read, there is no mask.
        labels: the shape of the logits without V, int64 or int32, in [0, V).
        temperature: positive.

    Returns:
        Tensor like labels, nats, float32 (float64 for float64 logits).

    Gradient:
        To logits: (1[v = y] - p_v) / temperature, in their dtype. A second backward works.

    Numerics:
        Arithmetic in float32, float64 for float64; the logits are never written.

    Raises:
        ValueError, TypeError: shapes, dtypes or a temperature that do not fit. IndexError or RuntimeError, torch's: a label
        outside [0, V).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> rlkern.log_prob(logits, torch.tensor([0, 1]))
        tensor([-0.6931, -0.3133])

    Source:
        verl logprobs_from_logits; OpenRLHF log_probs_from_logits; TRL selective_log_softmax.
    """
    op = "log_prob"
    temperature = _logits(op, logits, temperature)
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise check.fail(op, "labels", "be an int64 or int32 tensor", check.describe(labels), "Convert it with .long().", TypeError)
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        must = f"have the shape {tuple(logits.shape[:-1])}, on {logits.device}"
        raise check.fail(op, "labels", must, check.describe(labels), "Give one label a position.")
    return reference.log_prob(logits, labels, temperature)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""The entropy of softmax(logits / temperature).

    H = -sum over v of p_v log p_v; a logit of -infinity adds nothing.

    Args:
        logits: (..., V), floating point; every position is read, there is no mask.
        temperature: positive.

    Returns:
        Tensor of the shape of the logits without V, nats, float32 (float64 for float64 logits).

    Gradient:
        To logits: -p_v (log p_v + H) / temperature, in their dtype. A second backward works.

    Numerics:
        Arithmetic in float32, float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or a temperature that do not fit.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> rlkern.entropy(logits)
        tensor([0.6931, 0.5822])

    Source:
        verl entropy_from_logits; OpenRLHF compute_entropy; TRL entropy_from_logits.
    """
    return reference.entropy(logits, _logits("entropy", logits, temperature))


def sum_pi_squared(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""The sum of squared probabilities of softmax(logits / temperature), which the optimal token baseline takes.

    S = sum over v of p_v^2.

    Args:
        logits: (..., V), floating point; every position is read, there is no mask.
        temperature: positive.

    Returns:
        Tensor of the shape of the logits without V, in (0, 1], float32 (float64 for float64 logits).

    Gradient:
        To logits: 2 p_v (p_v - S) / temperature, in their dtype. A second backward works.

    Numerics:
        Arithmetic in float32, float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or a temperature that do not fit.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> rlkern.sum_pi_squared(logits)
        tensor([0.5000, 0.6068])

    Source:
        verl calculate_sum_pi_squared_from_logits.
    """
    return reference.sum_pi_squared(logits, _logits("sum_pi_squared", logits, temperature))
