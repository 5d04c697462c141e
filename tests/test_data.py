# SPDX-License-Identifier: Apache-2.0
"""Rollout batches and their files."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlkern.data import FIELDS, RolloutBatch, capture, load_batch, save_batch
from rlkern.data.batch import EMBEDDED

pytest.importorskip("safetensors", reason="files need the extra cli")

FLOAT_FIELDS = [name for name in FIELDS if name not in ("response_mask", "uid", "reward_baselines", "meta")]
FORM = re.compile(r"rlkern\.[\w.]+: .+ must .+; got .+\. \S.*", re.DOTALL)


def fields_of(rows: int = 3, length: int = 5, **changes: Any) -> dict[str, Any]:
    """Keyword fields of a small batch with every field; a change to None drops one."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {name: torch.randn(rows, length, generator=generator) for name in FLOAT_FIELDS}
    made["response_mask"] = torch.rand(rows, length, generator=generator) > 0.3
    made["uid"] = np.array([f"prompt {i % 2}" for i in range(rows)], dtype=object)
    made["reward_baselines"] = torch.randn(rows, generator=generator)
    made["meta"] = {"note": "größer than \N{SNOWMAN}"}
    return {name: value for name, value in (made | changes).items() if value is not None}


def assert_same(a: RolloutBatch, b: RolloutBatch) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].detach().cpu(), right[name].detach().cpu()), name
    assert a.uid.tolist() == b.uid.tolist()
    assert a.uid.dtype == b.uid.dtype == object
    assert a.meta == b.meta


def write_raw(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata)
    return path


