# SPDX-License-Identifier: Apache-2.0
"""verl's masked reductions, group statistics, KL penalty, aggregation and value loss, by ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.integrations.site import Call, Site, Uncovered
from rlkern.integrations.verl_common import CORE, GROUPS, MATH, batch, counts_of, of_values


# ---- torch_functional, groupwise --------------------------------------------------------------------------------------
def masked_sum(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return rlkern.masked_sum(values, mask, axis)


def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return rlkern.masked_mean(values, mask, axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    return rlkern.masked_var(values, mask, unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return rlkern.masked_whiten(values, mask, shift_mean=shift_mean)


def group_mean_std(scores: Tensor, gidx: Tensor, eps: float = 1e-6, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """One slot per id, as ids are there: an id without a row has mean 0 and deviation 1."""
    on_cpu = device in ("cpu", torch.device("cpu")) or (device is None and not torch.cuda.is_available())
    if not (on_cpu and scores.is_cpu and gidx.is_cpu and gidx.numel()):
        raise Uncovered("its device is resolved by verl")
    slots = int(gidx.max()) + 1
    if gidx.shape != scores.shape or int(gidx.min()) < 0 or gidx.is_floating_point():
        raise Uncovered("ids that verl refuses or casts")
    index = rlkern.group_index(gidx)
    found = rlkern.group_mean_std(scores.float(), index, eps=eps)
    mean, std, count = torch.zeros(slots), torch.ones(slots), torch.zeros(slots)
    mean[gidx], std[gidx] = found.mean[index.ids], found.std[index.ids]
    count[gidx] = index.counts.float()[index.ids]
    return mean, std, count


def _exact_stats(scores: Tensor, gidx: Tensor, eps: float = 1e-6, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, which verl's own function leaves for float32."""
    wide, slots = scores.double(), int(gidx.max()) + 1
    count = torch.zeros(slots, dtype=torch.float64).index_add(0, gidx, torch.ones_like(wide))
    mean = torch.zeros_like(count).index_add(0, gidx, wide) / count.clamp(min=1)
    squares = torch.zeros_like(count).index_add(0, gidx, (wide - mean[gidx]).square())
    std, alone = (squares / (count - 1).clamp(min=1)).clamp(min=eps).sqrt(), count <= 1
    return mean.masked_fill(alone, 0), std.masked_fill(alone, 1), count


# ---- KL, aggregation, value loss ---------------------------------------------------------------------------------------
def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: Any) -> Tensor:
    if kl_penalty not in ("low_var_kl", "k3"):
        raise Uncovered("one subtraction and at most one product: torch's own is as fast")
    return rlkern.kl_penalty(logprob, ref_logprob, kl_penalty)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: Any) -> Tensor:
    if kl_penalty not in ("low_var_kl", "k3", "low_var_kl+", "k3+", "k1+", "abs+"):
        raise Uncovered("one subtraction and at most one product: torch's own is as fast")
    return rlkern.kl_penalty(logprob, ref_logprob, kl_penalty)


def _simple(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> bool:
    """One subtraction and at most one product: torch's own is as fast."""
    return kl_penalty not in ("low_var_kl", "k3", "low_var_kl+", "k3+", "k1+", "abs+")


def _few(values: Tensor, mask: Tensor, axis: Any = None) -> bool:
    """Some thousand numbers on a CPU: three calls of torch cost no more than one of ours."""
    return values.is_cpu and values.numel() < 1 << 12


def _small(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, *counts: Any, **more: Any) -> bool:
    """The token modes are verl's masked_sum, which is patched; below some 16,000 tokens torch's calls cost no more than ours."""
    return loss_agg_mode[:3] != "seq" or loss_mat.numel() < 1 << 14


def _agg_loss(by_rows: bool) -> Callable[..., Tensor]:
    def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, dp_size: Any = 1, **counts: Any) -> Tensor:
        mode, known = counts_of(loss_agg_mode, by_rows, {"dp_size": dp_size, **counts}, loss_mask.shape[-1])
        if loss_mask.is_floating_point() or loss_mat.dim() != 2 or not mode.startswith("seq-mean"):
            raise Uncovered("token modes are verl's masked_sum, which is patched")
        rows, tokens = rlkern.masked_sum(loss_mat, loss_mask, -1), (loss_mask != 0).sum(-1)
        if mode == "seq-mean-token-mean":
            rows = rows / (tokens + 1e-8)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sequences = known["global_batch_size"]
        if sequences is None:
            if known["dp_size"] > 1:
                raise Uncovered("verl asks for the global count")
            sequences = (tokens > 0).sum()
        loss: Tensor = rows.sum() / sequences * known["dp_size"]
        if mode == "seq-mean-token-sum-norm":
            factor = known["loss_scale_factor"]
            loss = loss / (loss_mask.shape[-1] if factor is None else factor)
        return loss

    return agg_loss


