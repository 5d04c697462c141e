// SPDX-License-Identifier: Apache-2.0
// A kernel walks a row one vector at a time. Every dtype and mask kind becomes the same three things, by branches that are
// the same for the whole row: lanes of the arithmetic type A, lanes of mask bits (mask.h), and a way to write lanes back.
#pragma once
#include <cstdlib>

#include "../args.h"
#include "parallel.h"
#include "simd.h"

// Conversions and ragged ends stay out of line: inlined, they push a loop's constants out of the registers.
#define RLKERN_RARE __attribute__((noinline))

namespace rlkern {
namespace RLKERN_ISA {

inline int32_t bits_of(float x) {
  int32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float from_bits(int32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// ---- half precision ------------------------------------------------------------------------------------------------
inline float widen_bf16(uint16_t x) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }
inline uint16_t narrow_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = static_cast<uint32_t>(bits_of(f));
  return static_cast<uint16_t>(f != f ? (u >> 16) | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float widen_f16(uint16_t x) {
  const int32_t magnitude = (x & 0x7fff) << 13, sign = static_cast<int32_t>(static_cast<uint32_t>(x & 0x8000) << 16);
  const float f = from_bits(magnitude) * 5.192296858534828e33f;  // 2^112: exponent bias 15 to 127, subnormals too
  return from_bits((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits_of(f)) | sign);  // infinity and NaN
}
inline uint16_t narrow_f16(float f) {  // round to nearest even, by the float unit for subnormals
  const uint32_t u = static_cast<uint32_t>(bits_of(f)), sign = u & 0x80000000u, a = u ^ sign;
  const uint32_t small = static_cast<uint32_t>(bits_of(from_bits(static_cast<int32_t>(a)) + 0.5f)) - 0x3f000000u;
  const uint32_t normal = (a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>((a >= 0x477ff000u ? special : a < 0x38800000u ? small : normal) | sign >> 16);
}

// ---- reading -------------------------------------------------------------------------------------------------------
template <class A>
constexpr Dtype kNative = sizeof(A) == 4 ? Dtype::f32 : Dtype::f64;

template <class A, class T, class F>
inline Vec<A> converted(const T* p, int64_t n, F f) {
  A buf[kLanes<A>] = {};
  if (n == kLanes<A>) {  // a constant count vectorises
    for (int k = 0; k < kLanes<A>; ++k) buf[k] = static_cast<A>(f(p[k]));
  } else {
    for (int64_t k = 0; k < n; ++k) buf[k] = static_cast<A>(f(p[k]));
  }
  return loadu(buf);
}
template <class A>
RLKERN_RARE Vec<A> load_any(const void* data, Dtype dtype, int64_t i, int64_t n) {
  auto same = [](auto v) { return v; };
  switch (dtype) {
    case Dtype::f32: return converted<A>(static_cast<const float*>(data) + i, n, same);
    case Dtype::f64: return converted<A>(static_cast<const double*>(data) + i, n, same);
    case Dtype::f16: return converted<A>(static_cast<const uint16_t*>(data) + i, n, widen_f16);
    case Dtype::bf16: return converted<A>(static_cast<const uint16_t*>(data) + i, n, widen_bf16);
    case Dtype::b8: return converted<A>(static_cast<const uint8_t*>(data) + i, n, [](uint8_t v) { return v != 0; });
    case Dtype::u8: return converted<A>(static_cast<const uint8_t*>(data) + i, n, same);
    case Dtype::i32: return converted<A>(static_cast<const int32_t*>(data) + i, n, same);
    case Dtype::i64: return converted<A>(static_cast<const int64_t*>(data) + i, n, same);
  }
  return Vec<A>{};
}

inline int64_t bytes_of(Dtype d) {
  switch (d) {
    case Dtype::f64:
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    default: return 1;
  }
}

// How a loop body reads and writes. Direct: whole vectors of the arithmetic type, without a call (a call in the loop would
// push its carries and constants out of the registers). Any: every dtype, ragged ends.
struct Direct {};
struct Any {};

// One row of an operand. `n` at each call: how many lanes lie inside the row; the others read as 0, or as the row's one value.
template <class A>
struct Column {
  const char* data;
  Dtype dtype;
  bool native, per_row;
  Vec<A> value{};  // the row's one value, if per_row
  Column(const Operand& x, const Rows& rows, int64_t r)
      : data(static_cast<const char*>(x.data)), dtype(x.dtype), native(x.dtype == kNative<A>), per_row(x.inner_stride == 0) {
    if (!data) return;
    data += rows.base(x, r) * bytes_of(dtype);
    if (per_row && rows.len(r) > 0) value = splat(load_any<A>(data, dtype, 0, 1)[0]);
  }
  explicit operator bool() const { return data != nullptr; }
  bool direct() const { return !data || native || per_row; }
  Vec<A> operator()(int64_t i, int64_t n) const {
    if (native && !per_row && n == kLanes<A>) return loadu(reinterpret_cast<const A*>(data) + i);
    return per_row ? value : load_any<A>(data, dtype, i, n);
  }
  Vec<A> operator()(Direct, int64_t i, int64_t) const { return per_row ? value : loadu(reinterpret_cast<const A*>(data) + i); }
  Vec<A> operator()(Any, int64_t i, int64_t n) const { return (*this)(i, n); }
  // masked lanes as zeros; a vector without a valid lane is not read
  template <class Way>
  Vec<A> valid(Way way, int64_t i, int64_t n, uint32_t m) const {
    if (m == kAllLanes<A>) return (*this)(way, i, n);
    return m ? blend(m, (*this)(way, i, n), Vec<A>{}) : Vec<A>{};
  }
  Vec<A> valid(int64_t i, int64_t n, uint32_t m) const { return valid(Any{}, i, n, m); }
};

// The value of a per-row operand (B,).
template <class A>
inline A row_value(const Operand& x, int64_t r) {
  return load_any<A>(x.data, x.dtype, r * x.row_stride, 1)[0];
}

// ---- work -----------------------------------------------------------------------------------------------------------

// Rows of about `work` elements each; short jobs stay on the calling thread (a fork costs more than they do).
template <class F>
inline void parallel_rows(int64_t rows, int64_t total, int threads, F&& f) {
  constexpr int64_t kSerial = 1 << 17, kChunk = 1 << 15;  // elements; measured in docs/performance.md
  const int64_t per_row = rows > 0 ? total / rows + 1 : 1;
  // large jobs in few chunks: each chunk's streams start anew for the prefetcher
  const int64_t share = threads > 1 ? total / (16 * threads) : total, chunk = share > kChunk ? share : kChunk;
  const int64_t grain = chunk / per_row > 1 ? chunk / per_row : 1;
  auto call = [](void* g, int64_t begin, int64_t end) { (*static_cast<F*>(g))(begin, end); };
  parallel_chunks(rows, grain, total < kSerial ? 1 : threads, call, const_cast<void*>(static_cast<const void*>(&f)));
}

// Zeroed memory for one call. Not std::vector: its code would be shared between ISAs by the linker.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(n > 0 ? static_cast<T*>(std::calloc(static_cast<size_t>(n), sizeof(T))) : nullptr) {
    if (n > 0 && !data) out_of_memory();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// ---- writing -------------------------------------------------------------------------------------------------------
// Streaming (non-temporal stores) pays only where the outputs would not have stayed in the cache anyway: by the bytes the
// op touches in all. The figure is measured in docs/performance.md.
inline bool worth_streaming(int64_t elements, int64_t bytes_per_element) { return elements * bytes_per_element > (int64_t{8} << 20); }
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <class A>
inline void stream_store(A* p, Vec<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  storeu(p, v);
#endif
}

// One row of an output. A null address takes writes and drops them.
template <class A>
struct OutColumn {
  char* data;
  Dtype dtype;
  bool native, stream;
  OutColumn(const Operand& x, const Rows& rows, int64_t r, bool want_stream)
      : data(static_cast<char*>(x.data)), dtype(x.dtype), native(x.dtype == kNative<A>), stream(false) {
    if (!data) return;
    data += rows.base(x, r) * bytes_of(dtype);
    stream = want_stream && native && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }
  explicit operator bool() const { return data != nullptr; }
  bool direct() const { return !data || native; }
  void operator()(Direct, int64_t i, int64_t, Vec<A> v) const {
    if (!data) return;
    A* p = reinterpret_cast<A*>(data) + i;
    stream ? stream_store(p, v) : storeu(p, v);
  }
  void operator()(Any, int64_t i, int64_t n, Vec<A> v) const { (*this)(i, n, v); }
  void operator()(int64_t i, int64_t n, Vec<A> v) const {
    if (!data) return;
    if (native && n == kLanes<A>) {
      A* p = reinterpret_cast<A*>(data) + i;
      return stream ? stream_store(p, v) : storeu(p, v);
    }
    put_lanes(i, n, v);
  }

 private:
  RLKERN_RARE void put_lanes(int64_t i, int64_t n, Vec<A> v) const {
    A buf[kLanes<A>];
    storeu(buf, v);
    for (int64_t k = 0; k < n; ++k) put(i + k, buf[k]);
  }
  void put(int64_t i, A v) const {
    switch (dtype) {
      case Dtype::f32: reinterpret_cast<float*>(data)[i] = static_cast<float>(v); break;
      case Dtype::f64: reinterpret_cast<double*>(data)[i] = static_cast<double>(v); break;
      case Dtype::f16: reinterpret_cast<uint16_t*>(data)[i] = narrow_f16(static_cast<float>(v)); break;
      case Dtype::bf16: reinterpret_cast<uint16_t*>(data)[i] = narrow_bf16(static_cast<float>(v)); break;
      default: break;  // no op returns integers through lanes
    }
  }
};

// A row's loop body, inlined for whole vectors and for the ragged one: its carries must live in registers.
#define RLKERN_INLINE __attribute__((always_inline))

// f(i, n) for the vectors of a row of `length` tokens; n < kLanes only at its right end.
template <class A, bool Reverse, class F>
RLKERN_INLINE inline void for_vectors(int64_t length, F&& f) {
  constexpr int W = kLanes<A>;
  const int64_t whole = length / W * W;
  if (Reverse) {
    if (whole < length) f(whole, length - whole);
    for (int64_t i = whole - W; i >= 0; i -= W) f(i, int64_t{W});
  } else {
    for (int64_t i = 0; i < whole; i += W) f(i, int64_t{W});
    if (whole < length) f(whole, length - whole);
  }
}

// f(Direct, i, kLanes) for whole vectors if `direct`, f(Any, i, n) for all others: each body stands twice, no more.
template <class A, bool Reverse, class F>
RLKERN_INLINE inline void for_lanes(int64_t length, bool direct, F&& f) {
  constexpr int W = kLanes<A>;
  auto count = [length](int64_t i) { return length - i < W ? length - i : int64_t{W}; };
  if (Reverse) {
    int64_t i = (length + W - 1) / W * W - W;
    for (; i >= 0 && !(direct && i + W <= length); i -= W) f(Any{}, i, count(i));
    for (; i >= 0; i -= W) f(Direct{}, i, int64_t{W});
  } else {
    int64_t i = 0;
    for (; direct && i + W <= length; i += W) f(Direct{}, i, int64_t{W});
    for (; i < length; i += W) f(Any{}, i, count(i));
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
