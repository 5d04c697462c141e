// SPDX-License-Identifier: Apache-2.0
// The widest vector of the ISA this file is compiled for, and the few things that C++ has no operator for. Everything sits
// in that ISA's own namespace: an inline function shared between ISAs would be merged by the linker into one of them.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../math/math.h"

namespace rlkern {
namespace RLKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using VF = Vec<float>;
using VD = Vec<double>;
using VI = Vec<int32_t>;
using VL = Vec<int64_t>;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <class A>
constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kLanes<A>) - 1);

template <class A>
inline Vec<A> loadu(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
inline void storeu(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};  // every lane; x - 0 keeps -0.0
}

// ---- the vector half of math.h's vocabulary ------------------------------------------------------------------------
template <>
struct Ops<VF> {
  static constexpr bool kDouble = false;
  static VF constant(double x) { return splat(static_cast<float>(x)); }
  static VF fused(VF a, VF b, VF c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
  }
  static VF power_from(VF shifted) { return (VF)((Vec<uint32_t>)shifted << 23); }
  static VF magnitude(VF x) { return (VF)((VI)x & 0x7fffffff); }
  static VF split(VF x, VF& n) {
    const VI u = (VI)x, e = (u - 0x3f3504f3) >> 23;
    n = __builtin_convertvector(e, VF);
    return (VF)(u - (e << 23));
  }
  static VF at_least(VF x, VF low) {  // the instructions give their second operand where one is NaN
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, low, x);  // gcc 12 warns of the plain one
#elif defined(__AVX2__)
    return _mm256_max_ps(low, x);
#else
    return x < low ? low : x;
#endif
  }
  static VF at_most(VF x, VF high) {
#if defined(__AVX512F__)
    return _mm512_maskz_min_ps(0xffff, high, x);
#elif defined(__AVX2__)
    return _mm256_min_ps(high, x);
#else
    return x > high ? high : x;
#endif
  }
};
template <>
struct Ops<VD> {
  static constexpr bool kDouble = true;
  static VD constant(double x) { return splat(x); }
  static VD fused(VD a, VD b, VD c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
  }
  static VD magnitude(VD x) { return (VD)((VL)x & 0x7fffffffffffffff); }
  static VD at_least(VD x, VD low) { return x < low ? low : x; }
  static VD at_most(VD x, VD high) { return x > high ? high : x; }
  template <class F>
  static VD map(VD x, F f) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
    return x;
  }
};

// ---- lanes as a set of bits ----------------------------------------------------------------------------------------
// lane i: (m >> i) & 1 ? yes : no. A select: what is not chosen reaches nothing, NaN or not.
inline VF blend(uint32_t m, VF yes, VF no) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(m), no, yes);
#elif defined(__AVX2__)
  const VI bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((static_cast<int32_t>(m) - VI{}) & bit) != 0 ? yes : no;
#else
  const VI bit = {1, 2, 4, 8};
  return ((static_cast<int32_t>(m) - VI{}) & bit) != 0 ? yes : no;
#endif
}
inline VD blend(uint32_t m, VD yes, VD no) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_pd(static_cast<__mmask8>(m), no, yes);
#elif defined(__AVX2__)
  const VL bit = {1, 2, 4, 8};
  return ((static_cast<int64_t>(m) - VL{}) & bit) != 0 ? yes : no;
#else
  const VL bit = {1, 2};
  return ((static_cast<int64_t>(m) - VL{}) & bit) != 0 ? yes : no;
#endif
}
// The other way: a comparison's lanes as bits.
inline uint32_t lanes_of(VI c) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)c);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)c));
#else
  uint32_t m = 0;
  for (int i = 0; i < kLanes<float>; ++i) m |= (c[i] != 0 ? 1u : 0u) << i;
  return m;
#endif
}
inline uint32_t lanes_of(VL c) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)c);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)c));
#else
  uint32_t m = 0;
  for (int i = 0; i < kLanes<double>; ++i) m |= (c[i] != 0 ? 1u : 0u) << i;
  return m;
#endif
}

// Is there a lane of x that is not at most `limit`, a NaN among them?
inline bool any_beyond(VF x, VF limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, limit, _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLE_UQ)) != 0;
#else
  return lanes_of(~(x <= limit)) != 0;
#endif
}
inline bool any_beyond(VD x, VD limit) { return lanes_of(~(x <= limit)) != 0; }

// ---- shuffles ------------------------------------------------------------------------------------------------------
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};
template <int K, bool Reverse, class V, int... I>
inline V shift_lanes(V x, V fill, Indices<I...>) {
  constexpr int W = sizeof...(I);
  if constexpr (Reverse) return __builtin_shufflevector(x, fill, (I + K)...);
  else return __builtin_shufflevector(fill, x, (I + W - K)...);
}
// The neighbour K steps away, against the direction of the scan; `fill` supplies what lies past the vector's end.
template <class A, int K, bool Reverse>
inline Vec<A> shift(Vec<A> x, Vec<A> fill) {
  return shift_lanes<K, Reverse>(x, fill, typename MakeIndices<kLanes<A>>::type{});
}

// ---- sums in float64 -----------------------------------------------------------------------------------------------
// Fixed lanes, folded in a fixed order: the result depends on the values alone.
struct Doubles {
  VD a{}, b{};
};
inline Doubles widen(VF x) {
#if defined(__AVX512F__)  // gcc 12 would convert by quarters; maskz, because it warns of the plain form
  const __m256 low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), high = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_maskz_cvtps_pd(0xff, low), _mm512_maskz_cvtps_pd(0xff, high)};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#elif defined(__SSE2__)
  return {_mm_cvtps_pd(x), _mm_cvtps_pd(_mm_movehl_ps(x, x))};
#else
  return {VD{x[0], x[1]}, VD{x[2], x[3]}};
#endif
}
inline Doubles widen(VD x) { return {x, VD{}}; }
inline double fold(VD v) {
  double s = v[0];
  for (int i = 1; i < kLanes<double>; ++i) s += v[i];
  return s;
}
template <class A>
struct Sum {
  Doubles acc;
  void add(Vec<A> x) {
    const Doubles d = widen(x);
    acc.a += d.a;
    if constexpr (sizeof(A) == 4) acc.b += d.b;
  }
  double total() const { return fold(acc.a + acc.b); }
};
// How often a comparison held, per lane: an integer of A's width.
template <class A>
struct Count {
  using Lanes = decltype(Vec<A>{} < Vec<A>{});
  Lanes lanes{};
  void add(Lanes held) {
#if defined(__AVX512F__)
    lanes = held ? lanes + 1 : lanes;  // one instruction under a mask
#else
    lanes -= held;
#endif
  }
  int64_t total() const {
    int64_t n = 0;
    for (int i = 0; i < kLanes<A>; ++i) n += lanes[i];
    return n;
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
