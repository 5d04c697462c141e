# SPDX-License-Identifier: Apache-2.0
"""Labels as dense group ids: one hash pass, in C++ (csrc/labels.cpp) or by a dict. Not an op: it runs outside graphs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern import backends, check
from rlkern.types import GroupIndex

_READ_NATIVELY = frozenset("OUS?bBhHiIlLqQfd")  # NumPy's type characters that csrc/labels.cpp reads


def _refuse(must: str, got: Any, way_out: str, kind: type[Exception] = ValueError) -> Exception:
    return check.fail("group_index", "labels", must, got, way_out, kind)


def readable(labels: Any) -> Any:
    """Labels as a list, a tuple or a 1-D array that the native module reads; tensors come to the host."""
    if isinstance(labels, Tensor):
        host = labels.detach().cpu()
        labels = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    elif not isinstance(labels, np.ndarray) and type(labels) not in (list, tuple):
        if isinstance(labels, Sequence) and not isinstance(labels, str | bytes):
            labels = list(labels)
        elif hasattr(labels, "__array__"):
            labels = np.asarray(labels)
        else:
            raise _refuse("be a 1-D array, tensor, list or tuple", check.describe(labels), "Give one label a row.", TypeError)
    if isinstance(labels, np.ndarray):
        if labels.ndim != 1:
            raise _refuse("be 1-D", f"an array of shape {labels.shape}", "Give one label a row.")
        dtype = labels.dtype
        if dtype.char not in _READ_NATIVELY or not dtype.isnative:  # dates, records, float16: Python values
            labels = labels.tolist()
    return labels


def _by_dict(labels: Any) -> GroupIndex:
    """Without the native module: a dict, which numbers by first appearance too. The messages are those of csrc/labels.cpp."""
    numbers: dict[Hashable, int] = {}
    try:
        ids = torch.tensor([numbers.setdefault(x, len(numbers)) for x in labels], dtype=torch.int64)
    except TypeError as error:
        raise _refuse("be hashable", str(error), "Use strings or numbers.", TypeError) from error
    if any(hasattr(x, "data_ptr") for x in numbers):
        raise _refuse("hold values", "tensors inside a list or object array", "Stack them into one 1-D tensor.", TypeError)
    if any(x != x for x in numbers):
        raise _refuse("hold no NaN", "a label that is not equal to itself", "Name the group of rows that have none.")
    counts = torch.bincount(ids, minlength=len(numbers))
    offsets = torch.zeros(len(numbers) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return GroupIndex(ids, counts, torch.argsort(ids, stable=True), offsets)


def _by_hash(labels: Any) -> GroupIndex:
    native: Any = backends.native
    n = len(labels)
    memory = torch.empty(4 * n + 1, dtype=torch.int64)
    groups = native.group_labels(labels, n, memory.data_ptr())
    ids, order, counts, offsets, _ = memory.split_with_sizes([n, n, groups, groups + 1, 2 * (n - groups)])
    return GroupIndex(ids, counts, order, offsets)


def group_index(labels: Any) -> GroupIndex:
    r"""Labels as dense group ids, made once and taken by every group op.

    ids_b = the number of distinct labels that appeared before the first row labelled like row b.

    Args:
        labels: (B,), one label a row, in any order: a NumPy array (objects such as uuid strings, str, int, float, bool), a
            list or tuple of hashables, or a torch tensor on any device (copied to the host). Labels that Python holds equal
            are one group (1, 1.0 and True; 0.0 and -0.0); "7" and 7 are two. Nothing is rounded or converted.

    Returns:
        GroupIndex(ids, counts, order, offsets), int64, on the device of a tensor, else on the CPU. A GroupIndex comes back
        as it is.

    Gradient:
        None: labels have none. Not an op: it runs outside compiled graphs.

    Numerics:
        Exact. One hash pass and a counting sort, on the calling thread.

    Raises:
        TypeError: labels that are not a sequence, or not hashable. ValueError: labels that are not 1-D, or NaN.

    Example:
        >>> index = rlkern.group_index(["b", "a", "b"])
        >>> index.ids.tolist(), index.counts.tolist(), index.order.tolist(), index.offsets.tolist()
        ([0, 1, 0], [2, 1], [0, 2, 1], [0, 2, 3])

    Source:
        verl as_torch_index, whose ids it equals up to their numbering; verl truncates float labels and allocates one group
        for each number below the largest id.
    """
    if isinstance(labels, GroupIndex):
        return labels
    if torch.compiler.is_compiling():
        raise _refuse("be grouped outside torch.compile", "a call inside a graph", "Pass a GroupIndex in.", RuntimeError)
    items = readable(labels)
    if backends.native is None or backends.current_backend() == "torch":
        index = _by_dict(items.tolist() if isinstance(items, np.ndarray) else items)
    else:
        index = _by_hash(items)
    return index.to(labels.device) if isinstance(labels, Tensor) and labels.device.type != "cpu" else index
