# SPDX-License-Identifier: Apache-2.0
"""The clipped policy loss: value, gradient and metrics from one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlkern import check, library, policy
from rlkern.aggregation import Count
from rlkern.metrics import Metrics, PolicyLoss, PolicyLossAndGrad
from rlkern.reference import loss as reference
from rlkern.reference.policy import smooth
from rlkern.types import Kl, Level, LossAggMode, Variant, VariantOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

library.define(
    "_scale_fwd",
    "(Tensor x, Tensor factor, Tensor like) -> Tensor",
    lambda x, factor, like: library.fresh(x, like.dtype),
    reference.scale,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _PolicyLoss(torch.autograd.Function):
    """The forward leaves the gradients, in float32 for half log-probs: unscaled, they would underflow in float16."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, entropy: Tensor | None, *rest: Any) -> Any:
        tensors, (*settings, plain, backend) = rest[:_TENSORS], rest[_TENSORS:]
        name, args = policy.raw(plain, log_prob, entropy, tensors, settings)
        loss, sums, maxes, d_log_prob, d_entropy = library.call(name, *args, [*ctx.needs_input_grad[:2], True], backend=backend)
        ctx.rest = (settings, backend)
        ctx.save_for_backward(d_log_prob, d_entropy, log_prob, entropy, *tensors)
        ctx.mark_non_differentiable(sums, maxes)
        ctx.set_materialize_grads(False)
        return loss, sums, maxes

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        d_log_prob, d_entropy, log_prob, entropy, *tensors = ctx.saved_tensors
        settings, backend = ctx.rest
        found = bonus = None
        if grad is not None and library.wants_double_backward(grad, log_prob, entropy):

            def forward(log_prob: Tensor, entropy: Tensor | None) -> Tensor:
                return smooth(log_prob, entropy, tensors, settings)

            found, bonus = library.differentiate(forward, (log_prob, entropy), (grad,))
        elif grad is not None:
            need, need_entropy = ctx.needs_input_grad[:2]
            found = library.call("_scale_fwd", d_log_prob, grad, log_prob, backend=backend) if need else None
            bonus = library.call("_scale_fwd", d_entropy, grad, entropy, backend=backend) if need_entropy else None
        return (found, bonus, *[None] * (_TENSORS + _SETTINGS))


_TENSORS, _SETTINGS = 11, 12  # of policy.Policy: its tensors, its settings with `plain` and the backend


def _run(p: policy.Policy, needs: list[bool], out: Tensor | None = None) -> tuple[Tensor, ...]:
    name, args = policy.raw(p.plain, p.log_prob, p.entropy, p.tensors, p.settings)
    outs = None
    if out is not None:
        loss, sums, maxes, _, d_entropy = library.OPS[name].alloc(*args, [False, *needs[1:]])
        outs = (loss, sums, maxes, out, d_entropy)
    found: tuple[Tensor, ...] = library.call(name, *args, needs, backend=p.backend, out=outs)
    return found


