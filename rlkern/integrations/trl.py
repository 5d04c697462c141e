# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPO loss and ours, 1.16.

    from rlkern.integrations.trl import patch
    patch()

or, for one trainer alone: ``class Trainer(GRPOLoss, trl.GRPOTrainer)``. Options that have no counterpart stay TRL's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.integrations import hooks
from rlkern.integrations.site import Call, Site, Uncovered, double, in_shadow, logger

_TRAINER = "trl.trainer.grpo_trainer"
_LOGPS = "_get_per_token_logps_and_entropies"
LEFT = {
    f"{_TRAINER}.GRPOTrainer._generate_and_score_completions": "600 lines inline; its group statistics are a few numbers per prompt",
    "trl.trainer.rloo_trainer.RLOOTrainer._compute_loss": "no kernel yet (a ratio per sequence)",
    "trl.trainer.utils.selective_log_softmax, entropy_from_logits": "no kernel yet",
}
# Of the options of _compute_loss, those that rlkern computes: the attribute, and the values it may have.
_COVERED: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token",), "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"),
    "off_policy_mask_threshold": (None,), "top_entropy_quantile": (1.0,), "_entropy_bonus_enabled": (False,), "aux_loss_enabled": (False,),
}  # fmt: skip
_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


# ---- the loss ---------------------------------------------------------------------------------------------------------
def _refuse(trainer: Any) -> None:
    for name, values in _COVERED.items():
        if getattr(trainer, name) not in values:
            raise Uncovered(f"{name}={getattr(trainer, name)!r}")
    if trainer.args.delta is not None:
        raise Uncovered("delta")
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        raise Uncovered("importance sampling against vLLM")


def _denominator(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Any, dict[str, Any]]:
    """The mode and the count that TRL's loss types divide by."""
    training = trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if training else 1.0
    rows = mask.shape[0]
    if trainer.loss_type == "grpo":
        return "seq-mean-token-mean", {"global_batch_size": rows * steps}
    if trainer.loss_type == "luspo":
        return "seq-mean-token-sum", {"global_batch_size": rows * steps}
    if trainer.loss_type == "bnpo":
        return "token-mean", {"batch_num_tokens": mask.sum().clamp(min=1.0) * steps}
    if trainer.loss_type == "dr_grpo":
        return "token-mean", {"batch_num_tokens": rows * trainer.max_completion_length * steps}
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return "token-mean", {"batch_num_tokens": items * steps / trainer.args.steps_per_generation if training else items}


def _aggregated(x: Tensor, mask: Tensor, mode: str, counts: dict[str, Any]) -> Tensor:
    rows = rlkern.masked_sum(x, mask, -1)
    if mode == "seq-mean-token-mean":
        rows = rows / mask.sum(-1).clamp(min=1.0)
    found: Tensor = rows.sum() / counts["batch_num_tokens" if mode == "token-mean" else "global_batch_size"]
    return found


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """GRPOTrainer._compute_loss: the model's log-probs as TRL has them, then one kernel."""
    _refuse(self)
    ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
    mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]
    log_prob, entropies, _aux = getattr(self, _LOGPS)(
        model, torch.cat([inputs["prompt_ids"], ids], dim=1), torch.cat([inputs["prompt_mask"], completion_mask], dim=1), ids.size(1),
        compute_entropy=True, compute_aux_loss=False, **{name: inputs.get(name) for name in _IMAGES},
    )  # fmt: skip
    old = inputs.get("old_per_token_logps")
    old = log_prob.detach() if old is None else old
    mode, counts = _denominator(self, inputs, mask)
    found = rlkern.policy_loss(
        old, log_prob, inputs["advantages"], mask, cliprange_low=self.epsilon_low, cliprange_high=self.epsilon_high,
        clip_ratio_c=None, log_ratio_clamp=None, loss_agg_mode=mode, **counts,
    )  # fmt: skip
    loss, kl = found.loss, None
    if self.beta != 0.0:
        kl = rlkern.kl_penalty(log_prob, inputs["ref_per_token_logps"], "k3", log_ratio_range=None, value_range=None)
        if self.args.use_bias_correction_kl:
            kl = kl * torch.exp(log_prob - old)
        loss = loss + self.beta * _aggregated(kl, mask, mode, counts)
    _report(self, log_prob.detach(), old.detach(), inputs["advantages"], mask, entropies.detach(), kl)
    return loss


def _report(trainer: Any, log_prob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor, kl: Tensor | None) -> None:
    """TRL's metrics: one reduction and one gathering over the ranks, one transfer to the host."""
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    ratio = torch.exp(log_prob - old)
    low = ((ratio < 1 - trainer.epsilon_low) & (advantages < 0)).float()
    high = ((ratio > 1 + trainer.epsilon_high) & (advantages > 0)).float()
    by_row = torch.stack([rlkern.masked_sum(low, mask, -1), rlkern.masked_sum(high, mask, -1)])
    counts = mask.sum(-1).float()
    sums = [*by_row.sum(1), rlkern.masked_sum(entropies, mask), *([] if kl is None else [rlkern.masked_sum(kl.detach(), mask)])]
    totals = trainer.accelerator.reduce(torch.stack([counts.sum(), *(x.float() for x in sums)]), reduction="sum")
    means = totals[1:] / totals[0].clamp(min=1.0)
    shares = trainer.accelerator.gather((by_row / counts).t().contiguous())
    least = torch.where(shares[:, 0].isnan(), torch.inf, shares[:, 0]).amin()
    most = torch.where(shares[:, 1].isnan(), -torch.inf, shares[:, 1]).amax()
    least, most = (torch.where(x.isinf(), torch.nan, x) for x in (least, most))  # no row with a token
    values = torch.cat([means, torch.stack([least, most])]).tolist()
    lows, highs, entropy, *kls = values[:-2]
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    if kls:
        metrics["kl"].append(kls[0])
    metrics["entropy"].append(entropy)
    for name, value in (
        ("low_mean", lows), ("high_mean", highs), ("region_mean", lows + highs), ("low_min", values[-2]), ("high_max", values[-1])
    ):  # fmt: skip
        metrics[f"clip_ratio/{name}"].append(value)