def raw_parts(**changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    given = fields_of(**changes)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    return tensors, {"uid": json.dumps(given["uid"].tolist()), "format_version": "1"}


@contextmanager
def refuses(kind: type[Exception], op: str, *words: str) -> Iterator[None]:
    """Expect an error in the house's form that names the op and every one of the words."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert FORM.fullmatch(text), text
    assert text.startswith(f"rlkern.{op}: "), text
    assert not [word for word in words if word not in text], text


def test_batch_shape_and_optional_fields() -> None:
    batch = RolloutBatch(**{name: fields_of()[name] for name in FIELDS[:4]})
    assert batch.shape == (3, 5)
    assert batch.log_prob is None
    assert batch.reward_baselines is None
    assert batch.meta == {}
    with pytest.raises(AttributeError):
        batch.values = torch.zeros(3, 5)  # type: ignore[misc]


def test_batch_to_copies_and_converts() -> None:
    batch = RolloutBatch(**fields_of())
    half = batch.to(dtype=torch.bfloat16, mask_dtype=torch.int64)
    assert half.response_mask.dtype == torch.int64
    assert {x.dtype for name, x in half.tensors().items() if name != "response_mask"} == {torch.bfloat16}
    same = batch.to()
    assert_same(batch, same)
    same.old_log_prob.zero_()
    same.uid[0] = "other"
    assert batch.old_log_prob.any()
    assert batch.uid[0] == "prompt 0"
    with refuses(TypeError, "RolloutBatch.to", "int64"):
        batch.to(dtype=torch.int64)
    with refuses(TypeError, "RolloutBatch.to", "complex64"):
        batch.to(mask_dtype=torch.complex64)


BAD_FIELDS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("missing", {"old_log_prob": None}, ValueError, ("old_log_prob", "be there")),
    ("uid missing", {"uid": None}, ValueError, ("uid", "be there")),
    ("rank 1", {"token_level_rewards": torch.zeros(3)}, ValueError, ("(B, T)", "(3,)")),
    ("other T", {"values": torch.zeros(3, 4)}, ValueError, ("values", "(3, 5)", "(3, 4)")),
    ("other B", {"response_mask": torch.ones(2, 5)}, ValueError, ("response_mask", "(2, 5)")),
    ("baselines (B, T)", {"reward_baselines": torch.zeros(3, 5)}, ValueError, ("reward_baselines", "(3,)")),
    ("integer log-probs", {"log_prob": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, ("log_prob", "int64")),
    ("complex mask", {"response_mask": torch.ones(3, 5, dtype=torch.complex64)}, TypeError, ("complex64",)),
    ("a list", {"entropy": [[0.0] * 5] * 3}, TypeError, ("entropy", "list")),
    ("sparse", {"entropy": torch.zeros(3, 5).to_sparse()}, TypeError, ("entropy", "sparse")),
    ("short uid", {"uid": np.array(["a", "b"], dtype=object)}, ValueError, ("uid", "(3,)", "(2,)")),
    ("integer label", {"uid": np.array(["a", 7, "b"], dtype=object)}, TypeError, ("uid[1]", "int 7")),
    ("meta of numbers", {"meta": {"step": 3}}, TypeError, ("meta", "3")),
]


@pytest.mark.parametrize(("changes", "kind", "words"), [c[1:] for c in BAD_FIELDS], ids=[c[0] for c in BAD_FIELDS])
def test_batch_rejects(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    """The constructor and the recorder refuse the same things, each under its own name."""
    given = fields_of(**changes)
    if "be there" not in words:
        with refuses(kind, "RolloutBatch", *words):
            RolloutBatch(**given)
    with refuses(kind, "capture", *words):
        capture(tmp_path, steps=1)(**given)
    assert list(tmp_path.iterdir()) == []


def test_batch_rejects_other_uid_kinds() -> None:
    for uid, word in ((np.array(["a", "b", "c"]), "<U1"), (["a", "b", "c"], "list"), (torch.arange(3), "Tensor")):
        with refuses(TypeError, "RolloutBatch", "uid", word):
            RolloutBatch(**fields_of(uid=uid))
    nested = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    with refuses(TypeError, "RolloutBatch", "values", "nested"):
        RolloutBatch(**fields_of(values=nested))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_round_trip(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mask_dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        batch = RolloutBatch(**fields_of(*shape)).to(dtype=dtype, mask_dtype=mask_dtype)
        save_batch(tmp_path / "batch.safetensors", batch)
        assert_same(load_batch(str(tmp_path / "batch.safetensors")), batch)
    assert [file.name for file in tmp_path.iterdir()] == ["batch.safetensors"]


def test_round_trip_of_nan_and_strides(tmp_path: Path) -> None:
    wide = torch.randn(5, 6)
    wide[2, 1] = float("nan")
    same = torch.zeros(3, 5)
    changes: dict[str, Any] = {
        "values": wide.t()[:3],
        "entropy": torch.zeros(3, 1).expand(3, 5),
        "log_prob": same,
        "old_log_prob": same,
    }
    batch = RolloutBatch(**fields_of(**changes))
    save_batch(tmp_path / "batch", batch)
    loaded = load_batch(tmp_path / "batch")
    assert loaded.values is not None
    assert loaded.values.is_contiguous()
    torch.testing.assert_close(loaded.values, wide.t()[:3], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.old_log_prob, same)


def test_file_is_safetensors_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a batch file reached pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    save_batch(tmp_path / "batch", RolloutBatch(**fields_of()))
    load_batch(tmp_path / "batch")
    for path in (tmp_path / "batch", EMBEDDED):
        blob = path.read_bytes()
        (size,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + size])
        assert isinstance(json.loads(header["__metadata__"]["uid"]), list)
        assert json.loads(header["__metadata__"]["format_version"]) == 1
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        assert max(ends) == len(blob) - 8 - size


def test_file_may_be_read_by_those_who_may_read_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_batch(tmp_path / "batch", RolloutBatch(**fields_of()))
    assert (tmp_path / "batch").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loaded_batch_outlives_its_file(tmp_path: Path) -> None:
    batch = RolloutBatch(**fields_of())
    save_batch(tmp_path / "batch", batch)
    loaded = load_batch(tmp_path / "batch")
    (tmp_path / "batch").write_bytes(b"")
    assert_same(loaded, batch)


def test_load_rejects_files(tmp_path: Path) -> None:
    with refuses(FileNotFoundError, "load_batch", "absent"):
        load_batch(tmp_path / "absent")
    with refuses(FileNotFoundError, "load_batch", "a folder"):
        load_batch(tmp_path)
    save_batch(tmp_path / "whole", RolloutBatch(**fields_of()))
    blob = (tmp_path / "whole").read_bytes()
    bad = {"empty": b"", "text": b"not tensors at all, only text", "pickle": pickle.dumps({"values": 1})}
    bad |= {f"cut at {size}": blob[:size] for size in (4, 8, 100, len(blob) // 2, len(blob) - 1)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with refuses(ValueError, "load_batch", "whole safetensors file", f"{len(content)} bytes"):
            load_batch(tmp_path / name)


BAD_METADATA: list[tuple[dict[str, str | None], type[Exception], tuple[str, ...]]] = [
    ({"format_version": "2"}, ValueError, ("format_version", "got 2")),
    ({"format_version": None}, ValueError, ("format_version", "got none")),
    ({"uid": None}, ValueError, ("uid must be there",)),
    ({"uid": "prompt 0, prompt 1"}, ValueError, ("metadata uid", "JSON list")),
    ({"uid": '{"a": 1}'}, ValueError, ("metadata uid", "JSON list")),
    ({"uid": '["a", "b"]'}, ValueError, ("uid", "(3,)", "(2,)")),
    ({"uid": '["a", 7, "b"]'}, TypeError, ("uid[1]", "int 7")),
    ({"uid": '["a", ["b"], "c"]'}, TypeError, ("uid[1]", "list")),
    ({"meta": "[]"}, ValueError, ("metadata meta", "JSON dict")),
    ({"meta": '{"a": 1}'}, TypeError, ("meta", "str to str")),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD_METADATA)
def test_load_rejects_metadata(tmp_path: Path, changes: dict[str, str | None], kind: type[Exception], words: tuple[str, ...]) -> None:
    tensors, metadata = raw_parts()
    kept = {name: value for name, value in (metadata | changes).items() if value is not None}
    with refuses(kind, "load_batch", *words):
        load_batch(write_raw(tmp_path / "batch", tensors, kept))


def test_load_rejects_tensors(tmp_path: Path) -> None:
    tensors, metadata = raw_parts()
    changes: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
        ({"old_log_prob": None}, ValueError, ("old_log_prob must be there",)),
        ({"advantages": torch.zeros(3, 5), "uid": torch.zeros(3)}, ValueError, ("also advantages, uid",)),
        ({"token_level_rewards": torch.zeros(15)}, ValueError, ("(B, T)", "(15,)")),
        ({"values": torch.zeros(5, 3)}, ValueError, ("values", "(5, 3)")),
        ({"ref_log_prob": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, ("ref_log_prob", "int32")),
        ({"entropy": torch.zeros(3, 5).to(torch.float8_e4m3fn)}, TypeError, ("entropy", "float8_e4m3fn")),
    ]
    for change, kind, words in changes:
        kept = {name: value for name, value in (tensors | change).items() if value is not None}
        with refuses(kind, "load_batch", *words):
            load_batch(write_raw(tmp_path / "batch", kept, metadata))
    with refuses(ValueError, "load_batch", "format_version"):
        load_batch(write_raw(tmp_path / "batch", tensors, None))


def test_save_rejects(tmp_path: Path) -> None:
    with refuses(TypeError, "save_batch", "dict"):
        save_batch(tmp_path / "batch", fields_of())  # type: ignore[arg-type]
    with refuses(FileNotFoundError, "save_batch", "no_such"):
        save_batch(tmp_path / "no_such" / "batch", RolloutBatch(**fields_of()))


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for op, call in (
        ("load_batch", load_batch),
        ("save_batch", lambda: save_batch(tmp_path / "batch", RolloutBatch(**fields_of()))),
        ("capture", lambda: capture(tmp_path, steps=1)),
    ):
        with refuses(ImportError, op, "pip install rlkern[cli]"):
            call()


def test_import_needs_no_safetensors() -> None:
    code = "import sys; sys.modules['safetensors'] = None; import rlkern.data"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
