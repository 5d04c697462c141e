# SPDX-License-Identifier: Apache-2.0
"""What the public ops ask of their arguments. Errors: `rlkern.<op>: <argument> must <what>; got <what came>.` and a way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern.backends import VALUE_DTYPES, native

_VALUES = frozenset(VALUE_DTYPES)
_MASKS = frozenset((*VALUE_DTYPES, torch.bool, torch.uint8, torch.int32, torch.int64))


def fail(op: str, argument: str, must: str, got: Any, way_out: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"rlkern.{op}: {argument} must {must}; got {got}. {way_out}")


def describe(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r:.60}"


def tensors(op: str, like: Tensor, **others: Tensor | None) -> list[Any]:
    """Each tensor floating point, of the shape and device of `like` (itself among them, first), with rows of stride 1.

    Returns them in order; None is absent and stays. Anything but stride 1 (or 0: one value a row) is copied once.
    """
    if native is not None and not torch.compiler.is_compiling() and native.alike(like, others):
        return list(others.values())
    shape, device = (like.shape, like.device) if isinstance(like, Tensor) else (None, None)
    found = []
    for name, x in others.items():
        if x is not None:
            if x is not like and not (isinstance(x, Tensor) and x.shape == shape and x.device == device):
                _mismatch(op, name, x, shape, device)
            if x.dtype not in (_MASKS if name.endswith("mask") else _VALUES):
                kinds = "bool, uint8, int32, int64 or floating point" if name.endswith("mask") else "float32, float64, float16 or bfloat16"
                raise fail(op, name, f"be {kinds}", describe(x), "Convert it with .to(dtype).", TypeError)
            if not x.is_contiguous():
                x = inner(x)
        found.append(x)
    return found


def _mismatch(op: str, name: str, x: Any, shape: Any, device: Any) -> None:
    if not isinstance(x, Tensor):
        raise fail(op, name, "be a torch.Tensor", describe(x), "Convert it with torch.as_tensor.", TypeError)
    if x.shape != shape:
        raise fail(op, name, f"have the shape {tuple(shape or ())} of the first argument", describe(x), "Expand it: x.expand(shape).")
    raise fail(op, name, f"be on {device} like the first argument", describe(x), "Move it with .to(device).")


def present(op: str, like: str, **tensors: Any) -> None:
    """None of these is left out, given that `like` was."""
    for name, x in tensors.items():
        if x is None:
            raise fail(op, name, "be a torch.Tensor", "None", f"It goes with {like}.", TypeError)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Is any of them recorded by autograd?"""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110  (any() over a generator takes three times as long)
        if x is not None and x.requires_grad:
            return True
    return False


def batch(op: str, name: str, x: Any, cu_seqlens: Tensor | None = None) -> None:
    """`x` is (B, T), or 1-D: one row, or packed rows with cu_seqlens. The first check of every op on tokens."""
    no_transforms(op, x)
    if not isinstance(x, Tensor):
        raise fail(op, name, "be a torch.Tensor", describe(x), "Convert it with torch.as_tensor.", TypeError)
    if x.dim() not in ((1,) if cu_seqlens is not None else (1, 2)):
        form = "(N,) with cu_seqlens" if cu_seqlens is not None else "(B, T) or (T,)"
        raise fail(op, name, f"be {form}", describe(x), "Reshape it to rows of tokens.")


def per_row(op: str, name: str, x: Tensor | None, rows: int, like: Tensor) -> Tensor | None:
    """One value a row as (B,); (B, 1) is taken too."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in _VALUES:
        raise fail(op, name, "be a floating-point tensor, one value a row", describe(x), "Convert it with torch.as_tensor.", TypeError)
    if tuple(x.shape) not in ((rows,), (rows, 1)):
        raise fail(op, name, f"have the shape ({rows},)", describe(x), "Give one value a row.")
    if x.device != like.device:
        raise fail(op, name, f"be on {like.device} like the first argument", describe(x), "Move it with .to(device).")
    return x.reshape(rows)


def rows_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return x.shape[0] if x.dim() == 2 else 1


def lengths(op: str, cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """cu_seqlens as contiguous int64: 0 = cu[0] <= cu[1] <= ... <= cu[S] = N. Its values are read on the CPU only."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
        raise fail(op, "cu_seqlens", "be a 1-D int32 or int64 tensor", describe(cu_seqlens), "Give row offsets, from 0 to N.", TypeError)
    if cu_seqlens.device != x.device or cu_seqlens.shape[0] < 1:
        raise fail(op, "cu_seqlens", f"hold at least one offset, on {x.device}", describe(cu_seqlens), "Start it with 0.")
    cu = cu_seqlens.to(torch.int64).contiguous()
    if cu.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu) is Tensor:
        if native is not None:
            good = native.offsets_fit(cu, x.shape[0])
        else:
            good = bool(cu[0] == 0) and bool(cu[-1] == x.shape[0]) and bool((cu[1:] >= cu[:-1]).all())
        if not good:
            raise fail(op, "cu_seqlens", f"run from 0 to {x.shape[0]} without falling", cu[:8].tolist(), "It is a cumulative sum.")
    return cu


