// SPDX-License-Identifier: Apache-2.0
// exp and expm1, once for every backend: one polynomial, explicit fused multiply-adds, no libm in float. V is a float on a
// GPU and a vector of floats on a CPU (csrc/cpu/simd.h); the code is branch-free, so both take the same decisions. A NaN
// comes out as a NaN because every comparison with one is false.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RLKERN_HD __host__ __device__ inline
#else
#define RLKERN_HD inline
#endif

#ifndef RLKERN_ISA
#define RLKERN_ISA base
#endif

namespace rlkern {
namespace RLKERN_ISA {

// ---- vocabulary: what has no operator; csrc/cpu/simd.h adds the vectors --------------------------------------------
template <class V>
struct Ops;
template <>
struct Ops<float> {
  static constexpr bool kDouble = false;
  static RLKERN_HD float constant(double x) { return static_cast<float>(x); }
  static RLKERN_HD float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;  // without the instruction fmaf is a slow library call
#endif
  }
  // 2^n for a whole n in [-126, 127]: n + 127 moves from the mantissa of 2^23 + n + 127 into the exponent
  static RLKERN_HD float power_of_two(float n) {
    const float shifted = n + 8388735.0f;
    uint32_t u;
    std::memcpy(&u, &shifted, 4);
    u <<= 23;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};
template <>
struct Ops<double> {
  static constexpr bool kDouble = true;
  static RLKERN_HD double constant(double x) { return x; }
  static RLKERN_HD double fused(double a, double b, double c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  template <class F>
  static RLKERN_HD double map(double x, F f) { return f(x); }
};
template <class V>
RLKERN_HD V constant(double x) { return Ops<V>::constant(x); }
template <class V>
RLKERN_HD V fused(V a, V b, V c) { return Ops<V>::fused(a, b, c); }

template <class V>
RLKERN_HD V clamped(V x, V low, V high) {  // torch.clamp: a NaN stays
  const V y = x < low ? low : x;
  return y > high ? high : y;
}
template <class V>
RLKERN_HD V minimum(V a, V b) {  // torch.minimum: NaN if either is
  const V least = a < b ? a : b;
  return a != a ? a : least;
}
template <class V>
RLKERN_HD V maximum(V a, V b) {
  const V most = a > b ? a : b;
  return a != a ? a : most;
}

// ---- exp -----------------------------------------------------------------------------------------------------------
// x = n ln 2 + r with |r| <= ln(2) / 2 and tail = exp(r) - 1 - r; n stays a whole number in V.
template <class V>
struct Reduced {
  V r, tail, n;
};
template <class V>
RLKERN_HD Reduced<V> reduce_exp(V x) {
  const V bounded = clamped(x, constant<V>(-104), constant<V>(89));  // beyond: exp is 0 or infinite all the same
  const V magic = constant<V>(12582912);                             // 1.5 * 2^23: adding it rounds to an integer
  const V n = fused(bounded, constant<V>(1.44269504), magic) - magic;
  V r = fused(n, constant<V>(-0.693359375), bounded);
  r = fused(n, constant<V>(2.12194440e-4), r);
  // tail = r^2 p(r): minimax for exp(r) on |r| <= 0.35
  V p = constant<V>(1.98759866e-4);
  p = fused(p, r, constant<V>(1.39330327e-3));
  p = fused(p, r, constant<V>(8.33348557e-3));
  p = fused(p, r, constant<V>(4.16657962e-2));
  p = fused(p, r, constant<V>(1.66666657e-1));
  p = fused(p, r, constant<V>(0.5));
  return {r, r * r * p, n};
}
template <class V>
RLKERN_HD V scale_by_power(V x, V n) {  // two steps: n leaves the exponent's range at both ends
  const V magic = constant<V>(12582912);
  const V half = fused(n, constant<V>(0.5), magic) - magic;
  return x * Ops<V>::power_of_two(half) * Ops<V>::power_of_two(n - half);
}

RLKERN_HD double tail_of_exp(double x) {  // exp(x) - 1 - x in double precision
  if (!(x > -0.02 && x < 0.02)) return ::expm1(x) - x;
  double p = 1.0 / 40320;  // Taylor to x^8: beyond double precision here
  p = p * x + 1.0 / 5040;
  p = p * x + 1.0 / 720;
  p = p * x + 1.0 / 120;
  p = p * x + 1.0 / 24;
  p = p * x + 1.0 / 6;
  return x * x * (p * x + 0.5);
}

template <class V>
RLKERN_HD V exp_of(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return ::exp(v); });
  } else {
    const Reduced<V> e = reduce_exp(x);
    return scale_by_power(constant<V>(1) + (e.r + e.tail), e.n);
  }
}
// exp(x) - 1
template <class V>
RLKERN_HD V expm1_of(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return ::expm1(v); });
  } else {
    const Reduced<V> e = reduce_exp(x);
    const V near = e.r + e.tail;
    const V far = scale_by_power(constant<V>(1) + near, e.n) - constant<V>(1);
    return e.n == constant<V>(0) ? near : far;
  }
}
// exp(x) - 1 - x without the cancellation at 0: there it is the polynomial's tail itself.
template <class V>
RLKERN_HD V exp_minus_1_minus(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return tail_of_exp(v); });
  } else {
    const Reduced<V> e = reduce_exp(x);
    const V far = (scale_by_power(constant<V>(1) + (e.r + e.tail), e.n) - constant<V>(1)) - x;
    return e.n == constant<V>(0) ? e.tail : far;
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
