// SPDX-License-Identifier: Apache-2.0
// exp and expm1, once for every backend: one polynomial, explicit fused multiply-adds, no libm in float. V is a float on a
// GPU and a vector of floats on a CPU (csrc/cpu/simd.h); the code is branch-free, so both take the same decisions. A NaN
// comes out as a NaN because every comparison with one is false.
#pragma once
#include "../args.h"

#include <cmath>
#include <cstring>

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
  static RLKERN_HD float at_least(float x, float low) { return x < low ? low : x; }  // a NaN stays
  static RLKERN_HD float at_most(float x, float high) { return x > high ? high : x; }
  static RLKERN_HD float magnitude(float x) { return __builtin_fabsf(x); }
  // a normal number above 0 as m 2^n with m in [sqrt(1/2), sqrt(2)): m, and n as a number
  static RLKERN_HD float split(float x, float& n) {
    int32_t u;
    std::memcpy(&u, &x, 4);
    const int32_t e = (u - 0x3f3504f3) >> 23;
    u -= e * (1 << 23), n = static_cast<float>(e);
    std::memcpy(&x, &u, 4);
    return x;
  }
  // 2^n for a whole n in [-126, 127], from 1.5 * 2^23 + n + 127: n + 127 moves from the mantissa into the exponent
  static RLKERN_HD float power_from(float shifted) {
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
  static RLKERN_HD double at_least(double x, double low) { return x < low ? low : x; }
  static RLKERN_HD double at_most(double x, double high) { return x > high ? high : x; }
  static RLKERN_HD double magnitude(double x) { return __builtin_fabs(x); }
  static RLKERN_HD double fused(double a, double b, double c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  template <class F>
  static RLKERN_HD double map(double x, F f) {
    return f(x);
  }
};
template <class V>
RLKERN_HD V constant(double x) {
  return Ops<V>::constant(x);
}
template <class V>
RLKERN_HD V fused(V a, V b, V c) {
  return Ops<V>::fused(a, b, c);
}

template <class V>
RLKERN_HD V clamped(V x, V low, V high) {  // torch.clamp: a NaN stays
  return Ops<V>::at_most(Ops<V>::at_least(x, low), high);
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
// x = n ln 2 + r with |r| <= ln(2) / 2 and exp(r) = 1 + r + r^2 p; n is a whole number in V, power = 2^(n + shift).
template <class V>
struct Reduced {
  V r, square, p, n, power;
  RLKERN_HD V tail() const { return square * p; }           // exp(r) - 1 - r
  RLKERN_HD V near() const { return fused(square, p, r); }  // exp(r) - 1
};
template <class V>
RLKERN_HD Reduced<V> reduce_bounded(V bounded, double shift) {
  const V magic = constant<V>(12582912 + 127 + shift);  // 1.5 * 2^23 and more: adding it rounds to an integer
  const V shifted = fused(bounded, constant<V>(1.44269504), magic), n = shifted - magic;
  V r = fused(n, constant<V>(-0.693359375), bounded);
  r = fused(n, constant<V>(2.12194440e-4), r);
  // minimax for (exp(r) - 1 - r) / r^2 on |r| <= 0.3467, relative error 4e-9; by pairs: a chain of five would be the
  // longest in every kernel that calls this
  const V square = r * r;
  const V low = fused(constant<V>(1.66666672e-1), r, constant<V>(0.5)), mid = fused(constant<V>(8.33324529e-3), r, constant<V>(4.16665301e-2));
  const V high = fused(constant<V>(1.99087823e-4), r, constant<V>(1.3928744e-3));
  return {r, square, fused(fused(high, square, mid), square, low), n, Ops<V>::power_from(shifted)};
}
template <class V>
RLKERN_HD Reduced<V> reduce_exp(V x, double low, double shift) {  // beyond the bounds the result is the same
  return reduce_bounded(clamped(x, constant<V>(low), constant<V>(89)), shift);
}
template <class V>
RLKERN_HD V scale_by_power(V x, V n) {  // two steps: n leaves the exponent's range at both ends
  const V magic = constant<V>(12582912), bias = constant<V>(12582912 + 127);
  const V half = fused(n, constant<V>(0.5), magic) - magic;
  return x * Ops<V>::power_from(half + bias) * Ops<V>::power_from((n - half) + bias);
}

RLKERN_HD double tail_of_exp(double x) {  // exp(x) - 1 - x in double precision
  if (x > 1.7e308) return x;  // infinite, not infinity less infinity
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
    const Reduced<V> e = reduce_exp(x, -104, 0);
    return scale_by_power(constant<V>(1) + e.near(), e.n);
  }
}
// exp(x) for |x| <= 86: the power of two is a normal number.
template <class V>
RLKERN_HD V exp_bounded(V x) {
  if constexpr (Ops<V>::kDouble) {
    return exp_of(x);
  } else {
    const Reduced<V> e = reduce_bounded(x, 0);
    return fused(e.power, e.near(), e.power);
  }
}
template <class V>
RLKERN_HD V expm1_bounded(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return ::expm1(v); });
  } else {
    const Reduced<V> e = reduce_bounded(x, 0);
    return fused(e.power, e.near(), e.power - constant<V>(1));
  }
}
// exp(x) - 1 = 2 (h near + h - 1/2) with h = 2^(n - 1), which does not overflow where 2^n does. Below -86 it is -1.
template <class V>
RLKERN_HD V expm1_of(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return ::expm1(v); });
  } else {
    const Reduced<V> e = reduce_exp(x, -86, -1);
    const V half = fused(e.power, e.near(), e.power - constant<V>(0.5));
    return half + half;
  }
}
// exp(x) - 1 - x for |x| <= 86, without the cancellation at 0: for n = 0 every term but the polynomial's tail is exactly 0.
template <class V>
RLKERN_HD V exp_minus_1_minus_bounded(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return tail_of_exp(v); });
  } else {
    const Reduced<V> e = reduce_bounded(x, 0);
    return fused(e.power, e.tail(), fused(e.power, e.r, (e.power - constant<V>(1)) - x));
  }
}
// The same for every x, infinite at both infinities.
template <class V>
RLKERN_HD V exp_minus_1_minus(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return tail_of_exp(v); });
  } else {
    const Reduced<V> e = reduce_exp(x, -86, -1);
    const V linear = fused(constant<V>(-0.5), Ops<V>::at_most(x, constant<V>(89)), e.power - constant<V>(0.5));
    const V half = fused(e.power, e.tail(), fused(e.power, e.r, linear));
    return half + half;
  }
}

