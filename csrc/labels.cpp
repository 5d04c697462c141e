// SPDX-License-Identifier: Apache-2.0
// One hash pass over Python objects, or over raw array memory, then a counting sort.
#include "labels.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace rlkern {
namespace {

// Instead of a number of groups: a Python exception is set. The messages are those of rlkern/group.py.
constexpr int64_t kRaised = -1;
int64_t refuse(PyObject* kind, const char* must, const char* got, const char* way_out) {
  PyErr_Format(kind, "rlkern.group_index: labels must %s; got %s. %s", must, got, way_out);
  return kRaised;
}
int64_t refuse_nan() { return refuse(PyExc_ValueError, "hold no NaN", "a label that is not equal to itself", "Name the group of rows that have none."); }
int64_t refuse_unhashable(PyObject* o) {
  return PyErr_ExceptionMatches(PyExc_TypeError) ? refuse(PyExc_TypeError, "be hashable", Py_TYPE(o)->tp_name, "Use strings or numbers.") : kRaised;
}

uint64_t mixed(uint64_t x) {  // the finalizer of MurmurHash3
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

// Open addressing, linear probing, at most half full. It grows with the groups, not with the labels: it stays in cache.
class LabelTable {
 public:
  LabelTable() : slots_(128) {}
  int64_t size() const { return size_; }
  // The id under `key` for which same(id) holds, or the next one: a key's first appearance.
  template <class Same>
  int64_t find(uint64_t key, Same same) {
    const size_t last = slots_.size() - 1;
    for (size_t i = mixed(key) & last;; i = (i + 1) & last) {
      Slot& slot = slots_[i];
      if (slot.id == 0) {
        slot = {key, ++size_};
        if (static_cast<size_t>(size_) * 2 > slots_.size()) grow();
        return size_ - 1;
      }
      if (slot.key == key && same(slot.id - 1)) return slot.id - 1;
    }
  }

 private:
  struct Slot {
    uint64_t key = 0;
    int64_t id = 0;  // 0: empty, else id + 1
  };
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    const size_t last = slots_.size() - 1;
    for (const Slot& slot : old) {
      if (slot.id == 0) continue;
      size_t i = mixed(slot.key) & last;
      while (slots_[i].id) i = (i + 1) & last;
      slots_[i] = slot;
    }
  }
  std::vector<Slot> slots_;
  int64_t size_ = 0;
};

// ---- Python objects ------------------------------------------------------------------------------------------------
// The distinct labels, held: a label's own __eq__ may change the list it came from.
struct Distinct {
  std::vector<PyObject*> keys;
  ~Distinct() {
    for (PyObject* k : keys) Py_DECREF(k);
  }
};
bool same_text(PyObject* a, PyObject* b) {
  const Py_ssize_t n = PyUnicode_GET_LENGTH(a);
  const auto kind = PyUnicode_KIND(a);
  return n == PyUnicode_GET_LENGTH(b) && kind == PyUnicode_KIND(b) && std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b), static_cast<size_t>(n) * kind) == 0;
}
// A new label must equal itself and be a value: a tensor hashes by identity.
int64_t judge_label(PyObject* o) {
  if (PyUnicode_CheckExact(o) || PyLong_CheckExact(o)) return 0;
  if (PyObject_HasAttrString(o, "data_ptr"))
    return refuse(PyExc_TypeError, "hold values", "tensors inside a list or object array", "Stack them into one 1-D tensor.");
  PyObject* itself = PyObject_RichCompare(o, o, Py_EQ);
  const int equal = itself ? PyObject_IsTrue(itself) : -1;
  Py_XDECREF(itself);
  return equal < 0 ? kRaised : equal ? 0 : refuse_nan();
}
// at(i): label i, or null with an exception set.
template <class At>
int64_t group_objects(int64_t n, At at, int64_t* ids) {
  LabelTable table;
  Distinct distinct;
  PyObject* before = nullptr;  // the label of row i - 1, alive because its equal is held
  for (int64_t i = 0; i < n; ++i) {
    PyObject* o = at(i);
    if (!o) return kRaised;
    if (o == before) {
      ids[i] = ids[i - 1];
      continue;
    }
    const bool text = PyUnicode_CheckExact(o);
    Py_hash_t hash = text ? reinterpret_cast<PyASCIIObject*>(o)->hash : -1;
    Py_INCREF(o);
    if (hash == -1) hash = PyObject_Hash(o);
    bool failed = hash == -1;
    int64_t id = failed ? refuse_unhashable(o) : table.find(static_cast<uint64_t>(hash), [&](int64_t g) {
      PyObject* k = distinct.keys[static_cast<size_t>(g)];
      if (k == o || failed) return true;
      if (text && PyUnicode_CheckExact(k)) return same_text(o, k);
      const int equal = PyObject_RichCompareBool(o, k, Py_EQ);
      failed = equal < 0;
      return equal != 0;
    });
    if (failed) id = kRaised;
    else if (id == static_cast<int64_t>(distinct.keys.size())) {
      const int64_t verdict = judge_label(o);
      if (verdict == 0) distinct.keys.push_back(o), Py_INCREF(o);
      else id = verdict;
    }
    Py_DECREF(o);
    if (id < 0) return id;
    ids[i] = id, before = text ? o : nullptr;
  }
  return table.size();
}