# ---- public ops -----------------------------------------------------------------------------------------------------
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    variant: Variant = "ppo",
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float | None | Literal["auto"] = "auto",
    log_ratio_clamp: float | None | Literal["auto"] = "auto",
    importance_sampling_level: Level | None = None,
    sequence_grad: Literal["row", "token"] | None = None,
    loss_agg_mode: LossAggMode | None = None,
    rollout_is_weights: Tensor | None = None,
    rollout_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_penalty: Kl = "low_var_kl",
    kl_log_ratio_range: tuple[float, float] | None | Literal["verl"] = "verl",
    kl_value_range: tuple[float, float] | None | Literal["verl"] = "verl",
    kl_coef: float = 0.0,
    use_bias_correction_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coeff: float = 0.0,
    dp_size: Count = 1,
    batch_num_tokens: Count = None,
    global_batch_size: Count = None,
    loss_scale_factor: Count = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[VariantOptions],
) -> PolicyLoss:
    r"""The policy loss, PPO's clipped one or a variant, with the KL and entropy terms fused in.

    Per token, with x = log_prob - old_log_prob, clamped, and r = exp(x); A the advantage, lo and hi the cliprange:

    - ppo: max(-A r, -A clip(r)), clip(r) in [1 - lo, 1 + hi]; where A < 0 at most -A clip_ratio_c (3), or with `delta`
      instead, TRL's, at most -A delta. decoupled: the same with old_log_prob the proximal policy, times
      exp(old_log_prob - rollout_log_prob), 0 where that is above `behave_cap` (off).
    - gspo, gspo_token, luspo: ppo with r = exp(mean x of the row); gspo clamps the mean at 10 from above. rloo: with
      r = exp(sum x of the row). luspo and rloo divide by all rows.
    - sapo: -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos (1.0) where A > 0, else tau_neg (1.05).
    - cispo: -sg(clip(r)) A log_prob, or with `ratio_cap`, TRL's, -sg(min(r, ratio_cap)) A log_prob. gpg, reinforce: -A log_prob.
    - dppo_tv, dppo_kl: -sg(min(r, clip_ratio_c)) A log_prob, 0 where the token's total variation, or the divergence of two
      coins, has passed hi (A > 0) or lo in the direction that A rewards.
    - topr: -A log_prob where A > 0, else -sg(min(r, 1)) A log_prob. dro: dro_beta x^2 / 2 - A log_prob.
    - vespo: -sg(exp(lam + k L - lam e^L)) A log_prob with L the row's sum of x and of the logs of the weights, k and lam by
      the sign of A: vespo_k_pos (2), vespo_lambda_pos (3), vespo_k_neg (3), vespo_lambda_neg (2).
    - geo_mean: -mean(A) exp(mean of x, clipped at hi where A > 0, at -lo where A < 0) of the row; weights by their geometric mean.
    - clip_cov: ppo, but clip_cov_ratio (2e-4) of the tokens, at random of those whose covariance (A - mean A)(log_prob -
      mean log_prob) lies between clip_cov_lb (1) and clip_cov_ub (5), give nothing. kl_cov: -A r, and ppo_kl_coef (0.1) |x|
      at the kl_cov_ratio (2e-4) of the tokens with the largest covariance.

    All but vespo and geo_mean are multiplied by rollout_is_weights. loss = agg(l) + kl_coef * agg(KL) - entropy_coeff * agg(entropy).
    agg, with D = dp_size, N = batch_num_tokens, B = global_batch_size, S = loss_scale_factor, n the row's valid tokens:
    token-mean: D / N * sum; seq-mean-token-sum: D / B * sum; seq-mean-token-mean: D / B * sum over rows of (row sum / n);
    seq-mean-token-sum-norm: D / (B S) * sum; token-sum: D * sum.

    Args:
        old_log_prob: (B, T) or packed (N,), floating point, nats. No input but the mask is read at masked tokens (vespo's
            weights are, as in TRL).
        log_prob: like old_log_prob.
        advantages: like log_prob, or one a row: (B,), (B, 1), or (B, T) expanded with stride 0 (read once a row).
        response_mask: like log_prob, bool, integer or float; nonzero = trainable token, whatever its value.
        variant: as above.
        cliprange, cliprange_low, cliprange_high: the clip of r, not negative; low and high default to cliprange (0.2).
        clip_ratio_c: the dual clip, greater than 1; None = off, "auto" = the variant's (3 for ppo, decoupled and dppo).
        log_ratio_clamp: the clamp of the log-ratio, nats; None = off, "auto" = the variant's (20; gspo 10; rows: from above).
        importance_sampling_level: what r is the ratio of: "token", "sequence" (the row's mean) or "sequence-sum". None = the variant's;
            ppo takes all three, sapo, cispo and luspo the first two.
        sequence_grad: of a row's ratio. "row": the gradient goes through the row's mean (TRL, OpenRLHF); "token": each
            token keeps its own (verl's gspo). None = the variant's.
        loss_agg_mode: the aggregation, as above. None = the variant's, as its framework has it: token-mean; seq-mean-token-mean
            for sapo, geo_mean and rloo; seq-mean-token-sum for luspo.
        rollout_is_weights: like advantages; multiplies l, detached.
        rollout_log_prob: like log_prob, for "decoupled" only: the behaviour policy's.
        ref_log_prob, kl_penalty, kl_log_ratio_range, kl_value_range, kl_coef: the KL term, like log_prob, nats; `kl_penalty` has
            the estimators and what clamps them (k3, unless you say otherwise, as verl does).
        use_bias_correction_kl: multiply the KL by r, with its gradient (TRL).
        entropy, entropy_coeff: the entropy term; like log_prob, nats.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: numbers or 0-dim tensors, which are never read on
            the host. None: this call's valid tokens, its rows with any (luspo, rloo, geo_mean: all its rows), and T.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        options: the variant's own numbers, as above; dro_beta has no default. `noise`, like log_prob: clip_cov takes the
            candidates of the least noise and reads nothing on the host.

    Returns:
        PolicyLoss(loss, metrics): a fresh 0-dim tensor, in verl's dtype (the promotion of the inputs and a float mask; at
        least float32 in the seq modes), and `Metrics`.

    Gradient:
        To log_prob and entropy; the other tensors are refused if they require grad. On a clip's edge it passes in full; a
        tie with the dual clip halves it. A second backward under retain_graph works; create_graph goes by the reference.

    Numerics:
        Arithmetic in float32 (float64 if an input is), for half log-probs too: verl rounds their ratio to half. Sums in
        float64; the same bits for every thread count. A NaN at a valid token shows in the loss, in its gradient (where
        torch.clamp would give 0) and in metrics.nonfinite. No valid token: loss NaN with local counts, gradients 0. clip_cov without
        noise is the one call that reads the device: it takes verl's torch.randperm, from the host's generator.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, numbers or modes that do not fit; what the variant does not read;
        dp_size > 1 without the count that the mode divides by; an input that requires grad and gets none.

    Example:
        >>> log_prob, mask = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[1, 1]])
        >>> loss, metrics = rlkern.policy_loss(log_prob.detach(), log_prob, torch.tensor([2.0]), mask)
        >>> loss.backward(); loss, log_prob.grad
        (tensor(-2., grad_fn=<_PolicyLossBackward>), tensor([[-1., -1.]]))

    Source:
        PPO: Schulman et al. 2017 (arXiv 1707.06347), Ye et al. 2019 (dual clip, 1912.09729), Yu et al. 2025 (clip-higher,
        2503.14476). decoupled: Hilton et al. 2022 (2110.00641). GSPO: Zheng et al. 2025 (2507.18071). CISPO: MiniMax 2025
        (2506.13585). GPG: Chu et al. 2025 (2504.02546). GMPO: Zhao et al. 2025 (2507.20673). clip-cov, kl-cov: Cui et al. 2025
        (2505.22617). DPPO: 2602.04879. TOPR: Roux et al. 2025 (2503.14286). verl compute_policy_loss_<variant> and agg_loss; TRL
        GRPOTrainer._compute_loss; OpenRLHF PolicyLoss; ROLL ActorPGWorker.
    """
    p = policy.arguments(
        "policy_loss", old_log_prob, log_prob, advantages, response_mask, variant, cliprange, cliprange_low, cliprange_high,
        clip_ratio_c, log_ratio_clamp, importance_sampling_level, sequence_grad, loss_agg_mode, rollout_is_weights, rollout_log_prob,
        ref_log_prob, kl_penalty, kl_log_ratio_range, kl_value_range, kl_coef, use_bias_correction_kl, entropy, entropy_coeff,
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, cu_seqlens, **options,
    )  # fmt: skip
    if check.wants_grad(p.log_prob, p.entropy):
        args = (p.log_prob, p.entropy, *p.tensors, *p.settings, p.plain, p.backend)
        loss, sums, maxes = _PolicyLoss.apply(*args)  # type: ignore[no-untyped-call]
    else:
        loss, sums, maxes, _, _ = _run(p, [False, False, False])
    return PolicyLoss(loss, Metrics(sums, maxes, p.metrics))


