# SPDX-License-Identifier: Apache-2.0
"""group_index. The oracle: a dict, which numbers labels by their first appearance too."""

import datetime
import random
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkern
from rlkern import backends

# Names of the nine that group_index does not have, and why.
NOT_HERE = {
    "grad_matches_reference": "labels have no gradient",
    "gradcheck": "labels have no gradient",
    "ignores_masked": "every label is read",
    "registers": "not an op: it runs outside graphs, and what it gives goes in (test_group.py)",
}
# (labels, why)
LABELS = [
    ([], "no rows"),
    (["a"], "one row"),
    (["a"] * 9, "one giant group"),
    (list("abcdefg"), "singletons only"),
    (list("abacbdaab"), "ragged, interleaved, one singleton"),
    ([i % 7 for i in range(300)], "more rows than the table starts with"),
    (list(range(500)), "more groups than the table starts with"),
]


def by_dict(labels):
    """The specification: ids by first appearance."""
    numbers = {}
    ids = [numbers.setdefault(x, len(numbers)) for x in labels]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    counts = [ids.count(g) for g in range(len(numbers))] if len(ids) < 1000 else np.bincount(ids).tolist()
    return ids, counts, order, [0, *np.cumsum(counts).tolist()]


def lists(index):
    assert all(x.dtype == torch.int64 for x in index)
    return tuple(x.tolist() for x in index)


def test_group_index_known_values(backend):
    assert lists(rlkern.group_index(["b", "a", "b"])) == ([0, 1, 0], [2, 1], [0, 2, 1], [0, 2, 3])
    # equal in Python is equal here: 1 == 1.0 == True; "1" is another
    assert rlkern.group_index([1, 1.0, True, "1", 2]).ids.tolist() == [0, 0, 0, 1, 2]
    # verl truncates these to one group of three
    assert rlkern.group_index(np.array([0.2, 0.7, -0.0, 0.0])).ids.tolist() == [0, 1, 2, 2]
    index = rlkern.group_index(["x"])
    assert rlkern.group_index(index) is index