// ---- array memory --------------------------------------------------------------------------------------------------
template <class Key>
int64_t group_keys(int64_t n, Key key, int64_t* ids) {
  LabelTable table;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t k = 0;
    if (!key(i, k)) return refuse_nan();
    ids[i] = table.find(k, [](int64_t) { return true; });
  }
  return table.size();
}
uint64_t hash_of(const char* p, int64_t width) {
  uint64_t h = 0, word = 0;
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) {
    std::memcpy(&word, p + k, 8);
    h = (h ^ word) * 0x9e3779b97f4a7c15ULL;
    h ^= h >> 32;
  }
  for (word = 0; k < width; ++k) word = word << 8 | static_cast<uint8_t>(p[k]);
  return (h ^ word) * 0x9e3779b97f4a7c15ULL;
}
int64_t group_bytes(const char* data, int64_t n, int64_t stride, int64_t width, int64_t* ids) {
  LabelTable table;
  std::vector<const char*> keys;
  for (int64_t i = 0; i < n; ++i) {
    const char* p = data + i * stride;
    ids[i] = table.find(hash_of(p, width), [&](int64_t g) { return std::memcmp(keys[static_cast<size_t>(g)], p, static_cast<size_t>(width)) == 0; });
    if (ids[i] == static_cast<int64_t>(keys.size())) keys.push_back(p);
  }
  return table.size();
}
bool float_key(double x, uint64_t& k) {
  if (x == 0) x = 0;  // -0.0
  std::memcpy(&k, &x, 8);
  return !std::isnan(x);
}
int64_t group_buffer(const Py_buffer& b, int64_t* ids) {
  const char* data = static_cast<const char*>(b.buf);
  const int64_t n = b.shape[0], stride = b.strides[0], width = b.itemsize;
  const char* format = b.format ? b.format : "B";
  while (*format == '<' || *format == '=' || *format == '@' || *format == '^' || (*format >= '0' && *format <= '9')) ++format;
  const int64_t unknown = -2;
  if (format[0] == 0 || format[1] != 0) return unknown;
  if (*format == 'w' || *format == 's') return group_bytes(data, n, stride, width, ids);
  if (*format == 'f') {
    return group_keys(
        n,
        [=](int64_t i, uint64_t& k) {
          float x;
          std::memcpy(&x, data + i * stride, 4);
          return float_key(x, k);
        },
        ids);
  }
  if (*format == 'd') {
    return group_keys(
        n,
        [=](int64_t i, uint64_t& k) {
          double x;
          std::memcpy(&x, data + i * stride, 8);
          return float_key(x, k);
        },
        ids);
  }
  if (*format == 'O') {
    return group_objects(
        n,
        [=](int64_t i) {
          auto item = [=](int64_t j) {
            PyObject* o;
            std::memcpy(&o, data + j * stride, sizeof o);
            return o;
          };
          if (i + 8 < n) __builtin_prefetch(item(i + 8)), __builtin_prefetch(reinterpret_cast<const char*>(item(i + 8)) + 64);
          PyObject* o = item(i);
          return o ? o : Py_None;  // NumPy's null object
        },
        ids);
  }
  if (!std::strchr("?bBhHiIlLqQnN", *format) || width > 8) return unknown;
  return group_keys(
      n,
      [=](int64_t i, uint64_t& k) {
        std::memcpy(&k, data + i * stride, static_cast<size_t>(width));
        return true;
      },
      ids);
}

}  // namespace

bool group_labels(PyObject* labels, int64_t n, int64_t* memory, LabelGroups& out) {
  int64_t groups = -2;
  if (PyList_CheckExact(labels) || PyTuple_CheckExact(labels)) {
    groups = group_objects(
        n,
        [=](int64_t i) -> PyObject* {
          if (i < PySequence_Fast_GET_SIZE(labels)) return PySequence_Fast_GET_ITEM(labels, i);
          PyErr_SetString(PyExc_RuntimeError, "the list of labels changed while it was read");
          return nullptr;
        },
        memory);
  } else {
    Py_buffer b;
    if (PyObject_GetBuffer(labels, &b, PyBUF_STRIDED_RO | PyBUF_FORMAT) != 0) return false;
    if (b.ndim == 1 && b.shape[0] == n) groups = group_buffer(b, memory);
    PyBuffer_Release(&b);
  }
  if (groups == -2) PyErr_SetString(PyExc_TypeError, "rlkern._C: labels of a layout that rlkern/group.py should have converted");
  if (groups < 0) return false;
  out = {memory, memory + n, memory + 2 * n, memory + 2 * n + groups, groups};
  for (int64_t g = 0; g < groups; ++g) out.counts[g] = 0;
  for (int64_t i = 0; i < n; ++i) ++out.counts[out.ids[i]];
  std::vector<int64_t> next(static_cast<size_t>(groups));
  out.offsets[0] = 0;
  for (int64_t g = 0; g < groups; ++g) next[static_cast<size_t>(g)] = out.offsets[g], out.offsets[g + 1] = out.offsets[g] + out.counts[g];
  for (int64_t i = 0; i < n; ++i) out.order[next[static_cast<size_t>(out.ids[i])]++] = i;
  return true;
}

}  // namespace rlkern
