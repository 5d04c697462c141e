# SPDX-License-Identifier: Apache-2.0
"""The embedded batch, and the recorder fed with it."""

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlkern.data import FIELDS, RolloutBatch, capture, load_batch
from rlkern.data.batch import EMBEDDED

pytest.importorskip("safetensors", reason="files need the extra cli")


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    return load_batch()


def fields_of(batch: RolloutBatch) -> dict[str, Any]:
    return {**batch.tensors(), "uid": batch.uid, "meta": batch.meta}


def real(batch: RolloutBatch) -> torch.Tensor:
    """True up to each row's last token; the recomputed log-probabilities are 0 beyond it and never exactly there."""
    ends = (batch.old_log_prob != 0) | (batch.response_mask != 0)
    return ends.flip(1).cummax(1).values.flip(1)


def same(a: RolloutBatch, b: RolloutBatch) -> bool:
    left, right = a.tensors(), b.tensors()
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[name].detach(), right[name].detach()) for name in left)
        and a.uid.tolist() == b.uid.tolist()
        and a.meta == b.meta
    )


def test_embedded_shapes_and_labels(batch: RolloutBatch) -> None:
    rows, length = batch.shape
    assert EMBEDDED.stat().st_size <= 1_000_000
    assert rows == 240
    assert 64 < length <= 128
    assert set(FIELDS) - set(fields_of(batch)) == {"rollout_is_weights"}
    assert batch.response_mask.dtype == torch.bool
    assert set(Counter(batch.uid).values()) == {8}
    assert len(set(batch.uid)) == 30
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", u) for u in batch.uid)
    neighbours = np.mean([a == b for a, b in zip(batch.uid[1:], batch.uid[:-1], strict=True)])
    assert neighbours < 0.2, "rows of a group lie side by side"


def test_embedded_lengths_and_gaps(batch: RolloutBatch) -> None:
    mask, token = batch.response_mask, real(batch)
    lengths = token.sum(1).float()
    assert lengths.min() < 12
    assert lengths.max() == batch.shape[1]
    assert lengths.quantile(0.25) * 2 < lengths.quantile(0.75)
    assert mask[:, 0].all(), "the policy begins every response"
    after = mask.flip(1).cummax(1).values.flip(1)
    gaps = (~mask & after).any(1).float().mean()
    assert 0.2 < gaps < 1, "tool turns are in some rows, not in all"
    for name, tensor in batch.tensors().items():
        if tensor.dim() == 2:
            assert not tensor[~token].any(), f"{name} is not 0 on padding"


def test_embedded_rewards(batch: RolloutBatch) -> None:
    rewards, mask, token = batch.token_level_rewards, batch.response_mask, real(batch)
    last = token.sum(1, keepdim=True) - 1
    assert torch.equal(rewards.sum(1, keepdim=True), rewards.gather(1, last)), "the score sits on the last token alone"
    assert ((rewards != 0) & ~mask).any(1).sum() >= 10, "some scores sit on a token that a tool wrote"
    right = rewards.sum(1) >= 1
    assert 0.5 <= right.float().mean() <= 0.9
    shares = [right[torch.from_numpy(batch.uid == label)].float().mean().item() for label in set(batch.uid)]
    assert 0.0 in shares
    assert 1.0 in shares
    assert sum(0 < share < 1 for share in shares) >= 10
    assert len(set(rewards[rewards != 0].tolist())) > 2, "partial scores"


def test_embedded_log_probs(batch: RolloutBatch) -> None:
    given, mask = batch.tensors(), batch.response_mask
    for name in ("old_log_prob", "log_prob", "ref_log_prob", "rollout_log_prob"):
        assert given[name].isfinite().all(), name
        assert (given[name] <= 0).all(), name
    assert (given["entropy"] >= 0).all()
    assert given["entropy"][mask].mean() > 0.01
    ratio = (given["log_prob"] - batch.old_log_prob)[mask].exp()
    clipped = ((ratio - 1).abs() > 0.2).float().mean()
    assert 0.01 < clipped < 0.3
    drift = (given["rollout_log_prob"] - batch.old_log_prob)[mask].abs()
    assert 0 < drift.mean() < 0.02, "the sampler computes in bfloat16"
    assert (given["ref_log_prob"] - batch.old_log_prob)[mask].abs().mean() > 0.02
    score = batch.token_level_rewards.sum(1, keepdim=True).expand_as(mask)
    assert torch.corrcoef(torch.stack((given["values"][mask], score[mask])))[0, 1] > 0.2, "the critic has learnt"


