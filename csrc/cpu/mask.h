// SPDX-License-Identifier: Apache-2.0
// A mask of any dtype as one bit a lane; for those who ask, its values as weights.
#pragma once
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

template <int W>
inline uint32_t nonzero_lanes(const int64_t* p) {
  uint32_t m = 0;
#if defined(__AVX512F__)
  for (int k = 0; k < W; k += 8) {
    const __m512i v = _mm512_loadu_si512(p + k);
    m |= static_cast<uint32_t>(_mm512_test_epi64_mask(v, v)) << k;
  }
#elif defined(__AVX2__)
  for (int k = 0; k < W; k += 4) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + k));
    const __m256d zero = _mm256_castsi256_pd(_mm256_cmpeq_epi64(v, _mm256_setzero_si256()));
    m |= static_cast<uint32_t>(~_mm256_movemask_pd(zero) & 15) << k;
  }
#else
  for (int k = 0; k < W; ++k) m |= static_cast<uint32_t>(p[k] != 0) << k;
#endif
  return m;
}
template <int W>
inline uint32_t nonzero_lanes(const uint8_t* p) {
  uint32_t m = 0;
#if defined(__SSE2__)
  if constexpr (W == 16) {
    const __m128i zero = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
    return static_cast<uint32_t>(~_mm_movemask_epi8(zero)) & 0xffff;
  }
  if constexpr (W == 8) {
    const __m128i zero = _mm_cmpeq_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
    return static_cast<uint32_t>(~_mm_movemask_epi8(zero)) & 0xff;
  }
#endif
  for (int k = 0; k < W; ++k) m |= static_cast<uint32_t>(p[k] != 0) << k;
  return m;
}
template <int W, class T>
inline uint32_t nonzero_lanes(const T* p) {
  uint32_t m = 0;
  for (int k = 0; k < W; ++k) m |= static_cast<uint32_t>(p[k] != 0) << k;
  return m;
}

// One row of a mask as bits; an absent mask is all ones. Lanes past the row's end are 0.
struct MaskRow {
  const char* data;
  Dtype dtype;
  bool per_row;
  MaskRow(const Operand& x, const Rows& rows, int64_t r) : data(static_cast<const char*>(x.data)), dtype(x.dtype), per_row(x.inner_stride == 0) {
    if (data) data += rows.base(x, r) * bytes_of(dtype);
  }
  bool direct() const { return !data || (!per_row && (dtype == Dtype::i64 || dtype == Dtype::b8 || dtype == Dtype::u8)); }
  template <int W>
  uint32_t lanes(Direct, int64_t i, int64_t) const {
    if (!data) return static_cast<uint32_t>((uint64_t{1} << W) - 1);
    if (dtype == Dtype::i64) return nonzero_lanes<W>(reinterpret_cast<const int64_t*>(data) + i);
    return nonzero_lanes<W>(reinterpret_cast<const uint8_t*>(data) + i);
  }
  template <int W>
  uint32_t lanes(Any, int64_t i, int64_t n) const {
    return lanes<W>(i, n);
  }
  template <int W>
  uint32_t lanes(int64_t i, int64_t n) const {
    const uint32_t inside = static_cast<uint32_t>((uint64_t{1} << n) - 1);
    if (!data) return inside;
    if (per_row) return any(0, 1) ? inside : 0;
    if (n < W) return any(i, n);
    if (dtype == Dtype::i64) return nonzero_lanes<W>(reinterpret_cast<const int64_t*>(data) + i);
    if (dtype == Dtype::b8 || dtype == Dtype::u8) return nonzero_lanes<W>(reinterpret_cast<const uint8_t*>(data) + i);
    if constexpr (W == kLanes<float>) {
      if (dtype == Dtype::f32) return lanes_of((VI)(loadu(reinterpret_cast<const float*>(data) + i) != 0));
      if (dtype == Dtype::i32) return lanes_of(loadu(reinterpret_cast<const int32_t*>(data) + i) != 0);
    }
    return any(i, W);
  }
  // Does it hold a weight in [begin, end): a value other than 0 and 1?
  bool weighs(int64_t begin, int64_t end) const {
    if (!data || begin == end) return false;
    if (per_row) begin = 0, end = 1;
    auto half = [&](int one) {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(data);
      int found = 0;
      for (int64_t k = begin; k < end; ++k) found |= ((p[k] & 0x7fff) != 0) & (p[k] != one);
      return found != 0;
    };
    auto number = [&](auto* p) {
      int found = 0;
      for (int64_t k = begin; k < end; ++k) found |= (p[k] != 0) & (p[k] != 1);
      return found != 0;
    };
    switch (dtype) {
      case Dtype::f32: return number(reinterpret_cast<const float*>(data));
      case Dtype::f64: return number(reinterpret_cast<const double*>(data));
      case Dtype::f16: return half(0x3c00);
      case Dtype::bf16: return half(0x3f80);
      case Dtype::i32: return number(reinterpret_cast<const int32_t*>(data));
      case Dtype::i64: return number(reinterpret_cast<const int64_t*>(data));
      case Dtype::u8: return number(reinterpret_cast<const uint8_t*>(data));
      default: return false;
    }
  }

 private:
  RLKERN_RARE uint32_t any(int64_t i, int64_t n) const {
    uint32_t m = 0;
    for (int64_t k = 0; k < n; ++k) m |= static_cast<uint32_t>(one(i + k)) << k;
    return m;
  }
  bool one(int64_t i) const {
    switch (dtype) {
      case Dtype::f32: return reinterpret_cast<const float*>(data)[i] != 0;
      case Dtype::f64: return reinterpret_cast<const double*>(data)[i] != 0;
      case Dtype::f16:
      case Dtype::bf16: return (reinterpret_cast<const uint16_t*>(data)[i] & 0x7fff) != 0;
      case Dtype::i32: return reinterpret_cast<const int32_t*>(data)[i] != 0;
      case Dtype::i64: return reinterpret_cast<const int64_t*>(data)[i] != 0;
      default: return data[i] != 0;
    }
  }
};

// Mask lanes of all rows, kept between two sweeps: 1/64 of an int64 mask. One uint16_t holds a vector's lanes.
struct KeptLanes {
  uint16_t* lanes;
  int64_t length;
  const int64_t* cu;
  int width;
  KeptLanes(const Rows& r, int w, uint16_t* p) : lanes(p), length(r.length), cu(r.cu), width(w) {}
  static int64_t count(const Rows& r, int w) { return r.total() / w + r.count; }
  uint16_t* row(int64_t r) const {  // packed: at most cu[r] / width + r vectors lie before row r
    return lanes + (cu ? cu[r] / width + r : r * ((length + width - 1) / width));
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
