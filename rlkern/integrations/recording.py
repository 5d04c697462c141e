# SPDX-License-Identifier: Apache-2.0
"""The first batches of a real run, written where `rlkern verify --batch` and `rlkern bench --batch` read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern import data
from rlkern.integrations import hooks
from rlkern.integrations.site import Site, logger

# verl's names for our fields, in the batch that compute_advantage is given.
_VERL = {
    "token_level_rewards": "token_level_rewards", "response_mask": "response_mask", "old_log_prob": "old_log_probs",
    "ref_log_prob": "ref_log_prob", "rollout_log_prob": "rollout_log_probs", "values": "values",
    "rollout_is_weights": "rollout_is_weights", "reward_baselines": "reward_baselines",
}  # fmt: skip
_OPENRLHF = {
    "old_log_prob": "action_log_probs",
    "ref_log_prob": "base_action_log_probs",
    "rollout_log_prob": "rollout_log_probs",
    "values": "values",
}


@dataclass
class Tap(Site):
    """A function that is only listened to."""

    observe: Callable[..., None] = print

    def choose(self, original: Callable[..., Any]) -> bool:
        self.why_left = ""
        return True

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.original(*args, **kwargs)
        try:
            self.observe(found, *args, **kwargs)
        except Exception as problem:  # a recording must not stop a run
            self.say(f"{self.target}: batch not written: {type(problem).__name__}: {problem}")
        return found


# ---- what a framework holds -------------------------------------------------------------------------------------------
def _labels(labels: Any) -> Any:
    return np.array([str(x) for x in labels], dtype=object)


def of_verl(found: Any, batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Of a DataProto."""
    fields = {ours: batch.batch[theirs] for ours, theirs in _VERL.items() if theirs in batch.batch.keys()}  # noqa: SIM118
    fields.setdefault("old_log_prob", fields.get("rollout_log_prob"))
    uid = batch.non_tensor_batch.get("uid")
    fields["uid"] = _labels(range(len(fields["response_mask"])) if uid is None else uid)
    fields["meta"] = {"framework": "verl", "estimator": str(args[0] if args else kwargs.get("adv_estimator"))}
    return fields


def of_openrlhf(found: Any, maker: Any, experiences: list[Any]) -> dict[str, Any]:
    """Of experiences, padded to one width: a reward sits on the row's last valid token."""
    masks = [e.action_mask for e in experiences]
    width = max(m.shape[1] for m in masks)

    def wide(rows: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(x.detach().cpu(), (0, width - x.shape[1])) for x in rows])

    mask = wide([m.long() for m in masks])
    last = width - 1 - mask.fliplr().argmax(1, keepdim=True)
    rewards = torch.cat([e.rewards.detach().cpu().float() for e in experiences])
    fields: dict[str, Any] = {"response_mask": mask, "token_level_rewards": torch.zeros(mask.shape).scatter_(1, last, rewards[:, None])}
    for ours, theirs in _OPENRLHF.items():
        rows = [getattr(e, theirs) for e in experiences]
        if all(x is not None for x in rows):
            fields[ours] = wide(rows)
    each = maker.strategy.args.rollout.n_samples_per_prompt
    fields["uid"] = _labels(i // each for e in experiences for i in e.index)
    fields["meta"] = {"framework": "openrlhf", "estimator": str(maker.strategy.args.algo.advantage.estimator)}
    return fields


_TARGETS: dict[str, tuple[str, str, Callable[..., dict[str, Any]]]] = {
    "verl": ("verl.trainer.ppo.ray_trainer", "compute_advantage", of_verl),
    "openrlhf": (
        "openrlhf.trainer.ppo_utils.experience_maker",
        "RemoteExperienceMaker.compute_advantages_and_returns",
        of_openrlhf,
    ),
}


class Recording:
    """What `capture` gives: how many batches are written, and an end."""

    def __init__(self, framework: str, path: str | Path, steps: int, overwrite: bool) -> None:
        self.path, self.steps, self.overwrite = Path(path), steps, overwrite
        self._record: data.Capture | None = None
        module, name, self._fields = _TARGETS[framework]
        self._key = f"capture {framework}"
        hooks.patch(self._key, lambda: [Tap(module, name, [], lambda _: [], "", observe=self._write)])

    @property
    def written(self) -> int:
        return 0 if self._record is None else self._record.written

    def _write(self, found: Any, *args: Any, **kwargs: Any) -> None:
        if self.written >= self.steps:
            return
        if self._record is None:  # in the process that has the batch, and in no other
            self._record = data.capture(self.path, steps=self.steps, overwrite=self.overwrite)
        file = self._record(self._fields(found, *args, **kwargs))
        logger.warning("rlkern: wrote %s", file)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The framework's function is its own again."""
        hooks.unpatch(self._key)


def capture(path: str | Path, *, steps: int, framework: str = "verl", overwrite: bool = False) -> Recording:
    """Write the first `steps` batches of the run that this process is, or becomes, a part of.

    Args:
        path: the folder; files are step-00000.safetensors and so on.
        steps: how many batches.
        framework: "verl" (where advantages are computed) or "openrlhf".
        overwrite: delete the step files that `path` holds already.

    Returns:
        Recording, with `written` and `stop()`; leaving its `with` block stops it.

    Raises:
        ValueError: another framework, steps below 1, or a recording that goes on already.

    Example:
        >>> from rlkern import integrations
        >>> recording = integrations.capture("/tmp/rollouts", steps=4)
        >>> recording.written
        0
        >>> recording.stop()
    """
    if framework not in _TARGETS:
        raise ValueError(f"rlkern.integrations.capture: framework must be one of {', '.join(_TARGETS)}; got {framework!r}. Name one.")
    if steps < 1:
        raise ValueError(f"rlkern.integrations.capture: steps must be at least 1; got {steps}. Say how many batches.")
    if f"capture {framework}" in hooks.sites():
        raise ValueError(f"rlkern.integrations.capture: framework must not be recorded already; got {framework!r}. Stop that recording.")
    return Recording(framework, path, steps, overwrite)
