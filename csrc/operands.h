// SPDX-License-Identifier: Apache-2.0
// Python tensors as operands. They come in as Python objects and leave as addresses: no Torch header, so one build serves
// every torch version.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "args.h"
#include "dlpack.h"

namespace py = pybind11;

namespace rlkern {

#if defined(RLKERN_CUDA)
constexpr bool kHostReads = false;  // addresses are the device's
#else
constexpr bool kHostReads = true;
#endif

constexpr int kDtypes = 8;
inline PyObject* dtypes[kDtypes] = {};  // torch.float32, ... in the order of enum Dtype; set once by rlkern/backends.py

inline const dlpack::Api* exchange = nullptr;  // of this torch; null before 2.10, whose tensors are read by attributes
inline PyTypeObject* tensor_types[2] = {};     // torch.Tensor and torch.nn.Parameter
static char nothing;                           // an empty tensor has a null address, which would read as "absent"

inline int dtype_of(const dlpack::Tensor& t) {
  switch (t.code << 8 | t.bits) {
    case dlpack::kFloat << 8 | 32: return static_cast<int>(Dtype::f32);
    case dlpack::kFloat << 8 | 64: return static_cast<int>(Dtype::f64);
    case dlpack::kFloat << 8 | 16: return static_cast<int>(Dtype::f16);
    case dlpack::kBfloat << 8 | 16: return static_cast<int>(Dtype::bf16);
    case dlpack::kBool << 8 | 8: return static_cast<int>(Dtype::b8);
    case dlpack::kUInt << 8 | 8: return static_cast<int>(Dtype::u8);
    case dlpack::kInt << 8 | 32: return static_cast<int>(Dtype::i32);
    case dlpack::kInt << 8 | 64: return static_cast<int>(Dtype::i64);
    default: return -1;
  }
}
inline Dtype known(int dtype) {
  if (dtype < 0) throw py::type_error("rlkern._C: a dtype that no kernel reads");
  return static_cast<Dtype>(dtype);
}
template <class Sizes, class Strides>
Operand as_rows(void* data, Dtype dtype, int64_t dims, Sizes size, Strides stride) {
  if (dims > 2) throw py::value_error("rlkern._C: at most two dimensions");
  Operand x;
  x.data = data ? data : &nothing;
  x.dtype = dtype;
  x.rows = dims == 2 ? size(0) : 1;
  x.cols = dims >= 1 ? size(dims - 1) : 1;
  x.row_stride = dims == 2 ? stride(0) : 0;
  x.inner_stride = dims >= 1 && x.cols > 1 ? stride(dims - 1) : 1;
  return x;
}

inline int dtype_by_attribute(PyObject* t) {
  static PyObject* name = PyUnicode_InternFromString("dtype");
  const py::object d = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, name));
  if (!d) throw py::error_already_set();
  for (int i = 0; i < kDtypes; ++i)
    if (d.ptr() == dtypes[i]) return i;
  return -1;
}
inline py::object call(PyObject* t, PyObject* method) {
  py::object r = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(t, method));
  if (!r) throw py::error_already_set();
  return r;
}
inline Operand operand_by_attributes(PyObject* t) {
  static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* stride = PyUnicode_InternFromString("stride");
  static PyObject* shape = PyUnicode_InternFromString("shape");
  void* data = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(call(t, data_ptr).ptr()));
  const py::object sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, shape)), strides = call(t, stride);
  const auto of = [](const py::object& tuple) {
    return [&tuple](int64_t i) { return static_cast<int64_t>(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i))); };
  };
  return as_rows(data, known(dtype_by_attribute(t)), PyTuple_GET_SIZE(sizes.ptr()), of(sizes), of(strides));
}

// Any strides; what may not stay is the casters' to say.
inline Operand operand_of(PyObject* t) {
  if (!exchange) return operand_by_attributes(t);
  dlpack::Tensor x;
  if (exchange->tensor_from(t, &x) != 0) throw py::error_already_set();
  return as_rows(
      static_cast<char*>(x.data) + x.byte_offset, known(dtype_of(x)), x.ndim, [&](int64_t i) { return x.shape[i]; }, [&](int64_t i) { return x.strides[i]; });
}

