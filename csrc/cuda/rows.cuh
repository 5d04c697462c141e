// SPDX-License-Identifier: Apache-2.0
// Rows of tokens as threads see them: a thread has a piece, the tokens of one 16-byte access. A row is cut at the addresses
// of its first operand that 16 divides, so a body of whole pieces lies between two ends that are read by element, whatever
// the length is.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// ---- elements -----------------------------------------------------------------------------------------------------------
// How a kernel's floating-point operands are stored: all as T, or each in its own dtype with arithmetic in A.
template <class T>
struct Stored {
  using A = float;
  static constexpr int kPiece = kVector<T>;
  static constexpr bool kSame = true;
  using Element = T;
};
template <>
struct Stored<double> {
  using A = double;
  static constexpr int kPiece = kVector<double>;
  static constexpr bool kSame = true;
  using Element = double;
};
template <class Arithmetic>
struct Mixed {};
template <class Arithmetic>
struct Stored<Mixed<Arithmetic>> {
  using A = Arithmetic;
  static constexpr int kPiece = 1;  // of unlike widths: a warp reads neighbours
  static constexpr bool kSame = false;
  using Element = float;  // unread
};
template <class S>
using ArithmeticOf = typename Stored<S>::A;

template <class A>
__device__ __forceinline__ A number(float x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A number(double x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A number(__half x) {
  return static_cast<A>(__half2float(x));
}
template <class A>
__device__ __forceinline__ A number(__nv_bfloat16 x) {
  return static_cast<A>(__bfloat162float(x));
}
template <class T, class A>
__device__ __forceinline__ T rounded(A x) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(x));
    else return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
__device__ __forceinline__ const T& at(const Operand& x, int64_t i) {
  return static_cast<const T*>(x.data)[i];
}
// Element i of an operand of any dtype.
template <class A>
__device__ __forceinline__ A element(const Operand& x, int64_t i) {
  switch (x.dtype) {
    case Dtype::f32: return number<A>(at<float>(x, i));
    case Dtype::f64: return number<A>(at<double>(x, i));
    case Dtype::f16: return number<A>(at<__half>(x, i));
    case Dtype::bf16: return number<A>(at<__nv_bfloat16>(x, i));
    case Dtype::i32: return static_cast<A>(at<int32_t>(x, i));
    case Dtype::i64: return static_cast<A>(at<int64_t>(x, i));
    default: return static_cast<A>(at<uint8_t>(x, i));
  }
}
template <class A>
__device__ __forceinline__ void set_element(const Operand& x, int64_t i, A value) {
  switch (x.dtype) {
    case Dtype::f32: static_cast<float*>(x.data)[i] = static_cast<float>(value); break;
    case Dtype::f64: static_cast<double*>(x.data)[i] = static_cast<double>(value); break;
    case Dtype::f16: static_cast<__half*>(x.data)[i] = rounded<__half>(value); break;
    default: static_cast<__nv_bfloat16*>(x.data)[i] = rounded<__nv_bfloat16>(value); break;
  }
}
template <class A>
__device__ __forceinline__ A row_value(const Operand& x, int64_t r) {
  return element<A>(x, r * x.row_stride);
}

// ---- pieces -----------------------------------------------------------------------------------------------------------
inline int size_of(Dtype d) {
  constexpr int kSizes[] = {4, 8, 2, 2, 1, 1, 4, 8};
  return kSizes[static_cast<int>(d)];
}
__device__ __forceinline__ int bytes_of(Dtype d) {
  return d == Dtype::f64 || d == Dtype::i64 ? 8 : d == Dtype::f32 || d == Dtype::i32 ? 4 : d == Dtype::f16 || d == Dtype::bf16 ? 2 : 1;
}

// Tokens [first + begin, first + end) of a row; `whole`: all of the piece's.
struct Piece {
  int64_t first = 0;
  int begin = 0, end = 0;
  bool whole = false;
};
// How many tokens before the row's start its first piece begins.
template <class S>
__device__ __forceinline__ int lead_of(const Operand& x, int64_t base) {
  if (!Stored<S>::kSame || !x.inner_stride) return 0;
  constexpr int N = Stored<S>::kPiece;
  return static_cast<int>(reinterpret_cast<uintptr_t>(&at<typename Stored<S>::Element>(x, base)) / sizeof(typename Stored<S>::Element) % N);
}
// Of a row.
template <int N>
__device__ __forceinline__ int64_t pieces_of(int lead, int64_t length) {
  return length ? (length + lead + N - 1) / N : 0;
}
template <int N>
__device__ __forceinline__ Piece piece_of(int64_t k, int lead, int64_t length) {
  Piece p;
  p.first = k * N - lead;
  p.begin = p.first < 0 ? static_cast<int>(-p.first) : 0;
  const int64_t left = length - p.first;
  p.end = left < 0 ? 0 : left < N ? static_cast<int>(left) : N;
  p.whole = p.begin == 0 && p.end == N;
  return p;
}

// 16 bytes, if they may be accessed as such.
__device__ __forceinline__ bool wide(const void* address) { return reinterpret_cast<uintptr_t>(address) % kWide == 0; }

// A piece as it was loaded. It becomes numbers where they are used: a conversion behind a load would keep the next one waiting.
template <class S, bool Same = Stored<S>::kSame>
struct Loaded {
  uint4 raw;
  __device__ __forceinline__ ArithmeticOf<S> operator[](int i) const {
    typename Stored<S>::Element v[Stored<S>::kPiece];
    memcpy(v, &raw, kWide);
    return number<ArithmeticOf<S>>(v[i]);
  }
};
template <class S>
struct Loaded<S, false> {
  ArithmeticOf<S> value;
  __device__ __forceinline__ ArithmeticOf<S> operator[](int) const { return value; }
};

// A piece of an operand, 0 outside it and where the operand is absent; one value where a row holds one.
template <class S>
__device__ __forceinline__ Loaded<S> load(const Operand& x, int64_t base, const Piece& p) {
  if constexpr (Stored<S>::kSame) {
    using T = typename Stored<S>::Element;
    constexpr int N = Stored<S>::kPiece;
    Loaded<S> found{{0, 0, 0, 0}};
    if (!x) return found;
    const T* from = static_cast<const T*>(x.data) + base + (x.inner_stride ? p.first : 0);
    if (p.whole && x.inner_stride && wide(from)) {
      found.raw = *reinterpret_cast<const uint4*>(from);
      return found;
    }
    T v[N];
    memcpy(v, &found.raw, kWide);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i >= p.begin && i < p.end) v[i] = from[x.inner_stride ? i : 0];
    memcpy(&found.raw, v, kWide);
    return found;
  } else {
    return {x && p.whole ? element<ArithmeticOf<S>>(x, base + p.first * x.inner_stride) : ArithmeticOf<S>(0)};
  }
}
template <class S>
__device__ __forceinline__ void store(const Operand& x, int64_t base, const Piece& p, const ArithmeticOf<S> (&value)[Stored<S>::kPiece]) {
  constexpr int N = Stored<S>::kPiece;
  if constexpr (Stored<S>::kSame) {
    using T = typename Stored<S>::Element;
    T* to = static_cast<T*>(x.data) + base + p.first;
    if (p.whole && wide(to)) {
      T v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = rounded<T>(value[i]);
      uint4 raw;
      memcpy(&raw, v, kWide);
      __stwb(reinterpret_cast<uint4*>(to), raw);  // an assignment may be split
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i >= p.begin && i < p.end) to[i] = rounded<T>(value[i]);
  } else {
    if (p.whole) set_element(x, base + p.first, value[0]);
  }
}