def word(op: str, name: str, value: Any, words: Sequence[str | None]) -> None:
    if value not in words:
        raise fail(op, name, f"be one of {', '.join(map(repr, words))}", repr(value), "See the docstring for what each means.")


def number(op: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    """A Python number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(op, name, "be a number", describe(value), "Pass a Python int or float.", TypeError)
    if not (low < value if open_low else low <= value) or not value <= high:
        bound = f"be in {'(' if open_low else '['}{low}, {high}]"
        raise fail(op, name, bound, value, "Check the sign and the unit.")
    return float(value)


def detached(op: str, **tensors: Any) -> None:
    """The contract gives these no gradient: silence would be a wrong gradient."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise fail(op, name, "not require grad", "a tensor that does", f"The op does not differentiate it: pass {name}.detach().")


def inner(x: Tensor | None) -> Tensor | None:
    """Rows of stride 1 (or one value a row by stride 0); anything else is copied once."""
    if x is None or x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) in (0, 1):
        return x
    return x.contiguous()


def no_transforms(op: str, x: Tensor) -> None:
    """torch.func transforms and DTensor are not supported; say so instead of failing somewhere deep."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise fail(op, "the call", "not be inside a torch.func transform", "vmap, grad or jvp", "Use torch.autograd.", NotImplementedError)
    if type(x) is not Tensor and type(x).__name__ == "DTensor":
        raise fail(op, "the tensors", "be local", "a DTensor", "Pass x.to_local().", TypeError)


def out_tensors(op: str, out: Any, like: Tensor, dtypes: Sequence[torch.dtype], any_grad: bool) -> Any:
    """`out=`: a tensor (or a tuple of them) of the result's shape, dtype and device, rows of stride 1; no autograd."""
    flat = (out,) if isinstance(out, Tensor) else tuple(out)
    if any_grad:
        raise fail(op, "out", "not be given with inputs that require grad", "both", "Detach the inputs or leave out= away.")
    if len(flat) != len(dtypes):
        raise fail(op, "out", f"hold {len(dtypes)} tensors", len(flat), "One a result, in their order.")
    for x, dtype in zip(flat, dtypes, strict=True):
        good = isinstance(x, Tensor) and x.shape == like.shape and x.dtype == dtype and x.device == like.device
        if not good or (x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1):
            raise fail(
                op, "out", f"be {dtype} of shape {tuple(like.shape)} with inner stride 1", describe(x), "Use torch.empty_like(result)."
            )
    return flat[0] if isinstance(out, Tensor) else flat


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """torch's promotion over the floating-point arguments; integer and bool masks raise nothing."""
    dtype: torch.dtype | None = None
    for x in tensors:
        if x is not None and x.dtype is not dtype and x.dtype in _VALUES:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    return dtype or torch.float32


def valid_tokens(op: str, count: float, unbiased: bool) -> None:
    """What verl's masked_var refuses: a mask whose sum is 0, or 1 where the variance divides by sum - 1."""
    if count == 0:
        raise fail(op, "the mask", "select at least one value", "a mask whose sum is 0", "Skip the batch, or check the mask.")
    if unbiased and count == 1:
        raise fail(op, "the mask", "have a sum other than 1", "a mask whose sum is 1", "One value has no sample variance: unbiased=False.")


def pairs(op: str, alone: float) -> None:
    """What pass@k refuses: `alone` groups that hold one row."""
    if alone:
        raise fail(op, "index", "hold two rows or more of each label", f"{int(alone)} labels of one row", "Sample each prompt twice.")
