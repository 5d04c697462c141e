# SPDX-License-Identifier: Apache-2.0
"""TRL's metrics of a loss: one reduction and one gathering over the ranks, one transfer to the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlkern


class Seen(NamedTuple):
    """What a step has: its inputs, detached log-probs and entropies; the sums over its tokens of 1, the KL and the entropy."""

    inputs: dict[str, Any]
    log_prob: Tensor
    old: Tensor
    mask: Tensor
    entropies: Tensor
    totals: Tensor


# ---- on the device --------------------------------------------------------------------------------------------------------
def _ratio(trainer: Any, seen: Seen) -> Tensor:
    """(B, T), or (B, 1) at the level of sequences."""
    x = seen.log_prob - seen.old
    if trainer.importance_sampling_level == "sequence":
        x = (rlkern.masked_sum(x, seen.mask, -1) / seen.mask.sum(-1).clamp(min=1.0)).unsqueeze(1)
    return x.exp_()


def _of_rows(x: Tensor, mask: Tensor) -> Tensor:
    """The sum of each row: of its tokens, or of the one value that it has."""
    return x.squeeze(1) if x.shape[1] == 1 else rlkern.masked_sum(x, mask, -1)


def _sides(trainer: Any, ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, 2): what is clipped of each row, below where A < 0 and above where A > 0."""
    below, above = advantages < 0, advantages > 0
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
    if advantages.shape[1] > 1:
        return torch.stack([_of_rows(x.float(), mask) for x in ((ratio < low) & below, (ratio > high) & above)], dim=1)
    bound = torch.where(below, -low, high)  # a row has one sign: one comparison does for both
    clipped = _of_rows((ratio * advantages.sign() > bound).float(), mask)
    return torch.cat([below, above], dim=1) * clipped.unsqueeze(1)


def _of_type(trainer: Any, seen: Seen) -> tuple[tuple[str, ...], Tensor | None, Tensor | None, bool]:
    """(names, their sums, shares of each row where the least and the most are wanted, are the means over rows?)"""
    kind, advantages, mask = trainer.loss_type, seen.inputs["advantages"], seen.mask
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    if kind == "sapo":
        return (), None, None, False
    if kind == "vespo":
        args, ratio = trainer.args, seen.inputs.get("importance_sampling_ratio")
        phi = trainer.get_gamma_weights(
            advantages=advantages, log_ratio_per_token=seen.log_prob - seen.old, mask=mask, importance_sampling_ratio=ratio,
            k_pos=args.vespo_k_pos, lambda_pos=args.vespo_lambda_pos, k_neg=args.vespo_k_neg, lambda_neg=args.vespo_lambda_neg,
        )  # fmt: skip
        return ("vespo/phi_seq_mean",), _of_rows(phi, mask).sum().view(1), None, phi.shape[1] == 1
    ratio = _ratio(trainer, seen)
    by_row = max(ratio.shape[1], advantages.shape[1]) == 1
    if kind == "cispo":
        over = ratio > torch.where(advantages > 0, trainer.epsilon_high, torch.inf)
        return ("cispo_clip_ratio",), _of_rows(over.float(), mask).sum().view(1), None, by_row
    sides = _sides(trainer, ratio, advantages, mask)
    shares = sides if by_row else sides / mask.sum(-1, keepdim=True)
    return ("clip_ratio/low_mean", "clip_ratio/high_mean"), sides.sum(0), shares, by_row


def _totals(trainer: Any, seen: Seen) -> Tensor:
    """(count, KL, entropy): over tokens; where rows have one, over all rows, masked or not, as TRL's."""
    if seen.mask.shape[1] > 1:
        return seen.totals
    kl = seen.totals[1]
    if trainer.beta != 0.0:
        d = seen.inputs["ref_per_token_logps"] - seen.log_prob
        kl = ((torch.exp(d) - d - 1) * (_ratio(trainer, seen) if trainer.args.use_bias_correction_kl else 1)).sum()
    return torch.stack([torch.full_like(kl, len(seen.mask)), kl, seen.entropies.sum().to(kl.dtype)])


# ---- on the host ----------------------------------------------------------------------------------------------------------
def _extremes(shares: list[float]) -> tuple[float, float]:
    """(least of the low ones, most of the high ones), rows without a token left out; NaN where there is no other."""
    low, high = ([x for x in side if not math.isnan(x)] for side in (shares[::2], shares[1::2]))
    return min(low, default=math.nan), max(high, default=math.nan)


def report(trainer: Any, seen: Seen, loss: Tensor, aux: Tensor | None) -> None:
    """`loss`: without the entropy bonus, not divided by the accumulation."""
    names, sums, shares, by_row = _of_type(trainer, seen)
    bonus = trainer._entropy_bonus_enabled
    parts = [_totals(trainer, seen).float()]
    parts += [] if sums is None else [sums.float()]
    if by_row:
        parts.append(parts[0].new_full((1,), len(seen.mask)))
    if bonus:
        known = ~loss.isnan()
        parts.append(torch.stack([torch.where(known, loss, 0.0).float(), known.float()]))
    totals = trainer.accelerator.reduce(torch.cat(parts), reduction="sum")
    if shares is not None:
        totals = torch.cat([totals, trainer.accelerator.gather(shares.contiguous()).flatten()])
    tokens, kl, entropy, *rest = totals.tolist()
    count = max(rest[len(names)] if by_row else tokens, 1.0)
    found = {name: x / count for name, x in zip(names, rest, strict=False)}
    found["entropy"] = entropy / max(tokens, 1.0)
    if trainer.beta != 0.0:
        found["kl"] = kl / max(tokens, 1.0)
    rest = rest[len(names) + by_row :]
    if bonus:
        found["policy_loss"] = rest[0] / rest[1] if rest[1] else math.nan
        rest = rest[2:]
        if trainer.model.training and trainer.accelerator.sync_gradients:
            found["entropy_coef"] = trainer.entropy_coef
    if shares is not None:
        found["clip_ratio/region_mean"] = found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]
        found["clip_ratio/low_min"], found["clip_ratio/high_max"] = _extremes(rest)
    _append(trainer, found, aux)


def report_rloo(trainer: Any, ratio: Tensor, advantages: Tensor, mask: Tensor, entropy: Tensor, aux: Tensor | None) -> None:
    totals = trainer.accelerator.reduce(torch.stack([entropy.float(), mask.sum().float()]), reduction="sum")
    sides = trainer.accelerator.gather(_sides(trainer, ratio.unsqueeze(1), advantages.unsqueeze(1), mask).contiguous())
    entropies, tokens, *shares = torch.cat([totals, sides.flatten()]).tolist()
    lows, highs = (sum(side) / len(side) for side in (shares[::2], shares[1::2]))
    found = {"entropy": entropies / max(tokens, 1.0), "clip_ratio/low_mean": lows, "clip_ratio/high_mean": highs}
    found["clip_ratio/low_min"], found["clip_ratio/high_max"] = _extremes(shares)
    _append(trainer, found | {"clip_ratio/region_mean": lows + highs}, aux)


def _append(trainer: Any, found: dict[str, float], aux: Tensor | None) -> None:
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    if aux is not None:
        metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    for name, value in found.items():
        metrics[name].append(value)
