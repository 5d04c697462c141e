# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPO and RLOO losses and ours, 1.16.

from rlkern.integrations.trl import patch; patch()

or, for one trainer alone: ``class Trainer(GRPOLoss, trl.GRPOTrainer)``. Options that have no counterpart stay TRL's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.integrations import hooks
from rlkern.integrations.site import Site, Uncovered, double, in_shadow, logger
from rlkern.integrations.trl_metrics import Seen, report, report_rloo
from rlkern.integrations.trl_probes import CLIPPED, LOGPS, METHODS, VARIANTS, probes, probes_rloo

_TRAINER, _RLOO = "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"
LEFT = {
    f"{_TRAINER}.GRPOTrainer._generate_and_score_completions": "600 lines inline; its group statistics are a few numbers per prompt",
    f"{_TRAINER}.GRPOTrainer._compute_loss (use_adaptive_entropy)": "a controller that keeps state from step to step",
    f"{_TRAINER}.GRPOTrainer.get_high_entropy_mask": "a quantile over all ranks; our loss calls it",
    "trl.trainer.utils.selective_log_softmax, entropy_from_logits": "no kernel yet",
}
_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


# ---- GRPO ---------------------------------------------------------------------------------------------------------------
def _refuse(trainer: Any) -> None:
    """By options alone: ranks that disagree would wait for each other."""
    kind, level, args = trainer.loss_type, trainer.importance_sampling_level, trainer.args
    if kind not in VARIANTS or level not in ("token", "sequence"):
        raise Uncovered(f"loss_type={kind!r}, importance_sampling_level={level!r}")
    if kind in CLIPPED and args.delta is not None and args.delta <= 1 + trainer.epsilon_high:
        raise Uncovered("delta is not above 1 + epsilon_high")
    if trainer._entropy_bonus_enabled and trainer.use_adaptive_entropy:
        raise Uncovered("use_adaptive_entropy")
    if kind == "vespo" and level == "sequence" and trainer.beta != 0.0 and args.use_bias_correction_kl:
        raise Uncovered("vespo with a KL term that is corrected by the ratio of the row")
    for name in METHODS:
        if getattr(trainer, name).__module__ != _TRAINER:
            raise Uncovered(f"{name} is overridden")


