# SPDX-License-Identifier: Apache-2.0
"""The rollout batch and its file: one safetensors file, never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

Uid = np.ndarray[Any, np.dtype[np.object_]]

FORMAT_VERSION = 1
EMBEDDED = Path(__file__).with_name("rollouts.safetensors")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
REQUIRED = ("token_level_rewards", "response_mask", "uid", "old_log_prob")


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """What an RLHF trainer holds between rollout and optimizer step, under verl's names.

    Args:
        token_level_rewards: (B, T) float; the outcome's score usually sits on a row's last token, which a tool may have
            written (mask 0); 0 on padding.
        response_mask: (B, T) bool, integer or float; nonzero where the policy chose the token, 0 on padding and on
            tokens which a tool or the environment wrote.
        uid: (B,) numpy object array of str; rows of one prompt share a label and need not lie side by side.
        old_log_prob: (B, T) float, in nats; the policy that sampled, recomputed by the trainer. Here and in the fields
            below a masked token may hold any number, and padding usually holds 0.
        log_prob: (B, T) float; the policy being trained.
        ref_log_prob: (B, T) float; the frozen reference policy.
        rollout_log_prob: (B, T) float; what the sampler itself reported.
        values: (B, T) float; the critic's estimate before each token.
        entropy: (B, T) float, in nats; of the policy being trained.
        rollout_is_weights: (B, T) float; importance weights from the sampler to the trainer.
        reward_baselines: (B,) float; the score of each row's greedy response.
        meta: free strings, kept with the file.

    Raises:
        ValueError: a shape does not fit, or ``uid`` has not B labels.
        TypeError: a field is not a dense tensor of an allowed dtype, or a label is not a str.

    >>> batch = RolloutBatch(torch.zeros(2, 3), torch.ones(2, 3), np.array(["a", "a"], object), torch.zeros(2, 3))
    >>> batch.shape, batch.to(mask_dtype=torch.bool).response_mask.dtype
    ((2, 3), torch.bool)
    """

    token_level_rewards: torch.Tensor
    response_mask: torch.Tensor
    uid: Uid
    old_log_prob: torch.Tensor
    log_prob: torch.Tensor | None = None
    ref_log_prob: torch.Tensor | None = None
    rollout_log_prob: torch.Tensor | None = None
    values: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    rollout_is_weights: torch.Tensor | None = None
    reward_baselines: torch.Tensor | None = None
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields("RolloutBatch", {name: getattr(self, name) for name in FIELDS})

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T): rows and the length they are padded to."""
        return self.token_level_rewards.shape[0], self.token_level_rewards.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor fields that are there, by name, not copied."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype | None = None, mask_dtype: torch.dtype | None = None) -> RolloutBatch:
        """A copy that shares no memory, with the floats in ``dtype`` and the mask in ``mask_dtype``; None keeps them.

        Raises:
            TypeError: ``dtype`` is not a float type, or ``mask_dtype`` is not one that a mask may have.
        """
        for name, asked, allowed in (("dtype", dtype, FLOATS), ("mask_dtype", mask_dtype, MASKS)):
            if asked is not None and asked not in allowed:
                what = f"be None or one of {_names(allowed)}"
                raise TypeError(complaint("RolloutBatch.to", name, what, str(asked), "Pick one of them."))
        copied: dict[str, Any] = {"uid": self.uid.copy(), "meta": dict(self.meta)}
        for name, tensor in self.tensors().items():
            new = mask_dtype if name == "response_mask" else dtype
            copied[name] = tensor.to(new or tensor.dtype, copy=True)
        return RolloutBatch(**copied)


FIELDS = tuple(f.name for f in fields(RolloutBatch))
TENSORS = tuple(name for name in FIELDS if name not in ("uid", "meta"))


def load_batch(path: str | Path | None = None) -> RolloutBatch:
    """Read a batch from a safetensors file, or the small one that rlkern carries.

    Args:
        path: the file; None for the embedded batch: 30 prompts with 8 responses each, sampled from a tiny transformer
            on reasoning-gym tasks with tool calls (``examples/make_rollouts.py`` makes it).

    Returns:
        A checked RolloutBatch on the CPU, in memory of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another format, or a field is missing, unknown or of the wrong shape.
        TypeError: a field's dtype or a label's kind is wrong.
        ImportError: safetensors is not installed.

    >>> batch = load_batch()
    >>> batch.shape[0], len(set(batch.uid))
    (240, 30)
    """
    op, path = "load_batch", EMBEDDED if path is None else Path(path)
    need_safetensors(op)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        got = f"{str(path)!r}, {'a folder' if path.is_dir() else 'which does not exist'}"
        raise FileNotFoundError(complaint(op, "path", "name a file", got, "Check the spelling."))
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            version = metadata.get("format_version", "none")
            if version != json.dumps(FORMAT_VERSION):
                way_out = "Upgrade rlkern, or write the file again with rlkern.save_batch."
                raise ValueError(complaint(op, "format_version", f"be {FORMAT_VERSION}", version, way_out))
            refuse_unknown(op, file.keys(), TENSORS)
            # Copied out of the memory map: a batch must outlive a file that is replaced or cut short.
            found: dict[str, Any] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        got = f"{path.name} of {path.stat().st_size} bytes ({error})"
        way_out = "It is cut short or of another kind: copy or record it again."
        raise ValueError(complaint(op, "path", "name a whole safetensors file", got, way_out)) from error
    found["meta"] = _parsed(op, metadata, "meta", dict) if "meta" in metadata else {}
    if "uid" in metadata:
        found["uid"] = label_array(_parsed(op, metadata, "uid", list))
    check_fields(op, found)
    return RolloutBatch(**found)