// ---- log -----------------------------------------------------------------------------------------------------------
// -infinity at 0, NaN below. A subnormal number is scaled first.
template <class V>
RLKERN_HD V log_of(V x) {
  if constexpr (Ops<V>::kDouble) {
    return Ops<V>::map(x, [](double v) { return ::log(v); });
  } else {
    const V zero = constant<V>(0), least = constant<V>(1.17549435e-38), infinity = constant<V>(__builtin_inf());
    V n;
    const V m = Ops<V>::split(x < least ? x * constant<V>(8388608) : x, n);
    n = x < least ? n - constant<V>(23) : n;
    // minimax for (log(1 + f) - f + f^2 / 2) / f^3, relative error of the log 6e-9; by pairs
    const V f = m - constant<V>(1), square = f * f;
    const V p01 = fused(constant<V>(-0.25000838), f, constant<V>(0.333333312)), p23 = fused(constant<V>(-0.166227649), f, constant<V>(0.200012927));
    const V p45 = fused(constant<V>(-0.131641864), f, constant<V>(0.141996959)), p67 = fused(constant<V>(-0.0764610149), f, constant<V>(0.127791136));
    const V p = fused(fused(p67, square, p45), square * square, fused(p23, square, p01));
    V tail = fused(f * square, p, constant<V>(-0.5) * square);
    tail = fused(n, constant<V>(-2.12194440e-4), tail);
    const V found = fused(n, constant<V>(0.693359375), f + tail);
    const V special = x == zero ? -infinity : (x == infinity ? x : constant<V>(__builtin_nan("")));
    return (x > zero) & (x < infinity) ? found : special;
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