// ---- masks: nonzero bits, whatever their dtype -----------------------------------------------------------------------
// Of N elements of a mask: which are not 0; and is one neither 0 nor 1, a weight? `ignored`: a float's sign, as -0 is 0.
struct Bits {
  unsigned valid = 0;
  bool weighs = false;
};
template <int N, class Word>
__device__ __forceinline__ Bits bits_of(const void* from, Word ignored, Word one, const Piece& p) {
  constexpr int kBytes = N * static_cast<int>(sizeof(Word)), kStep = kBytes < kWide ? kBytes : kWide;
  Word v[N];
  if (kBytes > static_cast<int>(sizeof(Word)) && p.whole && reinterpret_cast<uintptr_t>(from) % kStep == 0) {
#pragma unroll
    for (int i = 0; i < kBytes; i += kStep) {
      const char* piece = static_cast<const char*>(from) + i;
      char* to = reinterpret_cast<char*>(v) + i;
      if constexpr (kStep == 16) {
        const uint4 raw = *reinterpret_cast<const uint4*>(piece);
        memcpy(to, &raw, 16);
      } else if constexpr (kStep == 8) {
        const uint2 raw = *reinterpret_cast<const uint2*>(piece);
        memcpy(to, &raw, 8);
      } else if constexpr (kStep == 4) {
        const unsigned raw = *reinterpret_cast<const unsigned*>(piece);
        memcpy(to, &raw, 4);
      } else {
        const unsigned short raw = *reinterpret_cast<const unsigned short*>(piece);
        memcpy(to, &raw, 2);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i >= p.begin && i < p.end ? static_cast<const Word*>(from)[i] : Word(0);
  }
  Bits found;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool valid = (v[i] & static_cast<Word>(~ignored)) != 0;
    found.valid |= static_cast<unsigned>(valid) << i;
    found.weighs |= valid && v[i] != one;
  }
  return found;
}
// The mask's bits of a piece; all that exist are valid where there is no mask.
template <int N>
__device__ __forceinline__ Bits mask_bits(const Operand& mask, int64_t base, const Piece& p) {
  const unsigned there = ((1u << p.end) - 1) & ~((1u << p.begin) - 1);
  if (!mask) return {there, false};
  if (!mask.inner_stride) {
    const double one = p.begin < p.end ? element<double>(mask, base) : 0.0;
    return {one != 0 ? there : 0, one != 0 && one != 1};
  }
  const void* from = static_cast<const char*>(mask.data) + (base + p.first) * bytes_of(mask.dtype);
  switch (mask.dtype) {
    case Dtype::f32: return bits_of<N, uint32_t>(from, 0x80000000u, 0x3f800000u, p);
    case Dtype::f64: return bits_of<N, uint64_t>(from, uint64_t(1) << 63, uint64_t(0x3ff) << 52, p);
    case Dtype::f16: return bits_of<N, uint16_t>(from, 0x8000, 0x3c00, p);
    case Dtype::bf16: return bits_of<N, uint16_t>(from, 0x8000, 0x3f80, p);
    case Dtype::i32: return bits_of<N, uint32_t>(from, 0, 1, p);
    case Dtype::i64: return bits_of<N, uint64_t>(from, 0, 1, p);
    default: return bits_of<N, uint8_t>(from, 0, 1, p);
  }
}
// Which tokens of the piece are valid.
template <int N>
__device__ __forceinline__ unsigned valid_bits(const Operand& mask, int64_t base, const Piece& p) {
  return mask_bits<N>(mask, base, p).valid;
}

// ---- grids ------------------------------------------------------------------------------------------------------------
constexpr int kTokenThreads = 256;

// A thread per piece, however rows lie; rows that lie one behind the other in every operand are one row.
struct Tiling {
  Rows rows;
  int64_t pieces = 0;  // of a row, with the one that a row's lead may add
  // Of a row in an operand; packed rows are not tiled.
  __device__ __forceinline__ int64_t base(const Operand& x, int64_t r) const { return r * x.row_stride; }
  int64_t blocks() const { return (rows.count * pieces + kTokenThreads - 1) / kTokenThreads; }
};
inline bool gapless(const Operand& x) { return !x || (x.inner_stride == 1 && (x.rows == 1 || x.row_stride == x.cols)); }
template <class S, class... Operands>
Tiling tiling_of(Rows rows, const Operand& first, const Operands&... others) {
  if (!rows.cu && gapless(first) && (gapless(others) && ...)) rows = {rows.count && rows.length ? 1 : 0, rows.count * rows.length, nullptr};
  const auto start = reinterpret_cast<uintptr_t>(first.data) % kWide;
  const bool even = start == 0 && (rows.count <= 1 || first.row_stride * size_of(first.dtype) % kWide == 0);
  constexpr int N = Stored<S>::kPiece;
  const int64_t pieces = rows.length ? (rows.length + N - 1) / N + (Stored<S>::kSame && !even ? 1 : 0) : 0;
  return {rows, pieces};
}
// Row and piece of the i-th one; false past the end.
__device__ __forceinline__ bool spread(const Tiling& t, uint64_t i, int64_t& row, int64_t& k) {
  const uint64_t per = static_cast<uint64_t>(t.pieces);
  if (t.rows.count == 1) row = 0, k = static_cast<int64_t>(i);
  else if (per == 0) return false;
  else if (i <= 0xffffffffu && per <= 0xffffffffu)  // a short division
    row = static_cast<uint32_t>(i) / static_cast<uint32_t>(per), k = static_cast<uint32_t>(i) % static_cast<uint32_t>(per);
  else row = static_cast<int64_t>(i / per), k = static_cast<int64_t>(i % per);
  return row < t.rows.count && k < t.pieces;
}
__device__ __forceinline__ bool place_of(const Tiling& t, int64_t& row, int64_t& k) {  // this thread's
  return spread(t, static_cast<uint64_t>(blockIdx.x) * kTokenThreads + threadIdx.x, row, k);
}

// f(Stored's argument) for operands that share a dtype, else for mixed ones.
template <bool AlsoMixed = true, class F, class... Operands>
void with_storage(F&& f, const Operand& first, const Operands&... others) {
  const bool same = ((!others || others.dtype == first.dtype) && ...), wide = first.dtype == Dtype::f64 || ((others && others.dtype == Dtype::f64) || ...);
  if (same && first.dtype == Dtype::f32) f(float{});
  else if (same && first.dtype == Dtype::f64) f(double{});
  else if (same && first.dtype == Dtype::bf16) f(__nv_bfloat16{});
  else if (same && first.dtype == Dtype::f16) f(__half{});
  else if constexpr (!AlsoMixed) throw std::runtime_error("rlkern: tensors of the values' kind must share a dtype; convert them with .to(dtype).");
  else if (wide) f(Mixed<double>{});
  else f(Mixed<float>{});
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