def test_capture_writes_the_first_steps(tmp_path: Path, batch: RolloutBatch) -> None:
    with capture(tmp_path / "new" / "run", steps=3) as record:
        paths = [record(batch) for _ in range(5)]
    assert paths[3:] == [None, None]
    assert [path.name for path in paths if path] == [f"step-{i:05d}.safetensors" for i in range(3)]
    assert sorted(p for p in (tmp_path / "new" / "run").iterdir()) == paths[:3]
    assert all(same(load_batch(path), batch) for path in paths if path)
    assert record.written == 3


def test_capture_ends_with_its_block(tmp_path: Path, batch: RolloutBatch) -> None:
    with capture(tmp_path, steps=3) as record:
        record(batch)
    assert record(batch) is None
    assert record(anything="at all") is None
    assert len(list(tmp_path.iterdir())) == 1


def test_capture_takes_every_form(tmp_path: Path, batch: RolloutBatch) -> None:
    class TensorDict:
        """Has keys and items, and is no Mapping."""

        def keys(self) -> Any:
            return batch.tensors().keys()

        def __getitem__(self, name: str) -> torch.Tensor:
            return batch.tensors()[name]

    given = fields_of(batch)
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    record = capture(tmp_path, steps=9)
    for path in (
        record(batch),
        record(given),
        record(**given),
        record(given, rollout_is_weights=None),
        record(TensorDict(), uid=batch.uid, meta=batch.meta),  # type: ignore[arg-type]
        record(arrays),
        record(given | {"uid": batch.uid.tolist()}),
        record(given | {"uid": batch.uid.astype(str)}),
    ):
        assert path is not None
        assert same(load_batch(path), batch)


def test_capture_reads_only(tmp_path: Path, batch: RolloutBatch) -> None:
    given = fields_of(batch)
    frozen = given["values"].numpy().copy()
    frozen.flags.writeable = False
    shared = given["old_log_prob"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = capture(tmp_path / "array", steps=1)(given | {"values": frozen})
    assert path is not None
    assert same(load_batch(path), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, on wrapping read-only memory
        wrapped = torch.from_numpy(frozen)
    graph = given["log_prob"].clone().requires_grad_() * 1.0
    changes = {"values": wrapped, "log_prob": graph, "old_log_prob": shared, "rollout_log_prob": shared}
    path = capture(tmp_path / "tensor", steps=1)(given | changes)
    assert path is not None
    loaded = load_batch(path)
    assert loaded.log_prob is not None
    assert torch.equal(loaded.log_prob, batch.tensors()["log_prob"])
    assert not loaded.log_prob.requires_grad
    assert graph.requires_grad
    assert torch.equal(shared, batch.old_log_prob)


def test_capture_leaves_no_half_file(tmp_path: Path, batch: RolloutBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    record = capture(tmp_path, steps=2)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            record(batch)
    assert list(tmp_path.iterdir()) == []
    assert record.written == 0
    path = record(batch)
    assert path is not None
    assert path.name == "step-00000.safetensors"


def test_capture_overwrite(tmp_path: Path, batch: RolloutBatch) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / ".step-00007.safetensors.123.tmp").write_text("left by a killed run")
    record = capture(tmp_path, steps=2)
    record(batch), record(batch)
    with pytest.raises(ValueError, match=r"rlkern\.capture: path must hold no step files yet; got 2 .*overwrite=True"):
        capture(tmp_path, steps=1)
    assert len(list(tmp_path.glob("step-*"))) == 2
    record = capture(tmp_path, steps=1, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    record(batch)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "step-00000.safetensors"]


def test_capture_rejects(tmp_path: Path, batch: RolloutBatch) -> None:
    for steps, kind in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=r"rlkern\.capture: steps must .+; got .+\. .+"):
            capture(tmp_path, steps=steps)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"rlkern\.capture: path must name a folder; got .+\. .+"):
        capture(tmp_path / "file", steps=1)
    record = capture(tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=r"fields must be given once; got uid twice\. "):
        record(batch, uid=batch.uid)
    with pytest.raises(ValueError, match=r"fields must be among .+; got also advantages, old_log_probs\. "):
        record(batch, old_log_probs=batch.old_log_prob, advantages=batch.old_log_prob)
    with pytest.raises(TypeError, match=r"batch must be a RolloutBatch or a mapping; got Tensor\. "):
        record(batch.old_log_prob)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rlkern\.capture: token_level_rewards, .+ must be there; got only nothing\. "):
        record()
    assert record.written == 0
    assert list((tmp_path / "run").iterdir()) == []