def _forward(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The model's log-probs and entropies, as TRL has them, and the router loss."""
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    found: tuple[Tensor, Tensor, Tensor | None] = getattr(trainer, LOGPS)(
        model, torch.cat([inputs["prompt_ids"], ids], dim=1), torch.cat([inputs["prompt_mask"], mask], dim=1), ids.size(1),
        compute_entropy=True, compute_aux_loss=trainer.aux_loss_enabled, **{name: inputs.get(name) for name in _IMAGES},
    )  # fmt: skip
    return found


def _steps(trainer: Any) -> Any:
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0


def _denominator(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Any, Any]:
    """The mode and the count that TRL's loss types divide by."""
    steps, rows = _steps(trainer), mask.shape[0]
    if trainer.loss_type in ("grpo", "sapo"):
        return "seq-mean-token-mean", rows * steps
    if trainer.loss_type == "luspo":
        return "seq-mean-token-sum", rows * steps
    if trainer.loss_type == "bnpo":
        return "token-mean", mask.sum().clamp(min=1.0) * steps
    if trainer.loss_type == "dr_grpo":
        return "token-mean", rows * trainer.max_completion_length * steps
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return "token-mean", items * steps / trainer.args.steps_per_generation if trainer.model.training else items


def _gated(trainer: Any, inputs: dict[str, Any], log_prob: Tensor, old: Tensor, mask: Tensor, chosen: Tensor | None) -> Tensor:
    """The advantages, 0 where the off-policy mask drops a row or the entropy mask a token: the loss is 0 with them, the KL is not."""
    advantages: Tensor = inputs["advantages"]
    if trainer.off_policy_mask_threshold is not None:
        sampling = inputs.get("sampling_per_token_logps", old)
        keep = rlkern.off_policy_mask(advantages, log_prob, sampling, mask, threshold=trainer.off_policy_mask_threshold)
        advantages = advantages * keep.view_as(advantages)
    if chosen is None:
        return advantages
    return (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) * chosen


def _options(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of policy_loss by the trainer's: the variant and its numbers, the weights, the KL term."""
    kind, args = trainer.loss_type, trainer.args
    found: dict[str, Any] = {"variant": VARIANTS[kind], "log_ratio_clamp": None}
    if kind != "vespo":
        found["importance_sampling_level"] = trainer.importance_sampling_level
    if kind in CLIPPED:
        found |= {"cliprange_low": trainer.epsilon_low, "cliprange_high": trainer.epsilon_high, "clip_ratio_c": None}
        found |= {} if args.delta is None else {"delta": args.delta}
    elif kind == "cispo":
        found["ratio_cap"] = trainer.epsilon_high  # the cap itself, not a distance from 1
    elif kind == "sapo":
        found |= {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
    else:
        found |= {name: getattr(args, name) for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")}
    if kind == "vespo":
        found["rollout_is_weights"] = inputs.get("importance_sampling_ratio")
    elif trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        found["rollout_is_weights"] = inputs["importance_sampling_ratio"]
    if trainer.beta != 0.0:
        found |= {"ref_log_prob": inputs["ref_per_token_logps"], "kl_coef": trainer.beta, "kl_penalty": "k3", "kl_log_ratio_range": None,
                  "kl_value_range": None, "use_bias_correction_kl": bool(args.use_bias_correction_kl)}  # fmt: skip
    return found


def _totals(metrics: Any, mode: str, count: Any) -> Tensor:
    """(tokens, KL, entropy): the sums over tokens, of means."""
    sums: Tensor = metrics.sums
    return torch.cat([sums[:1], sums[6:8] if mode == "token-sum" else sums[6:8] * count])


def _token_sums(trainer: Any, seen: Seen, options: dict[str, Any]) -> Tensor:
    """The same where the loss adds up rows: a pass without gradients, over as little as it can be."""
    if trainer.beta == 0.0:
        entropy = rlkern.masked_sum(seen.entropies, seen.mask).float()
        return torch.stack([seen.mask.sum().float(), torch.zeros_like(entropy), entropy])
    of_kl = {name: x for name, x in options.items() if name.startswith(("kl_", "ref_", "use_bias", "entropy"))}
    if options["use_bias_correction_kl"]:
        of_kl |= {"importance_sampling_level": trainer.importance_sampling_level, "clip_ratio_c": None, "log_ratio_clamp": None}
    variant: Any = "ppo" if options["use_bias_correction_kl"] else "gpg"
    args = (seen.old, seen.log_prob, seen.inputs["advantages"], seen.mask)
    return _totals(rlkern.policy_loss(*args, variant=variant, loss_agg_mode="token-sum", **of_kl).metrics, "token-sum", 1)


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """GRPOTrainer._compute_loss: the model's log-probs as TRL has them, then one kernel."""
    _refuse(self)
    log_prob, entropies, aux = _forward(self, model, inputs)
    mask = inputs["completion_mask"]
    mask = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
    old = inputs.get("old_per_token_logps")
    old = log_prob.detach() if old is None else old
    chosen = None
    if self.top_entropy_quantile < 1.0:
        chosen = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
    mode, count = _denominator(self, inputs, mask)
    gated, options = _gated(self, inputs, log_prob, old, mask, chosen), _options(self, inputs) | {"entropy": entropies.detach()}
    by = {"batch_num_tokens" if mode == "token-mean" else "global_batch_size": count}
    found = rlkern.policy_loss(old, log_prob, gated, mask, loss_agg_mode=mode, **by, **options)
    seen = Seen(inputs, log_prob.detach(), old.detach(), mask, entropies.detach(), _totals(found.metrics, mode, count))
    if mode == "seq-mean-token-mean":  # its sums are weighted by row: the metrics' are not
        seen = seen._replace(totals=_token_sums(self, seen, options))
    loss, whole = found.loss, found.loss.detach()
    if self._entropy_bonus_enabled:
        acting = mask if chosen is None else mask * chosen
        bonus = rlkern.masked_sum(entropies, acting) / acting.sum().clamp(min=1.0) / _steps(self)
        loss = loss - self.entropy_coef * bonus
    if aux is not None:
        loss = loss + self.router_aux_loss_coef * aux / _steps(self)
    report(self, seen, whole if self.loss_type in ("cispo", "dapo", "vespo") else whole * _steps(self), aux)
    return loss


# ---- RLOO ---------------------------------------------------------------------------------------------------------------
def compute_rloo_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """RLOOTrainer._compute_loss: what is a number per row stays torch's, what is one per token is a kernel's."""
    log_prob, entropies, aux = _forward(self, model, inputs)
    mask, advantages = inputs["completion_mask"], inputs["advantages"]
    ratio = torch.exp(rlkern.masked_sum(log_prob, mask, 1) - inputs["old_logps"])
    loss: Tensor = -torch.min(ratio * advantages, ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high) * advantages).mean()
    if aux is not None:
        loss = loss + self.router_aux_loss_coef * aux
    report_rloo(self, ratio.detach(), advantages, mask, rlkern.masked_sum(entropies.detach(), mask), aux)
    return loss


# ---- one trainer alone --------------------------------------------------------------------------------------------------
class GRPOLoss:
    """A mixin: ``class Trainer(GRPOLoss, GRPOTrainer)`` has our loss, and TRL's for options that are not covered."""

    _rlkern_loss: Callable[..., Tensor] = staticmethod(compute_loss)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        try:
            return self._rlkern_loss(self, model, inputs)
        except (Uncovered, ValueError, TypeError, AttributeError) as reason:
            if not getattr(self, "_rlkern_said", False):
                self._rlkern_said = True
                logger.warning("rlkern: the loss is TRL's own: %s", reason)
        found: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return found


class RLOOLoss(GRPOLoss):
    """The same for RLOOTrainer."""

    _rlkern_loss = staticmethod(compute_rloo_loss)


# ---- shadow mode --------------------------------------------------------------------------------------------------------
class _LossSite(Site):
    """The model runs once, in TRL's loss; ours, and TRL's in float64, get the log-probs of that run."""

    def shadow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trainer, kept = args[0], []
        own = getattr(trainer, LOGPS)

        def noted(*a: Any, **k: Any) -> Any:
            kept.append(own(*a, **k))
            return kept[-1]

        with in_shadow():
            vars(trainer)[LOGPS] = noted
            try:
                found = self.original(*args, **kwargs)
            finally:
                del vars(trainer)[LOGPS]
            try:
                model, inputs = (*args[1:], *kwargs.values())
                self.compare_losses(trainer, model, dict(inputs), kept[-1])
            except Exception as problem:  # a comparison must not stop a run
                self.missed(problem)
        return found

    def compare_losses(self, trainer: Any, model: Any, inputs: dict[str, Any], logps: tuple[Any, ...]) -> None:
        if self.module == _TRAINER:
            _refuse(trainer)  # before TRL's own runs again: an adaptive coefficient would move
        theirs = _loss_and_grad(self.original, trainer, model, inputs, logps)
        ours = _loss_and_grad(self.choice(), trainer, model, inputs, logps)
        inputs, logps = double(inputs), double(logps)
        exact = _loss_and_grad(self.original, trainer, model, inputs, logps)
        size = inputs["advantages"].abs()
        one, other = (_loss_and_grad(self.original, trainer, model, inputs | {"advantages": a}, logps) for a in (size, -size))
        self.compare(ours, theirs, exact, {k: torch.maximum(one[k].abs(), other[k].abs()) for k in one})


def _loss_and_grad(function: Any, trainer: Any, model: Any, inputs: dict[str, Any], logps: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of given log-probs and entropies; the trainer's metrics stay as they are."""
    given = [x.detach().requires_grad_() for x in logps[:2]]
    aux = None if logps[2] is None else logps[2].detach()
    metrics, trainer._metrics = trainer._metrics, collections.defaultdict(lambda: collections.defaultdict(list))
    vars(trainer)[LOGPS] = lambda *a, **k: (*given, aux)
    try:
        with torch.enable_grad():
            loss = function(trainer, model, inputs)
            grads = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    finally:
        trainer._metrics = metrics
        del vars(trainer)[LOGPS]
    return {"loss": loss.detach(), "gradient of the log-probs": grads[0], "gradient of the entropies": grads[1]}


# ---- sites ------------------------------------------------------------------------------------------------------------
def sites() -> Iterable[Site]:
    """Every method that has a counterpart."""
    yield _LossSite(_TRAINER, "GRPOTrainer._compute_loss", [compute_loss], probes, "_policy_loss_fwd")
    yield _LossSite(_RLOO, "RLOOTrainer._compute_loss", [compute_rloo_loss], probes_rloo, "_masked_sum_fwd")


def patch(mode: str = "on") -> None:
    """`rlkern.integrations.patch("trl", mode)`."""
    hooks.patch("trl", sites, mode)


def unpatch() -> None:
    hooks.unpatch("trl")
