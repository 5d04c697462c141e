// SPDX-License-Identifier: Apache-2.0
// Python tensors as operands. They come in as Python objects and leave as addresses: no Torch header, so one build serves
// every torch version.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "args.h"

namespace py = pybind11;

namespace rlkern {

constexpr int kDtypes = 8;
inline PyObject* dtypes[kDtypes] = {};  // torch.float32, ... in the order of enum Dtype; set once by rlkern/backends.py

inline Dtype dtype_of(PyObject* t) {
  static PyObject* name = PyUnicode_InternFromString("dtype");
  const py::object d = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, name));
  if (!d) throw py::error_already_set();
  for (int i = 0; i < kDtypes; ++i)
    if (d.ptr() == dtypes[i]) return static_cast<Dtype>(i);
  throw py::type_error("rlkern._C: a dtype that no kernel reads");
}
inline py::object call(PyObject* t, PyObject* method) {
  py::object r = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(t, method));
  if (!r) throw py::error_already_set();
  return r;
}
inline int64_t int_at(const py::object& tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i)); }

// Any strides; what may not stay is the casters' to say.
inline Operand operand_of(PyObject* t) {
  static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* stride = PyUnicode_InternFromString("stride");
  static PyObject* shape = PyUnicode_InternFromString("shape");
  static char empty;  // an empty tensor has a null address, which would read as "absent"
  Operand x;
  x.dtype = dtype_of(t);
  x.data = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(call(t, data_ptr).ptr()));
  if (!x.data) x.data = &empty;
  const py::object sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, shape)), strides = call(t, stride);
  const Py_ssize_t dims = PyTuple_GET_SIZE(sizes.ptr());
  if (dims > 2) throw py::value_error("rlkern._C: at most two dimensions");
  x.rows = dims == 2 ? int_at(sizes, 0) : 1;
  x.cols = dims >= 1 ? int_at(sizes, dims - 1) : 1;
  x.row_stride = dims == 2 ? int_at(strides, 0) : 0;
  x.inner_stride = dims >= 1 && x.cols > 1 ? int_at(strides, dims - 1) : 1;
  return x;
}

struct Tokens : Operand {};  // (B, T), or packed (N,); one value a row by an inner stride of 0
struct PerRow : Operand {};  // (B,)
struct Packed {              // cu_seqlens (rows + 1,), int64, or None
  const int64_t* cu = nullptr;
  int64_t count = 0;
};
inline Rows rows_of(const Operand& x, const Packed& packed) { return packed.cu ? Rows{packed.count, 0, packed.cu} : Rows{x.rows, x.cols, nullptr}; }

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
              offsets.rows == 1 && order.cols == rows && groups >= 0 && of[0] == 0 && of[groups] == rows;
  for (int64_t g = 0; good && g < groups; ++g) good = of[g] <= of[g + 1];
  for (int64_t i = 0; good && i < rows; ++i) good = static_cast<uint64_t>(row[i]) < static_cast<uint64_t>(rows);
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
  o.straight_through = plus && o.estimator != Kl::k2;
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
    value = {static_cast<const int64_t*>(x.data), x.cols - 1};
    return true;
  }
};
template <>
struct type_caster<rlkern::Masked> {
  PYBIND11_TYPE_CASTER(rlkern::Masked, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"none", "skip", "reset", "zero", "turn"}, value); }
};
template <>
struct type_caster<rlkern::Baseline> {
  PYBIND11_TYPE_CASTER(rlkern::Baseline, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"none", "mean", "leave_one_out", "length_weighted"}, value); }
};
template <>
struct type_caster<rlkern::Singleton> {
  PYBIND11_TYPE_CASTER(rlkern::Singleton, const_name("str"));
  bool load(handle h, bool) { return rlkern::word(h, {"raw", "zero", "nan"}, value); }
};
template <>
struct type_caster<rlkern::Agg> {
  PYBIND11_TYPE_CASTER(rlkern::Agg, const_name("str"));
  bool load(handle h, bool) {
    return rlkern::word(h, {"token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"}, value);
  }
};
}  // namespace pybind11::detail