def uuids(n, per=8, same=True, seed=0):
    names = [str(uuid.UUID(int=random.Random(seed + i).getrandbits(128))) for i in range((n + per - 1) // per)]
    rows = [names[i // per] for i in range(n)]
    random.Random(seed).shuffle(rows)
    return rows if same else ["".join(list(x)) for x in rows]


KINDS = {
    "object, same strings": lambda: np.array(uuids(1000), dtype=object),
    "object, distinct strings": lambda: np.array(uuids(1000, same=False), dtype=object),
    "object, contiguous groups": lambda: np.array(sorted(uuids(1000)), dtype=object),
    "object, mixed": lambda: np.array([None, "a", 7, "7", (1, 2), None, 7.0, b"a", (1, 2)], dtype=object),
    "object, non-ASCII": lambda: np.array(["ä", "a", "漢", "ä", "漢字", "\U0001f600"], dtype=object),
    "object, strided": lambda: np.array(uuids(1000), dtype=object)[::-3],
    "str": lambda: np.array(uuids(1000)),
    "numeric strings": lambda: np.array(["7", "07", "7.0", "7"]),
    "bytes": lambda: np.array([b"ab", b"a", b"ab", b""]),
    "int64, sparse": lambda: np.array([10**12, -5, 10**12, 0, -5, 3]),
    "int8": lambda: np.array([-1, 127, -1, -128], dtype=np.int8),
    "uint16, strided": lambda: np.arange(40, dtype=np.uint16).repeat(2)[::3],
    "uint64": lambda: np.array([2**64 - 1, 0, 2**64 - 1], dtype=np.uint64),
    "bool": lambda: np.array([True, False, True]),
    "float32": lambda: np.array([0.5, -0.0, 0.0, 1e30, 0.5], dtype=np.float32),
    "float64": lambda: np.array([0.1, 0.2, 0.1 + 1e-16, np.inf, -np.inf, np.inf]),
    "float16": lambda: np.array([0.5, 1, 0.5], dtype=np.float16),
    "complex": lambda: np.array([1j, 1, 1j]),
    "big-endian": lambda: np.array([1, 2, 1], dtype=">i4"),
    "datetime": lambda: np.array(["2024-01-01", "2024-01-02", "2024-01-01"], dtype="datetime64[D]"),
    "dates": lambda: [datetime.date(2024, 1, 1), datetime.date(2024, 1, 2), datetime.date(2024, 1, 1)],
    "records": lambda: np.array([(1, 2.0), (1, 3.0), (1, 2.0)], dtype=[("a", int), ("b", float)]),
    "list": lambda: uuids(500),
    "tuple": lambda: tuple(uuids(500, same=False)),
    "range": lambda: range(5),
    "ints": lambda: [2**70, -1, 2**70, -2, 0],
    "hash collisions": lambda: [-1, -2, 2**61 - 1, 0, 2**61 - 2, -1, -2],  # hash(-1) == hash(-2), hash(2**61 - 1) == 0
    "empty array": lambda: np.array([], dtype=object),
    "empty list": lambda: [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_group_index_matches_reference(backend, kind):
    labels = KINDS[kind]()
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    assert lists(rlkern.group_index(labels)) == by_dict(values)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
def test_group_index_matches_reference_tensors(backend, dtype):
    labels = torch.tensor([3, -1, 3, 0, 1, -1]).abs().to(dtype)
    assert lists(rlkern.group_index(labels)) == by_dict(labels.tolist())
    assert lists(rlkern.group_index(labels.repeat(3)[::2])) == by_dict(labels.repeat(3)[::2].tolist())


def test_group_index_matches_reference_without_native(monkeypatch):
    found = [lists(rlkern.group_index(make())) for make in KINDS.values()]
    monkeypatch.setattr(backends, "native", None)
    assert [lists(rlkern.group_index(make())) for make in KINDS.values()] == found


@pytest.mark.parametrize(("labels", "why"), LABELS)
def test_group_index_edge_shapes(backend, labels, why):
    for form in (labels, np.array(labels, dtype=object), np.array(labels)):
        assert lists(rlkern.group_index(form)) == by_dict(labels)
    frozen = np.array(labels, dtype=object)
    frozen.flags.writeable = False
    assert lists(rlkern.group_index(frozen)) == by_dict(labels)


@given(st.lists(st.one_of(st.integers(-3, 3), st.text("ab", max_size=2), st.booleans(), st.floats(-1, 1), st.none()), max_size=40))
def test_group_index_properties(labels):
    index = rlkern.group_index(labels)
    assert lists(index) == by_dict(labels)
    # other names for the same groups, and a second pass over the ids, change nothing
    assert lists(rlkern.group_index([f"group {i}" for i in index.ids.tolist()])) == lists(index)
    assert lists(rlkern.group_index(index.ids)) == lists(index)
    # sorted by group, stable, with the group's rows between its offsets
    assert index.ids[index.order].tolist() == sorted(index.ids.tolist())
    for g in range(len(index.counts)):
        rows = index.order[index.offsets[g] : index.offsets[g + 1]]
        assert (index.ids[rows] == g).all()
        assert rows.tolist() == sorted(rows.tolist())


class Rude:
    """A label whose comparison raises."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def test_group_index_rejects(backend):
    def check(kind, words, labels):
        with pytest.raises(kind, match=rf"rlkern\.group_index: labels must {words}"):
            rlkern.group_index(labels)

    check(TypeError, "be a 1-D array.*got str", "abc")
    check(TypeError, "be a 1-D array.*got int", 5)
    check(TypeError, "be a 1-D array.*got dict", {"a": 1})
    check(TypeError, "be a 1-D array.*got generator", (x for x in "ab"))
    check(ValueError, r"be 1-D; got an array of shape \(1, 2\)", np.array([["a", "b"]]))
    check(ValueError, r"be 1-D; got an array of shape \(\)", torch.tensor(1))
    for labels in ([["a"], ["b"]], ("a", {}), np.array(["a", [1]], dtype=object)):
        check(TypeError, "be hashable", labels)
    nan = float("nan")
    for labels in (
        [0.5, nan],
        [nan, nan],
        np.array([1.0, nan]),
        np.array([nan], dtype=np.float32),
        torch.tensor([nan]),
        np.array([1, nan], dtype=object),
    ):
        check(ValueError, "hold no NaN", labels)
    check(ValueError, "hold no NaN", [np.float32("nan")])
    check(TypeError, "hold values; got tensors", [torch.tensor(1), torch.tensor(1)])
    with pytest.raises(RuntimeError, match="no comparison"):
        rlkern.group_index([Rude(), Rude()])
    for index, words in ((["a"], "have 2 labels, one a row; got 1"), (list("abc"), "have 2 labels, one a row; got 3")):
        with pytest.raises(ValueError, match=rf"rlkern\.group_mean_std: index must {words}"):
            rlkern.group_mean_std(torch.ones(2), index)


def test_group_index_rejects_a_list_that_changes():
    class Shrinks:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            labels.clear()
            return self is other

    labels = [Shrinks() for _ in range(5)]
    if backends.native is not None:
        with pytest.raises(RuntimeError, match="changed while it was read"):
            rlkern.group_index(labels)
