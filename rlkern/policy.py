# SPDX-License-Identifier: Apache-2.0
"""The variants of the policy loss: a table, and the arguments that each takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern import check, library
from rlkern.aggregation import Count, counts_of, gradient, loss_dtype, results
from rlkern.backends import pick
from rlkern.kl import estimator
from rlkern.metrics import POLICY_MAXES, POLICY_SUMS
from rlkern.reference import policy as reference
from rlkern.reference import policy_select

_ANY = ("token", "sequence", "sequence-sum")
_REQUIRED = math.nan


class Variant(NamedTuple):
    """A row of the table. A number of None is off; what a variant does not read may not be given."""

    kind: str  # the function of a token in csrc/math/loss.h, kernels/policy.py and rlkern/reference/policy.py
    clips: bool = True  # reads cliprange
    caps: bool = False  # reads clip_ratio_c
    clamps: bool = True  # reads log_ratio_clamp
    cap: float | None = None  # its defaults
    clamp: float | None = None
    levels: tuple[str, ...] = ("token",)  # the first is the default
    row_grad: bool = True  # of a ratio of the row: the gradient goes through the row, or stays with the token
    mode: str = "token-mean"
    all_rows: bool = False  # the seq modes divide by all rows, empty ones too
    options: Mapping[str, float | None] = MappingProxyType({})  # its own numbers, in the kernels' order


_COV = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
_VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
VARIANTS: dict[str, Variant] = {
    "ppo": Variant("clip", caps=True, cap=3.0, clamp=20.0, levels=_ANY, options={"delta": None}),
    "decoupled": Variant("clip", caps=True, cap=3.0, clamp=20.0, options={"behave_cap": None}),
    "gspo": Variant("clip", caps=True, clamp=10.0, levels=("sequence",), row_grad=False),
    "gspo_token": Variant("clip", caps=True, levels=("sequence",), row_grad=False),
    "luspo": Variant("clip", levels=("sequence", "token"), mode="seq-mean-token-sum", all_rows=True, options={"delta": None}),
    "rloo": Variant("clip", levels=("sequence-sum",), mode="seq-mean-token-mean", all_rows=True),
    "sapo": Variant(
        "sapo", clips=False, clamp=20.0, levels=("token", "sequence"), mode="seq-mean-token-mean", options={"tau_pos": 1.0, "tau_neg": 1.05}
    ),
    "cispo": Variant("cispo", clamp=20.0, levels=("token", "sequence"), options={"ratio_cap": None}),
    "gpg": Variant("reinforce", clips=False, clamps=False),
    "reinforce": Variant("reinforce", clips=False, clamps=False),
    "geo_mean": Variant("geo_mean", clamps=False, mode="seq-mean-token-mean", all_rows=True),
    "clip_cov": Variant("clip", options=_COV),
    "kl_cov": Variant("kl_cov", clips=False, clamps=False, options={"ppo_kl_coef": 0.1, "kl_cov_ratio": 2e-4}),
    "dppo_tv": Variant("dppo_tv", caps=True, cap=3.0, clamp=20.0),
    "dppo_kl": Variant("dppo_kl", caps=True, cap=3.0, clamp=20.0),
    "dro": Variant("dro", clips=False, clamps=False, options={"dro_beta": _REQUIRED}),
    "topr": Variant("topr", clips=False, clamp=20.0),
    "vespo": Variant("vespo", clips=False, clamps=False, options=_VESPO),
}


# ---- raw ops --------------------------------------------------------------------------------------------------------
def _alloc(entropy: int) -> Any:
    def alloc(old_log_prob: Tensor, log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        of, dtype, needs = rest[entropy], rest[-2], rest[-1]
        d_entropy = gradient(log_prob if of is None else of, needs[1], needs[2])
        return *results(log_prob, dtype, len(POLICY_SUMS), len(POLICY_MAXES)), gradient(log_prob, needs[0], needs[2]), d_entropy

    return alloc


_TENSORS = (
    "(Tensor old_log_prob, Tensor log_prob, Tensor? advantages, Tensor? advantages_row, Tensor mask, Tensor? weights,"
    " Tensor? weights_row, Tensor? ref_log_prob, Tensor? entropy,"
)
_NUMBERS = (
    " float[] clip, str mode, float[] numbers, str kl, float[] kl_range, float[] coefs, ScalarType loss_dtype, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "_policy_loss_fwd",
    f"{_TENSORS} Tensor? counts, Tensor? cu_seqlens,{_NUMBERS}",
    _alloc(6),
    reference.policy_loss,
)
library.define(
    "_policy_variant_fwd",
    f"{_TENSORS} Tensor? selected, Tensor? behave, Tensor? counts, Tensor? cu_seqlens, str kind, str level, bool[] flags,{_NUMBERS}",
    _alloc(6),
    reference.policy_variant,
)
library.define(
    "_policy_select_fwd",
    "(Tensor old_log_prob, Tensor log_prob, Tensor? advantages, Tensor? advantages_row, Tensor mask, Tensor? cu_seqlens, str kind,"
    " float[] numbers) -> (Tensor, Tensor)",
    lambda old, log_prob, *rest: (library.fresh(log_prob, torch.uint8), results(log_prob, torch.float32, 2, 0)[1]),
    policy_select.policy_select,
)


# ---- numbers ----------------------------------------------------------------------------------------------------------
class Settings(NamedTuple):
    """What the numbers of a call say, checked once for each set of them."""

    variant: Variant
    level: str
    flags: list[bool]  # the gradient goes through the row; the KL is multiplied by the ratio
    clip: list[float]  # low, high, cap, clamp, and the variant's own
    mode: str
    kl: str
    kl_range: list[float]
    coefs: list[float]
    own: list[float]  # the variant's own numbers that are given
    plain: bool  # the clipped loss of the token's own ratio, which has a kernel of its own


def _unread(op: str, variant: str, name: str, value: Any) -> Exception:
    return check.fail(op, name, f"be left out with variant {variant!r}, which does not read it", value, "See the table in the docstring.")


def _settings(
    op: str, variant: str, cliprange: float | None, cliprange_low: float | None, cliprange_high: float | None,
    clip_ratio_c: float | None | str, log_ratio_clamp: float | None | str, level: str | None, sequence_grad: str | None,
    mode: str | None, kl_penalty: str, kl_ranges: tuple[Any, Any], kl_coef: float, by_ratio: bool, entropy_coeff: float,
    has_ref: bool, has_entropy: bool, options: tuple[tuple[str, Any], ...],
) -> Settings:  # fmt: skip
    check.word(op, "variant", variant, tuple(VARIANTS))
    v = VARIANTS[variant]
    level = v.levels[0] if level is None else level
    check.word(op, "importance_sampling_level", level, v.levels)
    check.word(op, "sequence_grad", sequence_grad, (None, "row", "token"))
    if sequence_grad is not None and level == "token":
        raise check.fail(op, "sequence_grad", "be left out with ratios of tokens", repr(sequence_grad), "It is of a ratio of the row.")
    low, high = _cliprange(op, variant, v, cliprange, cliprange_low, cliprange_high)
    cap = _number_or_off(op, variant, "clip_ratio_c", clip_ratio_c, v.caps, v.cap, 0.0 if v.kind.startswith("dppo") else 1.0)
    clamp = _number_or_off(op, variant, "log_ratio_clamp", log_ratio_clamp, v.clamps, v.clamp, 0.0)
    own = _own(op, variant, v, dict(options))
    delta, ratio_cap = own.get("delta"), own.get("ratio_cap")
    rest = numbers = [x for x in own.values() if x is not None]
    if delta is not None:
        if clip_ratio_c not in ("auto", None):
            raise check.fail(op, "delta", "be left out with clip_ratio_c", delta, "Both bound the ratio where A < 0: keep one.")
        if delta <= 1 + high:
            raise check.fail(op, "delta", f"be above 1 + cliprange_high = {1 + high}", delta, "Below it the bounds would cross.")
        cap, rest = delta, []
    if ratio_cap is not None:
        low, high, rest = 1.0, ratio_cap - 1, []
    if v.kind == "clip":
        behave = own.get("behave_cap")
        rest = [0.5 if delta is None else 1.0, math.inf if behave is None else behave]
    coefs = [check.number(op, "kl_coef", kl_coef), check.number(op, "entropy_coeff", entropy_coeff)]
    if coefs[0] != 0 and not has_ref:
        raise check.fail(op, "kl_coef", "be 0 without ref_log_prob", kl_coef, "Give ref_log_prob.")
    if coefs[1] != 0 and not has_entropy:
        raise check.fail(op, "entropy_coeff", "be 0 without entropy", entropy_coeff, "Give entropy.")
    kl, kl_range = estimator(op, kl_penalty, *kl_ranges)
    if by_ratio and (not has_ref or kl.endswith("+")):
        raise check.fail(op, "use_bias_correction_kl", "be False without ref_log_prob, or with a straight-through estimator", by_ratio,
                         "It multiplies the KL term by the ratio.")  # fmt: skip
    row_grad = v.row_grad if sequence_grad is None else sequence_grad == "row"
    if v.kind == "geo_mean" and mode not in (None, v.mode):
        raise check.fail(op, "loss_agg_mode", f"be {v.mode!r} with variant 'geo_mean'", repr(mode), "It is a mean of rows.")
    plain = v.kind == "clip" and level == "token" and delta is None and not by_ratio and variant in ("ppo", "luspo")
    clip = [low, high, cap, clamp, *rest, *[0.0] * (4 - len(rest))]
    return Settings(v, level, [row_grad, bool(by_ratio)], clip, mode or v.mode, kl, kl_range, coefs, numbers, plain)


def _cliprange(op: str, variant: str, v: Variant, both: float | None, low: float | None, high: float | None) -> tuple[float, float]:
    for name, x in (("cliprange", both), ("cliprange_low", low), ("cliprange_high", high)):
        if x is not None and not v.clips:
            raise _unread(op, variant, name, x)
    both = 0.2 if both is None else check.number(op, "cliprange", both, 0.0)
    low = both if low is None else check.number(op, "cliprange_low", low, 0.0)
    return low, both if high is None else check.number(op, "cliprange_high", high, 0.0)


def _number_or_off(op: str, variant: str, name: str, value: Any, read: bool, default: float | None, above: float) -> float:
    if isinstance(value, str) and value == "auto":
        return math.inf if default is None else default
    if value is not None and not read:
        raise _unread(op, variant, name, value)
    return math.inf if value is None else check.number(op, name, value, above, open_low=name == "clip_ratio_c")


def _own(op: str, variant: str, v: Variant, given: dict[str, Any]) -> dict[str, float | None]:
    """The variant's own numbers, given or by default, in the table's order."""
    for name, x in given.items():
        if name not in v.options:
            raise _unread(op, variant, name, x)
    own = {}
    for name, default in v.options.items():
        x = given.get(name, default)
        if x is not None and isinstance(x, float) and math.isnan(x):
            raise check.fail(op, name, f"be given with variant {variant!r}", "nothing", "It has no default: a number above 0.")
        positive = not name.startswith(("clip_cov_lb", "clip_cov_ub", "vespo", "ppo_kl_coef"))
        own[name] = None if x is None else check.number(op, name, x, 0.0 if positive else -math.inf, open_low=positive)
    return own


_cached_settings = functools.lru_cache(maxsize=64, typed=True)(_settings)


def _settings_once(*numbers: Any) -> Settings:
    if torch.compiler.is_compiling():
        return _settings(*numbers)
    try:
        return _cached_settings(*numbers)
    except TypeError:  # unhashable: the check names it
        return _settings(*numbers)


# ---- arguments ------------------------------------------------------------------------------------------------------
class Policy(NamedTuple):
    """Checked arguments of a policy loss."""

    log_prob: Tensor
    entropy: Tensor | None
    tensors: tuple[Tensor | None, ...]  # old, advantages, their row form, mask, weights, their row form, ref, selected, behave, counts, cu
    settings: tuple[Any, ...]  # kind, level, flags, clip, mode, numbers, kl, kl_range, coefs, loss dtype
    plain: bool
    metrics: str  # their kind
    backend: int


def _token_or_row(x: Any, like: Tensor) -> tuple[Any, Any]:
    """(x, None) if x has one value a token, (None, x) if it may have one a row."""
    return (None, x) if isinstance(x, Tensor) and x.shape != like.shape else (x, None)


def arguments(
    op: str, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, variant: str = "ppo",
    cliprange: float | None = None, cliprange_low: float | None = None, cliprange_high: float | None = None,
    clip_ratio_c: float | None | str = "auto", log_ratio_clamp: float | None | str = "auto",
    importance_sampling_level: str | None = None, sequence_grad: str | None = None, loss_agg_mode: str | None = None,
    rollout_is_weights: Tensor | None = None, rollout_log_prob: Tensor | None = None, ref_log_prob: Tensor | None = None,
    kl_penalty: str = "low_var_kl", kl_log_ratio_range: Any = "verl", kl_value_range: Any = "verl", kl_coef: float = 0.0,
    use_bias_correction_kl: bool = False, entropy: Tensor | None = None, entropy_coeff: float = 0.0, dp_size: Count = 1,
    batch_num_tokens: Count = None, global_batch_size: Count = None,
    loss_scale_factor: Count = None, cu_seqlens: Tensor | None = None, **options: Any,
) -> Policy:  # fmt: skip
    check.batch(op, "log_prob", log_prob, cu_seqlens)
    check.present(op, "log_prob", old_log_prob=old_log_prob, advantages=advantages, response_mask=response_mask)
    noise = options.pop("noise", None) if options else None
    adv, adv_row = _token_or_row(advantages, log_prob)
    weights, weights_row = _token_or_row(rollout_is_weights, log_prob)
    log_prob, old, mask, adv, weights, ref, entropy, behave, noise = check.tensors(
        op, log_prob, log_prob=log_prob, old_log_prob=old_log_prob, response_mask=response_mask, advantages=adv,
        rollout_is_weights=weights, ref_log_prob=ref_log_prob, entropy=entropy, rollout_log_prob=rollout_log_prob, noise=noise,
    )  # fmt: skip
    cu = check.lengths(op, cu_seqlens, log_prob)
    rows = 0
    if adv_row is not None or weights_row is not None or variant != "ppo":
        rows = check.rows_of(log_prob, cu)
        adv_row = check.per_row(op, "advantages", adv_row, rows, log_prob)
        weights_row = check.per_row(op, "rollout_is_weights", weights_row, rows, log_prob)
    if op == "policy_loss":
        check.detached(op, advantages=advantages, old_log_prob=old, ref_log_prob=ref, rollout_is_weights=rollout_is_weights,
                       rollout_log_prob=rollout_log_prob)  # fmt: skip
    s = _settings_once(
        op, variant, cliprange, cliprange_low, cliprange_high, clip_ratio_c, log_ratio_clamp, importance_sampling_level,
        sequence_grad, loss_agg_mode, kl_penalty, (kl_log_ratio_range, kl_value_range), kl_coef, use_bias_correction_kl,
        entropy_coeff, ref is not None, entropy is not None, tuple(options.items()),
    )  # fmt: skip
    if (behave is not None) != (variant == "decoupled"):
        must = 'be given with variant "decoupled", and only then'
        raise check.fail(op, "rollout_log_prob", must, f"{type(rollout_log_prob).__name__} with {variant!r}", "It divides old_log_prob.")
    if noise is not None and variant != "clip_cov":
        raise _unread(op, variant, "noise", check.describe(noise))
    if s.variant.all_rows and global_batch_size is None and dp_size == 1:
        global_batch_size = max(rows or check.rows_of(log_prob, cu), 1)
    counts = counts_of(
        op, log_prob, s.mode, cu is not None, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
    )  # fmt: skip
    dtype = loss_dtype(s.mode, counts, log_prob, old, adv, adv_row, weights, weights_row, mask, ref, entropy, behave)
    selected = None
    if variant in ("clip_cov", "kl_cov"):
        selected = _selected(variant, s, (old, log_prob, adv, adv_row, mask, cu), noise)
    tensors = (old, adv, adv_row, mask, weights, weights_row, ref, selected, behave, counts.tensor, cu)
    kind = "policy" + ("+kl" if ref is not None else "") + ("+entropy" if entropy is not None else "")
    settings = (s.variant.kind, s.level, s.flags, s.clip, s.mode, counts.numbers, s.kl, s.kl_range, s.coefs, dtype)
    backend = pick("_policy_loss_fwd" if s.plain else "_policy_variant_fwd", log_prob)
    return Policy(log_prob, entropy, tensors, settings, s.plain, kind, backend)


def _places(chosen: Tensor) -> Tensor:
    """Where a byte is set, in order. Few are: eight at a time."""
    if chosen.numel() % 8:
        return chosen.nonzero()[:, 0]
    words = chosen.view(torch.int64).nonzero()
    near = (8 * words + torch.arange(8, device=chosen.device)).flatten()
    return near[chosen[near] != 0]


@torch.no_grad()
def _selected(variant: str, s: Settings, args: tuple[Any, ...], noise: Tensor | None) -> Tensor:
    """A byte per token: what clip-cov drops, or kl-cov penalizes."""
    log_prob, rest = args[1], ([s.own[1]] if variant == "kl_cov" else [*s.own[1:], *s.clip[:2]])
    chosen, counts = library.call("_policy_select_fwd", *args, variant, rest, backend=pick("_policy_select_fwd", log_prob))
    if variant == "kl_cov":
        return chosen  # type: ignore[no-any-return]
    flat, taken = chosen.flatten(), torch.zeros_like(chosen).flatten()
    if noise is None:  # verl's way: both counts come to the host, and its generator gives the order
        found, tokens = (int(x) for x in counts.tolist())
        if found:
            order = torch.randperm(found)[: max(int(s.own[0] * tokens), 1)]
            taken[_places(flat)[order.to(flat.device)]] = 1
    else:
        most = torch.minimum(counts[0], (counts[1] * s.own[0]).floor().clamp(min=1))
        order = torch.where(flat != 0, noise.flatten(), torch.inf).argsort(stable=True)
        taken.scatter_(0, order, (torch.arange(order.numel(), device=order.device) < most).to(torch.uint8))
    return taken.view_as(chosen)


def raw(plain: bool, log_prob: Tensor, entropy: Tensor | None, tensors: Any, settings: Any) -> tuple[str, tuple[Any, ...]]:
    """The raw op and its arguments, but for `needs`."""
    old, *others, selected, behave, counts, cu = tensors
    if plain:
        _, _, _, clip, *rest = settings
        return "_policy_loss_fwd", (old, log_prob, *others, entropy, counts, cu, clip[:4], *rest)
    return "_policy_variant_fwd", (old, log_prob, *others, entropy, selected, behave, counts, cu, *settings)
