# SPDX-License-Identifier: Apache-2.0
"""The clipped value loss: value, gradient and metrics from one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.aggregation import Count, counts_of, gradient, loss_dtype, results
from rlkern.backends import pick
from rlkern.metrics import VALUE_MAXES, VALUE_SUMS, Metrics, ValueLoss
from rlkern.reference import loss as reference
from rlkern.types import LossAggMode


# ---- raw op ---------------------------------------------------------------------------------------------------------
def _value_alloc(vpreds: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, needs = rest[-2], rest[-1]
    return *results(vpreds, dtype, len(VALUE_SUMS), len(VALUE_MAXES)), gradient(vpreds, needs[0], needs[1])


library.define(
    "_value_loss_fwd",
    "(Tensor vpreds, Tensor returns, Tensor? values, Tensor mask, Tensor? counts, Tensor? cu_seqlens, float clip,"
    " float huber_delta, str mode, float[] numbers, ScalarType loss_dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _value_alloc,
    reference.value_loss,
)


# ---- autograd -------------------------------------------------------------------------------------------------------
class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vpreds: Tensor, *rest: Any) -> Any:
        tensors, (*settings, backend) = rest[:5], rest[5:]
        loss, sums, maxes, d_vpreds = library.call("_value_loss_fwd", vpreds, *tensors, *settings, [True, True], backend=backend)
        ctx.rest = (settings, backend)
        ctx.save_for_backward(d_vpreds, vpreds, *tensors)
        ctx.mark_non_differentiable(sums, maxes)
        ctx.set_materialize_grads(False)
        return loss, sums, maxes

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        d_vpreds, vpreds, *tensors = ctx.saved_tensors
        settings, backend = ctx.rest
        found = None
        if grad is not None and library.wants_double_backward(grad, vpreds):

            def forward(vpreds: Tensor) -> Tensor:
                return reference.value_loss_smooth(vpreds, tensors, settings)

            found = library.differentiate(forward, (vpreds,), (grad,))[0]
        elif grad is not None:
            found = library.call("_scale_fwd", d_vpreds, grad, vpreds, backend=backend)
        return (found, *[None] * 11)


# ---- public op ------------------------------------------------------------------------------------------------------
def value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    *,
    cliprange_value: float | None = 0.5,
    huber_delta: float | None = None,
    scale: float = 1.0,
    loss_agg_mode: LossAggMode = "token-mean",
    dp_size: Count = 1,
    batch_num_tokens: Count = None,
    global_batch_size: Count = None,
    loss_scale_factor: Count = None,
    cu_seqlens: Tensor | None = None,
) -> ValueLoss:
    r"""The clipped value loss of PPO.

    Per token: l = max(h(v - R), h(clamp(v, V - c, V + c) - R)) with c = cliprange_value and h(e) = e^2 / 2, beyond
    |e| = huber_delta its tangent; aggregated as `policy_loss`, times scale.

    Args:
        vpreds: (B, T) or packed (N,), floating point; the critic's values now. No input but the mask is read at masked tokens.
        returns: like vpreds.
        values: like vpreds; the values at rollout. May be None, and is not read, without cliprange_value.
        response_mask: like vpreds, bool, integer or float; nonzero = trainable token, whatever its value.
        cliprange_value: c, not negative; None = off: half the squared error.
        huber_delta: the error beyond which a token's loss grows linearly, positive; None = off.
        scale: a factor of the loss, not negative; 2 leaves the half away.
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in `policy_loss`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        ValueLoss(loss, metrics): a fresh 0-dim tensor, in the promotion of the inputs and a float mask (at least float32 in
        the seq modes), and `Metrics`.

    Gradient:
        To vpreds; returns and values are refused if they require grad. v - R, at most huber_delta in size, where the
        unclipped term is the larger one or v is inside the clip's closed interval; half of it where the terms tie outside.

    Numerics:
        As `policy_loss`.

    Raises:
        ValueError, TypeError: as `policy_loss`.

    Example:
        >>> v, r, old = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> rlkern.value_loss(v, r, old, torch.tensor([[1, 1]])).loss
        tensor(2.5000)

    Source:
        Schulman et al. 2017, and OpenAI baselines' clipped form; verl compute_value_loss. The other frameworks' forms:
        docs/algorithms.md.
    """
    op = "value_loss"
    check.batch(op, "vpreds", vpreds, cu_seqlens)
    check.present(op, "vpreds", returns=returns, response_mask=response_mask)
    if cliprange_value is None:
        values = None
    elif values is None:
        raise check.fail(op, "values", "be given with cliprange_value", "None", "Or pass cliprange_value=None.")
    vpreds, returns, values, mask = check.tensors(op, vpreds, vpreds=vpreds, returns=returns, values=values, response_mask=response_mask)
    check.detached(op, returns=returns, values=values)
    clip = math.inf if cliprange_value is None else check.number(op, "cliprange_value", cliprange_value, 0.0)
    delta = math.inf if huber_delta is None else check.number(op, "huber_delta", huber_delta, 0.0, open_low=True)
    cu = check.lengths(op, cu_seqlens, vpreds)
    counts = counts_of(
        op, vpreds, loss_agg_mode, cu is not None, scale=check.number(op, "scale", scale, 0.0), dp_size=dp_size,
        batch_num_tokens=batch_num_tokens, global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
    )  # fmt: skip
    settings = (clip, delta, loss_agg_mode, counts.numbers, loss_dtype(loss_agg_mode, counts, vpreds, returns, values, mask))
    args = (vpreds, returns, values, mask, counts.tensor, cu, *settings)
    backend = pick("_value_loss_fwd", vpreds)
    if check.wants_grad(vpreds):
        loss, sums, maxes = _ValueLoss.apply(*args, backend)  # type: ignore[no-untyped-call]
    else:
        loss, sums, maxes, _ = library.call("_value_loss_fwd", *args, [False, False], backend=backend)
    return ValueLoss(loss, Metrics(sums, maxes, "value"))