def policy_loss_and_grad(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, *, out: Tensor | None = None, **settings: Any
) -> PolicyLossAndGrad:
    r"""`policy_loss` and its gradients at once, without autograd.

    For callers that have d loss / d log_prob to hand on themselves: the gradient is written once, already scaled.

    Args:
        old_log_prob, log_prob, advantages, response_mask: as in `policy_loss`.
        out: a tensor like log_prob to write d_log_prob into.
        settings: every other argument of `policy_loss`, by name.

    Returns:
        PolicyLossAndGrad(loss, metrics, d_log_prob, d_entropy), detached; the gradients in the dtype of their tensors, 0 at
        masked tokens; d_entropy is None without entropy.

    Gradient:
        None is recorded, whether inputs require grad or not.

    Numerics:
        As `policy_loss`. A float16 gradient underflows at about 6e-8: scale the loss by the denominators, or use float32.

    Raises:
        ValueError, TypeError: as `policy_loss`.

    Example:
        >>> log_prob, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]])
        >>> rlkern.policy_loss_and_grad(log_prob, log_prob, torch.tensor([2.0]), mask).d_log_prob
        tensor([[-1., -1.]])

    Source:
        As `policy_loss`.
    """
    op = "policy_loss_and_grad"
    p = policy.arguments(op, old_log_prob, log_prob, advantages, response_mask, **settings)
    if check.wants_grad(p.log_prob, p.entropy, *p.tensors):
        entropy, *tensors = (x if x is None else x.detach() for x in (p.entropy, *p.tensors))
        p = p._replace(log_prob=p.log_prob.detach(), entropy=entropy, tensors=tuple(tensors))
    if out is not None:
        out = check.out_tensors(op, out, p.log_prob, [p.log_prob.dtype], False)
    loss, sums, maxes, d_log_prob, d_entropy = _run(p, [True, p.entropy is not None, False], out)
    return PolicyLossAndGrad(loss, Metrics(sums, maxes, p.metrics), d_log_prob, d_entropy if p.entropy is not None else None)