def _value_loss(by_rows: bool) -> Callable[..., Any]:
    def compute_value_loss(
        vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
        loss_agg_mode: str = "token-mean", **counts: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        mode, known = counts_of(loss_agg_mode, by_rows, counts, vpreds.shape[-1])
        found = rlkern.value_loss(vpreds, returns, values, response_mask, cliprange_value=cliprange_value, loss_agg_mode=mode, **known)
        sums = found.metrics.sums
        return found.loss, (sums[2] / sums[0].clamp(min=1)).float()

    return compute_value_loss


# ---- sites ------------------------------------------------------------------------------------------------------------
def sites() -> Iterable[Site]:
    axes: tuple[dict[str, Any], ...] = ({}, {"axis": -1}, {"axis": 0})
    whole: tuple[dict[str, Any], ...] = ({}, {"unbiased": False})
    shifted: tuple[dict[str, Any], ...] = ({}, {"shift_mean": False})
    x, y, z, mask = batch()
    sums = of_values(*axes)
    yield Site(MATH, "masked_sum", [masked_sum], sums, "_masked_sum_fwd", ("values",), terms=("values", 1.0), stays=_few)
    yield Site(MATH, "masked_mean", [masked_mean], of_values(*axes), "_masked_mean_fwd", ("values",), terms=("values", 1.0))
    yield Site(MATH, "masked_var", [masked_var], of_values(*whole), "_masked_var_fwd", ("values",), terms=("values", 1.0))
    yield Site(MATH, "masked_whiten", [masked_whiten], of_values(*shifted), "_masked_whiten_fwd")
    close, ids = torch.tensor([1e4, 1.0, 1e4 + 1, 1e4 + 3, 1.0, 7.0]), torch.tensor([0, 3, 0, 0, 3, 4])
    of_groups: list[Call] = [((close, ids), {"device": "cpu"})]
    yield Site(GROUPS, "group_mean_std", [group_mean_std], lambda _: of_groups, "_group_mean_std_fwd", exact=_exact_stats)
    pair = ("logprob", "ref_logprob")
    yield Site(CORE, "kl_penalty_forward", [kl_penalty_forward], lambda _: [((x, y, "k3"), {})], "_kl_penalty_fwd", pair, stays=_simple)
    suffix: list[Call] = [((x, y, "k3"), {}), ((x, y, "k3+"), {})]
    yield Site(CORE, "kl_penalty", [kl_penalty, kl_penalty_forward], lambda _: suffix, "_kl_penalty_fwd", pair, stays=_simple)
    modes = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean")
    agg: list[Call] = [((x, mask, mode), {}) for mode in modes]
    yield Site(
        CORE, "agg_loss", [_agg_loss(True), _agg_loss(False)], lambda _: agg, "_masked_sum_fwd", ("loss_mat",),
        terms=("loss_mat", 1.0), stays=_small,
    )  # fmt: skip
    value: list[Call] = [((x, y, z, mask, 0.5, mode), {}) for mode in modes]
    yield Site(CORE, "compute_value_loss", [_value_loss(True), _value_loss(False)], lambda _: value, "_value_loss_fwd", ("vpreds",))
