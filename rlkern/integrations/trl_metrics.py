# SPDX-License-Identifier: Apache-2.0
"""TRL's metrics of a loss: one reduction and one gathering over the ranks, one transfer to the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlkern

_BOTH = ("low", "high")


class Seen(NamedTuple):
    """What a step has: its inputs, detached log-probs and entropies; the sums of the entropy and the KL over its tokens, and these."""

    inputs: dict[str, Any]
    log_prob: Tensor
    old: Tensor
    mask: Tensor
    entropies: Tensor
    totals: tuple[Tensor, Tensor, Tensor]


def _ratio(trainer: Any, seen: Seen) -> Tensor:
    """(B, T), or (B, 1) at the level of sequences."""
    x = seen.log_prob - seen.old
    if trainer.importance_sampling_level == "sequence":
        x = (rlkern.masked_sum(x, seen.mask, -1) / seen.mask.sum(-1).clamp(min=1.0)).unsqueeze(1)
    return torch.exp(x)


def _by_row(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the count of each row: of its tokens, or of the one value that it has."""
    if x.shape[1] == 1:
        return x.squeeze(1), torch.ones_like(x[:, 0])
    return rlkern.masked_sum(x, mask, -1), mask.sum(-1).float()


def _totals(trainer: Any, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """(entropy, KL, count): over tokens; where rows have one, over all rows, masked or not, as TRL's."""
    if seen.mask.shape[1] > 1:
        return seen.totals
    kl = seen.totals[1]
    if trainer.beta != 0.0:
        d = seen.inputs["ref_per_token_logps"] - seen.log_prob
        kl = ((torch.exp(d) - d - 1) * (_ratio(trainer, seen) if trainer.args.use_bias_correction_kl else 1)).sum()
    return seen.entropies.sum(), kl, torch.full_like(seen.totals[2], len(seen.mask))


def _clipped(trainer: Any, seen: Seen, advantages: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each row: tokens clipped below and above; with cispo those above its cap alone."""
    ratio = _ratio(trainer, seen)
    if trainer.loss_type == "cispo":
        sides = [(ratio > trainer.epsilon_high) & (advantages > 0)]
    else:
        sides = [(ratio < 1 - trainer.epsilon_low) & (advantages < 0), (ratio > 1 + trainer.epsilon_high) & (advantages > 0)]
    return [_by_row(x.float(), seen.mask) for x in sides]


def _of_type(trainer: Any, seen: Seen) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]:
    """The means of the loss type as sums and counts; the shares of each row, where the least and the most are wanted."""
    kind, advantages = trainer.loss_type, seen.inputs["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    if kind == "sapo":
        return {}, None
    if kind == "vespo":
        args, ratio = trainer.args, seen.inputs.get("importance_sampling_ratio")
        phi = trainer.get_gamma_weights(
            advantages=advantages, log_ratio_per_token=seen.log_prob - seen.old, mask=seen.mask, importance_sampling_ratio=ratio,
            k_pos=args.vespo_k_pos, lambda_pos=args.vespo_lambda_pos, k_neg=args.vespo_k_neg, lambda_neg=args.vespo_lambda_neg,
        )  # fmt: skip
        sums, counts = _by_row(phi, seen.mask)
        return {"vespo/phi_seq_mean": (sums.sum(), counts.sum())}, None
    sides = _clipped(trainer, seen, advantages)
    totals = [(sums.sum(), counts.sum()) for sums, counts in sides]
    if kind == "cispo":
        return {"cispo_clip_ratio": totals[0]}, None
    names = {f"clip_ratio/{side}_mean": total for side, total in zip(_BOTH, totals, strict=True)}
    return names, torch.stack([sums / counts for sums, counts in sides], dim=1)


def extremes(shares: Tensor) -> Tensor:
    """(least of the first column, most of the second), rows without a token left out; NaN where there is no other."""
    missing = shares.isnan()
    least = torch.where(missing, torch.inf, shares)[:, 0].amin()
    most = torch.where(missing, -torch.inf, shares)[:, 1].amax()
    found = torch.stack([least, most])
    return torch.where(found.isinf(), torch.nan, found)


def report(trainer: Any, seen: Seen, loss: Tensor, aux: Tensor | None) -> None:
    """`loss`: without the entropy bonus, not divided by the accumulation."""
    training = trainer.model.training
    pairs, shares = _of_type(trainer, seen)
    entropy, kl, tokens = _totals(trainer, seen)
    pairs["entropy"] = entropy, tokens
    if trainer.beta != 0.0:
        pairs["kl"] = kl, tokens
    if trainer._entropy_bonus_enabled:
        known = ~loss.isnan()
        pairs["policy_loss"] = torch.where(known, loss, 0.0), known
    local = torch.stack([x.float() for pair in pairs.values() for x in pair])
    sums, counts = trainer.accelerator.reduce(local, reduction="sum").view(-1, 2).unbind(1)
    numbers = [sums / counts.clamp(min=1.0), counts]
    if shares is not None:
        numbers.append(extremes(trainer.accelerator.gather(shares.contiguous())))
    means, seen_counts, ends = (x.tolist() for x in torch.cat(numbers).split([len(pairs), len(pairs), 0 if shares is None else 2]))
    found = dict(zip(pairs, means, strict=True))
    if "policy_loss" in found and seen_counts[list(pairs).index("policy_loss")] == 0:
        found["policy_loss"] = float("nan")
    if ends:
        found["clip_ratio/region_mean"] = found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]
        found["clip_ratio/low_min"], found["clip_ratio/high_max"] = ends
    if trainer._entropy_bonus_enabled and training and trainer.accelerator.sync_gradients:
        found["entropy_coef"] = trainer.entropy_coef
    _append(trainer, found, aux)


def report_rloo(trainer: Any, ratio: Tensor, advantages: Tensor, mask: Tensor, entropy: Tensor, aux: Tensor | None) -> None:
    totals = trainer.accelerator.reduce(torch.stack([entropy.float(), mask.sum().float()]), reduction="sum")
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
    sides = trainer.accelerator.gather(torch.stack([low, high], dim=1).float())
    entropy = totals[0] / totals[1].clamp(min=1.0)
    lows, highs, least, most, mean = torch.cat([sides.mean(0), extremes(sides), entropy.view(1)]).tolist()
    found = {"entropy": mean, "clip_ratio/low_mean": lows, "clip_ratio/low_min": least, "clip_ratio/high_mean": highs}
    _append(trainer, found | {"clip_ratio/high_max": most, "clip_ratio/region_mean": lows + highs}, aux)


def _append(trainer: Any, found: dict[str, float], aux: Tensor | None) -> None:
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    if aux is not None:
        metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    for name, value in found.items():
        metrics[name].append(value)