class GRPOLoss:
    """A mixin: ``class Trainer(GRPOLoss, GRPOTrainer)`` has our loss, and TRL's for options that are not covered."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        try:
            return compute_loss(self, model, inputs)
        except Uncovered as reason:
            if not getattr(self, "_rlkern_said", False):
                self._rlkern_said = True
                logger.warning("rlkern: the loss is TRL's own: %s", reason)
        found: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return found


# ---- shadow mode --------------------------------------------------------------------------------------------------------
class _LossSite(Site):
    """The model runs once, in TRL's loss; ours, and TRL's in float64, get the log-probs of that run."""

    def shadow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trainer, kept = args[0], []
        own = getattr(trainer, _LOGPS)

        def noted(*a: Any, **k: Any) -> Any:
            kept.append(own(*a, **k))
            return kept[-1]

        with in_shadow():
            vars(trainer)[_LOGPS] = noted
            try:
                found = self.original(*args, **kwargs)
            finally:
                del vars(trainer)[_LOGPS]
            try:
                model, inputs = (*args[1:], *kwargs.values())
                self.compare_losses(trainer, model, dict(inputs), kept[-1])
            except Exception as problem:  # a comparison must not stop a run
                self.missed(problem)
        return found

    def compare_losses(self, trainer: Any, model: Any, inputs: dict[str, Any], logps: tuple[Any, ...]) -> None:
        theirs = _loss_and_grad(self.original, trainer, model, inputs, logps)
        ours = _loss_and_grad(self.choice(), trainer, model, inputs, logps)
        inputs, logps = double(inputs), double(logps)
        exact = _loss_and_grad(self.original, trainer, model, inputs, logps)
        sizes = _loss_and_grad(self.original, trainer, model, inputs | {"advantages": -inputs["advantages"].abs()}, logps)
        self.compare(ours, theirs, exact, sizes)


def _loss_and_grad(function: Any, trainer: Any, model: Any, inputs: dict[str, Any], logps: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of given log-probs; the trainer's metrics stay as they are."""
    leaf = logps[0].detach().requires_grad_()
    metrics, trainer._metrics = trainer._metrics, collections.defaultdict(lambda: collections.defaultdict(list))
    vars(trainer)[_LOGPS] = lambda *a, **k: (leaf, logps[1].detach(), logps[2])
    try:
        with torch.enable_grad():
            loss = function(trainer, model, inputs)
            grad = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    finally:
        trainer._metrics = metrics
        del vars(trainer)[_LOGPS]
    return {"loss": loss.detach(), "gradient of the log-probs": grad}


# ---- the probe ----------------------------------------------------------------------------------------------------------
def _probes(original: Any) -> list[Call]:
    """Each loss type on four rows, one of them masked whole, with what the method reads of its trainer."""
    g = torch.Generator().manual_seed(0)
    lp, old, ref = torch.randn(3, 4, 7, generator=g).mul(0.3).sub(1).unbind(0)
    mask = (torch.rand(4, 7, generator=g) < 0.7).long()
    mask[1] = 0
    inputs = {
        "prompt_ids": torch.ones(4, 2, dtype=torch.long), "prompt_mask": torch.ones(4, 2, dtype=torch.long), "completion_mask": mask,
        "completion_ids": torch.ones(4, 7, dtype=torch.long), "advantages": torch.tensor([1.0, 2.0, -1.0, 0.5]), "old_per_token_logps": old,
        "ref_per_token_logps": ref, "num_items_in_batch": torch.tensor(31),
    }  # fmt: skip
    calls: list[Call] = []
    for i, kind in enumerate(_COVERED["loss_type"]):
        trainer = SimpleNamespace(
            **{name: values[0] for name, values in _COVERED.items()} | {"loss_type": kind}, epsilon_low=0.2, epsilon_high=0.3,
            beta=0.1 * (i % 2), use_vllm=False, vllm_importance_sampling_correction=False, max_completion_length=16,
            current_gradient_accumulation_steps=2, model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=i > 2, steps_per_generation=4),
            _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        )  # fmt: skip
        setattr(trainer, _LOGPS, lambda *a, **k: (lp, old.abs(), None))
        calls.append(((trainer, None, inputs), {}))
    return calls


def sites() -> Iterable[Site]:
    """Every method that has a counterpart."""
    yield _LossSite(_TRAINER, "GRPOTrainer._compute_loss", [compute_loss], _probes, "_policy_loss_fwd")


def patch(mode: str = "on") -> None:
    """`rlkern.integrations.patch("trl", mode)`."""
    hooks.patch("trl", sites, mode)


def unpatch() -> None:
    hooks.unpatch("trl")