def save_batch(path: str | Path, batch: RolloutBatch) -> None:
    """Write a batch as one safetensors file; a killed process leaves the whole file or none.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        batch: any device, dtype and stride; never written.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: ``batch`` is not a RolloutBatch.
        ImportError: safetensors is not installed.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "batch.safetensors"
    >>> save_batch(file, load_batch())
    >>> load_batch(file).shape
    (240, 128)
    """
    op, path = "save_batch", Path(path)
    if not isinstance(batch, RolloutBatch):
        way_out = "Build one with rlkern.data.RolloutBatch(...)."
        raise TypeError(complaint(op, "batch", "be a RolloutBatch", type(batch).__name__, way_out))
    need_safetensors(op)
    from safetensors.torch import save_file

    if not path.parent.is_dir():
        what, way_out = "lie in a folder that exists", "Create the folder first."
        raise FileNotFoundError(complaint(op, "path", what, repr(str(path)), way_out))
    # One copy each: the format wants contiguous CPU memory and refuses two names for one tensor, which verl's bypass
    # mode has.
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in batch.tensors().items()}
    metadata = {"uid": json.dumps(batch.uid.tolist()), "meta": json.dumps(batch.meta)}
    metadata["format_version"] = json.dumps(FORMAT_VERSION)
    temporary = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.tmp")
    try:
        # safetensors makes files that only their owner may read; others read a run's records too.
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(tensors, str(temporary), metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def complaint(op: str, what: str, must: str, got: str, way_out: str) -> str:
    """The house's form of an error."""
    return f"rlkern.{op}: {what} must {must}; got {got}. {way_out}"


def need_safetensors(op: str) -> None:
    """Raise an ImportError that says how to install the optional package that files need."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        way_out = "Run: pip install rlkern[cli]"
        raise ImportError(complaint(op, "safetensors", "be installed", f"{error}", way_out)) from error


def refuse_unknown(op: str, names: Iterable[str], allowed: tuple[str, ...]) -> None:
    """Raise if any name is not a field: a field dropped in silence would be missed much later."""
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        got = f"also {', '.join(unknown)}"
        raise ValueError(complaint(op, "fields", f"be among {', '.join(allowed)}", got, "Rename them or leave them out."))


def label_array(labels: Iterable[Any]) -> Uid:
    """Labels as the (B,) object array that a RolloutBatch holds, whatever they are."""
    return np.fromiter(labels, dtype=object)


def check_fields(op: str, found: Mapping[str, Any]) -> None:
    """Raise if fields that are there (None counts as absent) do not make a batch together."""
    missing = [name for name in REQUIRED if found.get(name) is None]
    if missing:
        there = ", ".join(name for name in FIELDS if found.get(name) is not None)
        got = f"only {there or 'nothing'}"
        raise ValueError(complaint(op, ", ".join(missing), "be there", got, "Add what is missing."))
    shape: tuple[int, ...] | None = None
    for name in (name for name in TENSORS if found.get(name) is not None):
        tensor, allowed = found[name], MASKS if name == "response_mask" else FLOATS
        if not isinstance(tensor, torch.Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
            got = type(tensor).__name__ if not isinstance(tensor, torch.Tensor) else "a nested or sparse tensor"
            way_out = "Convert it: torch.from_numpy, .to_padded_tensor(0) or .to_dense()."
            raise TypeError(complaint(op, name, "be a dense torch.Tensor", got, way_out))
        if tensor.dtype not in allowed:
            way_out = f"Convert it with .to({allowed[-2]})."
            raise TypeError(complaint(op, name, f"be one of {_names(allowed)}", str(tensor.dtype), way_out))
        if shape is None:
            shape = tuple(tensor.shape)
            if len(shape) != 2:
                way_out = "Pad the responses to one length and stack them."
                raise ValueError(complaint(op, name, "have the shape (B, T)", str(shape), way_out))
        wanted = shape[:1] if name == "reward_baselines" else shape
        if tuple(tensor.shape) != wanted:
            way_out = "Every field has the shape of token_level_rewards, reward_baselines its rows."
            raise ValueError(complaint(op, name, f"have the shape {wanted}", str(tuple(tensor.shape)), way_out))
    _check_labels(op, found["uid"], shape[0] if shape else 0)
    meta = found.get("meta", {})
    if not isinstance(meta, dict) or not all(isinstance(x, str) for pair in meta.items() for x in pair):
        raise TypeError(complaint(op, "meta", "be a dict of str to str", repr(meta)[:80], "Convert with str()."))


def _check_labels(op: str, uid: Any, rows: int) -> None:
    if not isinstance(uid, np.ndarray) or uid.dtype != object:
        got = f"an array of {uid.dtype}" if isinstance(uid, np.ndarray) else type(uid).__name__
        way_out = "Use np.array(labels, dtype=object)."
        raise TypeError(complaint(op, "uid", "be a numpy object array of str", got, way_out))
    if uid.shape != (rows,):
        way_out = "Give one label per row."
        raise ValueError(complaint(op, "uid", f"have the shape {(rows,)}", str(uid.shape), way_out))
    for i, label in enumerate(uid):
        if not isinstance(label, str):
            got = f"{type(label).__name__} {label!r}"[:80]
            raise TypeError(complaint(op, f"uid[{i}]", "be a str", got, "Convert every label with str()."))


def _parsed(op: str, metadata: Mapping[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[name])
    except ValueError:
        value = None
    if not isinstance(value, kind):
        got, way_out = repr(metadata[name])[:80], "Write the file again with rlkern.save_batch."
        raise ValueError(complaint(op, f"metadata {name}", f"be a JSON {kind.__name__}", got, way_out))
    return value


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