// Plain contiguous CPU tensors of one shape, with dtypes that kernels read (integers as masks only)? Then rlkern/check.py has
// nothing more to ask of them. False says nothing: the checks in Python find out what it is.
inline bool alike(PyObject* like, const py::dict& others) {
  if (!exchange) return false;
  const auto plain = [](PyObject* t, dlpack::Tensor& x) {
    if (Py_TYPE(t) != tensor_types[0] && Py_TYPE(t) != tensor_types[1]) return false;
    if (exchange->tensor_from(t, &x) != 0) return PyErr_Clear(), false;  // a meta tensor, a complex one
    int64_t expected = 1;
    bool good = x.device_type == dlpack::kCpu && dtype_of(x) >= 0;
    for (int32_t d = x.ndim - 1; good && d >= 0; expected *= x.shape[d--]) good = x.shape[d] == 1 || x.strides[d] == expected;
    return good;
  };
  dlpack::Tensor first, x;
  if (!plain(like, first)) return false;
  static PyObject* mask = PyUnicode_InternFromString("mask");
  PyObject *name, *t;
  for (Py_ssize_t at = 0; PyDict_Next(others.ptr(), &at, &name, &t);) {
    if (t == Py_None) continue;
    if (!plain(t, x) || x.ndim != first.ndim) return false;
    for (int32_t d = 0; d < x.ndim; ++d)
      if (x.shape[d] != first.shape[d]) return false;
    if (static_cast<Dtype>(dtype_of(x)) >= Dtype::b8 && !PyUnicode_Tailmatch(name, mask, 0, PY_SSIZE_T_MAX, 1)) return false;
  }
  return true;
}

struct Tokens : Operand {};  // (B, T), or packed (N,); one value a row by an inner stride of 0
struct PerRow : Operand {};  // (B,)
struct Packed {              // cu_seqlens (rows + 1,), int64, or None
  const int64_t* cu = nullptr;
  int64_t count = 0;
};
// Offsets are addresses to the kernels: from 0 to `total`, never falling.
inline bool offsets_fit(const Packed& packed, int64_t total) {
  bool good = packed.cu && packed.count >= 0 && packed.cu[0] == 0 && packed.cu[packed.count] == total;
  for (int64_t r = 0; good && r < packed.count; ++r) good = packed.cu[r] <= packed.cu[r + 1];
  return good;
}
inline Rows rows_of(const Operand& x, const Packed& packed) {
  if (!packed.cu) return {x.rows, x.cols, nullptr};
  if (kHostReads && !offsets_fit(packed, x.cols))
    throw py::value_error("rlkern: cu_seqlens must run from 0 to the number of tokens without falling. It is a cumulative sum.");
  return {packed.count, 0, packed.cu};
}

// The words of the public API, in the order of their enums (rlkern/types.py lists them for Python).
template <class E, size_t N>
bool word(py::handle h, const char* const (&words)[N], E& value) {
  if (!PyUnicode_Check(h.ptr())) return false;
  for (size_t i = 0; i < N; ++i) {
    if (PyUnicode_CompareWithASCIIString(h.ptr(), words[i]) != 0) continue;
    value = static_cast<E>(i);
    return true;
  }
  return false;
}

// Every number of a GroupIndex is checked: the kernels use them as addresses.
inline Groups groups_of(const Tokens& order, const Tokens& offsets, int64_t rows) {
  const int64_t *row = static_cast<const int64_t*>(order.data), *of = static_cast<const int64_t*>(offsets.data);
  const int64_t groups = offsets.cols - 1;
  bool good = order.dtype == Dtype::i64 && offsets.dtype == Dtype::i64 && order.inner_stride == 1 && offsets.inner_stride == 1 && order.rows == 1 &&
              offsets.rows == 1 && order.cols == rows && groups >= 0;
  good = good && (!kHostReads || (of[0] == 0 && of[groups] == rows));
  for (int64_t g = 0; kHostReads && good && g < groups; ++g) good = of[g] <= of[g + 1];
  for (int64_t i = 0; kHostReads && good && i < rows; ++i) good = static_cast<uint64_t>(row[i]) < static_cast<uint64_t>(rows);
  if (!good)
    throw py::value_error("rlkern: index must be as rlkern.group_index made it; got order and offsets that do not fit the rows. Do not edit its tensors.");
  return {row, of, groups};
}

// kl_penalty's name and (ratio_low, ratio_high, value_low, value_high); a trailing "+" is the straight-through form.
inline KlOptions kl_options(const std::string& name, const std::array<double, 4>& range) {
  KlOptions o{};
  const bool plus = !name.empty() && name.back() == '+';
  const std::string base = plus ? name.substr(0, name.size() - 1) : name;
  o.estimator = base == "k1" ? Kl::k1 : base == "abs" ? Kl::abs : base == "k2" ? Kl::k2 : base == "k3" ? Kl::k3 : Kl::none;
  o.straight_through = plus;
  o.ratio_low = range[0], o.ratio_high = range[1], o.value_low = range[2], o.value_high = range[3];
  return o;
}

