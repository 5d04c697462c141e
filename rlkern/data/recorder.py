# SPDX-License-Identifier: Apache-2.0
"""The recorder: the first batches of a training run, one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from rlkern.data.batch import (
    FIELDS,
    RolloutBatch,
    check_fields,
    complaint,
    label_array,
    need_safetensors,
    refuse_unknown,
    save_batch,
)

STEP_FILE = re.compile(r"step-\d{5,}\.safetensors")
LEFTOVER = re.compile(r"\.step-\d{5,}\.safetensors\.\d+\.tmp")


class Capture:
    """A recorder, made by ``capture``; leaving its ``with`` block ends the recording."""

    def __init__(self, path: str | Path, *, steps: int, overwrite: bool = False) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(complaint("capture", "steps", "be an int", type(steps).__name__, "Say how many batches."))
        if steps < 1:
            raise ValueError(complaint("capture", "steps", "be at least 1", str(steps), "Say how many batches."))
        # Asked now and not at the first batch, which may come hours after the start.
        need_safetensors("capture")
        self.path, self.steps, self.written = Path(path), steps, 0
        if self.path.exists() and not self.path.is_dir():
            got = f"{str(self.path)!r}, a file"
            raise ValueError(complaint("capture", "path", "name a folder", got, "Choose another name."))
        self.path.mkdir(parents=True, exist_ok=True)
        files = [file for file in sorted(self.path.iterdir()) if STEP_FILE.fullmatch(file.name)]
        if files and not overwrite:
            got, way_out = f"{len(files)} in {str(self.path)!r}", "Choose another folder, or pass overwrite=True."
            raise ValueError(complaint("capture", "path", "hold no step files yet", got, way_out))
        if overwrite:
            for file in [*files, *(file for file in self.path.iterdir() if LEFTOVER.fullmatch(file.name))]:
                file.unlink()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.steps = self.written

    def __call__(self, batch: RolloutBatch | Mapping[str, Any] | None = None, /, **more: Any) -> Path | None:
        """Write one batch; its path, or None once ``steps`` batches are written."""
        if self.written >= self.steps:
            return None
        given = _gather(batch, more)
        check_fields("capture", given)
        file = self.path / f"step-{self.written:05d}.safetensors"
        save_batch(file, RolloutBatch(**given))
        self.written += 1
        return file


def capture(path: str | Path, *, steps: int, overwrite: bool = False) -> Capture:
    """Record the first batches of a training run, to be read by ``load_batch``.

    The recorder is called once per training step with a RolloutBatch, with a mapping of its fields, with fields as
    keywords, or with a mapping and keywords together. Tensors may be on any device, strided, read-only or part of a
    graph; they are copied, never written. numpy arrays serve as well, and any list of str as ``uid``. A process of its
    own needs a folder of its own.

    Args:
        path: the folder, made if need be; the files are ``step-00000.safetensors`` and so on.
        steps: how many batches to write; later calls return None at once.
        overwrite: delete the step files that ``path`` holds already.

    Returns:
        The recorder; a call writes one file whole or not at all and returns its path.

    Raises:
        ValueError: ``steps`` is below 1, ``path`` is a file or holds step files; or, from a call, a field is missing,
            given twice, unknown or of the wrong shape.
        TypeError: ``steps`` is no int; or, from a call, a field's dtype or a label's kind is wrong.
        ImportError: safetensors is not installed.

    >>> import tempfile
    >>> from rlkern.data import load_batch
    >>> with capture(tempfile.mkdtemp(), steps=1) as record:
    ...     record(load_batch()).name, record(load_batch())
    ('step-00000.safetensors', None)
    """
    return Capture(path, steps=steps, overwrite=overwrite)


def _gather(batch: RolloutBatch | Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The fields from both places, None left out, in the kinds that a RolloutBatch holds."""
    given: dict[str, Any] = {}
    if isinstance(batch, RolloutBatch):
        given = {**batch.tensors(), "uid": batch.uid, "meta": batch.meta}
    elif batch is not None:
        # By its methods: a TensorDict need not be a Mapping.
        if not hasattr(batch, "keys"):
            got, way_out = type(batch).__name__, "Pass fields by name."
            raise TypeError(complaint("capture", "batch", "be a RolloutBatch or a mapping", got, way_out))
        given = {str(name): batch[name] for name in batch.keys()}  # noqa: SIM118
    twice = sorted(set(given) & set(more))
    if twice:
        got = f"{', '.join(twice)} twice"
        raise ValueError(complaint("capture", "fields", "be given once", got, "Drop one of the two."))
    given.update(more)
    refuse_unknown("capture", given, FIELDS)
    return {name: _adapt(name, value) for name, value in given.items() if value is not None}


def _adapt(name: str, value: Any) -> Any:
    if name == "uid":
        if isinstance(value, np.ndarray) and value.ndim == 1:
            return label_array(value.tolist())
        return label_array(value) if isinstance(value, (list, tuple)) else value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # A copy, since torch warns of memory that it may not write.
        return torch.from_numpy(np.array(value))
    return value
