# SPDX-License-Identifier: Apache-2.0
"""What a loss reports beside itself: sums and maxes on the device, read by the host once, when asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The order of the enums in csrc/args.h.
POLICY_SUMS = (
    "tokens", "sequences", "clipped", "clipped_lower", "neg_log_ratio", "pg_loss", "kl_loss", "entropy_loss", "nonfinite",
)  # fmt: skip
POLICY_MAXES = ("ratio_max", "abs_log_ratio_max")
VALUE_SUMS = ("tokens", "sequences", "clipped", "vpreds", "vf_loss", "nonfinite")
VALUE_MAXES = ("abs_error_max",)
_NAMES = {"policy": (POLICY_SUMS, POLICY_MAXES), "value": (VALUE_SUMS, VALUE_MAXES)}


class Metrics(NamedTuple):
    """Sums and maxes over valid tokens; two 1-D tensors (float64, float32 where a device has none), detached.

    `kind` names the fields: "policy" (with "+kl" and "+entropy" where the terms were given) or "value".

    policy sums: tokens, sequences (rows with a valid token), clipped (tokens whose clipped term is the larger one),
    clipped_lower (dual clip), neg_log_ratio (sum of old - new log-prob, clamped), pg_loss, kl_loss, entropy_loss
    (aggregated as the loss is, before their coefficients), nonfinite (tokens whose loss is NaN or infinite).
    policy maxes: ratio_max, abs_log_ratio_max (before the clamp); NaN tokens are left out, `nonfinite` has them.
    value sums: tokens, sequences, clipped, vpreds, vf_loss, nonfinite. value maxes: abs_error_max.
    """

    sums: Tensor
    maxes: Tensor
    kind: str = "policy"

    def field(self, name: str) -> Tensor:
        """A field by name, 0-dim, still on the device: `metrics.field("clipped")`."""
        sums, maxes = _NAMES[self.kind.partition("+")[0]]
        if name not in sums + maxes:
            raise ValueError(f"rlkern.Metrics.field: name must be one of {', '.join(sums + maxes)}; got {name!r}. as_dict() has them all.")
        return self.sums[sums.index(name)] if name in sums else self.maxes[maxes.index(name)]

    def merge(self, other: Metrics) -> Metrics:
        """Of two micro-batches together: sums add, maxes take the larger."""
        if self.kind != other.kind:
            raise ValueError(f"rlkern.Metrics.merge: other must be of kind {self.kind!r}; got {other.kind!r}. Merge like with like.")
        return Metrics(self.sums + other.sums, torch.maximum(self.maxes, other.maxes), self.kind)

    def all_reduce(self, group: Any = None) -> Metrics:
        """Of all ranks together, by torch.distributed; itself where that is not initialised. Two collectives."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        sums, maxes = self.sums.clone(), self.maxes.clone()
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, group=group)
        torch.distributed.all_reduce(maxes, torch.distributed.ReduceOp.MAX, group=group)
        return Metrics(sums, maxes, self.kind)

    def as_dict(self) -> dict[str, float]:
        """Python floats under verl's names, by one transfer. Means are over valid tokens, 0 where there are none."""
        numbers = torch.cat((self.sums, self.maxes)).tolist()
        kind, *terms = self.kind.split("+")
        sums, maxes = _NAMES[kind]
        f = dict(zip(sums + maxes, numbers, strict=True))
        n = max(f["tokens"], 1.0)  # verl adds 1e-8, which a float32 count swallows
        if kind == "value":
            return {
                "critic/vf_loss": f["vf_loss"],
                "critic/vf_clipfrac": f["clipped"] / n,
                "critic/vpred_mean": f["vpreds"] / n,
                "critic/abs_error_max": f["abs_error_max"],
                "critic/nonfinite": f["nonfinite"],
            }
        found = {
            "actor/pg_loss": f["pg_loss"],
            "actor/pg_clipfrac": f["clipped"] / n,
            "actor/ppo_kl": f["neg_log_ratio"] / n,
            "actor/pg_clipfrac_lower": f["clipped_lower"] / n,
            "actor/ratio_max": f["ratio_max"],
            "actor/abs_log_ratio_max": f["abs_log_ratio_max"],
            "actor/nonfinite": f["nonfinite"],
        }
        if "kl" in terms:
            found["kl_loss"] = f["kl_loss"]
        if "entropy" in terms:
            found["actor/entropy_loss"] = f["entropy_loss"]
        return found


class PolicyLoss(NamedTuple):
    """A fresh 0-dim loss, with autograd history, and its metrics."""

    loss: Tensor
    metrics: Metrics


class PolicyLossAndGrad(NamedTuple):
    """The loss (detached), its metrics, and its gradients to log_prob and, where entropy was given, to entropy."""

    loss: Tensor
    metrics: Metrics
    d_log_prob: Tensor
    d_entropy: Tensor | None


class ValueLoss(NamedTuple):
    """A fresh 0-dim loss, with autograd history, and its metrics."""

    loss: Tensor
    metrics: Metrics