// (unbiased, floor, shift_mean, scale, mask_output) and eps.
inline WhitenOptions whiten_options(const std::array<bool, 5>& flags, double eps) { return {flags[0], flags[1], flags[2], flags[3], flags[4], eps}; }

}  // namespace rlkern

namespace pybind11::detail {
template <>
struct type_caster<rlkern::Tokens> {
  PYBIND11_TYPE_CASTER(rlkern::Tokens, const_name("Tensor | None"));
  bool load(handle h, bool) {
    if (h.is_none()) return true;
    static_cast<rlkern::Operand&>(value) = rlkern::operand_of(h.ptr());
    if (value.inner_stride != 0 && value.inner_stride != 1) throw value_error("rlkern._C: the inner stride must be 0 or 1");
    return true;
  }
};
template <>
struct type_caster<rlkern::PerRow> {
  PYBIND11_TYPE_CASTER(rlkern::PerRow, const_name("Tensor | None"));
  bool load(handle h, bool) {
    if (h.is_none()) return true;
    rlkern::Operand& x = value;
    x = rlkern::operand_of(h.ptr());
    if (x.rows != 1) throw value_error("rlkern._C: one value a row must come as (B,)");
    x.rows = x.cols, x.cols = 1, x.row_stride = x.inner_stride, x.inner_stride = 0;
    return true;
  }
};
template <>
struct type_caster<rlkern::Packed> {
  PYBIND11_TYPE_CASTER(rlkern::Packed, const_name("Tensor | None"));
  bool load(handle h, bool) {
    if (h.is_none()) return true;
    const rlkern::Operand x = rlkern::operand_of(h.ptr());
    if (x.dtype != rlkern::Dtype::i64 || x.rows != 1 || x.inner_stride != 1) throw value_error("rlkern._C: cu_seqlens must be contiguous int64");
    value = {static_cast<const int64_t*>(x.data), x.cols - 1};
    return true;
  }
};
#if defined(RLKERN_CUDA)
template <>
struct type_caster<rlkern::Place> {
  PYBIND11_TYPE_CASTER(rlkern::Place, const_name("tuple[int, int, int, int, object]"));
  bool load(handle h, bool) {  // stream, device, memory, its bytes and its owner
    if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != 5) return false;
    const auto at = [&](Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(h.ptr(), i)); };
    value = {reinterpret_cast<void*>(at(0)), static_cast<int>(at(1)), reinterpret_cast<void*>(at(2)), at(3)};
    return !PyErr_Occurred();
  }
};
#endif
template <>
struct type_caster<rlkern::Masked> {
  PYBIND11_TYPE_CASTER(rlkern::Masked, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"none", "skip", "reset", "zero", "turn"}, value); }
};
template <>
struct type_caster<rlkern::Baseline> {
  PYBIND11_TYPE_CASTER(rlkern::Baseline, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"none", "mean", "leave_one_out", "length_weighted", "second_best"}, value); }
};
template <>
struct type_caster<rlkern::Singleton> {
  PYBIND11_TYPE_CASTER(rlkern::Singleton, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"raw", "zero", "nan"}, value); }
};
template <>
struct type_caster<rlkern::WeightLevel> {
  PYBIND11_TYPE_CASTER(rlkern::WeightLevel, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"", "token", "sequence"}, value); }
};
template <>
struct type_caster<rlkern::Gating> {
  PYBIND11_TYPE_CASTER(rlkern::Gating, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"ratio", "binary_kl", "tv"}, value); }
};
template <>
struct type_caster<rlkern::GateUnit> {
  PYBIND11_TYPE_CASTER(rlkern::GateUnit, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"token", "mean", "sum"}, value); }
};
template <>
struct type_caster<rlkern::OnNan> {
  PYBIND11_TYPE_CASTER(rlkern::OnNan, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"show", "one", "drop"}, value); }
};
template <>
struct type_caster<rlkern::Agg> {
  PYBIND11_TYPE_CASTER(rlkern::Agg, const_name("str"));
  bool load(handle h, bool) {
    return rlkern::word(h, {"token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"}, value);
  }
};
template <>
struct type_caster<rlkern::PolicyKind> {
  PYBIND11_TYPE_CASTER(rlkern::PolicyKind, const_name("str"));
  bool load(handle h, bool) {
    return rlkern::word(h, {"clip", "kl_cov", "sapo", "reinforce", "cispo", "dppo_tv", "dppo_kl", "dro", "vespo", "geo_mean", "topr"}, value);
  }
};
template <>
struct type_caster<rlkern::Level> {
  PYBIND11_TYPE_CASTER(rlkern::Level, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"token", "sequence", "sequence-sum"}, value); }
};
}  // namespace pybind11::detail
